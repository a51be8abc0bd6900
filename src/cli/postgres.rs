//! `hallpass postgres`: the private PostgreSQL by itself, for psql and for looking around.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, bail};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};

use crate::embedded::{Options, PrivatePostgres};

/// Run the private PostgreSQL until interrupted, and print its URL
#[derive(Debug, clap::Args)]
pub(super) struct Postgres {
    /// Where the private PostgreSQL lives
    #[arg(long, env = "HALLPASS_DATA_DIR", default_value = ".hallpass")]
    data_dir: PathBuf,
}

impl Postgres {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(self.serve())
    }

    async fn serve(self) -> anyhow::Result<ExitCode> {
        // Before the start, so that a signal that arrives meanwhile stops what was started.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let options = Options {
            data_dir: self.data_dir,
            shim: std::env::current_exe().context("cannot find the hallpass program")?,
            settings: Vec::new(),
        };
        let postgres = spawn_blocking(move || PrivatePostgres::start(&options)).await??;
        print_url(&postgres.url()).context("cannot print the URL")?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
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
