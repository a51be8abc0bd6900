//! `hallpass postgres`: the private PostgreSQL by itself, for psql and for looking around.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, bail};
use tokio::task::spawn_blocking;

use super::{database::start_private, interrupted};
use crate::config::DEFAULT_DATA_DIR;

/// Run the private PostgreSQL until interrupted, and print its URL
#[derive(Debug, clap::Args)]
pub(super) struct Postgres {
    /// Where the private PostgreSQL lives
    #[arg(long, env = "HALLPASS_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,
}

impl Postgres {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        // Before the start, so that a signal that arrives meanwhile stops what was started.
        let interrupted = interrupted()?;
        let postgres = start_private(&self.data_dir).await?;
        print_url(&postgres.url()).context("cannot print the URL")?;
        tokio::select! {
            () = interrupted => {}
            () = postgres.exited() => bail!("postgres ended by itself: postgres.log in the data directory says why"),
        }
        spawn_blocking(move || postgres.stop()).await??;
        Ok(ExitCode::SUCCESS)
    }
}

fn print_url(url: &str) -> io::Result<()> {
    let mut stdout = io::stdout();
    writeln!(stdout, "{url}")?;
    stdout.flush()?;
    writeln!(io::stderr(), "psql '{url}'")
}
