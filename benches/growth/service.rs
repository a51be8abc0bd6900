//! The real program on a database of this bench's, and the questions that it is asked.

use std::{
    io::{BufReader, Read},
    process::{Child, ChildStderr, Command, Stdio},
    time::{Duration, Instant},
};

use hallpass_client::v1::CheckPermissionRequest;
use rustix::process::{Pid, Signal, kill_process};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{Result, members::Member};

const LISTEN: &str = "127.0.0.1:50081";
pub(crate) const ENDPOINT: &str = "http://127.0.0.1:50081";

/// Longer than any start here takes.
const READY_WAIT_MAX: Duration = Duration::from_secs(60);

/// The hallpass program, running; it ends with this.
pub(crate) struct Service {
    process: Child,
    log: Option<BufReader<ChildStderr>>,
}

impl Service {
    /// Starts it with room for so many users, and waits until it is warm and serves.
    pub(crate) async fn start(database_url: &str, cache_capacity: usize) -> Result<Self> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_hallpass"))
            .arg("serve")
            .args(["--database-url", database_url])
            .args(["--grpc-listen", LISTEN])
            .args(["--http-listen", "none", "--ops-listen", "none"])
            .args(["--cache-capacity", &cache_capacity.to_string()])
            .args(["--warm-up-max", "1m", "--lame-duck", "0s"])
            .env("RUST_LOG", "info")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let log = process.stderr.take().map(BufReader::new);
        let mut service = Self { process, log };
        let started = Instant::now();
        while !is_serving().await {
            let ended = service.process.try_wait()?;
            if ended.is_some() || started.elapsed() > READY_WAIT_MAX {
                let log = service.stop()?;
                return Err(format!("hallpass does not serve: {log}").into());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(service)
    }

    /// Ends it; returns what it has logged.
    pub(crate) fn stop(mut self) -> Result<String> {
        self.end()?;
        let mut log = String::new();
        if let Some(mut reader) = self.log.take() {
            reader.read_to_string(&mut log)?;
        }
        Ok(log)
    }

    fn end(&mut self) -> Result<()> {
        if self.process.try_wait()?.is_none() {
            let pid = Pid::from_raw(i32::try_from(self.process.id())?).ok_or("no process")?;
            kill_process(pid, Signal::TERM)?;
            self.process.wait()?;
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.end().is_err() {
            drop(self.process.kill());
            drop(self.process.wait());
        }
    }
}

async fn is_serving() -> bool {
    let Ok(channel) = hallpass_client::connect(ENDPOINT).await else {
        return false;
    };
    let health = HealthClient::new(channel)
        .check(HealthCheckRequest::default())
        .await;
    health.is_ok_and(|health| health.into_inner().status() == ServingStatus::Serving)
}

/// How long the warm start took that a log tells of, from the line with `users=10000 elapsed=812.5ms`.
pub(crate) fn warm_start(log: &str) -> Result<Duration> {
    let line = (log.lines())
        .find(|line| line.contains("warmed the cache"))
        .ok_or("no line says how long the warm start took")?;
    let elapsed = line.split("elapsed=").nth(1);
    let text = elapsed.and_then(|text| text.split_whitespace().next());
    let text = text.ok_or("the warm start has no `elapsed=`")?;
    let (number, unit) = match text.strip_suffix("ms") {
        Some(millis) => (millis, 1e-3),
        None => (text.trim_end_matches('s'), 1.0),
    };
    Ok(Duration::from_secs_f64(number.parse::<f64>()? * unit))
}

pub(crate) fn question(member: Member, permission: &str) -> CheckPermissionRequest {
    CheckPermissionRequest {
        organization_id: member.organization.0.to_string(),
        user_id: member.user.0.to_string(),
        permission: permission.to_owned(),
        ..CheckPermissionRequest::default()
    }
}
