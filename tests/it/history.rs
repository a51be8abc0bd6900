//! What was true when, and whether an answer could have been given: no IO, no clock, no randomness.
//!
//! A key is one question. The log gives it a list of versions, each true from some instant after the write that made it
//! was sent until some instant before the next write was acknowledged; nobody outside can know better. An answer is
//! right when one version fits its decision, the time that its mode allows and the position that it claims.
//!
//! A restore of the database to an older state begins another era: what was written since is lost, was true until the
//! old database ended, and is true no more.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
};

/// Microseconds on the one clock of a run.
pub(crate) type Micros = u64;

pub(crate) const NEVER: Micros = Micros::MAX;

/// A position in the log; `0` is before everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Position {
    pub(crate) seq: i64,
    pub(crate) uid: u32,
}

/// What is decided of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) allowed: bool,
    /// The number of the contract's reason.
    pub(crate) reason: u8,
}

/// How fresh an answer was asked to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    MinimizeLatency,
    MaxStaleness(Micros),
    AtLeastAsFresh(Position),
    FullyConsistent,
}

/// When an answer was asked for and given, and the evidence that it carries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    pub(crate) mode: Mode,
    pub(crate) invoked: Micros,
    pub(crate) replied: Micros,
    pub(crate) position: Position,
    pub(crate) staleness: Micros,
}

/// Why an answer is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wrong {
    /// Allowed what was denied all the time that the answer may be from.
    StaleAllow,
    /// Denied what was allowed all that time.
    StaleDeny,
    /// Allowed or denied rightly, for another reason than the one that held.
    OtherReason,
    /// A fully consistent answer is older than one that was given before it was asked for.
    WentBack,
    /// The evidence names a position that was never in the log.
    UnknownPosition,
    /// The evidence is older than the position that was asked for, or of a history that does not have it.
    OlderThanAsked,
    /// The evidence says that the answer is older than its mode allows.
    StalerThanAsked,
    /// A position that is in the log was refused.
    RefusedPosition,
}

/// One stretch of a key's history.
#[derive(Clone, Copy, Debug)]
struct Version {
    decision: Decision,
    era: usize,
    /// The entry that made it, and the one of its era that ended it.
    from: i64,
    until: i64,
    /// It was not true before `sent`, nor after `ended`.
    sent: Micros,
    ended: Micros,
}

#[derive(Default)]
struct KeyHistory {
    versions: VecDeque<Version>,
    /// How many versions were dropped from the front: a version's number is this and its index.
    dropped: usize,
    /// For fully consistent answers so far, in the order of their replies: the least version that the next may have.
    floors: VecDeque<(Micros, usize)>,
}

/// Every key's versions, as far back as anybody may still ask.
pub(crate) struct History {
    keys: Vec<KeyHistory>,
    /// The last entry that each era shares with the one before.
    eras: Vec<i64>,
    /// The era that each entry was written in.
    entries: HashMap<Position, usize>,
    /// What the service answers from its cache up to, unless asked otherwise.
    staleness_bound: Micros,
}

impl History {
    /// The keys' decisions before anything is written.
    pub(crate) fn new(decisions: &[Decision], staleness_bound: Micros) -> Self {
        let mut history = Self {
            keys: decisions.iter().map(|_| KeyHistory::default()).collect(),
            eras: vec![0],
            entries: HashMap::new(),
            staleness_bound,
        };
        history.begin_era(0, 0, decisions);
        history
    }

    /// An entry of the log, in the log's order, and the keys that it changes. It was acknowledged, or seen, at `acked`.
    pub(crate) fn write(
        &mut self,
        position: Position,
        sent: Micros,
        acked: Micros,
        decisions: &[Decision],
    ) {
        let era = self.eras.len() - 1;
        self.entries.insert(position, era);
        for (key, decision) in self.keys.iter_mut().zip(decisions) {
            let present = key.versions.back_mut().unwrap();
            if present.decision == *decision {
                continue;
            }
            present.until = position.seq;
            present.ended = acked;
            key.versions.push_back(Version {
                decision: *decision,
                era,
                from: position.seq,
                until: i64::MAX,
                sent,
                ended: NEVER,
            });
        }
    }

    /// The database was put back to `copied`; the one before had ended at `ended`.
    pub(crate) fn restore(&mut self, copied: Position, ended: Micros, decisions: &[Decision]) {
        self.eras.push(copied.seq);
        for key in &mut self.keys {
            key.versions.back_mut().unwrap().ended = ended;
        }
        self.begin_era(copied.seq, ended, decisions);
    }

    fn begin_era(&mut self, from: i64, sent: Micros, decisions: &[Decision]) {
        let era = self.eras.len() - 1;
        for (key, decision) in self.keys.iter_mut().zip(decisions) {
            key.versions.push_back(Version {
                decision: *decision,
                era,
                from,
                until: i64::MAX,
                sent,
                ended: NEVER,
            });
        }
    }

    /// Whether the position is no longer in the log. One that never was counts too.
    pub(crate) fn is_lost(&self, position: Position) -> bool {
        !self.has(self.eras.len() - 1, position)
    }

    /// Whether the log of an era has the position.
    fn has(&self, era: usize, position: Position) -> bool {
        position.seq == 0
            || self.entries.get(&position).is_some_and(|written| {
                *written <= era
                    && (self.eras[written + 1..=era].iter()).all(|shared| position.seq <= *shared)
            })
    }

    /// Whether a version is one that the log has at the position.
    fn holds_at(&self, version: &Version, position: Position) -> bool {
        self.has(version.era, position) && version.until > position.seq
    }

    /// What an answer's evidence may be found to be wrong by itself.
    pub(crate) fn check_evidence(&self, reply: &Reply) -> Result<(), Wrong> {
        let position = reply.position;
        let era = if position.seq == 0 {
            0
        } else {
            *(self.entries.get(&position)).ok_or(Wrong::UnknownPosition)?
        };
        if reply.staleness > self.bound(reply.mode) {
            return Err(Wrong::StalerThanAsked);
        }
        match reply.mode {
            Mode::AtLeastAsFresh(asked) if position.seq < asked.seq || !self.has(era, asked) => {
                Err(Wrong::OlderThanAsked)
            }
            _ => Ok(()),
        }
    }

    fn bound(&self, mode: Mode) -> Micros {
        match mode {
            Mode::MinimizeLatency | Mode::AtLeastAsFresh(_) => self.staleness_bound,
            Mode::MaxStaleness(bound) => bound,
            Mode::FullyConsistent => 0,
        }
    }

    /// Whether the decision could be given for the key. Fully consistent answers are to come in the order of their
    /// replies; every write that was sent before the reply must have been told of.
    pub(crate) fn check(
        &mut self,
        key: usize,
        decision: Decision,
        reply: &Reply,
    ) -> Result<(), Wrong> {
        // What the evidence says is a promise too, and a tighter one.
        let staleness = reply.staleness.min(self.bound(reply.mode));
        let earliest = reply.invoked.saturating_sub(staleness);
        let fits = |version: &Version| {
            version.sent <= reply.replied
                && version.ended >= earliest
                && self.holds_at(version, reply.position)
        };
        let history = &self.keys[key];
        let floor = match reply.mode {
            Mode::FullyConsistent => history.floor(reply.invoked),
            _ => 0,
        };
        let mut wrong = if decision.allowed {
            Wrong::StaleAllow
        } else {
            Wrong::StaleDeny
        };
        let mut found = None;
        for (index, version) in history.versions.iter().enumerate() {
            if !fits(version) {
                continue;
            }
            if version.decision == decision {
                if history.dropped + index >= floor {
                    found = Some(history.dropped + index);
                    break;
                }
                wrong = Wrong::WentBack;
            } else if version.decision.allowed == decision.allowed && wrong != Wrong::WentBack {
                wrong = Wrong::OtherReason;
            }
        }
        let found = found.ok_or(wrong)?;
        if reply.mode == Mode::FullyConsistent {
            self.keys[key].raise_floor(reply.replied, found);
        }
        Ok(())
    }

    /// Forgets what nobody can be answered with who asks for `earliest` or later.
    pub(crate) fn forget(&mut self, earliest: Micros) {
        for key in &mut self.keys {
            while key.versions.front().is_some_and(|v| v.ended < earliest) {
                key.versions.pop_front();
                key.dropped += 1;
            }
            while key.floors.len() > 1 && key.floors[1].0 < earliest {
                key.floors.pop_front();
            }
        }
    }

    /// The key's last versions, a line each.
    pub(crate) fn describe(&self, key: usize, count: usize) -> String {
        let versions = &self.keys[key].versions;
        let skipped = versions.len().saturating_sub(count);
        (versions.iter().skip(skipped))
            .map(|version| format!("    {version}\n"))
            .collect()
    }
}

impl KeyHistory {
    fn floor(&self, invoked: Micros) -> usize {
        let before = self.floors.partition_point(|(at, _)| *at < invoked);
        before
            .checked_sub(1)
            .map_or(0, |index| self.floors[index].1)
    }

    fn raise_floor(&mut self, replied: Micros, version: usize) {
        let (last, floor) = self.floors.back().copied().unwrap_or_default();
        // One that comes out of order says less than it could; the next will do.
        if replied >= last {
            self.floors.push_back((replied, floor.max(version)));
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decision = if self.decision.allowed {
            "allow"
        } else {
            "deny "
        };
        let (reason, from, era) = (self.decision.reason, self.from, self.era);
        write!(
            f,
            "{decision} {reason} from entry {from}, sent {}",
            Seconds(self.sent)
        )?;
        if self.ended != NEVER {
            write!(f, ", ended by {}", Seconds(self.ended))?;
        }
        if era > 0 {
            write!(f, ", era {era}")?;
        }
        Ok(())
    }
}

/// An instant of the run, for people.
pub(crate) struct Seconds(pub(crate) Micros);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06} s", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}
