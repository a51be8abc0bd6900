//! Reads each new entry of the log once, for all live streams together.
//!
//! Invariant: a page says where it begins. Pages may be lost to a stream that is slow, or that came while the tail was at
//! rest; it sees that by where the next one begins.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, broadcast},
    time::{Instant, sleep, timeout},
};

use crate::{
    feed::{POLL_INTERVAL, Progress},
    model::Cursor,
    store::{
        Store, StoreError,
        audit::{AuditFilter, AuditPage, Place},
    },
};

/// Pages that a stream may be behind before it reads for itself: some seconds of the busiest log.
const PAGES_BEHIND_MAX: usize = 256;

/// Rows of a page: what is committed at once is small as a rule, and an import comes in pages.
const PAGE_ROWS: u16 = 500;

/// A page is handed on at least this often, empty or not, so that streams can say how far they are.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// The wait after an error.
const RETRY: Duration = Duration::from_millis(500);

/// What the tail tells its streams.
#[derive(Debug)]
pub enum News {
    /// What follows `after` in the log.
    Page { after: Cursor, page: AuditPage },
    /// The log is of another history since: what was sent may never have happened.
    HistoryLost,
}

/// A cheap-clone handle to the tail.
#[derive(Clone)]
pub struct Tail {
    news: broadcast::Sender<Arc<News>>,
    wanted: Arc<Notify>,
}

impl Default for Tail {
    fn default() -> Self {
        Self {
            news: broadcast::Sender::new(PAGES_BEHIND_MAX),
            wanted: Arc::new(Notify::new()),
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

    /// Reads the log while somebody listens; until it is dropped.
    pub async fn run(self, store: Arc<Store>, progress: Arc<Progress>) {
        loop {
            while self.news.receiver_count() == 0 {
                self.wanted.notified().await;
            }
            if let Err(error) = self.follow(&store, &progress).await {
                tracing::debug!(%error, "cannot read the audit log");
                sleep(RETRY).await;
            }
        }
    }

    /// Follows the log from its present head on, while somebody listens.
    async fn follow(&self, store: &Store, progress: &Progress) -> Result<(), StoreError> {
        let all = AuditFilter::default();
        let mut after = Cursor::after(store.audits.acquire().await?.audit_head().await?);
        let mut said = Instant::now();
        while self.news.receiver_count() > 0 {
            let page = store.audits.acquire().await?;
            let page = page.audit_page(after, &all, PAGE_ROWS).await?;
            if page.place == Place::Foreign {
                self.tell(News::HistoryLost);
                return Ok(());
            }
            let (next, has_more) = (page.next, page.has_more);
            if next != after || said.elapsed() >= SILENCE_MAX {
                said = Instant::now();
                self.tell(News::Page { after, page });
            }
            after = next;
            if !has_more {
                // The feed hears of each commit. Where it does not, a look from time to time will do.
                let newer = progress.applied(after.entry.seq + 1);
                let _elapsed = timeout(POLL_INTERVAL, newer).await;
            }
        }
        Ok(())
    }

    fn tell(&self, news: News) {
        // Without a listener nobody needs it.
        let _nobody = self.news.send(Arc::new(news));
    }
}
