//! What becomes of spans on their way to the collector.

use std::{fmt, sync::atomic::Ordering};

use super::page::Page;
use crate::traces::Traces;

pub(super) fn metrics(page: &mut Page<'_>, traces: &Traces) -> fmt::Result {
    let Some(counts) = traces.counts() else {
        return Ok(());
    };
    let outcomes = [
        ("exported", &counts.exported),
        ("failed", &counts.failed),
        ("dropped", &counts.dropped),
    ];
    page.counters(
        "hallpass_trace_spans",
        "Spans of sampled calls, by what became of them; dropped: too many at once, or the collector is slow",
        outcomes.map(|(outcome, count)| ([("outcome", outcome)], count.load(Ordering::Relaxed))),
    )
}
