//! Changes of permissions, each one transaction on behalf of an actor; and what a change would do.
//!
//! Invariant: the functions that are called here hold what they are told against the tables; no SQL is built from it.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use deadpool_postgres::Object;
use serde::Serialize;
use thiserror::Error;
use tokio::time::timeout;
use tokio_postgres::IsolationLevel;
use uuid::Uuid;

use super::{StoreError, load::decode_head, pool::Connection};
use crate::model::{OrganizationId, Position, UserId};

/// How long a change may take, the wait for others' changes of the same row and for its commit among it. Above the
/// statement's own limit, so that who waits hears of that.
const CHANGE_WAIT_MAX: Duration = Duration::from_secs(8);

/// One change. Fields are named as `hallpass.take_step` reads them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Step {
    SetOverride {
        org_id: Uuid,
        permission_key: String,
        min_role: Option<String>,
        enabled: bool,
        specific_users: Vec<Uuid>,
        expected_updated_at: Option<Micros>,
    },
    ResetOverride {
        org_id: Uuid,
        permission_key: String,
        expected_updated_at: Option<Micros>,
    },
    GrantUser {
        org_id: Uuid,
        user_id: Uuid,
        permission_key: String,
    },
    RevokeUser {
        org_id: Uuid,
        user_id: Uuid,
        permission_key: String,
    },
    PutMember {
        org_id: Uuid,
        user_id: Uuid,
        role: String,
    },
    RemoveMember {
        org_id: Uuid,
        user_id: Uuid,
    },
    PutTemplate {
        permission_key: String,
        name: String,
        description: Option<String>,
        module: String,
        min_role: String,
        expected_updated_at: Option<Micros>,
    },
    DeleteTemplate {
        permission_key: String,
        expected_updated_at: Option<Micros>,
    },
}

/// A time as PostgreSQL has it: whole microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Micros(pub i64);

/// On whose behalf a change is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Actor {
    pub user_id: Option<Uuid>,
    pub profile_id: Option<Uuid>,
    pub ip_address: Option<IpAddr>,
    pub user_agent: Option<String>,
    pub session_id: Option<String>,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
}

/// What a change is, beyond what its statements show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    Plain,
    Bulk,
    Reset,
}

impl ChangeKind {
    fn sql(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Bulk => Some("BULK_UPDATE"),
            Self::Reset => Some("RESET"),
        }
    }
}

/// Who gains and who loses one permission in one organization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    pub organization: OrganizationId,
    pub permission: String,
    pub gained: i64,
    pub lost: i64,
    /// The first of them, by id.
    pub gaining: Vec<UserId>,
    pub losing: Vec<UserId>,
}

/// A permission as it stands for an organization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrganizationPermission {
    pub permission: String,
    pub name: String,
    pub description: Option<String>,
    pub module: String,
    pub default_min_role: String,
    pub effective_min_role: String,
    pub enabled: bool,
    pub specific_users: Vec<Uuid>,
    pub has_own_setting: bool,
    pub updated_at: Option<SystemTime>,
}

/// Why nothing was changed.
#[derive(Debug, Error)]
pub enum AdminError {
    #[error("there is no such organization")]
    OrganizationNotFound,
    #[error("{0}")]
    PermissionNotFound(String),
    #[error("{0}")]
    RoleUnknown(String),
    #[error("{0}")]
    MemberNotFound(String),
    /// Somebody has changed it since the caller read it.
    #[error("{0}")]
    UpdatedMeanwhile(String),
    /// The application's tables do not allow it.
    #[error("{0}")]
    NotPossible(String),
    /// Whether it was made is not known where the database went away while it was committed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<tokio_postgres::Error> for AdminError {
    fn from(error: tokio_postgres::Error) -> Self {
        let message = || {
            error
                .as_db_error()
                .map_or_else(String::new, |error| error.message().to_owned())
        };
        match error.code().map(tokio_postgres::error::SqlState::code) {
            Some("HPN01") => Self::OrganizationNotFound,
            Some("HPN02") => Self::PermissionNotFound(message()),
            Some("HPN03") => Self::RoleUnknown(message()),
            Some("HPN04") => Self::MemberNotFound(message()),
            Some("HPC01") => Self::UpdatedMeanwhile(message()),
            Some("HPF01") => Self::NotPossible(message()),
            _ => Self::Store(error.into()),
        }
    }
}

const CHANGE: &str = "SELECT hallpass.change($1::text::jsonb, $2::text::jsonb, $3)";

const HEAD: &str = "SELECT hallpass.head()";

const PREVIEW: &str = "
SELECT org_id, permission_key, gained, lost, gaining, losing
FROM hallpass.preview($1::text::jsonb, $2)";

const ORGANIZATION_SETTINGS: &str = "
SELECT head_seq, head_uid, in_recovery, permission_key, permission_name, description, module, default_min_role,
       effective_min_role, enabled, specific_users, has_own_setting, updated_at
FROM hallpass.organization_settings($1)";

impl Connection {
    /// Makes the changes, all or none, and returns a position behind them.
    ///
    /// # Errors
    /// When one of them cannot be made, or the database is away.
    pub async fn change(
        self,
        steps: &[Step],
        actor: &Actor,
        kind: ChangeKind,
    ) -> Result<Position, AdminError> {
        let (steps, actor) = (to_json(&steps)?, to_json(actor)?);
        self.within(async |connection| {
            let transaction = connection.transaction().await?;
            transaction
                .execute(CHANGE, &[&steps, &actor, &kind.sql()])
                .await?;
            transaction.commit().await?;
            // Whatever came since is behind it, too.
            let row = connection.query_one(HEAD, &[]).await?;
            let head: &str = row.try_get(0)?;
            let wrong = |error| StoreError::Wrong(format!("no position: {head}: {error}"));
            Ok(head.parse().map_err(wrong)?)
        })
        .await
    }

    /// What the changes would do: who gains and who loses what, by organization and permission. Nothing of it stays.
    ///
    /// # Errors
    /// As [`Connection::change`].
    pub async fn preview(self, steps: &[Step], users_max: i32) -> Result<Vec<Effect>, AdminError> {
        let steps = to_json(&steps)?;
        self.within(async |connection| {
            let transaction = connection
                .build_transaction()
                .isolation_level(IsolationLevel::RepeatableRead)
                .start()
                .await?;
            let rows = transaction.query(PREVIEW, &[&steps, &users_max]).await?;
            transaction.rollback().await?;
            let users = |ids: Vec<Uuid>| ids.into_iter().map(UserId).collect();
            rows.iter()
                .map(|row| {
                    Ok(Effect {
                        organization: OrganizationId(row.try_get(0)?),
                        permission: row.try_get(1)?,
                        gained: row.try_get(2)?,
                        lost: row.try_get(3)?,
                        gaining: users(row.try_get(4)?),
                        losing: users(row.try_get(5)?),
                    })
                })
                .collect()
        })
        .await
    }

    /// The catalog as it stands for an organization, by key, and the head of that snapshot.
    ///
    /// # Errors
    /// When there is no such organization, or the database is away.
    pub async fn organization_settings(
        self,
        organization: OrganizationId,
    ) -> Result<(Position, Vec<OrganizationPermission>), AdminError> {
        self.within(async |connection| {
            let rows = connection
                .query(ORGANIZATION_SETTINGS, &[&organization.0])
                .await?;
            let first = rows
                .first()
                .ok_or_else(|| StoreError::Wrong("settings without a row".to_owned()))?;
            super::load::refuse_standby(first, 2)?;
            let head = decode_head(first, 0)?;
            let mut settings = Vec::with_capacity(rows.len());
            for row in &rows {
                // A catalog that is empty has one row, without a permission.
                let Some(permission) = row.try_get(3)? else {
                    break;
                };
                settings.push(OrganizationPermission {
                    permission,
                    name: row.try_get(4)?,
                    description: row.try_get(5)?,
                    module: row.try_get(6)?,
                    default_min_role: row.try_get(7)?,
                    effective_min_role: row.try_get(8)?,
                    enabled: row.try_get(9)?,
                    specific_users: row.try_get(10)?,
                    has_own_setting: row.try_get(11)?,
                    updated_at: row.try_get(12)?,
                });
            }
            Ok((head, settings))
        })
        .await
    }

    /// Does some work on the connection. One that takes too long is closed, and whatever it has not committed is undone.
    async fn within<T>(
        self,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, AdminError>,
    ) -> Result<T, AdminError> {
        let mut connection = self.into_inner();
        if let Ok(done) = timeout(CHANGE_WAIT_MAX, work(&mut connection)).await {
            return done;
        }
        drop(Object::take(connection));
        Err(StoreError::Unavailable(format!("no answer within {CHANGE_WAIT_MAX:?}")).into())
    }
}

fn to_json(value: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Wrong(error.to_string()))
}
