//! What one address, one caller and everybody together may have, and that nobody pays for another's flood.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hallpass::{
    auth::{Authenticator, Caller, Identity, api_key::Pepper},
    grpc::limit::{CallerLayer, DoorLayer},
    limits::{Bounds, Class, Limit, Limits, Refusal},
};
use hallpass_client::{
    tonic::{Code, IntoRequest, Status, body::Body},
    v1::{
        AuditFilter, CheckPermissionRequest, ListPermissionHoldersRequest,
        stream_audit_entries_request::Start,
    },
};
use http::Response;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;
use tower::{Layer, Service};

use crate::{
    consumer::Consumer,
    database::{Database, eventually},
    deadlines::TableLock,
    keyring::{Made, TIMING, client_with, config_with_keys},
    limits::assert_is_decent,
    ops::Scrape,
    server::{APPROVE, Server, bounds, config, fill, now, question},
};

const CHECK: &str = "/hallpass.v1.PermissionService/CheckPermission";
const HOLDERS: &str = "/hallpass.v1.PermissionService/ListPermissionHolders";

/// A service with these bounds on a filled database.
async fn start(bounds: Bounds) -> (Server, Database) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let config = hallpass::server::Config {
        bounds,
        ..config(&database.url)
    };
    (Server::start(config).await, database)
}

/// A call that a proxy forwards for this address, with this credential.
async fn forwarded(server: &Server, address: &str, credential: &str) -> Result<(), Status> {
    let mut request = question("lincoln", "bob", APPROVE).into_request();
    let metadata = request.metadata_mut();
    metadata.insert("x-forwarded-for", address.parse().unwrap());
    metadata.insert("authorization", credential.parse().unwrap());
    server.try_check(request).await.map(drop)
}

/// The limit that refused a call, and when it may pass.
fn refused(status: &Status) -> (String, Duration) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_is_decent(status);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "RATE_LIMITED");
    let retry = status.get_details_retry_info().unwrap().retry_delay;
    (info.metadata["limit"].clone(), retry.unwrap())
}

fn is_overloaded(status: &Status) -> bool {
    let info = status.get_details_error_info();
    info.is_some_and(|info| info.reason == "OVERLOADED")
}

#[tokio::test]
async fn an_address_has_its_share_and_no_other_pays_for_it() {
    let (server, _database) = start(Bounds {
        address_rate_max: 5,
        trusted_proxies: vec!["127.0.0.1/32".parse().unwrap()],
        ..bounds()
    })
    .await;
    let mut passed = 0;
    let status = loop {
        match forwarded(&server, "203.0.113.9, 198.51.100.1", "").await {
            Ok(()) => passed += 1,
            Err(status) => break status,
        }
    };
    assert!(passed >= 5, "{passed}");
    let (limit, retry) = refused(&status);
    assert_eq!(limit, "address-rate");
    assert!(retry <= Duration::from_millis(200), "{retry:?}");
    // What the client made up of itself changes nothing, and is nobody's address.
    for (address, passes) in [
        ("203.0.113.8, 198.51.100.1", false),
        ("198.51.100.1", false),
        ("203.0.113.9", true),
        ("198.51.100.2", true),
        // Of no use, so the proxy's own, which is loopback.
        ("198.51.100.1, unknown", true),
    ] {
        let outcome = forwarded(&server, address, "").await;
        // One cell may have come back meanwhile.
        let outcome = match outcome {
            Ok(()) if !passes => forwarded(&server, address, "").await,
            outcome => outcome,
        };
        assert_eq!(outcome.is_ok(), passes, "{address}");
    }
    assert_eq!(server.health("").await, ServingStatus::Serving);

    // A call that comes back when it was told to passes.
    let status = until_refused(&server, "198.51.100.3").await;
    tokio::time::sleep(refused(&status).1).await;
    forwarded(&server, "198.51.100.3", "").await.unwrap();
    server.stop().await;
}

async fn until_refused(server: &Server, address: &str) -> Status {
    loop {
        if let Err(status) = forwarded(server, address, "").await {
            return status;
        }
    }
}

#[tokio::test]
async fn a_header_of_a_peer_that_is_not_listed_is_not_believed() {
    for (proxies, is_believed) in [("10.0.0.0/8", false), ("127.0.0.0/8", true)] {
        let database = Database::create().await;
        let server = Server::start(hallpass::server::Config {
            authenticator: Arc::new(Authenticator::default()),
            bounds: Bounds {
                credential_rate_max: 5,
                trusted_proxies: vec![proxies.parse().unwrap()],
                ..bounds()
            },
            ..config(&database.url)
        })
        .await;
        // Each from an address of its own, as far as the header goes.
        let mut limited = 0;
        for host in 1..100 {
            let address = format!("198.51.100.{host}");
            let status = forwarded(&server, &address, "Bearer wrong")
                .await
                .unwrap_err();
            match status.code() {
                Code::Unauthenticated => {}
                _ => {
                    assert_eq!(refused(&status).0, "credential-rate");
                    limited += 1;
                }
            }
        }
        assert_eq!(limited > 50, !is_believed, "{proxies}: {limited}");
        assert_eq!(limited == 0, is_believed, "{proxies}: {limited}");
        server.stop().await;
    }
}

#[tokio::test]
async fn what_is_over_the_bound_is_refused_at_once_and_health_is_not() {
    let (server, database) = start(Bounds {
        requests_in_flight_max: 2,
        ..bounds()
    })
    .await;
    let lock = TableLock::take(&database, "public.profiles").await;
    // Malformed, so that it is answered without the database wherever it is let in.
    let probe = async || {
        let status = server.try_check(question("", "", "")).await.unwrap_err();
        if is_overloaded(&status) {
            assert_is_decent(&status);
            assert!(status.get_details_retry_info().is_some());
            return false;
        }
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        true
    };
    // More rounds than there are places: each call that goes away gives its place back.
    for round in 0..5 {
        let hanging: Vec<_> = ["ann", "bob"]
            .map(|user| {
                let mut client = server.client();
                let question = now(question("lincoln", user, APPROVE));
                tokio::spawn(async move {
                    // A probe may be in its place.
                    loop {
                        match client.check_permission(question.clone()).await {
                            Err(status) if is_overloaded(&status) => {}
                            ended => return ended.map(drop),
                        }
                    }
                })
            })
            .into();
        eventually(
            &format!("both places are taken, round {round}"),
            async || !probe().await,
        )
        .await;
        assert_eq!(server.health("").await, ServingStatus::Serving);
        for call in &hanging {
            assert!(!call.is_finished());
            call.abort();
        }
        eventually(&format!("both places are free, round {round}"), probe).await;
    }
    lock.release();
    // Two at once pass, so both places are.
    let (first, second) = (
        server.try_check(now(question("lincoln", "ann", APPROVE))),
        server.try_check(now(question("lincoln", "bob", APPROVE))),
    );
    let (first, second) = tokio::join!(first, second);
    assert!(first.is_ok() && second.is_ok());
    server.stop().await;
}

/// Alerts about checks hear of no list that is turned away.
#[tokio::test]
async fn what_finds_no_place_is_counted_by_class() {
    let (server, _database) = start(Bounds {
        requests_in_flight_max: 1,
        ..bounds()
    })
    .await;
    let filter = AuditFilter::default();
    let stream = Consumer::start(&server.channel, Start::Earliest(true), filter).await;
    let mut stream = stream.unwrap();
    stream.next().await.unwrap();
    let check = server.try_check(question("lincoln", "ann", APPROVE)).await;
    assert!(is_overloaded(&check.unwrap_err()));
    for _ in 0..2 {
        let holders = ListPermissionHoldersRequest::default();
        let list = server.client().list_permission_holders(holders).await;
        assert!(is_overloaded(&list.unwrap_err()));
    }
    let scrape = Scrape::of(&server).await;
    for (class, expected) in [("check", 1.0), ("list", 2.0), ("health", 0.0)] {
        let labels = format!(r#"{{limit="requests-in-flight",class="{class}"}}"#);
        let found = scrape.samples[&format!("hallpass_refusals_total{labels}")];
        assert!((found - expected).abs() < 1e-9, "{class}: {found}");
    }
    drop(stream);
    server.stop().await;
}

/// Answers every request that reaches it.
#[derive(Clone)]
struct Answers;

impl Service<http::Request<()>> for Answers {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<()>) -> Self::Future {
        ready(Ok(Response::new(Body::empty())))
    }
}

fn caller(key: &str) -> Arc<Caller> {
    Arc::new(Caller {
        identity: Identity::Key(key.into()),
        ..Caller::clone(&Caller::anyone())
    })
}

#[tokio::test]
async fn a_caller_has_its_share_and_no_other_pays_for_it() {
    let limits = Arc::new(Limits::new(Bounds {
        caller_rate_max: 50,
        caller_list_rate_max: 5,
        ..bounds()
    }));
    let inner = CallerLayer(Arc::clone(&limits)).layer(Answers);
    let mut stack = DoorLayer(Arc::clone(&limits)).layer(inner);
    let mut ask = async |caller: &Arc<Caller>, path: &str| {
        let mut request = http::Request::builder().uri(path).body(()).unwrap();
        request.extensions_mut().insert(Arc::clone(caller));
        let response = stack.call(request).await.unwrap();
        Status::from_header_map(response.headers()).map_or(Ok(()), Err)
    };
    let (flooding, other) = (caller("flooding"), caller("other"));
    let mut answered = 0;
    let mut limited = 0;
    for _ in 0..500 {
        match ask(&flooding, CHECK).await {
            Ok(()) => answered += 1,
            Err(status) => {
                assert_eq!(refused(&status).0, "caller-rate");
                limited += 1;
            }
        }
    }
    assert!((50..100).contains(&answered), "{answered}");
    assert_eq!(limits.tally.refusals(Limit::Checks), limited);
    assert_eq!(
        limits.tally.failures(Code::ResourceExhausted.into()),
        limited
    );
    for _ in 0..5 {
        // Another caller's checks, and the same caller's lists.
        ask(&other, CHECK).await.unwrap();
        ask(&flooding, HOLDERS).await.unwrap();
        // Health is nobody's share.
        ask(&flooding, "/grpc.health.v1.Health/Check")
            .await
            .unwrap();
    }
    let status = loop {
        if let Err(status) = ask(&flooding, HOLDERS).await {
            break status;
        }
    };
    assert_eq!(refused(&status).0, "caller-list-rate");
    // Where nobody says who it is, nobody is refused for it.
    for _ in 0..500 {
        ask(&Caller::anyone(), CHECK).await.unwrap();
    }
}

#[tokio::test]
async fn one_who_holds_calls_open_takes_places_from_itself_alone() {
    let (server, database) = start(Bounds {
        requests_in_flight_max: 10,
        caller_in_flight_max: 3,
        trusted_proxies: vec!["127.0.0.1/32".parse().unwrap()],
        ..bounds()
    })
    .await;
    let lock = TableLock::take(&database, "public.profiles").await;
    let mut client = server.client();
    let holding: Vec<_> = (0..3)
        .map(|_| {
            let mut asked = now(question("lincoln", "ann", APPROVE)).into_request();
            let address = "198.51.100.1".parse().unwrap();
            asked.metadata_mut().insert("x-forwarded-for", address);
            let mut client = client.clone();
            tokio::spawn(async move { client.check_permission(asked).await.map(drop) })
        })
        .collect();
    lock.until_waiting(1).await;
    // Malformed, so that it is answered without the database wherever it is let in.
    let mut probe = async |address: &str| {
        let mut asked = question("", "", "").into_request();
        let forwarded = address.parse().unwrap();
        asked.metadata_mut().insert("x-forwarded-for", forwarded);
        client.check_permission(asked).await.unwrap_err()
    };
    eventually("all three are under way", async || {
        probe("198.51.100.1").await.code() == Code::ResourceExhausted
    })
    .await;
    assert_eq!(refused(&probe("198.51.100.1").await).0, "caller-in-flight");
    for _ in 0..20 {
        let status = probe("198.51.100.2").await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    }
    lock.release();
    for call in holding {
        call.await.unwrap().unwrap();
    }
    forwarded(&server, "198.51.100.1", "").await.unwrap();
    server.stop().await;
}

#[test]
fn ten_items_of_a_batch_cost_as_much_as_a_call() {
    let limits = Limits::new(Bounds {
        caller_rate_max: 100,
        ..bounds()
    });
    let took = |key: &str, items: usize| limits.batch_items(&caller(key), items);
    for _ in 0..10 {
        assert_eq!(took("small", 9), Ok(()));
        assert_eq!(took("medium", 100), Ok(()));
    }
    assert_eq!(took("small", 990), Ok(()));
    let refusal = took("medium", 100).unwrap_err();
    let Refusal::TooMany { limit, retry_after } = refusal else {
        panic!("{refusal:?}");
    };
    assert_eq!(limit, Limit::Checks);
    assert!(retry_after <= Duration::from_millis(100), "{retry_after:?}");
    // The largest of all passes, and takes everything.
    assert_eq!(took("large", usize::MAX), Ok(()));
    assert!(limits.caller(&caller("large"), Class::Check).is_err());
}

/// A service with keys, of which each caller has so many checks a second, and two keys.
async fn start_with_keys(caller_rate_max: u32) -> (Server, Database, [String; 2]) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let config = hallpass::server::Config {
        bounds: Bounds {
            caller_rate_max,
            caller_list_rate_max: caller_rate_max,
            ..bounds()
        },
        ..config_with_keys(&database.url, TIMING, Pepper::default())
    };
    let keys = [
        Made::default().make(&database.url).await,
        Made::default().make(&database.url).await,
    ];
    (Server::start(config).await, database, keys)
}

/// How many questions in a row are answered before one is refused: a few more than a second's worth, as time goes on.
async fn answered(server: &Server, key: &str, question: &CheckPermissionRequest) -> u32 {
    let mut client = client_with(server, key);
    let mut answered = 0;
    loop {
        match client.check_permission(question.clone()).await {
            Ok(_) => answered += 1,
            Err(status) => {
                refused(&status);
                return answered;
            }
        }
    }
}

#[tokio::test]
async fn a_key_s_flood_is_its_own() {
    let (server, _database, [flood, other]) = start_with_keys(20).await;
    let asked = question("lincoln", "bob", APPROVE);
    assert!(answered(&server, &flood, &asked).await >= 20);
    assert!(answered(&server, &other, &asked).await >= 20);
}

#[tokio::test]
async fn what_the_database_must_answer_counts_for_more() {
    const RATE: u32 = 20;
    let (server, _database, [first, second]) = start_with_keys(RATE).await;
    let fresh = now(question("lincoln", "bob", APPROVE));
    let found = answered(&server, &first, &fresh).await;
    assert!((RATE / 10..RATE / 2).contains(&found), "{found}");
    let explained = CheckPermissionRequest {
        explain: true,
        ..question("lincoln", "bob", APPROVE)
    };
    // Of lists it has as many: each takes one of both.
    assert!(answered(&server, &second, &explained).await >= RATE);
}
