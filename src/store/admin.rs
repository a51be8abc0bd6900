//! Changes of permissions, each one transaction on behalf of an actor; and what a change would do.
//!
//! Invariant: the functions that are called here hold what they are told against the tables; no SQL is built from it.

use std::{
    future::{Future, pending},
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use thiserror::Error;
use tokio::time::sleep;
use tokio_postgres::{IsolationLevel, Row, error::SqlState};
use uuid::Uuid;

use super::{
    StoreError,
    load::{decode_head, refuse_standby},
    pool::Connection,
    timings::Question,
};
use crate::model::{OrganizationId, Position, UserId};

/// How long a change may take, the wait for others' changes of the same row and for its commit among it. Above the
/// statement's own limit, so that who waits hears of that; below the deadline that calls have by default, so that they
/// hear what became of it.
const CHANGE_WAIT_MAX: Duration = Duration::from_secs(8);

/// Effects of a preview: as many as one bulk change can have, under 100 kB.
const EFFECTS_MAX: i32 = 1_000;

/// Those of them that name users, and how many each way: under 1 MB, for clients take 4 MiB.
const NAMED_EFFECTS_MAX: i32 = 100;
const EFFECT_USERS_MAX: i32 = 100;

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
    /// Whoever calls, by its credential: what the entry has as the connection's application. PostgreSQL keeps 63 bytes.
    pub caller: Option<String>,
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

/// What changes would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// The first of them, by organization and permission.
    pub effects: Vec<Effect>,
    /// How many there are.
    pub effect_count: i64,
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
    /// Another change of the same rows came first: it may pass when it is tried again.
    #[error("another change of the same came first: read it again, and try again")]
    Conflict,
    /// The application's tables do not allow it.
    #[error("{0}")]
    NotPossible(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The database went away, or took too long, while it committed.
    #[error("whether the change was made is not known: the same change may be made again")]
    OutcomeUnknown,
    /// It was made.
    #[error("the change was made, and its position could not be read")]
    PositionUnknown,
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
            Some("23505" | "40001" | "40P01") => Self::Conflict,
            // Classes 22 and 23: what types and constraints say; 42: what a trigger names that is not there; P0001: what one
            // raises. Their words are not for whoever calls.
            Some(code)
                if ["22", "23", "42"].contains(&code.get(..2).unwrap_or_default())
                    || code == SqlState::RAISE_EXCEPTION.code() =>
            {
                tracing::warn!(%error, "the application's tables do not take a change");
                Self::NotPossible("the application's tables do not take this".to_owned())
            }
            _ => Self::Store(error.into()),
        }
    }
}

const CHANGE: &str = "SELECT hallpass.change($1::text::jsonb, $2::text::jsonb, $3)";

const HEAD: &str = "SELECT hallpass.head()";

const PREVIEW: &str = "
SELECT org_id, permission_key, gained, lost, gaining, losing, effects
FROM hallpass.preview($1::text::jsonb, $2, $3, $4)";

const ORGANIZATION_SETTINGS: &str = "
SELECT head_seq, head_uid, in_recovery, permission_key, permission_name, description, module, default_min_role,
       effective_min_role, enabled, specific_users, has_own_setting, updated_at
FROM hallpass.organization_settings($1)";

impl Connection {
    /// Makes the changes, all or none, and returns a position behind them. They are taken back where the caller is gone
    /// before they are committed.
    ///
    /// # Errors
    /// When one of them cannot be made, or the database is away.
    pub async fn change(
        self,
        steps: &[Step],
        actor: &Actor,
        kind: ChangeKind,
        caller_gone: impl Future<Output = ()>,
    ) -> Result<Position, AdminError> {
        let (steps, actor) = (to_json(&steps)?, to_json(actor)?);
        let commits = AtomicBool::new(false);
        let given_up = async {
            tokio::select! {
                () = sleep(CHANGE_WAIT_MAX) => {}
                () = nobody_waits(caller_gone, &commits) => {}
            }
        };
        let made = self.work_until(Question::Change, given_up, async |connection| {
            let transaction = connection.transaction().await?;
            transaction
                .execute(CHANGE, &[&steps, &actor, &kind.sql()])
                .await?;
            commits.store(true, Ordering::Relaxed);
            transaction.commit().await.map_err(not_committed)?;
            // Whatever came since is behind it, too.
            let row = connection.query_one(HEAD, &[]).await;
            let head = row.and_then(|row| row.try_get::<_, String>(0));
            let head = head.ok().and_then(|head| head.parse().ok());
            head.ok_or(AdminError::PositionUnknown)
        });
        match made.await {
            Some(made) => made,
            None if commits.load(Ordering::Relaxed) => Err(AdminError::OutcomeUnknown),
            None => Err(too_long()),
        }
    }

    /// What the changes would do: who gains and who loses what, by organization and permission. Nothing of it stays.
    ///
    /// # Errors
    /// As [`Connection::change`].
    pub async fn preview(
        self,
        steps: &[Step],
        caller_gone: impl Future<Output = ()>,
    ) -> Result<Preview, AdminError> {
        let steps = to_json(&steps)?;
        let given_up = async {
            tokio::select! {
                () = sleep(CHANGE_WAIT_MAX) => {}
                () = caller_gone => {}
            }
        };
        let tried = self.work_until(Question::Preview, given_up, async |connection| {
            // One snapshot, before and after: nobody else's change is counted.
            let transaction = connection
                .build_transaction()
                .isolation_level(IsolationLevel::RepeatableRead)
                .start()
                .await?;
            let bounds = (EFFECTS_MAX, NAMED_EFFECTS_MAX, EFFECT_USERS_MAX);
            let rows = transaction
                .query(PREVIEW, &[&steps, &bounds.0, &bounds.1, &bounds.2])
                .await?;
            transaction.rollback().await?;
            let effect_count = rows.first().map_or(Ok(0), |row| row.try_get(6))?;
            let effects = rows.iter().map(decode_effect).collect::<Result<_, _>>()?;
            Ok(Preview {
                effects,
                effect_count,
            })
        });
        tried.await.unwrap_or_else(|| Err(too_long()))
    }

    /// The catalog as it stands for an organization, by key, and the head of that snapshot.
    ///
    /// # Errors
    /// When there is no such organization, or the database is away.
    pub async fn organization_settings(
        self,
        organization: OrganizationId,
    ) -> Result<(Position, Vec<OrganizationPermission>), AdminError> {
        let asked = self.work_until(
            Question::Settings,
            sleep(CHANGE_WAIT_MAX),
            async |connection| {
                connection
                    .query(ORGANIZATION_SETTINGS, &[&organization.0])
                    .await
            },
        );
        let rows = asked.await.ok_or_else(too_long)??;
        let first = rows
            .first()
            .ok_or_else(|| StoreError::Wrong("settings without a row".to_owned()))?;
        refuse_standby(first, 2)?;
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
    }
}

/// Returns when the caller is gone, unless the change is being committed by then: that is not interrupted.
async fn nobody_waits(caller_gone: impl Future<Output = ()>, commits: &AtomicBool) {
    caller_gone.await;
    if commits.load(Ordering::Relaxed) {
        pending::<()>().await;
    }
}

/// What a COMMIT failed with. A database that says why has not committed; a pooler that has lost it, or a database that is
/// being shut down, does not know.
fn not_committed(error: tokio_postgres::Error) -> AdminError {
    match error.as_db_error().map(|error| error.code().code()) {
        Some(code) if !code.starts_with("08") && !code.starts_with("57P") => error.into(),
        _ => AdminError::OutcomeUnknown,
    }
}

fn too_long() -> AdminError {
    StoreError::Unavailable(format!("no answer within {CHANGE_WAIT_MAX:?}")).into()
}

fn decode_effect(row: &Row) -> Result<Effect, AdminError> {
    let users = |ids: Vec<Uuid>| ids.into_iter().map(UserId).collect();
    Ok(Effect {
        organization: OrganizationId(row.try_get(0)?),
        permission: row.try_get(1)?,
        gained: row.try_get(2)?,
        lost: row.try_get(3)?,
        gaining: users(row.try_get(4)?),
        losing: users(row.try_get(5)?),
    })
}

fn to_json(value: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Wrong(error.to_string()))
}
