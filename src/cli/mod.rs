//! The command line: one file a command, one enum that names them.

mod audit;
mod authenticator;
pub(crate) mod bench;
mod check;
mod database;
mod demo;
mod doctor;
mod keys;
mod list;
mod log;
mod migrate;
mod postgres;
mod reload;
mod serve;
mod settings;
mod supervisor;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
};

use self::{log::LogSettings, settings::Unusable};

/// Permission checks served from your own PostgreSQL tables.
#[derive(Debug, Parser)]
#[command(name = "hallpass", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    log: LogSettings,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Demo(demo::Demo),
    Migrate(migrate::Migrate),
    Doctor(doctor::Doctor),
    Postgres(postgres::Postgres),
    Check(check::Check),
    List(list::List),
    Audit(audit::Audit),
    Keys(keys::Keys),
    Bench(bench::Bench),
    #[command(hide = true)]
    BenchEmpty(bench::empty::BenchEmpty),
}

/// Runs the command that the process was given; each chooses its exit code, and an error is 2.
///
/// # Errors
/// Whatever kept the command from its work.
pub fn run() -> anyhow::Result<ExitCode> {
    let (cli, parsed) = match settings::parse(env::args_os()) {
        Ok(parsed) => parsed,
        Err(Unusable::Line(error)) => error.exit(),
        Err(Unusable::Settings(complaints)) => return Err(complaints.into()),
    };
    log::start(&cli.log);
    runtime()?.block_on(async {
        match cli.command {
            Command::Serve(command) => Box::pin(command.run(parsed)).await,
            Command::Demo(command) => Box::pin(command.run(parsed)).await,
            Command::Migrate(command) => command.run().await,
            Command::Doctor(command) => command.run().await,
            Command::Postgres(command) => command.run().await,
            Command::Check(command) => command.run().await,
            Command::List(command) => command.run().await,
            Command::Audit(command) => command.run().await,
            Command::Keys(command) => command.run().await,
            Command::Bench(command) => Box::pin(command.run()).await,
            Command::BenchEmpty(command) => command.run().await,
        }
    })
}

/// Tasks that one core cannot take wait in a queue for all cores. Left to itself, tokio looks there once in about sixty
/// tasks, and under overload those it moved there, whole connections with their calls, wait for seconds while others' are answered at once.
fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .enable_all()
        .global_queue_interval(1)
        .build()
}

/// Writes a long answer. Whoever has read enough of it, as `head` has, has been answered.
fn answer(text: &str) -> io::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Completes at the first SIGINT or SIGTERM after the call.
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}
