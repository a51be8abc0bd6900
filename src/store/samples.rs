//! What operators watch of the database itself, asked for now and then.

use std::time::Duration;

use super::{DedicatedConnection, StoreError, load::refuse_standby};

/// Without pg_read_all_stats a login sees the transactions of its own role alone. The number of organizations is the
/// planner's; entries behind the stamp are few.
const SAMPLE: &str = "
SELECT pg_is_in_recovery(),
       (SELECT coalesce(max(seq), 0) FROM hallpass.log),
       extract(epoch FROM clock_timestamp() - stamp.refreshed_at)::float8,
       CASE WHEN behind.everything THEN 0
            ELSE greatest(0, 1 - behind.organizations / greatest(organizations.counted, behind.organizations, 1)) END,
       (SELECT greatest(0, extract(epoch FROM max(clock_timestamp() - xact_start)))::float8 FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()),
       (SELECT count(*) - 1
        FROM generate_series(0, 2) ahead,
             to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + ahead * interval '1 month', 'YYYY_MM') month
        WHERE EXISTS (SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                      WHERE i.inhparent = 'public.permission_audit_log'::regclass
                        AND c.relname = 'permission_audit_log_' || month))
FROM (SELECT seq, refreshed_at FROM hallpass.matrix_stamp WHERE view_name = 'user_permission_matrix') stamp,
     LATERAL (SELECT count(DISTINCT org_id)::float8 AS organizations,
                     coalesce(bool_or(org_id = '00000000-0000-0000-0000-000000000000'), false) AS everything
              FROM hallpass.log_org WHERE seq > stamp.seq) behind,
     (SELECT reltuples::float8 AS counted FROM pg_class WHERE oid = 'public.organizations'::regclass) organizations";

/// As of one statement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// The newest entry of the log, 0 before the first.
    pub head_seq: i64,
    pub matrix_age: Duration,
    /// The share of the organizations whose rows of the matrix are believed, 0 to 1.
    pub matrix_believed: f64,
    /// Of the transactions that this login may see; zero where there is none.
    pub oldest_transaction: Duration,
    /// Months after this one that have a partition of the audit log, up to 2; -1: not even this one has.
    pub partition_months_ahead: i64,
}

impl DedicatedConnection {
    /// # Errors
    /// When the database is away, or a standby.
    pub async fn sample(&self) -> Result<Sample, StoreError> {
        let row = self.client.query_one(SAMPLE, &[]).await?;
        refuse_standby(&row, 0)?;
        let seconds = |seconds: Option<f64>| {
            Duration::try_from_secs_f64(seconds.unwrap_or_default()).unwrap_or_default()
        };
        Ok(Sample {
            head_seq: row.try_get(1)?,
            matrix_age: seconds(row.try_get(2)?),
            matrix_believed: row.try_get(3)?,
            oldest_transaction: seconds(row.try_get(4)?),
            partition_months_ahead: row.try_get(5)?,
        })
    }
}
