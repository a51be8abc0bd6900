//! One stream of audit entries: first the past, in pages of its own, then what the tail reads.
//!
//! Invariant: the cursor moves over what a page of its own, or one of the tail's that is known to follow it, has told,
//! and only after that was handed on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use thiserror::Error;
use tokio::{
    sync::{
        broadcast::{self, error::RecvError},
        mpsc,
    },
    time::{Instant, sleep, timeout},
};

use super::{
    Limits,
    tail::{News, Tail},
};
use crate::{
    model::{Cursor, Position},
    store::{
        Store, StoreError,
        audit::{
            AuditEntry, AuditFilter,
            forward::{AuditPage, Place},
        },
    },
};

/// Rows that a page of the past scans: some ten milliseconds of the database, about a megabyte.
const PAGE_ROWS: u16 = 1_000;

/// Entries of a batch, and bytes of their values before and after: it stays far within the 4 MiB that clients take (one
/// entry may by itself be larger), and its DATA frames are not small.
const BATCH_ENTRIES_MAX: usize = 250;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// A checkpoint is sent when nothing else was for this long; the tail has a page at least as often.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(500);

/// When the tail says nothing for this long, the database is asked whether it is there.
const NEWS_WAIT_MAX: Duration = Duration::from_secs(3);

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
    Checkpoint(Cursor, SystemTime),
    /// What was behind the first, up to the second and with it, is not there any more.
    Gap(Cursor, Cursor),
}

/// Why a stream ends. Each end has the cursor to go on from.
#[derive(Clone, Debug, Error)]
pub enum StreamEnd {
    /// The caller does not take what it is sent.
    #[error("the stream's entries were not taken for {0:?}: go on from the cursor")]
    Slow(Duration),
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
    store: Arc<Store>,
    tail: Tail,
    limits: Limits,
    filter: Arc<AuditFilter>,
    /// Everything up to here was sent.
    pub cursor: Cursor,
    /// The cursor's entry, for those who watch.
    reached: Arc<AtomicI64>,
    /// What was removed before the first page is no gap for who asked for the earliest.
    begins_at_earliest: bool,
    events: mpsc::Sender<Event>,
    sent_at: Option<Instant>,
    /// When the database last answered: the cursor was in the log then.
    read_at: Instant,
}

/// Whether a page of the tail's says what comes after a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Join {
    Follows,
    /// It was asked for before the stream's own last page was there, and has nothing to say of the cursor.
    Older,
    /// It should, and does not: pages were lost, or the history is another.
    Unknown,
}

impl AuditStream {
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        tail: Tail,
        limits: Limits,
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
            reached: tail.follower(cursor),
            tail,
            limits,
            filter: Arc::new(filter),
            cursor,
            begins_at_earliest: start == Start::Earliest,
            events,
            sent_at: None,
            read_at: Instant::now(),
        }
    }

    /// Sends until the stream must end, or nobody listens any more.
    pub async fn run(&mut self) -> StreamEnd {
        loop {
            // Listens before it reads, so that nothing is committed between the past and the present.
            let mut news = self.tail.subscribe();
            if let Err(end) = self.catch_up().await {
                return end;
            }
            if let Err(end) = self.keep_up(&mut news).await {
                return end;
            }
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
                Place::Removed(last) => self.send_gap(last).await?,
            }
            self.begins_at_earliest = false;
            self.deliver(&page).await?;
            if !page.has_more {
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
            match timeout(NEWS_WAIT_MAX, news.recv()).await {
                Ok(Ok(news)) => match join(self.cursor, self.read_at, &news) {
                    Join::Follows => self.deliver(&news.page).await?,
                    Join::Older => {}
                    Join::Unknown => return Ok(()),
                },
                Ok(Err(RecvError::Lagged(_))) | Err(_) => return Ok(()),
                Ok(Err(RecvError::Closed)) => return Err(StreamEnd::Over),
            }
        }
    }

    async fn next_page(&mut self) -> Result<AuditPage, StreamEnd> {
        let mut away_since = None;
        loop {
            match self.read_page().await {
                Ok(page) => {
                    self.read_at = Instant::now();
                    return Ok(page);
                }
                Err(StoreError::Wrong(error)) => {
                    tracing::error!(%error, "an audit stream ends");
                    return Err(StreamEnd::DatabaseAway);
                }
                Err(error) => {
                    let since = away_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > self.limits.away_max {
                        tracing::warn!(%error, "an audit stream ends");
                        return Err(StreamEnd::DatabaseAway);
                    }
                    sleep(RETRY).await;
                }
            }
        }
    }

    async fn read_page(&self) -> Result<AuditPage, StoreError> {
        let turn = self.tail.turn().await?;
        let connection = self.store.audits.acquire().await?;
        let (cursor, filter) = (self.cursor, Arc::clone(&self.filter));
        // A task of its own: a stream that ends must not leave a connection with half a question.
        let page = tokio::spawn(async move {
            let page = connection.audit_page(cursor, &filter, PAGE_ROWS).await;
            drop(turn);
            page
        });
        page.await
            .unwrap_or_else(|panic| Err(StoreError::Wrong(panic.to_string())))
    }

    /// Sends what a page has that is new here, and moves the cursor behind it.
    async fn deliver(&mut self, page: &AuditPage) -> Result<(), StreamEnd> {
        let reached = self.cursor.entry.seq;
        let mut bare = (page.without_rows.iter().copied())
            .filter(|position| position.seq > reached)
            .peekable();
        let mut batch = Batch::default();
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
            batch.push(entry);
            if batch.is_full() {
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
        let reached = self.cursor.entry.seq;
        self.reached.store(reached, Ordering::Relaxed);
        let is_due = |sent_at: Instant| sent_at.elapsed() >= CHECKPOINT_INTERVAL;
        if self.sent_at.is_none_or(is_due) {
            let checkpoint = Event::Checkpoint(self.cursor, page.as_of);
            self.send(checkpoint).await?;
        }
        Ok(())
    }

    async fn send_batch(&mut self, batch: &mut Batch) -> Result<(), StreamEnd> {
        let Batch { entries, .. } = std::mem::take(batch);
        if let Some(last) = entries.last().and_then(|entry| entry.cursor) {
            self.send(Event::Entries(entries)).await?;
            self.cursor = last;
        }
        Ok(())
    }

    /// What comes after the cursor up to `last` was removed: by retention, or an entry's rows by their owner.
    async fn send_gap(&mut self, last: Position) -> Result<(), StreamEnd> {
        let to = Cursor::after(last);
        self.send(Event::Gap(self.cursor, to)).await?;
        self.cursor = to;
        Ok(())
    }

    async fn send(&mut self, event: Event) -> Result<(), StreamEnd> {
        let slow_max = self.limits.slow_max;
        match timeout(slow_max, self.events.send(event)).await {
            Ok(Ok(())) => {
                self.sent_at = Some(Instant::now());
                Ok(())
            }
            // Nobody listens: what the end is called does not matter.
            Ok(Err(_)) => Err(StreamEnd::Over),
            Err(_) => Err(StreamEnd::Slow(slow_max)),
        }
    }
}

/// A number may come again under another uid, so it is not enough that the page has a later one.
fn join(cursor: Cursor, read_at: Instant, news: &News) -> Join {
    let page = &news.page;
    let is_in_page = || {
        page.next.entry == cursor.entry
            || page.without_rows.contains(&cursor.entry)
            || (page.entries.iter())
                .any(|entry| entry.cursor.is_some_and(|own| own.entry == cursor.entry))
    };
    if news.after == cursor || (!cursor.is_before(news.after) && is_in_page()) {
        Join::Follows
    } else if news.asked_at < read_at {
        Join::Older
    } else {
        Join::Unknown
    }
}

/// Entries to be sent together.
#[derive(Default)]
struct Batch {
    entries: Vec<AuditEntry>,
    bytes: usize,
}

impl Batch {
    fn push(&mut self, entry: &AuditEntry) {
        let length = |value: &Option<String>| value.as_ref().map_or(0, String::len);
        self.bytes += length(&entry.before) + length(&entry.after);
        self.entries.push(entry.clone());
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= BATCH_ENTRIES_MAX || self.bytes >= BATCH_BYTES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Cursor {
        text.parse().unwrap()
    }

    /// A page of the tail's that was asked for a second after the stream's own last one, or before it.
    fn joined(cursor: &str, after: &str, next: &str, was_asked_before: bool) -> Join {
        let now = Instant::now();
        let (earlier, later) = (now, now + Duration::from_secs(1));
        let news = News {
            after: at(after),
            asked_at: if was_asked_before { earlier } else { later },
            page: AuditPage {
                place: Place::Known,
                entries: Vec::new(),
                without_rows: vec!["7-000000aa".parse().unwrap()],
                next: at(next),
                has_more: false,
                as_of: SystemTime::UNIX_EPOCH,
            },
        };
        let read_at = if was_asked_before { later } else { earlier };
        join(at(cursor), read_at, &news)
    }

    #[test]
    fn a_page_is_taken_only_where_it_is_known_to_follow() {
        let cases = [
            // Where it begins, to the row and to the uid.
            ("5-000000aa", "5-000000aa", "9-000000aa", Join::Follows),
            ("5-000000aa.3", "5-000000aa.3", "9-000000aa", Join::Follows),
            ("5-000000bb", "5-000000aa", "9-000000aa", Join::Unknown),
            // Within it.
            ("7-000000aa", "5-000000aa", "9-000000aa", Join::Follows),
            ("9-000000aa", "5-000000aa", "9-000000aa", Join::Follows),
            ("9-000000aa", "5-000000aa", "9-000000aa.4", Join::Follows),
            ("7-000000bb", "5-000000aa", "9-000000aa", Join::Unknown),
            ("9-000000bb", "5-000000aa", "9-000000aa", Join::Unknown),
            // Before it, of the same entry too: there is a hole.
            ("4-000000aa", "5-000000aa", "9-000000aa", Join::Unknown),
            ("9-000000aa.3", "9-000000aa.5", "9-000000aa", Join::Unknown),
            // Behind it, though it was asked for later: the log is shorter than it was.
            ("10-000000aa", "5-000000aa", "9-000000aa", Join::Unknown),
        ];
        for (cursor, after, next, expected) in cases {
            assert_eq!(joined(cursor, after, next, false), expected, "{cursor}");
            let older = match expected {
                Join::Follows => Join::Follows,
                _ => Join::Older,
            };
            assert_eq!(joined(cursor, after, next, true), older, "{cursor}");
        }
    }
}
