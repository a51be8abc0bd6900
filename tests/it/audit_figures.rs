//! Figures of the audit log, printed: how late entries arrive, what idle streams cost, and how fast entries are exported.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hallpass_client::v1::{AuditFilter, stream_audit_entries_request::Start};
use hdrhistogram::Histogram;
use tokio::{
    process::Command,
    task::JoinSet,
    time::{interval, sleep},
};

use crate::{
    audit_list,
    commands::command,
    consumer::Consumer,
    database::{Database, as_role, eventually},
    keyring::Made,
    names::id,
    server::{Server, config, fill, run_sql},
    sql::run,
    support::{HALLPASS, temporary_directory},
};

const STREAMS: usize = 100;
const CHANGES: usize = 2_000;
const CHANGE_INTERVAL: Duration = Duration::from_millis(10);
const ROWS: u32 = 1_000_000;

const IDLE_STREAMS: usize = 1_000;
const IDLE_CONNECTIONS: usize = 10;
const IDLE: Duration = Duration::from_secs(10);

/// A checkpoint each every half second is 2,000 messages a second.
const IDLE_CORE_PERCENT_MAX: f64 = 20.0;

/// In which Linux tells processor time, on every machine.
const TICK: Duration = Duration::from_millis(10);

/// From the moment at which a COMMIT is sent until each of 100 clients has the entry, an unrelated transaction open all
/// the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make audit-figures"]
async fn entries_arrive() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let held = database.client().await;
    run(
        &held,
        "BEGIN; CREATE TEMPORARY TABLE held (); SELECT pg_current_xact_id()",
    )
    .await;
    let server = Server::start(config(&database.url)).await;
    let sent: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let mut streams = JoinSet::new();
    for number in 0..STREAMS {
        // Every second one for one organization; all changes are of it.
        let filter = AuditFilter {
            organization_id: if number % 2 == 0 {
                String::new()
            } else {
                id("lincoln").to_string()
            },
            ..AuditFilter::default()
        };
        let mut consumer = Consumer::start(&server.channel, Start::Now(true), filter)
            .await
            .unwrap();
        consumer.next().await.unwrap();
        let sent = Arc::clone(&sent);
        streams.spawn(async move {
            let mut lags = Vec::new();
            while lags.len() < CHANGES {
                consumer.next().await.unwrap();
                let now = Instant::now();
                let sent = sent.lock().unwrap();
                let entries = consumer.entries.drain(..);
                lags.extend(entries.filter_map(|entry| Some(now - *sent.get(&entry.request_id)?)));
            }
            lags
        });
    }
    let mut due = interval(CHANGE_INTERVAL);
    for number in 0..CHANGES {
        due.tick().await;
        let role = ["admin", "volunteer"][number % 2];
        let change = format!(
            "BEGIN; SELECT set_session_variables(:ann, NULL, NULL, '{number}', NULL, NULL);
             UPDATE profiles SET role = '{role}' WHERE org_id = :lincoln AND user_id = :bob"
        );
        run_sql(&client, &change).await;
        sent.lock()
            .unwrap()
            .insert(number.to_string(), Instant::now());
        run(&client, "COMMIT").await;
    }
    let mut lags = Histogram::<u64>::new(3).unwrap();
    while let Some(stream) = streams.join_next().await {
        for lag in stream.unwrap() {
            lags.record(u64::try_from(lag.as_micros()).unwrap())
                .unwrap();
        }
    }
    let millis = |quantile| Duration::from_micros(lags.value_at_quantile(quantile));
    println!(
        "{} deliveries to {STREAMS} streams: p50 {:.1?}, p99 {:.1?}, p99.9 {:.1?}, longest {:.1?}",
        lags.len(),
        millis(0.5),
        millis(0.99),
        millis(0.999),
        millis(1.0),
    );
    assert!(millis(0.99) <= Duration::from_millis(200));
}

/// Processor time and memory of a service with streams that wait for what never comes, each with a credential to be looked
/// at, and without them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make audit-figures"]
async fn idle_streams_cost_little() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    // A caller each, as each has its rate.
    let mut keys = Vec::new();
    for _ in 0..IDLE_CONNECTIONS {
        keys.push(Made::default().make(&database.url).await);
    }
    let directory = temporary_directory();
    let endpoint = format!("unix:{}", directory.path().join("socket").display());
    let serve = serve(&database, &endpoint, &["--auth", "api-key"]);
    until_up(&endpoint, &keys[0]).await;
    let idle = serve.over(IDLE).await;
    let before = serve.memory("VmRSS:");
    let mut streams = JoinSet::new();
    for key in &keys {
        let channel = hallpass_client::connect(&endpoint).await.unwrap();
        for _ in 0..IDLE_STREAMS / IDLE_CONNECTIONS {
            let nothing = AuditFilter {
                organization_id: id("nobody's").to_string(),
                ..AuditFilter::default()
            };
            let mut stream = Consumer::start_as(&channel, key, Start::Now(true), nothing)
                .await
                .unwrap();
            stream.next().await.unwrap();
            streams.spawn(async move {
                loop {
                    stream.next().await.unwrap();
                }
            });
        }
    }
    let busy = serve.over(IDLE).await;
    let memory = serve.memory("VmRSS:") - before;
    assert!(streams.try_join_next().is_none(), "a stream has ended");
    println!(
        "{IDLE_STREAMS} idle streams for {IDLE:?}: the service takes {busy:.1} % of a core, without them {idle:.1} %; \
         {memory} kB of memory more"
    );
    assert!(busy - idle <= IDLE_CORE_PERCENT_MAX);
}

/// The program, the service and PostgreSQL on one machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make audit-figures"]
async fn a_million_entries_are_exported() {
    let database = Database::create().await;
    let client = database.client().await;
    audit_list::fill(&client, ROWS).await;
    let directory = temporary_directory();
    let endpoint = format!("unix:{}", directory.path().join("socket").display());
    let serve = serve(&database, &endpoint, &[]);
    until_up(&endpoint, "").await;
    for format in ["native", "ocsf"] {
        let output = directory.path().join(format);
        let begin = || {
            let mut export = command(HALLPASS);
            export.args([
                "audit",
                "export",
                "--endpoint",
                &endpoint,
                "--format",
                format,
                "--output",
            ]);
            export.arg(&output);
            export
        };
        let began = Instant::now();
        let mut export = Process::of(begin());
        let peak = export.wait().await;
        let took = began.elapsed();
        let bytes = fs::metadata(&output).unwrap().len();
        let lines = fs::read_to_string(&output).unwrap().lines().count();
        assert!(lines >= usize::try_from(ROWS).unwrap(), "{lines}");
        println!(
            "{lines} entries as {format}: {took:.1?}, {:.0} a second, {} MB written; peak memory {peak} kB, of the \
             service {} kB",
            f64::from(ROWS) / took.as_secs_f64(),
            bytes / 1_000_000,
            serve.memory(PEAK),
        );
    }
}

/// A service of its own process.
fn serve(database: &Database, endpoint: &str, arguments: &[&str]) -> Process {
    let mut serve = command(HALLPASS);
    let url = as_role(&database.url, "hallpass_service");
    serve.args(["serve", "--database-url", &url]);
    serve.args(["--grpc-listen", endpoint]).args(arguments);
    Process::of(serve)
}

/// Returns when the service gives answers to whoever has this key.
async fn until_up(endpoint: &str, key: &str) {
    eventually("the service is up", async || {
        let mut probe = command(HALLPASS);
        probe.args(["audit", "export", "--endpoint", endpoint, "--since", "0s"]);
        if !key.is_empty() {
            probe.env("HALLPASS_TOKEN", key);
        }
        probe.output().await.unwrap().status.success()
    })
    .await;
}

/// The greatest memory that a process has had, as the kernel names it.
const PEAK: &str = "VmHWM:";

/// A process whose processor time and memory the kernel tells.
struct Process {
    child: tokio::process::Child,
    pid: u32,
}

impl Process {
    fn of(mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        let pid = child.id().unwrap();
        Self { child, pid }
    }

    /// What the kernel tells in `/proc`; empty once it has ended.
    fn told(&self, file: &str) -> String {
        let path = Path::new("/proc").join(self.pid.to_string()).join(file);
        fs::read_to_string(path).unwrap_or_default()
    }

    /// In kB; 0 once it has ended.
    fn memory(&self, name: &str) -> u64 {
        let status = self.told("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0)
    }

    /// Processor time of all its threads so far, of its own and the kernel's for it.
    fn processor_time(&self) -> Duration {
        let stat = self.told("stat");
        // Behind the name, which may have anything in it: the state is field 3, and these are 14 and 15.
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let fields: Vec<&str> = fields.split(' ').collect();
        let ticks: u32 = [11, 12]
            .map(|at| fields[at].parse::<u32>().unwrap())
            .iter()
            .sum();
        ticks * TICK
    }

    /// How much of a core it takes while this time passes, in percent.
    async fn over(&self, time: Duration) -> f64 {
        let (began, before) = (Instant::now(), self.processor_time());
        sleep(time).await;
        let took = self.processor_time() - before;
        100.0 * took.as_secs_f64() / began.elapsed().as_secs_f64()
    }

    /// Waits for its end.
    async fn wait(&mut self) -> u64 {
        let mut peak = 0;
        let mut look = interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                ended = self.child.wait() => {
                    assert!(ended.unwrap().success());
                    return peak;
                }
                _ = look.tick() => peak = peak.max(self.memory(PEAK)),
            }
        }
    }
}
