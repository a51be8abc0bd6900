//! Follows the log and makes cache entries invalid; its lease is what lets a cached answer be given at all.
//!
//! Invariant: the lease is renewed only by a page that reached the end of the log, and dates from before that page
//! was asked for.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwapOption, Guard};
use std::sync::Arc;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{
    cache::{Cache, Epoch},
    history::{History, Standing},
    model::{BootTime, Position},
    store::{
        DatabaseUrl, StoreError,
        load::ReadFrom,
        log::{Cursor, LogReader, Page},
    },
};

/// The log is read at least this often, notified or not: a lost notification costs no more than this.
pub const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Rows a page: some hundred kilobytes.
const PAGE_ROWS: i64 = 1_000;

/// A connection that is silent for this long may be dead: another one is asked the same. Within the default bound on
/// staleness, so that a dead connection costs no answer from the cache.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// A page that takes longer has met a dead network: the database's own limit on it is shorter.
const PAGE_WAIT_MAX: Duration = Duration::from_secs(6);

/// Heads that loads may see between two pages: those of seconds at any rate that a database commits at.
const SEEN_MAX: usize = 4_096;

/// A position that no log has.
const NOWHERE: Position = Position {
    seq: i64::MAX,
    uid: 0,
};

/// Waits between attempts to connect: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(3);

/// Says that at `sent_at` every change up to `applied`, and no other, had been committed, and that the cache has
/// applied them all.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    pub applied: Position,
    pub sent_at: BootTime,
    /// The history that `applied` is of.
    pub epoch: Epoch,
}

/// How far this process has followed the log, as others see it.
#[derive(Default)]
pub struct Progress {
    lease: ArcSwapOption<Lease>,
    /// A lease that has not applied this entry is not to be believed; `i64::MAX` while the log itself is not.
    believed_from: AtomicI64,
    /// Leases from after this make the log one that is not believed, because nobody has inspected it for too long.
    inspection_due: Mutex<Option<BootTime>>,
    /// The positions, ascending, that were the greatest that any load or page had seen, from the last that a page found
    /// in the history on. Not the last alone: a load may have seen another history before a page did, and what it saw
    /// must not stand for what is lost.
    seen: Mutex<Vec<Position>>,
    renewed: Notify,
    /// A cached answer was found to be wrong: something changed that the log does not have.
    matrix_is_doubtful: AtomicBool,
    pub history: History,
}

impl Progress {
    /// The present lease. `None` before the first page, and while the log may be incomplete.
    #[must_use]
    pub fn lease(&self) -> Option<Lease> {
        let lease: Guard<Option<Arc<Lease>>> = self.lease.load();
        let lease = lease.as_deref()?;
        (lease.applied.seq >= self.believed_from.load(Ordering::Acquire)).then_some(*lease)
    }

    /// The last entry that the cache has applied; the position before the first when there is no lease.
    #[must_use]
    pub fn lease_position(&self) -> Position {
        let lease: Guard<Option<Arc<Lease>>> = self.lease.load();
        lease
            .as_deref()
            .map_or(Position::ZERO, |lease| lease.applied)
    }

    /// Whether the log is taken to hold every change.
    #[must_use]
    pub fn log_is_believed(&self) -> bool {
        self.believed_from.load(Ordering::Acquire) != i64::MAX
    }

    /// What may answer a load or a count: the materialized copies lean on the log.
    #[must_use]
    pub fn read_from(&self) -> ReadFrom {
        if self.log_is_believed() && !self.matrix_is_doubtful.load(Ordering::Acquire) {
            ReadFrom::MatrixOrView
        } else {
            ReadFrom::View
        }
    }

    /// Believes no materialized copy any more, as long as this process lives.
    pub fn disbelieve_matrix(&self) {
        self.matrix_is_doubtful.store(true, Ordering::Release);
    }

    /// Believes no lease until [`Progress::believe_from`].
    pub fn disbelieve_log(&self) {
        self.believed_from.store(i64::MAX, Ordering::Release);
    }

    /// Believes leases that have applied this entry and are not from after `due`, when there must have been another
    /// inspection. A lease from before is as good as it was: while the database is away nobody can inspect it, and
    /// nothing is added to what the lease says.
    pub fn believe_from(&self, seq: i64, due: BootTime) {
        // Under the lock: a lease that is found overdue just now must not undo this.
        let mut inspection_due = lock(&self.inspection_due);
        *inspection_due = Some(due);
        self.believed_from.store(seq, Ordering::Release);
    }

    /// Whether the lease's answers include what was committed up to this position, as far as is known here.
    #[must_use]
    pub fn has_applied(&self, position: Position, lease: &Lease) -> bool {
        position.seq <= lease.applied.seq
            && self.history.recall(position, lease.epoch) == Standing::Holds
    }

    /// Returns when a lease has applied an entry of this number, or a later one.
    pub async fn applied(&self, seq: i64) {
        loop {
            let mut renewed = std::pin::pin!(self.renewed.notified());
            // Listens before it looks.
            renewed.as_mut().enable();
            if self.lease().is_some_and(|lease| lease.applied.seq >= seq) {
                return;
            }
            renewed.await;
        }
    }

    /// Takes note of a position that is in the database's history.
    pub fn observe(&self, position: Position) {
        let mut seen = lock(&self.seen);
        if seen.last().is_some_and(|last| position.seq <= last.seq) {
            return;
        }
        // Nobody can tell any more: the next page will not find this one, and starts over.
        let too_many = seen.len() >= SEEN_MAX;
        seen.push(if too_many { NOWHERE } else { position });
    }

    fn seen(&self) -> Vec<Position> {
        lock(&self.seen).clone()
    }

    /// A page has found these: the last of them stands for the others.
    fn confirm(&self, found: &[Position]) {
        if let Some(last) = found.last() {
            lock(&self.seen).retain(|position| position.seq >= last.seq);
        }
    }

    /// Puts a newer lease in the place of the present one.
    pub fn renew(&self, lease: Lease) {
        self.observe(lease.applied);
        let inspection_due = lock(&self.inspection_due);
        if inspection_due.is_some_and(|due| lease.sent_at > due) {
            self.disbelieve_log();
        }
        drop(inspection_due);
        self.lease.store(Some(Arc::new(lease)));
        self.renewed.notify_waiters();
    }

    /// Starts over at `head`, of a history that need not be the one before; `believed_from` is what it was before the
    /// head was read.
    ///
    /// An entry that the inspection waits for may be lost: what was to be invalidated by it is forgotten here. What a
    /// later inspection waits for stands.
    fn restart(&self, head: Position, believed_from: i64) {
        self.lease.store(None);
        if believed_from != i64::MAX && believed_from > head.seq {
            // An error is the value of an inspection that was here since.
            let _newer = self.believed_from.compare_exchange(
                believed_from,
                head.seq,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
        }
        *lock(&self.seen) = vec![head];
    }
}

/// What is locked here is replaced as a whole: a thread that panicked left it so.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows the log until it is dropped, through every loss of the connection.
pub async fn follow(url: DatabaseUrl, cache: Arc<Cache>, progress: Arc<Progress>) {
    let mut feed = Feed {
        cache,
        progress,
        cursor: None,
        is_up: true,
    };
    let mut retry = RETRY_FIRST;
    loop {
        let started = BootTime::now();
        let Err(error) = feed.follow_connection(&url).await;
        if let StoreError::Wrong(_) = error {
            // A defect, or tampering, which does not go away by itself: said as long as it is there.
            tracing::error!(%error, "cannot follow the log");
            feed.is_up = false;
        } else if feed.is_up {
            tracing::warn!(%error, "lost the log; cached answers end when their staleness does");
            feed.is_up = false;
        }
        if BootTime::now().since(started) > RETRY_LAST {
            retry = RETRY_FIRST;
        }
        // Half of the wait is random, so that replicas do not come back in step.
        sleep(retry / 2 + retry.mul_f64(random_fraction() / 2.0)).await;
        retry = (retry * 2).min(RETRY_LAST);
    }
}

struct Feed {
    cache: Arc<Cache>,
    progress: Arc<Progress>,
    /// `None` until the first head is known, and again when the history turns out to be another.
    cursor: Option<Cursor>,
    is_up: bool,
}

impl Feed {
    async fn follow_connection(
        &mut self,
        url: &DatabaseUrl,
    ) -> Result<std::convert::Infallible, StoreError> {
        let mut log = within(LogReader::open(url)).await?;
        loop {
            let Some(cursor) = self.cursor else {
                self.start_at_head(&log).await?;
                continue;
            };
            let seen = self.progress.seen();
            let (page, sent_at) = within(read_page(&mut log, url, cursor, &seen)).await?;
            if !page.history_holds {
                let lost = seen.last().copied().unwrap_or_default();
                tracing::error!(%lost, "the log's history changed: starting over at its head");
                self.cursor = None;
                continue;
            }
            self.progress.confirm(&seen);
            self.progress.observe(page.next.applied);
            self.progress.history.extend(&page.entries);
            for (seq, change) in &page.changes {
                self.cache.apply(*seq, change);
            }
            self.cursor = Some(page.next);
            if page.full {
                continue;
            }
            self.progress.renew(Lease {
                applied: page.next.applied,
                sent_at,
                epoch: self.cache.epoch(),
            });
            if !self.is_up {
                tracing::info!(position = %page.next.applied, "following the log again");
                self.is_up = true;
            }
            // Either way the next thing is to read.
            let _elapsed = timeout(POLL_INTERVAL, log.notified()).await;
        }
    }

    async fn start_at_head(&mut self, log: &LogReader) -> Result<(), StoreError> {
        let believed_from = self.progress.believed_from.load(Ordering::Acquire);
        let head = within(log.head()).await?;
        self.progress.restart(head, believed_from);
        let epoch = self.cache.begin_epoch(head);
        self.progress.history.begin(epoch, head);
        self.cursor = Some(Cursor::after(head));
        tracing::info!(position = %head, "following the log");
        Ok(())
    }
}

/// The page after `cursor`, and the instant before it was asked for. When the connection is silent another one is opened
/// and asked too; whichever answers is followed from then on.
async fn read_page(
    log: &mut LogReader,
    url: &DatabaseUrl,
    cursor: Cursor,
    seen: &[Position],
) -> Result<(Page, BootTime), StoreError> {
    let (other, page, sent_at) = {
        let sent_at = BootTime::now();
        let mut first = std::pin::pin!(log.page(cursor, seen, PAGE_ROWS));
        if let Ok(page) = timeout(SILENCE_MAX, &mut first).await {
            return Ok((page?, sent_at));
        }
        let second = async {
            let log = LogReader::open(url).await?;
            let sent_at = BootTime::now();
            let page = log.page(cursor, seen, PAGE_ROWS).await?;
            Ok::<_, StoreError>((log, page, sent_at))
        };
        tokio::select! {
            page = &mut first => return Ok((page?, sent_at)),
            second = second => match second {
                Ok(second) => second,
                // The first may still answer.
                Err(_) => return Ok((first.await?, sent_at)),
            },
        }
    };
    tracing::warn!("the log's connection was silent for {SILENCE_MAX:?}: following another one");
    *log = other;
    Ok((page, sent_at))
}

async fn within<T>(read: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(PAGE_WAIT_MAX, read).await.unwrap_or_else(|_| {
        Err(StoreError::Unavailable(format!(
            "no page of the log within {PAGE_WAIT_MAX:?}"
        )))
    })
}

/// A number from 0 to 1, good enough to spread retries.
fn random_fraction() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}
