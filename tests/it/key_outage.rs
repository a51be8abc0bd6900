//! What becomes of API keys while the database is away, or does not hand them out.

use std::time::{Duration, Instant};

use hallpass::{
    auth::{api_key::Pepper, keys::Timing},
    limits::Bounds,
    server::Config,
};
use hallpass_client::tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    database::Database,
    keyring::{CHECK, Made, TIMING, call, config_with_keys, key_id, revoke, with_key},
    proxy::{Proxy, Way},
    server::Server,
    sql::run,
};

const UNAVAILABLE: &str = "CREDENTIALS_UNAVAILABLE";

/// Several times what any wait here should take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Short, so that a test sees both ends.
const SHORT: Timing = Timing {
    staleness_bound: Duration::from_millis(300),
    staleness_ceiling: Duration::from_secs(3),
    ..TIMING
};

/// Asks until the answer is another than the last; returns when that one was asked for, and what it is.
async fn while_said(server: &Server, key: &str, expected: &str) -> (Instant, String) {
    let began = Instant::now();
    loop {
        let asked = Instant::now();
        assert!(asked.duration_since(began) < PATIENCE, "still `{expected}`");
        let said = with_key(server, key).await;
        if said != expected {
            return (asked, said);
        }
    }
}

/// A revocation that the service cannot hear of waits for the ceiling at most; one that it can hear of does not.
#[tokio::test]
async fn keys_are_believed_without_the_database_up_to_the_ceiling_and_no_longer() {
    let database = Database::create().await;
    let key = Made::default().make(&database.url).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = Server::start(config_with_keys(&proxy.url, SHORT, Pepper::default())).await;
    assert_eq!(with_key(&server, &key).await, "");

    let before = Instant::now();
    proxy.set(Way::Closed);
    revoke(&database.url, &key).await;
    let (asked, said) = while_said(&server, &key, "").await;
    assert_eq!(said, UNAVAILABLE);
    let believed = asked.duration_since(before);
    // Memory may be as old as two polls when the database goes.
    assert!(
        believed > SHORT.staleness_ceiling - SHORT.staleness_bound,
        "{believed:?}"
    );
    assert!(
        believed < SHORT.staleness_ceiling + SHORT.staleness_bound,
        "{believed:?}"
    );
    // Whoever has no key has none, meanwhile too.
    let made_up = format!("hp_{}_{}", key_id(&key), "0".repeat(64));
    assert_eq!(with_key(&server, &made_up).await, "CREDENTIAL_INVALID");
    proxy.set(Way::Open);
    let (_, said) = while_said(&server, &key, UNAVAILABLE).await;
    assert_eq!(said, "CREDENTIAL_REVOKED");
}

/// A key that fits is no stranger's: an outage does not make its holder one of those who try keys out.
#[tokio::test]
async fn an_outage_is_held_against_no_genuine_key() {
    let database = Database::create().await;
    let key = Made::default().make(&database.url).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let config = config_with_keys(&proxy.url, SHORT, Pepper::default());
    let server = Server::start(Config {
        bounds: Bounds {
            credential_rate_max: 1,
            ..config.bounds.clone()
        },
        ..config
    })
    .await;
    proxy.set(Way::Closed);
    let authorization = format!("Bearer {key}");
    let began = Instant::now();
    while began.elapsed() < 2 * SHORT.staleness_bound {
        let called = call(&server.channel, CHECK, &[&authorization]).await;
        let code = called.unwrap_err().code();
        assert_ne!(code, Code::ResourceExhausted);
    }
}

/// A table whose trigger is off tells of no revocation.
#[tokio::test]
async fn keys_whose_changes_go_unnoticed_are_not_renewed() {
    let database = Database::create().await;
    let client = database.client().await;
    let key = Made::default().make(&database.url).await;
    let config = config_with_keys(&database.url, SHORT, Pepper::default());
    let server = Server::start(config).await;
    assert_eq!(with_key(&server, &key).await, "");
    run(&client, "ALTER TABLE hallpass.api_keys DISABLE TRIGGER ALL").await;
    revoke(&database.url, &key).await;
    let (_, said) = while_said(&server, &key, "").await;
    assert_eq!(said, UNAVAILABLE);
    let enable = "ALTER TABLE hallpass.api_keys ENABLE ALWAYS TRIGGER api_keys_changed;
                  UPDATE hallpass.api_keys SET name = name";
    run(&client, enable).await;
    let (_, said) = while_said(&server, &key, UNAVAILABLE).await;
    assert_eq!(said, "CREDENTIAL_REVOKED");
}

/// As when a router forgets connections: those that are there are silent for ever, new ones work.
#[tokio::test]
async fn a_dead_connection_does_not_hide_a_revocation() {
    let database = Database::create().await;
    let key = Made::default().make(&database.url).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = Server::start(config_with_keys(&proxy.url, TIMING, Pepper::default())).await;
    assert_eq!(with_key(&server, &key).await, "");
    proxy.deafen();
    revoke(&database.url, &key).await;
    let revoked = Instant::now();
    let (asked, said) = while_said(&server, &key, "").await;
    assert_eq!(said, "CREDENTIAL_REVOKED");
    let late = asked.duration_since(revoked);
    assert!(late <= TIMING.staleness_bound, "{late:?}");
}

/// The database is there and does not say whether the key is still good: nothing is taken for granted.
#[tokio::test]
async fn keys_that_cannot_be_read_are_believed_up_to_the_bound_alone() {
    let database = Database::create().await;
    let client = database.client().await;
    let key = Made::default().make(&database.url).await;
    let config = config_with_keys(&database.url, SHORT, Pepper::default());
    let server = Server::start(config).await;
    assert_eq!(with_key(&server, &key).await, "");

    run(
        &client,
        "REVOKE SELECT ON hallpass.api_keys_edition FROM hallpass_service",
    )
    .await;
    revoke(&database.url, &key).await;
    let revoked = Instant::now();
    let (asked, said) = while_said(&server, &key, "").await;
    assert_eq!(said, UNAVAILABLE);
    assert!(asked.duration_since(revoked) <= SHORT.staleness_bound);
    run(
        &client,
        "GRANT SELECT ON hallpass.api_keys_edition TO hallpass_service",
    )
    .await;
    let (_, said) = while_said(&server, &key, UNAVAILABLE).await;
    assert_eq!(said, "CREDENTIAL_REVOKED");
}

/// Nobody is let in, and the service is not ready, before the keys are known.
#[tokio::test]
async fn keys_that_were_never_read_let_nobody_in() {
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "REVOKE SELECT ON hallpass.api_keys FROM hallpass_service",
    )
    .await;
    let key = Made::default().make(&database.url).await;
    let mut server =
        Server::listening(config_with_keys(&database.url, TIMING, Pepper::default())).await;
    assert_eq!(with_key(&server, &key).await, UNAVAILABLE);
    assert_eq!(
        with_key(&server, "hp_malformed").await,
        "CREDENTIAL_INVALID"
    );
    assert_eq!(server.health("").await, ServingStatus::NotServing);
    run(
        &client,
        "GRANT SELECT ON hallpass.api_keys TO hallpass_service",
    )
    .await;
    server.ready().await;
    assert_eq!(with_key(&server, &key).await, "");
}
