//! The service begins before its database does and ends without cutting anybody off.

use std::time::{Duration, Instant};

use hallpass::{
    server::{Config, ServeError},
    store::migrations::migrate,
};
use hallpass_client::tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_types::StatusExt;

use crate::{
    database::{Database, eventually},
    deadlines::TableLock,
    ops::Scrape,
    proxy::{Proxy, Way},
    server::{APPROVE, Server, config, fill, question, within},
    sql::run,
    support,
};

/// What a stop may take when nobody holds it up, on a busy machine.
const PROMPT: Duration = Duration::from_secs(4);

pub(crate) fn assert_unavailable(status: &Status) {
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let details = status.get_error_details();
    let delay = details.retry_info().unwrap().retry_delay.unwrap();
    assert!(delay > Duration::ZERO);
    let info = details.error_info().unwrap();
    assert_eq!(
        (&*info.domain, &*info.reason),
        ("hallpass", "DATABASE_UNAVAILABLE")
    );
    assert_eq!(status.message(), "the database cannot be asked");
}

/// Not serving, and no answer either.
async fn assert_waits(server: &Server) {
    for _ in 0..3 {
        assert_eq!(server.health("").await, ServingStatus::NotServing);
        let asked = question("lincoln", "bob", APPROVE);
        assert_unavailable(&server.try_check(asked).await.unwrap_err());
    }
}

#[tokio::test]
async fn a_database_that_is_away_at_the_start_is_waited_for() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let proxy = Proxy::to(&database.url, Way::Closed);
    let mut server = Server::listening(config(&proxy.url)).await;
    assert_waits(&server).await;
    proxy.set(Way::Open);
    server.ready().await;
    assert_eq!(server.health("").await, ServingStatus::Serving);
    let answer = server.check("lincoln", "bob", APPROVE).await;
    assert_eq!(answer.said, "allow GRANTED_BY_ROLE");
    assert!(answer.is_cached());
    server.stop().await;
}

#[tokio::test]
async fn a_schema_that_is_behind_is_waited_for() {
    let database = Database::empty().await;
    let url = database.url;
    let mut server = Server::listening(config(&url)).await;
    assert_waits(&server).await;
    migrate(&url.parse().unwrap(), |_| {}).await.unwrap();
    server.ready().await;
    assert_eq!(server.health("").await, ServingStatus::Serving);
    let answer = server.check("lincoln", "bob", APPROVE).await;
    assert_eq!(answer.said, "deny NOT_A_MEMBER");
    server.stop().await;
}

/// The alert of triggers that are disabled wants a database that is sampled, and a log that is not believed.
#[tokio::test]
async fn a_database_whose_schema_is_behind_is_not_sampled() {
    let behind = Database::create().await;
    let newest = "DELETE FROM hallpass.schema_migrations
        WHERE version = (SELECT max(version) FROM hallpass.schema_migrations)";
    run(&behind.client().await, newest).await;
    let waiting = Server::listening(config(&behind.url)).await;
    let current = Database::create().await;
    let server = Server::start(config(&current.url)).await;
    let age = async |server| {
        let scrape = Scrape::of(server).await;
        scrape.samples["hallpass_sampled_seconds"]
    };
    // It began later, and has had time enough.
    eventually("a sample", async || age(&server).await.is_finite()).await;
    assert!(age(&waiting).await.is_infinite());
    server.stop().await;
    waiting.stop().await;
}

#[tokio::test]
async fn what_waiting_does_not_mend_ends_the_service() {
    let newer = "INSERT INTO hallpass.schema_migrations (version, name, checksum) VALUES (1000, 'later', '')";
    let changed = "UPDATE hallpass.schema_migrations SET checksum = 'x' WHERE version = 2";
    let cases = [
        (newer, "", "newer than this program knows"),
        (changed, "", "0002_log"),
        ("", "/no_such_database", "does not exist"),
        ("", "no_such_role", "does not exist"),
    ];
    for (sql, change, expected) in cases {
        let database = Database::create().await;
        database.client().await.batch_execute(sql).await.unwrap();
        let url = match change {
            "" => database.url.clone(),
            "/no_such_database" => support::cluster().url_for("no_such_database"),
            role => database
                .url
                .replace("user=hallpass", &format!("user={role}")),
        };
        let server = Server::listening(config(&url)).await;
        let error = within("the service ends", PROMPT, server.ended()).await;
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[tokio::test]
async fn a_service_that_still_waits_stops_at_once() {
    let database = Database::create().await;
    let proxy = Proxy::to(&database.url, Way::Closed);
    let mut server = Server::listening(config(&proxy.url)).await;
    assert_waits(&server).await;
    server.begin_stop();
    let ended: Result<(), ServeError> = within("it stops", PROMPT, server.ended()).await;
    ended.unwrap();
}

#[tokio::test]
async fn a_stop_is_announced_and_calls_under_way_are_answered() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let mut config = config(&database.url);
    config.lame_duck = Duration::from_millis(500);
    let mut server = Server::start(config).await;
    let mut statuses = watch(&server).await;
    assert_eq!(statuses().await, Some(ServingStatus::Serving));

    let lock = TableLock::take(&database, "public.profiles").await;
    let under_way = {
        let client = server.client();
        let mut asked = question("lincoln", "bob", APPROVE);
        asked.explain = true;
        tokio::spawn(async move { client.clone().check_permission(asked).await })
    };
    lock.until_waiting(1).await;
    server.begin_stop();
    assert_eq!(statuses().await, Some(ServingStatus::NotServing));
    // Lame: callers who have not noticed are answered.
    let answer = server.check("lincoln", "ann", APPROVE).await;
    assert!(answer.is_cached());
    assert_eq!(
        statuses().await,
        None,
        "a stream of health ends with the service"
    );
    lock.release();
    let answer = under_way.await.unwrap().unwrap().into_inner();
    assert!(answer.allowed);
    let endpoint = server.endpoint.clone();
    within("it stops", PROMPT, server.ended()).await.unwrap();
    hallpass_client::connect(&endpoint).await.unwrap_err();
}

/// The next status of the service's health, each time; `None` when the stream has ended.
async fn watch(server: &Server) -> impl AsyncFnMut() -> Option<ServingStatus> + use<> {
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let stream = HealthClient::new(server.channel.clone())
        .watch(request)
        .await;
    let mut stream = stream.unwrap().into_inner();
    async move || {
        let next = within("a status of health", PROMPT, stream.message()).await;
        // A stream that is ended from above ends in an error or without.
        next.ok().flatten().map(|response| response.status())
    }
}

#[tokio::test]
async fn a_stream_that_its_caller_leaves_open_does_not_hold_up_the_stop_for_ever() {
    let database = Database::create().await;
    let drain_max = Duration::from_millis(500);
    let mut server = Server::start(Config {
        drain_max,
        ..config(&database.url)
    })
    .await;
    let open = tokio_stream::pending();
    let mut client = ServerReflectionClient::new(server.channel.clone());
    let stream = client.server_reflection_info(open).await.unwrap();
    let began = Instant::now();
    server.begin_stop();
    within("it stops", PROMPT, server.ended()).await.unwrap();
    assert!(began.elapsed() >= drain_max, "the stream was not open");
    drop(stream);
}
