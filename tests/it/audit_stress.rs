//! Writers, and streams with filters of all kinds that are cut and resumed at random, while a transaction is held open:
//! each stream gets what a query of the tables gives, in order, nothing lost and nothing twice.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hallpass_client::v1::{AuditFilter, ChangeType, stream_audit_entries_request::Start};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::{
    consumer::{Consumer, cursor},
    database::Database,
    server::{Server, config, head},
    sql::{lines, run, sqlstate, value},
};

const WRITERS: usize = 32;
const STREAMS: usize = 100;

/// Each writer has an organization of its own, so that none waits for another's rows.
const FILL: &str = "
INSERT INTO organizations (id, name) SELECT md5('o' || i)::uuid, 'School ' || i FROM generate_series(0, 31) i;
INSERT INTO profiles (org_id, user_id, role)
SELECT md5('o' || o)::uuid, md5('u' || u)::uuid, 'volunteer' FROM generate_series(0, 31) o, generate_series(0, 9) u;
INSERT INTO organization_permissions (org_id, permission_key)
SELECT o.id, t.permission_key FROM organizations o, organization_permission_templates t;
INSERT INTO profiles (org_id, user_id, role) SELECT NULL, md5('v' || i)::uuid, 'volunteer' FROM generate_series(1, 100) i;
INSERT INTO organizations (id, name) VALUES (md5('large')::uuid, 'Large');
UPDATE profiles SET org_id = md5('large')::uuid WHERE org_id IS NULL";

const CURSORS: &str = "
SELECT l.seq || '-' || lpad(to_hex(l.uid), 8, '0') || '.' || a.n
FROM hallpass.log l JOIN public.permission_audit_log a ON (a.entry_id, a.created_at) = (l.entry_id, l.created_at) WHERE";

async fn uuid(client: &Client, name: &str) -> String {
    value(client, &format!("SELECT md5('{name}')::uuid")).await
}

/// One transaction of one or several statements, some of many rows, some undone in part or as a whole.
fn transaction(random: &mut StdRng, writer: usize) -> String {
    let org = format!("md5('o{writer}')::uuid");
    let role = ["admin", "volunteer", "board_member", "committee_lead"]
        .choose(random)
        .unwrap();
    let user = format!("md5('u{}')::uuid", random.random_range(0..10));
    let one =
        format!("UPDATE profiles SET role = '{role}' WHERE org_id = {org} AND user_id = {user}");
    let all = format!("UPDATE profiles SET role = '{role}' WHERE org_id = {org}");
    let settings = format!(
        "UPDATE organization_permissions SET is_enabled = NOT coalesce(is_enabled, true) WHERE org_id = {org}"
    );
    let actor = format!("SELECT set_session_variables({user}, NULL, {org}, NULL, NULL, NULL)");
    match random.random_range(0..10) {
        0..4 => one,
        4 => all,
        5 => settings,
        6 => format!("BEGIN; {actor}; {one}; {settings}; COMMIT"),
        7 => format!("BEGIN; {one}; SAVEPOINT s; {all}; ROLLBACK TO s; {settings}; COMMIT"),
        8 => format!("BEGIN; {all}; ROLLBACK"),
        _ => format!("BEGIN ISOLATION LEVEL REPEATABLE READ; {actor}; {all}; {one}; COMMIT"),
    }
}

/// A filter, and the same in SQL.
async fn filter(client: &Client, random: &mut StdRng) -> (AuditFilter, String) {
    let mut filter = AuditFilter::default();
    let mut conditions = vec!["true".to_owned()];
    if random.random_bool(0.4) {
        filter.organization_id = uuid(client, &format!("o{}", random.random_range(0..32))).await;
        conditions.push(format!("a.org_id = '{}'", filter.organization_id));
    }
    if random.random_bool(0.2) {
        filter.affected_user_id = uuid(client, &format!("u{}", random.random_range(0..10))).await;
        conditions.push(format!(
            "a.affected_user_id = '{}'",
            filter.affected_user_id
        ));
    }
    if random.random_bool(0.2) {
        filter.actor_user_id = uuid(client, &format!("u{}", random.random_range(0..10))).await;
        conditions.push(format!("a.changed_by = '{}'", filter.actor_user_id));
    }
    if random.random_bool(0.2) {
        filter.permission = "can_view_budget".to_owned();
        conditions.push("a.permission_key = 'can_view_budget'".to_owned());
    }
    if random.random_bool(0.2) {
        filter.table = "profiles".to_owned();
        conditions.push("a.table_name = 'profiles'".to_owned());
    }
    if random.random_bool(0.2) {
        filter.change_type = ChangeType::Update.into();
        conditions.push("a.change_type = 'UPDATE'".to_owned());
    }
    (filter, conditions.join(" AND "))
}

/// What a consumer has taken: it acknowledges whole events, and is cut between two of them, or within one.
struct Taken {
    cursors: Vec<String>,
    cuts: usize,
}

/// Follows the log from its beginning until everything up to the entry that `last` says is there.
async fn consume(
    server: Arc<Server>,
    filter: AuditFilter,
    last: tokio::sync::watch::Receiver<i64>,
    mut random: StdRng,
) -> Taken {
    let mut taken = Taken {
        cursors: Vec::new(),
        cuts: 0,
    };
    let mut acknowledged = Start::Earliest(true);
    loop {
        let events = random.random_range(1..40);
        let mut consumer = Consumer::start(&server.channel, acknowledged.clone(), filter.clone())
            .await
            .unwrap();
        for _ in 0..events {
            consumer.next().await.unwrap();
            let entries = std::mem::take(&mut consumer.entries);
            // Sometimes it dies in the middle of a batch, and has dealt with the first entries only.
            let dealt_with = match random.random_range(0..20) {
                0 if !entries.is_empty() => random.random_range(1..=entries.len()),
                _ => entries.len(),
            };
            taken.cursors.extend(
                entries[..dealt_with]
                    .iter()
                    .map(|entry| entry.cursor.clone()),
            );
            if dealt_with < entries.len() {
                consumer.cursor.clone_from(&entries[dealt_with - 1].cursor);
            }
            acknowledged = cursor(&*consumer.cursor);
            assert_eq!(consumer.gaps, []);
            let reached = consumer
                .cursor
                .split('-')
                .next()
                .unwrap()
                .parse::<i64>()
                .unwrap();
            let last = *last.borrow();
            if reached >= last && !consumer.cursor.contains('.') {
                return taken;
            }
            if dealt_with < entries.len() {
                break;
            }
        }
        taken.cuts += 1;
    }
}

async fn stress(duration: Duration, seed: u64) {
    let database = Arc::new(Database::create().await);
    let client = database.client().await;
    run(&client, FILL).await;
    let server = Arc::new(Server::start(config(&database.url)).await);
    // Holds back the horizon of the whole cluster, and has a number that is older than everything that is committed.
    let held = database.client().await;
    run(&held, "BEGIN ISOLATION LEVEL REPEATABLE READ; CREATE TEMPORARY TABLE held (); SELECT pg_current_xact_id()").await;

    let mut random = StdRng::seed_from_u64(seed);
    let is_over = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (database, is_over) = (Arc::clone(&database), Arc::clone(&is_over));
        let mut random = StdRng::seed_from_u64(random.random());
        writers.spawn(async move {
            let client = database.client().await;
            let mut written = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                let sql = transaction(&mut random, writer);
                match client.batch_execute(&sql).await {
                    Ok(()) => written += 1,
                    // Whoever cannot be serialized begins again.
                    Err(error) if sqlstate(&error) == "40001" => run(&client, "ROLLBACK").await,
                    Err(error) => panic!("{error:?}"),
                }
            }
            written
        });
    }
    let (reached, last) = tokio::sync::watch::channel(i64::MAX);
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let (filter, condition) = filter(&client, &mut random).await;
        let (server, last) = (Arc::clone(&server), last.clone());
        let random = StdRng::seed_from_u64(random.random());
        streams.spawn(async move { (condition, consume(server, filter, last, random).await) });
    }
    let began = Instant::now();
    while began.elapsed() < duration {
        // Streams meet both large entries and the catalog's, which are nobody's.
        let all =
            "UPDATE profiles SET role = CASE role WHEN 'admin' THEN 'volunteer' ELSE 'admin' END
                   WHERE org_id = md5('large')::uuid";
        run(&client, all).await;
        run(
            &client,
            "UPDATE permission_roles SET rank = rank + 1 WHERE role_key = 'admin'",
        )
        .await;
    }
    is_over.store(true, Ordering::Relaxed);
    let mut written = 0;
    while let Some(writer) = writers.join_next().await {
        written += writer.unwrap();
    }
    reached.send(head(&client).await).unwrap();
    let (mut entries, mut cuts) = (0, 0);
    while let Some(stream) = streams.join_next().await {
        let (condition, taken) = stream.unwrap();
        let expected = lines(
            &client,
            &format!("{CURSORS} {condition} ORDER BY l.seq, a.n"),
        )
        .await;
        assert!(
            taken.cursors == expected,
            "{condition}: {} of {}",
            taken.cursors.len(),
            expected.len()
        );
        entries += taken.cursors.len();
        cuts += taken.cuts;
    }
    run(&held, "ROLLBACK").await;
    println!(
        "{written} transactions of {WRITERS} writers; {STREAMS} streams took {entries} entries, cut {cuts} times"
    );
    // Each, by and large; on a machine that is busy, some.
    assert!(cuts > STREAMS / 4, "{cuts}");
}

/// Some seconds of it, always.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_cut_lose_nothing_and_repeat_nothing() {
    stress(Duration::from_secs(1), 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes some minutes: make audit-stress"]
async fn streams_that_are_cut_for_long_lose_nothing() {
    stress(Duration::from_secs(10), rand::rng().random()).await;
}
