//! The audit log as people read it: forward from a cursor in the order of commits, and in pages from the newest back.
//!
//! Invariant: a page scans a bounded number of rows, fitting or not, and says how far it has come; so a filter that
//! seldom fits costs no more than one that always does, and no row is passed that was not looked at.

use std::time::SystemTime;

use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{StoreError, load::refuse_standby};
use crate::model::{Cursor, OrganizationId, Position, UserId};

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

pub mod forward;
pub mod list;

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

fn first_row(rows: &[Row]) -> Result<&Row, StoreError> {
    let first = rows
        .first()
        .ok_or_else(|| StoreError::Wrong("a page without its first row".to_owned()))?;
    refuse_standby(first, 0)?;
    Ok(first)
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
