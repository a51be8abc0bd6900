//! When `hallpass.load` believes the matrix, where it takes two sessions at once to tell.

use std::future::Future;

use tokio_postgres::Client;

use crate::{
    database::{Database, Shape, eventually, read_world, write_world},
    executors::Executor,
    oracle::World,
    scenario::{self, Scenario},
};

/// An admin and a volunteer of lincoln; only an admin can_edit.
fn scenario() -> Scenario {
    let text = "
name: Two members
ladder: {volunteer: 1, admin: 4}
catalog: {can_edit: {module: m, min_role: admin}}
organizations:
  lincoln:
    members: {ann: admin, bob: volunteer}
    overrides: {can_edit: {users: [bob]}}
assertions: [lincoln ann can_edit = allow GRANTED_BY_ROLE]
";
    scenario::parse("matrix.rs", text).unwrap_or_else(|error| panic!("{error}"))
}

async fn agrees(executor: Executor, client: &Client, world: &World, scenario: &Scenario) {
    let found = executor.disagreements(client, world, &scenario.names).await;
    assert_eq!(found, Vec::<String>::new());
}

/// Resolves once `blocked` waits for a lock.
async fn until_waiting(observer: &Client, blocked: i32) {
    let waits = "SELECT cardinality(pg_blocking_pids($1)) > 0";
    eventually("the session waits for a lock", async || {
        observer.query_one(waits, &[&blocked]).await.unwrap().get(0)
    })
    .await;
}

async fn pid(client: &Client) -> i32 {
    let row = client.query_one("SELECT pg_backend_pid()", &[]).await;
    row.unwrap().get(0)
}

/// Starts `work` at once, to be awaited later.
fn start<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    tokio::spawn(work)
}

/// A REFRESH takes its snapshot, then waits for its lock: by the time it gets it, the matrix may be newer. It takes
/// the matrix back, and its stamp with it; while it holds the lock, loads do not wait for it.
#[tokio::test]
async fn a_refresh_that_waited_makes_no_load_wrong() {
    let database = Database::create().await;
    let (mut first, second, third) = (
        database.client().await,
        database.client().await,
        database.client().await,
    );
    let scenario = scenario();
    write_world(&mut first, Shape::A, &scenario.world, &scenario.names).await;

    let fill = "REFRESH MATERIALIZED VIEW public.user_permission_matrix";
    first
        .batch_execute(&format!("BEGIN; {fill}"))
        .await
        .unwrap();
    let waiting = pid(&second).await;
    let late = start(async move {
        second.batch_execute("BEGIN").await.unwrap();
        let done = second.batch_execute(fill).await;
        (second, done)
    });
    until_waiting(&third, waiting).await;
    let revoke = "UPDATE public.profiles SET role = 'volunteer'";
    third.batch_execute(revoke).await.unwrap();
    first
        .batch_execute(&format!("{fill}; COMMIT"))
        .await
        .unwrap();

    let (second, done) = late.await.unwrap();
    done.unwrap();
    let world = read_world(&third, Shape::A, &scenario.names).await;
    agrees(Executor::LoadBelieving, &third, &world, &scenario).await;
    second.batch_execute("COMMIT").await.unwrap();
    agrees(Executor::LoadBelieving, &third, &world, &scenario).await;
}

/// TRUNCATE empties a table for older snapshots too: a load that waits for a reload must not see the hole.
#[tokio::test]
async fn a_load_that_waited_for_a_reload_sees_it_whole() {
    let database = Database::create().await;
    let (mut first, second) = (database.client().await, database.client().await);
    let scenario = scenario();
    write_world(&mut first, Shape::A, &scenario.world, &scenario.names).await;

    let reload = "
        BEGIN;
        CREATE TEMP TABLE kept AS SELECT * FROM public.organization_permissions;
        TRUNCATE public.organization_permissions;
        INSERT INTO public.organization_permissions SELECT * FROM kept";
    first.batch_execute(reload).await.unwrap();
    let waiting = pid(&second).await;
    let (world, names) = (scenario.world.clone(), scenario.names.clone());
    let late = start(async move {
        Executor::LoadLive
            .disagreements(&second, &world, &names)
            .await
    });
    until_waiting(&first, waiting).await;
    first.batch_execute("COMMIT").await.unwrap();
    assert_eq!(late.await.unwrap(), Vec::<String>::new());
}

/// The scenarios would pass if `hallpass.load` never read the matrix: here the tables change behind its back.
#[tokio::test]
async fn a_true_matrix_is_what_a_load_reads() {
    let database = Database::create().await;
    let mut client = database.client().await;
    let scenario = scenario::all().swap_remove(0);
    let names = &scenario.names;
    write_world(&mut client, Shape::A, &scenario.world, names).await;
    client
        .batch_execute(
            "SELECT public.refresh_permission_materialized_views();
             ALTER TABLE public.profiles DISABLE TRIGGER ALL;
             DELETE FROM public.profiles",
        )
        .await
        .unwrap();
    let emptied = read_world(&client, Shape::A, names).await;
    assert!(emptied.members.is_empty() && !scenario.world.members.is_empty());
    for (executor, world) in [
        (Executor::LoadBelieving, &scenario.world),
        (Executor::LoadLive, &emptied),
    ] {
        let found = executor.disagreements(&client, world, names).await;
        assert_eq!(found, Vec::<String>::new());
    }
}
