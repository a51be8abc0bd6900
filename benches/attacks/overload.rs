//! Three times what the service can do, offered whether or not it answers.

use std::{
    process::{self, Command, Stdio},
    thread,
    time::Duration,
};

use hallpass::load::{self, Callers, Draw, Outcome, Pace, Questions, Target};
use hdrhistogram::Histogram;
use rustix::thread::sched_setaffinity;
use tokio::task::spawn_blocking;

use crate::service::{self, LISTEN, Question, Result, Service};

/// The service's. With the load on the same core, a refusal waits for whoever is to read it.
const SERVICE_CORE: usize = 0;

/// Calls at once that find the peak: nearly as many as one caller may have.
const AT_ONCE: usize = 240;

/// As a real caller's pool has; together more calls than the service lets one caller have.
const CONNECTIONS: usize = 8;

/// The load shares its core with the database, whose share of it is what the service can do. One to two of these are in each
/// latency.
const TURN: Duration = Duration::from_millis(1);

const PEAK: Duration = Duration::from_secs(4);
const OVERLOAD: Duration = Duration::from_secs(6);

/// Of the peak's answers.
const GOODPUT_MIN: f64 = 0.8;

const REFUSED_IN_MAX: Duration = Duration::from_millis(5);

/// Keeps this process, and what it starts, off the service's core.
pub(crate) fn leave_a_core_to_the_service() -> Result<()> {
    let others = 0..thread::available_parallelism()?.get();
    let others = service::cores(others.filter(|core| *core != SERVICE_CORE));
    sched_setaffinity(None, &others)?;
    Ok(())
}

/// Lets the service and this process run whenever they have something to do, as they would on machines of their own: a
/// refusal's time is then not the database's. Returns whether both do.
fn come_first(service: &Service) -> bool {
    let comes_first = |pid: u32| {
        let chrt = Command::new("chrt")
            .args(["--fifo", "--all-tasks", "--pid", "1", &pid.to_string()])
            .stderr(Stdio::null())
            .status();
        chrt.is_ok_and(|status| status.success())
    };
    comes_first(service.pid()) && comes_first(process::id())
}

/// Prints what became of it; returns whether all that is asked for held.
pub(crate) async fn run(service: &Service) -> Result<bool> {
    service.pin(SERVICE_CORE)?;
    println!("the service has one core; the database and who makes the load have the others");
    if !come_first(service) {
        println!("chrt gives no real-time priority: the scheduler has a part in these times");
    }
    println!(
        "{:10}{:>9}{:>9}{:>9}{:>9}{:>9}{:>8}{:>22}{:>27}{:>9}{:>11}",
        "per second",
        "peak",
        "offered",
        "answered",
        "refused",
        "unsent",
        "lost",
        "answered in p50 / p99",
        "refused p50 / p95 / p99",
        "health",
        "load busy"
    );
    let mut holds = true;
    for question in [Question::Database, Question::Cached] {
        holds &= one(service, question).await?;
    }
    Ok(holds)
}

async fn one(service: &Service, question: Question) -> Result<bool> {
    let questions = Questions {
        path: "/hallpass.v1.PermissionService/CheckPermission",
        token: None,
        messages: service.questions(question).into(),
        draw: Draw::InTurn,
    };
    let peak = load(questions.clone(), Pace::AtOnce(AT_ONCE), PEAK)
        .await?
        .a_second();
    let offered = peak * 3.0;
    let watcher = service.caller(1).await?;
    let (outcome, health) = tokio::join!(
        load(questions, Pace::ASecond(offered), OVERLOAD),
        watcher.watch_health(OVERLOAD)
    );
    let outcome = outcome?;
    let (serving, asked, longest) = health;
    let a_second = |calls: u64| calls as f64 / outcome.elapsed.as_secs_f64();
    println!(
        "{:10}{:>9.0}{:>9.0}{:>9.0}{:>9.0}{:>9.0}{:>8.0}{:>22}{:>27}{:>9}{:>9.0} %",
        format!("{question:?}").to_lowercase(),
        peak,
        offered,
        outcome.a_second(),
        a_second(outcome.refused),
        a_second(outcome.unsent),
        a_second(outcome.lost),
        percentiles(&outcome.answered_in, &[0.5, 0.99]),
        percentiles(&outcome.refused_in, &[0.5, 0.95, 0.99]),
        format!("{serving}/{asked}"),
        outcome.generator * 100.0
    );
    let refused_in = outcome.refused_in.value_at_quantile(0.99);
    let max = u64::try_from(REFUSED_IN_MAX.as_micros())?;
    let refused = if question == Question::Cached {
        // A refusal is as much work as an answer.
        (
            format!("cached questions are answered: {} refused", outcome.refused),
            outcome.refused == 0,
        )
    } else {
        (
            "99 % of the refusals take under 5 ms".to_owned(),
            outcome.refused > 0 && refused_in < max,
        )
    };
    let asked_for = [
        (
            format!(
                "goodput is at least 80 % of the peak: {:.0} %",
                outcome.a_second() / peak * 100.0
            ),
            outcome.a_second() >= peak * GOODPUT_MIN,
        ),
        refused,
        (
            "of what was sent, fewer than one in a thousand are lost or take a second".to_owned(),
            outcome.lost * 1_000 < outcome.answered + outcome.refused,
        ),
        (
            format!("health answered each time, in {longest:.0?} at most"),
            serving == asked,
        ),
    ];
    for (what, holds) in &asked_for {
        println!("  {} {what}", if *holds { "holds:" } else { "FAILS:" });
    }
    Ok(asked_for.iter().all(|(_, holds)| *holds))
}

async fn load(questions: Questions, pace: Pace, time: Duration) -> Result<Outcome> {
    let target = Target::Tcp(LISTEN.to_owned());
    let callers = Callers {
        connections: CONNECTIONS,
        threads: 1,
        turn: TURN,
    };
    let run = move || load::run(&target, &questions, pace, callers, time);
    Ok(spawn_blocking(run).await??)
}

fn percentiles(micros: &Histogram<u64>, quantiles: &[f64]) -> String {
    if micros.is_empty() {
        return "-".to_owned();
    }
    let millis = quantiles.iter().map(|quantile| {
        let micros = micros.value_at_quantile(*quantile);
        format!("{:.1}", Duration::from_micros(micros).as_secs_f64() * 1e3)
    });
    format!("{} ms", millis.collect::<Vec<_>>().join(" / "))
}
