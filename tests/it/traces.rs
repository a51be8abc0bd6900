//! What a collector of traces hears of calls, what audit entries and the log say of them; and that nobody waits for it.

use std::{
    fs,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hallpass::{
    auth::{api_key::Pepper, keys::Timing},
    server::Config,
    telemetry::otlp::Export,
};
use hallpass_client::{
    tonic::{Code, Request, Response, Status, metadata::MetadataMap, transport},
    v1::{
        CheckPermissionRequest, PutMemberRequest, admin_service_client::AdminServiceClient,
        permission_service_client::PermissionServiceClient,
    },
};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::{
        ExportMetricsServiceRequest, ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    },
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::{Span, span::SpanKind},
};
use serde_json::json;
use tokio::{net::TcpListener, process::Command};
use tokio_stream::wrappers::TcpListenerStream;

use crate::{
    database::{Database, as_role, eventually},
    keyring::{Made, TIMING, config_with_keys},
    names::id,
    server::{APPROVE, Server, config, fill, now, question},
    support::{HALLPASS, temporary_directory},
    web::Web,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// Sampled by whoever calls.
fn sampled() -> String {
    parent(TRACE, "01")
}

fn parent(trace: &str, flags: &str) -> String {
    format!("00-{trace}-{SPAN}-{flags}")
}

/// A trace of a test's own, to tell it from others.
fn trace(number: u32) -> String {
    format!("{number:032x}")
}

/// Takes traces, and keeps them.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[hallpass_client::tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans);
        self.0.lock().unwrap().extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// A collector, and where it takes traces.
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let collector = Self::default();
        let service = TraceServiceServer::new(collector.clone());
        let server = transport::Server::builder().add_service(service);
        drop(tokio::spawn(
            server.serve_with_incoming(TcpListenerStream::new(listener)),
        ));
        (collector, endpoint)
    }

    fn spans(&self) -> Vec<Span> {
        self.0.lock().unwrap().clone()
    }

    /// The spans of a trace, its call's first, as soon as that is there: it is exported last.
    async fn trace(&self, trace: &str) -> Vec<Span> {
        let of_trace = || -> Vec<Span> {
            let mut spans = self.spans();
            spans.retain(|span| hex(&span.trace_id) == trace);
            spans.sort_by_key(|span| span.kind != SpanKind::Server as i32);
            spans
        };
        eventually("the call's span is exported", async || {
            let spans = of_trace();
            spans.first().is_some_and(is_call)
        })
        .await;
        of_trace()
    }

    fn calls(&self) -> Vec<Span> {
        self.spans().into_iter().filter(is_call).collect()
    }
}

fn is_call(span: &Span) -> bool {
    span.kind == SpanKind::Server as i32
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn names(spans: &[Span]) -> Vec<&str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

/// `key=value` of each, in order of the keys.
fn attributes(span: &Span) -> String {
    let shown = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => panic!("{other:?}"),
    };
    let mut attributes: Vec<String> = (span.attributes.iter())
        .map(|attribute| {
            let value = attribute.value.as_ref().unwrap().value.as_ref().unwrap();
            format!("{}={}", attribute.key, shown(value))
        })
        .collect();
    attributes.sort();
    attributes.join(" ")
}

fn with_parent<T>(message: T, parent: &str) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("traceparent", parent.parse().unwrap());
    request
}

fn traced(url: &str, endpoint: &str) -> Config {
    let mut config = config(url);
    config.traces.otlp_endpoint = Some(endpoint.to_owned());
    config
}

async fn filled() -> Database {
    let database = Database::create().await;
    fill(&database.client().await).await;
    database
}

#[tokio::test]
async fn a_caller_s_trace_goes_on_through_the_waits_and_the_statement() {
    let (database, (collector, endpoint)) = tokio::join!(filled(), Collector::start());
    let server = Server::start(traced(&database.url, &endpoint)).await;
    let ask = async |question: CheckPermissionRequest, trace: &str| {
        let mut request = with_parent(question, &parent(trace, "01"));
        let state = "vendor=what-it-likes".parse().unwrap();
        request.metadata_mut().insert("tracestate", state);
        server.try_check(request).await
    };

    ask(now(question("lincoln", "ann", APPROVE)), TRACE)
        .await
        .unwrap();
    let spans = collector.trace(TRACE).await;
    let call = &spans[0];
    assert_eq!(call.name, "hallpass.v1.PermissionService/CheckPermission");
    assert_eq!(hex(&call.parent_span_id), SPAN);
    assert_eq!(call.trace_state, "vendor=what-it-likes");
    assert_eq!(
        attributes(call),
        "hallpass.source=database rpc.grpc.status_code=0 rpc.method=CheckPermission \
         rpc.service=hallpass.v1.PermissionService rpc.system=grpc"
    );
    let mut waits = names(&spans[1..]);
    waits.sort_unstable();
    assert_eq!(waits, ["load", "wait for a connection", "wait for a load"]);
    for span in &spans[1..] {
        assert_eq!(span.parent_span_id, call.span_id, "{}", span.name);
        assert!(span.start_time_unix_nano >= call.start_time_unix_nano);
        assert!(span.end_time_unix_nano <= call.end_time_unix_nano);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
    }
    let statement = spans.iter().find(|span| span.name == "load").unwrap();
    assert_eq!(statement.kind, SpanKind::Client as i32);
    assert_eq!(
        attributes(statement),
        "db.operation.name=load db.system.name=postgresql"
    );

    // Once it is cached there is nothing to wait for.
    server.check("lincoln", "ann", APPROVE).await;
    let cached = trace(2);
    let answer = ask(question("lincoln", "ann", APPROVE), &cached).await;
    assert!(answer.unwrap().is_cached());
    let spans = collector.trace(&cached).await;
    assert_eq!(spans.len(), 1);
    assert!(attributes(&spans[0]).starts_with("hallpass.source=cache "));

    // What failed says with what.
    let malformed = trace(3);
    let refused = ask(CheckPermissionRequest::default(), &malformed).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    let spans = collector.trace(&malformed).await;
    assert!(attributes(&spans[0]).starts_with("rpc.grpc.status_code=3 "));
    // The caller's fault is no error of the service's.
    assert_eq!(spans[0].status.as_ref().unwrap().code, 0);
    server.stop().await;
}

#[tokio::test]
async fn a_trace_goes_on_over_http_and_through_changes() {
    let (database, (collector, endpoint)) = tokio::join!(filled(), Collector::start());
    let mut config = traced(&database.url, &endpoint);
    let login = as_role(&database.url, "hallpass_admin");
    config.admin_database = Some(login.parse().unwrap());
    let server = Server::start(config).await;

    let question = json!({
        "organization_id": id("lincoln"), "user_id": id("ann"), "permission": APPROVE,
        "consistency": {"fully_consistent": true},
    });
    let over_http = trace(1);
    let answer = Web::at(server.http)
        .with("traceparent", parent(&over_http, "01"))
        .post("/v1/check", &question)
        .await;
    assert_eq!(answer.status, 200);
    let spans = collector.trace(&over_http).await;
    assert_eq!(spans[0].name, "POST /v1/check");
    assert!(
        attributes(&spans[0]).ends_with(
            "http.request.method=POST http.response.status_code=200 http.route=/v1/check"
        )
    );
    assert!(names(&spans).contains(&"load"));

    let change = trace(2);
    let request = with_parent(put_member("eve"), &parent(&change, "01"));
    let mut admin = AdminServiceClient::new(server.channel.clone());
    admin.put_member(request).await.unwrap();
    let spans = collector.trace(&change).await;
    assert!(names(&spans).contains(&"change"), "{:?}", names(&spans));
    server.stop().await;
}

fn put_member(user: &str) -> PutMemberRequest {
    PutMemberRequest {
        organization_id: id("lincoln").to_string(),
        user_id: id(user).to_string(),
        role: "volunteer".to_owned(),
        ..PutMemberRequest::default()
    }
}

#[tokio::test]
async fn what_nobody_samples_is_not_exported() {
    let (database, (collector, endpoint)) = tokio::join!(filled(), Collector::start());
    let server = Server::start(traced(&database.url, &endpoint)).await;
    let ask = async |parent: &str| {
        let question = now(question("lincoln", "ann", APPROVE));
        server
            .try_check(with_parent(question, parent))
            .await
            .unwrap();
    };
    server.check_now("lincoln", "ann", APPROVE).await;
    ask(&parent(&trace(1), "00")).await;
    ask("no traceparent").await;
    ask(&parent(&trace(0), "01")).await;
    // What is sent after them is there: nor does the rest come.
    ask(&parent(&trace(2), "01")).await;
    server.stop().await;
    let calls = collector.calls();
    assert_eq!(calls.len(), 1, "{:?}", names(&calls));
    assert_eq!(hex(&calls[0].trace_id), trace(2));
}

#[tokio::test]
async fn a_ratio_decides_for_callers_who_do_not_and_a_stop_sends_the_rest() {
    let (database, (collector, endpoint)) = tokio::join!(filled(), Collector::start());
    let mut config = traced(&database.url, &endpoint);
    config.traces.sample_ratio = 1.0;
    let server = Server::start(config).await;
    server.check_now("lincoln", "ann", APPROVE).await;
    let unsampled = with_parent(question("lincoln", "ann", APPROVE), &parent(TRACE, "00"));
    server.try_check(unsampled).await.unwrap();
    // Health is asked for all the time.
    server.health("").await;
    server.stop().await;
    let calls = collector.calls();
    assert_eq!(
        names(&calls),
        ["hallpass.v1.PermissionService/CheckPermission"]
    );
    assert!(calls[0].parent_span_id.is_empty());
}

#[tokio::test]
async fn a_stranger_has_nothing_traced() {
    let (database, (collector, endpoint)) = tokio::join!(filled(), Collector::start());
    let key = Made::default().make(&database.url).await;
    // Memory answers for no key: each waits for the database.
    let timing = Timing {
        staleness_bound: Duration::ZERO,
        ..TIMING
    };
    let mut config = config_with_keys(&database.url, timing, Pepper::default());
    config.traces.otlp_endpoint = Some(endpoint);
    let server = Server::start(config).await;
    let ask = async |credential: &str, parent: &str| {
        let mut request = with_parent(question("lincoln", "ann", APPROVE), parent);
        let bearer = format!("Bearer {credential}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        let mut client = PermissionServiceClient::new(server.channel.clone());
        let answer = client.check_permission(request).await;
        answer.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    let refused = ask("hp_made_up", &parent(&trace(1), "01")).await;
    assert_eq!(refused, Code::Unauthenticated);
    assert_eq!(ask(&key, &parent(&trace(2), "01")).await, Code::Ok);
    server.stop().await;
    let calls = collector.calls();
    let traces: Vec<_> = calls.iter().map(|span| hex(&span.trace_id)).collect();
    assert_eq!(traces, [trace(2)]);
    let spans = collector.trace(&trace(2)).await;
    assert!(
        names(&spans).contains(&"authentication"),
        "{:?}",
        names(&spans)
    );
}

/// What the metrics say became of so many spans.
async fn spans_that(server: &Server, outcome: &str) -> u32 {
    let page = Web::at(server.ops).get("/metrics").await;
    let page = String::from_utf8(page.bytes.to_vec()).unwrap();
    let name = format!("hallpass_trace_spans_total{{outcome=\"{outcome}\"}} ");
    let counted = page.lines().find_map(|line| line.strip_prefix(&name));
    counted.unwrap().parse().unwrap()
}

#[tokio::test]
async fn whoever_has_every_call_traced_has_some_of_them_traced() {
    const CALLS: u32 = 1_000;
    let (database, (collector, endpoint)) = tokio::join!(filled(), Collector::start());
    let server = Server::start(traced(&database.url, &endpoint)).await;
    server.check("lincoln", "ann", APPROVE).await;
    let began = Instant::now();
    for call in 1..=CALLS {
        let request = with_parent(
            question("lincoln", "ann", APPROVE),
            &parent(&trace(call), "01"),
        );
        server.try_check(request).await.unwrap();
    }
    // A hundred at once, and a hundred a second after that.
    let most = 100 + 100 * (began.elapsed().as_secs() + 1);
    eventually("each span is counted", async || {
        let exported = spans_that(&server, "exported").await;
        exported + spans_that(&server, "dropped").await == CALLS
    })
    .await;
    server.stop().await;
    let traced = collector.calls().len() as u64;
    assert!(
        (100..=most.min(u64::from(CALLS) - 1)).contains(&traced),
        "{traced} of {most}"
    );
}

#[tokio::test]
async fn a_collector_that_is_away_or_hangs_holds_up_nobody() {
    let database = filled().await;
    let hangs = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [&closed, &hangs].map(|listener| listener.local_addr().unwrap());
    drop(closed);
    for address in addresses {
        let server = Server::start(traced(&database.url, &format!("http://{address}"))).await;
        for call in 1..=200 {
            let question = question("lincoln", "ann", APPROVE);
            let request = with_parent(question, &parent(&trace(call), "01"));
            let answer = server.try_check(request).await.unwrap();
            assert_eq!(answer.said, "allow GRANTED_BY_ROLE");
        }
        let stopped = Instant::now();
        server.stop().await;
        let took = stopped.elapsed();
        assert!(took < Duration::from_secs(4), "{address}: {took:?}");
    }
}

#[tokio::test]
async fn an_audit_entry_has_the_caller_s_trace_sampled_or_not() {
    let database = filled().await;
    let mut config = config(&database.url);
    let login = as_role(&database.url, "hallpass_admin");
    config.admin_database = Some(login.parse().unwrap());
    let server = Server::start(config).await;
    let sql = database.client().await;
    let mut admin = AdminServiceClient::new(server.channel.clone());
    let upper = TRACE.to_uppercase();
    let cases = [
        ("sampled", sampled(), Some(TRACE)),
        ("unsampled", parent(TRACE, "00"), Some(TRACE)),
        ("malformed", parent(&upper, "01"), None),
        ("nil", parent(&trace(0), "01"), None),
    ];
    for (user, parent, expected) in cases {
        let request = with_parent(put_member(user), &parent);
        admin.put_member(request).await.unwrap();
        let select =
            "SELECT trace_id FROM public.permission_audit_log ORDER BY created_at DESC LIMIT 1";
        let found: Option<String> = sql.query_one(select, &[]).await.unwrap().get(0);
        assert_eq!(found.as_deref(), expected, "{user}");
    }
}

#[tokio::test]
async fn a_slow_call_is_logged_with_where_its_time_went() {
    let database = filled().await;
    let directory = temporary_directory();
    let (socket, log) = (
        directory.path().join("socket"),
        directory.path().join("log"),
    );
    let mut service = Command::new(HALLPASS)
        .args(["serve", "--slow-request=300ms", "--lame-duck=0ms"])
        .arg("--database-url")
        .arg(as_role(&database.url, "hallpass_service"))
        .arg(format!("--grpc-listen=unix:{}", socket.display()))
        .args(["--http-listen=none", "--ops-listen=none"])
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let read = || fs::read_to_string(&log).unwrap();
    eventually("the service is ready", async || read().contains(" ready ")).await;
    let endpoint = format!("unix:{}", socket.display());
    let channel = hallpass_client::connect(&endpoint).await.unwrap();
    let mut client = PermissionServiceClient::new(channel);
    client
        .check_permission(question("lincoln", "ann", APPROVE))
        .await
        .unwrap();

    let mut holder = database.client().await;
    let lock = holder.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE public.profiles")
        .await
        .unwrap();
    // One that is given up while its statement is still under way, and one that waits.
    let mut hasty = Request::new(now(question("lincoln", "ann", APPROVE)));
    hasty.set_timeout(Duration::from_millis(400));
    client.check_permission(hasty).await.unwrap_err();
    eventually("the call that was given up is logged", async || {
        read().contains("a slow call")
    })
    .await;
    let request = with_parent(now(question("lincoln", "ann", APPROVE)), &sampled());
    let asked = tokio::spawn(async move { client.check_permission(request).await });
    let observer = database.client().await;
    eventually("both statements have waited long enough", async || {
        let waits = "SELECT count(*) = 2 FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ~ 'hallpass.load'
                     AND clock_timestamp() - query_start > '400 ms'";
        observer.query_one(waits, &[]).await.unwrap().get(0)
    })
    .await;
    lock.rollback().await.unwrap();
    asked.await.unwrap().unwrap();
    eventually("the slow call is logged", async || read().contains(TRACE)).await;
    service.kill().await.unwrap();

    let log = read();
    let is_slow = |line: &&str| line.contains("a slow call");
    let lines: Vec<&str> = log.lines().filter(is_slow).collect();
    let [hasty, patient] = lines[..] else {
        panic!("{log}")
    };
    assert_eq!(field(patient, "trace_id"), TRACE);
    assert!(!hasty.contains("trace_id"), "{hasty}");
    for (line, database_ms) in [(hasty, 300), (patient, 400)] {
        assert!(line.contains("WARN"), "{line}");
        let millis = |name: &str| field(line, name).parse::<u64>().unwrap();
        let method = "/hallpass.v1.PermissionService/CheckPermission";
        assert_eq!(field(line, "method"), method);
        assert_eq!(field(line, "statements"), "load");
        assert!(millis("database_ms") >= database_ms, "{line}");
        let parts = [
            "authentication_ms",
            "queue_ms",
            "connection_ms",
            "database_ms",
            "rest_ms",
        ];
        let sum: u64 = parts.into_iter().map(millis).sum();
        let took = millis("took_ms");
        assert!((took.saturating_sub(5)..=took).contains(&sum), "{line}");
        assert!(!line.contains(&id("ann").to_string()), "{line}");
    }
}

/// What a line of the log has behind `name=`.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let found = line
        .split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    found
        .unwrap_or_else(|| panic!("{name}: {line}"))
        .trim_matches('"')
}

/// Takes metrics, from those with its token where it has one, and keeps the last.
#[derive(Clone, Default)]
struct MetricsCollector {
    last: Arc<Mutex<Option<ExportMetricsServiceRequest>>>,
    authorization: Option<&'static str>,
}

impl MetricsCollector {
    fn serve(&self, listener: TcpListener) {
        let service = MetricsServiceServer::new(self.clone());
        let serving = transport::Server::builder().add_service(service);
        drop(tokio::spawn(
            serving.serve_with_incoming(TcpListenerStream::new(listener)),
        ));
    }
}

#[hallpass_client::tonic::async_trait]
impl MetricsService for MetricsCollector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let said = request.metadata().get("authorization");
        if self.authorization.is_some()
            && said.map(|said| said.to_str().unwrap()) != self.authorization
        {
            return Err(Status::unauthenticated("who are you"));
        }
        *self.last.lock().unwrap() = Some(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

/// A collector that is away at first hears what a scrape would.
#[tokio::test]
async fn metrics_are_sent_to_whom_they_are_asked_for() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let server = Server::start(Config {
        metrics_export: Some(Export {
            endpoint: format!("http://{address}"),
            interval: Duration::from_millis(50),
            headers: MetadataMap::new(),
        }),
        ..config(&database.url)
    })
    .await;
    server.check("lincoln", "ann", APPROVE).await;
    let listener = TcpListener::bind(address).await.unwrap();
    let collector = MetricsCollector::default();
    collector.serve(listener);
    eventually("metrics come", async || {
        collector.last.lock().unwrap().is_some()
    })
    .await;
    let sent = collector.last.lock().unwrap().clone().unwrap();
    let resource = sent.resource_metrics[0].resource.clone().unwrap();
    assert!(
        resource
            .attributes
            .iter()
            .any(|attribute| attribute.key == "service.name")
    );
    let metrics = &sent.resource_metrics[0].scope_metrics[0].metrics;
    let scraped = crate::ops::Scrape::of(&server).await;
    let mut names: Vec<&str> = metrics.iter().map(|metric| &*metric.name).collect();
    names.sort_unstable();
    names.retain(|name| !name.starts_with("hallpass_audit_") && !name.contains("sample"));
    for name in &names {
        assert!(
            scraped
                .samples
                .keys()
                .any(|sample| sample.starts_with(name)),
            "{name}"
        );
    }
    assert!(
        names.contains(&"grpc_server_handling_seconds") && names.len() > 25,
        "{names:?}"
    );
    server.stop().await;
}

/// A token in the environment is sent with metrics, as it is with traces.
#[tokio::test]
async fn a_collector_of_metrics_is_told_what_it_wants_to_be_told() {
    let database = filled().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let collector = MetricsCollector {
        authorization: Some("Bearer s3cret"),
        ..MetricsCollector::default()
    };
    collector.serve(listener);
    let directory = temporary_directory();
    let socket = directory.path().join("socket");
    let mut service = Command::new(HALLPASS)
        .args(["serve", "--lame-duck=0ms", "--database-url"])
        .arg(as_role(&database.url, "hallpass_service"))
        .arg(format!("--grpc-listen=unix:{}", socket.display()))
        .args(["--http-listen=none", "--ops-listen=none"])
        .args(["--otlp-metrics-interval=50ms", "--otlp-endpoint", &endpoint])
        .env(
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20s3cret",
        )
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    eventually("metrics are taken", async || {
        collector.last.lock().unwrap().is_some()
    })
    .await;
    service.kill().await.unwrap();
}
