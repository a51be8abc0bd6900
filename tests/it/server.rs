//! The real service in the test's process, on port 0 and a test's database; and questions to it through the wire.

use std::{
    fmt,
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hallpass::{
    audit,
    auth::Authenticator,
    config, http,
    limits::Bounds,
    selfcheck::SAMPLE_EVERY,
    server::{self, Config, Connections, Listener, Listeners, ServeError},
    store::DatabaseUrl,
    traces,
};
use hallpass_client::{
    ClientTls,
    tonic::{IntoRequest, Status, transport::Channel},
    v1::{
        CheckPermissionRequest, CheckPermissionResponse, Consistency, Evidence, Source,
        consistency::Requirement, permission_service_client::PermissionServiceClient,
    },
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_postgres::Client;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    database::{as_role, eventually},
    names::id,
};

/// The members that [`fill`] puts into each organization, as (user, role).
pub(crate) const MEMBERS: [(&str, &str); 5] = [
    ("ann", "admin"),
    ("bob", "board_member"),
    ("cam", "committee_lead"),
    ("vic", "volunteer"),
    ("pat", "parent_member"),
];

pub(crate) const ORGANIZATIONS: [&str; 2] = ["lincoln", "franklin"];

/// By default a board member's and an admin's.
pub(crate) const APPROVE: &str = "can_approve_expenses";

/// Asked about where only the service's progress matters: nobody else speaks of it.
const BYSTANDER: (&str, &str) = ("the organization of nobody", "bystander");

/// A running service; it ends with its runtime, or by [`Server::stop`].
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Where it serves HTTP.
    pub(crate) http: SocketAddr,
    /// Where operators look.
    pub(crate) ops: SocketAddr,
    pub(crate) endpoint: String,
    pub(crate) channel: Channel,
    ready: Option<oneshot::Receiver<()>>,
    shutdown: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), ServeError>>,
}

/// An answer, without what protobuf adds.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// `allow GRANTED_BY_ROLE`
    pub(crate) said: String,
    pub(crate) evidence: Evidence,
    pub(crate) response: CheckPermissionResponse,
}

/// As the service has it by default, but for the waits that a test should not have; it logs in as it should, to the
/// database that the superuser's URL names.
pub(crate) fn config(url: &str) -> Config {
    let database: DatabaseUrl = as_role(url, "hallpass_service").parse().unwrap();
    Config {
        feed_database: database.clone(),
        database,
        admin_database: None,
        staleness_bound: Duration::from_secs(2),
        staleness_ceiling: Duration::from_secs(300),
        authenticator: Arc::new(Authenticator::open()),
        tls: None,
        http_tls: None,
        connections: connections(),
        cache_capacity: 100_000,
        warm_up_max: Duration::from_secs(10),
        matrix_refresh_interval: Duration::from_secs(30),
        inspection_interval: config::INSPECTION_INTERVAL,
        audit_retention_days: None,
        maintenance_interval: config::MAINTENANCE_INTERVAL,
        sample_interval: Duration::from_millis(100),
        self_check_every: SAMPLE_EVERY,
        lame_duck: Duration::ZERO,
        drain_max: config::DRAIN_MAX,
        audit: audit::Limits::default(),
        bounds: bounds(),
        changed_rates: None,
        http: http::Settings {
            environment: "test".to_owned(),
            cors_origins: Vec::new(),
        },
        metrics_export: None,
        traces: traces::Settings {
            otlp_endpoint: None,
            sample_ratio: 0.0,
            slow_request: Some(Duration::from_millis(500)),
        },
    }
}

/// No rate: a test asks as fast as it can.
pub(crate) fn bounds() -> Bounds {
    Bounds {
        requests_in_flight_max: 5_000,
        caller_in_flight_max: 0,
        address_rate_max: 0,
        credential_rate_max: 0,
        caller_rate_max: 0,
        caller_list_rate_max: 0,
        trusted_proxies: Vec::new(),
        request_deadline_max: Some(Duration::from_secs(10)),
        stream_age_max: None,
    }
}

/// As the service has them by default.
pub(crate) fn connections() -> Connections {
    Connections::new(10_000, 1_000, Some(Duration::from_secs(3_600)))
}

impl Server {
    /// A service that listens; it need not be ready.
    pub(crate) async fn listening(config: Config) -> Self {
        Self::listening_for(config, async |address| {
            let endpoint = format!("http://{address}");
            let channel = hallpass_client::connect(&endpoint).await;
            (endpoint, channel.unwrap())
        })
        .await
    }

    /// As [`Server::listening`], with TLS.
    pub(crate) async fn listening_tls(config: Config, tls: ClientTls) -> Self {
        Self::listening_for(config, async |address| {
            let endpoint = format!("https://{address}");
            let channel = hallpass_client::connect_tls(&endpoint, tls).await;
            (endpoint, channel.unwrap())
        })
        .await
    }

    /// `connect` makes the endpoint and a channel to it.
    async fn listening_for(
        config: Config,
        connect: impl AsyncFnOnce(SocketAddr) -> (String, Channel),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let http_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = http_listener.local_addr().unwrap();
        let ops_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ops = ops_listener.local_addr().unwrap();
        let (shutdown, stopped) = oneshot::channel();
        let (ready, is_ready) = oneshot::channel();
        let running = tokio::spawn(server::run(
            config,
            Listeners {
                grpc: Listener::Tcp(listener),
                http: Some(Listener::Tcp(http_listener)),
                ops: Some(Listener::Tcp(ops_listener)),
            },
            // A test that has failed waits no more.
            move || ready.send(()).unwrap_or(()),
            async { drop(stopped.await) },
        ));
        let (endpoint, channel) = connect(address).await;
        Self {
            address,
            http,
            ops,
            endpoint,
            channel,
            ready: Some(is_ready),
            shutdown: Some(shutdown),
            running,
        }
    }

    /// A service that is ready.
    pub(crate) async fn start(config: Config) -> Self {
        let mut server = Self::listening(config).await;
        server.ready().await;
        server
    }

    /// Returns when the service has called back, or says why it will not.
    pub(crate) async fn ready(&mut self) {
        let ready = self.ready.take().unwrap();
        tokio::select! {
            ready = ready => ready.unwrap(),
            ended = &mut self.running => panic!("ended before it was ready: {ended:?}"),
        }
    }

    /// Tells the service to stop, as SIGTERM does.
    pub(crate) fn begin_stop(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    /// How the service ended.
    pub(crate) async fn ended(self) -> Result<(), ServeError> {
        self.running.await.unwrap()
    }

    pub(crate) async fn stop(mut self) {
        self.begin_stop();
        self.ended().await.unwrap();
    }

    pub(crate) fn client(&self) -> PermissionServiceClient<Channel> {
        PermissionServiceClient::new(self.channel.clone())
    }

    /// Asks whether a user may, both named as in [`fill`].
    pub(crate) async fn check(&self, organization: &str, user: &str, permission: &str) -> Answer {
        self.try_check(question(organization, user, permission))
            .await
            .unwrap()
    }

    /// As [`Server::check`], from a snapshot that begins after the call.
    pub(crate) async fn check_now(
        &self,
        organization: &str,
        user: &str,
        permission: &str,
    ) -> Answer {
        self.try_check(now(question(organization, user, permission)))
            .await
            .unwrap()
    }

    pub(crate) async fn try_check(
        &self,
        question: impl IntoRequest<CheckPermissionRequest>,
    ) -> Result<Answer, Status> {
        let response = self.client().check_permission(question).await?;
        Ok(response.into_inner().into())
    }

    /// The health of a service; the empty name is the whole.
    pub(crate) async fn health(&self, service: &str) -> ServingStatus {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let response = HealthClient::new(self.channel.clone()).check(request).await;
        response.unwrap().into_inner().status()
    }

    pub(crate) async fn until_health(&self, status: ServingStatus) {
        eventually(&format!("health is {status:?}"), async || {
            self.health("").await == status
        })
        .await;
    }

    /// Waits until the cache has applied everything that is committed now: until an answer leans on a poll of the log
    /// that was sent after the call. Its position would not tell, for it may be that of the answer's own load.
    pub(crate) async fn catch_up(&self, database: &Client) {
        let called = Instant::now();
        // The poll that is due may be long in coming; a notification hastens it.
        let notify = "NOTIFY hallpass_log";
        database.batch_execute(notify).await.unwrap();
        eventually("the cache has caught up", async || {
            let asked = called.elapsed();
            let question = question(BYSTANDER.0, BYSTANDER.1, APPROVE);
            let answer = self.try_check(question).await;
            answer.is_ok_and(|answer| answer.is_cached() && answer.staleness() <= asked)
        })
        .await;
    }
}

pub(crate) fn question(organization: &str, user: &str, permission: &str) -> CheckPermissionRequest {
    CheckPermissionRequest {
        organization_id: id(organization).to_string(),
        user_id: id(user).to_string(),
        permission: permission.to_owned(),
        ..CheckPermissionRequest::default()
    }
}

/// The question, to be answered from a snapshot that begins after the call.
pub(crate) fn now(question: CheckPermissionRequest) -> CheckPermissionRequest {
    CheckPermissionRequest {
        consistency: Some(Consistency {
            requirement: Some(Requirement::FullyConsistent(true)),
        }),
        ..question
    }
}

impl From<CheckPermissionResponse> for Answer {
    fn from(response: CheckPermissionResponse) -> Self {
        let reason = response.reason().as_str_name();
        let reason = reason.trim_start_matches("REASON_");
        let decision = if response.allowed { "allow" } else { "deny" };
        Self {
            said: format!("{decision} {reason}"),
            evidence: response.evidence.clone().unwrap(),
            response,
        }
    }
}

impl Answer {
    pub(crate) fn is_cached(&self) -> bool {
        self.evidence.source() == Source::Cache
    }

    /// The number of the answer's position.
    pub(crate) fn seq(&self) -> i64 {
        seq(&self.evidence.position)
    }

    pub(crate) fn staleness(&self) -> Duration {
        self.evidence.staleness.unwrap().try_into().unwrap()
    }
}

/// The number of a position, `812-5f0c9ae1`.
pub(crate) fn seq(position: &str) -> i64 {
    let (seq, uid) = position.split_once('-').unwrap();
    assert!(uid == "0" || uid.len() == 8, "{position}");
    seq.parse().unwrap()
}

/// The number of the log's newest entry.
pub(crate) async fn head(database: &Client) -> i64 {
    let row = database.query_one("SELECT hallpass.head()", &[]).await;
    seq(row.unwrap().get(0))
}

/// Two organizations with the same five members, and the catalog as it is migrated.
pub(crate) async fn fill(database: &Client) {
    for organization in ORGANIZATIONS {
        let insert = "INSERT INTO public.organizations (id, name) VALUES ($1, $2)";
        database
            .execute(insert, &[&id(organization), &organization])
            .await
            .unwrap();
        for (user, role) in MEMBERS {
            set_role(database, organization, user, role).await;
        }
    }
}

/// Makes the user a member with this role, by one statement.
pub(crate) async fn set_role(database: &Client, organization: &str, user: &str, role: &str) {
    let upsert = "
        INSERT INTO public.profiles (org_id, user_id, role) VALUES ($1, $2, $3)
        ON CONFLICT (org_id, user_id) DO UPDATE SET role = EXCLUDED.role";
    database
        .execute(upsert, &[&id(organization), &id(user), &role])
        .await
        .unwrap();
}

/// Runs SQL in which `:name` stands for an id.
pub(crate) async fn run_sql(database: &Client, sql: &str) {
    let resolved = resolve(sql);
    let done = database.batch_execute(&resolved).await;
    done.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// Replaces `:name` by the id, as an SQL literal.
pub(crate) fn resolve(sql: &str) -> String {
    let users = MEMBERS.map(|(user, _)| user).into_iter();
    let names = users.chain(ORGANIZATIONS).chain(["eve"]);
    names.fold(sql.to_owned(), |sql, name| {
        sql.replace(&format!(":{name}"), &format!("'{}'::uuid", id(name)))
    })
}

/// Fails a test that waits for what does not come.
pub(crate) async fn within<T>(what: &str, limit: Duration, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| panic!("not within {limit:?}: {what}"))
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = if self.is_cached() {
            "cache"
        } else {
            "database"
        };
        write!(
            f,
            "{} from the {source} at {}",
            self.said, self.evidence.position
        )
    }
}
