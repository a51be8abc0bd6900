//! The database goes away, is cut off, or throws everybody out, while answers are asked for all the time.

use std::time::{Duration, Instant};

use hallpass::{embedded::PrivatePostgres, store::migrations::migrate};
use hallpass_client::{
    tonic::Code,
    v1::{
        BatchCheckPermissionsItem, BatchCheckPermissionsRequest,
        batch_check_permissions_result::Result as ItemResult,
    },
};
use tokio::task::spawn_blocking;
use tokio_postgres::{Client, NoTls};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    database::{Database, as_role, eventually},
    names::id,
    proxy::{Proxy, Way},
    roles::make_roles,
    server::{APPROVE, Server, config, fill, head, now, question, set_role},
    start_stop::assert_unavailable,
    support::{options, temporary_directory},
};

/// The service's, in [`config`].
const STALENESS_BOUND: Duration = Duration::from_secs(2);

/// The service's limits on a connection of the pool and on an answer, and what a busy machine adds.
const SILENCE_MAX: Duration = Duration::from_secs(12);

/// Asks for what is cached until there is no answer any more: each is the last known, and no staler than the bound.
async fn assert_known_until_the_bound(server: &Server, said: &str) {
    let began = Instant::now();
    let mut answers = 0;
    loop {
        match server.try_check(question("lincoln", "bob", APPROVE)).await {
            Ok(answer) => {
                assert!(answer.is_cached(), "{answer}");
                assert_eq!(answer.said, said);
                assert!(answer.staleness() <= STALENESS_BOUND, "{answer}");
                answers += 1;
            }
            Err(status) => {
                assert_unavailable(&status);
                break;
            }
        }
    }
    assert!(answers > 0);
    assert!(began.elapsed() < STALENESS_BOUND + SILENCE_MAX);
}

async fn until_cached(server: &Server, said: &str) {
    eventually("the service has recovered", async || {
        let answer = server.try_check(question("lincoln", "bob", APPROVE)).await;
        answer.is_ok_and(|answer| answer.is_cached() && answer.said == said)
    })
    .await;
}

/// A postgres that is stopped and started again, as an operator does it.
#[tokio::test]
async fn a_database_that_stops_leaves_answers_up_to_the_bound_and_no_longer() {
    let directory = temporary_directory();
    let start = async || {
        let options = options(&directory.path().join("data"));
        spawn_blocking(move || PrivatePostgres::start(&options).unwrap())
            .await
            .unwrap()
    };
    let stop = async |postgres: PrivatePostgres| {
        spawn_blocking(move || postgres.stop().unwrap())
            .await
            .unwrap();
    };
    let connect = async |postgres: &PrivatePostgres| -> Client {
        let (client, connection) = tokio_postgres::connect(&postgres.url(), NoTls)
            .await
            .unwrap();
        tokio::spawn(connection);
        client
    };
    let postgres = start().await;
    let url = postgres.url();
    make_roles(&url, None).await.unwrap();
    let migrator = as_role(&url, "hallpass_migrator");
    migrate(&migrator.parse().unwrap(), |_| {}).await.unwrap();
    fill(&connect(&postgres).await).await;
    let server = Server::start(config(&url)).await;
    until_cached(&server, "allow GRANTED_BY_ROLE").await;

    stop(postgres).await;
    // What is cached is answered, alone and in a batch; what is not cannot be.
    let answered = batch(&server, &["bob", "stranger"]).await.unwrap();
    assert_eq!(answered, [Ok(true), Err(Code::Unavailable)]);
    let miss = server
        .try_check(question("lincoln", "stranger", APPROVE))
        .await;
    assert_unavailable(&miss.unwrap_err());
    let miss = server
        .try_check(now(question("lincoln", "bob", APPROVE)))
        .await;
    assert_unavailable(&miss.unwrap_err());
    assert_known_until_the_bound(&server, "allow GRANTED_BY_ROLE").await;
    server.until_health(ServingStatus::NotServing).await;
    assert_unavailable(&batch(&server, &["bob", "ann"]).await.unwrap_err());

    let postgres = start().await;
    assert_eq!(postgres.url(), url);
    set_role(&connect(&postgres).await, "lincoln", "bob", "volunteer").await;
    server.until_health(ServingStatus::Serving).await;
    until_cached(&server, "deny ROLE_TOO_LOW").await;
    server.stop().await;
    stop(postgres).await;
}

/// Whether each user of lincoln may approve.
async fn batch(
    server: &Server,
    users: &[&str],
) -> Result<Vec<Result<bool, Code>>, hallpass_client::tonic::Status> {
    let items = (users.iter())
        .map(|user| BatchCheckPermissionsItem {
            organization_id: id("lincoln").to_string(),
            user_id: id(user).to_string(),
            permission: APPROVE.to_owned(),
        })
        .collect();
    let request = BatchCheckPermissionsRequest {
        items,
        consistency: None,
    };
    let response = server.client().batch_check_permissions(request).await?;
    let results = response.into_inner().results.into_iter();
    Ok(results
        .map(|result| match result.result.unwrap() {
            ItemResult::Answer(answer) => Ok(answer.allowed),
            ItemResult::Error(error) => Err(Code::from_i32(error.code)),
        })
        .collect())
}

/// Changes happen meanwhile, and the service cannot know: past the bound it must not answer from memory.
#[tokio::test]
async fn a_service_that_is_cut_off_gives_no_answer_older_than_the_bound() {
    // A network that rejects, and one that swallows.
    tokio::join!(cut_off(Way::Closed), cut_off(Way::Silent));
}

async fn cut_off(way: Way) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = Server::start(config(&proxy.url)).await;
    until_cached(&server, "allow GRANTED_BY_ROLE").await;

    proxy.set(way);
    set_role(&client, "lincoln", "bob", "volunteer").await;
    assert_known_until_the_bound(&server, "allow GRANTED_BY_ROLE").await;
    server.until_health(ServingStatus::NotServing).await;

    proxy.set(Way::Open);
    server.until_health(ServingStatus::Serving).await;
    until_cached(&server, "deny ROLE_TOO_LOW").await;
    server.stop().await;
}

/// As an administrator, a failing proxy or a restart does.
#[tokio::test]
async fn connections_that_are_terminated_are_made_again() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let terminate = "
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'hallpass'";
    for round in 0..6 {
        let (role, said) = if round % 2 == 0 {
            ("volunteer", "deny ROLE_TOO_LOW")
        } else {
            ("board_member", "allow GRANTED_BY_ROLE")
        };
        let ended: i64 = client.query_one(terminate, &[]).await.unwrap().get(0);
        assert!(ended > 0);
        set_role(&client, "lincoln", "bob", role).await;
        let change = head(&client).await;
        eventually("the change is seen", async || {
            match server.try_check(question("lincoln", "bob", APPROVE)).await {
                // No answer that claims to have the change is without it.
                Ok(answer) => {
                    assert!(answer.seq() < change || answer.said == said, "{answer}");
                    answer.said == said
                }
                Err(status) => {
                    assert_unavailable(&status);
                    false
                }
            }
        })
        .await;
        let again = eventually_now(&server).await;
        assert_eq!(again, said);
        server.catch_up(&client).await;
        until_cached(&server, said).await;
        assert_eq!(server.health("").await, ServingStatus::Serving);
    }
    server.stop().await;
}

/// The fully consistent answer, once there is one.
async fn eventually_now(server: &Server) -> String {
    let mut said = String::new();
    eventually("a fully consistent answer", async || {
        match server
            .try_check(now(question("lincoln", "bob", APPROVE)))
            .await
        {
            Ok(answer) => said = answer.said,
            Err(status) => assert_unavailable(&status),
        }
        !said.is_empty()
    })
    .await;
    said
}
