//! The log's order is the order of commits: writers that do everything at once, and a reader that tails them in
//! small pages and must see each committed change once, whole, in order, and nothing else.

use std::{
    collections::{BTreeMap, HashMap},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;
use tokio_postgres::{Client, Error};

use crate::{
    database::Database,
    sql::{lines, pid, run, sqlstate, value, wait_until_blocked},
};

const WRITERS: usize = 16;

/// Attempts of each writer; some roll back, some fail to serialize.
const TRANSACTIONS_PER_WRITER: usize = 200;

/// Writers stop here on a machine that is too busy for all of them.
const WRITING_MAX: Duration = Duration::from_secs(12);

/// What makes the run worth its name.
const COMMITTED_MIN: usize = 500;

/// Small, so that most entries of the bulk updates span pages.
const PAGE_ROWS: usize = 7;

const OWN_MEMBERS: usize = 10;
const SHARED_MEMBERS: usize = 4;

const LEVELS: [&str; 3] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"];

/// Each writer has two organizations and a permission of its own; one organization is everyone's. An application's
/// own deferred trigger changes a membership at commit, and its deferred foreign key looks at a row that writers lock.
const SEED: &str = "
TRUNCATE organizations, profiles, organization_permissions, organization_permission_templates CASCADE;
CREATE FUNCTION public.org(kind text, w integer) RETURNS uuid LANGUAGE sql IMMUTABLE AS
    $$ SELECT md5(kind || w)::uuid $$;
CREATE FUNCTION public.person(w integer, i integer) RETURNS uuid LANGUAGE sql IMMUTABLE AS
    $$ SELECT md5('person' || w || '-' || i)::uuid $$;
INSERT INTO organizations (id, name)
    SELECT org(kind, w), kind || w FROM unnest('{first,second}'::text[]) kind, generate_series(0, 15) w
    UNION ALL SELECT org('shared', 0), 'shared';
INSERT INTO profiles (org_id, user_id, role)
    SELECT org('first', w), person(w, i), 'volunteer' FROM generate_series(0, 15) w, generate_series(1, $own) i
    UNION ALL SELECT org('shared', 0), person(-1, i), 'volunteer' FROM generate_series(1, $shared) i;
INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
    SELECT 'm', 'own' || w, 'Own', 'admin' FROM generate_series(0, 15) w;

CREATE TABLE public.districts (id integer PRIMARY KEY);
INSERT INTO districts VALUES (1);
CREATE TABLE public.schools (district_id integer REFERENCES districts DEFERRABLE INITIALLY DEFERRED);

CREATE TABLE public.approvals (label text, org_id uuid, user_id uuid);
CREATE FUNCTION public.approve() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM set_config('app.current_request_id', NEW.label, true);
    UPDATE profiles SET role = NEW.label WHERE org_id = NEW.org_id AND user_id = NEW.user_id;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER approve AFTER INSERT ON approvals DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION approve()";

/// `$l` is a label that no other statement has, `$w` the writer, `$i` a member of its own, `$s` a shared one.
/// Each writes its label as the new value where it writes one.
const SHARED: &str =
    "UPDATE profiles SET role = '$l' WHERE org_id = org('shared', 0) AND user_id = person(-1, $s)";
const LOCK_DISTRICT: &str = "SELECT FROM districts FOR UPDATE";
const OPEN_SCHOOL: &str = "INSERT INTO schools VALUES (1)";
const APPROVE: &str = "INSERT INTO approvals VALUES ('$l', org('first', $w), person($w, 1))";
const MOVE: &str = "
UPDATE profiles SET org_id = CASE org_id WHEN org('first', $w) THEN org('second', $w) ELSE org('first', $w) END,
                    role = '$l'
WHERE user_id = person($w, 2)";
const OWN: [&str; 7] = [
    "UPDATE profiles SET role = '$l' WHERE org_id = org('first', $w)",
    "UPDATE profiles SET role = '$l' WHERE org_id = org('first', $w) AND user_id = person($w, $i)",
    "INSERT INTO profiles (org_id, user_id, role) VALUES (org('second', $w), gen_random_uuid(), '$l')",
    "DELETE FROM profiles WHERE id IN (
         SELECT id FROM profiles WHERE org_id = org('second', $w) AND user_id <> person($w, 2) LIMIT 2)",
    "INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
     VALUES (org('first', $w), 'key$i', '$l')
     ON CONFLICT (org_id, permission_key) DO UPDATE SET min_role_required = excluded.min_role_required",
    "UPDATE organization_permission_templates SET permission_name = '$l' WHERE permission_key = 'own$w'",
    MOVE,
];
/// They change nothing, and none of their labels may be seen.
const NOTHING: [&str; 2] = [
    "UPDATE profiles SET role = role WHERE org_id = org('first', $w)",
    "UPDATE profiles SET email = '$l' WHERE org_id = org('first', $w)",
];

/// What a writer knows it has committed: a statement's label and the audit rows it must have.
type Committed = Vec<(String, u64)>;

#[derive(Default)]
struct Tally {
    finished_writers: AtomicUsize,
    committed: AtomicUsize,
    rolled_back: AtomicUsize,
    not_serialized: AtomicUsize,
}

struct Writer {
    number: usize,
    client: Client,
    random: StdRng,
}

/// One attempt's statements are counted from 0, so labels sort in the order of a writer's statements.
struct Attempt<'a> {
    writer: &'a mut Writer,
    number: usize,
    statements: usize,
    changes: Committed,
}

impl Attempt<'_> {
    fn chance(&mut self, probability: f64) -> bool {
        self.writer.random.random_bool(probability)
    }

    async fn pause(&mut self) {
        if self.chance(0.15) {
            let pause = Duration::from_micros(self.writer.random.random_range(100..1500));
            tokio::time::sleep(pause).await;
        }
    }

    /// Runs one statement under a label of its own; returns the rows it touched and the label.
    async fn execute(&mut self, sql: &str) -> Result<(u64, String), Error> {
        let label = format!(
            "{:02}.{:04}.{:02}",
            self.writer.number, self.number, self.statements
        );
        self.statements += 1;
        let own = self.writer.random.random_range(3..=OWN_MEMBERS);
        let shared = self.writer.random.random_range(1..=SHARED_MEMBERS);
        let sql = sql
            .replace("$l", &label)
            .replace("$w", &self.writer.number.to_string())
            .replace("$i", &own.to_string())
            .replace("$s", &shared.to_string());
        let client = &self.writer.client;
        let actor = format!("SELECT set_session_variables(NULL, request_id => '{label}')");
        client.batch_execute(&actor).await?;
        let rows = client.execute(&sql, &[]).await?;
        self.pause().await;
        Ok((rows, label))
    }

    /// Runs a statement that writes `rows_per_row` audit rows for a row it touches.
    async fn change(&mut self, sql: &str, rows_per_row: u64) -> Result<(), Error> {
        let (rows, label) = self.execute(sql).await?;
        if rows > 0 {
            self.changes.push((label, rows * rows_per_row));
        }
        Ok(())
    }

    async fn change_own(&mut self) -> Result<(), Error> {
        let sql = OWN[self.writer.random.random_range(0..OWN.len())];
        self.change(sql, if sql == MOVE { 2 } else { 1 }).await
    }

    /// Locks are taken in one order by all writers (shared member, district, own rows, the commit's), so that any
    /// deadlock is the numbering's fault. SET CONSTRAINTS takes the commit's lock at once: no foreign key may wait
    /// after it. Returns whether it committed.
    async fn run(&mut self) -> Result<bool, Error> {
        let level = LEVELS[self.writer.random.random_range(0..LEVELS.len())];
        let makes_immediate = self.chance(0.3);
        self.batch(&format!("BEGIN ISOLATION LEVEL {level}"))
            .await?;
        if self.chance(0.3) {
            self.change(SHARED, 1).await?;
        }
        if self.chance(0.1) {
            self.execute(LOCK_DISTRICT).await?;
        }
        if !makes_immediate && self.chance(0.3) {
            self.execute(OPEN_SCHOOL).await?;
        }
        for _ in 0..self.writer.random.random_range(0..4) {
            self.change_own().await?;
        }
        if self.chance(0.2) {
            let nothing = NOTHING[self.writer.random.random_range(0..NOTHING.len())];
            self.execute(nothing).await?;
        }
        if self.chance(0.2) {
            let kept = self.changes.len();
            self.batch("SAVEPOINT s").await?;
            self.change_own().await?;
            if makes_immediate && self.chance(0.5) {
                self.batch("SET CONSTRAINTS ALL IMMEDIATE").await?;
            }
            self.change_own().await?;
            if self.chance(0.7) {
                self.batch("ROLLBACK TO s").await?;
                self.changes.truncate(kept);
            }
        }
        if makes_immediate && self.chance(0.5) {
            self.batch("SET CONSTRAINTS ALL IMMEDIATE").await?;
            self.pause().await;
            self.change_own().await?;
            if self.chance(0.5) {
                self.batch("SET CONSTRAINTS ALL DEFERRED").await?;
                self.change_own().await?;
            }
        } else if self.chance(0.15) {
            self.change(APPROVE, 1).await?;
        }
        let commit = self.chance(0.85);
        self.batch(if commit { "COMMIT" } else { "ROLLBACK" })
            .await?;
        Ok(commit)
    }

    async fn batch(&self, sql: &str) -> Result<(), Error> {
        self.writer.client.batch_execute(sql).await
    }
}

async fn write(mut writer: Writer, tally: &Tally) -> Committed {
    let mut committed = Vec::new();
    let began = Instant::now();
    for number in (0..TRANSACTIONS_PER_WRITER).take_while(|_| began.elapsed() < WRITING_MAX) {
        let mut attempt = Attempt {
            writer: &mut writer,
            number,
            statements: 0,
            changes: Vec::new(),
        };
        let ended = match attempt.run().await {
            Ok(true) => {
                committed.append(&mut attempt.changes);
                &tally.committed
            }
            Ok(false) => &tally.rolled_back,
            Err(error) => {
                assert_eq!(sqlstate(&error), "40001", "{error:?}");
                attempt.batch("ROLLBACK").await.unwrap();
                &tally.not_serialized
            }
        };
        ended.fetch_add(1, Ordering::Relaxed);
    }
    tally.finished_writers.fetch_add(1, Ordering::SeqCst);
    committed
}

/// One audit row, as a reader gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    seq: i64,
    n: i32,
    label: String,
    /// Which thing it speaks of: table, organization, user and permission.
    thing: String,
    old: Option<String>,
    new: Option<String>,
}

/// The limit on the log comes first: an entry has at least one row, so one entry more than rows are wanted is enough.
const PAGE: &str = "
SELECT seq, n, coalesce(request_id, ''), concat_ws(' ', table_name, org_id, affected_user_id, permission_key),
       old_values::text, new_values::text
FROM (SELECT seq, entry_id, created_at FROM hallpass.log WHERE seq >= $1 ORDER BY seq LIMIT $3::bigint + 1) entry
CROSS JOIN LATERAL (SELECT * FROM permission_audit_log a
                    WHERE a.entry_id = entry.entry_id AND a.created_at = entry.created_at) a
WHERE (seq, n) > ($1, $2)
ORDER BY seq, n LIMIT $3::bigint";

/// Follows the log by (seq, n). Holds the rows of an entry back until a row of the next one, or a page that is not
/// full, shows that it is whole.
struct Tail {
    client: Client,
    seq: i64,
    n: i32,
    held_back: Vec<Row>,
}

impl Tail {
    fn new(client: Client) -> Self {
        Self {
            client,
            seq: 0,
            n: 0,
            held_back: Vec::new(),
        }
    }

    /// Reads a page; returns the entries that are whole with it, and whether the log ended there.
    async fn page(&mut self) -> (Vec<Vec<Row>>, bool) {
        let limit = i64::try_from(PAGE_ROWS).unwrap();
        let page = self
            .client
            .query(PAGE, &[&self.seq, &self.n, &limit])
            .await
            .unwrap();
        let mut whole = Vec::new();
        for row in &page {
            let row = Row {
                seq: row.get(0),
                n: row.get(1),
                label: row.get(2),
                thing: row.get(3),
                old: row.get(4),
                new: row.get(5),
            };
            if self
                .held_back
                .last()
                .is_some_and(|last| last.seq != row.seq)
            {
                whole.push(std::mem::take(&mut self.held_back));
            }
            (self.seq, self.n) = (row.seq, row.n);
            self.held_back.push(row);
        }
        let ended = page.len() < PAGE_ROWS;
        if ended && !self.held_back.is_empty() {
            whole.push(std::mem::take(&mut self.held_back));
        }
        (whole, ended)
    }

    /// Reads until `finished` was true before a page at which the log ended.
    async fn read(mut self, finished: impl Fn() -> bool) -> Vec<Vec<Row>> {
        let mut entries = Vec::new();
        loop {
            let last = finished();
            let (mut whole, ended) = self.page().await;
            entries.append(&mut whole);
            match (ended, last) {
                (true, true) => return entries,
                (true, false) => tokio::time::sleep(Duration::from_millis(1)).await,
                (false, _) => (),
            }
        }
    }
}

/// Every committed change once and with all of its rows, nothing else, and each writer's in its own order.
fn assert_seen_once_in_order(entries: &[Vec<Row>], committed: &BTreeMap<String, u64>) {
    let mut seen = BTreeMap::new();
    let mut newest: HashMap<&str, &str> = HashMap::new();
    let mut seq = 0;
    for entry in entries {
        let first = &entry[0];
        assert!(first.seq > seq, "{} after {seq}", first.seq);
        seq = first.seq;
        for (row, n) in entry.iter().zip(1..) {
            assert_eq!(
                (row.seq, row.n, &row.label),
                (seq, n, &first.label),
                "{entry:?}"
            );
        }
        if first.label.is_empty() {
            continue;
        }
        let rows = u64::try_from(entry.len()).unwrap();
        assert_eq!(
            seen.insert(first.label.clone(), rows),
            None,
            "repeated: {first:?}"
        );
        let before = newest.insert(&first.label[..2], &first.label);
        assert!(
            before.is_none_or(|before| before < first.label.as_str()),
            "{before:?} before {first:?}"
        );
    }
    let lost: Vec<_> = committed
        .iter()
        .filter(|(label, _)| !seen.contains_key(*label))
        .collect();
    let phantom: Vec<_> = seen
        .iter()
        .filter(|(label, _)| !committed.contains_key(*label))
        .collect();
    assert!(
        lost.is_empty() && phantom.is_empty(),
        "lost {lost:?}, phantom {phantom:?}"
    );
    assert_eq!(&seen, committed);
}

/// Each change of a thing starts from what the change before left; returns what the last one left.
fn replay(entries: &[Vec<Row>]) -> BTreeMap<String, String> {
    let mut state = BTreeMap::new();
    for row in entries.iter().flatten() {
        let before = match &row.new {
            Some(new) => state.insert(row.thing.clone(), new.clone()),
            None => state.remove(&row.thing),
        };
        assert_eq!(before, row.old, "{row:?}");
    }
    state
}

/// The tables, as the log's last word on each thing must have them.
const STATE: &str = "
SELECT concat_ws(' ', 'profiles', org_id, user_id),
       jsonb_build_object('org_id', org_id, 'user_id', user_id, 'role', role)::text
FROM profiles WHERE org_id IS NOT NULL
UNION ALL
SELECT concat_ws(' ', 'organization_permissions', org_id, permission_key),
       jsonb_build_object('org_id', org_id, 'permission_key', permission_key, 'min_role_required', min_role_required,
                          'is_enabled', is_enabled, 'specific_users', specific_users)::text
FROM organization_permissions
UNION ALL
SELECT concat_ws(' ', 'organization_permission_templates', permission_key),
       jsonb_build_object('permission_key', permission_key, 'module_name', module_name,
                          'permission_name', permission_name, 'default_min_role', default_min_role)::text
FROM organization_permission_templates
UNION ALL
SELECT concat_ws(' ', 'organizations', id), jsonb_build_object('id', id, 'name', name)::text FROM organizations";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_sees_every_commit_once_whole_and_in_order() {
    let database = Database::create().await;
    let client = database.client().await;
    // What the migrations wrote has no part in this.
    run(
        &client,
        "TRUNCATE permission_roles, hallpass.log, hallpass.log_org",
    )
    .await;
    let seed = SEED
        .replace("$own", &OWN_MEMBERS.to_string())
        .replace("$shared", &SHARED_MEMBERS.to_string());
    run(&client, &seed).await;
    let truncated = "DELETE FROM hallpass.log l USING permission_audit_log a
                     WHERE a.entry_id = l.entry_id AND a.change_type = 'TRUNCATE'";
    run(&client, truncated).await;

    let unrelated = database.client().await;
    run(
        &unrelated,
        "CREATE TABLE public.unrelated (x int); BEGIN; INSERT INTO unrelated VALUES (1)",
    )
    .await;

    let tally = &*Box::leak(Box::new(Tally::default()));
    let done = || tally.finished_writers.load(Ordering::SeqCst) == WRITERS;
    let tail = Tail::new(database.client().await);
    let tail = tokio::spawn(tail.read(done));
    let mut writers = JoinSet::new();
    for number in 0..WRITERS {
        let client = database.client().await;
        let random = StdRng::seed_from_u64(u64::try_from(number).unwrap());
        writers.spawn(write(
            Writer {
                number,
                client,
                random,
            },
            tally,
        ));
    }
    let committed: BTreeMap<_, _> = writers.join_all().await.into_iter().flatten().collect();
    let entries = tail.await.unwrap();

    assert_seen_once_in_order(&entries, &committed);
    let state = client.query(STATE, &[]).await.unwrap();
    let state: BTreeMap<String, String> =
        state.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(replay(&entries), state);
    // Who comes later reads the same.
    let again = Tail::new(database.client().await).read(|| true).await;
    assert!(again == entries, "a later reader sees another log");
    // The run was what it was meant to be.
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    println!(
        "{} entries of {} transactions, {} rolled back, {} not serialized",
        committed.len(),
        count(&tally.committed),
        count(&tally.rolled_back),
        count(&tally.not_serialized)
    );
    assert!(count(&tally.committed) > COMMITTED_MIN);
    assert!(count(&tally.rolled_back) > 0);
    assert!(entries.iter().any(|entry| entry.len() > PAGE_ROWS));
    run(&unrelated, "ROLLBACK").await;
}

/// Numbering reads no table: SERIALIZABLE writers that read nothing of each other's never fail because of it. They
/// find their own row by its ctid, since an index page that two of them read is a conflict of PostgreSQL's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbering_fails_no_serializable_writer() {
    const ROUNDS: usize = 40;
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "INSERT INTO organizations (id, name) VALUES (md5('x')::uuid, 'x')",
    )
    .await;
    let head: i64 = value(&client, "SELECT max(seq) FROM hallpass.log")
        .await
        .parse()
        .unwrap();
    let mut writers = JoinSet::new();
    for number in 0..WRITERS {
        let level = ["SERIALIZABLE", "REPEATABLE READ"][number % 2];
        let client = database.client().await;
        writers.spawn(async move {
            let begin = format!("BEGIN ISOLATION LEVEL {level}");
            for _ in 0..ROUNDS {
                run(&client, &begin).await;
                let insert = "INSERT INTO profiles (org_id, user_id) VALUES (md5('x')::uuid, gen_random_uuid())
                              RETURNING ctid";
                let ctid = value(&client, insert).await;
                run(&client, "COMMIT").await;
                run(&client, &begin).await;
                let update = format!("UPDATE profiles SET role = 'teacher' WHERE ctid = '{ctid}' RETURNING ctid");
                let ctid = value(&client, &update).await;
                run(&client, "SAVEPOINT s").await;
                run(&client, &format!("DELETE FROM profiles WHERE ctid = '{ctid}'")).await;
                run(&client, "COMMIT").await;
            }
        });
    }
    // `run` panics at the first failure, of serialization or other.
    writers.join_all().await;
    let entries =
        format!("SELECT count(*), count(DISTINCT uid) > 1 FROM hallpass.log WHERE seq > {head}");
    let expected = format!("{} | t", WRITERS * ROUNDS * 3);
    assert_eq!(lines(&client, &entries).await, [expected]);
}

/// Foreign keys that are checked at commit wait for row locks. Were the commit's lock taken before, this would be a
/// deadlock: the first waits at commit for the row that the second has locked, the second for the commit's lock.
#[tokio::test]
async fn a_deferred_foreign_key_waits_without_the_commit_lock() {
    let database = Database::create().await;
    let (first, second, observer) = (
        database.client().await,
        database.client().await,
        database.client().await,
    );
    let seed = SEED.replace("$own", "1").replace("$shared", "2");
    run(&observer, &seed).await;
    let head: i64 = value(&observer, "SELECT max(seq) FROM hallpass.log")
        .await
        .parse()
        .unwrap();
    let change = |i: usize| {
        SHARED
            .replace("$l", &format!("{i}"))
            .replace("$s", &i.to_string())
    };

    run(&first, &format!("BEGIN; {}; {OPEN_SCHOOL}", change(1))).await;
    run(&second, &format!("BEGIN; {LOCK_DISTRICT}; {}", change(2))).await;
    let (first_pid, second_pid) = (pid(&first).await, pid(&second).await);
    let committing = tokio::spawn(async move { first.batch_execute("COMMIT").await });
    wait_until_blocked(&observer, first_pid, second_pid).await;
    run(&second, "COMMIT").await;
    committing.await.unwrap().unwrap();

    // The second came first, because the first had not taken a number yet.
    let order = format!(
        "SELECT new_values ->> 'role' FROM hallpass.log JOIN permission_audit_log USING (entry_id)
                         WHERE seq > {head} ORDER BY seq"
    );
    assert_eq!(lines(&observer, &order).await, ["2", "1"]);
}
