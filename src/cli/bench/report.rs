//! What was measured, as a table and as JSON.

use std::time::Duration;

use serde::Serialize;

use crate::load::Outcome;

/// Threads of the load that are this busy may have been what answers waited for.
const GENERATOR_BUSY: f64 = 0.9;

/// Everything that one run measured.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    pub(super) settings: Vec<(String, String)>,
    pub(super) rows: Vec<Row>,
    pub(super) open_loop: Vec<Row>,
    /// Of the service's processor time a check and an empty RPC, round by round; the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ratio_to_empty_rpc: Option<f64>,
    pub(super) promises: Vec<Promise>,
}

/// One measurement.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) what: String,
    /// Calls a second that became due, in an open loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) offered_a_second: Option<f64>,
    pub(super) calls_a_second: f64,
    pub(super) decisions_a_second: f64,
    /// Of the service's process, all of its threads.
    pub(super) cpu_micros_a_decision: Option<f64>,
    pub(super) p50_micros: u64,
    pub(super) p90_micros: u64,
    pub(super) p99_micros: u64,
    pub(super) p999_micros: u64,
    pub(super) max_micros: u64,
    pub(super) refused: u64,
    pub(super) lost: u64,
    pub(super) memory_bytes: Option<u64>,
    /// The share of their time that the threads were busy that made the load.
    pub(super) generator_busy: f64,
}

impl Row {
    /// `decisions` of each call.
    pub(super) fn new(
        what: &str,
        outcome: &Outcome,
        decisions: usize,
        spent: Option<Duration>,
        memory_bytes: Option<u64>,
    ) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "numbers of calls")]
        let (answered, decisions) = (outcome.answered as f64, decisions as f64);
        let micros = |spent: Duration| spent.as_secs_f64() * 1e6 / (answered * decisions);
        let at = |quantile| outcome.answered_in.value_at_quantile(quantile);
        Self {
            what: what.to_owned(),
            offered_a_second: None,
            calls_a_second: outcome.a_second(),
            decisions_a_second: outcome.a_second() * decisions,
            cpu_micros_a_decision: spent.filter(|_| answered > 0.0).map(micros),
            p50_micros: at(0.5),
            p90_micros: at(0.9),
            p99_micros: at(0.99),
            p999_micros: at(0.999),
            max_micros: outcome.answered_in.max(),
            refused: outcome.refused,
            lost: outcome.lost + outcome.unsent,
            memory_bytes,
            generator_busy: outcome.generator,
        }
    }

    pub(super) fn offered(self, a_second: f64) -> Self {
        Self {
            offered_a_second: Some(a_second),
            ..self
        }
    }
}

/// Something that is promised of every release, and what was found.
#[derive(Debug, Serialize)]
pub(super) struct Promise {
    pub(super) what: String,
    pub(super) found: f64,
    pub(super) at_most: Option<f64>,
    pub(super) at_least: Option<f64>,
    pub(super) holds: bool,
}

impl Promise {
    pub(super) fn at_most(what: &str, found: f64, most: f64) -> Self {
        Self {
            what: what.to_owned(),
            found,
            at_most: Some(most),
            at_least: None,
            holds: found <= most,
        }
    }

    pub(super) fn at_least(what: &str, found: f64, least: f64) -> Self {
        Self {
            what: what.to_owned(),
            found,
            at_most: None,
            at_least: Some(least),
            holds: found >= least,
        }
    }

    pub(super) fn line(&self) -> String {
        let asked = match (self.at_most, self.at_least) {
            (Some(most), _) => format!("at most {}", number(most)),
            (_, Some(least)) => format!("at least {}", number(least)),
            _ => String::new(),
        };
        let holds = if self.holds { "holds" } else { "FAILS" };
        format!(
            "  {holds}  {}: {}   ({asked})",
            self.what,
            number(self.found)
        )
    }
}

pub(super) const HEADING: &str = "                               calls/s  decisions/s  cpu µs each      p50      p90      p99    p99.9      max   refused/lost   memory";

/// What there is to say of a row.
pub(super) fn line(row: &Row) -> String {
    let cpu = row
        .cpu_micros_a_decision
        .map_or("-".to_owned(), |micros| format!("{micros:.2}"));
    let memory = row
        .memory_bytes
        .map_or("-".to_owned(), |bytes| format!("{} MB", bytes >> 20));
    let failed = format!("{}/{}", row.refused, row.lost);
    let busy = if row.generator_busy >= GENERATOR_BUSY {
        "   the load's own threads were busy: the service may be faster"
    } else {
        ""
    };
    format!(
        "{:28}{:>10}{:>13}{cpu:>13}{:>9}{:>9}{:>9}{:>9}{:>9}{failed:>15}{memory:>9}{busy}",
        row.what,
        number(row.calls_a_second),
        number(row.decisions_a_second),
        time(row.p50_micros),
        time(row.p90_micros),
        time(row.p99_micros),
        time(row.p999_micros),
        time(row.max_micros),
    )
}

/// Microseconds, as they are best read.
fn time(micros: u64) -> String {
    let duration = Duration::from_micros(micros);
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..100_000 => format!("{:.1} ms", duration.as_secs_f64() * 1e3),
        _ => format!("{:.0} ms", duration.as_secs_f64() * 1e3),
    }
}

/// With as many digits as say something, and commas between thousands.
fn number(number: f64) -> String {
    if number < 100.0 {
        let text = format!("{number:.3}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// What several runs of the same say together.
pub(super) fn together(outcomes: Vec<Outcome>) -> Option<Outcome> {
    #[allow(clippy::cast_precision_loss, reason = "a number of runs")]
    let runs = outcomes.len() as f64;
    let mut all = outcomes.into_iter().reduce(|mut all, other| {
        all.elapsed += other.elapsed;
        all.add(other);
        all
    })?;
    all.generator /= runs;
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_at_a_glance() {
        for (value, text) in [
            (0.0, "0"),
            (0.98, "0.98"),
            (6.612_9, "6.613"),
            (100.0, "100"),
            (1_234.4, "1,234"),
            (929_000.0, "929,000"),
            (12_345_678.0, "12,345,678"),
        ] {
            assert_eq!(number(value), text);
        }
        for (micros, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_234, "1.2 ms"),
            (250_000, "250 ms"),
        ] {
            assert_eq!(time(micros), text);
        }
    }
}
