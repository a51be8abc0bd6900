//! What becomes of API keys while the database is away, or does not hand them out.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hallpass::{
    auth::{api_key::Pepper, keys::Timing},
    limits::Bounds,
    server::Config,
};
use hallpass_client::v1::{CheckPermissionRequest, Consistency, consistency::Requirement};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    database::{Database, eventually},
    keyring::{Made, TIMING, client_with, config_with_keys, key_id, revoke, with_key},
    proxy::{Proxy, Way},
    server::{APPROVE, Server, bounds, fill, question},
    sql::run,
    web::Web,
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

/// Asks until the answer is another; returns when the last one that was not was asked for, and what it is then.
async fn while_said(server: &Server, key: &str, expected: &str) -> (Instant, String) {
    let began = Instant::now();
    let mut last = began;
    loop {
        let asked = Instant::now();
        assert!(asked.duration_since(began) < PATIENCE, "still `{expected}`");
        let said = with_key(server, key).await;
        if said != expected {
            return (last, said);
        }
        last = asked;
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

/// What a scrape with this key comes to: `200 `, or the status and why.
async fn scrape(server: &Server, key: &str) -> String {
    let web = Web::at(server.ops).with("authorization", format!("Bearer {key}"));
    web.get("/metrics").await.failed()
}

/// Metrics are there for an outage. Nobody is let in for them who was not let in before it, and nobody for anything else.
#[tokio::test]
async fn metrics_are_told_to_keys_that_were_good_for_as_long_as_the_database_is_away() {
    let database = Database::create().await;
    let make = async |made: Made| made.make(&database.url).await;
    let expiring = Made {
        valid_for: Some(Duration::from_secs(6)),
        ..Made::default()
    };
    let of_checks = Made {
        scopes: vec!["check"],
        ..Made::default()
    };
    let (good, expiring, of_checks) = (
        make(Made::default()).await,
        make(expiring).await,
        make(of_checks).await,
    );
    let revoked = make(Made::default()).await;
    revoke(&database.url, &revoked).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let timing = Timing {
        staleness_ceiling: Duration::from_secs(1),
        ..SHORT
    };
    let server = Server::start(config_with_keys(&proxy.url, timing, Pepper::default())).await;
    assert_eq!(scrape(&server, &expiring).await, "200 ");

    proxy.set(Way::Closed);
    let (_, said) = while_said(&server, &good, "").await;
    assert_eq!(said, UNAVAILABLE);
    let made_up = format!("hp_{}_{}", key_id(&good), "0".repeat(64));
    for (key, expected) in [
        (&good, "200 "),
        (&of_checks, "403 SCOPE_MISSING"),
        (&revoked, "401 CREDENTIAL_REVOKED"),
        (&made_up, "401 CREDENTIAL_INVALID"),
    ] {
        assert_eq!(scrape(&server, key).await, expected);
    }
    assert_eq!(with_key(&server, &good).await, UNAVAILABLE);
    eventually("the key has expired", async || {
        scrape(&server, &expiring).await == "401 CREDENTIAL_EXPIRED"
    })
    .await;
    assert_eq!(scrape(&server, &good).await, "200 ");
    // It can be heard of again as soon as the database is back.
    revoke(&database.url, &good).await;
    assert_eq!(scrape(&server, &good).await, "200 ");
    proxy.set(Way::Open);
    eventually("the revocation is heard of", async || {
        scrape(&server, &good).await == "401 CREDENTIAL_REVOKED"
    })
    .await;
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

/// Nobody's calls are counted who has a key, though memory is too old to be believed by itself.
#[tokio::test]
async fn an_outage_costs_nobody_with_a_key_a_call() {
    const CALLS: usize = 500;
    let database = Database::create().await;
    fill(&database.client().await).await;
    let key = Made::default().make(&database.url).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let timing = Timing {
        staleness_bound: SHORT.staleness_bound,
        ..TIMING
    };
    let config = Config {
        staleness_bound: SHORT.staleness_bound,
        bounds: Bounds {
            // As the service has it by default.
            credential_rate_max: 100,
            ..bounds()
        },
        ..config_with_keys(&proxy.url, timing, Pepper::default())
    };
    let server = Server::start(config).await;
    let ask = async |consistency| {
        let question = CheckPermissionRequest {
            consistency,
            ..question("lincoln", "bob", APPROVE)
        };
        client_with(&server, &key).check_permission(question).await
    };
    ask(None).await.unwrap();
    proxy.set(Way::Closed);
    eventually("the outage is noticed", async || ask(None).await.is_err()).await;
    let stale = Consistency {
        requirement: Some(Requirement::MaxStaleness(
            TIMING.staleness_ceiling.try_into().unwrap(),
        )),
    };
    let answers = join_all((0..CALLS).map(|_| ask(Some(stale.clone())))).await;
    for answer in answers {
        assert!(answer.unwrap().into_inner().allowed);
    }
}

/// Without it no poll hears of a change, so none is believed while it may not fire, and what happened then is found out.
#[tokio::test]
async fn without_the_trigger_that_tells_of_changes_keys_are_believed_up_to_the_bound_alone() {
    const AGAIN: &str = "ALTER TABLE hallpass.api_keys ENABLE ALWAYS TRIGGER api_keys_changed";
    let database = Database::create().await;
    let client = database.client().await;
    for disabled in [
        "DISABLE TRIGGER api_keys_changed",
        "DISABLE TRIGGER USER",
        "ENABLE REPLICA TRIGGER api_keys_changed",
    ] {
        let key = Made::default().make(&database.url).await;
        let config = config_with_keys(&database.url, SHORT, Pepper::default());
        let server = Server::start(config).await;
        assert_eq!(with_key(&server, &key).await, "");
        run(
            &client,
            &format!("ALTER TABLE hallpass.api_keys {disabled}"),
        )
        .await;
        revoke(&database.url, &key).await;
        let revoked = Instant::now();
        let (asked, said) = while_said(&server, &key, "").await;
        assert_eq!(said, UNAVAILABLE, "{disabled}");
        assert!(asked.duration_since(revoked) <= SHORT.staleness_bound);
        run(&client, AGAIN).await;
        let (_, said) = while_said(&server, &key, UNAVAILABLE).await;
        assert_eq!(said, "CREDENTIAL_REVOKED", "{disabled}");
    }
    // Between two polls.
    let key = Made::default().make(&database.url).await;
    let config = config_with_keys(&database.url, SHORT, Pepper::default());
    let server = Server::start(config).await;
    assert_eq!(with_key(&server, &key).await, "");
    let unheard = format!(
        "ALTER TABLE hallpass.api_keys DISABLE TRIGGER api_keys_changed;
         UPDATE hallpass.api_keys SET revoked_at = now() WHERE id = '{}';
         {AGAIN}",
        key_id(&key)
    );
    run(&client, &unheard).await;
    let (_, said) = while_said(&server, &key, "").await;
    assert_eq!(said, "CREDENTIAL_REVOKED");
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
    assert_eq!(scrape(&server, &key).await, format!("503 {UNAVAILABLE}"));
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
