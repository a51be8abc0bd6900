//! What a run has counted, and whether that is good.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use crate::history::Wrong;

/// Of each kind, printed in full; the others are counted.
const VIOLATIONS_PRINTED_MAX: u64 = 2;

/// Outside of faults so much is to be answered, and from the cache: refusing everything is not being right.
const ANSWERED_MIN_PERCENT: f64 = 99.0;
const CACHED_MIN_PERCENT: f64 = 50.0;

/// From the first connection that a restarted database accepts until an answer.
const RECOVERY_MAX: Duration = Duration::from_secs(3);

/// Who was asked, how, and what was the matter with it meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asked {
    pub(super) mode: &'static str,
    pub(super) fault: &'static str,
    pub(super) replica: usize,
}

/// Nothing is the matter.
pub(super) const CALM: &str = "none";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    Cache,
    Database,
    Unanswered,
    /// A position that is lost, refused as it should be.
    Refused,
    NotServed,
}

const OUTCOMES: [Outcome; 5] = [
    Outcome::Cache,
    Outcome::Database,
    Outcome::Unanswered,
    Outcome::Refused,
    Outcome::NotServed,
];

#[derive(Default)]
pub(super) struct Report {
    counts: BTreeMap<(&'static str, &'static str, Outcome), u64>,
    wrong: BTreeMap<Wrong, u64>,
    violations: Vec<String>,
    pub(super) faults: BTreeMap<&'static str, u64>,
    pub(super) writes: u64,
    pub(super) lost_writes: u64,
    /// How long each replica took to answer, and to answer from its cache, after each fault was over.
    answered_after: BTreeMap<&'static str, Vec<Duration>>,
    cached_after: BTreeMap<&'static str, Vec<Duration>>,
    pub(super) notes: Vec<String>,
}

impl Report {
    pub(super) fn count(&mut self, asked: &Asked, outcome: Outcome, items: usize) {
        let key = (asked.mode, asked.fault, outcome);
        *self.counts.entry(key).or_default() += u64::try_from(items).unwrap();
    }

    pub(super) fn violation(&mut self, wrong: Wrong, text: impl FnOnce() -> String) {
        let count = self.wrong.entry(wrong).or_default();
        *count += 1;
        if *count <= VIOLATIONS_PRINTED_MAX {
            self.violations.push(format!("{wrong:?}: {}", text()));
        }
    }

    pub(super) fn recovered(
        &mut self,
        fault: &'static str,
        answered: Option<Duration>,
        cached: Option<Duration>,
    ) {
        // One that never came back is as late as can be.
        let late = Duration::MAX;
        let answered_after = self.answered_after.entry(fault).or_default();
        answered_after.push(answered.unwrap_or(late));
        let cached_after = self.cached_after.entry(fault).or_default();
        cached_after.push(cached.unwrap_or(late));
    }

    /// Answers so far.
    pub(super) fn checks(&self) -> u64 {
        self.sum(|_, _, outcome| is_answer(outcome))
    }

    fn sum(&self, wanted: impl Fn(&str, &str, Outcome) -> bool) -> u64 {
        (self.counts.iter())
            .filter(|((mode, fault, outcome), _)| wanted(mode, fault, *outcome))
            .map(|(_, count)| count)
            .sum()
    }

    fn wrongs(&self) -> u64 {
        self.wrong.values().sum()
    }

    /// What is not as it must be; empty when the run was good.
    pub(super) fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.wrongs() > 0 {
            complaints.push(format!("{} answers are wrong", self.wrongs()));
        }
        let calm = |wanted: fn(Outcome) -> bool| {
            self.sum(|_, fault, outcome| fault == CALM && wanted(outcome))
        };
        let answered = calm(is_answer);
        let shares = [
            (
                "answered",
                percent(
                    answered,
                    calm(is_answer) + calm(|o| o == Outcome::Unanswered),
                ),
                ANSWERED_MIN_PERCENT,
            ),
            (
                "answered from the cache",
                percent(calm(|o| o == Outcome::Cache), answered),
                CACHED_MIN_PERCENT,
            ),
        ];
        for (what, share, least) in shares {
            if share < least {
                complaints.push(format!(
                    "outside of faults {share:.2} % were {what}, less than {least} %"
                ));
            }
        }
        for fault in super::faults::RESTARTS {
            let slowest = self
                .answered_after
                .get(fault)
                .and_then(|all| all.iter().max());
            if let Some(slowest) = slowest.filter(|slowest| **slowest > RECOVERY_MAX) {
                complaints.push(format!(
                    "after `{fault}` the first answer took {slowest:.1?}, more than {RECOVERY_MAX:?}"
                ));
            }
        }
        complaints
    }
}

fn is_answer(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Cache | Outcome::Database)
}

#[expect(clippy::cast_precision_loss, reason = "a share is for people")]
fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn median_and_max(all: &[Duration]) -> String {
    let mut sorted = all.to_vec();
    sorted.sort();
    let show = |duration: Duration| match duration {
        Duration::MAX => "never".to_owned(),
        duration => format!("{:.2} s", duration.as_secs_f64()),
    };
    match sorted.as_slice() {
        [] => String::new(),
        all => format!(
            "{} / {}",
            show(all[all.len() / 2]),
            show(all[all.len() - 1])
        ),
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica {}, fault {}", self.replica, self.fault)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nchecks by mode:")?;
        let header =
            OUTCOMES.map(|outcome| format!("{:>12}", format!("{outcome:?}").to_lowercase()));
        writeln!(f, "  {:<24}{}", "", header.join(""))?;
        let modes: BTreeSet<&str> = self.counts.keys().map(|(mode, _, _)| *mode).collect();
        for mode in modes {
            let row = OUTCOMES.map(|o| {
                let count = self.sum(|of, _, outcome| of == mode && outcome == o);
                format!("{count:>12}")
            });
            writeln!(f, "  {mode:<24}{}", row.join(""))?;
        }
        writeln!(
            f,
            "\nchecks by fault, of the replica asked: how often it was made; from its end to the first answer and to \
             the first cached one, median / longest"
        )?;
        writeln!(f, "  {:<24}{}   times", "", header[..4].join(""))?;
        let faults: BTreeSet<&str> = (self.counts.keys().map(|(_, fault, _)| *fault))
            .chain(self.faults.keys().copied())
            .collect();
        for fault in faults {
            let row = OUTCOMES[..4].iter().map(|o| {
                let count = self.sum(|_, of, outcome| of == fault && outcome == *o);
                format!("{count:>12}")
            });
            let row: String = row.collect();
            let times = self.faults.get(fault).map_or(String::new(), u64::to_string);
            let after = |all: &BTreeMap<_, Vec<_>>| {
                all.get(fault)
                    .map_or(String::new(), |all| median_and_max(all))
            };
            let (answered, cached) = (after(&self.answered_after), after(&self.cached_after));
            writeln!(f, "  {fault:<24}{row}{times:>8}   {answered:<18} {cached}")?;
        }
        let calm = |wanted: fn(Outcome) -> bool| {
            self.sum(|_, fault, outcome| fault == CALM && wanted(outcome))
        };
        let (answered, unanswered) = (calm(is_answer), calm(|o| o == Outcome::Unanswered));
        writeln!(
            f,
            "\noutside of faults: {:.3} % answered, {:.1} % of them from the cache",
            percent(answered, answered + unanswered),
            percent(calm(|o| o == Outcome::Cache), answered),
        )?;
        writeln!(
            f,
            "writes: {}, {} of them lost by restores",
            self.writes, self.lost_writes
        )?;
        let count = |wrong| self.wrong.get(&wrong).copied().unwrap_or(0);
        writeln!(
            f,
            "of {} checks: {} stale allows, {} stale denies, {} wrong reasons, {} otherwise wrong",
            self.checks(),
            count(Wrong::StaleAllow),
            count(Wrong::StaleDeny),
            count(Wrong::OtherReason),
            self.wrongs()
                - [Wrong::StaleAllow, Wrong::StaleDeny, Wrong::OtherReason]
                    .map(count)
                    .iter()
                    .sum::<u64>(),
        )?;
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        for violation in &self.violations {
            write!(f, "\n{violation}")?;
        }
        Ok(())
    }
}
