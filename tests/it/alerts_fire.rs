//! The alerts and the dashboard on a real Prometheus that scrapes two replicas: each trouble is made in earnest, raises its
//! alert, and its end clears it.
//!
//! The rules are those of deploy/prometheus with every duration a fortieth as long, so that minutes are seconds.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    num::NonZeroU32,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hallpass::server::Config;
use hallpass_client::v1::AuditFilter;
use hallpass_client::v1::stream_audit_entries_request::Start;
use regex::{Captures, Regex};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_postgres::Client;

use crate::{
    bypass::{BYPASSES, fail_over},
    consumer::Consumer,
    database::{Database, as_role, eventually},
    proxy::{Proxy, Way},
    selfcheck::{GO_ON_RECORDING, STOP_RECORDING},
    server::{APPROVE, Server, config, fill, head, now, question, run_sql, set_role},
    support::temporary_directory,
    web::Web,
};

const SHORTER: u64 = 40;

/// An alert waits for its rule, and its end for what the rule looks back on.
const PATIENCE: Duration = Duration::from_secs(60);

/// Looks back on days, which are minutes here still: promtool tries it.
const BURN: &str = "HallpassErrorBudgetBurn";

/// A Prometheus; it ends with this.
struct Prometheus {
    process: Child,
    web: Web,
    directory: TempDir,
}

impl Prometheus {
    async fn start(targets: &[SocketAddr]) -> Self {
        let directory = temporary_directory();
        let rules = repository_file("deploy/prometheus/hallpass.rules.yml");
        fs::write(directory.path().join("rules.yml"), shortened(&rules)).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = port.local_addr().unwrap();
        drop(port);
        fs::write(
            directory.path().join("prometheus.yml"),
            "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}\n\
             rule_files: [rules.yml]\n\
             scrape_configs:\n\
             - job_name: hallpass\n  \
               file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]\n",
        )
        .unwrap();
        let process = Command::new("prometheus")
            .current_dir(directory.path())
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address={address}"))
            .arg("--query.lookback-delta=2s")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Prometheus is installed: apt-get install prometheus");
        let prometheus = Self {
            process,
            web: Web::at(address),
            directory,
        };
        prometheus.scrape(targets);
        eventually("Prometheus is ready", async || {
            tokio::net::TcpStream::connect(address).await.is_ok()
        })
        .await;
        prometheus
    }

    fn scrape(&self, targets: &[SocketAddr]) {
        let targets: Vec<String> = targets.iter().map(ToString::to_string).collect();
        let targets = serde_json::json!([{ "targets": targets }]);
        let path = self.directory.path();
        fs::write(path.join("targets.new"), targets.to_string()).unwrap();
        fs::rename(path.join("targets.new"), path.join("targets.json")).unwrap();
    }

    /// The names of the alerts that fire.
    async fn firing(&self) -> BTreeSet<String> {
        let answer = self.web.get("/api/v1/alerts").await;
        let alerts = answer.body["data"]["alerts"].as_array().cloned();
        let firing =
            (alerts.unwrap_or_default().into_iter()).filter(|alert| alert["state"] == "firing");
        firing
            .map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned())
            .collect()
    }

    /// How many series a query has.
    async fn series(&self, query: &str) -> usize {
        let query =
            percent_encoding::utf8_percent_encode(query, percent_encoding::NON_ALPHANUMERIC);
        let answer = self.web.get(&format!("/api/v1/query?query={query}")).await;
        assert_ne!(answer.body["status"], "error", "{}", answer.body);
        answer.body["data"]["result"].as_array().map_or(0, Vec::len)
    }

    async fn until(&self, what: &str, holds: impl Fn(&BTreeSet<String>) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            let firing = self.firing().await;
            if holds(&firing) {
                return began.elapsed();
            }
            assert!(
                began.elapsed() < PATIENCE,
                "not in time: {what}; {firing:?} fire"
            );
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits for the alert, and prints how long it took.
    async fn fires(&self, alert: &str) {
        let took = self
            .until(&format!("{alert} fires"), |firing| firing.contains(alert))
            .await;
        println!("{alert:28} fired after {took:.1?}");
    }

    async fn is_quiet(&self) {
        let is_quiet = |firing: &BTreeSet<String>| firing.iter().all(|alert| alert == BURN);
        let took = self.until("no alert fires", is_quiet).await;
        println!("{:28} cleared after {took:.1?}", "");
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn repository_file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every duration of the rules, what they look back on and what they wait.
fn shortened(rules: &str) -> String {
    let durations = Regex::new(r"(\[|for: )(\d+)([smhd])").unwrap();
    let shortened = durations.replace_all(rules, |found: &Captures<'_>| {
        let unit = match &found[3] {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            _ => 86_400,
        };
        let millis = found[2].parse::<u64>().unwrap() * unit * 1_000 / SHORTER;
        // Some scrapes at least.
        let least = if &found[1] == "[" { 2_500 } else { 0 };
        format!("{}{}ms", &found[1], millis.max(least))
    });
    shortened.into_owned()
}

/// Two replicas that reach their database over ways of the test's.
struct Replicas {
    servers: Vec<Server>,
    feed: Proxy,
    database: Proxy,
}

impl Replicas {
    async fn start(url: &str) -> Self {
        let feed = Proxy::to(&as_role(url, "hallpass_service"), Way::Open);
        let database = Proxy::to(&as_role(url, "hallpass_service"), Way::Open);
        let mut servers = Vec::new();
        for index in 0..2 {
            let mut config = Config {
                inspection_interval: Duration::from_millis(250),
                sample_interval: Duration::from_millis(500),
                self_check_every: NonZeroU32::MIN,
                ..config(url)
            };
            // The other one goes on as ever.
            if index == 0 {
                config.feed_database = feed.url.parse().unwrap();
                config.database = database.url.parse().unwrap();
            }
            servers.push(Server::start(config).await);
        }
        Self {
            servers,
            feed,
            database,
        }
    }

    fn ops(&self) -> Vec<SocketAddr> {
        self.servers.iter().map(|server| server.ops).collect()
    }
}

/// Checks of both replicas, cached and not, as long as this is kept.
fn load(replicas: &Replicas) -> JoinSet<()> {
    let mut load = JoinSet::new();
    for server in &replicas.servers {
        let channel = server.channel.clone();
        load.spawn(async move {
            for index in 0_u64.. {
                let mut client =
                    hallpass_client::v1::permission_service_client::PermissionServiceClient::new(
                        channel.clone(),
                    );
                let asked = question("lincoln", "ann", APPROVE);
                let asked = if index % 4 == 0 { now(asked) } else { asked };
                tokio::spawn(async move { drop(client.check_permission(asked).await) });
                sleep(Duration::from_millis(20)).await;
            }
        });
        let web = Web::of(server);
        load.spawn(async move {
            loop {
                let asked = serde_json::json!({"organization_id": crate::names::id("lincoln").to_string(),
                    "user_id": crate::names::id("ann").to_string(), "permission": APPROVE});
                web.post("/v1/check", &asked).await;
                sleep(Duration::from_millis(100)).await;
            }
        });
    }
    load
}

/// Holds up whoever reads memberships.
async fn hold(client: &Client) {
    run_sql(
        client,
        "BEGIN; LOCK TABLE profiles IN ACCESS EXCLUSIVE MODE",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Prometheus and minutes: make alerts"]
async fn every_trouble_raises_its_alert_and_its_end_clears_it() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run_sql(&client, "SELECT refresh_permission_materialized_views()").await;
    let replicas = Replicas::start(&database.url).await;
    let prometheus = Prometheus::start(&replicas.ops()).await;
    let mut load = load(&replicas);
    eventually("both replicas are scraped", async || {
        prometheus.series("up{job=\"hallpass\"} == 1").await == 2
    })
    .await;
    prometheus.is_quiet().await;

    // The dashboard: some of its panels show what is rare.
    let mut consumer = Consumer::start(
        &replicas.servers[0].channel,
        Start::Earliest(true),
        AuditFilter::default(),
    )
    .await
    .unwrap();
    consumer.next().await.unwrap();
    set_role(&client, "lincoln", "vic", "board_member").await;
    panels_have_series(&prometheus).await;
    drop(consumer);

    replicas.feed.set(Way::Silent);
    prometheus.fires("HallpassStalenessNearBound").await;
    prometheus.fires("HallpassFeedStalled").await;
    replicas.feed.set(Way::Open);
    prometheus.is_quiet().await;

    let (disable, enable) = BYPASSES[1];
    run_sql(&client, disable).await;
    prometheus.fires("HallpassTriggersDisabled").await;
    prometheus.fires("HallpassUnavailable").await;
    run_sql(&client, enable).await;
    prometheus.is_quiet().await;

    hold(&client).await;
    let explained = explain_often(&replicas.servers[1]);
    prometheus.fires("HallpassPoolExhausted").await;
    prometheus.fires("HallpassLatency").await;
    drop(explained);
    run_sql(&client, "ROLLBACK").await;
    prometheus.is_quiet().await;

    replicas.database.set(Way::Closed);
    replicas.feed.set(Way::Closed);
    prometheus.fires("HallpassErrorRate").await;
    replicas.database.set(Way::Open);
    replicas.feed.set(Way::Open);
    prometheus.is_quiet().await;

    let kept = head(&client).await;
    set_role(&client, "lincoln", "pat", "admin").await;
    for server in &replicas.servers {
        server.catch_up(&client).await;
    }
    let undo = "UPDATE public.profiles SET role = 'parent_member' WHERE user_id = :pat";
    fail_over(&client, kept, undo, "").await;
    prometheus.fires("HallpassHistoryChanged").await;
    prometheus.is_quiet().await;

    let cached = replicas.servers[1].check("lincoln", "bob", APPROVE).await;
    assert!(cached.response.allowed, "{cached}");
    run_sql(&client, STOP_RECORDING).await;
    set_role(&client, "lincoln", "bob", "volunteer").await;
    run_sql(&client, GO_ON_RECORDING).await;
    eventually("the wrong answer is found", async || {
        !replicas.servers[1]
            .check("lincoln", "bob", APPROVE)
            .await
            .response
            .allowed
    })
    .await;
    prometheus.fires("HallpassSelfCheckDiverged").await;
    // It stays until the replica is started anew.
    load.shutdown().await;
    let mut servers = replicas.servers;
    servers.pop().unwrap().stop().await;
    let anew = Server::start(config(&database.url)).await;
    prometheus.scrape(&[servers[0].ops, anew.ops]);
    prometheus.is_quiet().await;
    anew.stop().await;
    servers.pop().unwrap().stop().await;
}

/// More questions than the pool of those has connections.
fn explain_often(server: &Server) -> JoinSet<()> {
    let mut asking = JoinSet::new();
    for _ in 0..12 {
        let mut client = server.client();
        asking.spawn(async move {
            loop {
                let mut asked = question("lincoln", "ann", APPROVE);
                asked.explain = true;
                drop(client.check_permission(asked).await);
            }
        });
    }
    asking
}

async fn panels_have_series(prometheus: &Prometheus) {
    let dashboard: Value =
        serde_json::from_str(&repository_file("deploy/grafana/dashboards/hallpass.json")).unwrap();
    let mut queries = Vec::new();
    collect(&dashboard["panels"], &mut queries);
    assert!(queries.len() > 30, "{}", queries.len());
    for (title, query) in queries {
        let query = query
            .replace("$__rate_interval", "5s")
            .replace("[5m]", "[5s]")
            .replace("$job", ".*")
            .replace("$instance", ".*");
        eventually(&format!("`{title}` has a series: {query}"), async || {
            prometheus.series(&query).await > 0
        })
        .await;
    }
}

fn collect(panels: &Value, queries: &mut Vec<(String, String)>) {
    for panel in panels.as_array().into_iter().flatten() {
        collect(&panel["panels"], queries);
        let title = panel["title"].as_str().unwrap_or_default();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            queries.push((title.to_owned(), query.to_owned()));
        }
    }
}
