//! An application that goes on working while hallpass is put on its database and taken off again.
//!
//! What it may notice is a wait. The wait is read from the locks, by when each began: how long a statement takes besides
//! is the machine's affair.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use hallpass::store::migrations::{Progress, migrate, uninstall};
use tokio::sync::mpsc::unbounded_channel;
use tokio_postgres::Client;

use crate::{
    adopt_cases::PHASE_2,
    database::Shape,
    pto::{OLD_AUDIT_LOG, as_owner, resolve},
    sql::lines,
    writers::{Change, Waits, Work, Writers, grow},
};

/// PostgreSQL's default deadlock_timeout, after which it looks for somebody to fail.
const WAIT_MAX_S: f64 = 1.0;

/// The labels that a log has of a table, with how often.
async fn labels(client: &Client, log: &str, column: &str) -> BTreeMap<String, usize> {
    let sql = format!(
        "SELECT new_values ->> '{column}' FROM {log}
         WHERE new_values ->> '{column}' LIKE 'w_.%' AND new_values ->> '{column}' IS DISTINCT FROM old_values ->> '{column}'"
    );
    let mut labels = BTreeMap::new();
    for label in lines(client, &sql).await {
        *labels.entry(label).or_default() += 1;
    }
    labels
}

struct Logs {
    old: BTreeMap<String, usize>,
    overrides: BTreeMap<String, usize>,
    roles: BTreeMap<String, usize>,
}

async fn read_logs(client: &Client, old: &str, new: &str) -> Logs {
    Logs {
        old: labels(client, old, "min_role_required").await,
        overrides: labels(client, new, "min_role_required").await,
        roles: labels(client, new, "role").await,
    }
}

impl Logs {
    /// Whether hallpass recorded a change, whole and once; if not, that PTO Connect's log has of it what it has of any.
    fn is_recorded_by_hallpass(&self, change: &Change) -> bool {
        let count = |log: &BTreeMap<String, usize>| log.get(&change.label).copied().unwrap_or(0);
        let (old, overrides, roles) =
            (count(&self.old), count(&self.overrides), count(&self.roles));
        let is_new = overrides + roles > 0;
        let of_override = usize::from(change.sets_override);
        let expected = if is_new {
            (0, of_override, usize::from(change.sets_role))
        } else {
            (of_override, 0, 0)
        };
        assert_eq!((old, overrides, roles), expected, "{change:?}");
        is_new
    }
}

/// No statement has failed, and of each writer the changes before the switch are in one log, those after it in the other:
/// `order` says of which it is hallpass's.
fn account(work: &[Work], logs: &Logs, order: [bool; 2]) {
    for work in work {
        assert_eq!(work.failures, [""; 0]);
        let mut whose: Vec<bool> = work
            .changes
            .iter()
            .map(|c| logs.is_recorded_by_hallpass(c))
            .collect();
        whose.dedup();
        assert_eq!(whose, order);
    }
    let known: BTreeSet<&String> = work
        .iter()
        .flat_map(|work| work.changes.iter().map(|change| &change.label))
        .collect();
    for log in [&logs.old, &logs.overrides, &logs.roles] {
        let unknown = log.keys().find(|label| !known.contains(label));
        assert_eq!(unknown, None, "recorded, and not committed");
    }
}

fn report(step: &str, began: Instant, work: &[Work], (wait_s, what): &(f64, String)) {
    let slowest = work.iter().max_by_key(|work| work.slowest).unwrap();
    println!(
        "{step}: longest wait for a lock {:.0} ms ({what}); slowest statement {:?}: {}; in {:?}",
        wait_s * 1000.0,
        slowest.slowest,
        slowest.slowest_statement,
        began.elapsed()
    );
    assert!(*wait_s < WAIT_MAX_S, "{step}: {wait_s} s for {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_fails_or_waits_long_and_each_change_is_recorded_once() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    grow(&client).await;
    let url = as_owner(&database.url).parse().unwrap();

    let writers = Writers::start(&database).await;
    writers.work_on(20).await;
    let waits = Waits::watch(database.client().await);
    let began = Instant::now();
    migrate(&url, |_| {}).await.unwrap();
    let waited = waits.stop().await;
    writers.work_on(20).await;
    let work = writers.stop().await;
    report("migrate", began, &work, &waited);
    let logs = read_logs(&client, OLD_AUDIT_LOG, "permission_audit_log").await;
    account(&work, &logs, [false, true]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_fails_or_waits_long_when_it_is_taken_off() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    grow(&client).await;
    let url = as_owner(&database.url).parse().unwrap();
    migrate(&url, |_| {}).await.unwrap();

    let writers = Writers::start(&database).await;
    writers.work_on(20).await;
    let waits = Waits::watch(database.client().await);
    let began = Instant::now();
    uninstall(&url, |_| {}).await.unwrap();
    let waited = waits.stop().await;
    writers.work_on(20).await;
    let work = writers.stop().await;
    report("uninstall", began, &work, &waited);
    let logs = read_logs(&client, "permission_audit_log", "hallpass_audit_log").await;
    account(&work, &logs, [true, false]);
}

/// The one that holds the lock is waited for; the others are not made to wait with us.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_transaction_is_waited_for_and_others_go_on() {
    let database = PHASE_2.found().await;
    let mut client = database.client().await;
    grow(&client).await;
    let url = as_owner(&database.url).parse().unwrap();
    let long = client.transaction().await.unwrap();
    let change = "UPDATE organization_permissions SET min_role_required = 'w0.long'
                  WHERE org_id = :lincoln AND permission_key = 'can_send_emails'";
    long.batch_execute(&resolve(Shape::A, change))
        .await
        .unwrap();

    let (told, mut telling) = unbounded_channel();
    let migrating =
        tokio::spawn(async move { migrate(&url, |progress| told.send(progress).unwrap()).await });
    while telling.recv().await.unwrap() != Progress::Waiting("0003_record_changes") {}
    let began = Instant::now();
    let waits = Waits::watch(database.client().await);
    let writers = Writers::start(&database).await;
    writers.work_on(30).await;
    let waited = waits.stop().await;
    assert!(!migrating.is_finished());
    long.commit().await.unwrap();
    migrating.await.unwrap().unwrap();
    writers.work_on(10).await;
    let work = writers.stop().await;
    report("waiting", began, &work, &waited);

    let mut told = Vec::new();
    while let Some(progress) = telling.recv().await {
        told.push(progress);
    }
    assert_eq!(
        told[0],
        Progress::Applied("0003_record_changes"),
        "told once"
    );
    let mut logs = read_logs(&client, OLD_AUDIT_LOG, "permission_audit_log").await;
    assert_eq!(logs.old.remove("w0.long"), Some(1));
    account(&work, &logs, [false, true]);
}
