//! What one caller sees, one call at a time: the real program on the demo's district, over loopback; and its start.
//!
//! Machines differ and are noisy: each latency stands beside a baseline taken on the same connection in the same run.

use std::{
    error::Error,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hallpass_client::{
    tonic::transport::Channel,
    v1::{CheckPermissionRequest, Source, permission_service_client::PermissionServiceClient},
};
use hdrhistogram::Histogram;
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::NoTls;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use uuid::Uuid;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const LISTEN: &str = "127.0.0.1:50061";
const ENDPOINT: &str = "http://127.0.0.1:50061";

/// Calls a latency; the first tenth is not counted.
const CALLS: usize = 20_000;

/// A longer call is counted as this long.
const LATENCY_MAX_NS: u64 = 10_000_000_000;

/// Rounds in which the calls that are compared take turns.
const ROUNDS: usize = 10;

#[tokio::main]
async fn main() -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("hallpass-figures-")
        .tempdir_in("/tmp")?;
    std::fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let data_dir = directory.path().join("data");

    println!("{:44}{:>10}", "start to ready", "");
    let empty = Service::start("serve", &data_dir).await?;
    row("  empty data directory", empty.to_ready);
    empty.stop()?;
    Service::start("demo", &data_dir).await?.stop()?;
    let service = Service::start("serve", &data_dir).await?;
    row("  used, 10,000 members to warm", service.to_ready);

    let database = Database::connect(&data_dir).await?;
    let channel = hallpass_client::connect(ENDPOINT).await?;
    latencies(&channel, &database).await?;
    service.stop()
}

/// Takes the latencies in turns, so that what else the machine does falls on all alike.
async fn latencies(channel: &Channel, database: &Database) -> Result<()> {
    let members = database.members().await?;
    let mut checks = PermissionServiceClient::new(channel.clone());
    let mut health = HealthClient::new(channel.clone());
    let select = database.client.prepare("SELECT 1").await?;
    let new = || Histogram::<u64>::new_with_max(LATENCY_MAX_NS, 3);
    let (mut rpc, mut hit, mut statement, mut miss) = (new()?, new()?, new()?, new()?);
    for round in 0..ROUNDS {
        for call in 0..CALLS / ROUNDS {
            let count = round > 0;
            let (organization, user) = members[(round * CALLS + call * 7) % members.len()];
            timed(&mut rpc, count, health.check(HealthCheckRequest::default())).await?;
            let answer = timed(
                &mut hit,
                count,
                checks.check_permission(question(organization, user)),
            )
            .await?;
            if answer
                .into_inner()
                .evidence
                .map(|evidence| evidence.source())
                != Some(Source::Cache)
            {
                return Err("a member of a warm cache was not cached".into());
            }
            timed(&mut statement, count, database.client.query(&select, &[])).await?;
            let stranger = Uuid::new_v4();
            let answer = timed(
                &mut miss,
                count,
                checks.check_permission(question(organization, stranger)),
            )
            .await?;
            if answer
                .into_inner()
                .evidence
                .map(|evidence| evidence.source())
                != Some(Source::Database)
            {
                return Err("a stranger was cached".into());
            }
        }
    }
    println!(
        "{:44}{:>10}{:>10}{:>10}",
        "one call at a time", "p50", "p99", "p99.9"
    );
    percentiles("  check, cached", &hit);
    percentiles("  health check: an RPC that does nothing", &rpc);
    percentiles("  check, not cached: one round trip to SQL", &miss);
    percentiles("  SELECT 1 from the same process", &statement);
    println!(
        "  cached check / empty RPC, at p50: {:.2}",
        hit.value_at_quantile(0.5) as f64 / rpc.value_at_quantile(0.5) as f64
    );
    Ok(())
}

async fn timed<T, E>(
    histogram: &mut Histogram<u64>,
    count: bool,
    call: impl Future<Output = std::result::Result<T, E>>,
) -> std::result::Result<T, E> {
    let started = Instant::now();
    let answer = call.await;
    if count {
        histogram.saturating_record(started.elapsed().as_nanos().try_into().unwrap_or(u64::MAX));
    }
    answer
}

fn question(organization: Uuid, user: Uuid) -> CheckPermissionRequest {
    CheckPermissionRequest {
        organization_id: organization.to_string(),
        user_id: user.to_string(),
        permission: "can_approve_expenses".to_owned(),
        ..Default::default()
    }
}

fn row(name: &str, elapsed: Duration) {
    println!("{name:44}{:>7.2} s", elapsed.as_secs_f64());
}

fn percentiles(name: &str, histogram: &Histogram<u64>) {
    let micros = |quantile| histogram.value_at_quantile(quantile) as f64 / 1_000.0;
    println!(
        "{name:44}{:>7.0} µs{:>7.0} µs{:>7.0} µs",
        micros(0.5),
        micros(0.99),
        micros(0.999)
    );
}

/// The hallpass program, running.
struct Service {
    process: Child,
    to_ready: Duration,
}

impl Service {
    async fn start(command: &str, data_dir: &Path) -> Result<Self> {
        let started = Instant::now();
        let mut process = Command::new(env!("CARGO_BIN_EXE_hallpass"))
            .args([
                command,
                "--http-listen",
                "none",
                "--ops-listen",
                "none",
                "--grpc-listen",
                LISTEN,
            ])
            .arg("--data-dir")
            .arg(data_dir)
            .env("RUST_LOG", "error")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        while !is_serving().await {
            if let Some(status) = process.try_wait()? {
                return Err(format!("hallpass {command} ended: {status}").into());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(Self {
            process,
            to_ready: started.elapsed(),
        })
    }

    fn stop(mut self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.process.id())?).ok_or("no process")?;
        kill_process(pid, Signal::TERM)?;
        self.process.wait()?;
        Ok(())
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

struct Database {
    client: tokio_postgres::Client,
}

impl Database {
    async fn connect(data_dir: &Path) -> Result<Self> {
        let url = format!(
            "postgresql:///hallpass?host={}&user=hallpass",
            data_dir.join("postgres").display()
        );
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
        tokio::spawn(connection);
        Ok(Self { client })
    }

    async fn members(&self) -> Result<Vec<(Uuid, Uuid)>> {
        let rows = self
            .client
            .query(
                "SELECT org_id, user_id FROM hallpass.members ORDER BY user_id",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }
}
