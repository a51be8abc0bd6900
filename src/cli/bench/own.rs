//! A service to measure: this program on a private database that is filled with as many members as asked for, with an API
//! key, on cores of its own where the machine has any to spare.

use std::{
    env,
    ffi::OsStr,
    fs,
    net::TcpListener,
    ops::Range,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{CpuSet, sched_setaffinity},
};
use tokio::{
    net::TcpStream,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{questions::Asked, target::Target};
use crate::{
    auth::api_key::{ApiKey, Pepper},
    cli::{database::Database, demo},
    config::{ClientSettings, DatabaseSettings, Secret},
    load::Target as Address,
    store::{DedicatedConnection, api_keys::NewKey},
};

/// More than any machine asks: the limits count, and refuse nothing.
const RATE_MAX: &str = "100000000";

const START_WAIT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Which cores the service has, and which everything else.
pub(super) struct Place {
    pub(super) service: Range<usize>,
    /// The same where the machine has no more.
    pub(super) others: Range<usize>,
}

impl Place {
    pub(super) fn of(server_cores: usize) -> anyhow::Result<Self> {
        let all = thread::available_parallelism()?.get();
        let service = 0..server_cores.min(all);
        let others = if service.end < all {
            service.end..all
        } else {
            0..all
        };
        Ok(Self { service, others })
    }

    /// For this process, and what it starts from now on.
    pub(super) fn leave_the_service_its_cores(&self) -> anyhow::Result<()> {
        for thread in fs::read_dir("/proc/self/task")? {
            let thread = thread?.file_name().to_string_lossy().parse()?;
            sched_setaffinity(Pid::from_raw(thread), &cores(&self.others))?;
        }
        Ok(())
    }

    /// Starts a program on the service's cores, with a thread for each.
    pub(super) fn start(&self, arguments: &[&str]) -> anyhow::Result<Process> {
        let mut command = Command::new(env::current_exe()?);
        // What is measured has its defaults.
        let settings = env::vars_os().filter(|(name, _)| is_setting(name));
        for (name, _) in settings {
            command.env_remove(name);
        }
        command
            .args(arguments)
            .env("TOKIO_WORKER_THREADS", self.service.len().to_string())
            .env("RUST_LOG", "warn")
            .stdout(Stdio::null());
        // A process begins where the thread is that starts it.
        sched_setaffinity(None, &cores(&self.service))?;
        let started = command.spawn();
        sched_setaffinity(None, &cores(&self.others))?;
        Ok(Process(started?))
    }
}

fn is_setting(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"HALLPASS_")
}

fn cores(range: &Range<usize>) -> CpuSet {
    let mut set = CpuSet::new();
    range.clone().for_each(|core| set.set(core));
    set
}

/// A program that ends with this.
pub(super) struct Process(Child);

impl Process {
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    fn has_ended(&mut self) -> anyhow::Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("hallpass ended: {status}"),
            None => Ok(()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        if pid.is_none_or(|pid| kill_process(pid, Signal::TERM).is_err()) {
            drop(self.0.kill());
        }
        drop(self.0.wait());
    }
}

/// A loopback address that nobody listens on just now.
pub(super) fn free_address() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

/// A service with a database of its own.
pub(super) struct Own {
    service: Process,
    pub(super) database: Database,
    target: Target,
}

impl Own {
    pub(super) async fn start(
        data_dir: &Path,
        organizations: usize,
        members: usize,
        place: &Place,
    ) -> anyhow::Result<Self> {
        let private = DatabaseSettings {
            database_url: None,
            data_dir: data_dir.join(format!("bench-{organizations}-{members}")),
        };
        let database = Database::open_migrated(&private).await?;
        match Self::serve(&database, organizations, members, place).await {
            Ok((service, target)) => Ok(Self {
                service,
                database,
                target,
            }),
            Err(error) => {
                database.close().await?;
                Err(error)
            }
        }
    }

    async fn serve(
        database: &Database,
        organizations: usize,
        members: usize,
        place: &Place,
    ) -> anyhow::Result<(Process, Target)> {
        let mut connection = DedicatedConnection::open(&database.url, None).await?;
        let each = members.div_ceil(organizations);
        demo::fill(&mut connection, organizations, each).await?;
        connection.refresh_matrix().await?;
        let key = make_key(&connection).await?;
        let private = database.private.as_ref().context("a private database")?;
        let address = free_address()?;
        let arguments = [
            ["--database-url", &private.url()],
            ["--grpc-listen", &address],
            ["--http-listen", "none"],
            ["--ops-listen", "none"],
            ["--auth", "api-key"],
            ["--caller-rate-max", RATE_MAX],
            ["--caller-list-rate-max", RATE_MAX],
        ];
        let arguments = [&["serve"], arguments.as_flattened()].concat();
        let mut service = place.start(&arguments)?;
        let client = ClientSettings {
            endpoint: format!("http://{address}"),
            token: Some(Secret(key.clone())),
            ca_file: None,
            client_certificate: None,
            client_key: None,
        };
        until_serving(&mut service, &client.endpoint).await?;
        let target = Target {
            client,
            address: Address::Tcp(address),
            token: Some(key),
            pid: Some(service.pid()),
        };
        Ok((service, target))
    }

    pub(super) fn target(&self) -> Target {
        self.target.clone()
    }

    /// The members, and a permission that some of them have.
    pub(super) async fn asked(&self) -> anyhow::Result<Asked> {
        let connection = DedicatedConnection::open(&self.database.url, None).await?;
        let members = connection.demo_members().await?;
        let asked = members
            .into_iter()
            .map(|(organization, user)| (organization, user, demo::SAMPLE_PERMISSION.to_owned()));
        Ok(Asked::new(asked.collect()))
    }

    /// Changes so many memberships a second for as long as something else takes.
    pub(super) async fn write<T>(
        &self,
        a_second: u32,
        meanwhile: impl Future<Output = T>,
    ) -> anyhow::Result<T> {
        let connection = DedicatedConnection::open(&self.database.url, None).await?;
        let members = connection.demo_members().await?;
        let mut ticks = interval(Duration::from_secs(1) / a_second.max(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let writes = async {
            for (organization, user) in members.iter().cycle() {
                ticks.tick().await;
                connection.toggle_demo_role(*organization, *user).await?;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            done = meanwhile => Ok(done),
            failed = writes => bail!("a write failed: {:?}", failed.err()),
        }
    }

    pub(super) async fn stop(self) -> anyhow::Result<()> {
        drop(self.service);
        self.database.close().await
    }
}

async fn make_key(connection: &DedicatedConnection) -> anyhow::Result<String> {
    let key = ApiKey::generate().context("the operating system gives no random bits")?;
    connection
        .api_key_insert(&NewKey {
            id: key.id.as_str(),
            hash: &key.hash(&Pepper::default()),
            name: "bench",
            scopes: &["check", "list", "audit"],
            organizations: None,
            valid_for: None,
        })
        .await?;
    Ok(key.reveal())
}

/// Waits for a program that has nothing to get ready but its socket.
pub(super) async fn until_listening(process: &mut Process, address: &str) -> anyhow::Result<()> {
    let waits = async {
        while TcpStream::connect(address).await.is_err() {
            process.has_ended()?;
            sleep(POLL_INTERVAL).await;
        }
        anyhow::Ok(())
    };
    timeout(START_WAIT, waits)
        .await
        .context("the empty RPC does not become ready")?
}

async fn until_serving(process: &mut Process, endpoint: &str) -> anyhow::Result<()> {
    let waits = async {
        while !is_serving(endpoint).await {
            process.has_ended()?;
            sleep(POLL_INTERVAL).await;
        }
        anyhow::Ok(())
    };
    timeout(START_WAIT, waits)
        .await
        .context("the service does not become ready")?
}

async fn is_serving(endpoint: &str) -> bool {
    let Ok(channel) = hallpass_client::connect(endpoint).await else {
        return false;
    };
    let request = HealthCheckRequest::default();
    let health = HealthClient::new(channel).check(request).await;
    health.is_ok_and(|health| health.into_inner().status() == ServingStatus::Serving)
}
