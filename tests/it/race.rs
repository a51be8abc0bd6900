//! A load and the feed racing for one subject: forced step by step, and by brute force on the real cache.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hallpass::{
    cache::Cache,
    check::{Checker, Freshness, Source},
    feed::{Lease, Progress},
    loader::Loader,
    model::{
        BootTime, Catalog, Change, Membership, OrganizationId, Position, Subject,
        SubjectPermissions, UserId,
    },
    selfcheck,
    store::Store,
};
use uuid::Uuid;

const START: i64 = 10;

fn at(seq: i64) -> Position {
    Position { seq, uid: 1 }
}

fn subject(organization: u64, user: u64) -> Subject {
    Subject {
        organization: OrganizationId(Uuid::from_u64_pair(organization, organization)),
        user: UserId(Uuid::from_u64_pair(0, user)),
    }
}

/// What a load found; the role says at which head.
fn found_at(head: i64) -> SubjectPermissions {
    SubjectPermissions {
        catalog: Arc::new(Catalog::default()),
        membership: Some(Arc::new(Membership {
            role: head.to_string().into(),
            ..Membership::default()
        })),
    }
}

fn found_head(permissions: &SubjectPermissions) -> i64 {
    permissions
        .membership
        .as_ref()
        .unwrap()
        .role
        .parse()
        .unwrap()
}

fn cache() -> Cache {
    let cache = Cache::new(10_000);
    cache.begin_epoch(at(START));
    cache
}

#[test]
fn a_load_older_than_a_change_is_not_remembered() {
    let asked = subject(1, 1);
    let (same_organization, elsewhere) = (subject(1, 2), subject(2, 1));
    let cases = [
        (Change::Membership(asked), false),
        // A load of the organization that is older than any change of it is not taken: the next one will be.
        (Change::Membership(same_organization), false),
        (Change::Organization(asked.organization), false),
        (Change::Everything, false),
        (Change::Membership(elsewhere), true),
        (Change::Organization(elsewhere.organization), true),
    ];
    for (change, remembered) in cases {
        let cache = cache();
        // The load's SQL is on its way: its snapshot has entry 11, but not entry 12.
        let epoch = cache.epoch();
        cache.apply(START + 2, &change);
        cache.insert(asked, found_at(START + 1), at(START + 1), epoch);
        assert_eq!(cache.get(&asked).is_some(), remembered, "{change:?}");
        cache.insert(asked, found_at(START + 2), at(START + 2), epoch);
        assert!(cache.get(&asked).is_some(), "a later load after {change:?}");
    }
}

#[test]
fn a_change_ends_exactly_the_entries_it_touches() {
    let (asked, neighbour, elsewhere) = (subject(1, 1), subject(1, 2), subject(2, 1));
    let cases = [
        (Change::Membership(asked), [false, true, true]),
        (
            Change::Organization(asked.organization),
            [false, false, true],
        ),
        (Change::Everything, [false, false, false]),
    ];
    for (change, left) in cases {
        let cache = cache();
        for subject in [asked, neighbour, elsewhere] {
            cache.insert(subject, found_at(START), at(START), cache.epoch());
        }
        cache.apply(START + 1, &change);
        assert_eq!(
            [asked, neighbour, elsewhere].map(|subject| cache.get(&subject).is_some()),
            left,
            "{change:?}"
        );
    }
}

#[test]
fn a_load_from_before_the_feed_began_is_not_remembered() {
    let cache = Cache::new(10);
    let asked = subject(1, 1);
    cache.insert(asked, found_at(START), at(START), cache.epoch());
    assert!(cache.get(&asked).is_none(), "nothing follows the log yet");
    cache.begin_epoch(at(START));
    cache.insert(asked, found_at(START - 1), at(START - 1), cache.epoch());
    assert!(
        cache.get(&asked).is_none(),
        "the feed does not tell of entry 10"
    );
}

#[test]
fn a_load_of_another_epoch_is_not_remembered_nor_believed() {
    let cache = cache();
    let (before, during) = (subject(1, 1), subject(1, 2));
    cache.insert(before, found_at(START), at(START), cache.epoch());
    let epoch = cache.epoch();
    cache.begin_epoch(at(START));
    cache.insert(during, found_at(START + 1), at(START + 1), epoch);
    assert!(cache.get(&before).is_none());
    assert!(cache.get(&during).is_none());
}

#[test]
fn a_forgotten_organization_still_refuses_loads_older_than_its_change() {
    let cache = cache();
    // All in one stripe, which forgets those without entries once there are too many.
    let organizations = 5_000;
    for index in 0..organizations {
        let seq = START + 1 + i64::try_from(index).unwrap();
        cache.apply(seq, &Change::Membership(subject(index, 1)));
    }
    let first_change = START + 1;
    let asked = subject(0, 1);
    cache.insert(
        asked,
        found_at(first_change - 1),
        at(first_change - 1),
        cache.epoch(),
    );
    assert!(cache.get(&asked).is_none());
}

/// One subject changes all the time, and whoever looks, right after a removal or right after an insert, finds no entry
/// that is older than what was applied before.
#[test]
fn no_load_slips_past_a_removal_under_stress() {
    const CHANGES: i64 = 300_000;
    const LOADERS: usize = 2;
    let (cache, asked) = (cache(), subject(1, 1));
    let (committed, applied) = (AtomicI64::new(START), AtomicI64::new(START));
    let stopped = AtomicBool::new(false);
    let remembered = AtomicU64::new(0);
    let look = || {
        let applied = applied.load(Ordering::Acquire);
        if let Some(entry) = cache.get(&asked) {
            remembered.fetch_add(1, Ordering::Relaxed);
            let head = entry.head.seq;
            if head < applied {
                stopped.store(true, Ordering::Release);
                panic!("{applied} is applied, and here is an entry from {head}");
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for seq in START + 1..=START + CHANGES {
                committed.store(seq, Ordering::Release);
                cache.apply(seq, &Change::Membership(asked));
                applied.store(seq, Ordering::Release);
                look();
                if stopped.load(Ordering::Acquire) {
                    return;
                }
            }
            stopped.store(true, Ordering::Release);
        });
        for _ in 0..LOADERS {
            scope.spawn(|| {
                while !stopped.load(Ordering::Acquire) {
                    let epoch = cache.epoch();
                    let head = committed.load(Ordering::Acquire);
                    let found = found_at(head);
                    cache.insert(asked, found, at(head), epoch);
                    look();
                }
            });
        }
    });
    let remembered = remembered.load(Ordering::Relaxed);
    assert!(remembered > 100, "only {remembered} entries were seen");
}

/// A reader has the lease of one history when another begins, and finds an entry of that one.
#[test]
fn an_entry_of_another_history_is_no_answer_for_a_lease() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (cache, progress) = (Arc::new(cache()), Arc::new(Progress::default()));
    let checker = checker(&cache, &progress);
    let asked = subject(1, 1);
    let ask = || {
        let freshness = Freshness::MinimizeLatency;
        let known = runtime.block_on(checker.know(asked, freshness, BootTime::now()));
        known.is_ok()
    };
    progress.renew(Lease {
        applied: at(START),
        sent_at: BootTime::now(),
        epoch: cache.epoch(),
    });
    cache.insert(asked, found_at(START), at(START), cache.epoch());
    assert!(ask());
    let epoch = cache.begin_epoch(at(START - 1));
    cache.insert(asked, found_at(START), at(START), epoch);
    assert!(cache.get(&asked).is_some());
    assert!(!ask(), "the lease is of the history before");
    progress.renew(Lease {
        applied: at(START),
        sent_at: BootTime::now(),
        epoch,
    });
    assert!(ask());
}

/// One that can answer from the cache alone.
fn checker(cache: &Arc<Cache>, progress: &Arc<Progress>) -> Checker {
    // Nobody is there: whatever is not cached is no answer.
    let url = "postgresql:///none?host=/nonexistent&user=none"
        .parse()
        .unwrap();
    let store = Arc::new(Store::new(&url).unwrap());
    let (loader, _never_run) =
        Loader::new(Arc::clone(&store), Arc::clone(cache), Arc::clone(progress));
    drop(_never_run);
    Checker::new(
        Arc::clone(cache),
        Arc::clone(progress),
        loader,
        store,
        Duration::from_secs(60),
        selfcheck::sampler(selfcheck::SAMPLE_EVERY).0,
    )
}

/// Subjects of the stress run, all in one organization, so in one stripe.
const SUBJECTS: u64 = 4;

/// Commits change subjects, a feed applies them and renews the lease, loaders load, and readers ask the checker: an
/// answer at a position must hold every change up to it.
#[test]
fn no_answer_is_older_than_its_position_under_stress() {
    const DURATION: Duration = Duration::from_secs(3);
    const READERS: usize = 2;
    const LOADERS: usize = 2;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cache = Arc::new(cache());
    let progress = Arc::new(Progress::default());
    let checker = checker(&cache, &progress);
    // Every entry of the log after the start, by the subject it changes.
    let log: Mutex<Vec<u64>> = Mutex::new(Vec::new());
    let head = || START + i64::try_from(log.lock().unwrap().len()).unwrap();
    let stopped = AtomicBool::new(false);
    let answers = AtomicU64::new(0);

    thread::scope(|scope| {
        scope.spawn(|| {
            let mut state = 1_u64;
            let deadline = Instant::now() + DURATION;
            while Instant::now() < deadline {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let changed = (state >> 33) % SUBJECTS;
                log.lock().unwrap().push(changed);
                let seq = head();
                cache.apply(seq, &Change::Membership(subject(1, changed)));
                progress.renew(Lease {
                    applied: at(seq),
                    sent_at: BootTime::now(),
                    epoch: cache.epoch(),
                });
            }
            stopped.store(true, Ordering::Release);
        });
        for _ in 0..LOADERS {
            scope.spawn(|| {
                while !stopped.load(Ordering::Acquire) {
                    for user in 0..SUBJECTS {
                        let epoch = cache.epoch();
                        let snapshot = head();
                        thread::yield_now();
                        let found = found_at(snapshot);
                        cache.insert(subject(1, user), found, at(snapshot), epoch);
                    }
                }
            });
        }
        for _ in 0..READERS {
            scope.spawn(|| {
                let mut seen = Vec::new();
                while !stopped.load(Ordering::Acquire) {
                    for user in 0..SUBJECTS {
                        let known = runtime.block_on(checker.know(
                            subject(1, user),
                            Freshness::MinimizeLatency,
                            BootTime::now(),
                        ));
                        let Ok(known) = known else { continue };
                        assert_eq!(known.evidence.source, Source::Cache);
                        seen.push((
                            user,
                            found_head(known.permissions()),
                            known.evidence.position.seq,
                        ));
                    }
                    if seen.len() > 10_000 {
                        check_answers(&log, &mut seen, &answers);
                    }
                }
                check_answers(&log, &mut seen, &answers);
            });
        }
    });
    let answers = answers.load(Ordering::Relaxed);
    assert!(answers > 1_000, "only {answers} answers from the cache");
}

/// No entry of the log after the answer's head and up to its position may have changed the subject.
fn check_answers(log: &Mutex<Vec<u64>>, seen: &mut Vec<(u64, i64, i64)>, answers: &AtomicU64) {
    let log = log.lock().unwrap();
    for (user, head, position) in seen.drain(..) {
        let index = |seq: i64| usize::try_from(seq - START).unwrap();
        let missed = log[index(head)..index(position)]
            .iter()
            .filter(|changed| **changed == user);
        assert_eq!(
            missed.count(),
            0,
            "an answer at {position} for user {user} is from {head}"
        );
        answers.fetch_add(1, Ordering::Relaxed);
    }
}
