//! SIGHUP: the settings are read again, and what can change while the service runs is changed.
//!
//! Invariant: a mistake in them changes nothing, and every difference is logged, also what waits for a restart.

use std::{convert::Infallible, env, io};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{
    Cli, Command, log,
    settings::{self, Parsed, Unusable},
};
use crate::{config::RELOADABLE, limits::Bounds};

/// From now on SIGHUP ends nothing, also before it is heeded.
pub(super) fn survive_hangups() -> io::Result<()> {
    // The system's default is not put back when this is dropped.
    signal(SignalKind::hangup()).map(drop)
}

/// Reads the settings anew at each SIGHUP.
pub(super) fn at_each_hangup(
    first: Parsed,
    rates: watch::Sender<Bounds>,
) -> io::Result<impl Future<Output = Infallible>> {
    let mut hangups = signal(SignalKind::hangup())?;
    Ok(async move {
        let mut last = None;
        loop {
            let _ = hangups.recv().await;
            match read() {
                Ok((cli, anew)) => {
                    take(
                        &cli,
                        &anew,
                        (last.as_ref().unwrap_or(&first), &first),
                        &rates,
                    );
                    last = Some(anew);
                }
                Err(complaint) => {
                    for line in complaint.lines().map(str::trim) {
                        tracing::error!("settings are not reloaded: {line}");
                    }
                }
            }
        }
    })
}

/// The settings as they are now, if the service could start with them; else what is wrong.
fn read() -> Result<(Cli, Parsed), String> {
    let (cli, parsed) = settings::parse(env::args_os()).map_err(|unusable| match unusable {
        Unusable::Line(error) => error.to_string(),
        Unusable::Settings(complaints) => complaints.to_string(),
    })?;
    let checked = match &cli.command {
        Command::Serve(command) => command.check(),
        Command::Demo(command) => command.check(),
        _ => Ok(()),
    };
    // With its causes, as at a start.
    checked.map_err(|error| format!("{error:#}"))?;
    Ok((cli, parsed))
}

/// What can change is in force as it was read last, and all else as it was read first.
fn take(
    cli: &Cli,
    anew: &Parsed,
    (last, first): (&Parsed, &Parsed),
    rates: &watch::Sender<Bounds>,
) {
    let changes = |setting: &str| RELOADABLE.contains(&setting);
    for (setting, now, was) in anew.differences(last) {
        if changes(&setting) {
            tracing::info!(setting, was, now, "changed");
        }
    }
    for (setting, now, was) in anew.differences(first) {
        if !changes(&setting) {
            tracing::warn!(setting, was, now, "changes when the service is restarted");
        }
    }
    tracing::info!("settings are reloaded");
    log::set_level(cli.log.level());
    let bounds = match &cli.command {
        Command::Serve(command) => command.limits(),
        Command::Demo(command) => command.limits(),
        _ => return,
    };
    rates.send_replace(bounds);
}
