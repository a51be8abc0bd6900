//! The metrics of calls, over gRPC under the ecosystem's names and over HTTP alike.

use std::fmt;

use super::{
    Observed,
    page::{Labels, MICROS, Page},
};
use crate::{
    auth::{
        Scope,
        access::{ACCESS, Need},
    },
    counters::Calls,
    grpc::observe::HTTP_STATUSES,
};

/// A method that nobody serves; what a caller makes up is no label.
const UNKNOWN: &str = "unknown";

/// What the objective looks at is there from the beginning, or a rate would not see the first.
const SHOWN_AT_ZERO: [&str; 9] = [
    "OK",
    "Unknown",
    "DeadlineExceeded",
    "Internal",
    "Unavailable",
    "200",
    "500",
    "503",
    "504",
];

/// Names of google.rpc.Code, as the ecosystem's metrics have them.
const GRPC_CODES: [&str; 17] = [
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

pub(super) fn metrics(page: &mut Page<'_>, observed: &Observed) -> fmt::Result {
    let grpc = [
        "grpc_server_started",
        "grpc_server_handled",
        "grpc_server_handling_seconds",
    ];
    let calls = &observed.grpc;
    protocol(page, grpc, calls, ("grpc_code", &GRPC_CODES), |name| {
        let (service, method) = match name {
            UNKNOWN => (UNKNOWN, UNKNOWN),
            name => name.strip_prefix('/')?.split_once('/')?,
        };
        Some([("grpc_service", service), ("grpc_method", method)])
    })?;
    let http = [
        "http_server_started",
        "http_server_handled",
        "http_server_handling_seconds",
    ];
    let calls = &observed.http;
    protocol(page, http, calls, ("http_code", &HTTP_STATUSES), |name| {
        let (method, route) = match name {
            UNKNOWN => (UNKNOWN, UNKNOWN),
            name => name.split_once(' ')?,
        };
        Some([("http_method", method), ("http_route", route)])
    })
}

/// Begun, ended, and how long it took. What a method never ended with is left out: it would be most of the page.
fn protocol(
    page: &mut Page<'_>,
    [started, handled, seconds]: [&str; 3],
    calls: &Calls,
    (outcome_label, outcomes): (&'static str, &[&'static str]),
    labels: impl Fn(&'static str) -> Option<Labels<2>> + Copy,
) -> fmt::Result {
    let methods = || {
        let rows = ACCESS
            .iter()
            .map(|(name, need, _)| (*name, *need == Need::Scope(Scope::Check)));
        let rows = rows.chain([(UNKNOWN, false)]).enumerate();
        rows.filter_map(move |(index, (name, is_check))| Some((labels(name)?, index, is_check)))
    };
    let begun = methods().map(|(labels, index, _)| (labels, calls.count_begun(index)));
    page.counters(started, "Calls that began", begun)?;
    let ended = methods().flat_map(|([a, b], index, is_check)| {
        let outcomes = outcomes.iter().enumerate();
        outcomes.filter_map(move |(outcome, name)| {
            let count = calls.count_ended(index, outcome);
            let is_shown = count > 0 || is_check && SHOWN_AT_ZERO.contains(name);
            is_shown.then_some(([a, b, (outcome_label, *name)], count))
        })
    });
    page.counters(handled, "Calls that ended, by what they ended with", ended)?;
    page.histograms(
        seconds,
        "How long calls took; streams as long as they were open",
        (&calls.micros, MICROS),
        methods().map(|(labels, index, _)| (labels, index)),
    )
}
