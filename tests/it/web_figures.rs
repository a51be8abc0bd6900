//! Figures of HTTP, printed: the permission grid of a large organization, what a try of a change takes there, and requests
//! at the rate that pages make.

use std::time::{Duration, Instant};

use hallpass::{limits::Bounds, server::Config};
use hdrhistogram::Histogram;
use serde_json::json;
use tokio::time::interval;
use tokio_postgres::Client;

use crate::{
    admin::{config_to_change, lincoln},
    database::Database,
    names::id,
    server::{APPROVE, Server, bounds, fill, head},
    sql::{run, value},
    web::Web,
    web_admin::{PATH, put, send},
};

const MEMBERS: u32 = 10_000;

/// Each alone, one after the other.
const CALLS: usize = 100;

/// Over a minute.
const REQUESTS: usize = 1_000;

/// What a page may take, and a try.
const P95_MAX: Duration = Duration::from_millis(100);
const TRY_MAX: Duration = Duration::from_secs(1);

fn histogram() -> Histogram<u64> {
    Histogram::new(3).unwrap()
}

/// Prints it, and holds its 95th percentile against the bound.
fn within(what: &str, times: &Histogram<u64>, bound: Duration) {
    let at = |quantile| Duration::from_micros(times.value_at_quantile(quantile));
    println!("{what}: p50 {:?}, p95 {:?}", at(0.5), at(0.95));
    assert!(at(0.95) < bound, "{what}: p95 {:?}", at(0.95));
}

fn record(times: &mut Histogram<u64>, since: Instant) {
    let micros = since.elapsed().as_micros();
    times.record(u64::try_from(micros).unwrap()).unwrap();
}

/// With the limits that it has by default.
async fn start() -> (Database, Client, Server, Web) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let members = format!(
        "INSERT INTO profiles (org_id, user_id, role)
         SELECT '{}', gen_random_uuid(), (ARRAY['volunteer', 'committee_lead', 'board_member', 'teacher'])[1 + n % 4]
         FROM generate_series(1, {MEMBERS}) n;
         SELECT refresh_permission_materialized_views(); ANALYZE",
        lincoln()
    );
    run(&client, &members).await;
    let server = Server::start(Config {
        bounds: Bounds {
            caller_in_flight_max: 250,
            address_rate_max: 20_000,
            credential_rate_max: 100,
            caller_rate_max: 20_000,
            caller_list_rate_max: 200,
            ..bounds()
        },
        ..config_to_change(&database)
    })
    .await;
    let web = Web::of(&server);
    (database, client, server, web)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make web-figures"]
async fn pages_of_a_large_organization() {
    let (_database, client, server, web) = start().await;
    let list = format!("{PATH}?organization_id={}", lincoln());
    let user = format!("{PATH}/user/{}?organization_id={}", id("pat"), lincoln());
    let summary = format!("/v1/organizations/{}/summary", lincoln());
    for (what, path) in [("list", &list), ("summary", &summary), ("user", &user)] {
        let mut times = histogram();
        for _ in 0..CALLS {
            let since = Instant::now();
            let answer = web.get(path).await;
            record(&mut times, since);
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        within(what, &times, P95_MAX);
    }
    let before = head(&client).await;
    let gaining = "SELECT count(*) FROM effective_user_permissions e
        WHERE permission_key = 'can_approve_expenses' AND role = 'committee_lead' AND org_id = ";
    let gaining = value(&client, &format!("{gaining}'{}'", lincoln())).await;
    let mut times = histogram();
    for _ in 0..CALLS / 10 {
        let body = json!({"min_role_required": "committee_lead", "validate_only": true});
        let since = Instant::now();
        let answer = send(&web, Some("lincoln"), put(APPROVE, body)).await;
        record(&mut times, since);
        let effect = &answer.body["preview"]["effects"][0];
        assert_eq!(effect["gained"].to_string(), gaining, "{answer:?}");
        assert_eq!(effect["lost"], 0);
    }
    assert_eq!(head(&client).await, before);
    within("validate_only", &times, TRY_MAX);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make web-figures"]
async fn a_thousand_requests_a_minute() {
    let (_database, _client, server, web) = start().await;
    let list = format!("{PATH}?organization_id={}", lincoln());
    let question = |user: &str| json!({"organization_id": lincoln(), "user_id": id(user), "permission": APPROVE});
    let mut times = histogram();
    let mut ticks = interval(Duration::from_secs(60) / u32::try_from(REQUESTS).unwrap());
    for number in 0..REQUESTS {
        ticks.tick().await;
        let since = Instant::now();
        // A page is a list now and then, and checks.
        let answer = match number % 10 {
            0 => web.get(&list).await,
            n if n % 2 == 0 => web.post("/v1/check", &question("bob")).await,
            _ => web.post("/v1/check", &question("stranger")).await,
        };
        record(&mut times, since);
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    within("1,000 requests a minute", &times, P95_MAX);
    server.stop().await;
}
