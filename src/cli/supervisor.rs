//! What systemd is told through `NOTIFY_SOCKET`: that the service is ready, that it stops, and that it still runs.
//!
//! Invariant: ready is said once answers can be given, as `/readyz` says it. Nothing depends on being heard, and without
//! the socket nothing is said.

use std::{convert::Infallible, future::pending};

use sd_notify::NotifyState;
use tokio::time::sleep;

/// Signs of life within the time that systemd waits for one: a single late one is no reason to be killed.
const SIGNS_A_TIMEOUT: u32 = 3;

pub(super) fn say_ready() {
    say(NotifyState::Ready);
}

pub(super) fn say_stopping() {
    say(NotifyState::Stopping);
}

/// Says that the service runs for as long as it does, where systemd wants to know (`WatchdogSec=`).
pub(super) async fn say_alive() -> Infallible {
    let timeout = sd_notify::watchdog_enabled().filter(|timeout| !timeout.is_zero());
    let Some(timeout) = timeout else {
        return pending().await;
    };
    loop {
        say(NotifyState::Watchdog);
        sleep(timeout / SIGNS_A_TIMEOUT).await;
    }
}

fn say(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "systemd cannot be told how the service is");
    }
}
