//! The log as the feed reads it: pages of changes after a cursor, and the notification that there is more.

use std::{future::poll_fn, sync::Arc, time::Duration};

use tokio::sync::Notify;
use tokio_postgres::{AsyncMessage, Client, Row, Statement};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::{
    DatabaseUrl, Store, StoreError, describe,
    load::{self, refuse_standby},
    pool::Connection,
    timings::Question,
};
use crate::model::{Change, OrganizationId, Position, Subject, UserId};

/// How long the database may work on one page. A page that takes longer is no use to anybody who waits for it.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// How far a reader has come: all entries before `entry`, and of `entry` itself the rows up to `row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    entry: Position,
    row: i32,
    /// The last entry that was read whole.
    pub applied: Position,
}

impl Cursor {
    /// The row of a cursor that has its entry whole.
    const WHOLE: i32 = i32::MAX;

    #[must_use]
    pub fn after(position: Position) -> Self {
        Self {
            entry: position,
            row: Self::WHOLE,
            applied: position,
        }
    }
}

/// The next rows of the log.
pub struct Page {
    /// The entries that begin in this page, in order.
    pub entries: Vec<Position>,
    /// The changes, each with the number of its entry, in order.
    pub changes: Vec<(i64, Change)>,
    /// Where the next page begins.
    pub next: Cursor,
    /// Whether the page ends because it is full rather than because the log does.
    pub full: bool,
    /// Whether the positions that were asked about are in this database's history.
    pub history_holds: bool,
}

/// $1, $2: positions that must all be there. $3, $4: the cursor. $5: rows a page.
/// Entries first, then each one's rows, each limited: a page costs the same in the middle of a large entry, and `seq >=`
/// by itself lets the index begin there. An entry
/// that touches everything needs none of its rows. Of an override, `users` are those whose mention changed, when
/// nothing else did; a list of lists, which PostgreSQL allows and nobody means, is not taken apart.
pub const READ_PAGE: &str = "
SELECT pg_is_in_recovery(),
       NOT EXISTS (SELECT FROM unnest($1::bigint[], $2::integer[]) seen (seq, uid)
                   WHERE seen.seq <> 0
                     AND NOT EXISTS (SELECT FROM hallpass.log l WHERE l.seq = seen.seq AND l.uid = seen.uid)),
       page.seq, page.uid, page.everything, page.n, page.org_id, page.affected_user_id, page.users
FROM (VALUES (1)) one
LEFT JOIN LATERAL (
    SELECT entry.seq, entry.uid, entry.everything, change.*
    FROM (
        SELECT seq, uid, entry_id, created_at,
               EXISTS (SELECT FROM hallpass.log_org o
                       WHERE o.org_id = '00000000-0000-0000-0000-000000000000' AND o.seq = log.seq) AS everything
        FROM hallpass.log
        WHERE seq >= $3::bigint AND (seq > $3 OR $4::integer < 2147483647)
        ORDER BY seq LIMIT $5
    ) entry
    LEFT JOIN LATERAL (
        SELECT a.n, a.org_id, a.affected_user_id,
               CASE WHEN a.table_name = 'organization_permissions'
                     AND a.old_values ->> 'min_role_required' IS NOT DISTINCT FROM a.new_values ->> 'min_role_required'
                     AND coalesce(a.old_values ->> 'is_enabled', 'true') = coalesce(a.new_values ->> 'is_enabled', 'true')
                     AND jsonb_typeof(a.old_values #> '{specific_users,0}') IS DISTINCT FROM 'array'
                     AND jsonb_typeof(a.new_values #> '{specific_users,0}') IS DISTINCT FROM 'array'
               THEN ARRAY(
                    SELECT coalesce(before.id, after.id)::uuid
                    FROM (SELECT DISTINCT jsonb_array_elements_text(nullif(a.old_values -> 'specific_users', 'null'))) before (id)
                    FULL JOIN
                         (SELECT DISTINCT jsonb_array_elements_text(nullif(a.new_values -> 'specific_users', 'null'))) after (id)
                      ON before.id = after.id
                    WHERE (before.id IS NULL) <> (after.id IS NULL)
               ) END AS users
        FROM public.permission_audit_log a
        WHERE a.entry_id = entry.entry_id AND a.created_at = entry.created_at
          AND a.n > CASE WHEN entry.seq = $3 THEN $4 ELSE 0 END
        ORDER BY a.n LIMIT $5
    ) change ON NOT entry.everything
    ORDER BY entry.seq, change.n LIMIT $5
) page ON true";

/// Wakes whoever follows the log, as a commit does.
pub(super) const NOTIFY: &str = "NOTIFY hallpass_log";

const READ_HEAD: &str = "
SELECT pg_is_in_recovery(), h.seq, h.uid
FROM (VALUES (1)) one
LEFT JOIN LATERAL (SELECT seq, uid FROM hallpass.log ORDER BY seq DESC LIMIT 1) h ON true";

const FIND_POSITIONS: &str = "
SELECT pg_is_in_recovery(),
       EXISTS (SELECT FROM hallpass.log WHERE seq = $1 AND uid = $2::integer)
       OR coalesce($1 < (SELECT min(seq) FROM hallpass.log), false),
       $3::bigint = 0 OR EXISTS (SELECT FROM hallpass.log WHERE seq = $3 AND uid = $4::integer)";

const TOUCHED_SINCE: &str = "
SELECT pg_is_in_recovery(),
       NOT EXISTS (SELECT FROM hallpass.log WHERE seq = $2 AND uid = $3::integer)
       OR EXISTS (SELECT FROM hallpass.log_org
                  WHERE org_id IN ($1, '00000000-0000-0000-0000-000000000000') AND seq > $2)";

/// Which of two positions are in a database's history.
#[derive(Clone, Copy, Debug)]
pub struct FoundPositions {
    pub has_asked: bool,
    pub has_end: bool,
}

impl Store {
    /// Whether `asked`, and the later position `end`, are in this database's history.
    ///
    /// A position that is older than the log reaches back counts as in it: nobody can tell, and every answer is newer.
    ///
    /// # Errors
    /// When the database is away or a standby.
    pub async fn find_positions(
        &self,
        asked: Position,
        end: Position,
    ) -> Result<FoundPositions, StoreError> {
        let connection = self.misses.acquire().await?;
        let rows = connection
            .query(
                Question::FindPositions,
                FIND_POSITIONS,
                &[
                    &asked.seq,
                    &asked.uid.cast_signed(),
                    &end.seq,
                    &end.uid.cast_signed(),
                ],
            )
            .await?;
        let row = rows
            .first()
            .ok_or_else(|| StoreError::Wrong("no row finds a position".to_owned()))?;
        refuse_standby(row, 0)?;
        Ok(FoundPositions {
            has_asked: row.try_get(1)?,
            has_end: row.try_get(2)?,
        })
    }
}

impl Connection {
    /// Whether something that touches the organization was committed after this position; true as well where the
    /// position is not in the log any more.
    ///
    /// # Errors
    /// When the database is away or a standby.
    pub async fn touched_since(
        self,
        organization: OrganizationId,
        position: Position,
    ) -> Result<bool, StoreError> {
        let rows = self
            .query(
                Question::TouchedSince,
                TOUCHED_SINCE,
                &[&organization.0, &position.seq, &position.uid.cast_signed()],
            )
            .await?;
        let row = rows
            .first()
            .ok_or_else(|| StoreError::Wrong("no row finds a change".to_owned()))?;
        refuse_standby(row, 0)?;
        Ok(row.try_get(1)?)
    }
}

/// The newest position.
pub(super) async fn read_head(client: &Client) -> Result<Position, StoreError> {
    let row = client.query_one(READ_HEAD, &[]).await?;
    load::refuse_standby(&row, 0)?;
    load::decode_head(&row, 1)
}

/// A connection that listens to the log and reads it.
pub struct LogReader {
    client: Client,
    read_page: Statement,
    more: Arc<Notify>,
    _driver: AbortOnDropHandle<()>,
}

impl LogReader {
    /// Connects, and listens before anything is read.
    ///
    /// # Errors
    /// When the database cannot be reached or will not have us.
    pub async fn open(url: &DatabaseUrl) -> Result<Self, StoreError> {
        let url = url.clone().with_statement_timeout(Some(PAGE_TIMEOUT));
        let (client, mut connection) = url.connect().await?;
        let more = Arc::new(Notify::new());
        let notified = Arc::clone(&more);
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            // Any message, and the end of the connection too, is a reason to look at the log.
            loop {
                match poll_fn(|cx| connection.poll_message(cx)).await {
                    Some(Ok(AsyncMessage::Notification(_))) => notified.notify_one(),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        tracing::debug!(error = %describe(&error), "log connection ended");
                        break;
                    }
                    None => break,
                }
            }
            notified.notify_one();
        }));
        client.batch_execute("LISTEN hallpass_log").await?;
        let read_page = client.prepare(READ_PAGE).await?;
        Ok(Self {
            client,
            read_page,
            more,
            _driver: driver,
        })
    }

    /// Returns when an entry was committed since the last call, or the connection has ended.
    pub async fn notified(&self) {
        self.more.notified().await;
    }

    /// The newest position.
    ///
    /// # Errors
    /// When the database is away or a standby.
    pub async fn head(&self) -> Result<Position, StoreError> {
        read_head(&self.client).await
    }

    /// The page after `cursor`, of at most `rows_max` rows; says whether all of `seen` are in the history.
    ///
    /// # Errors
    /// When the database is away or a standby.
    pub async fn page(
        &self,
        cursor: Cursor,
        seen: &[Position],
        rows_max: i64,
    ) -> Result<Page, StoreError> {
        let seqs: Vec<i64> = seen.iter().map(|position| position.seq).collect();
        let uids: Vec<i32> = (seen.iter())
            .map(|position| position.uid.cast_signed())
            .collect();
        let rows = self
            .client
            .query(
                &self.read_page,
                &[&seqs, &uids, &cursor.entry.seq, &cursor.row, &rows_max],
            )
            .await?;
        let first = rows
            .first()
            .ok_or_else(|| StoreError::Wrong("a page without a row".to_owned()))?;
        load::refuse_standby(first, 0)?;
        let mut page = Page {
            entries: Vec::new(),
            changes: Vec::with_capacity(rows.len()),
            next: cursor,
            full: rows.len() >= usize::try_from(rows_max).unwrap_or(usize::MAX),
            history_holds: first.try_get(1)?,
        };
        for row in &rows {
            read_row(row, &mut page)?;
        }
        if !page.full {
            page.next = Cursor::after(page.next.entry);
        }
        Ok(page)
    }
}

/// Adds a row's changes to the page and moves its cursor behind the row.
fn read_row(row: &Row, page: &mut Page) -> Result<(), StoreError> {
    // An empty page has one row, without an entry.
    let Some(seq) = row.try_get::<_, Option<i64>>(2)? else {
        return Ok(());
    };
    // An entry without audit rows, which retention or their owner may have removed, does not say what it changed; one
    // that the page before has read to its end has none left.
    let n: Option<i32> = row.try_get(5)?;
    let is_new = seq > page.next.entry.seq;
    page.next.entry = load::decode_head(row, 2)?;
    page.next.row = n.unwrap_or(Cursor::WHOLE);
    if is_new {
        page.entries.push(page.next.entry);
    }
    let touches_everything = row.try_get::<_, Option<bool>>(4)?.unwrap_or(false);
    if touches_everything || (n.is_none() && is_new) {
        page.changes.push((seq, Change::Everything));
        return Ok(());
    }
    let Some(organization) = row.try_get::<_, Option<Uuid>>(6)?.map(OrganizationId) else {
        return Ok(());
    };
    let affected: Option<Uuid> = row.try_get(7)?;
    let mentioned: Option<Vec<Uuid>> = row.try_get(8)?;
    let subject = |user| Subject {
        organization,
        user: UserId(user),
    };
    match (affected, mentioned) {
        (Some(user), _) => page.changes.push((seq, Change::Membership(subject(user)))),
        (None, Some(users)) => page
            .changes
            .extend((users.into_iter()).map(|user| (seq, Change::NamedUser(subject(user))))),
        (None, None) => page.changes.push((seq, Change::Organization(organization))),
    }
    Ok(())
}
