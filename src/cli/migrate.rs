//! `hallpass migrate`: brings a database's schema up to this program's, or says how it stands.

use std::process::ExitCode;

use super::database::Database;
use crate::{
    config::DatabaseSettings,
    store::{
        DedicatedConnection,
        migrations::{self, SchemaState},
    },
};

/// Create or upgrade hallpass's schema
#[derive(Debug, clap::Args)]
pub(super) struct Migrate {
    #[command(flatten)]
    database: DatabaseSettings,

    /// Change nothing; exit with 1 when the schema is behind, ahead, or not this program's
    #[arg(long)]
    check: bool,
}

impl Migrate {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let database = Database::open(&self.database).await?;
        let code = if self.check {
            check(&database).await?
        } else {
            migrate(&database).await?
        };
        database.close().await?;
        Ok(code)
    }
}

async fn migrate(database: &Database) -> anyhow::Result<ExitCode> {
    let mut count = 0;
    migrations::migrate(&database.url, |name| {
        println!("applied {name}");
        count += 1;
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
