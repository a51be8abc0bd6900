//! The audit log forward: pages after a cursor, and the cursors that streams begin with.
//!
//! Invariant: the entries of a page, and where the cursor stands, are of one snapshot.

use std::time::SystemTime;

use tokio_postgres::types::ToSql;

use super::{AuditEntry, AuditFilter, decode_entries, first_row, position};
use crate::{
    model::{Cursor, Position},
    store::{StoreError, load::decode_head, pool::Connection, timings::Question},
};

/// Bytes of values before and after, as PostgreSQL stores them, from which on a page takes no more rows: a row may name
/// thousands of users.
const PAGE_BYTES: i64 = 2 << 20;

/// Where a reader finds itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its cursor is in the log, or is the last that retention has removed.
    Known,
    /// Retention has removed what came after its cursor, up to this entry.
    Removed(Position),
    /// Its cursor is of another history.
    Foreign,
}

/// The next entries after a cursor.
#[derive(Debug)]
pub struct AuditPage {
    pub place: Place,
    /// Those that fit, in order.
    pub entries: Vec<AuditEntry>,
    /// Log entries, ascending, whose audit rows are not there any more.
    pub without_rows: Vec<Position>,
    /// Everything up to here was looked at.
    pub next: Cursor,
    /// Whether the log goes on behind `next`, as far as this page's snapshot knows.
    pub has_more: bool,
    /// By the database's clock: at the end of the log, from before the snapshot; else when `next` was committed.
    pub as_of: SystemTime,
}

/// $7, $8, $9: the cursor's seq, uid and row. $10: rows to scan at most. $11: bytes of them.
/// Entries first, then each one's rows, each limited, as the feed does it. `seq >=` by itself, for the index.
pub const READ_FORWARD: &str = concat!(
    "
WITH read AS MATERIALIZED (
    SELECT entry.seq, entry.uid, entry.xid, entry.committed_at, audited.*
    FROM (
        SELECT * FROM hallpass.log WHERE seq >= $7::bigint AND (seq > $7 OR $9::integer < 2147483647)
        ORDER BY seq LIMIT $10
    ) entry
    LEFT JOIN LATERAL (
        SELECT a.* FROM public.permission_audit_log a
        WHERE a.entry_id = entry.entry_id AND a.created_at = entry.created_at
          AND a.n > CASE WHEN entry.seq = $7 THEN $9 ELSE 0 END
        ORDER BY a.n LIMIT $10
    ) audited ON true
    ORDER BY entry.seq, audited.n LIMIT $10
), scanned AS (
    SELECT * FROM (
        SELECT *, sum(coalesce(pg_column_size(old_values), 0) + coalesce(pg_column_size(new_values), 0))
                  OVER (ORDER BY seq, n ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
        FROM read) sized
    WHERE bytes_before IS NULL OR bytes_before < $11::bigint
)
SELECT pg_is_in_recovery(), statement_timestamp(),
       CASE WHEN $7 < removed.seq THEN 'removed'
            WHEN $7 = removed.seq AND $8::integer = removed.uid
                THEN CASE WHEN $9 < 2147483647 THEN 'removed' ELSE 'known' END
            WHEN EXISTS (SELECT FROM hallpass.log known WHERE known.seq = $7 AND known.uid = $8) THEN 'known'
            ELSE 'foreign' END AS place,
       removed.seq, removed.uid,
       (SELECT count(*) FROM read) >= $10 OR (SELECT count(*) FROM read) > (SELECT count(*) FROM scanned),
       last.seq, last.uid, last.n, last.committed_at, bare.seqs, bare.uids, fit.*
FROM hallpass.log_removed removed
LEFT JOIN (SELECT seq, uid, n, committed_at FROM scanned ORDER BY seq DESC, n DESC NULLS LAST LIMIT 1) last ON true
CROSS JOIN (SELECT array_agg(seq ORDER BY seq) AS seqs, array_agg(uid ORDER BY seq) AS uids
            FROM scanned WHERE n IS NULL AND seq > $7) bare
LEFT JOIN (SELECT ",
    entry_columns!(),
    "
    FROM scanned WHERE n IS NOT NULL AND ",
    fits!(),
    ") fit ON true
ORDER BY fit.seq, fit.n"
);

/// Columns before an entry's own.
const HEADER: usize = 12;

const HEAD: &str = "
SELECT pg_is_in_recovery(), h.seq, h.uid
FROM (VALUES (1)) one LEFT JOIN LATERAL (SELECT seq, uid FROM hallpass.log ORDER BY seq DESC LIMIT 1) h ON true";

/// The entry before the first that was committed at or after $1; of those that retention has removed the last alone is
/// known.
pub const BEFORE_TIME: &str = "
SELECT pg_is_in_recovery(), h.seq, h.uid
FROM (VALUES (1)) one
LEFT JOIN LATERAL (
    SELECT seq, uid FROM (
        SELECT seq, uid FROM hallpass.log_removed WHERE committed_at < $1 AND seq > 0
        UNION ALL
        (SELECT before.seq, before.uid FROM hallpass.log before
         WHERE before.seq < coalesce((SELECT seq FROM hallpass.log WHERE committed_at >= $1
                                      ORDER BY committed_at, seq LIMIT 1), 9223372036854775807)
         ORDER BY before.seq DESC LIMIT 1)
    ) before ORDER BY seq DESC LIMIT 1) h ON true";

impl Connection {
    /// The entries after `cursor` that fit, among the next `scan_max` rows.
    ///
    /// # Errors
    /// When the database is away, a standby, or answers what it must not.
    pub async fn audit_page(
        self,
        cursor: Cursor,
        filter: &AuditFilter,
        scan_max: u16,
    ) -> Result<AuditPage, StoreError> {
        let (uid, scan) = (cursor.entry.uid.cast_signed(), i64::from(scan_max));
        let mut parameters = filter.parameters();
        let place: [&(dyn ToSql + Sync); 5] =
            [&cursor.entry.seq, &uid, &cursor.row, &scan, &PAGE_BYTES];
        parameters.extend(place);
        let rows = self
            .query(Question::AuditPage, READ_FORWARD, &parameters)
            .await?;
        let first = first_row(&rows)?;
        let place = match first.try_get(2)? {
            "known" => Place::Known,
            "removed" => Place::Removed(decode_head(first, 3)?),
            _ => Place::Foreign,
        };
        let has_more = first.try_get(5)?;
        let last: Option<i64> = first.try_get(6)?;
        let (next, last_committed) = match last {
            None => (Cursor::after(cursor.entry), None),
            Some(seq) => {
                let next = Cursor {
                    entry: position(seq, first.try_get(7)?),
                    // The rows behind it are in the next page, if there are any.
                    row: match first.try_get(8)? {
                        Some(row) if has_more => row,
                        _ => Cursor::WHOLE,
                    },
                };
                (next, first.try_get(9)?)
            }
        };
        let seqs: Option<Vec<i64>> = first.try_get(10)?;
        let uids: Option<Vec<i32>> = first.try_get(11)?;
        Ok(AuditPage {
            place,
            entries: decode_entries(&rows, HEADER)?,
            without_rows: (seqs.unwrap_or_default().into_iter())
                .zip(uids.unwrap_or_default())
                .map(|(seq, uid)| position(seq, uid))
                .collect(),
            next,
            has_more,
            as_of: match last_committed {
                Some(committed) if has_more => committed,
                _ => first.try_get(1)?,
            },
        })
    }

    /// The newest position.
    ///
    /// # Errors
    /// As [`Connection::audit_page`].
    pub async fn audit_head(self) -> Result<Position, StoreError> {
        let rows = self.query(Question::AuditHead, HEAD, &[]).await?;
        decode_head(first_row(&rows)?, 1)
    }

    /// The position behind which everything was committed at or after `time`.
    ///
    /// # Errors
    /// As [`Connection::audit_page`].
    pub async fn audit_position_before(self, time: SystemTime) -> Result<Position, StoreError> {
        let rows = self
            .query(Question::AuditHead, BEFORE_TIME, &[&time])
            .await?;
        decode_head(first_row(&rows)?, 1)
    }
}
