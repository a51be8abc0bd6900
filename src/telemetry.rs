//! Every metric of the service, each declared once: its name, unit and meaning, and where it is read.
//!
//! Invariant: a scrape asks nobody and changes nothing; it reads what is counted anyway, or what `upkeep` has sampled last.
//! No label has values that a caller can make up.

mod calls;
pub mod otlp;
mod page;
mod process;
mod traces;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    registry::Registry,
};
use tokio::sync::watch;

use self::page::{MICROS, Page, flag, float, signed};
use crate::{
    audit::tail::Tail,
    auth::access::ACCESS,
    check::{Checker, Source},
    counters::Calls,
    grpc::observe::{GRPC_OUTCOMES, HTTP_OUTCOMES, Outcomes},
    limits::{Class, Limit, Limits},
    model::{BootTime, Reason},
    store::{pool::Connections, samples::Sample, timings::Question},
    traces::Traces,
};

/// The content type of [`Metrics::page`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Calls by method as in [`ACCESS`], and by what they ended with.
#[derive(Clone)]
pub struct Observed {
    pub grpc: Arc<Calls>,
    pub http: Arc<Calls>,
}

impl Default for Observed {
    fn default() -> Self {
        // One more for what nobody serves.
        let calls = |outcomes: &Outcomes| Arc::new(Calls::new(ACCESS.len() + 1, outcomes.count));
        Self {
            grpc: calls(&GRPC_OUTCOMES),
            http: calls(&HTTP_OUTCOMES),
        }
    }
}

/// What is known elsewhere, as of now.
pub type Reading<T> = Box<dyn Fn() -> T + Send + Sync>;

/// What metrics are read from.
pub struct Telemetry {
    pub checker: Arc<Checker>,
    pub limits: Arc<Limits>,
    pub tail: Tail,
    pub observed: Observed,
    pub traces: Arc<Traces>,
    /// Whether health says SERVING.
    pub is_serving: Reading<bool>,
    /// What the database said of itself, and when it was asked.
    pub samples: watch::Receiver<Option<(Sample, BootTime)>>,
    /// The pool of those who may change permissions.
    pub changes: Option<Arc<Connections>>,
    /// When each listener's certificate expires, since 1970.
    pub certificates: Vec<(&'static str, Reading<Duration>)>,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

/// All metrics, to be written as a page at each scrape.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Registry>);

impl Metrics {
    #[must_use]
    pub fn new(telemetry: Telemetry) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(telemetry));
        Self(Arc::new(registry))
    }

    /// As OpenMetrics has it.
    ///
    /// # Errors
    /// Never: a string has room.
    pub fn page(&self) -> Result<String, fmt::Error> {
        let mut page = String::new();
        text::encode(&mut page, &self.0)?;
        Ok(page)
    }
}

impl Collector for Telemetry {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut page = Page(encoder);
        calls::metrics(&mut page, &self.observed)?;
        self.answers(&mut page)?;
        self.freshness(&mut page)?;
        self.cache(&mut page)?;
        self.database(&mut page)?;
        self.samples(&mut page)?;
        self.entrance(&mut page)?;
        traces::metrics(&mut page, &self.traces)?;
        process::metrics(&mut page)
    }
}

impl Telemetry {
    fn answers(&self, page: &mut Page<'_>) -> fmt::Result {
        let counts = &self.checker.counts;
        let decisions = Reason::ALL.into_iter().flat_map(|reason| {
            [(Source::Cache, "cache"), (Source::Database, "database")].map(|(source, name)| {
                let labels = [("reason", reason.name()), ("source", name)];
                (labels, counts.decisions(reason, source))
            })
        });
        page.counters(
            "hallpass_decisions",
            "Decisions that callers were told, checks and items of batches, by reason and by where they came from",
            decisions,
        )?;
        let comparisons = &self.checker.sampler.comparisons;
        let compared = [
            ("agreed", &comparisons.agreed),
            ("overtaken", &comparisons.overtaken),
            ("diverged", &comparisons.diverged),
        ];
        page.counters(
            "hallpass_self_checks",
            "Cached answers that were compared with the tables, by what came of it; diverged: a wrong answer was given",
            compared.map(|(outcome, count)| ([("outcome", outcome)], count.load(Ordering::Relaxed))),
        )
    }

    fn freshness(&self, page: &mut Page<'_>) -> fmt::Result {
        let progress = &self.checker.progress;
        page.gauge(
            "hallpass_ready",
            "1 while health says SERVING, else 0",
            flag((self.is_serving)()),
        )?;
        let staleness = progress
            .lease()
            .map(|lease| BootTime::now().since(lease.sent_at));
        page.gauge(
            "hallpass_staleness_seconds",
            "How long ago cached answers were known to be true; +Inf while none is believed",
            staleness.map_or(f64::INFINITY, |staleness| staleness.as_secs_f64()),
        )?;
        page.gauge(
            "hallpass_staleness_bound_seconds",
            "Beyond this staleness answers come from the database (--staleness-bound)",
            self.checker.staleness_bound.as_secs_f64(),
        )?;
        page.gauge(
            "hallpass_log_believed",
            "1 while every change is taken to be in the log; 0 while triggers are missing or disabled, or the log was not inspected",
            flag(progress.log_is_believed()),
        )?;
        page.gauge(
            "hallpass_feed_position",
            "The last entry of the log that the cache has applied",
            signed(progress.lease_position().seq),
        )?;
        let made = &self.checker.cache.invalidations;
        page.counter(
            "hallpass_history_changes",
            "Times that the log turned out to be another one: a failover that lost commits, or a restore",
            made.epochs.load(Ordering::Relaxed),
        )
    }

    fn cache(&self, page: &mut Page<'_>) -> fmt::Result {
        let cache = &self.checker.cache;
        let (users, capacity) = cache.size();
        let (hits, misses) = self.checker.counts.hits_and_misses();
        page.gauge(
            "hallpass_cache_users",
            "Users in the cache, each counted once an organization",
            float(users),
        )?;
        page.gauge(
            "hallpass_cache_capacity_users",
            "Users that the cache takes (--cache-capacity)",
            float(capacity),
        )?;
        page.counter(
            "hallpass_cache_hits",
            "Users that were found in the cache, fresh enough",
            hits,
        )?;
        page.counter("hallpass_cache_misses", "Users that were not", misses)?;
        page.counter(
            "hallpass_cache_evictions",
            "Users that made room for others",
            cache.invalidations.evicted_entries.load(Ordering::Relaxed),
        )?;
        let made = &cache.invalidations;
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
        )?;
        page.histogram(
            "hallpass_load_subjects",
            "Users that one statement loads for the misses that arrive together",
            (&self.checker.loader.sizes, 1.0),
        )?;
        page.gauge(
            "hallpass_load_wait_seconds",
            "How long the oldest miss has waited for a statement, all of which are under way; 0: none waits",
            self.checker.loader.waiting().as_secs_f64(),
        )
    }

    fn database(&self, page: &mut Page<'_>) -> fmt::Result {
        let store = &self.checker.store;
        let questions = || Question::ALL.into_iter();
        let label = |question: Question| [("query", question.name())];
        page.histograms(
            "hallpass_database_query_seconds",
            "How long the database took to answer, by what it was asked",
            (&store.timings.micros, MICROS),
            questions().map(|question| (label(question), question as usize)),
        )?;
        page.counters(
            "hallpass_database_errors",
            "Questions that the database refused or did not answer in time",
            questions().map(|question| (label(question), store.timings.errors(question))),
        )?;
        let pools = [
            ("misses", Some(&store.misses)),
            ("reads", Some(&store.reads)),
            ("audits", Some(&store.audits)),
            ("audit_tail", Some(&store.audit_tail)),
            ("changes", self.changes.as_deref()),
        ];
        let pools: Vec<_> = pools
            .into_iter()
            .filter_map(|(name, pool)| Some((name, pool?.usage())))
            .collect();
        page.gauges(
            "hallpass_pool_connections",
            "Connections to the database, by pool and by whether a question is under way",
            pools.iter().flat_map(|(pool, usage)| {
                [("in_use", usage.in_use), ("idle", usage.idle)].map(|(state, count)| {
                    ([("pool", *pool), ("state", state)], float(count as u64))
                })
            }),
        )?;
        page.gauges(
            "hallpass_pool_connections_max",
            "Connections that a pool may have",
            pools
                .iter()
                .map(|(pool, usage)| ([("pool", *pool)], float(usage.max as u64))),
        )?;
        page.gauges(
            "hallpass_pool_waiting",
            "Questions that wait for a connection, or for one to be opened",
            pools
                .iter()
                .map(|(pool, usage)| ([("pool", *pool)], float(usage.waiting as u64))),
        )
    }

    fn samples(&self, page: &mut Page<'_>) -> fmt::Result {
        let (streams, slowest) = self.tail.followers();
        page.gauge(
            "hallpass_audit_streams",
            "Audit streams that are open",
            float(streams as u64),
        )?;
        let (sample, age) = match *self.samples.borrow() {
            Some((sample, at)) => (Some(sample), BootTime::now().since(at).as_secs_f64()),
            None => (None, f64::INFINITY),
        };
        page.gauge(
            "hallpass_sampled_seconds",
            "How long ago the metrics that follow were read from the database; +Inf: they were not yet",
            age,
        )?;
        let Some(sample) = sample else {
            return Ok(());
        };
        let behind = slowest.map_or(0, |slowest| (sample.head_seq - slowest).max(0));
        page.gauge(
            "hallpass_audit_stream_lag_entries",
            "How far the slowest open audit stream is behind the newest entry",
            signed(behind),
        )?;
        page.gauge(
            "hallpass_log_head",
            "The newest entry of the log",
            signed(sample.head_seq),
        )?;
        page.gauge(
            "hallpass_oldest_transaction_seconds",
            "Age of the oldest open transaction that the service's login may see (all with pg_read_all_stats)",
            sample.oldest_transaction.as_secs_f64(),
        )?;
        page.gauge(
            "hallpass_matrix_age_seconds",
            "Since the materialized views were refreshed",
            sample.matrix_age.as_secs_f64() + age,
        )?;
        page.gauge(
            "hallpass_matrix_believed_ratio",
            "Share of the organizations whose rows of the matrix are the truth, 0 to 1",
            sample.matrix_believed,
        )?;
        page.gauge(
            "hallpass_audit_partition_months_ahead",
            "Months after this one that have a partition of the audit log, up to 2; -1: not even this one has",
            signed(sample.partition_months_ahead),
        )
    }

    fn entrance(&self, page: &mut Page<'_>) -> fmt::Result {
        let tally = &self.limits.tally;
        let limits = Limit::ALL
            .into_iter()
            .filter(|limit| *limit != Limit::InFlight);
        let limits = limits.map(|limit| (limit.name(), limit.class_name(), tally.refusals(limit)));
        let in_flight = Class::ALL.map(|class| {
            let count = tally.turned_away_of(class);
            (Limit::InFlight.name(), class.name(), count)
        });
        // Too many questions wait for it.
        let counts = &self.checker.counts;
        let database = [
            ("database", Class::Check.name(), counts.turned_away()),
            ("database", Class::List.name(), counts.reads_turned_away()),
        ];
        let refusals = limits.chain(in_flight).chain(database);
        page.counters(
            "hallpass_refusals",
            "Calls that were turned away, by the limit that did it and by class: checks; lists, which are all else and explained checks",
            refusals.map(|(limit, class, count)| ([("limit", limit), ("class", class)], count)),
        )?;
        page.gauges(
            "hallpass_tls_certificate_expiry_seconds",
            "When the certificate in use expires, since 1970",
            (self.certificates.iter())
                .map(|(listener, expires)| ([("listener", *listener)], expires().as_secs_f64())),
        )?;
        page.gauges(
            "hallpass_build_info",
            "1; the version is a label",
            [([("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        )
    }
}
