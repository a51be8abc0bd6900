//! What the service does to the database in the background: inspection, refresh of the matrix, clearing of entries
//! that are numbered.

use super::{DedicatedConnection, StoreError};

const INSPECT: &str = "SELECT problem FROM hallpass.inspect() problem";

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

/// A row that another transaction sees is committed, hence numbered.
const CLEAR_PENDING: &str = "
DELETE FROM hallpass.log_pending
WHERE ctid = ANY (ARRAY(SELECT ctid FROM hallpass.log_pending LIMIT 100000))";

impl DedicatedConnection {
    /// # Errors
    /// When the database is away.
    pub async fn inspect(&self) -> Result<Inspection, StoreError> {
        let rows = self.client.query(INSPECT, &[]).await?;
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
    pub async fn clear_pending(&self) -> Result<u64, StoreError> {
        Ok(self.client.execute(CLEAR_PENDING, &[]).await?)
    }
}
