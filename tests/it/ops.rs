//! What operators see: metrics as they are scraped, and whether the service runs and answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use hallpass::store::MISS_CONNECTIONS_MAX;
use hallpass_client::v1::{
    AuditFilter, BatchCheckPermissionsItem, BatchCheckPermissionsRequest, CheckPermissionRequest,
    permission_service_client::PermissionServiceClient, stream_audit_entries_request::Start,
};
use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    consumer::Consumer,
    database::{Database, eventually},
    deadlines::TableLock,
    names::id,
    server::{APPROVE, Server, config, fill, now, question, run_sql, set_role},
    web::Web,
};

/// A page of metrics: each sample's value by name and labels as they are printed.
pub(crate) struct Scrape {
    pub(crate) samples: BTreeMap<String, f64>,
    /// Names with their kind and help.
    families: BTreeMap<String, (String, String)>,
}

impl Scrape {
    pub(crate) async fn of(server: &Server) -> Self {
        let answer = Web::at(server.ops).get("/metrics").await;
        assert_eq!(answer.status, 200);
        assert!(
            answer
                .header("content-type")
                .starts_with("application/openmetrics-text")
        );
        let text = String::from_utf8(answer.bytes.to_vec()).unwrap();
        assert!(text.ends_with("# EOF\n"));
        let mut families: BTreeMap<String, (String, String)> = BTreeMap::new();
        let mut samples = BTreeMap::new();
        for line in text.lines() {
            match line.splitn(4, ' ').collect::<Vec<_>>()[..] {
                ["#", "TYPE", name, kind] => {
                    families.entry(name.to_owned()).or_default().0 = kind.to_owned()
                }
                ["#", "HELP", name, help] => {
                    families.entry(name.to_owned()).or_default().1 = help.to_owned()
                }
                ["#", ..] => {}
                _ => {
                    let (name, value) = line.rsplit_once(' ').unwrap();
                    let before = samples.insert(name.to_owned(), value.parse().unwrap());
                    assert!(before.is_none(), "twice: {name}");
                }
            }
        }
        Self { samples, families }
    }

    /// The names of a family's labels.
    fn labels(&self, family: &str) -> String {
        let is_of_family = |sample: &str| {
            let rest = sample.strip_prefix(family)?;
            let suffixes = ["", "_total", "_bucket", "_sum", "_count"];
            let (suffix, labels) = rest.split_once('{')?;
            suffixes.contains(&suffix).then(|| labels.to_owned())
        };
        let names: BTreeSet<String> = (self.samples.keys())
            .filter_map(|sample| is_of_family(sample))
            .flat_map(|labels| {
                let names = labels
                    .split(',')
                    .filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
                names.collect::<Vec<_>>()
            })
            .filter(|name| name != "le")
            .collect();
        names
            .into_iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// 0 where there is none.
    pub(crate) fn value(&self, sample: &str) -> f64 {
        self.samples.get(sample).copied().unwrap_or_default()
    }
}

#[tokio::test]
async fn what_happens_is_counted() {
    let database = Database::create().await;
    let sql = database.client().await;
    fill(&sql).await;
    let server = Server::start(config(&database.url)).await;
    let mut client = PermissionServiceClient::new(server.channel.clone());
    let question = |user: &str| question("lincoln", user, APPROVE);
    let before = Scrape::of(&server).await;
    for user in ["ann", "ann", "vic"] {
        client.check_permission(question(user)).await.unwrap();
    }
    let malformed = CheckPermissionRequest {
        user_id: "x".to_owned(),
        ..question("ann")
    };
    client.check_permission(malformed).await.unwrap_err();
    client.check_permission(now(question("ann"))).await.unwrap();
    let items = ["ann", "vic", "nobody"].map(|user| BatchCheckPermissionsItem {
        organization_id: id("lincoln").to_string(),
        user_id: id(user).to_string(),
        permission: APPROVE.to_owned(),
    });
    let batch = BatchCheckPermissionsRequest {
        items: items.to_vec(),
        ..Default::default()
    };
    client.batch_check_permissions(batch).await.unwrap();
    Web::of(&server)
        .post("/v1/check", &json!({"user_id": "x"}))
        .await;
    let after = Scrape::of(&server).await;
    let check = r#"grpc_service="hallpass.v1.PermissionService",grpc_method="CheckPermission""#;
    let route = r#"http_method="POST",http_route="/v1/check""#;
    let cached =
        |reason: &str| format!(r#"hallpass_decisions_total{{reason="{reason}",source="cache"}}"#);
    for (sample, more) in [
        (format!("grpc_server_started_total{{{check}}}"), 5.0),
        (
            format!(r#"grpc_server_handled_total{{{check},grpc_code="OK"}}"#),
            4.0,
        ),
        (
            format!(r#"grpc_server_handled_total{{{check},grpc_code="InvalidArgument"}}"#),
            1.0,
        ),
        (
            format!("grpc_server_handling_seconds_count{{{check}}}"),
            5.0,
        ),
        (format!("http_server_started_total{{{route}}}"), 1.0),
        (
            format!(r#"http_server_handled_total{{{route},http_code="400"}}"#),
            1.0,
        ),
        (cached("GRANTED_BY_ROLE"), 3.0),
        (cached("ROLE_TOO_LOW"), 2.0),
        (
            r#"hallpass_decisions_total{reason="GRANTED_BY_ROLE",source="database"}"#.to_owned(),
            1.0,
        ),
        ("hallpass_cache_hits_total".to_owned(), 5.0),
        ("hallpass_cache_misses_total".to_owned(), 1.0),
        ("hallpass_load_subjects_count".to_owned(), 2.0),
    ] {
        let found = after.value(&sample) - before.value(&sample);
        assert!((found - more).abs() < 1e-9, "{sample}: {found}, not {more}");
    }
    server.stop().await;
}

#[tokio::test]
async fn what_the_database_says_of_itself_is_sampled() {
    let database = Database::create().await;
    let sql = database.client().await;
    fill(&sql).await;
    run_sql(
        &sql,
        "SELECT refresh_permission_materialized_views(); ANALYZE organizations",
    )
    .await;
    let server = Server::start(config(&database.url)).await;
    let sample = async |name: &str| Scrape::of(&server).await.value(name);
    eventually("hallpass_log_head", async || {
        sample("hallpass_log_head").await > 0.0
    })
    .await;
    let all = sample("hallpass_matrix_believed_ratio").await;
    assert!((all - 1.0).abs() < 1e-9, "{all}");
    assert!(sample("hallpass_audit_partition_months_ahead").await >= 1.0);
    let head = sample("hallpass_log_head").await;
    set_role(&sql, "lincoln", "bob", "volunteer").await;
    eventually("hallpass_log_head", async || {
        sample("hallpass_log_head").await > head
    })
    .await;
    eventually("hallpass_feed_position", async || {
        sample("hallpass_feed_position").await > head
    })
    .await;
    // One of two organizations.
    let half = sample("hallpass_matrix_believed_ratio").await;
    assert!((half - 0.5).abs() < 1e-9, "{half}");
    server.stop().await;
}

#[tokio::test]
async fn a_stream_is_open_until_its_caller_goes() {
    let database = Database::create().await;
    let sql = database.client().await;
    fill(&sql).await;
    let server = Server::start(config(&database.url)).await;
    let stream = r#"grpc_service="hallpass.v1.AuditService",grpc_method="StreamAuditEntries""#;
    let ended = format!(r#"grpc_server_handled_total{{{stream},grpc_code="Canceled"}}"#);
    let sample = async |name: &str| Scrape::of(&server).await.value(name);
    let consumer = Consumer::start(
        &server.channel,
        Start::Earliest(true),
        AuditFilter::default(),
    );
    let mut consumer = consumer.await.unwrap();
    consumer.next().await.unwrap();
    eventually("hallpass_audit_streams", async || {
        sample("hallpass_audit_streams").await > 0.0
    })
    .await;
    assert!(sample(&ended).await.abs() < 1e-9);
    drop(consumer);
    eventually("the stream is over", async || sample(&ended).await > 0.0).await;
    eventually("hallpass_audit_streams", async || {
        sample("hallpass_audit_streams").await < 1.0
    })
    .await;
    server.stop().await;
}

/// What waits behind statements that hang is seen; that all of them are under way is not yet a trouble.
#[tokio::test]
async fn misses_that_wait_for_a_statement_are_seen_and_for_how_long() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let waited = async || {
        let scrape = Scrape::of(&server).await;
        scrape.samples["hallpass_load_wait_seconds"]
    };
    let lock = TableLock::take(&database, "public.profiles").await;
    let mut asking = JoinSet::new();
    let ask = |asking: &mut JoinSet<_>| {
        let mut client = server.client();
        asking.spawn(async move {
            let asked = now(question("lincoln", "ann", APPROVE));
            client.check_permission(asked).await.map(drop)
        });
    };
    for statements in 1..=MISS_CONNECTIONS_MAX {
        ask(&mut asking);
        lock.until_waiting(i32::try_from(statements).unwrap()).await;
    }
    assert!(waited().await < 1e-9);
    ask(&mut asking);
    eventually("one waits", async || waited().await > 0.1).await;
    lock.release();
    while asking.join_next().await.is_some() {}
    assert!(waited().await < 1e-9);
    server.stop().await;
}

/// Orchestrators hear of a service that cannot answer, and do not kill it for that.
#[tokio::test]
async fn a_service_whose_log_is_not_complete_lives_and_is_not_ready() {
    let database = Database::create().await;
    let sql = database.client().await;
    fill(&sql).await;
    let mut config = config(&database.url);
    config.inspection_interval = std::time::Duration::from_millis(50);
    let server = Server::start(config).await;
    let ops = Web::at(server.ops);
    let status = async |path: &str| ops.get(path).await.status.as_u16();
    assert_eq!(
        (status("/livez").await, status("/readyz").await),
        (200, 200)
    );
    run_sql(&sql, "ALTER TABLE profiles DISABLE TRIGGER USER").await;
    eventually("/readyz", async || status("/readyz").await == 503).await;
    assert_eq!(status("/livez").await, 200);
    let scrape = Scrape::of(&server).await;
    assert!(scrape.value("hallpass_ready").abs() < 1e-9);
    assert!(scrape.value("hallpass_log_believed").abs() < 1e-9);
    let unknown = ops.get("/v1/check").await;
    assert_eq!(unknown.failed(), "404 PATH_UNKNOWN");
    server.stop().await;
}

/// Alerts, dashboards and people rely on the names.
#[tokio::test]
async fn the_documentation_lists_every_metric() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    // What a method has not ended with is not on the page.
    server.check("lincoln", "ann", APPROVE).await;
    Web::of(&server).get("/api/health").await;
    eventually("sampled", async || {
        let scrape = Scrape::of(&server).await;
        scrape.samples.contains_key("hallpass_log_head")
    })
    .await;
    let scrape = Scrape::of(&server).await;
    let rows = scrape.families.iter().map(|(name, (kind, help))| {
        let suffix = if kind == "counter" { "_total" } else { "" };
        format!(
            "| `{name}{suffix}` | {kind} | {} | {help} |",
            scrape.labels(name)
        )
    });
    let rows: Vec<String> = rows.collect();
    let document = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md"));
    let document = document.unwrap();
    let listed: Vec<&str> = document
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert_eq!(
        listed,
        rows,
        "docs/metrics.md is to have:\n{}",
        rows.join("\n")
    );
    server.stop().await;
}
