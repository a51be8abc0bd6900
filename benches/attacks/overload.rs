//! Three times what the service can do, offered whether or not it answers.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::{
    load::{self, Pace},
    service::{Question, Result, Service},
};

/// Calls at once that find the peak: enough to keep both cores and the database busy.
const AT_ONCE: usize = 128;

const PEAK: Duration = Duration::from_secs(4);
const OVERLOAD: Duration = Duration::from_secs(6);

/// Of the peak's answers.
const GOODPUT_MIN: f64 = 0.8;

const REFUSED_IN_MAX: Duration = Duration::from_millis(5);

/// Prints what became of it; returns whether all that is asked for held.
pub(crate) async fn run(service: &Service) -> Result<bool> {
    println!(
        "the load is made on the same {} cores: what making it costs, the service does not have",
        std::thread::available_parallelism()?
    );
    println!(
        "{:10}{:>9}{:>9}{:>9}{:>9}{:>10}{:>24}{:>24}{:>12}",
        "per second",
        "peak",
        "offered",
        "answered",
        "refused",
        "late/lost",
        "answered in p50 / p99",
        "refused in p50 / p99",
        "health"
    );
    let mut holds = true;
    for question in [Question::Database, Question::Cached] {
        holds &= one(service, question).await?;
    }
    Ok(holds)
}

async fn one(service: &Service, question: Question) -> Result<bool> {
    let messages = service.questions(question);
    let peak = load::run(&messages, Pace::AtOnce(AT_ONCE), PEAK)
        .await?
        .answered;
    let offered = peak * 3.0;
    let watcher = service.caller(1).await?;
    let (tally, health) = tokio::join!(
        load::run(&messages, Pace::ASecond(offered), OVERLOAD),
        watcher.watch_health(OVERLOAD)
    );
    let tally = tally?;
    let (serving, asked, longest) = health;
    println!(
        "{:10}{:>9.0}{:>9.0}{:>9.0}{:>9.0}{:>10.0}{:>24}{:>24}{:>12}",
        format!("{question:?}").to_lowercase(),
        peak,
        offered,
        tally.answered,
        tally.refused,
        tally.lost,
        percentiles(&tally.answered_in),
        percentiles(&tally.refused_in),
        format!("{serving}/{asked}")
    );
    let refused_in = |quantile| tally.refused_in.value_at_quantile(quantile);
    let max = u64::try_from(REFUSED_IN_MAX.as_micros())?;
    let asked_for = [
        (
            format!(
                "goodput is at least 80 % of the peak: {:.0} %",
                tally.answered / peak * 100.0
            ),
            tally.answered >= peak * GOODPUT_MIN,
        ),
        (
            "half of the refusals take under 5 ms".to_owned(),
            refused_in(0.5) < max,
        ),
        (
            "99 % of the refusals take under 5 ms".to_owned(),
            refused_in(0.99) < max,
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

fn percentiles(micros: &Histogram<u64>) -> String {
    if micros.is_empty() {
        return "-".to_owned();
    }
    let millis =
        |quantile| Duration::from_micros(micros.value_at_quantile(quantile)).as_secs_f64() * 1e3;
    format!("{:.1} / {:.1} ms", millis(0.5), millis(0.99))
}
