//! Misses at a steady rate, whatever becomes of those before: each asks for another member, by the clock.

use std::{
    thread,
    time::{Duration, Instant},
};

use hallpass_client::{
    tonic::transport::Channel,
    v1::{Source, permission_service_client::PermissionServiceClient},
};
use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::index};
use rustix::{
    io::Errno,
    thread::clock_nanosleep_absolute,
    time::{ClockId, Timespec, clock_gettime},
};
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    Result,
    members::Member,
    report::{Report, Unit},
    service::{ENDPOINT, Service, question},
};

const A_SECOND: f64 = 1_000.0;

/// Not counted: connections and prepared statements are made.
const BEFORE: Duration = Duration::from_secs(2);
const TIME: Duration = Duration::from_secs(10);

const CONNECTIONS: usize = 4;

/// The cache is not what is measured.
const CACHE_CAPACITY: usize = 1_000;

const P99_MS_MAX: f64 = 5.0;

pub(crate) async fn run(report: &mut Report, url: &str, members: &[Member]) -> Result<()> {
    let mut section = report.section(
        "misses, 1,000,000 members in the database",
        &[
            "check of a member who is not cached, through tonic on 4 connections; calls begin at random, 1,000 a second on \
             average",
            "latency from when a call was to begin; the database reads the live view, and no refresh is under way",
        ],
    );
    let service = Service::start(url, CACHE_CAPACITY).await?;
    let mut channels = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        channels.push(hallpass_client::connect(ENDPOINT).await?);
    }
    // Those that the start has cached come first.
    let strangers = &members[CACHE_CAPACITY..];
    let beginnings = beginnings(BEFORE + TIME);
    let asked = index::sample(
        &mut StdRng::seed_from_u64(2),
        strangers.len(),
        beginnings.len(),
    );
    let mut due = tell_when_due(beginnings);
    let (mut latency, mut lateness) = (Histogram::<u64>::new(3)?, Histogram::<u64>::new(3)?);
    let mut calls = JoinSet::new();
    let started = Instant::now();
    let mut counted = 0;
    for (n, member) in asked.into_iter().enumerate() {
        let Some(intended) = due.recv().await else {
            return Err("the clock has stopped".into());
        };
        let call = ask(
            channels[n % CONNECTIONS].clone(),
            strangers[member],
            intended,
        );
        if intended < started + BEFORE {
            calls.spawn(async { call.await.map(|_| None) });
        } else {
            counted += 1;
            lateness.record(u64::try_from(intended.elapsed().as_micros())?)?;
            calls.spawn(async { call.await.map(Some) });
        }
    }
    while let Some(call) = calls.join_next().await {
        if let Some(took) = call?? {
            latency.record(u64::try_from(took.as_micros())?)?;
        }
    }
    drop(service);

    section.tell(
        "begun",
        f64::from(counted) / TIME.as_secs_f64(),
        Unit::ASecond,
    );
    let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    section.tell("p50", at(0.5), Unit::Milliseconds);
    section.ask(
        "a miss at 1,000 a second, p99",
        at(0.99),
        Unit::Milliseconds,
        P99_MS_MAX,
    );
    section.tell("p99.9", at(0.999), Unit::Milliseconds);
    section.tell(
        "the longest",
        latency.max() as f64 / 1e3,
        Unit::Milliseconds,
    );
    section.tell(
        "of this, begun too late by the bench itself, p99",
        lateness.value_at_quantile(0.99) as f64 / 1e3,
        Unit::Milliseconds,
    );
    Ok(())
}

/// When calls of many who do not know of each other begin.
fn beginnings(time: Duration) -> Vec<Duration> {
    let mut draws = StdRng::seed_from_u64(1);
    let mut at = 0.0;
    std::iter::from_fn(|| {
        // Gaps of a Poisson process.
        at -= (1.0 - draws.random::<f64>()).ln() / A_SECOND;
        Some(Duration::from_secs_f64(at))
    })
    .take_while(|at| *at < time)
    .collect()
}

/// Says of each call that it is due, from a thread of its own: tokio's clock has ticks of a millisecond.
fn tell_when_due(beginnings: Vec<Duration>) -> mpsc::UnboundedReceiver<Instant> {
    let (say, due) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let now = clock_gettime(ClockId::Monotonic);
        let started = Instant::now();
        for beginning in beginnings {
            let at = add(now, beginning);
            while clock_nanosleep_absolute(ClockId::Monotonic, &at) == Err(Errno::INTR) {}
            if say.send(started + beginning).is_err() {
                break;
            }
        }
    });
    due
}

fn add(time: Timespec, duration: Duration) -> Timespec {
    let nanos = time.tv_nsec + i64::from(duration.subsec_nanos());
    Timespec {
        tv_sec: time.tv_sec + duration.as_secs().cast_signed() + nanos / 1_000_000_000,
        tv_nsec: nanos % 1_000_000_000,
    }
}

/// The time from the intended beginning to the answer.
async fn ask(channel: Channel, member: Member, intended: Instant) -> Result<Duration> {
    let answer = PermissionServiceClient::new(channel)
        .check_permission(question(member, "can_approve_expenses"))
        .await?;
    let took = intended.elapsed();
    let source = answer
        .into_inner()
        .evidence
        .map(|evidence| evidence.source());
    if source == Some(Source::Database) {
        Ok(took)
    } else {
        Err("a member whom nobody has asked for was cached".into())
    }
}
