//! API keys as PostgreSQL keeps them: what the service reads and records, what `hallpass keys` makes, lists and revokes.
//!
//! Invariant: keys and their edition are read in one snapshot; an edition that nothing would have changed is none; and no
//! secret ever comes here, only its hash.

use std::time::{Duration, SystemTime};

use thiserror::Error;
use tokio_postgres::{Row, error::SqlState};
use uuid::Uuid;

use super::{DedicatedConnection, StoreError, load::refuse_standby};
use crate::model::OrganizationId;

/// Keys that are read: as many as there may be that are valid, for a change of one reads them all again. Of those that
/// are not valid any more the newest are read too, as far as there is room, so that their callers hear why.
const KEYS_MAX: i64 = 10_000;

/// Which state of the keys was seen; two that are equal are the same keys. The default is no database's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edition {
    drawn: Uuid,
    /// The transaction that last touched the trigger that draws it: keys may have changed while it was disabled.
    trigger: i64,
}

/// What a poll says: the edition, and the database's clock while it was read.
#[derive(Clone, Copy, Debug)]
pub struct KeysState {
    pub edition: Edition,
    pub clock: SystemTime,
}

/// A key as the service needs it.
#[derive(Clone, Debug)]
pub struct StoredKey {
    pub id: String,
    pub hash: Vec<u8>,
    pub scopes: Vec<String>,
    /// `None`: all.
    pub organizations: Option<Vec<OrganizationId>>,
    /// By the database's clock; `None`: never.
    pub expires_at: Option<SystemTime>,
    pub is_revoked: bool,
}

/// A key to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewKey<'a> {
    pub id: &'a str,
    pub hash: &'a [u8],
    pub name: &'a str,
    pub scopes: &'a [&'a str],
    /// `None`: all.
    pub organizations: Option<&'a [Uuid]>,
    /// `None`: it does not expire.
    pub valid_for: Option<Duration>,
}

/// A key as it is listed. Times are text, in UTC, empty where there is none.
#[derive(Clone, Debug)]
pub struct ListedKey {
    pub id: String,
    pub name: String,
    pub scopes: Vec<String>,
    /// `None`: all.
    pub organizations: Option<Vec<Uuid>>,
    pub created: String,
    pub expires: String,
    pub last_used: String,
    /// `valid`, `expired` or `revoked`.
    pub state: String,
}

/// What became of a key that was to be revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revocation {
    Revoked,
    /// It had been before.
    RevokedBefore,
    NoSuchKey,
}

/// Why a command about keys failed.
#[derive(Debug, Error)]
pub enum KeysError {
    #[error(
        "this login may not manage API keys: log in as a member of the role that owns hallpass, such as hallpass_migrator"
    )]
    NotAllowed,
    #[error("this database has no API keys yet: run `hallpass migrate` first")]
    NotMigrated,
    /// What the table's checks do not take, as PostgreSQL says it.
    #[error("{0}")]
    Full(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<tokio_postgres::Error> for KeysError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.code() {
            Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Self::NotAllowed,
            // Without the schema, and without the table in it.
            Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => Self::NotMigrated,
            Some(&SqlState::PROGRAM_LIMIT_EXCEEDED) => Self::Full(super::describe(&error)),
            _ => Self::Store(error.into()),
        }
    }
}

/// No row while the trigger that draws editions may not fire.
const POLL: &str = "
SELECT pg_is_in_recovery(), e.edition, clock_timestamp(), t.xmin::text::bigint
FROM hallpass.api_keys_edition e
JOIN pg_trigger t ON t.tgrelid = 'hallpass.api_keys'::regclass AND t.tgname = 'api_keys_changed' AND t.tgenabled = 'A'";

const READ: &str = "
SELECT pg_is_in_recovery(), e.edition, clock_timestamp(), t.xmin::text::bigint,
       k.id, k.hash, k.scopes, k.organization_ids, k.expires_at, k.revoked_at IS NOT NULL
FROM hallpass.api_keys_edition e
JOIN pg_trigger t ON t.tgrelid = 'hallpass.api_keys'::regclass AND t.tgname = 'api_keys_changed' AND t.tgenabled = 'A'
LEFT JOIN (
    SELECT * FROM hallpass.api_keys
    ORDER BY revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()) DESC, created_at DESC
    LIMIT $1) k ON true";

const RECORD_USE: &str = "SELECT hallpass.record_api_key_use($1, $2)";

const INSERT: &str = "
INSERT INTO hallpass.api_keys (id, hash, name, scopes, organization_ids, expires_at)
VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))
RETURNING coalesce(to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), '')";

const LIST: &str = "
SELECT k.id, k.name, k.scopes, k.organization_ids, shown.created, shown.expires, shown.last_used,
       CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked' WHEN k.expires_at <= now() THEN 'expired' ELSE 'valid' END
FROM hallpass.api_keys k
LEFT JOIN hallpass.api_key_use u ON u.key_id = k.id
CROSS JOIN LATERAL (
    SELECT coalesce(to_char(k.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), ''),
           coalesce(to_char(k.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), ''),
           coalesce(to_char(u.last_used_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), '')) shown (created, expires, last_used)
ORDER BY k.created_at DESC, k.id LIMIT $1";

const REVOKE: &str = "
WITH revoked AS (
    UPDATE hallpass.api_keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL RETURNING id)
SELECT EXISTS (SELECT FROM revoked), EXISTS (SELECT FROM hallpass.api_keys WHERE id = $1)";

impl DedicatedConnection {
    /// Which keys there are now.
    ///
    /// # Errors
    /// When the database is away or a standby, or the trigger that draws editions is not `ENABLE ALWAYS`.
    pub async fn api_keys_state(&self) -> Result<KeysState, StoreError> {
        decode_state(self.client.query_opt(POLL, &[]).await?.as_ref())
    }

    /// All keys, with the edition that they are.
    ///
    /// # Errors
    /// As [`DedicatedConnection::api_keys_state`].
    pub async fn api_keys(&self) -> Result<(KeysState, Vec<StoredKey>), StoreError> {
        let rows = self.client.query(READ, &[&KEYS_MAX]).await?;
        let state = decode_state(rows.first())?;
        let keys = rows.iter().filter_map(|row| decode_key(row).transpose());
        Ok((state, keys.collect::<Result<_, _>>()?))
    }

    /// Records which keys were used, and how many seconds ago.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn record_api_key_use(&self, used: &[(&str, f64)]) -> Result<(), StoreError> {
        let (ids, seconds): (Vec<&str>, Vec<f64>) = used.iter().copied().unzip();
        self.client.execute(RECORD_USE, &[&ids, &seconds]).await?;
        Ok(())
    }

    /// Makes a key; returns when it expires, as [`ListedKey`] has it.
    ///
    /// # Errors
    /// When the login may not, or there are too many keys.
    pub async fn api_key_insert(&self, key: &NewKey<'_>) -> Result<String, KeysError> {
        let seconds = key.valid_for.map(|valid_for| valid_for.as_secs_f64());
        let row = self
            .client
            .query_one(
                INSERT,
                &[
                    &key.id,
                    &key.hash,
                    &key.name,
                    &key.scopes,
                    &key.organizations,
                    &seconds,
                ],
            )
            .await?;
        Ok(row.try_get(0)?)
    }

    /// The newest keys first.
    ///
    /// # Errors
    /// When the login may not.
    pub async fn api_key_list(&self) -> Result<Vec<ListedKey>, KeysError> {
        let rows = self.client.query(LIST, &[&KEYS_MAX]).await?;
        let decode = |row: &Row| {
            Ok::<_, tokio_postgres::Error>(ListedKey {
                id: row.try_get(0)?,
                name: row.try_get(1)?,
                scopes: row.try_get(2)?,
                organizations: row.try_get(3)?,
                created: row.try_get(4)?,
                expires: row.try_get(5)?,
                last_used: row.try_get(6)?,
                state: row.try_get(7)?,
            })
        };
        Ok(rows.iter().map(decode).collect::<Result<_, _>>()?)
    }

    /// # Errors
    /// When the login may not.
    pub async fn api_key_revoke(&self, id: &str) -> Result<Revocation, KeysError> {
        let row = self.client.query_one(REVOKE, &[&id]).await?;
        Ok(match (row.try_get(0)?, row.try_get(1)?) {
            (true, _) => Revocation::Revoked,
            (false, true) => Revocation::RevokedBefore,
            (false, false) => Revocation::NoSuchKey,
        })
    }
}

fn decode_state(row: Option<&Row>) -> Result<KeysState, StoreError> {
    let row = row.ok_or_else(|| {
        StoreError::Wrong(
            "trigger api_keys_changed on hallpass.api_keys is not ENABLE ALWAYS: no revocation would be heard of"
                .to_owned(),
        )
    })?;
    refuse_standby(row, 0)?;
    Ok(KeysState {
        edition: Edition {
            drawn: row.try_get(1)?,
            trigger: row.try_get(3)?,
        },
        clock: row.try_get(2)?,
    })
}

/// `None`: there is no key, and the row is there for the edition alone.
fn decode_key(row: &Row) -> Result<Option<StoredKey>, StoreError> {
    let Some(id) = row.try_get(4)? else {
        return Ok(None);
    };
    let organizations: Option<Vec<Uuid>> = row.try_get(7)?;
    Ok(Some(StoredKey {
        id,
        hash: row.try_get(5)?,
        scopes: row.try_get(6)?,
        organizations: organizations.map(|ids| ids.into_iter().map(OrganizationId).collect()),
        expires_at: row.try_get(8)?,
        is_revoked: row.try_get(9)?,
    }))
}
