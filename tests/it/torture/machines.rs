//! What is tortured: a PostgreSQL of its own and the replicas, real processes that can be killed, stopped and cut off.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use hallpass::embedded::{Options, PrivatePostgres};
use hallpass_client::tonic::transport::Channel;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command as Spawn},
    time::sleep,
};

use crate::{
    proxy::{Proxy, Way},
    support::HALLPASS,
};

use super::report::CALM;

/// A commit that was acknowledged survives whatever happens to the processes; files stay small enough to be copied.
const SETTINGS: [(&str, &str); 5] = [
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("max_connections", "150"),
    ("max_wal_size", "64MB"),
    ("min_wal_size", "32MB"),
];

/// Where Debian's package has it.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// A PostgreSQL, up or down. Its functions block.
pub(super) struct Postgres {
    options: Options,
    running: Option<PrivatePostgres>,
}

impl Postgres {
    pub(super) fn start(directory: &Path) -> Self {
        let mut postgres = Self {
            options: Options {
                data_dir: directory.join("data"),
                shim: HALLPASS.into(),
                settings: SETTINGS
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
            },
            running: None,
        };
        postgres.start_again();
        postgres
    }

    /// Returns when it accepts connections.
    pub(super) fn start_again(&mut self) {
        self.running = Some(PrivatePostgres::start(&self.options).unwrap());
    }

    pub(super) fn url(&self) -> String {
        self.running.as_ref().unwrap().url()
    }

    /// Ends every process at once, as the out-of-memory killer or a power cut does.
    pub(super) fn kill(&mut self) {
        while self.signal(Signal::KILL) > 0 {}
        self.running = None;
    }

    /// Every process stops where it is, as a machine that is suspended does.
    pub(super) fn freeze(&self) {
        // Twice: one may have been born meanwhile.
        self.signal(Signal::STOP);
        self.signal(Signal::STOP);
    }

    pub(super) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Takes a copy of the files of one instant.
    pub(super) fn copy(&self) {
        drop(fs::remove_dir_all(self.copied()));
        self.freeze();
        let copy = Command::new("cp")
            .arg("-a")
            .args([self.cluster(), self.copied()])
            .status();
        self.thaw();
        assert!(copy.unwrap().success());
    }

    /// Puts the copy in the place of the files; postgres must be dead.
    pub(super) fn put_back(&self) {
        let (cluster, copied) = (self.cluster(), self.copied());
        fs::remove_dir_all(&cluster).unwrap();
        fs::rename(copied, cluster).unwrap();
    }

    fn cluster(&self) -> PathBuf {
        fs::canonicalize(self.options.data_dir.join("postgres")).unwrap()
    }

    fn copied(&self) -> PathBuf {
        self.cluster().with_extension("copy")
    }

    /// Returns to how many processes; they work in the cluster's directory.
    fn signal(&self, signal: Signal) -> usize {
        let cluster = self.cluster();
        let processes = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| {
                let is_ours =
                    fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == cluster);
                let pid = entry.file_name().to_str()?.parse().ok()?;
                is_ours.then(|| Pid::from_raw(pid))?
            });
        let mut count = 0;
        for pid in processes {
            // An error is one that has ended since.
            let _ended = kill_process(pid, signal);
            count += 1;
        }
        count
    }
}

/// One replica: `hallpass serve` behind a way to the database that can be cut.
pub(super) struct Replica {
    pub(super) channel: Channel,
    pub(super) proxy: Proxy,
    /// What is the matter with it, or with the database.
    pub(super) fault: Mutex<&'static str>,
    child: Mutex<Child>,
    directory: PathBuf,
    /// The file that says what its wall clock is set to.
    clock: Option<PathBuf>,
}

impl Replica {
    /// `bound`: how stale its answers may be.
    pub(super) async fn start(
        directory: &Path,
        url: &str,
        way: Way,
        bound: Duration,
        fakes: bool,
    ) -> Self {
        fs::create_dir_all(directory).unwrap();
        let proxy = Proxy::to(url, way);
        let clock = (fakes && Path::new(FAKETIME).exists()).then(|| directory.join("clock"));
        if let Some(clock) = &clock {
            fs::write(clock, "+0").unwrap();
        }
        let child = spawn(directory, &proxy.url, bound, clock.as_deref());
        let endpoint = format!("unix:{}", directory.join("socket").display());
        let channel = loop {
            match hallpass_client::connect(&endpoint).await {
                Ok(channel) => break channel,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        Self {
            channel,
            proxy,
            fault: Mutex::new(CALM),
            child: Mutex::new(child),
            directory: directory.to_owned(),
            clock,
        }
    }

    pub(super) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// After a kill.
    pub(super) async fn start_again(&self, bound: Duration) {
        let again = spawn(
            &self.directory,
            &self.proxy.url,
            bound,
            self.clock.as_deref(),
        );
        let mut killed = std::mem::replace(&mut *self.child.lock().unwrap(), again);
        killed.wait().await.unwrap();
    }

    pub(super) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub(super) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    pub(super) fn fakes_its_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Moves its wall clock against the machine's, `+3600` seconds.
    pub(super) fn set_clock(&self, offset: &str) {
        // By renaming, so that it never reads half of it.
        let clock = self.clock.as_ref().unwrap();
        let new = clock.with_extension("new");
        fs::write(&new, offset).unwrap();
        fs::rename(new, clock).unwrap();
    }

    /// Ends with its log if it has ended by itself.
    pub(super) fn assert_alive(&self) {
        let ended = self.child.lock().unwrap().try_wait().unwrap();
        assert!(
            ended.is_none(),
            "{ended:?}, see {}",
            self.directory.display()
        );
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.lock().unwrap();
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        kill_process(pid.expect("it runs"), signal).unwrap();
    }
}

fn spawn(directory: &Path, url: &str, bound: Duration, clock: Option<&Path>) -> Child {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"));
    let mut command = Spawn::new(HALLPASS);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HALLPASS_") {
            command.env_remove(name);
        }
    }
    let socket = directory.join("socket");
    command
        .args(["serve", "--database-url", url])
        .arg(format!("--grpc-listen=unix:{}", socket.display()))
        .arg("--http-listen=none")
        .arg("--ops-listen=none")
        .arg(format!("--staleness-bound={}ms", bound.as_millis()))
        .arg("--matrix-refresh-interval=1s")
        .arg("--lame-duck=10ms")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.unwrap())
        .kill_on_drop(true);
    if let Some(clock) = clock {
        // The wall clock alone: the clocks that count from the boot are not set by anybody, and here neither.
        command
            .env("LD_PRELOAD", FAKETIME)
            .env("FAKETIME_TIMESTAMP_FILE", clock)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("FAKETIME_DISABLE_SHM", "1");
    }
    command.spawn().unwrap()
}
