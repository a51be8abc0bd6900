//! What a credential costs: the processor time of a cached check with an API key, beside the same without one.
//!
//! Two services on one database, asked in turns, so that what else the machine does falls on both alike.

use std::{
    error::Error,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use futures_util::future::try_join_all;
use hallpass_client::{
    Credential,
    tonic::{service::interceptor::InterceptedService, transport::Channel},
    v1::{CheckPermissionRequest, Source, permission_service_client::PermissionServiceClient},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::NoTls;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Checks = PermissionServiceClient<InterceptedService<Channel, Credential>>;

/// What is promised of a check with a credential beside one without.
const RATIO_MAX: f64 = 1.05;

/// Rounds in which the two take turns; the first is not counted.
const ROUNDS: usize = 21;

/// Checks a round.
const CHECKS: usize = 10_000;

/// Callers at once, and connections that they share.
const CALLERS: usize = 50;
const CONNECTIONS: usize = 2;

#[tokio::main]
async fn main() -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("hallpass-credentials-")
        .tempdir_in("/tmp")?;
    fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let data_dir = directory.path().join("data");
    let data = data_dir.to_str().ok_or("no path")?;
    let open = Service::start(50_071, &["demo", "--data-dir", data]).await?;
    let url = format!(
        "postgresql:///hallpass?host={}&user=hallpass",
        data_dir.join("postgres").display()
    );
    let made = Command::new(env!("CARGO_BIN_EXE_hallpass"))
        .args(["keys", "create", "bench", "--scopes", "check"])
        .args(["--organizations", "all", "--database-url", &url])
        .stderr(Stdio::null())
        .output()?;
    let key = String::from_utf8(made.stdout)?.trim().to_owned();
    let keyed = ["serve", "--auth", "api-key", "--database-url", &url];
    let keyed = Service::start(50_072, &keyed).await?;

    let members = members(&url).await?;
    let without = open.connect(Credential::default()).await?;
    let with = keyed.connect(Credential::bearer(&key)?).await?;
    let (mut open_micros, mut keyed_micros) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let cost = (
            open.cost_micros(&without, &members, round).await?,
            keyed.cost_micros(&with, &members, round).await?,
        );
        if round > 0 {
            open_micros.push(cost.0);
            keyed_micros.push(cost.1);
        }
    }
    let ratios: Vec<f64> = (keyed_micros.iter().zip(&open_micros))
        .map(|(keyed, open)| keyed / open)
        .collect();
    println!(
        "processor time of the service a cached check, median of {} rounds of {CHECKS}",
        ROUNDS - 1
    );
    println!("  without a credential   {:>6.2} µs", median(open_micros));
    println!("  with an API key        {:>6.2} µs", median(keyed_micros));
    let ratio = median(ratios);
    println!("  ratio, round by round  {ratio:>6.3}   (promised: {RATIO_MAX})");
    keyed.stop()?;
    open.stop()?;
    if ratio > RATIO_MAX {
        return Err("a credential costs too much".into());
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Members of the demo's district: they are cached once the service is warm.
async fn members(url: &str) -> Result<Vec<CheckPermissionRequest>> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    let members = "SELECT org_id::text, user_id::text FROM hallpass.members ORDER BY user_id";
    let rows = client.query(members, &[]).await?;
    let question = |row: &tokio_postgres::Row| CheckPermissionRequest {
        organization_id: row.get(0),
        user_id: row.get(1),
        permission: "can_approve_expenses".to_owned(),
        ..Default::default()
    };
    Ok(rows.iter().map(question).collect())
}

/// The hallpass program, running.
struct Service {
    process: Child,
    endpoint: String,
}

impl Service {
    async fn start(port: u16, arguments: &[&str]) -> Result<Self> {
        let process = Command::new(env!("CARGO_BIN_EXE_hallpass"))
            .args(arguments)
            .args(["--http-listen", "none", "--ops-listen", "none"])
            .args(["--grpc-listen", &format!("127.0.0.1:{port}")])
            .env("RUST_LOG", "error")
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        let mut service = Self {
            process,
            endpoint: format!("http://127.0.0.1:{port}"),
        };
        while !service.is_serving().await {
            if let Some(status) = service.process.try_wait()? {
                return Err(format!("hallpass ended: {status}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(service)
    }

    async fn is_serving(&self) -> bool {
        let Ok(channel) = hallpass_client::connect(&self.endpoint).await else {
            return false;
        };
        let request = HealthCheckRequest::default();
        let health = HealthClient::new(channel).check(request).await;
        health.is_ok_and(|health| health.into_inner().status() == ServingStatus::Serving)
    }

    async fn connect(&self, credential: Credential) -> Result<Vec<Checks>> {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let channel = hallpass_client::connect(&self.endpoint).await?;
            let client = PermissionServiceClient::with_interceptor(channel, credential.clone());
            clients.push(client);
        }
        Ok(clients)
    }

    /// Asks a round's checks and returns what each cost the service.
    async fn cost_micros(
        &self,
        clients: &[Checks],
        members: &[CheckPermissionRequest],
        round: usize,
    ) -> Result<f64> {
        let before = self.processor_time(Path::new("/proc"))?;
        let callers = (0..CALLERS).map(|caller| {
            let mut client = clients[caller % clients.len()].clone();
            async move {
                for call in 0..CHECKS / CALLERS {
                    let member = (round * CHECKS + call * CALLERS + caller) % members.len();
                    let answer = client.check_permission(members[member].clone()).await?;
                    let evidence = answer.into_inner().evidence;
                    if evidence.is_none_or(|evidence| evidence.source() != Source::Cache) {
                        return Err(Box::<dyn Error>::from("a member was not cached"));
                    }
                }
                Ok(())
            }
        });
        try_join_all(callers).await?;
        let spent = self.processor_time(Path::new("/proc"))? - before;
        Ok(spent.as_secs_f64() * 1e6 / CHECKS as f64)
    }

    /// Of all threads, to the nanosecond: the first number of each one's schedstat.
    fn processor_time(&self, proc: &Path) -> Result<Duration> {
        let mut nanos = 0;
        for thread in fs::read_dir(proc.join(self.process.id().to_string()).join("task"))? {
            let schedstat = fs::read_to_string(thread?.path().join("schedstat"))?;
            let spent = schedstat.split_whitespace().next().ok_or("no time")?;
            nanos += spent.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanos))
    }

    fn stop(mut self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.process.id())?).ok_or("no process")?;
        kill_process(pid, Signal::TERM)?;
        self.process.wait()?;
        Ok(())
    }
}
