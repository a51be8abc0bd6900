//! What reaches the database: no more at once than it may, nothing that nobody waits for, and lists in no miss's way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use hallpass::{
    limits::Bounds,
    server::Config,
    store::{MISS_CONNECTIONS_MAX, READ_CONNECTIONS_MAX, Store, StoreError},
};
use hallpass_client::{
    tonic::{Code, transport::Channel},
    v1::{
        ListPermissionHoldersRequest, ListUserOrganizationsRequest, Source,
        permission_service_client::PermissionServiceClient,
    },
};
use tokio::{runtime::Runtime, task::JoinSet, time::sleep};
use tonic_types::StatusExt;

use crate::{
    database::{Database, as_role, eventually},
    deadlines::WAITING,
    names::id,
    ops::Scrape,
    server::{APPROVE, Server, bounds, config, fill, question, run_sql, within},
};

/// Members of the organization that changes, and how many of them are asked about at once.
const MEMBERS: usize = 100_000;
const ASKED: usize = 20_000;
const CONNECTIONS: usize = 40;
/// The service's own limit on an answer, for the whole queue before it, and what a busy machine adds.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const OBSERVATION_INTERVAL: Duration = Duration::from_millis(5);

const ACTIVE: &str = "
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'hallpass' AND state = 'active'
  AND query LIKE '%hallpass.load(%'";

/// What questions leave behind on the pools' connections: nothing.
const UNCLEAN: &str = "
SELECT count(*) FROM pg_stat_activity a
WHERE datname = current_database() AND application_name = 'hallpass'
  AND query ~ 'hallpass.(load|user_organizations|permission_holders)\\(|^SELECT pg_is_in_recovery\\(\\)$'
  AND (state LIKE 'idle in transaction%'
       OR EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND locktype = 'advisory'))";

/// Makes a list wait for a lock that nobody else asks for.
const HOLD_LISTS_UP: &str = "
DO $$
DECLARE
    definition text := pg_get_functiondef('hallpass.user_organizations(uuid, uuid[], uuid, integer)'::regprocedure);
BEGIN
    EXECUTE replace(definition, E'\nBEGIN\n', E'\nBEGIN\n    PERFORM pg_advisory_xact_lock_shared(42);\n');
END $$;
SELECT pg_advisory_lock(42)";

/// Ends in the background: a runtime must not be dropped where others run.
struct OwnRuntime(Option<Runtime>);

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A large organization's setting changes, all of its entries are invalid, and a fifth of its members is asked about at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_herd_is_answered_or_turned_away_and_the_database_feels_a_few_statements() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let insert = format!(
        "INSERT INTO public.profiles (org_id, user_id, role)
         SELECT :lincoln, md5('parent ' || i)::uuid, 'board_member' FROM generate_series(1, {MEMBERS}) i"
    );
    run_sql(&client, &insert).await;
    client.batch_execute("ANALYZE").await.unwrap();
    let users = client
        .query(
            "SELECT user_id::text FROM public.profiles WHERE org_id = $1 AND role = 'board_member' LIMIT $2",
            &[&id("lincoln"), &i64::try_from(ASKED).unwrap()],
        )
        .await
        .unwrap();
    let users: Vec<String> = users.iter().map(|row| row.get(0)).collect();
    assert_eq!(users.len(), ASKED);
    // A runtime of its own, as a service has: the callers must not stand in the queue of its tasks.
    let runtime = OwnRuntime(Some(Runtime::new().unwrap()));
    let config = Config {
        cache_capacity: 200_000,
        warm_up_max: Duration::from_secs(120),
        // Of calls that wait for a machine that has other work, none is to be given up for that.
        bounds: Bounds {
            request_deadline_max: None,
            ..bounds()
        },
        ..config(&database.url)
    };
    let server = runtime.0.as_ref().unwrap().spawn(Server::start(config));
    let server = server.await.unwrap();
    let change = "
        INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required)
        VALUES (:lincoln, 'can_approve_expenses', 'admin')";
    run_sql(&client, change).await;
    server.catch_up(&client).await;

    let (most, is_over) = (
        Arc::new(AtomicI64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let observer = tokio::spawn({
        let (most, is_over) = (Arc::clone(&most), Arc::clone(&is_over));
        async move {
            while !is_over.load(Ordering::Acquire) {
                let active = client.query_one(ACTIVE, &[]).await.unwrap().get(0);
                most.fetch_max(active, Ordering::AcqRel);
                sleep(OBSERVATION_INTERVAL).await;
            }
            client
        }
    });
    let mut channels: Vec<Channel> = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(hallpass_client::connect(&server.endpoint).await.unwrap());
    }
    let mut calls = JoinSet::new();
    for (user, channel) in users.into_iter().zip(channels.iter().cycle()) {
        let mut client = PermissionServiceClient::new(channel.clone());
        let mut asked = question("lincoln", "bob", APPROVE);
        asked.user_id = user;
        calls.spawn(async move { client.check_permission(asked).await });
    }
    let (mut answered, mut refused) = (0, 0);
    while let Some(outcome) = within("the next answer", ANSWER_MAX, calls.join_next()).await {
        match outcome.unwrap() {
            Ok(response) => {
                assert!(!response.into_inner().allowed);
                answered += 1;
            }
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(status.get_details_retry_info().is_some());
                refused += 1;
            }
        }
    }
    is_over.store(true, Ordering::Release);
    let client = observer.await.unwrap();
    let most = most.load(Ordering::Acquire);
    let limit = i64::try_from(MISS_CONNECTIONS_MAX).unwrap();
    assert!((1..=limit).contains(&most), "{most} statements at once");
    assert!(answered > 0, "{answered} answered, {refused} refused");
    assert_eq!(
        client
            .query_one(UNCLEAN, &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        0
    );
    let answer = server.check("lincoln", "bob", APPROVE).await;
    assert_eq!(answer.said, "deny ROLE_TOO_LOW");
    server.stop().await;
}

#[tokio::test]
async fn lists_that_hang_leave_misses_alone() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    client.batch_execute(HOLD_LISTS_UP).await.unwrap();
    let mut lists = JoinSet::new();
    for _ in 0..3 * READ_CONNECTIONS_MAX {
        let mut client = server.client();
        let request = ListUserOrganizationsRequest {
            user_id: id("bob").to_string(),
            ..ListUserOrganizationsRequest::default()
        };
        lists.spawn(async move { client.list_user_organizations(request).await });
    }
    eventually("lists wait for the lock", async || {
        let waiting: i32 = client.query_one(WAITING, &[]).await.unwrap().get(0);
        usize::try_from(waiting).unwrap() == READ_CONNECTIONS_MAX
    })
    .await;
    for round in 0..20 {
        let asked = format!("stranger {round}");
        let answer = server.check("lincoln", &asked, APPROVE).await;
        assert_eq!(answer.evidence.source(), Source::Database);
        let answer = server.check_now("lincoln", "bob", APPROVE).await;
        assert!(answer.response.allowed, "{answer}");
    }
    // Who finds all connections for lists taken is told so in a second.
    let holders = ListPermissionHoldersRequest {
        organization_id: id("lincoln").to_string(),
        permission: APPROVE.to_owned(),
        ..ListPermissionHoldersRequest::default()
    };
    let status = server
        .client()
        .list_permission_holders(holders.clone())
        .await;
    assert_eq!(status.unwrap_err().code(), Code::ResourceExhausted);
    // No alert about checks hears of them.
    let scrape = Scrape::of(&server).await;
    let refused = |class: &str| {
        scrape.samples[&format!(r#"hallpass_refusals_total{{limit="database",class="{class}"}}"#)]
    };
    assert!(refused("list") >= 1.0 && refused("check") < 1.0);
    let unlock = "SELECT pg_advisory_unlock(42)";
    client.batch_execute(unlock).await.unwrap();
    let mut answered = 0;
    while let Some(list) = lists.join_next().await {
        match list.unwrap() {
            Ok(_) => answered += 1,
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
    }
    assert_eq!(answered, READ_CONNECTIONS_MAX);
    server
        .client()
        .list_permission_holders(holders)
        .await
        .unwrap();
    assert_eq!(
        client
            .query_one(UNCLEAN, &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        0
    );
    server.stop().await;
}

/// Whatever asks whether it speaks to a standby takes longer than anybody waits.
pub(crate) const HANG: &str = "
CREATE FUNCTION public.pg_is_in_recovery() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(60);
    RETURN false;
END $$;
DO $$
BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$";

pub(crate) const HANGING: &str = "
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'hallpass' AND state = 'active'
  AND query LIKE '%pg_is_in_recovery%'";

/// Less than the database's own limit on a statement.
pub(crate) const CANCELLED_WITHIN: Duration = Duration::from_secs(3);

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_cancelled() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    client.batch_execute(HANG).await.unwrap();
    let url = as_role(&database.url, "hallpass_service").parse().unwrap();
    let store = Store::new(&url).unwrap();
    let asked = tokio::spawn(async move { (store.ping().await, store) });
    let hanging = async || {
        let row = client.query_one(HANGING, &[]).await;
        row.unwrap().get::<_, i64>(0)
    };
    eventually("the question is asked", async || hanging().await == 1).await;
    let began = Instant::now();
    let (answer, store) = asked.await.unwrap();
    assert!(
        matches!(answer, Err(StoreError::Unavailable(_))),
        "{answer:?}"
    );
    eventually("the question is given up", async || hanging().await == 0).await;
    assert!(began.elapsed() < CANCELLED_WITHIN, "{:?}", began.elapsed());
    client
        .batch_execute("DROP FUNCTION public.pg_is_in_recovery()")
        .await
        .unwrap();
    // Its connection was closed, and others take its place.
    for _ in 0..2 * MISS_CONNECTIONS_MAX {
        store.ping().await.unwrap();
    }
    assert_eq!(
        client
            .query_one(UNCLEAN, &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        0
    );
}
