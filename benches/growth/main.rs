//! What grows with users, members and changes, each figure beside what is asked of it. All on a PostgreSQL of its own, which
//! ends with it; `-- SECTION...` takes some sections alone, `--json FILE` writes the same figures as JSON.
//!
//! Ends with 1 where something that is asked for does not hold.

#[path = "../application/mod.rs"]
mod application;
mod cached;
mod members;
mod misses;
mod overrides;
mod refresh;
mod report;
mod service;
mod tax;

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode, time::Instant};

use clap::{Parser, ValueEnum};
use hallpass::embedded::PrivatePostgres;

use self::{
    application::{Result, start_postgres},
    members::Size,
    report::Report,
};

/// As the program has it: an allocator is a part of what a user takes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A million, of which 100,000 in one organization.
const MILLION: Size = Size {
    first_organization: 100_000,
    other_organizations: 900,
    of_each_other: 1_000,
};

/// What grows, and what it costs
#[derive(Parser)]
struct Line {
    /// Measure these alone
    sections: Vec<Section>,

    /// Write the figures as JSON, too
    #[arg(long)]
    json: Option<PathBuf>,

    /// Cargo says so of every bench
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Section {
    /// What recording a change costs whoever makes it
    Tax,
    /// Refresh of the materialized views, and a warm start
    Refresh,
    /// A cached check, and the memory of a cached user, with up to 1,000,000 of them
    Cached,
    /// Misses with 1,000,000 members in the database
    Misses,
    /// A changed override in an organization of 100,000 cached members
    Overrides,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let line = Line::parse();
    let mut sections: BTreeSet<Section> = line.sections.into_iter().collect();
    if sections.is_empty() {
        sections.extend(Section::value_variants());
    }
    let mut report = Report::default();
    let (postgres, _directory) = start_postgres()?;
    if sections.contains(&Section::Tax) {
        tax::run(&mut report, &postgres).await?;
    }
    if sections.contains(&Section::Refresh) {
        refresh::run(&mut report, &postgres).await?;
    }
    if sections.iter().any(|section| *section >= Section::Cached) {
        a_million(&mut report, &postgres, &sections).await?;
    }
    if let Some(path) = line.json {
        std::fs::write(path, report.to_json()? + "\n")?;
    }
    Ok(ExitCode::from(u8::from(!report.holds())))
}

/// The sections that need [`MILLION`] members.
async fn a_million(
    report: &mut Report,
    postgres: &PrivatePostgres,
    sections: &BTreeSet<Section>,
) -> Result<()> {
    let started = Instant::now();
    let database = members::database(postgres, "million", &MILLION).await?;
    println!(
        "\n{} members imported into {} organizations in {:.0} s, with the triggers switched off that record each",
        MILLION.all(),
        1 + MILLION.other_organizations,
        started.elapsed().as_secs_f64()
    );
    // As another replica's that refreshes just now: minutes of it, and gigabytes, are not what is measured here.
    let hold_refresh = "SELECT pg_advisory_lock(1751215212, 3)";
    database.batch_execute(hold_refresh).await?;
    let members = members::members(&database).await?;
    let url = postgres.url_for("million");
    if sections.contains(&Section::Cached) {
        cached::run(report, &url, &members).await?;
    }
    if sections.contains(&Section::Misses) {
        misses::run(report, &url, &members).await?;
    }
    if sections.contains(&Section::Overrides) {
        let of_one = usize::try_from(MILLION.first_organization)?;
        overrides::run(report, &url, &database, &members[..of_one]).await?;
    }
    Ok(())
}
