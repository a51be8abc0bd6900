//! What the service does to the database in the background: inspection, refresh of the matrix, clearing of entries
//! that are numbered, the audit log's partitions and its retention.

use super::{DedicatedConnection, StoreError};

/// The function looks with its owner's eyes.
const INSPECT: &str = "SELECT problem FROM hallpass.inspect() problem";

/// What the feed reads, it reads with ours: rows that are hidden from us are changes that we miss.
pub(super) const HIDDEN_FROM_US: &str = "
SELECT format('row-level security on %s hides rows from %s', target, current_user), target::text
FROM unnest(ARRAY['hallpass.log', 'hallpass.log_org', 'public.permission_audit_log']::regclass[]) target
WHERE row_security_active(target)";

/// The head comes from a statement after the inspection's, whose own entry it must include.
const HEAD_SEQ: &str = "SELECT coalesce(max(seq), 0) FROM hallpass.log";

/// What an inspection found.
pub struct Inspection {
    /// A line a problem; none: the log can be believed.
    pub problems: Vec<String>,
    /// A cache that has applied this entry has applied whatever the inspection logged.
    pub head_seq: i64,
}

const MATRIX_IS_BEHIND: &str = "
SELECT coalesce((SELECT max(seq) FROM hallpass.log), 0)
     > (SELECT min(seq) FROM hallpass.matrix_stamp)";

const TRY_REFRESH_LOCK: &str = "SELECT pg_try_advisory_xact_lock(1751215212, 3)";

const REFRESH: &str = "SELECT public.refresh_permission_materialized_views()";

const CLEAR_PENDING: &str = "SELECT hallpass.clear_pending()";

const TRY_MAINTENANCE_LOCK: &str = "SELECT pg_try_advisory_xact_lock(1751215212, 4)";

const MAKE_PARTITIONS: &str = "CALL hallpass.make_audit_partitions()";

const IS_HELD: &str = "SELECT EXISTS (SELECT FROM hallpass.legal_hold WHERE lifted_at IS NULL)";

const REMOVE_EXPIRED: &str = "SELECT audit_rows, is_done FROM hallpass.remove_expired($1, $2)";

/// Rows of each table that one transaction of retention removes: a fraction of a second.
const EXPIRED_ROWS_MAX: i32 = 10_000;

/// What one step of retention did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// A legal hold forbids it.
    Held,
    /// Another replica is at it.
    Elsewhere,
    /// It removed so many audit rows, and perhaps rows of the log; there may be more to remove.
    Removed(i64),
    /// As `Removed`, and nothing is left to remove.
    Done(i64),
}

impl DedicatedConnection {
    /// # Errors
    /// When the database is away.
    pub async fn inspect(&self) -> Result<Inspection, StoreError> {
        let mut rows = self.client.query(INSPECT, &[]).await?;
        rows.extend(self.client.query(HIDDEN_FROM_US, &[]).await?);
        let problems = rows
            .iter()
            .map(|row| row.try_get(0))
            .collect::<Result<_, _>>()?;
        let head_seq = self.client.query_one(HEAD_SEQ, &[]).await?.try_get(0)?;
        Ok(Inspection { problems, head_seq })
    }

    /// Refreshes both materialized views when they are behind the log and nobody else does; says whether it did.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn refresh_matrix(&mut self) -> Result<bool, StoreError> {
        if !self
            .client
            .query_one(MATRIX_IS_BEHIND, &[])
            .await?
            .try_get::<_, bool>(0)?
        {
            return Ok(false);
        }
        let transaction = self.client.transaction().await?;
        if !transaction
            .query_one(TRY_REFRESH_LOCK, &[])
            .await?
            .try_get::<_, bool>(0)?
        {
            return Ok(false);
        }
        transaction.execute(REFRESH, &[]).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Deletes entries on their way that have arrived, up to 100,000 a call.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn clear_pending(&self) -> Result<i64, StoreError> {
        Ok(self
            .client
            .query_one(CLEAR_PENDING, &[])
            .await?
            .try_get(0)?)
    }

    /// Makes the audit log's partitions of this month and the next two, unless another replica is at it.
    ///
    /// # Errors
    /// When the database is away, or somebody holds the audit log.
    pub async fn make_audit_partitions(&mut self) -> Result<(), StoreError> {
        let transaction = self.client.transaction().await?;
        if transaction
            .query_one(TRY_MAINTENANCE_LOCK, &[])
            .await?
            .try_get(0)?
        {
            transaction.execute(MAKE_PARTITIONS, &[]).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Takes one step of retention, in a transaction of its own.
    ///
    /// # Errors
    /// When the database is away, or somebody holds the audit log.
    pub async fn remove_expired(&mut self, retention_days: i32) -> Result<Retention, StoreError> {
        let transaction = self.client.transaction().await?;
        if transaction.query_one(IS_HELD, &[]).await?.try_get(0)? {
            return Ok(Retention::Held);
        }
        if !transaction
            .query_one(TRY_MAINTENANCE_LOCK, &[])
            .await?
            .try_get::<_, bool>(0)?
        {
            return Ok(Retention::Elsewhere);
        }
        let step = transaction
            .query_one(REMOVE_EXPIRED, &[&retention_days, &EXPIRED_ROWS_MAX])
            .await?;
        let (audit_rows, is_done) = (step.try_get(0)?, step.try_get(1)?);
        transaction.commit().await?;
        Ok(if is_done {
            Retention::Done(audit_rows)
        } else {
            Retention::Removed(audit_rows)
        })
    }
}
