//! The command line: one file a command, one enum that names them.

mod postgres;

use std::{io, process::ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Permission checks served from your own PostgreSQL tables.
#[derive(Debug, Parser)]
#[command(name = "hallpass", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Postgres(postgres::Postgres),
}

/// Runs the command that the process was given; each chooses its exit code, and an error is 2.
///
/// # Errors
/// Whatever kept the command from its work.
pub fn run() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    log_to_stderr();
    match cli.command {
        Command::Postgres(command) => command.run(),
    }
}

/// Standard output belongs to what a command answers.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
}
