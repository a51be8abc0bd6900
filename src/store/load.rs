//! What PostgreSQL says of a set of subjects, in one statement and hence one snapshot.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::task::yield_now;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Store, StoreError, pool::Connection, timings::Question};
use crate::model::{
    Catalog, DecidedPermission, Membership, OrganizationId, PermissionTemplate, Position, Reason,
    Subject, SubjectPermissions, UserId,
};

/// Subjects that are decoded, or cached, before others' calls get their turn: each takes microseconds, and a statement may
/// have ten thousand.
pub const SUBJECTS_A_TURN: usize = 16;

/// Different memberships before those that nobody has are forgotten: a few megabytes.
const MEMBERSHIPS_KEPT: usize = 4_096;

/// What one load found: every subject that was asked for, and the head of its snapshot.
pub struct Loaded {
    pub head: Position,
    /// Whether the position that was asked about is in the history that this was read from.
    pub history_holds: bool,
    pub subjects: HashMap<Subject, SubjectPermissions>,
}

/// Which rows a load may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// The materialized matrix where the log says that it is the truth, else the live view.
    MatrixOrView,
    /// The live view alone.
    View,
}

/// $4, $5: a position that the history must have.
const LOAD: &str = "
SELECT org_id, user_id, role, permission_keys, reasons, min_roles, enabled,
       permission_names, module_names, head_seq, head_uid, in_recovery,
       $4::bigint = 0 OR EXISTS (SELECT FROM hallpass.log WHERE seq = $4 AND uid = $5::integer)
FROM hallpass.load($1, $2, $3)";

/// The facts behind one decision.
#[derive(Clone, Debug)]
pub struct Explanation {
    pub head: Position,
    pub reason: Reason,
    pub role: String,
    pub role_rank: Option<i32>,
    pub effective_min_role: String,
    /// `None` for a permission or a user without a row to decide by.
    pub min_role_is_override: Option<bool>,
    pub enabled: bool,
    pub specific_user: bool,
}

const EXPLAIN: &str = "
SELECT head_seq, head_uid, in_recovery, is_known, is_member, role, role_rank, effective_min_role,
       min_role_is_override, is_enabled, specific_user, reason
FROM hallpass.explain($1, $2, $3)";

const NEXT_MEMBERS: &str = "SELECT org_id, user_id FROM hallpass.next_members($1, $2, $3)";

impl Store {
    /// Loads distinct subjects.
    ///
    /// # Errors
    /// When the database is away, a standby, or answers what it must not.
    pub async fn load(
        &self,
        subjects: &[Subject],
        from: ReadFrom,
        applied: impl FnOnce() -> Position + Send,
    ) -> Result<Loaded, StoreError> {
        let connection = self.misses.acquire().await?;
        // After the connection: it is to the database as it is now, and whatever was applied since is of this one.
        self.load_on(connection, subjects, from, applied()).await
    }

    /// As [`Store::load`], on a connection that is no miss's.
    ///
    /// # Errors
    /// As [`Store::load`].
    pub async fn load_on(
        &self,
        connection: Connection,
        subjects: &[Subject],
        from: ReadFrom,
        applied: Position,
    ) -> Result<Loaded, StoreError> {
        let organizations: Vec<Uuid> = subjects.iter().map(|s| s.organization.0).collect();
        let users: Vec<Uuid> = subjects.iter().map(|s| s.user.0).collect();
        let believe_matrix = from == ReadFrom::MatrixOrView;
        let rows = connection
            .query(
                Question::Load,
                LOAD,
                &[
                    &organizations,
                    &users,
                    &believe_matrix,
                    &applied.seq,
                    &applied.uid.cast_signed(),
                ],
            )
            .await?;
        let (header, members) = rows
            .split_first()
            .ok_or_else(|| StoreError::Wrong("a load without its first row".to_owned()))?;
        refuse_standby(header, 11)?;
        let catalog = self.decode_catalog(header)?;
        let mut loaded = decode_members(&catalog, members, &self.memberships).await?;
        for subject in subjects {
            loaded
                .entry(*subject)
                .or_insert_with(|| SubjectPermissions {
                    catalog: Arc::clone(&catalog),
                    membership: None,
                });
        }
        Ok(Loaded {
            head: decode_head(header, 9)?,
            history_holds: header.try_get(12)?,
            subjects: loaded,
        })
    }

    /// The next members after `after`, in order of (organization, user); the nil ids come before all.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn next_members(
        &self,
        after: Subject,
        count: i32,
    ) -> Result<Vec<Subject>, StoreError> {
        let connection = self.misses.acquire().await?;
        let rows = connection
            .query(
                Question::NextMembers,
                NEXT_MEMBERS,
                &[&after.organization.0, &after.user.0, &count],
            )
            .await?;
        rows.iter().map(decode_subject).collect()
    }

    /// The header's catalog; the one in use when it is the same.
    fn decode_catalog(&self, header: &Row) -> Result<Arc<Catalog>, StoreError> {
        let keys: Vec<&str> = header.try_get::<_, Option<_>>(3)?.unwrap_or_default();
        let names: Vec<&str> = header.try_get::<_, Option<_>>(7)?.unwrap_or_default();
        let modules: Vec<&str> = header.try_get::<_, Option<_>>(8)?.unwrap_or_default();
        let known = self.catalog.load();
        let same = known.permissions().len() == keys.len()
            && (known.permissions().iter())
                .zip(keys.iter().zip(names.iter().zip(&modules)))
                .all(|(p, (key, (name, module)))| {
                    *p.key == **key && *p.name == **name && *p.module == **module
                });
        if same {
            return Ok(Arc::clone(&known));
        }
        let permissions = keys
            .iter()
            .zip(names.iter().zip(&modules))
            .map(|(key, (name, module))| PermissionTemplate {
                key: (*key).into(),
                name: (*name).into(),
                module: (*module).into(),
            })
            .collect();
        let catalog = Arc::new(Catalog::new(permissions));
        self.catalog.store(Arc::clone(&catalog));
        Ok(catalog)
    }
}

impl Connection {
    /// Decides one permission and says why, from the live view.
    ///
    /// # Errors
    /// As [`Store::load`].
    pub async fn explain(
        self,
        subject: Subject,
        permission: &str,
    ) -> Result<Explanation, StoreError> {
        let rows = self
            .query(
                Question::Explain,
                EXPLAIN,
                &[&subject.organization.0, &subject.user.0, &permission],
            )
            .await?;
        let row = rows
            .first()
            .ok_or_else(|| StoreError::Wrong("no row explains".to_owned()))?;
        refuse_standby(row, 2)?;
        let is_known: bool = row.try_get(3)?;
        let is_member: bool = row.try_get(4)?;
        let reason = match (is_known, is_member) {
            (false, _) => Reason::UnknownPermission,
            (true, false) => Reason::NotAMember,
            (true, true) => decode_reason(row.try_get::<_, Option<&str>>(11)?.unwrap_or_default())?,
        };
        Ok(Explanation {
            head: decode_head(row, 0)?,
            reason,
            role: row.try_get(5)?,
            role_rank: row.try_get(6)?,
            effective_min_role: row.try_get(7)?,
            min_role_is_override: row.try_get(8)?,
            enabled: row.try_get(9)?,
            specific_user: row.try_get(10)?,
        })
    }
}

/// A standby lags without a bound, and a SELECT there never fails: its answers are refused here.
pub(super) fn refuse_standby(row: &Row, index: usize) -> Result<(), StoreError> {
    if row.try_get(index)? {
        return Err(StoreError::Standby);
    }
    Ok(())
}

/// The head in two columns from `index` on; both NULL before the first entry.
pub(super) fn decode_head(row: &Row, index: usize) -> Result<Position, StoreError> {
    let seq: Option<i64> = row.try_get(index)?;
    let uid: Option<i32> = row.try_get(index + 1)?;
    Ok(match (seq, uid) {
        (Some(seq), Some(uid)) => Position {
            seq,
            uid: uid.cast_unsigned(),
        },
        _ => Position::ZERO,
    })
}

fn decode_subject(row: &Row) -> Result<Subject, StoreError> {
    Ok(Subject {
        organization: OrganizationId(row.try_get(0)?),
        user: UserId(row.try_get(1)?),
    })
}

pub(super) fn decode_reason(name: &str) -> Result<Reason, StoreError> {
    Reason::from_sql(name).ok_or_else(|| StoreError::Wrong(format!("unknown reason `{name}`")))
}

async fn decode_members(
    catalog: &Arc<Catalog>,
    rows: &[Row],
    memberships: &Mutex<Memberships>,
) -> Result<HashMap<Subject, SubjectPermissions>, StoreError> {
    let mut members = HashMap::with_capacity(rows.len());
    for rows in rows.chunks(SUBJECTS_A_TURN) {
        for row in rows {
            let membership = decode_membership(catalog, row)?;
            // Nothing panics under the lock.
            let mut memberships = memberships.lock().unwrap_or_else(PoisonError::into_inner);
            let permissions = SubjectPermissions {
                catalog: Arc::clone(catalog),
                membership: Some(memberships.share(membership)),
            };
            members.insert(decode_subject(row)?, permissions);
        }
        yield_now().await;
    }
    Ok(members)
}

/// Puts a member's rows into the catalog's order; each permission of the catalog must be there exactly once.
fn decode_membership(catalog: &Catalog, row: &Row) -> Result<Membership, StoreError> {
    let keys: Vec<Option<&str>> = row.try_get::<_, Option<_>>(3)?.unwrap_or_default();
    let reasons: Vec<Option<&str>> = row.try_get::<_, Option<_>>(4)?.unwrap_or_default();
    let min_roles: Vec<Option<&str>> = row.try_get::<_, Option<_>>(5)?.unwrap_or_default();
    let enabled: Vec<Option<bool>> = row.try_get::<_, Option<_>>(6)?.unwrap_or_default();
    let mut decided: Vec<Option<DecidedPermission>> = vec![None; catalog.permissions().len()];
    let mut distinct_roles: Vec<Box<str>> = Vec::new();
    for (((key, reason), min_role), enabled) in
        keys.iter().zip(&reasons).zip(&min_roles).zip(&enabled)
    {
        // A member of an empty catalog has one row of NULLs.
        let (Some(key), Some(reason)) = (key, reason) else {
            continue;
        };
        let index = catalog.index_of(key).ok_or_else(|| {
            StoreError::Wrong(format!(
                "permission `{key}` is decided but not in the catalog"
            ))
        })?;
        let min_role = min_role.unwrap_or_default();
        let position = distinct_roles
            .iter()
            .position(|role| **role == *min_role)
            .unwrap_or_else(|| {
                distinct_roles.push(min_role.into());
                distinct_roles.len() - 1
            });
        decided[index] = Some(DecidedPermission {
            reason: decode_reason(reason)?,
            enabled: enabled.unwrap_or(true),
            min_role: u16::try_from(position)
                .map_err(|_| StoreError::Wrong("more than 65,536 minimum roles".to_owned()))?,
        });
    }
    let decided = decided
        .into_iter()
        .collect::<Option<Box<[_]>>>()
        .ok_or_else(|| {
            StoreError::Wrong("a permission of the catalog is not decided".to_owned())
        })?;
    Ok(Membership {
        role: row
            .try_get::<_, Option<&str>>(2)?
            .unwrap_or_default()
            .into(),
        decided,
        min_roles: distinct_roles.into(),
    })
}

/// What members have alike, however they were loaded: an organization has about as many different memberships as the ladder
/// has roles.
#[derive(Default)]
pub(super) struct Memberships {
    known: HashSet<Arc<Membership>>,
    forget_above: usize,
}

impl Memberships {
    /// The one that is known already, if this is like it.
    fn share(&mut self, membership: Membership) -> Arc<Membership> {
        if let Some(known) = self.known.get(&membership) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.forget_above {
            // Those that no entry has any more.
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.forget_above = MEMBERSHIPS_KEPT.max(2 * self.known.len());
        }
        let new = Arc::new(membership);
        self.known.insert(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memberships_that_are_alike_are_one_and_those_of_nobody_are_forgotten() {
        let of = |role: usize| Membership {
            role: role.to_string().into(),
            ..Membership::default()
        };
        let mut memberships = Memberships::default();
        let first = memberships.share(of(0));
        assert!(Arc::ptr_eq(&first, &memberships.share(of(0))));
        for role in 0..10 * MEMBERSHIPS_KEPT {
            memberships.share(of(role));
            assert!(memberships.known.len() <= MEMBERSHIPS_KEPT);
        }
        assert!(Arc::ptr_eq(&first, &memberships.share(of(0))));
    }
}
