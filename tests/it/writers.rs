//! An application at work on its tables: short transactions of every sort, each statement timed, and what they committed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::{
    database::{Database, connect, eventually},
    pto::as_owner,
    sql::{lines, run},
};

const WRITERS: usize = 8;

/// Some 20,000 members, so that what reads them all takes a moment. Each writer has an organization of its own.
const GROW: &str = "
SET ROLE pto_owner;
INSERT INTO organizations (id, name, slug, signup_code)
SELECT ('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid, 'Org ' || i, 'org' || i, 'ORG-' || i
FROM generate_series(0, 47) i;
INSERT INTO profiles (user_id, org_id, role)
SELECT ('00000000-0000-4000-9000-' || lpad(i::text, 12, '0'))::uuid,
       ('00000000-0000-4000-8000-' || lpad((i % 48)::text, 12, '0'))::uuid, 'volunteer'
FROM generate_series(0, 20159) i;
INSERT INTO transactions (org_id, amount) SELECT id, 7 FROM organizations;
SELECT refresh_permission_materialized_views();
RESET ROLE;
ANALYZE";

/// `$org`, `$user`: the writer's own. `$label`: no other statement has it.
const SET_ROLE: &str =
    "UPDATE profiles SET role = '$label' WHERE org_id = '$org' AND user_id = '$user'";
const SET_OVERRIDE: &str = "
INSERT INTO organization_permissions (org_id, permission_key, min_role_required) VALUES ('$org', 'can_send_emails', '$label')
ON CONFLICT (org_id, permission_key) DO UPDATE SET min_role_required = excluded.min_role_required";
const SHIFTS: [&[&str]; 9] = [
    &[SET_ROLE],
    &[SET_OVERRIDE],
    &["BEGIN", SET_ROLE, SET_OVERRIDE, "COMMIT"],
    &["BEGIN", SET_OVERRIDE, SET_ROLE, "COMMIT"],
    &[
        "INSERT INTO profiles (user_id, org_id, role) VALUES (md5('$label')::uuid, '$org', 'volunteer')",
        "DELETE FROM profiles WHERE user_id = md5('$label')::uuid",
    ],
    &[
        "SELECT permission_key, module_name, user_has_permission FROM user_permission_matrix
         WHERE user_id = '$user' AND org_id = '$org' AND is_enabled = true",
    ],
    &["SELECT user_has_org_permission('$user', 'can_send_emails')"],
    &["SELECT user_has_org_permission_enhanced('$user', 'can_send_emails', false)"],
    &[
        "BEGIN",
        "SET LOCAL ROLE authenticated",
        "SELECT set_config('request.jwt.claims', '{\"sub\": \"$user\"}', true)",
        "SELECT count(*) FROM transactions",
        "SELECT user_has_org_permission_enhanced('$user', 'can_view_budget', true)",
        "COMMIT",
    ],
];

/// What a writer has committed under a label.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) label: String,
    pub(crate) sets_role: bool,
    pub(crate) sets_override: bool,
}

/// What came of one writer's work, in its order.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) changes: Vec<Change>,
    pub(crate) failures: Vec<String>,
    pub(crate) slowest: Duration,
    pub(crate) slowest_statement: String,
}

pub(crate) struct Writers {
    work: JoinSet<Work>,
    counts: Arc<[AtomicUsize; WRITERS]>,
    is_over: Arc<AtomicBool>,
}

pub(crate) async fn grow(client: &Client) {
    run(client, GROW).await;
}

impl Writers {
    pub(crate) async fn start(database: &Database) -> Self {
        let counts = Arc::new([const { AtomicUsize::new(0) }; WRITERS]);
        let is_over = Arc::new(AtomicBool::new(false));
        let mut work = JoinSet::new();
        for number in 0..WRITERS {
            let client = connect(&as_owner(&database.url)).await;
            // They say when a statement waits too long, as an application's do: nothing here is meant to.
            run(&client, "SET lock_timeout = 0; SET ROLE service_role").await;
            let (counts, is_over) = (Arc::clone(&counts), Arc::clone(&is_over));
            work.spawn(async move {
                let mut work = Work::default();
                for n in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    shift(&client, number, n, &mut work).await;
                    counts[number].fetch_add(1, Ordering::Relaxed);
                }
                work
            });
        }
        Self {
            work,
            counts,
            is_over,
        }
    }

    /// Waits until each has done so many transactions more.
    pub(crate) async fn work_on(&self, transactions: usize) {
        let counts = || {
            self.counts
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
        };
        let goals: Vec<usize> = counts().map(|count| count + transactions).collect();
        eventually("every writer gets on", async || {
            counts().zip(&goals).all(|(count, goal)| count >= *goal)
        })
        .await;
    }

    pub(crate) async fn stop(self) -> Vec<Work> {
        self.is_over.store(true, Ordering::Relaxed);
        self.work.join_all().await
    }
}

async fn shift(client: &Client, writer: usize, n: usize, work: &mut Work) {
    let statements = SHIFTS[n % SHIFTS.len()];
    let label = format!("w{writer}.{n:06}");
    for statement in statements {
        let member = writer + 48 * (n % 400);
        let sql = statement
            .replace("$label", &label)
            .replace("$org", &format!("00000000-0000-4000-8000-{writer:012}"))
            .replace("$user", &format!("00000000-0000-4000-9000-{member:012}"));
        let began = Instant::now();
        let done = client.simple_query(&sql).await;
        let took = began.elapsed();
        if took > work.slowest {
            (work.slowest, work.slowest_statement) = (took, sql.clone());
        }
        if let Err(error) = done {
            work.failures
                .push(format!("{:?} {error:?}: {sql}", error.code()));
            drop(client.simple_query("ROLLBACK").await);
            return;
        }
    }
    let sets = |statement: &str| statements.contains(&statement);
    if sets(SET_ROLE) || sets(SET_OVERRIDE) {
        work.changes.push(Change {
            label,
            sets_role: sets(SET_ROLE),
            sets_override: sets(SET_OVERRIDE),
        });
    }
}

/// Samples who waits for a lock, and how long by then, but for hallpass itself: what a busy machine does not make longer.
pub(crate) struct Waits {
    longest: tokio::task::JoinHandle<(f64, String)>,
    is_over: Arc<AtomicBool>,
}

const WAITING: &str = "
SELECT extract(epoch FROM clock_timestamp() - waitstart)::float8,
       format('%s %s: %s', locktype, coalesce(relation::regclass::text, ''), left(query, 60))
FROM pg_locks JOIN pg_stat_activity a USING (pid)
WHERE NOT granted AND waitstart IS NOT NULL AND application_name <> 'hallpass' AND datname = current_database()
ORDER BY 1 DESC LIMIT 1";

impl Waits {
    pub(crate) fn watch(client: Client) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&is_over);
        let longest = tokio::spawn(async move {
            let mut longest = (0.0, String::new());
            let mut ticks = tokio::time::interval(Duration::from_millis(2));
            while !seen.load(Ordering::Relaxed) {
                for line in lines(&client, WAITING).await {
                    let (seconds, what) = line.split_once(" | ").unwrap();
                    let seconds: f64 = seconds.parse().unwrap();
                    if seconds > longest.0 {
                        longest = (seconds, what.to_owned());
                    }
                }
                ticks.tick().await;
            }
            longest
        });
        Self { longest, is_over }
    }

    /// The longest wait in seconds, and for what.
    pub(crate) async fn stop(self) -> (f64, String) {
        self.is_over.store(true, Ordering::Relaxed);
        self.longest.await.unwrap()
    }
}
