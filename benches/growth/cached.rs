//! A cached user: what asking for one costs and what keeping one takes, with up to 1,000,000 of them; and what a changed
//! override costs whoever follows the log. In process, with the parts that the service is made of, filled by its warm start.

use std::{
    hint::black_box,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use hallpass::{
    cache::Cache,
    check::{Checker, Freshness, Source},
    feed::{self, Progress},
    loader::Loader,
    model::{BootTime, Change, OrganizationId},
    selfcheck::sampler,
    store::{DatabaseUrl, Store},
    upkeep::warm_up,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    Result,
    members::{FIRST_ORGANIZATION, Member},
    report::{Report, Unit},
};

const SIZES: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];
const NAMES: [&str; 4] = ["1,000", "10,000", "100,000", "1,000,000"];

/// Checks a round, after some that are not counted: of a cache of 1,000 the processor's own caches hold every user then.
const CHECKS: usize = 20_000;
const CHECKS_BEFORE: usize = 4_000;

/// Rounds in which the sizes take turns.
const ROUNDS: usize = 31;

const CHANGES: usize = 20;

/// After whatever the log has had meanwhile.
const FIRST_SEQ: i64 = 1_000_000_000;

const MEMORY_MB_MAX: f64 = 350.0;
const COST_TIMES_MAX: f64 = 1.2;

/// What an empty RPC costs a server of tonic's, of processor time: DESIGN's prototype.
const EMPTY_RPC_NS: f64 = 6_600.0;

/// Making 100,000 entries invalid one by one would take more than a hundred times this.
const APPLY_NS_MAX: f64 = 10_000.0;

/// How long the staleness of an answer here may be: the rounds must not wait for the feed.
const STALENESS_MAX: Duration = Duration::from_secs(60);

/// As long as it takes until freed memory is given back.
const SETTLE: Duration = Duration::from_secs(1);

pub(crate) async fn run(report: &mut Report, url: &str, members: &[Member]) -> Result<()> {
    let url: DatabaseUrl = url.parse()?;
    let largest = memory(report, &url, members).await?;
    let mut parts = Vec::with_capacity(SIZES.len());
    for size in &SIZES[..SIZES.len() - 1] {
        parts.push(Parts::warm(&url, *size).await?);
    }
    parts.push(largest);
    cost(report, &parts, members)?;
    changes(report, &parts[SIZES.len() - 1].checker.cache, members)
}

/// The parts of a service that answer checks, with so many users cached.
struct Parts {
    checker: Checker,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Parts {
    async fn start(url: &DatabaseUrl) -> Result<Self> {
        let store = Arc::new(Store::new(url)?);
        let cache = Arc::new(Cache::new(SIZES[SIZES.len() - 1] as u64));
        let progress = Arc::<Progress>::default();
        let follow = feed::follow(url.clone(), Arc::clone(&cache), Arc::clone(&progress));
        let follow = tokio::spawn(follow);
        let (loader, load) = Loader::new(
            Arc::clone(&store),
            Arc::clone(&cache),
            Arc::clone(&progress),
        );
        let load = tokio::spawn(load);
        let (sampler, _compares_nothing) = sampler(NonZeroU32::MAX);
        let checker = Checker::new(cache, progress, loader, store, STALENESS_MAX, sampler);
        while checker.progress.lease().is_none() {
            sleep(Duration::from_millis(5)).await;
        }
        Ok(Self {
            checker,
            _tasks: [follow, load].map(AbortOnDropHandle::new),
        })
    }

    async fn fill(&self, users: usize) -> Result<()> {
        let warmed = warm_up(&self.checker.store, &self.checker.loader, users as u64).await?;
        if warmed == users as u64 {
            Ok(())
        } else {
            Err(format!("{warmed} users were cached instead of {users}").into())
        }
    }

    async fn warm(url: &DatabaseUrl, users: usize) -> Result<Self> {
        let parts = Self::start(url).await?;
        parts.fill(users).await?;
        Ok(parts)
    }
}

/// Returns what was measured last, full.
async fn memory(report: &mut Report, url: &DatabaseUrl, members: &[Member]) -> Result<Parts> {
    let mut section = report.section(
        "memory of 1,000,000 cached users, 30 permissions and one of 6 roles each, 901 organizations",
        &["growth of the process's resident memory, with mimalloc as the program has it"],
    );
    let parts = Parts::start(url).await?;
    let before = resident_bytes()?;
    let started = Instant::now();
    parts.fill(members.len()).await?;
    let took = started.elapsed().as_secs_f64();
    sleep(SETTLE).await;
    let bytes = resident_bytes()? - before;
    section.ask(
        "1,000,000 cached users",
        bytes / 1e6,
        Unit::Megabytes,
        MEMORY_MB_MAX,
    );
    section.tell("a user", bytes / members.len() as f64, Unit::Bytes);
    section.tell("the warm start took", took, Unit::Seconds);
    Ok(parts)
}

fn resident_bytes() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kilobytes.ok_or("no VmRSS")?.parse::<f64>()? * 1_024.0)
}

fn cost(report: &mut Report, parts: &[Parts], members: &[Member]) -> Result<()> {
    let mut section = report.section(
        "a check of a cached user, by how many are cached",
        &[
            "processor time; in it: lease, lookup with the cache's own accounts, decision, evidence, counters; users drawn uniformly",
            "not in it: the RPC, parsing, authentication, limits, the clock, the drawing; medians of 31 rounds in turns",
        ],
    );
    let mut draws = StdRng::seed_from_u64(1);
    let mut taken = [const { Vec::new() }; SIZES.len()];
    for _ in 0..ROUNDS {
        for ((size, parts), taken) in SIZES.iter().zip(parts).zip(&mut taken) {
            let mut draw = |_| members[draws.random_range(0..*size)];
            let drawn: Vec<Member> = (0..CHECKS_BEFORE + CHECKS).map(&mut draw).collect();
            let (before, counted) = drawn.split_at(CHECKS_BEFORE);
            check(&parts.checker, before)?;
            let before = spent();
            check(&parts.checker, counted)?;
            taken.push((spent() - before).as_nanos() as f64 / CHECKS as f64);
        }
    }
    let medians = taken.map(median);
    for (users, nanos) in NAMES.iter().zip(medians) {
        section.tell(&format!("{users} users"), nanos, Unit::Nanoseconds);
    }
    let (least, most) = (medians[0], medians[SIZES.len() - 1]);
    section.ask(
        "a check with 1,000,000 users, in process, of one with 1,000",
        most / least,
        Unit::Times,
        COST_TIMES_MAX,
    );
    section.tell(
        "more with 1,000,000 users than with 1,000",
        most - least,
        Unit::Nanoseconds,
    );
    let share = (most - least) / EMPTY_RPC_NS * 100.0;
    section.tell("that is, of an empty RPC's 6.6 µs", share, Unit::Percent);
    section.tell(
        "a check with an empty RPC around it, of one with 1,000",
        (EMPTY_RPC_NS + most) / (EMPTY_RPC_NS + least),
        Unit::Times,
    );
    Ok(())
}

/// Processor time of this thread.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::from_secs(time.tv_sec.unsigned_abs())
        + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

fn check(checker: &Checker, members: &[Member]) -> Result<()> {
    let arrived = BootTime::now();
    for member in members {
        let known = checker.know(*member, Freshness::MinimizeLatency, arrived);
        let known = known.now_or_never().ok_or("a cached user was loaded")??;
        if known.evidence.source != Source::Cache {
            return Err("a cached user was answered by the database".into());
        }
        black_box(checker.decide(&known, "can_approve_expenses"));
    }
    Ok(())
}

fn median(mut taken: Vec<f64>) -> f64 {
    taken.sort_by(f64::total_cmp);
    taken[taken.len() / 2]
}

/// The last of all: it makes entries invalid.
fn changes(report: &mut Report, cache: &Cache, members: &[Member]) -> Result<()> {
    let mut section = report.section(
        "what a changed override costs whoever follows the log",
        &["the cache made to know of it, in process; its members' entries are found out when they are asked for"],
    );
    let last = members.last().ok_or("no members")?;
    let mut seq = FIRST_SEQ;
    for (name, organization) in [
        ("100,000 cached members", FIRST_ORGANIZATION),
        ("1,000 cached members", last.organization),
    ] {
        let mut taken: Vec<f64> = (0..CHANGES)
            .map(|_| {
                seq += 1;
                apply(cache, seq, organization)
            })
            .collect();
        taken.sort_by(f64::total_cmp);
        let what = |which: &str| format!("organization of {name}, {which} of {CHANGES}");
        section.tell(&what("p50"), taken[CHANGES / 2], Unit::Nanoseconds);
        section.ask(
            &what("longest"),
            taken[CHANGES - 1],
            Unit::Nanoseconds,
            APPLY_NS_MAX,
        );
    }
    if cache.get(&members[0]).is_some() {
        return Err("a changed override has left an entry valid".into());
    }
    Ok(())
}

/// Nanoseconds.
fn apply(cache: &Cache, seq: i64, organization: OrganizationId) -> f64 {
    let change = Change::Organization(organization);
    let started = Instant::now();
    cache.apply(seq, &change);
    started.elapsed().as_nanos() as f64
}
