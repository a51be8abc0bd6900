//! What goes wrong, each as it goes wrong in earnest, and when it is over.

use std::{sync::Arc, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tokio::{
    task::{JoinSet, block_in_place},
    time::{Instant, sleep, timeout},
};

use hallpass_client::v1::{
    CheckPermissionRequest, Source, permission_service_client::PermissionServiceClient,
};

use crate::{
    database::{Shape, connect, read_world},
    proxy::Way,
};

use super::{
    BOUND, REPLICAS, Run,
    readers::{self, parse},
    report::CALM,
};

/// Longer than the bound by as much as a busy machine may be late, so that whoever ignores the bound is caught.
const BEYOND_THE_BOUND: std::ops::Range<u64> = 1_400..2_400;

/// A replica that has not come back by then is counted as if nothing were the matter.
const RECOVERY_WAIT_MAX: Duration = Duration::from_secs(10);

/// How long a lock holds loads up: shorter than a caller's deadline, so that who waited is answered.
const LOCKED: Duration = Duration::from_millis(600);

/// Strangers asked about at once.
const FLOOD: usize = 200;

/// How much is written that a restore then loses.
const LOST: Duration = Duration::from_millis(1_200);

/// Nothing happens for so long between faults.
const CALM_TIME: Duration = Duration::from_millis(1_200);

/// One question of whether a replica has recovered, and how soon the next.
const PROBE_WAIT_MAX: Duration = Duration::from_millis(500);
const PROBE_INTERVAL: Duration = Duration::from_millis(10);

/// The first: before loads take their snapshot. The second: after, where the matrix is to be believed.
const LOCKS: [&str; 2] = ["public.permission_roles", "hallpass.matrix_stamp"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    ReplicaKilled,
    ReplicaStopped,
    Cut,
    Swallowed,
    AnswersSwallowed,
    ClockStepped,
    PostgresKilled,
    PostgresStopped,
    PoolExhausted,
    CommitsLost,
}

pub(super) const ALL: [Fault; 10] = [
    Fault::ReplicaKilled,
    Fault::ReplicaStopped,
    Fault::Cut,
    Fault::Swallowed,
    Fault::AnswersSwallowed,
    Fault::ClockStepped,
    Fault::PostgresKilled,
    Fault::PostgresStopped,
    Fault::PoolExhausted,
    Fault::CommitsLost,
];

/// After these the database accepts connections again, and answers are due.
pub(super) const RESTARTS: [&str; 2] = ["postgres killed", "commits lost"];

impl Fault {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ReplicaKilled => "replica killed",
            Self::ReplicaStopped => "replica stopped",
            Self::Cut => "connection cut",
            Self::Swallowed => "network swallows",
            Self::AnswersSwallowed => "answers swallowed",
            Self::ClockStepped => "wall clock stepped",
            Self::PostgresKilled => RESTARTS[0],
            Self::PostgresStopped => "postgres stopped",
            Self::PoolExhausted => "pool exhausted",
            Self::CommitsLost => RESTARTS[1],
        }
    }

    /// Of one replica, so that another may have one too.
    fn is_of_a_replica(self) -> bool {
        ALL.iter().position(|fault| *fault == self) < Some(6)
    }
}

/// Each fault so many times, in an order that the seed gives; with two that are each a replica's at the same time.
pub(super) fn plan(faults: &[Fault], times: usize, random: &mut StdRng) -> Vec<Vec<Fault>> {
    let mut all: Vec<Fault> = faults
        .iter()
        .copied()
        .cycle()
        .take(faults.len() * times)
        .collect();
    all.shuffle(random);
    let (mut single, common): (Vec<Fault>, Vec<Fault>) =
        all.into_iter().partition(|fault| fault.is_of_a_replica());
    let mut steps: Vec<Vec<Fault>> = common.into_iter().map(|fault| vec![fault]).collect();
    while let Some(fault) = single.pop() {
        // Only one replica has a clock to step.
        let is_other =
            |other: &Fault| fault != Fault::ClockStepped || *other != Fault::ClockStepped;
        let other = single.iter().rposition(is_other);
        let step = std::iter::once(fault).chain(other.map(|other| single.remove(other)));
        steps.push(step.collect());
    }
    steps.shuffle(random);
    steps
}

/// Makes the faults of a step, waits until everybody has recovered, and then for a calm while.
pub(super) async fn step(run: &Arc<Run>, faults: &[Fault], random: &mut StdRng) {
    // The first alone has a clock to step.
    let mut replicas: Vec<usize> = (1..REPLICAS).collect();
    if !faults.contains(&Fault::ClockStepped) {
        replicas.push(0);
    }
    replicas.shuffle(random);
    let mut under_way = JoinSet::new();
    for fault in faults.iter().copied() {
        let concerned = match fault {
            Fault::ClockStepped => vec![0],
            _ if fault.is_of_a_replica() => vec![replicas.pop().unwrap()],
            _ => (0..REPLICAS).collect(),
        };
        let random = StdRng::seed_from_u64(random.random());
        under_way.spawn(make(Arc::clone(run), fault, concerned, random));
    }
    while let Some(done) = under_way.join_next().await {
        done.unwrap();
    }
    sleep(CALM_TIME).await;
}

async fn make(run: Arc<Run>, fault: Fault, concerned: Vec<usize>, mut random: StdRng) {
    let name = fault.name();
    *run.book().report.faults.entry(name).or_default() += 1;
    for replica in &concerned {
        *run.replicas[*replica].fault.lock().unwrap() = name;
    }
    let lasts = Duration::from_millis(random.random_range(BEYOND_THE_BOUND));
    match fault {
        Fault::PostgresKilled => kill_postgres(&run, lasts).await,
        Fault::PostgresStopped => {
            let postgres = run.postgres.lock().await;
            block_in_place(|| postgres.freeze());
            sleep(lasts).await;
            block_in_place(|| postgres.thaw());
        }
        Fault::PoolExhausted => exhaust_the_pool(&run, &mut random).await,
        Fault::CommitsLost => lose_commits(&run).await,
        _ => trouble_replica(&run, fault, concerned[0], lasts).await,
    }
    let over = Instant::now();
    let recovered = concerned
        .iter()
        .map(|replica| until_recovered(&run, *replica, name, over));
    futures_util::future::join_all(recovered).await;
}

async fn trouble_replica(run: &Run, fault: Fault, replica: usize, lasts: Duration) {
    let replica = &run.replicas[replica];
    let cut = async |way| {
        replica.proxy.set(way);
        sleep(lasts).await;
        replica.proxy.set(Way::Open);
    };
    match fault {
        Fault::ReplicaKilled => {
            replica.kill();
            sleep(lasts / 4).await;
            replica.start_again(BOUND).await;
        }
        Fault::ReplicaStopped => {
            replica.freeze();
            sleep(lasts).await;
            replica.thaw();
        }
        Fault::Cut => cut(Way::Closed).await,
        Fault::Swallowed => cut(Way::Silent).await,
        Fault::AnswersSwallowed => cut(Way::Deaf).await,
        // Forward, far back, and right again.
        _ => {
            for offset in ["+3600", "-7200", "+0"] {
                replica.set_clock(offset);
                sleep(lasts / 3).await;
            }
        }
    }
}

async fn kill_postgres(run: &Run, lasts: Duration) {
    let mut postgres = run.postgres.lock().await;
    block_in_place(|| postgres.kill());
    // Beyond the bound now and then.
    sleep(lasts / 2).await;
    block_in_place(|| postgres.start_again());
}

/// Loads wait for a lock, one a connection of the pool, and those that come after them for a connection.
async fn exhaust_the_pool(run: &Arc<Run>, random: &mut StdRng) {
    for table in LOCKS {
        let holder = connect(&run.url).await;
        let lock = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        holder.batch_execute(&lock).await.unwrap();
        let mut asking = JoinSet::new();
        for number in 0..FLOOD {
            let random = StdRng::seed_from_u64(random.random());
            asking.spawn(readers::ask_for_a_stranger(
                Arc::clone(run),
                number % REPLICAS,
                random,
            ));
        }
        sleep(LOCKED).await;
        holder.batch_execute("ROLLBACK").await.unwrap();
        while let Some(asked) = asking.join_next().await {
            asked.unwrap();
        }
    }
}

/// The database is put back to what it was a moment ago, as a restore or a failover to a lagging standby does.
async fn lose_commits(run: &Run) {
    let mut postgres = run.postgres.lock().await;
    block_in_place(|| postgres.copy());
    sleep(LOST).await;
    let _paused = run.pause_writers().await;
    // Nobody reads the log meanwhile: it would not be of one history.
    let _follower = run.follower.lock().await;
    block_in_place(|| postgres.kill());
    let ended = run.clock.now();
    block_in_place(|| {
        postgres.put_back();
        postgres.start_again();
    });
    let client = connect(&run.url).await;
    let head = client.query_one("SELECT hallpass.head()", &[]).await;
    let found = read_world(&client, Shape::A, &run.questions.names).await;
    let copied = parse(head.unwrap().get(0));
    run.book().restore(copied, ended, &found);
}

/// Asks as a caller does, until there is an answer and until it comes from the cache. From then on nothing is the
/// matter any more, nor after [`RECOVERY_WAIT_MAX`].
async fn until_recovered(run: &Run, number: usize, fault: &'static str, over: Instant) {
    let replica = &run.replicas[number];
    let item = run.questions.items[0].clone();
    let (mut answered, mut cached) = (None, None);
    while cached.is_none() && over.elapsed() < RECOVERY_WAIT_MAX {
        let request = CheckPermissionRequest {
            organization_id: item.organization_id.clone(),
            user_id: item.user_id.clone(),
            permission: item.permission.clone(),
            ..CheckPermissionRequest::default()
        };
        let mut client = PermissionServiceClient::new(replica.channel.clone());
        let answer = timeout(PROBE_WAIT_MAX, client.check_permission(request)).await;
        if let Ok(Ok(answer)) = answer {
            answered.get_or_insert(over.elapsed());
            let evidence = answer.into_inner().evidence.unwrap();
            cached = (evidence.source() == Source::Cache).then(|| over.elapsed());
        }
        sleep(PROBE_INTERVAL).await;
    }
    run.book().report.recovered(fault, answered, cached);
    *replica.fault.lock().unwrap() = CALM;
    replica.assert_alive();
}
