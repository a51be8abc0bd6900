//! What was written and what was answered, put together: writes are matched with the log, and an answer is judged once
//! everything is known that was sent before it came.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    sync::Arc,
    time::Instant,
};

use crate::{
    history::{Decision, History, Micros, Mode, Position, Reply, Seconds},
    oracle::World,
};

use super::{
    report::{Asked, Outcome, Report},
    world::{Questions, Write},
};

/// How far back an answer may have been asked for, and its staleness reach: far more than any deadline and any bound.
const MEMORY: Micros = 60_000_000;

/// Worlds to go back to when the database is put back to an older state.
const WORLDS_MAX: usize = 4_000;

/// Positions that readers ask to be at least as fresh as.
const RECENT_MAX: usize = 64;

/// How many versions of its key a violation prints.
const VERSIONS_PRINTED: usize = 6;

/// A run's clock.
#[derive(Clone, Copy)]
pub(super) struct Clock(pub(super) Instant);

impl Clock {
    pub(super) fn now(self) -> Micros {
        u64::try_from(self.0.elapsed().as_micros()).unwrap()
    }
}

/// What a call came to.
pub(super) struct Call {
    pub(super) asked: Asked,
    pub(super) invoked: Micros,
    pub(super) replied: Micros,
    pub(super) mode: Mode,
    pub(super) said: Said,
}

pub(super) enum Said {
    /// Decisions by key, and what they lean on; so many items had none.
    Answers {
        decisions: Vec<(u16, Decision)>,
        unanswered: usize,
        from_cache: bool,
        position: Position,
        staleness: Micros,
    },
    /// So many items have no decision.
    Nothing(usize),
    /// The mode is not served by this build.
    NotServed(usize),
    /// The position that was asked for is none of the log's.
    Refused(usize),
}

/// One write, from before it is sent until the log has told of it, or can no longer.
struct Pending {
    write: Write,
    sent: Micros,
    /// When it was acknowledged, or its connection broke.
    done: Option<Micros>,
}

struct Entry {
    position: Position,
    write: Option<u64>,
    seen: Micros,
}

pub(super) struct Book {
    clock: Clock,
    questions: Arc<Questions>,
    pub(super) report: Report,
    history: History,
    world: World,
    /// After each of the last entries.
    worlds: VecDeque<(Position, World)>,
    writes: HashMap<u64, Pending>,
    last_write: u64,
    /// Read from the log and not applied yet, in order.
    entries: VecDeque<Entry>,
    calls: Vec<Call>,
    recent: VecDeque<Position>,
    lost: VecDeque<Position>,
}

impl Book {
    /// `head` is the log's when its tables hold `world`.
    pub(super) fn new(
        clock: Clock,
        questions: Arc<Questions>,
        world: World,
        head: Position,
        staleness_bound: Micros,
    ) -> Self {
        let decisions = questions.decide(&world);
        let mut history = History::new(&decisions, staleness_bound);
        history.write(head, 0, 0, &decisions);
        Self {
            clock,
            questions,
            report: Report::default(),
            history,
            worlds: VecDeque::from([(head, world.clone())]),
            world,
            writes: HashMap::new(),
            last_write: 0,
            entries: VecDeque::new(),
            calls: Vec::new(),
            recent: VecDeque::from([head]),
            lost: VecDeque::new(),
        }
    }

    /// Takes note of a write that is about to be sent; returns what it is called in the log.
    pub(super) fn send(&mut self, write: Write) -> u64 {
        self.last_write += 1;
        let pending = Pending {
            write,
            sent: self.clock.now(),
            done: None,
        };
        self.writes.insert(self.last_write, pending);
        self.last_write
    }

    /// A write was acknowledged, or nobody will ever say what became of it but the log.
    pub(super) fn done(&mut self, write: u64) {
        let now = self.clock.now();
        if let Some(pending) = self.writes.get_mut(&write) {
            pending.done = Some(now);
        }
        self.apply();
    }

    /// The database said that a write did not happen.
    pub(super) fn failed(&mut self, write: u64) {
        self.writes.remove(&write);
    }

    pub(super) fn is_settled(&self) -> bool {
        self.writes.is_empty() && self.entries.is_empty()
    }

    pub(super) fn answered(&mut self, call: Call) {
        self.calls.push(call);
    }

    pub(super) fn waiting(&self) -> usize {
        self.calls.len()
    }

    /// The newest entry that was read from the log.
    pub(super) fn last_read(&self) -> Position {
        let newest = (self.entries.back()).map(|entry| entry.position);
        newest.unwrap_or_else(|| self.worlds.back().unwrap().0)
    }

    /// An entry that is in the log now.
    pub(super) fn read(&mut self, position: Position, write: Option<u64>) {
        let seen = self.clock.now();
        self.entries.push_back(Entry {
            position,
            write,
            seen,
        });
        self.apply();
    }

    fn apply(&mut self) {
        while let Some(entry) = self.entries.front() {
            let pending = entry.write.and_then(|write| self.writes.get(&write));
            if pending.is_some_and(|pending| pending.done.is_none()) {
                return;
            }
            let Entry {
                position,
                write,
                seen,
            } = self.entries.pop_front().unwrap();
            let pending = write.and_then(|write| self.writes.remove(&write));
            let (sent, acked) = match &pending {
                Some(pending) => {
                    pending.write.apply(&mut self.world);
                    (pending.sent, pending.done.unwrap_or(seen).min(seen))
                }
                None => (seen, seen),
            };
            let decisions = self.questions.decide(&self.world);
            self.history.write(position, sent, acked, &decisions);
            remember(&mut self.worlds, (position, self.world.clone()), WORLDS_MAX);
            remember(&mut self.recent, position, RECENT_MAX);
            self.report.writes += u64::from(pending.is_some());
        }
    }

    /// Everything that had been committed when the log was asked, at `asked`, has been read from it: what is done since
    /// before and is not there never happened. Judges what was answered before the first write that is still open.
    pub(super) fn settle(&mut self, asked: Micros) {
        let known: Vec<u64> = self
            .entries
            .iter()
            .filter_map(|entry| entry.write)
            .collect();
        self.writes.retain(|write, pending| {
            known.contains(write) || pending.done.is_none_or(|done| done >= asked)
        });
        let open = self.writes.values().map(|pending| pending.sent).min();
        let settled = open.map_or(asked, |open| open.min(asked));
        let (mut ripe, unripe): (Vec<Call>, Vec<Call>) = mem::take(&mut self.calls)
            .into_iter()
            .partition(|call| call.replied < settled);
        self.calls = unripe;
        ripe.sort_by_key(|call| call.replied);
        for call in ripe {
            self.judge(&call);
        }
        self.history.forget(settled.saturating_sub(MEMORY));
    }

    fn judge(&mut self, call: &Call) {
        let (decisions, unanswered, from_cache, position, staleness) = match &call.said {
            Said::Answers {
                decisions,
                unanswered,
                from_cache,
                position,
                staleness,
            } => (decisions, *unanswered, *from_cache, *position, *staleness),
            Said::Nothing(items) => {
                return self.report.count(&call.asked, Outcome::Unanswered, *items);
            }
            Said::NotServed(items) => {
                return self.report.count(&call.asked, Outcome::NotServed, *items);
            }
            Said::Refused(items) => return self.judge_refusal(call, *items),
        };
        self.report
            .count(&call.asked, Outcome::Unanswered, unanswered);
        let reply = Reply {
            mode: call.mode,
            invoked: call.invoked,
            replied: call.replied,
            position,
            staleness,
        };
        let outcome = if from_cache {
            Outcome::Cache
        } else {
            Outcome::Database
        };
        self.report.count(&call.asked, outcome, decisions.len());
        let evidence = self.history.check_evidence(&reply);
        for (key, decision) in decisions {
            let key = usize::from(*key);
            let checked = evidence.and_then(|()| self.history.check(key, *decision, &reply));
            if let Err(wrong) = checked {
                let text = || {
                    format!(
                        "{}: {} {} for `{}` in mode {:?}, from the {outcome:?} at {}-{:08x}, staleness {} us\n    \
                         asked at {}, answered at {}; the question's history:\n{}",
                        call.asked,
                        if decision.allowed { "allow" } else { "deny" },
                        decision.reason,
                        self.questions.name(key),
                        call.mode,
                        position.seq,
                        position.uid,
                        staleness,
                        Seconds(call.invoked),
                        Seconds(call.replied),
                        self.history.describe(key, VERSIONS_PRINTED),
                    )
                };
                self.report.violation(wrong, text);
            }
        }
    }

    /// Right when the position is lost, or was about to be.
    fn judge_refusal(&mut self, call: &Call, items: usize) {
        match call.mode {
            Mode::AtLeastAsFresh(position) if self.history.is_lost(position) => {
                self.report.count(&call.asked, Outcome::Refused, items);
            }
            _ => {
                let text = || {
                    format!(
                        "{}: {:?} was refused, which the log has\n",
                        call.asked, call.mode
                    )
                };
                self.report
                    .violation(crate::history::Wrong::RefusedPosition, text);
            }
        }
    }

    /// The database was put back to the state of `copied`; the old one had ended at `ended`. `found` is what its tables
    /// hold now.
    pub(super) fn restore(&mut self, copied: Position, ended: Micros, found: &World) {
        assert!(self.is_settled());
        while (self.worlds.back()).is_some_and(|(position, _)| *position != copied) {
            let (position, _) = self.worlds.pop_back().unwrap();
            remember(&mut self.lost, position, RECENT_MAX);
            self.report.lost_writes += 1;
        }
        let (_, world) = self
            .worlds
            .back()
            .expect("the copy's head was written here");
        assert_eq!(world, found, "the log's order is not the tables'");
        self.world = world.clone();
        let decisions = self.questions.decide(&self.world);
        self.history.restore(copied, ended, &decisions);
        self.recent.clear();
        self.recent.push_back(copied);
    }

    /// The tables hold what the log says.
    pub(super) fn assert_world(&self, found: &World) {
        assert!(self.is_settled());
        assert_eq!(&self.world, found, "the log's order is not the tables'");
    }

    /// Positions to ask for: those of the log, and those that it lost.
    pub(super) fn positions(&self) -> (Vec<Position>, Vec<Position>) {
        (
            self.recent.iter().copied().collect(),
            self.lost.iter().copied().collect(),
        )
    }
}

fn remember<T>(last: &mut VecDeque<T>, value: T, most: usize) {
    if last.len() == most {
        last.pop_front();
    }
    last.push_back(value);
}
