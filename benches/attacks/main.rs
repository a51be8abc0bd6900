//! Attacks on the real program over loopback, each for a few seconds: what a well-behaved caller gets and what the
//! service holds in memory, before, during and after. `-- --overload` offers three times its capacity instead.
//!
//! The attackers keep a stated pace and the caller asks at a rate that leaves the machine room, so that the figures
//! speak of the service and not of the scheduler. Ends with 1 where something that is asked for does not hold.

mod frames;
mod overload;
mod service;

use std::{
    future::Future,
    hint::black_box,
    net::IpAddr,
    pin::Pin,
    process::ExitCode,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use hallpass::{
    auth::{self, Identity},
    limits::{Bounds, Class, Limits},
};
use tokio::{runtime::Builder, task::JoinSet};

use self::service::{Caller, Question, Result, Service};

/// What the well-behaved caller asks, a second.
const OFFERED: u64 = 2_000;

const BEFORE: Duration = Duration::from_secs(2);
const DURING: Duration = Duration::from_secs(5);
const AFTER: Duration = Duration::from_secs(2);

/// Of what was answered before.
const GOODPUT_MIN: f64 = 0.8;

/// Beyond what it was before: what the bounds on connections, streams and requests allow for, in megabytes.
const MEMORY_DURING_MAX_MB: u64 = 256;

/// Beyond what it was before, once the attackers are gone: what an allocator keeps for the next time.
const MEMORY_AFTER_MAX_MB: u64 = 48;

/// The longest that memory may take to come back: calls end with their deadline.
const RETURN_MAX: Duration = Duration::from_secs(15);

/// One attacker's behaviour, for ever.
type Attack = fn() -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// What is done, how many do it, how.
const ATTACKS: [(&str, usize, Attack); 11] = [
    ("rapid reset: 20,000 streams a second", 4, || {
        Box::pin(frames::rapid_reset())
    }),
    ("CONTINUATION: 8 MB of headers a second", 4, || {
        Box::pin(frames::continuation())
    }),
    ("slow headers: 500 x 1 byte a second", 500, || {
        Box::pin(frames::slow_headers())
    }),
    ("metadata of 64 kB, 200 a second", 4, || {
        Box::pin(frames::large_metadata())
    }),
    ("messages of 4 GB begun, 200 a second", 4, || {
        Box::pin(frames::large_messages())
    }),
    ("half-open: 2,000 connections", 2_000, || {
        Box::pin(frames::half_open())
    }),
    ("streams held open: 20 x 1,000", 20, || {
        Box::pin(frames::streams_held_open())
    }),
    ("answers not taken: 10 x 1,000", 10, || {
        Box::pin(frames::answers_not_taken())
    }),
    ("malformed batches not taken: 4 x 10 a second", 4, || {
        Box::pin(frames::malformed_batches_not_taken())
    }),
    ("watches of 4 MiB begun: 10 x 1,000", 10, || {
        Box::pin(frames::watches_unfinished())
    }),
    ("700,000 items packed, 200 a second", 4, || {
        Box::pin(frames::packed_batches())
    }),
];

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let overloads = arguments.iter().any(|argument| argument == "--overload");
    if overloads {
        // Before any thread or process begins: they inherit it.
        overload::leave_a_core_to_the_service()?;
    }
    // As the service's own: else the generator's connections starve one another.
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .global_queue_interval(1)
        .build()?;
    runtime.block_on(run(overloads, &arguments))
}

async fn run(overloads: bool, arguments: &[String]) -> Result<ExitCode> {
    let directory = tempfile::Builder::new()
        .prefix("hallpass-attacks-")
        .tempdir_in("/tmp")?;
    std::fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let threads = if overloads {
        1
    } else {
        std::thread::available_parallelism()?.get()
    };
    let data = directory.path().join("data");
    let service = Service::start(&data, threads).await?;
    let holds = if overloads {
        overload::run(&service).await?
    } else {
        // What cargo adds is no name.
        let named = |name: &str| {
            let mut parts = arguments
                .iter()
                .filter(|part| !part.starts_with("--"))
                .peekable();
            parts.peek().is_none() || parts.any(|part| name.contains(part.as_str()))
        };
        attacks(&service, named).await?
    };
    Ok(if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Nanoseconds that the limits cost a check, all switched on: a place, an address's, a caller's share and rate.
fn cost() -> u128 {
    const CHECKS: u32 = 1_000_000;
    let limits = Limits::new(Bounds {
        requests_in_flight_max: 5_000,
        caller_in_flight_max: 250,
        address_rate_max: u32::MAX,
        credential_rate_max: 100,
        caller_rate_max: u32::MAX,
        caller_list_rate_max: 200,
        trusted_proxies: Vec::new(),
        request_deadline_max: None,
        stream_age_max: None,
    });
    let address = Some(IpAddr::from([192, 0, 2, 1]));
    let caller = auth::Caller {
        identity: Identity::Key("0123456789abcdef".into()),
        ..auth::Caller::clone(&auth::Caller::anyone())
    };
    let started = Instant::now();
    for _ in 0..CHECKS {
        let place = limits.enter(Class::Check);
        let counted = limits.address(address);
        let share = limits.share(&caller, address);
        let checked = limits.caller(&caller, Class::Check);
        drop(black_box((place, counted, share, checked)));
    }
    started.elapsed().as_nanos() / u128::from(CHECKS)
}

async fn attacks(service: &Service, named: impl Fn(&str) -> bool) -> Result<bool> {
    println!("the limits cost a check {} ns", cost());
    println!(
        "a caller asks {OFFERED} cached checks a second; attackers keep the pace that is stated, on the same {} cores",
        std::thread::available_parallelism()?
    );
    println!(
        "{:40}{:>24}{:>26}{:>22}",
        "", "answers a second", "answered in p99", "memory"
    );
    println!(
        "{:40}{:>8}{:>8}{:>8}{:>26}{:>8}{:>7}{:>7}{:>13}",
        "attack",
        "before",
        "during",
        "after",
        "before / during",
        "before",
        "peak",
        "after",
        "connected"
    );
    let caller = service.caller(1).await?;
    // The first answers are from a cold client.
    caller.offer(Question::Cached, OFFERED, BEFORE).await?;
    let mut holds = true;
    for (name, attackers, attack) in ATTACKS {
        if named(name) {
            holds &= one(service, &caller, name, attackers, attack).await?;
        }
    }
    Ok(holds)
}

async fn one(
    service: &Service,
    caller: &Caller,
    name: &str,
    attackers: usize,
    attack: Attack,
) -> Result<bool> {
    let before = caller.offer(Question::Cached, OFFERED, BEFORE).await?;
    let memory_before = service.memory_mb()?;
    let mut attacking = JoinSet::new();
    for _ in 0..attackers {
        attacking.spawn(attack());
    }
    let (during, memory_peak) = tokio::join!(
        caller.offer(Question::Cached, OFFERED, DURING),
        peak(service, DURING)
    );
    let (during, memory_peak) = (during?, memory_peak?);
    attacking.shutdown().await;
    let after = caller.offer(Question::Cached, OFFERED, AFTER).await?;
    let memory_after = returned(service, memory_before).await?;
    let holds = [
        ("goodput", during.answers >= before.answers * GOODPUT_MIN),
        (
            "memory during",
            memory_peak <= memory_before + MEMORY_DURING_MAX_MB,
        ),
        (
            "memory after",
            memory_after <= memory_before + MEMORY_AFTER_MAX_MB,
        ),
    ];
    let p99 = |tally: &service::Tally| {
        let micros = tally.answered_in.value_at_quantile(0.99);
        Duration::from_micros(micros).as_secs_f64() * 1e3
    };
    println!(
        "{name:40}{:>8.0}{:>8.0}{:>8.0}{:>26}{:>5} MB{:>4} MB{:>4} MB{:>13}",
        before.answers,
        during.answers,
        after.answers,
        format!("{:.1} / {:.1} ms", p99(&before), p99(&during)),
        memory_before,
        memory_peak,
        memory_after,
        frames::CONNECTED.swap(0, Ordering::Relaxed)
    );
    for (what, _) in holds.iter().filter(|(_, holds)| !holds) {
        println!("  FAILS: {what}");
    }
    Ok(holds.iter().all(|(_, holds)| *holds))
}

/// The most memory within this time, in megabytes.
async fn peak(service: &Service, time: Duration) -> Result<u64> {
    let started = Instant::now();
    let mut most = 0;
    while started.elapsed() < time {
        most = most.max(service.memory_mb()?);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(most)
}

/// The memory once it has come back, or when it should have.
async fn returned(service: &Service, before: u64) -> Result<u64> {
    let started = Instant::now();
    loop {
        let memory = service.memory_mb()?;
        if memory <= before + MEMORY_AFTER_MAX_MB || started.elapsed() > RETURN_MAX {
            return Ok(memory);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
