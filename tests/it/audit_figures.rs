//! Figures of the audit log, printed: how late entries arrive, and how fast they are exported.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hallpass_client::v1::{AuditFilter, stream_audit_entries_request::Start};
use hdrhistogram::Histogram;
use tokio::{process::Command, task::JoinSet, time::interval};

use crate::{
    audit_list,
    commands::command,
    consumer::Consumer,
    database::{Database, as_role, eventually},
    names::id,
    server::{Server, config, fill, run_sql},
    sql::run,
    support::{HALLPASS, temporary_directory},
};

const STREAMS: usize = 100;
const CHANGES: usize = 2_000;
const CHANGE_INTERVAL: Duration = Duration::from_millis(10);
const ROWS: u32 = 1_000_000;

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

/// The program, the service and PostgreSQL on one machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make audit-figures"]
async fn a_million_entries_are_exported() {
    let database = Database::create().await;
    let client = database.client().await;
    audit_list::fill(&client, ROWS).await;
    let directory = temporary_directory();
    let socket = directory.path().join("socket");
    let endpoint = format!("unix:{}", socket.display());
    let mut serve = command(HALLPASS);
    serve.args([
        "serve",
        "--database-url",
        &as_role(&database.url, "hallpass_service"),
    ]);
    serve.args(["--grpc-listen", &endpoint]);
    let serve = Peak::of(serve);
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
        // The first finds the service up, and is short.
        eventually("the service is up", async || {
            let mut probe = command(HALLPASS);
            probe.args(["audit", "export", "--endpoint", &endpoint, "--since", "0s"]);
            probe.output().await.unwrap().status.success()
        })
        .await;
        let began = Instant::now();
        let mut export = Peak::of(begin());
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
            serve.peak(),
        );
    }
}

/// A process whose greatest memory is known.
struct Peak {
    child: tokio::process::Child,
    pid: u32,
}

impl Peak {
    fn of(mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        let pid = child.id().unwrap();
        Self { child, pid }
    }

    /// In kB, as the kernel says; 0 once it has ended.
    fn peak(&self) -> u64 {
        let status =
            fs::read_to_string(Path::new("/proc").join(self.pid.to_string()).join("status"));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0)
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
                _ = look.tick() => peak = peak.max(self.peak()),
            }
        }
    }
}
