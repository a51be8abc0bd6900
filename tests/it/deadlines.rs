//! A database that does not answer: callers leave when they said they would, and nobody else pays for it.

use std::time::{Duration, Instant};

use hallpass::limits::Bounds;
use hallpass_client::tonic::{Code, IntoRequest, Status, Streaming};
use http::{HeaderMap, Request};
use tokio::net::TcpStream;
use tokio_postgres::Client;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_types::StatusExt;

use crate::{
    database::{Database, eventually},
    limits::assert_is_decent,
    server::{APPROVE, Server, bounds, config, fill, now, question, set_role, within},
};

const DEADLINE: Duration = Duration::from_millis(50);

/// A deadline and what a busy machine adds.
const DEADLINE_MAX: Duration = Duration::from_secs(2);

const PROMPT: Duration = Duration::from_secs(4);

/// The refresh in the background is nobody's question.
pub(crate) const WAITING: &str = "
SELECT count(*)::integer FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'hallpass' AND wait_event_type = 'Lock'
  AND query NOT LIKE '%refresh%'";

/// A lock that keeps everybody from reading a table, until it is released or dropped.
pub(crate) struct TableLock {
    /// Its connection ends with it, and the lock with the connection.
    _holder: Client,
    observer: Client,
}

impl TableLock {
    pub(crate) async fn take(database: &Database, table: &str) -> Self {
        let holder = database.client().await;
        let lock = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        holder.batch_execute(&lock).await.unwrap();
        Self {
            _holder: holder,
            observer: database.client().await,
        }
    }

    pub(crate) fn release(self) {}

    pub(crate) async fn until_waiting(&self, statements: i32) {
        eventually("statements wait for the lock", async || {
            let row = self.observer.query_one(WAITING, &[]).await;
            row.unwrap().get::<_, i32>(0) >= statements
        })
        .await;
    }
}

#[tokio::test]
async fn a_caller_s_deadline_is_kept_and_costs_nobody_else() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let lock = TableLock::take(&database, "public.profiles").await;
    for explain in [false, true] {
        // The matrix could answer other questions: it is not locked.
        let mut asked = now(question("lincoln", "stranger", APPROVE));
        asked.explain = explain;
        let mut request = asked.into_request();
        request.set_timeout(DEADLINE);
        let began = Instant::now();
        let status = server.try_check(request).await.unwrap_err();
        assert!(
            [Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()),
            "{status:?}"
        );
        // The service is a moment ahead of the caller.
        let least = DEADLINE - Duration::from_millis(2);
        assert!((least..DEADLINE_MAX).contains(&began.elapsed()));
    }
    // What is cached needs no database.
    for _ in 0..100 {
        let answer = server.check("lincoln", "bob", APPROVE).await;
        assert!(answer.is_cached(), "{answer}");
    }
    lock.release();
    let asked = server.check_now("lincoln", "stranger", APPROVE);
    let answer = within("an answer", PROMPT, asked);
    assert_eq!(answer.await.said, "deny NOT_A_MEMBER");
    server.stop().await;
}

/// More callers than the pool has connections, for one user and for many; every second one leaves.
#[tokio::test]
async fn callers_who_leave_cancel_nothing_for_those_who_stay() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    set_role(&client, "lincoln", "eve", "board_member").await;
    let lock = TableLock::take(&database, "public.profiles").await;
    let callers: Vec<_> = (0..40)
        .map(|index| {
            let user = match index % 4 {
                0 | 1 => "eve".to_owned(),
                _ => format!("stranger {}", index / 4),
            };
            let (mut client, asked) = (server.client(), question("lincoln", &user, APPROVE));
            tokio::spawn(async move { client.check_permission(asked).await })
        })
        .collect();
    lock.until_waiting(1).await;
    for leaver in callers.iter().step_by(2) {
        leaver.abort();
    }
    // A round trip: the service has heard of them.
    server.check("lincoln", "bob", APPROVE).await;
    lock.release();
    for (index, caller) in callers.into_iter().enumerate() {
        match within("an answer", PROMPT, caller).await {
            Ok(answer) => assert_eq!(answer.unwrap().into_inner().allowed, index % 4 == 1),
            Err(cancelled) => assert!(cancelled.is_cancelled() && index % 2 == 0),
        }
    }
    let answer = server.check("lincoln", "eve", APPROVE).await;
    assert!(answer.is_cached() && answer.response.allowed, "{answer}");
    server.stop().await;
}

/// The headers of the answer to a call of which only the headers were sent, on a connection of its own.
async fn headers_alone(server: &Server, path: &str, headers: &[(&str, &str)]) -> HeaderMap {
    let address = server.endpoint.trim_start_matches("http://");
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let uri = format!("{}{path}", server.endpoint);
    let mut request = Request::post(uri).header("content-type", "application/grpc");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (answer, _body) = client
        .send_request(request.body(()).unwrap(), false)
        .unwrap();
    let answer = within("an answer", PROMPT, answer).await.unwrap();
    answer.headers().clone()
}

/// As [`config`], with this deadline and age.
fn ending(url: &str, end: Duration) -> hallpass::server::Config {
    hallpass::server::Config {
        bounds: Bounds {
            request_deadline_max: Some(end),
            stream_age_max: Some(end),
            ..bounds()
        },
        ..config(url)
    }
}

#[tokio::test]
async fn a_call_has_a_deadline_where_its_caller_gives_none_or_a_later_one() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(ending(&database.url, DEADLINE)).await;
    let lock = TableLock::take(&database, "public.profiles").await;
    for asked in [None, Some(Duration::from_secs(3_600))] {
        let mut request = now(question("lincoln", "bob", APPROVE)).into_request();
        if let Some(deadline) = asked {
            request.set_timeout(deadline);
        }
        let began = Instant::now();
        let status = server.try_check(request).await.unwrap_err();
        assert_eq!(
            status.code(),
            Code::DeadlineExceeded,
            "{asked:?}: {status:?}"
        );
        assert_is_decent(&status);
        assert!((DEADLINE..DEADLINE_MAX).contains(&began.elapsed()));
    }
    lock.release();
    server.stop().await;
}

#[tokio::test]
async fn a_request_that_never_arrives_whole_is_ended_by_its_deadline() {
    let database = Database::create().await;
    let server = Server::start(ending(&database.url, DEADLINE)).await;
    let patient = Server::start(config(&database.url)).await;
    let cases: [(&Server, &[(&str, &str)]); 4] = [
        (&server, &[]),
        (&server, &[("grpc-timeout", "1H")]),
        (&server, &[("grpc-timeout", "soon")]),
        // The caller's own, by which tonic would say CANCELLED.
        (&patient, &[("grpc-timeout", "50m")]),
    ];
    // A stream that watches has a request that must arrive as well.
    for path in [
        "/hallpass.v1.PermissionService/CheckPermission",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    ] {
        for (server, headers) in cases {
            let answer = headers_alone(server, path, headers).await;
            let status = Status::from_header_map(&answer).unwrap();
            assert_eq!(
                status.code(),
                Code::DeadlineExceeded,
                "{path} {headers:?}: {status:?}"
            );
            assert_is_decent(&status);
        }
    }
    server.stop().await;
    patient.stop().await;
}

/// Reads a stream to its end.
async fn end_of<T>(mut stream: Streaming<T>) -> Status {
    let reads = async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("ended without a status"),
                Err(status) => return status,
            }
        }
    };
    within("the stream's end", PROMPT, reads).await
}

#[tokio::test]
async fn a_stream_has_no_deadline_but_an_age() {
    let database = Database::create().await;
    let age = Duration::from_millis(300);
    let server = Server::start(ending(&database.url, age)).await;
    let began = Instant::now();
    let mut health = HealthClient::new(server.channel.clone());
    let watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    // Nothing is ever asked on it.
    let silent = reflection
        .server_reflection_info(tokio_stream::pending())
        .await;
    for status in [
        end_of(watch.into_inner()).await,
        end_of(silent.unwrap().into_inner()).await,
    ] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(
            status.get_details_error_info().unwrap().reason,
            "STREAM_TOO_OLD"
        );
        assert_is_decent(&status);
    }
    assert!(began.elapsed() >= age);
    // The connection lives on.
    server.check("lincoln", "bob", APPROVE).await;
    server.stop().await;
}
