//! The audit log as people read it: forward from a cursor in the order of commits, and in pages from the newest back.
//!
//! Invariant: a page scans a bounded number of rows, fitting or not, and says how far it has come; so a filter that
//! seldom fits costs no more than one that always does, and no row is passed that was not looked at.

use std::time::{Duration, SystemTime};

use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{
    StoreError,
    load::{decode_head, refuse_standby},
    pool::Connection,
};
use crate::model::{Cursor, OrganizationId, Position, UserId};

/// One changed row, as the audit log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// `None` where the log no longer has its entry: retention takes the log first, and rows from before an uninstall have
    /// never been in this one. A stream's entries always have it, and what follows from it.
    pub cursor: Option<Cursor>,
    pub id: Uuid,
    pub organization: Option<OrganizationId>,
    pub permission: Option<String>,
    pub affected_user: Option<UserId>,
    pub table: String,
    pub change_type: String,
    /// JSON objects.
    pub before: Option<String>,
    pub after: Option<String>,
    pub changed_fields: Vec<String>,
    pub actor: Option<UserId>,
    pub actor_profile: Option<Uuid>,
    pub actor_source: String,
    pub ip_address: Option<String>,
    pub user_agent: Option<String>,
    pub request_id: Option<String>,
    pub session_id: Option<String>,
    pub trace_id: Option<String>,
    pub database_role: String,
    pub database_login: String,
    pub client_address: Option<String>,
    pub application_name: Option<String>,
    pub transaction_id: Option<u64>,
    pub transaction_time: SystemTime,
    pub commit_time: Option<SystemTime>,
}

/// Chooses entries: those that fit everything that is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Of one of these; `None`: of any, and those that belong to none.
    pub organizations: Option<Vec<Uuid>>,
    pub affected_user: Option<Uuid>,
    pub actor: Option<Uuid>,
    pub permission: Option<String>,
    pub table: Option<String>,
    pub change_type: Option<String>,
}

impl AuditFilter {
    /// The same question as SQL's `fits!`, asked of an entry that is here already.
    #[must_use]
    pub fn fits(&self, entry: &AuditEntry) -> bool {
        let organization = entry.organization.map(|organization| organization.0);
        let fits_organization = self
            .organizations
            .as_ref()
            .is_none_or(|listed| organization.is_some_and(|id| listed.contains(&id)));
        fits_organization
            && fits(self.affected_user, entry.affected_user.map(|user| user.0))
            && fits(self.actor, entry.actor.map(|user| user.0))
            && fits(self.permission.as_deref(), entry.permission.as_deref())
            && fits(self.table.as_deref(), Some(&entry.table))
            && fits(self.change_type.as_deref(), Some(&entry.change_type))
    }

    /// `$1` to `$6`.
    fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        vec![
            &self.organizations,
            &self.affected_user,
            &self.actor,
            &self.permission,
            &self.table,
            &self.change_type,
        ]
    }
}

fn fits<T: PartialEq>(asked: Option<T>, found: Option<T>) -> bool {
    asked.is_none() || asked == found
}

/// Where a reader finds itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its cursor is in the log.
    Known,
    /// Retention has removed what came after its cursor, up to this entry, the earliest that is kept.
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
    /// By the database's clock, from before the snapshot.
    pub as_of: SystemTime,
}

/// The columns of an entry, as [`decode_entry`] reads them: of an audit row and its entry in the log, side by side.
macro_rules! entry_columns {
    () => {
        "seq, uid, n, id, org_id, permission_key, affected_user_id, table_name, change_type,
       old_values::text AS before, new_values::text AS after,
       ARRAY(SELECT key
             FROM jsonb_each(coalesce(old_values, '{}')) b FULL JOIN jsonb_each(coalesce(new_values, '{}')) c USING (key)
             WHERE b.value IS DISTINCT FROM c.value ORDER BY key COLLATE \"C\") AS changed_fields,
       changed_by, changed_by_profile_id, actor_source, host(ip_address) AS ip_address, user_agent, request_id, session_id,
       trace_id, database_role, database_login, host(client_address) AS client_address, application_name,
       xid::text AS transaction_id, created_at, committed_at"
    };
}

/// $1 to $6: the filter.
macro_rules! fits {
    () => {
        "($1::uuid[] IS NULL OR org_id = ANY ($1)) AND ($2::uuid IS NULL OR affected_user_id = $2)
      AND ($3::uuid IS NULL OR changed_by = $3) AND ($4::text IS NULL OR permission_key = $4)
      AND ($5::text IS NULL OR table_name = $5) AND ($6::text IS NULL OR change_type = $6)"
    };
}

/// $7, $8, $9: the cursor's seq, uid and row. $10: rows to scan at most.
/// Entries first, then each one's rows, each limited, as the feed does it.
pub const READ_FORWARD: &str = concat!(
    "
WITH scanned AS MATERIALIZED (
    SELECT entry.seq, entry.uid, entry.xid, entry.committed_at, audited.*
    FROM (
        SELECT * FROM hallpass.log WHERE seq > $7::bigint OR seq = $7 AND $9::integer < 2147483647
        ORDER BY seq LIMIT $10
    ) entry
    LEFT JOIN LATERAL (
        SELECT a.* FROM public.permission_audit_log a
        WHERE a.entry_id = entry.entry_id AND a.created_at = entry.created_at
          AND a.n > CASE WHEN entry.seq = $7 THEN $9 ELSE 0 END
        ORDER BY a.n LIMIT $10
    ) audited ON true
    ORDER BY entry.seq, audited.n LIMIT $10
)
SELECT pg_is_in_recovery(), statement_timestamp(),
       $7 = 0 OR EXISTS (SELECT FROM hallpass.log known WHERE known.seq = $7 AND known.uid = $8::integer),
       $7 < (SELECT removed.seq FROM hallpass.log_removed removed),
       (SELECT count(*) FROM scanned) >= $10,
       last.seq, last.uid, last.n, bare.seqs, bare.uids, earliest.seq, earliest.uid, fit.*
FROM (VALUES (1)) one
LEFT JOIN (SELECT seq, uid, n FROM scanned ORDER BY seq DESC, n DESC NULLS LAST LIMIT 1) last ON true
LEFT JOIN (SELECT seq, uid FROM hallpass.log ORDER BY seq LIMIT 1) earliest ON true
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

/// Columns before an entry's own in [`READ_FORWARD`], and in a list.
const FORWARD_HEADER: usize = 12;
const LIST_HEADER: usize = 5;

/// $7, $8, $9: when the transaction of the row before the page began, its entry's id, its number. $10: rows to scan at
/// most. $11: rows of the page. The rows of one index in the order of the list, then the filter.
macro_rules! list_backward {
    ($leading:literal) => {
        concat!(
            "
WITH scanned AS MATERIALIZED (
    SELECT * FROM public.permission_audit_log
    WHERE ",
            $leading,
            " AND (created_at, entry_id, n) < ($7::timestamptz, $8::bigint, $9::integer)
    ORDER BY created_at DESC, entry_id DESC, n DESC LIMIT $10
)
SELECT pg_is_in_recovery(), (SELECT count(*) FROM scanned) >= $10, last.created_at, last.entry_id, last.n,
       fit.*
FROM (VALUES (1)) one
LEFT JOIN (SELECT created_at, entry_id, n FROM scanned ORDER BY created_at, entry_id, n LIMIT 1) last ON true
LEFT JOIN (
    SELECT ",
            entry_columns!(),
            ", audited.entry_id AS of_entry
    FROM (SELECT * FROM scanned WHERE ",
            fits!(),
            " ORDER BY created_at DESC, entry_id DESC, n DESC LIMIT $11) audited
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

const HEAD: &str = "
SELECT pg_is_in_recovery(), h.seq, h.uid
FROM (VALUES (1)) one LEFT JOIN LATERAL (SELECT seq, uid FROM hallpass.log ORDER BY seq DESC LIMIT 1) h ON true";

/// The entry before the first that was committed at or after $1, as far as the log reaches back.
const BEFORE_TIME: &str = "
SELECT pg_is_in_recovery(), h.seq, h.uid
FROM (VALUES (1)) one
LEFT JOIN LATERAL (
    SELECT before.seq, before.uid FROM hallpass.log before
    WHERE before.seq < coalesce((SELECT seq FROM hallpass.log WHERE committed_at >= $1 ORDER BY committed_at, seq LIMIT 1),
                                9223372036854775807)
    ORDER BY before.seq DESC LIMIT 1) h ON true";

impl AuditFilter {
    /// The statement that reads by the index which leads to the fewest rows, as a rule.
    #[must_use]
    pub fn list_sql(&self) -> &'static str {
        match self {
            Self {
                affected_user: Some(_),
                ..
            } => LIST_OF_AFFECTED_USER,
            Self { actor: Some(_), .. } => LIST_OF_ACTOR,
            Self {
                organizations: Some(listed),
                ..
            } if listed.len() == 1 => LIST_OF_ORGANIZATION,
            Self {
                permission: Some(_),
                ..
            } => LIST_OF_PERMISSION,
            _ => LIST_OF_ALL,
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
    /// Before every row: PostgreSQL's infinity has no SystemTime, the end of the year 9999 will do.
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
        let place: [&(dyn ToSql + Sync); 4] = [&cursor.entry.seq, &uid, &cursor.row, &scan];
        parameters.extend(place);
        let rows = self.query(READ_FORWARD, &parameters).await?;
        let first = first_row(&rows)?;
        let (is_known, is_removed): (bool, bool) = (first.try_get(2)?, first.try_get(3)?);
        let last: Option<i64> = first.try_get(5)?;
        let has_more = first.try_get(4)?;
        let next = match last {
            None => Cursor::after(cursor.entry),
            Some(seq) => Cursor {
                entry: position(seq, first.try_get(6)?),
                // The rows behind it are in the next page, if there are any.
                row: match first.try_get(7)? {
                    Some(row) if has_more => row,
                    _ => Cursor::WHOLE,
                },
            },
        };
        let seqs: Option<Vec<i64>> = first.try_get(8)?;
        let uids: Option<Vec<i32>> = first.try_get(9)?;
        Ok(AuditPage {
            place: match (is_removed, is_known) {
                (true, _) => Place::Removed(decode_head(first, 10)?),
                (false, true) => Place::Known,
                (false, false) => Place::Foreign,
            },
            entries: decode_entries(&rows, FORWARD_HEADER)?,
            without_rows: (seqs.unwrap_or_default().into_iter())
                .zip(uids.unwrap_or_default())
                .map(|(seq, uid)| position(seq, uid))
                .collect(),
            next,
            has_more,
            as_of: first.try_get(1)?,
        })
    }

    /// The entries that fit, newest first, behind `after`, up to `size` of them among the next `scan_max` rows of the index.
    ///
    /// # Errors
    /// As [`Connection::audit_page`].
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
        let place: [&(dyn ToSql + Sync); 5] = [
            &after.transaction_time,
            &after.entry_id,
            &after.row,
            &scan,
            &limit,
        ];
        parameters.extend(place);
        let rows = self.query(filter.list_sql(), &parameters).await?;
        let first = first_row(&rows)?;
        let entries = decode_entries(&rows, LIST_HEADER)?;
        let is_full = entries.len() >= usize::from(size);
        let next = match rows.last() {
            // There may be more that fit behind the last one.
            Some(last) if is_full => Some(ListKey {
                transaction_time: last.try_get(LIST_HEADER + 25)?,
                entry_id: last.try_get(LIST_HEADER + 27)?,
                row: last.try_get(LIST_HEADER + 2)?,
            }),
            _ if first.try_get(1)? => Some(ListKey {
                transaction_time: first.try_get(2)?,
                entry_id: first.try_get(3)?,
                row: first.try_get(4)?,
            }),
            _ => None,
        };
        Ok(AuditList { entries, next })
    }

    /// The newest position.
    ///
    /// # Errors
    /// As [`Connection::audit_page`].
    pub async fn audit_head(self) -> Result<Position, StoreError> {
        decode_place(&self.query(HEAD, &[]).await?)
    }

    /// The position behind which everything was committed at or after `time`.
    ///
    /// # Errors
    /// As [`Connection::audit_page`].
    pub async fn audit_position_before(self, time: SystemTime) -> Result<Position, StoreError> {
        decode_place(&self.query(BEFORE_TIME, &[&time]).await?)
    }
}

fn first_row(rows: &[Row]) -> Result<&Row, StoreError> {
    let first = rows
        .first()
        .ok_or_else(|| StoreError::Wrong("a page without its first row".to_owned()))?;
    refuse_standby(first, 0)?;
    Ok(first)
}

fn decode_place(rows: &[Row]) -> Result<Position, StoreError> {
    decode_head(first_row(rows)?, 1)
}

fn position(seq: i64, uid: i32) -> Position {
    Position {
        seq,
        uid: uid.cast_unsigned(),
    }
}

fn decode_entries(rows: &[Row], header: usize) -> Result<Vec<AuditEntry>, StoreError> {
    rows.iter()
        // A page that nothing fits has one row, of the header alone.
        .filter(|row| !matches!(row.try_get::<_, Option<Uuid>>(header + 3), Ok(None)))
        .map(|row| decode_entry(row, header))
        .collect()
}

/// Reads `entry_columns!`, the first of which is the column number `at`.
fn decode_entry(row: &Row, at: usize) -> Result<AuditEntry, StoreError> {
    let seq: Option<i64> = row.try_get(at)?;
    let cursor = match seq {
        None => None,
        Some(seq) => Some(Cursor {
            entry: position(seq, row.try_get(at + 1)?),
            row: row.try_get(at + 2)?,
        }),
    };
    let transaction_id: Option<&str> = row.try_get(at + 24)?;
    Ok(AuditEntry {
        cursor,
        id: row.try_get(at + 3)?,
        organization: row.try_get::<_, Option<Uuid>>(at + 4)?.map(OrganizationId),
        permission: row.try_get(at + 5)?,
        affected_user: row.try_get::<_, Option<Uuid>>(at + 6)?.map(UserId),
        table: row.try_get(at + 7)?,
        change_type: row.try_get(at + 8)?,
        before: row.try_get(at + 9)?,
        after: row.try_get(at + 10)?,
        changed_fields: row.try_get(at + 11)?,
        actor: row.try_get::<_, Option<Uuid>>(at + 12)?.map(UserId),
        actor_profile: row.try_get(at + 13)?,
        actor_source: row.try_get(at + 14)?,
        ip_address: row.try_get(at + 15)?,
        user_agent: row.try_get(at + 16)?,
        request_id: row.try_get(at + 17)?,
        session_id: row.try_get(at + 18)?,
        trace_id: row.try_get(at + 19)?,
        database_role: row.try_get(at + 20)?,
        database_login: row.try_get(at + 21)?,
        client_address: row.try_get(at + 22)?,
        application_name: row.try_get(at + 23)?,
        transaction_id: match transaction_id {
            None => None,
            Some(id) => Some(
                id.parse()
                    .map_err(|_| StoreError::Wrong(format!("no transaction's number: {id}")))?,
            ),
        },
        transaction_time: row.try_get(at + 25)?,
        commit_time: row.try_get(at + 26)?,
    })
}
