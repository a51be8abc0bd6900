//! One stream of audit entries: first the past, in pages of its own, then what the tail reads.

use std::{sync::Arc, time::Duration};

use thiserror::Error;
use tokio::{
    sync::{
        broadcast::{self, error::RecvError},
        mpsc,
    },
    time::{Instant, sleep, timeout},
};

use super::tail::{News, Tail};
use crate::{
    model::{Cursor, Position},
    store::{
        Store, StoreError,
        audit::{AuditEntry, AuditFilter, AuditPage, Place},
    },
};

/// Rows that a page of the past scans: some ten milliseconds of the database.
const PAGE_ROWS: u16 = 2_000;

/// Entries of a batch: with 2 kB each it stays far within the 4 MiB that clients take, and its DATA frames are not small.
const BATCH_ENTRIES_MAX: usize = 250;

/// A caller who takes nothing for this long is told to come back.
pub const SLOW_MAX: Duration = Duration::from_secs(30);

/// A checkpoint is sent when nothing else was for this long.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(900);

/// A database that is away for longer ends the stream.
const AWAY_MAX: Duration = Duration::from_secs(30);

/// The wait before the past is asked for again.
const RETRY: Duration = Duration::from_millis(250);

/// Where a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    After(Cursor),
    /// With the earliest entry that is kept.
    Earliest,
}

/// What a stream sends.
#[derive(Debug)]
pub enum Event {
    Entries(Vec<AuditEntry>),
    /// Everything up to the cursor has been sent, and so has everything that was committed when the database's clock said this.
    Checkpoint(Cursor, std::time::SystemTime),
    /// What was between is not there any more.
    Gap(Cursor, Cursor),
}

/// Why a stream ends. Each end has the cursor to go on from.
#[derive(Clone, Debug, Error)]
pub enum StreamEnd {
    /// The caller does not take what it is sent.
    #[error("the stream's entries were not taken for {SLOW_MAX:?}: go on from the cursor")]
    Slow,
    /// The cursor is of another history.
    #[error(
        "the cursor is not in this database's log: its entry is another database's, or was lost in a failover or a restore"
    )]
    HistoryLost,
    #[error("the database is away: go on from the cursor later")]
    DatabaseAway,
    /// It is time, for the stream or for the server.
    #[error("the stream has ended: go on from the cursor")]
    Over,
}

/// A stream on its way.
pub struct AuditStream {
    pub store: Arc<Store>,
    pub tail: Tail,
    pub filter: AuditFilter,
    pub cursor: Cursor,
    /// Whether what was removed before the first page is a gap: not for who asked for the earliest.
    pub begins_at_earliest: bool,
    pub events: mpsc::Sender<Event>,
    sent_at: Instant,
}

impl AuditStream {
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        tail: Tail,
        filter: AuditFilter,
        start: Start,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let cursor = match start {
            Start::After(cursor) => cursor,
            Start::Earliest => Cursor::after(Position::ZERO),
        };
        Self {
            store,
            tail,
            filter,
            cursor,
            begins_at_earliest: start == Start::Earliest,
            events,
            sent_at: Instant::now(),
        }
    }

    /// Sends until the stream must end, or nobody listens any more.
    pub async fn run(&mut self) -> StreamEnd {
        loop {
            // Listens before it reads, so that nothing is committed between the past and the present.
            let mut news = self.tail.subscribe();
            let Err(end) = async {
                self.catch_up().await?;
                self.keep_up(&mut news).await
            }
            .await
            else {
                continue;
            };
            return end;
        }
    }

    /// Reads the past up to the end of the log.
    async fn catch_up(&mut self) -> Result<(), StreamEnd> {
        loop {
            let page = self.next_page().await?;
            match page.place {
                Place::Known => {}
                Place::Foreign => return Err(StreamEnd::HistoryLost),
                Place::Removed(_) if self.begins_at_earliest => {}
                Place::Removed(kept) => {
                    let gap = Event::Gap(self.cursor, Cursor::after(kept));
                    self.send(gap).await?;
                }
            }
            self.begins_at_earliest = false;
            let has_more = page.has_more;
            self.deliver(&page).await?;
            if !has_more {
                return Ok(());
            }
        }
    }

    /// Takes what the tail reads, as long as it follows what was sent. Returns when it does not.
    async fn keep_up(
        &mut self,
        news: &mut broadcast::Receiver<Arc<News>>,
    ) -> Result<(), StreamEnd> {
        loop {
            match news.recv().await.as_deref() {
                Ok(News::Page { after, .. }) if self.cursor.is_before(*after) => return Ok(()),
                Ok(News::Page { page, .. }) => self.deliver(page).await?,
                Ok(News::HistoryLost) => return Err(StreamEnd::HistoryLost),
                Err(RecvError::Lagged(_)) => return Ok(()),
                Err(RecvError::Closed) => return Err(StreamEnd::Over),
            }
        }
    }

    async fn next_page(&self) -> Result<AuditPage, StreamEnd> {
        let started = Instant::now();
        loop {
            let page = async {
                let connection = self.store.audits.acquire().await?;
                connection
                    .audit_page(self.cursor, &self.filter, PAGE_ROWS)
                    .await
            };
            match page.await {
                Ok(page) => return Ok(page),
                Err(error) if started.elapsed() > AWAY_MAX => {
                    tracing::warn!(%error, "an audit stream ends");
                    return Err(StreamEnd::DatabaseAway);
                }
                Err(StoreError::Wrong(error)) => {
                    tracing::error!(%error, "an audit stream ends");
                    return Err(StreamEnd::DatabaseAway);
                }
                Err(_) => sleep(RETRY).await,
            }
        }
    }

    /// Sends what a page has that is new here, and moves the cursor behind it.
    async fn deliver(&mut self, page: &AuditPage) -> Result<(), StreamEnd> {
        let applied = self.cursor.entry.seq;
        let mut bare = (page.without_rows.iter().copied())
            .filter(|position| position.seq > applied)
            .peekable();
        let mut batch = Vec::new();
        for entry in &page.entries {
            let Some(cursor) = entry.cursor.filter(|cursor| self.cursor.is_before(*cursor)) else {
                continue;
            };
            if !self.filter.fits(entry) {
                continue;
            }
            while let Some(position) = bare.next_if(|position| position.seq < cursor.entry.seq) {
                self.send_batch(&mut batch).await?;
                self.send_gap(position).await?;
            }
            batch.push(entry.clone());
            if batch.len() >= BATCH_ENTRIES_MAX {
                self.send_batch(&mut batch).await?;
            }
        }
        self.send_batch(&mut batch).await?;
        for position in bare {
            self.send_gap(position).await?;
        }
        if self.cursor.is_before(page.next) {
            self.cursor = page.next;
        }
        if !page.has_more && self.sent_at.elapsed() >= CHECKPOINT_INTERVAL {
            self.send(Event::Checkpoint(self.cursor, page.as_of))
                .await?;
        }
        Ok(())
    }

    async fn send_batch(&mut self, batch: &mut Vec<AuditEntry>) -> Result<(), StreamEnd> {
        let last = batch.last().and_then(|entry| entry.cursor);
        if let Some(last) = last {
            self.send(Event::Entries(std::mem::take(batch))).await?;
            self.cursor = last;
        }
        Ok(())
    }

    /// An entry whose rows are gone: the log was cut just here, or its rows were deleted.
    async fn send_gap(&mut self, position: Position) -> Result<(), StreamEnd> {
        let to = Cursor::after(position);
        self.send(Event::Gap(self.cursor, to)).await?;
        self.cursor = to;
        Ok(())
    }

    async fn send(&mut self, event: Event) -> Result<(), StreamEnd> {
        match timeout(SLOW_MAX, self.events.send(event)).await {
            Ok(Ok(())) => {
                self.sent_at = Instant::now();
                Ok(())
            }
            // Nobody listens: what the end is called does not matter.
            Ok(Err(_)) => Err(StreamEnd::Over),
            Err(_) => Err(StreamEnd::Slow),
        }
    }
}
