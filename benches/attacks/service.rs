//! The real program on the demo's district, and a caller who behaves well.

use std::{
    error::Error,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use hallpass_client::{
    tonic::{Code, Status, transport::Channel},
    v1::{
        CheckPermissionRequest, Consistency, consistency::Requirement,
        permission_service_client::PermissionServiceClient,
    },
};
use hdrhistogram::Histogram;
use prost::Message;
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{CpuSet, sched_setaffinity},
};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_postgres::NoTls;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use uuid::Uuid;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

pub(crate) const LISTEN: &str = "127.0.0.1:50062";
pub(crate) const ENDPOINT: &str = "http://127.0.0.1:50062";

/// Calls are offered in so many portions a second.
const PORTIONS_A_SECOND: u64 = 200;

/// An answer later than this is no answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// The hallpass program, running; it ends with this.
pub(crate) struct Service {
    process: Child,
    members: Arc<[(Uuid, Uuid)]>,
}

impl Service {
    /// Fills a private database with the demo's district and serves it, with so many threads.
    pub(crate) async fn start(data_dir: &Path, threads: usize) -> Result<Self> {
        let process = Command::new(env!("CARGO_BIN_EXE_hallpass"))
            .args([
                "demo",
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
            .env("TOKIO_WORKER_THREADS", threads.to_string())
            .stdout(Stdio::null())
            .spawn()?;
        let mut service = Self {
            process,
            members: Arc::new([]),
        };
        while !is_serving().await {
            if let Some(status) = service.process.try_wait()? {
                return Err(format!("hallpass ended: {status}").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        service.members = members(data_dir).await?.into();
        Ok(service)
    }

    /// Gives the service a core of its own; whoever started it stays on the others.
    pub(crate) fn pin(&self, core: usize) -> Result<()> {
        let core = cores([core]);
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.process.id()))? {
            let thread = thread?.file_name().to_string_lossy().parse()?;
            sched_setaffinity(Pid::from_raw(thread), &core)?;
        }
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What the process holds in memory, in megabytes.
    pub(crate) fn memory_mb(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kilobytes.ok_or("no VmRSS")?.parse::<u64>()? / 1_024)
    }

    /// So many questions, each about another member.
    pub(crate) fn questions(&self, kind: Question) -> Vec<Vec<u8>> {
        let members = self.members.iter().take(4_096);
        let asked = members.map(|(organization, user)| question(*organization, *user, kind));
        asked.map(|question| question.encode_to_vec()).collect()
    }

    /// A caller on so many connections of its own.
    pub(crate) async fn caller(&self, connections: usize) -> Result<Caller> {
        let mut channels = Vec::with_capacity(connections);
        for _ in 0..connections {
            channels.push(hallpass_client::connect(ENDPOINT).await?);
        }
        Ok(Caller {
            channels: channels.into(),
            members: Arc::clone(&self.members),
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let pid = i32::try_from(self.process.id())
            .ok()
            .and_then(Pid::from_raw);
        if pid.is_none_or(|pid| kill_process(pid, Signal::TERM).is_err()) {
            drop(self.process.kill());
        }
        drop(self.process.wait());
    }
}

pub(crate) fn cores(cores: impl IntoIterator<Item = usize>) -> CpuSet {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(core);
    }
    set
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

async fn members(data_dir: &Path) -> Result<Vec<(Uuid, Uuid)>> {
    let url = format!(
        "postgresql:///hallpass?host={}&user=hallpass",
        data_dir.join("postgres").display()
    );
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    let members = "SELECT org_id, user_id FROM hallpass.members ORDER BY user_id";
    let rows = client.query(members, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    Cached,
    /// A snapshot that begins after the request: always a statement.
    Database,
}

pub(crate) fn question(organization: Uuid, user: Uuid, kind: Question) -> CheckPermissionRequest {
    CheckPermissionRequest {
        organization_id: organization.to_string(),
        user_id: user.to_string(),
        permission: "can_approve_expenses".to_owned(),
        consistency: (kind == Question::Database).then_some(Consistency {
            requirement: Some(Requirement::FullyConsistent(true)),
        }),
        ..CheckPermissionRequest::default()
    }
}

/// What came back within [`PATIENCE`].
pub(crate) struct Tally {
    /// A second.
    pub(crate) answers: f64,
    /// In microseconds, from sending.
    pub(crate) answered_in: Histogram<u64>,
}

#[derive(Clone)]
pub(crate) struct Caller {
    channels: Arc<[Channel]>,
    members: Arc<[(Uuid, Uuid)]>,
}

impl Caller {
    /// Offers so many questions a second, whatever has been answered of those before.
    pub(crate) async fn offer(
        &self,
        question: Question,
        a_second: u64,
        time: Duration,
    ) -> Result<Tally> {
        let mut portions = interval(Duration::from_secs(1) / u32::try_from(PORTIONS_A_SECOND)?);
        portions.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut calls = JoinSet::new();
        let mut outcomes = Vec::new();
        let started = Instant::now();
        let (mut sent, mut portion) = (0, 0);
        while started.elapsed() < time {
            portions.tick().await;
            portion += 1;
            while sent < portion * a_second / PORTIONS_A_SECOND {
                let caller = self.clone();
                calls.spawn(async move { caller.ask(question, sent).await });
                sent += 1;
            }
            while let Some(outcome) = calls.try_join_next() {
                outcomes.push(outcome?);
            }
        }
        // Those that are answered after the time was up count, too, and so does their time.
        while let Some(outcome) = calls.join_next().await {
            outcomes.push(outcome?);
        }
        tally(&outcomes, started.elapsed())
    }

    /// How long it took, and the code it ended with.
    async fn ask(&self, kind: Question, index: u64) -> (Duration, Code) {
        let index = usize::try_from(index).unwrap_or(0);
        let channel = self.channels[index % self.channels.len()].clone();
        let (organization, user) = self.members[index * 7 % self.members.len()];
        let request = question(organization, user, kind);
        let mut client = PermissionServiceClient::new(channel);
        let sent = Instant::now();
        let answer = timeout(PATIENCE, client.check_permission(request)).await;
        let late = |_| Err(Status::deadline_exceeded("late"));
        let code = answer
            .unwrap_or_else(late)
            .map_or_else(|status| status.code(), |_| Code::Ok);
        (sent.elapsed(), code)
    }

    /// Asks for health every 50 ms; returns how many of how many answered SERVING, and the longest wait.
    pub(crate) async fn watch_health(&self, time: Duration) -> (u64, u64, Duration) {
        let started = Instant::now();
        let mut health = HealthClient::new(self.channels[0].clone());
        let mut every = interval(Duration::from_millis(50));
        let (mut serving, mut asked, mut longest) = (0, 0, Duration::ZERO);
        while started.elapsed() < time {
            every.tick().await;
            let sent = Instant::now();
            let answer = timeout(PATIENCE, health.check(HealthCheckRequest::default())).await;
            asked += 1;
            let is_serving = |answer: &ServingStatus| *answer == ServingStatus::Serving;
            let status = answer.ok().and_then(std::result::Result::ok);
            let status = status.map(|status| status.into_inner().status());
            serving += u64::from(status.as_ref().is_some_and(is_serving));
            longest = longest.max(sent.elapsed());
        }
        (serving, asked, longest)
    }
}

fn tally(outcomes: &[(Duration, Code)], elapsed: Duration) -> Result<Tally> {
    let mut answered_in = Histogram::new_with_bounds(1, 60_000_000, 3)?;
    for (took, _) in outcomes.iter().filter(|(_, code)| *code == Code::Ok) {
        answered_in.saturating_record(u64::try_from(took.as_micros())?);
    }
    #[allow(clippy::cast_precision_loss, reason = "a number of calls")]
    let answers = answered_in.len() as f64;
    Ok(Tally {
        answers: answers / elapsed.as_secs_f64(),
        answered_in,
    })
}
