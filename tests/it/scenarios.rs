//! Every file of `tests/scenarios` through every way to ask. The files state decisions, the oracle computes them all,
//! and each executor must agree with it on each question that can be asked: the unknown organization, user and
//! permission too.

use std::{collections::BTreeMap, time::Duration};

use tokio_postgres::{Client, error::SqlState};

use crate::{
    database::{Database, Shape, read_world, write_world},
    executors::Executor,
    names::id,
    oracle::World,
    scenario::{self, Assertion, Scenario, Step},
    service::{Freshness, Service, Sources},
};

/// Often enough that some answers are loaded from a believed matrix, and some while it is refreshed.
pub(crate) const REFRESH_INTERVAL: Duration = Duration::from_millis(200);

/// One scenario on its way through its steps.
pub(crate) struct Run<'a> {
    pub(crate) scenario: &'a Scenario,
    database: &'a Database,
    pub(crate) client: &'a mut Client,
    /// The connections that its steps name.
    sessions: BTreeMap<&'a str, Client>,
    failures: Vec<String>,
}

impl<'a> Run<'a> {
    async fn begin(scenario: &'a Scenario, database: &'a Database, client: &'a mut Client) -> Self {
        write_world(client, database.shape, &scenario.world, &scenario.names).await;
        let run = Self {
            scenario,
            database,
            client,
            sessions: BTreeMap::new(),
            failures: Vec::new(),
        };
        assert_eq!(run.world().await, scenario.world, "{}", scenario.file);
        run
    }

    async fn world(&self) -> World {
        read_world(self.client, self.database.shape, &self.scenario.names).await
    }

    async fn take(&mut self, step: &'a Step) {
        if !self.sessions.contains_key(step.session.as_str()) {
            let client = self.database.client().await;
            self.sessions.insert(&step.session, client);
        }
        let done = self.sessions[step.session.as_str()]
            .batch_execute(&in_shape(self.database.shape, &step.sql))
            .await;
        let error = done.err().map(|error| match error.code() {
            Some(code) => code.code().to_owned(),
            None => error.to_string(),
        });
        if error != step.fails {
            self.fail(format!(
                "`{}`: fails with {error:?}, not {:?}",
                step.sql, step.fails
            ));
        }
    }

    /// What the file states, the oracle must say.
    fn assert(&mut self, world: &World, assertions: &[Assertion]) {
        for Assertion {
            line,
            question,
            decision,
        } in assertions
        {
            let said = world.decide(question);
            if said != *decision {
                self.fail(format!("`{line}`: the oracle says {}", said.reason));
            }
        }
    }

    async fn agree(&mut self, world: &World, executor: Executor) {
        for line in executor
            .disagreements(self.client, world, &self.scenario.names)
            .await
        {
            self.fail(line);
        }
    }

    pub(crate) fn fail(&mut self, line: String) {
        self.failures
            .push(format!("{}: {line}", self.scenario.file));
    }
}

/// A step's SQL for this shape of `profiles`, the one table of which a scenario says `user_id`.
fn in_shape(shape: Shape, sql: &str) -> String {
    let parts: Vec<&str> = sql.split("user_id").collect();
    if parts.len() > 1 {
        let is_part_of_a_word = |c: char| c.is_alphanumeric() || c == '_';
        let is_a_word = parts.windows(2).all(|around| {
            !around[0].ends_with(is_part_of_a_word) && !around[1].starts_with(is_part_of_a_word)
        });
        assert!(is_a_word && sql.contains("profiles"), "{sql}");
    }
    parts.join(shape.user_column())
}

/// Whether the scenario begins with a user of several organizations, which shape B cannot hold.
pub(crate) fn has_user_of_several(scenario: &Scenario) -> bool {
    let world = &scenario.world;
    let mut users = scenario.names.users.iter();
    users.any(|user| world.memberships(user).count() > 1)
}

/// Runs every file that the database's shape can hold; `check` is called after the data and after each step.
pub(crate) async fn run_all(database: &Database, mut check: impl AsyncFnMut(&mut Run<'_>, &World)) {
    let mut client = database.client().await;
    let mut failures = Vec::new();
    for scenario in scenario::all() {
        if database.shape == Shape::B && has_user_of_several(&scenario) {
            continue;
        }
        let mut run = Run::begin(&scenario, database, &mut client).await;
        let world = run.world().await;
        run.assert(&world, &scenario.assertions);
        check(&mut run, &world).await;
        for step in &scenario.steps {
            run.take(step).await;
            let world = run.world().await;
            run.assert(&world, &step.assertions);
            check(&mut run, &world).await;
        }
        failures.append(&mut run.failures);
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[tokio::test]
async fn sql_decides_as_the_scenarios_state() {
    decides_in_sql(&Database::create().await).await;
}

/// The matrix is stale here, or was never filled: nobody may believe it.
pub(crate) async fn decides_in_sql(database: &Database) {
    run_all(database, async |run, world| {
        for executor in Executor::ALWAYS {
            run.agree(world, executor).await;
        }
        refuse_users_of_several(run, world).await;
    })
    .await;
}

#[tokio::test]
async fn the_refreshed_matrix_decides_as_the_scenarios_state() {
    decides_in_the_refreshed_matrix(&Database::create().await).await;
}

pub(crate) async fn decides_in_the_refreshed_matrix(database: &Database) {
    run_all(database, async |run, world| {
        let refresh = "SELECT public.refresh_permission_materialized_views()";
        run.client.batch_execute(refresh).await.unwrap();
        for organization in &run.scenario.names.organizations {
            let is_true = "SELECT hallpass.matrix_is_true($1)";
            let row = run.client.query_one(is_true, &[&id(organization)]).await;
            assert!(row.unwrap().get::<_, bool>(0), "{organization}");
        }
        run.agree(world, Executor::Matrix).await;
        for executor in Executor::ALWAYS {
            run.agree(world, executor).await;
        }
    })
    .await;
}

#[tokio::test]
async fn grpc_decides_as_the_scenarios_state() {
    let cached = decides_over_grpc(&Database::create().await).await;
    // The first question about each subject is a miss; a busy machine adds some that found the lease too old.
    assert!(cached.cache > 4 * cached.database, "{cached:?}");
}

/// One service for all files: each finds the cache full of the answers of the one before.
pub(crate) async fn decides_over_grpc(database: &Database) -> Sources {
    let service = Service::start(database, REFRESH_INTERVAL).await;
    let mut cached = Sources::default();
    run_all(database, async |run, world| {
        let names = &run.scenario.names;
        service.catch_up(run.client).await;
        for freshness in [
            Freshness::MinimizeLatency,
            Freshness::FullyConsistent,
            Freshness::MinimizeLatency,
        ] {
            for (found, sources) in [
                service.check_disagreements(world, names, freshness).await,
                service.batch_disagreements(world, names, freshness).await,
                service.list_disagreements(world, names, freshness).await,
            ] {
                found.into_iter().for_each(|line| run.fail(line));
                match freshness {
                    Freshness::MinimizeLatency => cached.add(sources),
                    Freshness::FullyConsistent => assert_eq!(sources.cache, 0),
                }
            }
        }
    })
    .await;
    service.stop().await;
    cached
}

const OF_ONE_ORGANIZATION: [&str; 3] = [
    "SELECT public.user_has_org_permission($1, 'can_view')",
    "SELECT public.user_has_org_permission_enhanced($1, 'can_view')",
    "SELECT public.user_has_org_permission_enhanced($1, 'can_view', use_cache => false)",
];

/// A question without an organization has no answer for a user of several: better an error than another's rights.
async fn refuse_users_of_several(run: &mut Run<'_>, world: &World) {
    let names = &run.scenario.names;
    let several = names
        .users
        .iter()
        .filter(|user| world.memberships(user).count() > 1);
    for user in several {
        for sql in OF_ONE_ORGANIZATION {
            let error = run.client.query_one(sql, &[&id(user)]).await;
            let error = error.expect_err("an answer without an organization");
            assert_eq!(error.code(), Some(&SqlState::CARDINALITY_VIOLATION));
        }
    }
}
