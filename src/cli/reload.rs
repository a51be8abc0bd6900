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

/// Reads the settings anew at each SIGHUP; the signal is heeded from now on.
pub(super) fn at_each_hangup(
    mut parsed: Parsed,
    rates: watch::Sender<Bounds>,
) -> io::Result<impl Future<Output = Infallible>> {
    let mut hangups = signal(SignalKind::hangup())?;
    Ok(async move {
        loop {
            let _ = hangups.recv().await;
            match settings::parse(env::args_os()) {
                Ok((cli, anew)) => {
                    take(&cli, &anew, &parsed, &rates);
                    parsed = anew;
                }
                Err(unusable) => {
                    let complaint = match unusable {
                        Unusable::Line(error) => error.to_string(),
                        Unusable::Settings(complaints) => complaints.to_string(),
                    };
                    for line in complaint.lines().map(str::trim) {
                        tracing::error!("settings are not reloaded: {line}");
                    }
                }
            }
        }
    })
}

fn take(cli: &Cli, anew: &Parsed, before: &Parsed, rates: &watch::Sender<Bounds>) {
    let differences = anew.differences(before);
    if differences.is_empty() {
        tracing::info!("settings are reloaded: none has changed");
    }
    for (setting, now, was) in &differences {
        if RELOADABLE.contains(&&**setting) {
            tracing::info!(setting, was, now, "changed");
        } else {
            tracing::warn!(setting, was, now, "changes when the service is restarted");
        }
    }
    log::set_level(cli.log.level());
    let bounds = match &cli.command {
        Command::Serve(command) => command.limits(),
        Command::Demo(command) => command.limits(),
        _ => return,
    };
    rates.send_replace(bounds);
}
