//! When the matrix is believed: never where it differs from the live view, whoever refreshes it and how.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{sync::Semaphore, task::JoinSet};
use tokio_postgres::Client;

use crate::{
    database::Database,
    sql::{lines, run, sqlstate, value},
};

/// Two organizations of two members, a catalog of two; everything refreshed.
const SEED: &str = "
TRUNCATE organizations, profiles, organization_permissions, organization_permission_templates CASCADE;
CREATE FUNCTION public.id(name text) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$ SELECT md5(name)::uuid $$;
INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
    VALUES ('m', 'view', 'View', 'volunteer'), ('m', 'edit', 'Edit', 'admin');
INSERT INTO organizations (id, name) SELECT id('org' || i), i FROM generate_series(1, $orgs) i;
INSERT INTO profiles (org_id, user_id, role)
    SELECT id('org' || i), id('user' || j), 'volunteer' FROM generate_series(1, $orgs) i, generate_series(1, $users) j;
INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
    SELECT id('org' || i), 'view', 'admin' FROM generate_series(1, $orgs) i;
SELECT refresh_permission_materialized_views()";

/// In one statement, hence one snapshot: how many decisions of `hallpass.load_in_snapshot` (what `hallpass.load` calls
/// after its locks) and of the live view are not in the other, or counts of an organization differ from the counts of
/// `org_permission_summary` that are believed, and how many organizations the matrix was believed for. All
/// pairs of an organization and a user are asked.
const COMPARE: &str = "
WITH asked AS (
    SELECT array_agg(id('org' || i)) AS orgs, array_agg(id('user' || j)) AS users
    FROM generate_series(1, $orgs) i, generate_series(1, $users) j
), loaded AS MATERIALIZED (
    SELECT l.org_id, l.user_id, l.role, decided.*
    FROM asked, hallpass.load_in_snapshot(orgs, users, true) l,
         unnest(l.permission_keys, l.reasons, l.min_roles, l.enabled) decided (permission, reason, min_role, enabled)
    WHERE l.org_id IS NOT NULL
), live AS MATERIALIZED (
    SELECT org_id, user_id, role, permission_key, reason, effective_min_role, is_enabled
    FROM effective_user_permissions
)
SELECT (SELECT count(*) FROM (TABLE loaded EXCEPT TABLE live) x) + (SELECT count(*) FROM (TABLE live EXCEPT TABLE loaded) x)
       + (SELECT count(*) FROM generate_series(1, $orgs) i
          WHERE (SELECT s::text FROM hallpass.organization_summary_in_snapshot(id('org' || i), true) s)
                IS DISTINCT FROM (SELECT s::text FROM hallpass.organization_summary_in_snapshot(id('org' || i), false) s)),
       (SELECT count(*) FROM generate_series(1, $orgs) i WHERE hallpass.matrix_is_true(id('org' || i)))";

const REFRESH: &str = "SELECT refresh_permission_materialized_views()";
const BY_HAND: &str = "REFRESH MATERIALIZED VIEW user_permission_matrix";
const BY_HAND_CONCURRENTLY: &str = "REFRESH MATERIALIZED VIEW CONCURRENTLY user_permission_matrix";
const SUMMARY_BY_HAND: &str = "REFRESH MATERIALIZED VIEW org_permission_summary";

fn sized(sql: &str, orgs: usize, users: usize) -> String {
    sql.replace("$orgs", &orgs.to_string())
        .replace("$users", &users.to_string())
}

async fn seeded(orgs: usize, users: usize) -> (Database, Client) {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, &sized(SEED, orgs, users)).await;
    (database, client)
}

/// Which organizations the matrix is believed for, as this session sees it; panics where it is and differs.
async fn believed(client: &Client) -> String {
    let differences = lines(client, &sized(COMPARE, 2, 2)).await.remove(0);
    assert!(
        differences.starts_with("0 | "),
        "differences | believed: {differences}"
    );
    let is_true =
        |org| format!("CASE WHEN hallpass.matrix_is_true(id('{org}')) THEN '{org} ' ELSE '' END");
    let sql = format!("SELECT trim({} || {})", is_true("org1"), is_true("org2"));
    value(client, &sql).await
}

/// Sessions by their letter run one statement after another; `?` asks which organizations are believed.
struct Case {
    name: &'static str,
    steps: &'static [(char, &'static str, &'static str)],
}

const CHANGE_1: &str = "UPDATE profiles SET role = role || 'x' WHERE org_id = id('org1')";
const CHANGE_2: &str = "UPDATE profiles SET role = role || 'x' WHERE org_id = id('org2')";

/// A step that is a question has the answer last; one that fails its SQLSTATE; any other nothing.
const CASES: &[Case] = &[
    Case {
        name: "a change is one organization's, until the next refresh",
        steps: &[
            ('a', "?", "org1 org2"),
            ('a', CHANGE_1, ""),
            ('a', "?", "org2"),
            ('a', REFRESH, ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "a statement that changes nothing leaves the matrix the truth",
        steps: &[
            ('a', "UPDATE profiles SET role = role, first_name = 'x'", ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "the catalog is everything",
        steps: &[
            (
                'a',
                "UPDATE organization_permission_templates SET default_min_role = 'volunteer'",
                "",
            ),
            ('a', "?", ""),
            ('a', REFRESH, ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "own changes that have no number yet are not in the matrix, others' are no concern",
        steps: &[
            ('a', "BEGIN", ""),
            ('a', CHANGE_1, ""),
            ('a', "?", ""),
            ('b', "?", "org1 org2"),
            ('a', "ROLLBACK", ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "own changes that have a number already are not either",
        steps: &[
            ('a', "BEGIN", ""),
            ('a', CHANGE_1, ""),
            ('a', "SET CONSTRAINTS ALL IMMEDIATE", ""),
            ('a', "?", ""),
            ('b', "?", "org1 org2"),
            ('a', "COMMIT", ""),
            ('a', "?", "org2"),
        ],
    },
    Case {
        name: "by hand",
        steps: &[
            ('a', CHANGE_1, ""),
            ('a', BY_HAND, ""),
            ('a', "?", "org1 org2"),
            ('a', CHANGE_2, ""),
            ('a', BY_HAND_CONCURRENTLY, ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "the summary's refresh says nothing of the matrix",
        steps: &[
            ('a', CHANGE_1, ""),
            ('a', SUMMARY_BY_HAND, ""),
            ('a', "?", "org2"),
        ],
    },
    Case {
        name: "a refresh within the transaction that changes",
        steps: &[
            ('a', "BEGIN", ""),
            ('a', CHANGE_1, ""),
            ('a', REFRESH, ""),
            ('a', "?", ""),
            ('a', "COMMIT", ""),
            ('a', "?", "org2"),
        ],
    },
    Case {
        name: "a refresh that is rolled back",
        steps: &[
            ('a', CHANGE_1, ""),
            ('a', "BEGIN", ""),
            ('a', REFRESH, ""),
            ('a', "?", "org1 org2"),
            ('a', "ROLLBACK", ""),
            ('a', "?", "org2"),
            ('a', "BEGIN", ""),
            ('a', BY_HAND, ""),
            ('a', "?", "org1 org2"),
            ('a', "ROLLBACK", ""),
            ('a', "?", "org2"),
        ],
    },
    Case {
        name: "a refresh while another transaction has changed and not committed",
        steps: &[
            ('a', "BEGIN", ""),
            ('a', CHANGE_1, ""),
            ('b', REFRESH, ""),
            ('b', "?", "org1 org2"),
            ('a', "COMMIT", ""),
            ('b', "?", "org2"),
        ],
    },
    Case {
        name: "a refresh from a snapshot older than a change",
        steps: &[
            ('a', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT", ""),
            ('b', CHANGE_1, ""),
            ('a', REFRESH, ""),
            ('a', "COMMIT", ""),
            ('a', "?", "org2"),
        ],
    },
    Case {
        name: "a refresh from a snapshot older than another refresh",
        steps: &[
            ('a', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT", ""),
            ('b', CHANGE_1, ""),
            ('b', REFRESH, ""),
            ('a', REFRESH, "40001"),
            ('a', "ROLLBACK", ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "the same, not concurrently",
        steps: &[
            ('a', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT", ""),
            ('b', CHANGE_1, ""),
            ('b', REFRESH, ""),
            ('a', BY_HAND, "40001"),
            ('a', "ROLLBACK", ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "a reader whose snapshot is older than a refresh",
        steps: &[
            ('a', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT", ""),
            ('b', CHANGE_1, ""),
            ('b', REFRESH, ""),
            ('b', "?", "org1 org2"),
            ('a', "?", "org1 org2"),
            ('a', "COMMIT", ""),
        ],
    },
    Case {
        name: "a reader whose snapshot is older than a refresh that was not concurrent meets another's rows",
        steps: &[
            ('a', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT", ""),
            ('b', CHANGE_1, ""),
            ('b', BY_HAND, ""),
            ('b', "?", "org1 org2"),
            ('a', "?", ""),
            ('a', "COMMIT", ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "without data",
        steps: &[
            (
                'a',
                "REFRESH MATERIALIZED VIEW user_permission_matrix WITH NO DATA",
                "",
            ),
            (
                'a',
                "REFRESH MATERIALIZED VIEW org_permission_summary WITH NO DATA",
                "",
            ),
            ('a', "?", ""),
            ('a', REFRESH, ""),
            ('a', "?", "org1 org2"),
        ],
    },
    Case {
        name: "rewritten",
        steps: &[
            ('a', "VACUUM FULL user_permission_matrix", ""),
            ('a', "?", "org1 org2"),
        ],
    },
];

#[tokio::test]
async fn the_matrix_is_believed_where_it_is_the_truth() {
    let (database, a) = seeded(2, 2).await;
    let b = database.client().await;
    for case in CASES {
        println!("{}", case.name);
        run(&a, REFRESH).await;
        for (session, sql, expected) in case.steps {
            let session = if *session == 'a' { &a } else { &b };
            if *sql == "?" {
                assert_eq!(believed(session).await, *expected, "{}", case.name);
                continue;
            }
            let failed = session.batch_execute(sql).await.err();
            let failed = failed.as_ref().map_or("", sqlstate);
            assert_eq!(failed, *expected, "{}: {sql}", case.name);
        }
    }
}

const ORGS: usize = 4;
const USERS: usize = 6;
const WRITERS: u64 = 4;
const REFRESHERS: u64 = 3;
const CHECKERS: u64 = 4;

/// Comparisons of each checker, of all organizations each.
const COMPARISONS: usize = 200;

const CHANGES_PER_REFRESH: usize = 1;

/// `$o` and `$p` are organizations, `$u` a user, `$r` a role.
const CHANGES: [&str; 11] = [
    "UPDATE profiles SET role = '$r' WHERE org_id = id('org$o') AND user_id = id('user$u')",
    "UPDATE profiles SET role = '$r' WHERE org_id = id('org$o')",
    "INSERT INTO profiles (org_id, user_id, role) VALUES (id('org$o'), id('user$u'), '$r')
     ON CONFLICT (org_id, user_id) DO UPDATE SET role = '$r'",
    "DELETE FROM profiles WHERE org_id = id('org$o') AND user_id = id('user$u')",
    "UPDATE profiles SET org_id = id('org$p') WHERE org_id = id('org$o') AND user_id = id('user$u')
     AND NOT EXISTS (SELECT FROM profiles WHERE org_id = id('org$p') AND user_id = id('user$u'))",
    "INSERT INTO organization_permissions (org_id, permission_key, min_role_required) VALUES (id('org$o'), 'edit', '$r')
     ON CONFLICT (org_id, permission_key) DO UPDATE SET min_role_required = '$r'",
    "UPDATE organization_permissions SET specific_users = ARRAY[id('user$u')] WHERE org_id = id('org$o')",
    "UPDATE organization_permissions SET is_enabled = NOT is_enabled WHERE org_id = id('org$o')",
    "DELETE FROM organization_permissions WHERE org_id = id('org$o') AND permission_key = 'edit'",
    "UPDATE organization_permission_templates SET default_min_role = '$r' WHERE permission_key = 'edit'",
    "UPDATE permission_roles SET rank = 5 - rank WHERE role_key = '$r'",
];

/// The last two are everything, and would leave nothing to believe if they came as often as the others.
const CHANGES_OF_ONE: usize = CHANGES.len() - 2;

const LEVELS: [&str; 3] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"];

struct Session {
    client: Client,
    random: StdRng,
}

/// What the concurrent run came to.
struct Tally {
    done: AtomicBool,
    /// Each attempt to refresh lets [`CHANGES_PER_REFRESH`] transactions of writers go on, or on a busy machine they
    /// would leave nothing to believe.
    changes_due: Semaphore,
    compared: AtomicU64,
    believed: AtomicU64,
    refreshed: AtomicU64,
    changed: AtomicU64,
}

impl Session {
    fn change(&mut self) -> String {
        let changes = if self.random.random_bool(0.03) {
            CHANGES.len()
        } else {
            CHANGES_OF_ONE
        };
        let role = ["volunteer", "committee_lead", "admin"][self.random.random_range(0..3)];
        CHANGES[self.random.random_range(0..changes)]
            .replace("$o", &self.random.random_range(1..=ORGS).to_string())
            .replace("$p", &self.random.random_range(1..=ORGS).to_string())
            .replace("$u", &self.random.random_range(1..=USERS).to_string())
            .replace("$r", role)
    }

    /// Runs a statement; false where it failed as concurrent transactions may, and was rolled back.
    async fn run(&self, sql: &str) -> bool {
        let Err(error) = self.client.batch_execute(sql).await else {
            return true;
        };
        // Not serializable, deadlock, the membership is there already.
        let state = sqlstate(&error);
        assert!(
            ["40001", "40P01", "23505"].contains(&state),
            "{error:?}\n{sql}"
        );
        run(&self.client, "ROLLBACK").await;
        false
    }

    async fn begin(&mut self) -> bool {
        let level = LEVELS[self.random.random_range(0..LEVELS.len())];
        self.begin_at(level).await
    }

    /// The snapshot of a level that has one begins here.
    async fn begin_at(&self, level: &str) -> bool {
        let begin = "BEGIN ISOLATION LEVEL";
        self.run(&format!(
            "{begin} {level}; SELECT count(*) FROM hallpass.log_org"
        ))
        .await
    }

    async fn pause(&mut self, millis_max: u64) {
        let pause = Duration::from_micros(self.random.random_range(0..millis_max * 1000));
        tokio::time::sleep(pause).await;
    }

    async fn end(&mut self) -> bool {
        let commits = self.random.random_bool(0.8);
        self.run(if commits { "COMMIT" } else { "ROLLBACK" }).await && commits
    }

    async fn write(&mut self, tally: &Tally) {
        let Ok(due) = tally.changes_due.acquire().await else {
            return;
        };
        due.forget();
        self.pause(10).await;
        if !self.begin().await {
            return;
        }
        for _ in 0..self.random.random_range(1..3) {
            let change = self.change();
            if !self.run(&change).await {
                return;
            }
        }
        if self.random.random_bool(0.1) && !self.run("SET CONSTRAINTS ALL IMMEDIATE").await {
            return;
        }
        if self.end().await {
            tally.changed.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn refresh(&mut self, tally: &Tally) {
        let refresh = [
            REFRESH,
            REFRESH,
            BY_HAND,
            BY_HAND_CONCURRENTLY,
            SUMMARY_BY_HAND,
        ][self.random.random_range(0..5)];
        self.pause(20).await;
        if self.random.random_bool(0.5) {
            if self.run(refresh).await {
                tally.refreshed.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
        if !self.begin().await {
            return;
        }
        self.pause(20).await;
        if self.random.random_bool(0.2) {
            let change = self.change();
            if !self.run(&change).await {
                return;
            }
        }
        if self.run(refresh).await && self.end().await {
            tally.refreshed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Compares in one snapshot, several times: of a transaction, which may have changes of its own.
    async fn check(&mut self, tally: &Tally) {
        let level = LEVELS[self.random.random_range(1..LEVELS.len())];
        if !self.begin_at(level).await {
            return;
        }
        if self.random.random_bool(0.05) {
            let change = self.change();
            if !self.run(&change).await {
                return;
            }
        }
        for _ in 0..self.random.random_range(1..=3) {
            let compared = self.client.simple_query(&sized(COMPARE, ORGS, USERS)).await;
            let row = match &compared {
                Ok(messages) => messages.iter().find_map(|message| match message {
                    tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
                    _ => None,
                }),
                Err(error) => {
                    assert_eq!(sqlstate(error), "40001", "{error:?}");
                    run(&self.client, "ROLLBACK").await;
                    return;
                }
            };
            let row = row.unwrap();
            assert_eq!(row.get(0), Some("0"), "decisions that differ");
            tally
                .compared
                .fetch_add(u64::try_from(ORGS).unwrap(), Ordering::Relaxed);
            tally
                .believed
                .fetch_add(row.get(1).unwrap().parse().unwrap(), Ordering::Relaxed);
            self.pause(5).await;
        }
        self.run("ROLLBACK").await;
    }
}

/// Whatever writers and refreshers do at once, a load that may believe the matrix and the live view agree in every
/// snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_believed_matrix_never_differs_from_the_view() {
    let (database, _client) = seeded(ORGS, USERS).await;
    let tally = Arc::new(Tally {
        done: AtomicBool::new(false),
        changes_due: Semaphore::new(0),
        compared: AtomicU64::new(0),
        believed: AtomicU64::new(0),
        refreshed: AtomicU64::new(0),
        changed: AtomicU64::new(0),
    });
    let session = async |seed| Session {
        client: database.client().await,
        random: StdRng::seed_from_u64(seed),
    };
    let mut others = JoinSet::new();
    for seed in 0..WRITERS {
        let (mut session, tally) = (session(seed).await, tally.clone());
        others.spawn(async move {
            while !tally.done.load(Ordering::Relaxed) {
                session.write(&tally).await;
            }
        });
    }
    for seed in 0..REFRESHERS {
        let (mut session, tally) = (session(100 + seed).await, tally.clone());
        others.spawn(async move {
            while !tally.done.load(Ordering::Relaxed) {
                session.refresh(&tally).await;
                tally.changes_due.add_permits(CHANGES_PER_REFRESH);
            }
        });
    }
    let began = Instant::now();
    let mut checkers = JoinSet::new();
    for seed in 0..CHECKERS {
        let (mut session, tally) = (session(200 + seed).await, tally.clone());
        checkers.spawn(async move {
            for _ in 0..COMPARISONS {
                session.check(&tally).await;
            }
        });
    }
    checkers.join_all().await;
    tally.done.store(true, Ordering::Relaxed);
    tally.changes_due.close();
    others.join_all().await;

    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (compared, believed) = (count(&tally.compared), count(&tally.believed));
    println!(
        "{compared} compared, {believed} believed, {} changes, {} refreshes, {:?}",
        count(&tally.changed),
        count(&tally.refreshed),
        began.elapsed()
    );
    assert!(
        compared > 2000 && believed > compared / 10,
        "{believed} of {compared} believed"
    );
    assert!(count(&tally.changed) > 50 && count(&tally.refreshed) > 50);
}
