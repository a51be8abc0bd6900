//! Histories made by hand, and what the checker says of the answers in them.

use crate::history::{
    Decision, History,
    Mode::{self, AtLeastAsFresh, FullyConsistent, MaxStaleness, MinimizeLatency},
    Position, Reply,
    Wrong::{
        self, OlderThanAsked, OtherReason, StaleAllow, StaleDeny, StalerThanAsked, UnknownPosition,
        WentBack,
    },
};

const BOUND: u64 = 100;

const ALLOW: Decision = Decision {
    allowed: true,
    reason: 4,
};
const BY_NAME: Decision = Decision {
    allowed: true,
    reason: 5,
};
const DENY: Decision = Decision {
    allowed: false,
    reason: 6,
};

/// The entry of this number, in the first history; entries of the second have another uid.
fn at(seq: i64) -> Position {
    Position {
        seq,
        uid: u32::from(seq > 0),
    }
}

fn after_the_restore(seq: i64) -> Position {
    Position { seq, uid: 2 }
}

/// Denied; allowed by entry 10, sent at 1000 and acknowledged at 1010; denied by entry 20, from 2000 to 2010.
fn history() -> History {
    let mut history = History::new(&[DENY], BOUND);
    history.write(at(10), 1_000, 1_010, &[ALLOW]);
    history.write(at(20), 2_000, 2_010, &[DENY]);
    history
}

/// As above, and then put back to entry 10; the old database ended at 3000. Allowed by name from 4000 on.
fn restored() -> History {
    let mut history = history();
    history.restore(at(10), 3_000, &[ALLOW]);
    history.write(after_the_restore(20), 4_000, 4_010, &[BY_NAME]);
    history
}

struct Answer(Mode, u64, u64, Decision, Position, u64);

fn judge(history: &mut History, answer: &Answer) -> Option<Wrong> {
    let Answer(mode, invoked, replied, decision, position, staleness) = *answer;
    let reply = Reply {
        mode,
        invoked,
        replied,
        position,
        staleness,
    };
    let evidence = history.check_evidence(&reply);
    evidence
        .and_then(|()| history.check(0, decision, &reply))
        .err()
}

fn assert_verdicts(history: fn() -> History, cases: &[(Answer, Option<Wrong>)]) {
    for (number, (answer, expected)) in cases.iter().enumerate() {
        assert_eq!(
            judge(&mut history(), answer),
            *expected,
            "case {number}: {:?} {:?} asked {} answered {}",
            answer.0,
            answer.3,
            answer.1,
            answer.2
        );
    }
}

#[test]
fn a_fully_consistent_answer_has_what_was_acknowledged_before_it_was_asked_for() {
    assert_verdicts(
        history,
        &[
            (
                Answer(FullyConsistent, 1_500, 1_510, ALLOW, at(10), 0),
                None,
            ),
            // While a write is under way both are right.
            (Answer(FullyConsistent, 1_005, 1_007, DENY, at(0), 0), None),
            (
                Answer(FullyConsistent, 1_005, 1_007, ALLOW, at(10), 0),
                None,
            ),
            (Answer(FullyConsistent, 1_010, 1_020, DENY, at(0), 0), None),
            (
                Answer(FullyConsistent, 1_011, 1_020, DENY, at(0), 0),
                Some(StaleDeny),
            ),
            (
                Answer(FullyConsistent, 2_011, 2_020, ALLOW, at(10), 0),
                Some(StaleAllow),
            ),
            // Nobody knows of a write before it is sent.
            (
                Answer(FullyConsistent, 900, 999, ALLOW, at(0), 0),
                Some(StaleAllow),
            ),
            (Answer(FullyConsistent, 900, 1_000, ALLOW, at(0), 0), None),
            (
                Answer(FullyConsistent, 1_500, 1_510, BY_NAME, at(10), 0),
                Some(OtherReason),
            ),
            (
                Answer(FullyConsistent, 1_500, 1_510, ALLOW, at(10), 1),
                Some(StalerThanAsked),
            ),
        ],
    );
}

#[test]
fn an_answer_from_the_cache_is_no_older_than_its_bound_nor_than_it_says() {
    let patient = MaxStaleness(1_000);
    assert_verdicts(
        history,
        &[
            (
                Answer(MinimizeLatency, 2_110, 2_111, ALLOW, at(10), 100),
                None,
            ),
            (
                Answer(MinimizeLatency, 2_111, 2_112, ALLOW, at(10), 100),
                Some(StaleAllow),
            ),
            (
                Answer(MinimizeLatency, 2_110, 2_111, ALLOW, at(10), 99),
                Some(StaleAllow),
            ),
            (
                Answer(MinimizeLatency, 1_111, 1_112, DENY, at(0), 100),
                Some(StaleDeny),
            ),
            (
                Answer(MinimizeLatency, 2_050, 2_051, ALLOW, at(10), 101),
                Some(StalerThanAsked),
            ),
            (Answer(patient, 3_010, 3_011, ALLOW, at(10), 1_000), None),
            (
                Answer(patient, 3_011, 3_012, ALLOW, at(10), 1_000),
                Some(StaleAllow),
            ),
            (
                Answer(patient, 2_020, 2_021, ALLOW, at(10), 1_001),
                Some(StalerThanAsked),
            ),
            (
                Answer(patient, 2_020, 2_021, ALLOW, at(10), 5),
                Some(StaleAllow),
            ),
        ],
    );
}

#[test]
fn an_answer_has_what_its_position_has() {
    assert_verdicts(
        history,
        &[
            (
                Answer(MinimizeLatency, 2_005, 2_006, ALLOW, at(10), 50),
                None,
            ),
            (
                Answer(MinimizeLatency, 2_005, 2_006, ALLOW, at(20), 50),
                Some(StaleAllow),
            ),
            (
                Answer(MinimizeLatency, 2_005, 2_006, DENY, at(20), 50),
                None,
            ),
            // It may have more than that.
            (
                Answer(MinimizeLatency, 2_005, 2_006, DENY, at(10), 50),
                None,
            ),
            (
                Answer(MinimizeLatency, 2_005, 2_006, DENY, at(15), 50),
                Some(UnknownPosition),
            ),
            (
                Answer(
                    MinimizeLatency,
                    2_005,
                    2_006,
                    DENY,
                    after_the_restore(20),
                    50,
                ),
                Some(UnknownPosition),
            ),
            (
                Answer(AtLeastAsFresh(at(20)), 2_005, 2_006, DENY, at(20), 50),
                None,
            ),
            (
                Answer(AtLeastAsFresh(at(20)), 2_005, 2_006, DENY, at(10), 50),
                Some(OlderThanAsked),
            ),
            (
                Answer(AtLeastAsFresh(at(20)), 2_005, 2_006, ALLOW, at(20), 50),
                Some(StaleAllow),
            ),
            (
                Answer(AtLeastAsFresh(at(10)), 2_111, 2_112, ALLOW, at(10), 100),
                Some(StaleAllow),
            ),
        ],
    );
}

#[test]
fn what_a_restore_lost_is_true_until_the_old_database_ended_and_not_after() {
    assert_verdicts(
        restored,
        &[
            (Answer(FullyConsistent, 2_500, 2_510, DENY, at(20), 0), None),
            (
                Answer(FullyConsistent, 3_001, 3_010, DENY, at(20), 0),
                Some(StaleDeny),
            ),
            (
                Answer(FullyConsistent, 3_001, 3_010, ALLOW, at(10), 0),
                None,
            ),
            // Whoever has not noticed yet may say so for as long as the bound.
            (
                Answer(MinimizeLatency, 3_100, 3_101, DENY, at(20), 100),
                None,
            ),
            (
                Answer(MinimizeLatency, 3_101, 3_102, DENY, at(20), 100),
                Some(StaleDeny),
            ),
            // What is true again must not be said to be as new as what is lost, nor the other way round.
            (
                Answer(MinimizeLatency, 3_050, 3_051, ALLOW, at(20), 100),
                Some(StaleAllow),
            ),
            (
                Answer(MinimizeLatency, 3_050, 3_051, ALLOW, at(10), 100),
                None,
            ),
            (
                Answer(MinimizeLatency, 4_050, 4_051, ALLOW, at(20), 100),
                Some(StaleAllow),
            ),
            (
                Answer(
                    MinimizeLatency,
                    4_050,
                    4_051,
                    BY_NAME,
                    after_the_restore(20),
                    100,
                ),
                None,
            ),
            // A lost position is refused; the same number in the new history does not stand for it.
            (
                Answer(
                    AtLeastAsFresh(at(20)),
                    4_050,
                    4_051,
                    BY_NAME,
                    after_the_restore(20),
                    0,
                ),
                Some(OlderThanAsked),
            ),
            (
                Answer(AtLeastAsFresh(at(20)), 3_050, 3_051, DENY, at(20), 100),
                None,
            ),
            (
                Answer(
                    AtLeastAsFresh(at(10)),
                    4_050,
                    4_051,
                    BY_NAME,
                    after_the_restore(20),
                    0,
                ),
                None,
            ),
        ],
    );
    let history = restored();
    assert!(history.is_lost(at(20)) && history.is_lost(at(5)));
    assert!(!history.is_lost(at(0)) && !history.is_lost(at(10)));
    assert!(!history.is_lost(after_the_restore(20)));
}

#[test]
fn fully_consistent_answers_do_not_go_back() {
    let (new, old) = (
        Answer(FullyConsistent, 1_001, 1_003, ALLOW, at(10), 0),
        Answer(FullyConsistent, 1_004, 1_009, DENY, at(0), 0),
    );
    let mut history = history();
    assert_eq!(judge(&mut history, &new), None);
    assert_eq!(judge(&mut history, &old), Some(WentBack));
    // Asked before the other was answered: either order is one.
    let overlapping = Answer(FullyConsistent, 1_003, 1_009, DENY, at(0), 0);
    assert_eq!(judge(&mut history, &overlapping), None);
    // From the cache it may be older: it says so.
    let cached = Answer(MinimizeLatency, 1_004, 1_009, DENY, at(0), 50);
    assert_eq!(judge(&mut history, &cached), None);
}

#[test]
fn what_nobody_can_be_answered_with_is_forgotten() {
    let mut history = history();
    let consistent = Answer(FullyConsistent, 2_500, 2_510, DENY, at(20), 0);
    assert_eq!(judge(&mut history, &consistent), None);
    history.forget(1_011);
    assert_eq!(history.describe(0, 9).lines().count(), 2);
    history.forget(2_600);
    assert_eq!(history.describe(0, 9).lines().count(), 1);
    let again = Answer(FullyConsistent, 2_600, 2_610, DENY, at(20), 0);
    assert_eq!(judge(&mut history, &again), None);
}
