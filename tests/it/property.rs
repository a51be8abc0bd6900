//! Random transactions, after which every decision over the cross product must be the oracle's: in SQL, where the
//! matrix might be believed wrongly, and from the running service's warm cache, which might have missed a change.
//!
//! The world that the oracle judges is what the five tables hold, read back as plain rows. A case that fails shrinks
//! and prints itself as a scenario.

use std::{env, time::Duration};

use proptest::{
    prelude::Strategy,
    strategy::ValueTree,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};
use tokio::{runtime::Runtime, sync::Mutex};
use tokio_postgres::Client;

use crate::{
    database::{Database, Shape, read_world, write_world},
    executors::Executor,
    operations::{Case, SEED, Session, Transaction, case},
    scenario::{self, Scenario},
    service::{Freshness, Service, Sources},
};

/// Operations that each test makes at least; `PROPERTY_OPERATIONS` asks for others.
const SQL_OPERATIONS: usize = 2_000;
const CACHE_OPERATIONS: usize = 10_000;

/// Shrinking runs the case again and again, at up to a second each.
const SHRINK_MS_MAX: u32 = 30_000;

/// The matrix is refreshed in the background between any two looks, or nearly.
const REFRESH_INTERVAL: Duration = Duration::from_millis(200);

/// How a statement may fail: unique and foreign keys, a snapshot too old, refreshes in another order than the
/// background one, CONCURRENTLY on a view without data.
const EXPECTED_ERRORS: [&str; 5] = ["23505", "23503", "40001", "40P01", "0A000"];

/// What reads the matrix when it is believed.
const BELIEVERS: [Executor; 2] = [Executor::LoadBelieving, Executor::OfOneOrganization];

/// The sessions of a test's database, kept from case to case.
struct Sessions {
    main: Client,
    old: Client,
    /// Never in a transaction: sees what is committed.
    observer: Client,
}

impl Sessions {
    async fn open(database: &Database) -> Self {
        Self {
            main: database.client().await,
            old: database.client().await,
            observer: database.client().await,
        }
    }

    async fn reset(&mut self, seed: &Scenario) {
        for client in [&self.main, &self.old] {
            client.batch_execute("ROLLBACK").await.unwrap();
        }
        write_world(&mut self.main, Shape::A, &seed.world, &seed.names).await;
    }

    /// Calls `check` after each statement of the main session that succeeds, on that session.
    async fn run(
        &self,
        transaction: &Transaction,
        seed: &Scenario,
        mut check: impl AsyncFnMut(&Client) -> Result<(), TestCaseError>,
    ) -> Result<(), TestCaseError> {
        let client = match transaction.session {
            Session::Main => &self.main,
            Session::Old => &self.old,
        };
        if let Some(begin) = transaction.begin() {
            client.batch_execute(&begin).await.unwrap();
        }
        for statement in &transaction.statements {
            let sql = seed.names.resolve(statement).unwrap();
            if succeeds(client, &sql).await? {
                // A look from the old session would hold locks until it ends.
                if transaction.session == Session::Main {
                    check(client).await?;
                }
            } else if transaction.isolation.is_some() {
                return Ok(());
            }
        }
        if transaction.isolation.is_some() {
            succeeds(client, transaction.end()).await?;
        }
        Ok(())
    }
}

/// Executes; after an expected error the transaction is rolled back. Any other error fails the case.
async fn succeeds(client: &Client, sql: &str) -> Result<bool, TestCaseError> {
    let Err(error) = client.batch_execute(sql).await else {
        return Ok(true);
    };
    let code = error.code().map_or("", |code| code.code());
    if !EXPECTED_ERRORS.contains(&code) {
        let message = error.as_db_error().map(ToString::to_string);
        return Err(TestCaseError::fail(format!(
            "`{sql}`: {error}: {message:?}"
        )));
    }
    client.batch_execute("ROLLBACK").await.unwrap();
    Ok(false)
}

fn agree(found: Vec<String>) -> Result<(), TestCaseError> {
    if found.is_empty() {
        return Ok(());
    }
    Err(TestCaseError::fail(found.join("\n")))
}

/// Runs cases until they have made as many operations as asked for.
fn run_cases(
    server_version: i32,
    operations: usize,
    run: impl Fn(Case) -> Result<(), TestCaseError>,
) {
    let operations = env::var("PROPERTY_OPERATIONS").map_or(operations, |n| n.parse().unwrap());
    let strategy = case(server_version);
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        max_shrink_time: SHRINK_MS_MAX,
        ..Config::default()
    });
    let mut made = 0;
    while made < operations {
        let tree = strategy.new_tree(&mut runner).unwrap();
        made += tree.current().operations();
        match runner.run_one(tree, &run) {
            Ok(_) => {}
            Err(TestError::Fail(reason, case)) => panic!("{reason}\n\n{}", case.scenario()),
            Err(TestError::Abort(reason)) => panic!("{reason}"),
        }
    }
}

fn seed() -> Scenario {
    scenario::parse("the seed", SEED).unwrap_or_else(|error| panic!("{error}"))
}

async fn server_version(client: &Client) -> i32 {
    let version = "SELECT current_setting('server_version_num')::integer";
    client.query_one(version, &[]).await.unwrap().get(0)
}

/// In the middle of transactions, after rollbacks to savepoints, after refreshes by anyone: on the session's own view.
#[test]
fn the_matrix_is_never_believed_wrongly() {
    let runtime = Runtime::new().unwrap();
    let seed = seed();
    let (sessions, version) = runtime.block_on(async {
        let database = Database::create().await;
        let sessions = Sessions::open(&database).await;
        let version = server_version(&sessions.main).await;
        (Mutex::new(sessions), version)
    });
    let check = async |client: &Client, executors: &[Executor]| {
        let world = read_world(client, Shape::A, &seed.names).await;
        for executor in executors {
            agree(executor.disagreements(client, &world, &seed.names).await)?;
        }
        Ok(())
    };
    run_cases(version, SQL_OPERATIONS, |case| {
        runtime.block_on(async {
            let mut sessions = sessions.lock().await;
            sessions.reset(&seed).await;
            for transaction in &case.0 {
                sessions
                    .run(transaction, &seed, async |client| {
                        check(client, &[Executor::LoadBelieving]).await
                    })
                    .await?;
                if transaction.looks {
                    check(&sessions.observer, &BELIEVERS).await?;
                }
            }
            Ok(())
        })
    });
}

/// Lists first, from what the cache has kept through the changes; then everything in a batch.
#[test]
fn the_cache_is_never_wrong() {
    let runtime = Runtime::new().unwrap();
    let seed = seed();
    let (sessions, service, version) = runtime.block_on(async {
        let database = Database::create().await;
        let sessions = Sessions::open(&database).await;
        let version = server_version(&sessions.main).await;
        let service = Service::start(&database, REFRESH_INTERVAL).await;
        (Mutex::new(sessions), service, version)
    });
    let kept = Mutex::new(Sources::default());
    let all = Mutex::new(Sources::default());
    let look = async |observer: &Client| {
        service.catch_up(observer).await;
        let world = read_world(observer, Shape::A, &seed.names).await;
        let freshness = Freshness::MinimizeLatency;
        let (found, sources) = service
            .list_disagreements(&world, &seed.names, freshness)
            .await;
        kept.lock().await.add(sources);
        all.lock().await.add(sources);
        agree(found)?;
        let (found, sources) = service
            .batch_disagreements(&world, &seed.names, freshness)
            .await;
        all.lock().await.add(sources);
        agree(found)
    };
    run_cases(version, CACHE_OPERATIONS, |case| {
        runtime.block_on(async {
            let mut sessions = sessions.lock().await;
            sessions.reset(&seed).await;
            look(&sessions.observer).await?;
            for transaction in &case.0 {
                sessions.run(transaction, &seed, async |_| Ok(())).await?;
                if transaction.looks {
                    look(&sessions.observer).await?;
                }
            }
            look(&sessions.observer).await
        })
    });
    runtime.block_on(service.stop());
    let (kept, all) = (kept.into_inner(), all.into_inner());
    println!("after changes: {kept:?}; in all: {all:?}");
    assert!(all.cache > all.database, "{all:?}");
    assert!(kept.cache * 4 > kept.database, "{kept:?}");
}

#[test]
fn a_case_prints_itself_as_a_scenario() {
    let mut runner = TestRunner::deterministic();
    for _ in 0..20 {
        let case = case(150_000).new_tree(&mut runner).unwrap().current();
        let scenario = scenario::parse("a case", &case.scenario());
        let scenario = scenario.unwrap_or_else(|error| panic!("{error}\n{case:?}"));
        assert!(scenario.steps.len() >= case.0.len());
    }
}
