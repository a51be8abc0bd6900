//! Reads each new entry of the log once, for all live streams together.
//!
//! Invariant: a page says where it begins and when it was asked for. Pages may be lost to a stream that is slow, or that
//! came while the tail was at rest; it sees that by where the next one begins.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast},
    time::{Instant, sleep, timeout},
};

use crate::{
    feed::{POLL_INTERVAL, Progress},
    model::Cursor,
    store::{
        AUDIT_CONNECTIONS_MAX, Store, StoreError,
        audit::{
            AuditFilter,
            forward::{AuditPage, Place},
        },
    },
};

/// Pages that a stream may be behind before it reads for itself: some seconds of the busiest log.
const PAGES_BEHIND_MAX: usize = 128;

/// Rows of a page: what is committed at once is small as a rule, and an import comes in pages. With what a stream may be
/// behind, some tens of megabytes at the worst.
const PAGE_ROWS: u16 = 250;

/// The pause after the last page that there was: what is committed meanwhile comes in one.
const PAUSE: Duration = Duration::from_millis(20);

/// A page is handed on after this long, empty or not, so that streams can say how far they are once a second.
const SILENCE_MAX: Duration = Duration::from_millis(500);

/// The wait after an error.
const RETRY: Duration = Duration::from_millis(500);

/// What follows `after` in the log.
#[derive(Debug)]
pub struct News {
    pub after: Cursor,
    pub asked_at: Instant,
    pub page: AuditPage,
}

/// What all streams share; a cheap-clone handle.
#[derive(Clone)]
pub struct Tail {
    news: broadcast::Sender<Arc<News>>,
    wanted: Arc<Notify>,
    turns: Arc<Semaphore>,
    /// The entry that each open stream has reached.
    reached: Arc<Mutex<Vec<Weak<AtomicI64>>>>,
}

impl Default for Tail {
    fn default() -> Self {
        Self {
            news: broadcast::Sender::new(PAGES_BEHIND_MAX),
            wanted: Arc::new(Notify::new()),
            turns: Arc::new(Semaphore::new(AUDIT_CONNECTIONS_MAX)),
            reached: Arc::default(),
        }
    }
}

impl Tail {
    /// What is read from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<News>> {
        let news = self.news.subscribe();
        self.wanted.notify_one();
        news
    }

    /// Where a stream says which entry it has reached, for as long as it keeps this.
    pub(super) fn follower(&self, cursor: Cursor) -> Arc<AtomicI64> {
        let reached = Arc::new(AtomicI64::new(cursor.entry.seq));
        let mut all = self.reached();
        all.retain(|stream| stream.strong_count() > 0);
        all.push(Arc::downgrade(&reached));
        reached
    }

    /// How many streams are open, and the entry that the slowest has reached.
    #[must_use]
    pub fn followers(&self) -> (usize, Option<i64>) {
        let all = self.reached();
        let open = all.iter().filter_map(Weak::upgrade);
        let seqs = open.map(|reached| reached.load(Ordering::Relaxed));
        seqs.fold((0, None), |(count, slowest), seq| {
            (
                count + 1,
                Some(slowest.map_or(seq, |least: i64| least.min(seq))),
            )
        })
    }

    /// Nothing is left half-way under this lock.
    fn reached(&self) -> MutexGuard<'_, Vec<Weak<AtomicI64>>> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn to read a page of the past; whoever has waited longest is next.
    pub(super) async fn turn(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        turn.map_err(|closed| StoreError::Unavailable(closed.to_string()))
    }

    /// Reads the log while somebody listens; until it is dropped.
    pub async fn run(self, store: Arc<Store>, progress: Arc<Progress>) {
        loop {
            while self.news.receiver_count() == 0 {
                self.wanted.notified().await;
            }
            let mut after = None;
            let mut said = Instant::now();
            while self.news.receiver_count() > 0 {
                match self.read(&store, &mut after, &mut said).await {
                    Ok(None) => {}
                    Ok(Some(end)) => {
                        sleep(PAUSE).await;
                        // The feed hears of each commit. Where it does not, a look from time to time will do.
                        let newer = progress.applied(end.entry.seq + 1);
                        let _elapsed = timeout(POLL_INTERVAL, newer).await;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "cannot read the audit log");
                        sleep(RETRY).await;
                    }
                }
            }
        }
    }

    /// Reads a page after `after`, or where the log ends when there is none to go on from. Returns the log's end when
    /// it got there.
    async fn read(
        &self,
        store: &Store,
        after: &mut Option<Cursor>,
        said: &mut Instant,
    ) -> Result<Option<Cursor>, StoreError> {
        let Some(begin) = *after else {
            *after = Some(Cursor::after(
                store.audit_tail.acquire().await?.audit_head().await?,
            ));
            return Ok(None);
        };
        let asked_at = Instant::now();
        let connection = store.audit_tail.acquire().await?;
        let page = connection
            .audit_page(begin, &AuditFilter::default(), PAGE_ROWS)
            .await?;
        if page.place != Place::Known {
            // Of another history, or not read for months: streams see that this does not follow what they have.
            *after = None;
            return Ok(None);
        }
        *after = Some(page.next);
        let end = (!page.has_more).then_some(page.next);
        if page.next != begin || said.elapsed() >= SILENCE_MAX {
            *said = Instant::now();
            // Without a listener nobody needs it.
            let _nobody = self.news.send(Arc::new(News {
                after: begin,
                asked_at,
                page,
            }));
        }
        Ok(end)
    }
}
