//! The audit log backward: pages from the newest row on, for people to look through.
//!
//! Invariant: a page reads one index in its order, a bounded number of its rows, and sorts none.

use std::time::{Duration, SystemTime};

use tokio_postgres::types::ToSql;

use super::{AuditEntry, AuditFilter, decode_entries, first_row};
use crate::store::{StoreError, pool::Connection, timings::Question};

/// Rows of the index that a page scans at most; one that has found less than it was asked for says where to go on.
pub const SCAN_MAX: u16 = 5_000;

/// Bytes of values before and after from which on a page takes no more rows, so that it stays within the 4 MiB that
/// clients take; they are as PostgreSQL stores them, and some three times as long when they are printed.
const PAGE_BYTES: i64 = 1 << 20;

/// Columns before an entry's own.
const HEADER: usize = 6;

/// $7, $8, $9: when the transaction of the row before the page began, its entry's id, its number. $10: rows to scan at
/// most. $11: rows of the page. $12: bytes of them. The rows of one index in the order of the list, then the filter.
macro_rules! list_backward {
    ($leading:literal) => {
        concat!(
            "
WITH scanned AS MATERIALIZED (
    SELECT * FROM public.permission_audit_log
    WHERE ",
            $leading,
            " AND (created_at, entry_id, n) < ($7::timestamptz, $8::bigint, $9::integer) AND created_at <= $7
    ORDER BY created_at DESC, entry_id DESC, n DESC LIMIT $10
), fitting AS MATERIALIZED (
    SELECT *, sum(coalesce(pg_column_size(old_values), 0) + coalesce(pg_column_size(new_values), 0))
              OVER (ORDER BY created_at DESC, entry_id DESC, n DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
              AS bytes_before
    FROM (SELECT * FROM scanned WHERE ",
            fits!(),
            " ORDER BY created_at DESC, entry_id DESC, n DESC LIMIT $11::bigint + 1) found
), page AS (
    SELECT * FROM fitting WHERE bytes_before IS NULL OR bytes_before < $12::bigint
    ORDER BY created_at DESC, entry_id DESC, n DESC LIMIT $11
)
SELECT pg_is_in_recovery(), (SELECT count(*) FROM fitting) > (SELECT count(*) FROM page),
       (SELECT count(*) FROM scanned) >= $10, last.created_at, last.entry_id, last.n, fit.*
FROM (VALUES (1)) one
LEFT JOIN (SELECT created_at, entry_id, n FROM scanned ORDER BY created_at, entry_id, n LIMIT 1) last ON true
LEFT JOIN (
    SELECT ",
            entry_columns!(),
            ", audited.entry_id AS of_entry
    FROM page audited
    LEFT JOIN LATERAL (
        SELECT l.seq, l.uid, l.xid, l.committed_at FROM hallpass.log l
        WHERE l.entry_id = audited.entry_id AND l.created_at = audited.created_at LIMIT 1
    ) entry ON true
) fit ON true
ORDER BY fit.created_at DESC, fit.of_entry DESC, fit.n DESC"
        )
    };
}

const LIST_OF_AFFECTED_USER: &str = list_backward!("affected_user_id = $2");
const LIST_OF_ACTOR: &str = list_backward!("changed_by = $3");
const LIST_OF_ORGANIZATION: &str = list_backward!("org_id = ($1::uuid[])[1]");
const LIST_OF_PERMISSION: &str = list_backward!("permission_key = $4");
const LIST_OF_ALL: &str = list_backward!("true");

impl AuditFilter {
    /// The statement that reads by the index which leads to the fewest rows, as a rule.
    #[must_use]
    pub fn list_sql(&self) -> &'static str {
        let organizations = self.organizations.as_deref();
        if self.affected_user.is_some() {
            LIST_OF_AFFECTED_USER
        } else if self.actor.is_some() {
            LIST_OF_ACTOR
        } else if organizations.is_some_and(|listed| listed.len() == 1) {
            LIST_OF_ORGANIZATION
        } else if self.permission.is_some() {
            LIST_OF_PERMISSION
        } else {
            LIST_OF_ALL
        }
    }
}

/// A row of the list, as the key of the page behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListKey {
    pub transaction_time: SystemTime,
    pub entry_id: i64,
    pub row: i32,
}

impl ListKey {
    /// Before every row: PostgreSQL's infinity has no `SystemTime`, the end of the year 9999 will do.
    fn newest() -> Self {
        Self {
            transaction_time: SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799),
            entry_id: i64::MAX,
            row: i32::MAX,
        }
    }
}

/// A page of the list, newest first.
#[derive(Debug)]
pub struct AuditList {
    pub entries: Vec<AuditEntry>,
    /// Where the next page begins; `None` for the last page.
    pub next: Option<ListKey>,
}

impl Connection {
    /// The entries that fit, newest first, behind `after`, up to `size` of them among the next `scan_max` rows of the index.
    ///
    /// # Errors
    /// When the database is away, a standby, or answers what it must not.
    pub async fn audit_list(
        self,
        filter: &AuditFilter,
        after: Option<ListKey>,
        size: u16,
        scan_max: u16,
    ) -> Result<AuditList, StoreError> {
        let after = after.unwrap_or_else(ListKey::newest);
        let (scan, limit) = (i64::from(scan_max), i64::from(size));
        let mut parameters = filter.parameters();
        let place: [&(dyn ToSql + Sync); 6] = [
            &after.transaction_time,
            &after.entry_id,
            &after.row,
            &scan,
            &limit,
            &PAGE_BYTES,
        ];
        parameters.extend(place);
        let rows = self
            .query(Question::AuditList, filter.list_sql(), &parameters)
            .await?;
        let first = first_row(&rows)?;
        let (is_cut, is_full): (bool, bool) = (first.try_get(1)?, first.try_get(2)?);
        let next = match rows.last() {
            // More rows fit behind the last one.
            Some(last) if is_cut => Some(ListKey {
                transaction_time: last.try_get(HEADER + 25)?,
                entry_id: last.try_get(HEADER + 27)?,
                row: last.try_get(HEADER + 2)?,
            }),
            _ if is_full => Some(ListKey {
                transaction_time: first.try_get(3)?,
                entry_id: first.try_get(4)?,
                row: first.try_get(5)?,
            }),
            _ => None,
        };
        let entries = decode_entries(&rows, HEADER)?;
        Ok(AuditList { entries, next })
    }
}
