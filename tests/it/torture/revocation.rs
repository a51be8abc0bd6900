//! How long a revocation takes: from the acknowledgement of its commit to the first deny, on each of three replicas.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hallpass_client::v1::{
    CheckPermissionRequest, permission_service_client::PermissionServiceClient,
};
use hdrhistogram::Histogram;
use tokio::{task::block_in_place, time::sleep};

use crate::{
    database::connect,
    proxy::Way,
    server::{APPROVE, fill, question, set_role},
    support::directory_in_memory,
};

use super::{
    REPLICAS,
    machines::{Postgres, Replica},
    migrated, variable,
};

/// Revocations, each seen by every replica.
const REVOCATIONS: u64 = 10_000;

/// Users whose role is given and taken at once where a revocation waits for a poll.
const LANES: usize = 10;

/// The service's default.
const BOUND: Duration = Duration::from_secs(2);

/// How often a replica is asked.
const INTERVAL: Duration = Duration::from_micros(500);

/// What is promised of 999 in 1000, with notifications and without.
const NOTIFIED_MAX: Duration = Duration::from_millis(250);
const UNNOTIFIED_MAX: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures, which needs a quiet machine: make revocation"]
async fn a_revocation_reaches_every_replica() {
    let revocations = variable("REVOCATIONS").unwrap_or(REVOCATIONS);
    println!(
        "\nfrom a revocation's commit to the first deny, of {revocations} on {REPLICAS} replicas:"
    );
    let notified = measure(Way::Open, 1, revocations).await;
    let unnotified = measure(Way::Unnotified, LANES, revocations).await;
    for (what, found, most) in [
        ("with NOTIFY", notified, NOTIFIED_MAX),
        ("without", unnotified, UNNOTIFIED_MAX),
    ] {
        let at = |quantile: f64| {
            Duration::from_micros(found.value_at_quantile(quantile)).as_secs_f64() * 1_000.0
        };
        println!(
            "  {what:<12} p50 {:>7.1} ms   p99 {:>7.1} ms   p99.9 {:>7.1} ms   (promised: {most:?})",
            at(0.5),
            at(0.99),
            at(0.999)
        );
        assert!(Duration::from_micros(found.value_at_quantile(0.999)) <= most);
    }
}

/// Microseconds, of each revocation on each replica.
async fn measure(way: Way, lanes: usize, revocations: u64) -> Histogram<u64> {
    let directory = directory_in_memory();
    let postgres = block_in_place(|| Postgres::start(directory.path()));
    let (url, service) = migrated(&postgres).await;
    fill(&connect(&url).await).await;
    let mut replicas = Vec::new();
    for number in 0..REPLICAS {
        let directory = directory.path().join(number.to_string());
        replicas.push(Replica::start(&directory, &service, way, BOUND, false).await);
    }
    let each = revocations.div_ceil(u64::try_from(lanes).unwrap());
    let lanes = (0..lanes).map(|lane| {
        let (replicas, url) = (&replicas, &url);
        async move {
            let client = connect(url).await;
            let user = format!("user {lane}");
            let mut found = Histogram::new(3).unwrap();
            for _ in 0..each {
                set_role(&client, "lincoln", &user, "board_member").await;
                join_all(replicas.iter().map(|to| until(to, &user, true))).await;
                set_role(&client, "lincoln", &user, "volunteer").await;
                let acknowledged = Instant::now();
                let seen = replicas.iter().map(async |replica| {
                    until(replica, &user, false).await;
                    acknowledged.elapsed()
                });
                for seen in join_all(seen).await {
                    found
                        .record(u64::try_from(seen.as_micros()).unwrap())
                        .unwrap();
                }
            }
            found
        }
    });
    let mut all = Histogram::new(3).unwrap();
    for found in join_all(lanes).await {
        all.add(found).unwrap();
    }
    all
}

/// Asks a replica until it allows, or denies.
async fn until(replica: &Replica, user: &str, allowed: bool) {
    let mut client = PermissionServiceClient::new(replica.channel.clone());
    loop {
        let asked: CheckPermissionRequest = question("lincoln", user, APPROVE);
        let answer = client.check_permission(asked).await;
        if answer.is_ok_and(|answer| answer.into_inner().allowed == allowed) {
            return;
        }
        sleep(INTERVAL).await;
    }
}
