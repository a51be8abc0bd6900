//! The promise of freshness, put to the torture: replicas and a PostgreSQL of their own, real processes all, while the
//! one and the other is killed, stopped, cut off and put back; every answer is held against what was written.
//!
//! `make torture CHECKS=10000000` runs it at length, from a seed that it prints; the suite has a few seconds of it.

#![allow(
    clippy::disallowed_methods,
    reason = "its runtimes have threads to spare, and what blocks is a process that starts or ends"
)]

mod auditors;
mod book;
mod faults;
mod machines;
mod readers;
mod report;
mod revocation;
mod world;

use std::{
    env,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hallpass::store::migrations::migrate;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{
    sync::{Mutex as AsyncMutex, RwLock, RwLockWriteGuard},
    task::{JoinSet, block_in_place},
    time::sleep,
};
use tokio_postgres::{Client, NoTls};

use crate::{
    database::{Shape, as_role, connect, read_world, write_world},
    history::{Micros, Position},
    proxy::Way,
    roles::make_roles,
    support::directory_in_memory,
};

use book::{Book, Clock};
use faults::Fault;
use machines::{Postgres, Replica};
use world::{ORGANIZATIONS, Questions, Write};

const REPLICAS: usize = 3;

/// The replicas' staleness bound: half of the default, so that faults beyond it take half the time.
const BOUND: Duration = Duration::from_secs(1);

/// A writer's pause: the writers together change something some twenty times a second.
const WRITE_PAUSE_MILLIS: std::ops::Range<u64> = 0..350;

/// How often the log is read for the book.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(5);

/// Readers of each kind, each replica.
const READERS: usize = 2;

/// What is in the log behind a position, by the name that its writer gave it.
const READ_LOG: &str = "
SELECT l.seq, l.uid, a.request_id
FROM hallpass.log l
LEFT JOIN LATERAL (
    SELECT request_id FROM public.permission_audit_log a
    WHERE a.entry_id = l.entry_id AND a.created_at = l.created_at LIMIT 1
) a ON true
WHERE l.seq > $1 ORDER BY l.seq";

/// Everything that a run's tasks share.
struct Run {
    clock: Clock,
    /// As the superuser, and past the proxies.
    url: String,
    questions: Arc<Questions>,
    book: Mutex<Book>,
    replicas: Vec<Replica>,
    postgres: AsyncMutex<Postgres>,
    /// Held while the log is read.
    follower: AsyncMutex<()>,
    /// Held shared by each write.
    writing: RwLock<()>,
    over: AtomicBool,
    /// What each replica's follower of the audit log has.
    auditors: Vec<Mutex<auditors::Taken>>,
}

impl Run {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap()
    }

    /// Returns when nobody writes and the log has told of everything.
    async fn pause_writers(&self) -> RwLockWriteGuard<'_, ()> {
        let paused = self.writing.write().await;
        while !self.book().is_settled() {
            sleep(FOLLOW_INTERVAL).await;
        }
        paused
    }
}

async fn start(directory: &Path) -> Arc<Run> {
    let postgres = block_in_place(|| Postgres::start(directory));
    let (url, service) = migrated(&postgres).await;
    let mut client = connect(&url).await;
    let world = world::first_world();
    let questions = Arc::new(Questions::new());
    write_world(&mut client, Shape::A, &world, &questions.names).await;
    let head = client.query_one("SELECT hallpass.head()", &[]).await;
    let head = readers::parse(head.unwrap().get(0));
    let mut replicas = Vec::new();
    for number in 0..REPLICAS {
        let directory = directory.join(number.to_string());
        replicas.push(Replica::start(&directory, &service, Way::Open, BOUND, number == 0).await);
    }
    let clock = Clock(Instant::now());
    let bound = Micros::try_from(BOUND.as_micros()).unwrap();
    let book = Book::new(clock, Arc::clone(&questions), world, head, bound);
    Arc::new(Run {
        clock,
        url,
        questions,
        book: Mutex::new(book),
        replicas,
        postgres: AsyncMutex::new(postgres),
        follower: AsyncMutex::new(()),
        writing: RwLock::new(()),
        over: AtomicBool::new(false),
        auditors: (0..REPLICAS).map(|_| Mutex::default()).collect(),
    })
}

/// Where the superuser and the service find a database that is ready for use.
async fn migrated(postgres: &Postgres) -> (String, String) {
    let url = postgres.url();
    make_roles(&url, None).await.unwrap();
    let migrator = as_role(&url, "hallpass_migrator");
    migrate(&migrator.parse().unwrap(), |_| {}).await.unwrap();
    let service = as_role(&url, "hallpass_service");
    (url, service)
}

/// Reads the log into the book, and has the answers judged.
async fn follow(run: Arc<Run>) {
    while !run.over.load(Ordering::Relaxed) {
        // A client that has lost its database gives way to the next.
        if let Some(client) = try_connect(&run.url).await {
            while !run.over.load(Ordering::Relaxed) && follow_once(&run, &client).await {
                sleep(FOLLOW_INTERVAL).await;
            }
        }
        sleep(FOLLOW_INTERVAL).await;
    }
}

async fn follow_once(run: &Run, client: &Client) -> bool {
    let _reading = run.follower.lock().await;
    let asked = run.clock.now();
    let last = run.book().last_read().seq;
    let Ok(rows) = client.query(READ_LOG, &[&last]).await else {
        return false;
    };
    let mut book = run.book();
    for row in rows {
        let uid: i32 = row.get(1);
        let position = Position {
            seq: row.get(0),
            uid: uid.cast_unsigned(),
        };
        let name: Option<&str> = row.get(2);
        book.read(position, name.and_then(|name| name.parse().ok()));
    }
    block_in_place(|| book.settle(asked));
    true
}

async fn try_connect(url: &str) -> Option<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
    // Ends with the client; its errors reach the client's queries.
    drop(tokio::spawn(connection));
    Some(client)
}

/// Writes until the run is over; `organization` has no other writer.
async fn write(run: Arc<Run>, organization: Option<&'static str>, mut random: StdRng) {
    let mut client = None;
    while !run.over.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(
            random.random_range(WRITE_PAUSE_MILLIS),
        ))
        .await;
        let Some(connected) = &client else {
            client = try_connect(&run.url).await;
            continue;
        };
        let _writing = run.writing.read().await;
        if !write_once(&run, connected, Write::random(&mut random, organization)).await {
            client = None;
        }
    }
}

/// Says whether the connection is still good.
async fn write_once(run: &Run, client: &Client, write: Write) -> bool {
    let sql = write.sql();
    let name = run.book().send(write);
    let transaction = format!(
        "BEGIN; SELECT set_config('app.current_request_id', '{name}', true); {sql}; COMMIT"
    );
    match client.batch_execute(&transaction).await {
        Err(error) if error.as_db_error().is_some() && !client.is_closed() => {
            run.book().failed(name);
            client.batch_execute("ROLLBACK").await.is_ok()
        }
        // Acknowledged, or never: the log will tell.
        acknowledged => {
            run.book().done(name);
            acknowledged.is_ok()
        }
    }
}

/// Runs until there are so many checks and every step of the plan is done.
async fn torture(checks: u64, faults: &[Fault], times: usize, seed: u64) -> Vec<String> {
    let directory = directory_in_memory();
    let run = start(directory.path()).await;
    let mut random = StdRng::seed_from_u64(seed);
    let mut tasks = JoinSet::new();
    let mut fork = || StdRng::seed_from_u64(random.random());
    tasks.spawn(follow(Arc::clone(&run)));
    for organization in ORGANIZATIONS.map(Some).into_iter().chain([None]) {
        tasks.spawn(write(Arc::clone(&run), organization, fork()));
    }
    for replica in 0..REPLICAS {
        tasks.spawn(auditors::follow(Arc::clone(&run), replica));
        for _ in 0..READERS {
            tasks.spawn(readers::read_batches(Arc::clone(&run), replica, fork()));
            tasks.spawn(readers::read_singly(Arc::clone(&run), replica, fork()));
        }
    }
    let mut faults = faults.to_vec();
    if !run.replicas[0].fakes_its_clock() {
        let note = "wall clock stepped: left out, because libfaketime is not installed";
        run.book().report.notes.push(note.to_owned());
        faults.retain(|fault| *fault != Fault::ClockStepped);
    }
    let mut order = StdRng::seed_from_u64(seed);
    let steps = faults::plan(&faults, times, &mut order);
    let mut said = Instant::now();
    for step in &steps {
        faults::step(&run, step, &mut order).await;
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            let (done, checks) = (run.clock.now() / 1_000_000, run.book().report.checks());
            println!("after {done} s: {checks} checks");
        }
    }
    while run.book().report.checks() < checks {
        sleep(Duration::from_millis(100)).await;
    }
    // What is written is what was said of it.
    let (audited, wrong) = {
        let _paused = run.pause_writers().await;
        let found = read_world(&connect(&run.url).await, Shape::A, &run.questions.names).await;
        run.book().assert_world(&found);
        auditors::compare(&run).await
    };
    run.over.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let book = run.book();
    println!("{}\n{audited}", book.report);
    let mut complaints = book.report.complaints();
    complaints.extend(wrong);
    complaints
}

fn variable(name: &str) -> Option<u64> {
    let value = env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}: not a number")),
    )
}

/// A few seconds of it, always.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_right_through_a_few_faults() {
    let faults = [Fault::ReplicaKilled, Fault::Swallowed, Fault::CommitsLost];
    let complaints = torture(1_000, &faults, 1, 1).await;
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// `TIMES`: how often a replica, and how often the database, is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes as long as it is told to: make audit-kills"]
async fn audit_streams_lose_nothing_through_kills() {
    let times = usize::try_from(variable("TIMES").unwrap_or(25)).unwrap();
    let seed = variable("SEED").unwrap_or_else(|| rand::rng().random_range(1..1_000_000));
    println!("seed {seed}: {} times kill -9", 2 * times);
    let kills = [Fault::ReplicaKilled, Fault::PostgresKilled];
    let complaints = torture(1, &kills, times, seed).await;
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// `CHECKS`: how many at least; `TIMES`: how often each fault; `SEED`: which order of faults, writes and questions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a quarter of an hour: make torture"]
async fn answers_are_right_through_every_fault() {
    let checks = variable("CHECKS").unwrap_or(10_000_000);
    let times = variable("TIMES").unwrap_or(20);
    let seed = variable("SEED").unwrap_or_else(|| rand::rng().random_range(1..1_000_000));
    println!("seed {seed}: {checks} checks, each fault {times} times");
    let complaints = torture(checks, &faults::ALL, usize::try_from(times).unwrap(), seed).await;
    println!("seed {seed}");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
