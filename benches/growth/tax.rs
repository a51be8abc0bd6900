//! What recording costs whoever changes permissions: the same tables in two databases, of which one is adopted, written to
//! in turns.

use std::time::Instant;

use hallpass::{embedded::PrivatePostgres, store::migrations::migrate};
use hdrhistogram::Histogram;

use crate::{
    application::{IMPORT, REMOVE_IMPORTED, Result, add_members, application, imports},
    report::{Report, Unit},
};

const UPDATE: &str = "UPDATE profiles SET role = $1 WHERE user_id = md5('u' || $2::integer)::uuid";

const UPDATES: usize = 2_000;

const UPDATE_TAX_MS_MAX: f64 = 5.0;
const IMPORT_S_MAX: f64 = 6.0;

pub(crate) async fn run(report: &mut Report, postgres: &PrivatePostgres) -> Result<()> {
    let mut section = report.section(
        "log tax: 100,000 members, 200 organizations",
        &["each transaction in two databases in turns: one is adopted, the other has no trigger of hallpass's"],
    );
    let without = application(postgres, "without").await?;
    let with = application(postgres, "with").await?;
    add_members(&without).await?;
    add_members(&with).await?;
    migrate(&postgres.url_for("with").parse()?, |_| {}).await?;

    let new = || Histogram::<u64>::new(3);
    let (mut bare, mut recorded) = (new()?, new()?);
    for n in 0..UPDATES {
        for (client, histogram) in [(&without, &mut bare), (&with, &mut recorded)] {
            let role = if n % 2 == 0 { "admin" } else { "volunteer" };
            let user = i32::try_from(n / 2 + 1)?;
            let started = Instant::now();
            client.execute(UPDATE, &[&role, &user]).await?;
            histogram.record(u64::try_from(started.elapsed().as_micros())?)?;
        }
    }
    let at =
        |histogram: &Histogram<u64>, quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
    for (what, quantile) in [("median", 0.5), ("p99", 0.99)] {
        let (bare, recorded) = (at(&bare, quantile), at(&recorded, quantile));
        let rows = format!("one-row transaction, {what} of {UPDATES}");
        section.tell(&format!("{rows}, without"), bare, Unit::Milliseconds);
        section.tell(&format!("{rows}, with"), recorded, Unit::Milliseconds);
    }
    // Where a flush to disk hides the rest of a transaction from the median, it does not from the mean.
    let tax = (recorded.mean() - bare.mean()) / 1e3;
    section.tell(
        "one-row transaction, mean with less mean without",
        tax,
        Unit::Milliseconds,
    );
    section.ask(
        "one-row transaction, median with less median without",
        at(&recorded, 0.5) - at(&bare, 0.5),
        Unit::Milliseconds,
        UPDATE_TAX_MS_MAX,
    );

    let [bare, recorded] = imports([&without, &with], IMPORT, REMOVE_IMPORTED).await?;
    let rows = format!("import of 100,000 rows, median of {}", bare.len());
    let median = |taken: &[f64]| taken[taken.len() / 2];
    section.tell(&format!("{rows}, without"), median(&bare), Unit::Seconds);
    section.ask(
        &format!("{rows}, with"),
        median(&recorded),
        Unit::Seconds,
        IMPORT_S_MAX,
    );
    Ok(())
}
