//! `hallpass migrate`: brings a database's schema up to this program's, says how it stands or what would be done, or takes
//! hallpass off the database again.

use std::process::ExitCode;

use super::{answer, database::Database};
use crate::{
    config::DatabaseSettings,
    store::{
        DedicatedConnection,
        migrations::{self, Progress, SchemaState},
    },
};

/// Put hallpass on a database, or upgrade it there
#[derive(Debug, clap::Args)]
pub(super) struct Migrate {
    #[command(flatten)]
    database: DatabaseSettings,

    #[command(flatten)]
    instead: Instead,
}

/// What to do other than migrate.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Instead {
    /// Change nothing; exit with 1 when the schema is behind, ahead, or not this program's
    #[arg(long)]
    check: bool,

    /// Change nothing; print what would be run, as a script for psql
    #[arg(long)]
    dry_run: bool,

    /// Take hallpass off the database; tables and audit rows stay, what it replaced comes back
    #[arg(long)]
    uninstall: bool,
}

impl Migrate {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let database = Database::open(&self.database).await?;
        let code = match self.instead {
            Instead { check: true, .. } => check(&database).await?,
            Instead { dry_run: true, .. } => {
                answer(&migrations::plan(&database.url).await?)?;
                ExitCode::SUCCESS
            }
            Instead {
                uninstall: true, ..
            } => {
                migrations::uninstall(&database.url, say).await?;
                println!(
                    "hallpass is off this database; its audit rows are in public.hallpass_audit_log"
                );
                ExitCode::SUCCESS
            }
            Instead { .. } => migrate(&database).await?,
        };
        database.close().await?;
        Ok(code)
    }
}

fn say(progress: Progress) {
    match progress {
        Progress::Note(note) => println!("note: {note}"),
        Progress::Applied(name) => println!("applied {name}"),
        Progress::Building(statement) => println!("{statement}"),
        Progress::Waiting(name) => println!("{name} waits for a lock on a table that is in use"),
    }
}

async fn migrate(database: &Database) -> anyhow::Result<ExitCode> {
    let mut count = 0;
    migrations::migrate(&database.url, |progress| {
        count += usize::from(matches!(progress, Progress::Applied(_)));
        say(progress);
    })
    .await?;
    println!("the schema is current: {count} migrations applied");
    Ok(ExitCode::SUCCESS)
}

async fn check(database: &Database) -> anyhow::Result<ExitCode> {
    let connection = DedicatedConnection::open(&database.url, None).await?;
    let state = migrations::schema_state(&connection).await?;
    let is_current = state == SchemaState::Current;
    match state {
        SchemaState::Current => println!("the schema is current"),
        SchemaState::Behind(missing) => {
            println!("the schema is behind; to apply: {}", missing.join(", "))
        }
        SchemaState::Ahead(version) => {
            println!("the schema is at version {version}, newer than this program")
        }
        SchemaState::Changed(names) => println!(
            "applied from other files than this program's: {}",
            names.join(", ")
        ),
    }
    Ok(if is_current {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
