//! Every metric of the service, each declared once: its name, unit and meaning, and where it is read.
//!
//! Invariant: a scrape asks nobody and changes nothing; it reads what is counted anyway, or what `samples` has found last.
//! No label has values that a caller can make up.

mod page;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder, registry::Registry};

use self::page::Page;
use crate::{
    auth::access::ACCESS,
    check::Checker,
    counters::Calls,
    limits::{Limit, Limits},
    model::BootTime,
};

/// What metrics are read from.
pub struct Telemetry {
    pub checker: Arc<Checker>,
    pub limits: Arc<Limits>,
    /// By method as in [`ACCESS`] and by google.rpc.Code.
    pub grpc_calls: Arc<Calls>,
}

/// Names of google.rpc.Code, as the ecosystem's metrics have them.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

/// All metrics, as they are scraped.
#[must_use]
pub fn registry(telemetry: Telemetry) -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(telemetry));
    registry
}

impl Collector for Telemetry {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut page = Page(encoder);
        self.calls(&mut page)?;
        self.answers(&mut page)?;
        self.invalidations(&mut page)?;
        self.refusals(&mut page)
    }
}

impl Telemetry {
    fn calls(&self, page: &mut Page<'_>) -> fmt::Result {
        let methods = || {
            let rows = ACCESS.iter().enumerate();
            rows.filter_map(|(index, (name, ..))| Some((index, grpc_labels(name)?)))
        };
        let begun = methods().map(|(index, labels)| (labels, self.grpc_calls.count_begun(index)));
        page.counters("grpc_server_started", "Calls that began", begun)?;
        let handled = methods().flat_map(|(index, [service, method])| {
            let codes = CODES.iter().enumerate();
            codes.map(move |(code, name)| {
                let labels = [service, method, ("grpc_code", *name)];
                (labels, self.grpc_calls.count_ended(index, code))
            })
        });
        // A code that a method never ended with is left out: it would be most of the page.
        let handled = handled.filter(|(_, count)| *count > 0);
        page.counters(
            "grpc_server_handled",
            "Calls that ended, by what they ended with",
            handled,
        )?;
        let durations = methods().map(|(index, labels)| (labels, self.grpc_calls.durations(index)));
        page.histograms(
            "grpc_server_handling",
            "How long calls took; streams as long as they were open",
            durations,
        )
    }

    fn answers(&self, page: &mut Page<'_>) -> fmt::Result {
        let progress = &self.checker.progress;
        let staleness = progress
            .lease()
            .map(|lease| BootTime::now().since(lease.sent_at));
        page.gauge(
            "hallpass_staleness_seconds",
            "How long ago cached answers were known to be true; +Inf while none is believed",
            staleness.map_or(f64::INFINITY, |staleness| staleness.as_secs_f64()),
        )?;
        page.gauge(
            "hallpass_log_believed",
            "1 while the log is taken to hold every change, else 0",
            f64::from(u8::from(progress.log_is_believed())),
        )?;
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 entries")]
        let position = progress.lease_position().seq as f64;
        page.gauge(
            "hallpass_feed_position",
            "The last entry of the log that the cache has applied",
            position,
        )?;
        let comparisons = &self.checker.sampler.comparisons;
        let compared = [
            ("agreed", &comparisons.agreed),
            ("overtaken", &comparisons.overtaken),
            ("diverged", &comparisons.diverged),
        ];
        page.counters(
            "hallpass_self_checks",
            "Cached answers that were compared with the tables, by what came of it",
            compared
                .map(|(outcome, count)| ([("outcome", outcome)], count.load(Ordering::Relaxed))),
        )
    }

    fn invalidations(&self, page: &mut Page<'_>) -> fmt::Result {
        let made = &self.checker.cache.invalidations;
        let causes = [
            ("membership", &made.memberships),
            ("named_user", &made.named_users),
            ("override", &made.overrides),
            ("everything", &made.everything),
            ("history", &made.epochs),
        ];
        page.counters(
            "hallpass_invalidations",
            "Changes that ended cached answers, by what changed",
            causes.map(|(cause, count)| ([("cause", cause)], count.load(Ordering::Relaxed))),
        )
    }

    fn refusals(&self, page: &mut Page<'_>) -> fmt::Result {
        let tally = &self.limits.tally;
        page.counters(
            "hallpass_refusals",
            "Calls that were turned away, by the limit that did it",
            Limit::ALL.map(|limit| ([("limit", limit.name())], tally.refusals(limit))),
        )
    }
}

/// `/hallpass.v1.PermissionService/CheckPermission` as its labels.
fn grpc_labels(name: &'static str) -> Option<[(&'static str, &'static str); 2]> {
    let (service, method) = name.strip_prefix('/')?.split_once('/')?;
    Some([("grpc_service", service), ("grpc_method", method)])
}
