//! What PostgreSQL lists beside decisions: who holds a permission, where a user is a member, an organization's counts.
//!
//! Invariant: an answer is one statement, hence one snapshot, and says that snapshot's head.

use std::time::SystemTime;

use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    StoreError,
    load::{ReadFrom, decode_head, decode_reason, refuse_standby},
    pool::Connection,
    timings::Question,
};
use crate::model::{OrganizationId, Position, Reason, UserId};

/// A page of a list that is ordered by id, as one snapshot has it.
pub struct Page<T> {
    pub head: Position,
    pub rows: Vec<T>,
    /// The id that the next page begins with; `None` for the last page.
    pub next: Option<Uuid>,
}

/// Which page: the least id that may be on it, and how many rows at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageBounds {
    pub first: Uuid,
    pub size: u16,
}

/// A member who holds a permission.
pub struct Holder {
    pub user: UserId,
    /// Empty where it is NULL.
    pub role: String,
    pub reason: Reason,
}

/// A user's membership of one organization.
pub struct UserOrganization {
    pub organization: OrganizationId,
    /// Empty where it is NULL.
    pub role: String,
}

/// What an organization has of permissions and settings; see `public.org_permission_summary`.
pub struct OrganizationSummary {
    pub name: String,
    pub total_available_permissions: i32,
    pub total_custom_permissions: i32,
    pub enabled_custom_permissions: i32,
    pub disabled_custom_permissions: i32,
    pub admin_only_permissions: i32,
    pub board_member_permissions: i32,
    pub committee_lead_permissions: i32,
    pub volunteer_permissions: i32,
    /// `None` for an organization without settings of its own.
    pub last_permission_update: Option<SystemTime>,
}

const PERMISSION_HOLDERS: &str = "
SELECT head_seq, head_uid, in_recovery, user_id, role, reason
FROM hallpass.permission_holders($1, $2, $3, $4)";

const USER_ORGANIZATIONS: &str = "
SELECT head_seq, head_uid, in_recovery, org_id, role
FROM hallpass.user_organizations($1, $2, $3, $4)";

const ORGANIZATION_SUMMARY: &str = "
SELECT head_seq, head_uid, in_recovery, org_id, org_name,
       total_available_permissions, total_custom_permissions, enabled_custom_permissions,
       disabled_custom_permissions, admin_only_permissions, board_member_permissions,
       committee_lead_permissions, volunteer_permissions, last_permission_update
FROM hallpass.organization_summary($1, $2)";

impl Connection {
    /// The members who hold a permission, by user; nobody holds an unknown one.
    ///
    /// # Errors
    /// When the database is away, a standby, or answers what it must not.
    pub async fn permission_holders(
        self,
        organization: OrganizationId,
        permission: &str,
        bounds: PageBounds,
    ) -> Result<Page<Holder>, StoreError> {
        let limit = bounds.row_limit();
        let rows = self
            .query(
                Question::Holders,
                PERMISSION_HOLDERS,
                &[&organization.0, &permission, &bounds.first, &limit],
            )
            .await?;
        decode_page(&rows, bounds, |row| {
            Ok(Holder {
                user: UserId(row.try_get(3)?),
                role: row.try_get(4)?,
                reason: decode_reason(row.try_get(5)?)?,
            })
        })
    }

    /// A user's memberships of these organizations (`None`: all), by organization.
    ///
    /// # Errors
    /// As [`Connection::permission_holders`].
    pub async fn user_organizations(
        self,
        user: UserId,
        among: Option<&[OrganizationId]>,
        bounds: PageBounds,
    ) -> Result<Page<UserOrganization>, StoreError> {
        let limit = bounds.row_limit();
        let among: Option<Vec<Uuid>> =
            among.map(|among| among.iter().map(|organization| organization.0).collect());
        let rows = self
            .query(
                Question::Organizations,
                USER_ORGANIZATIONS,
                &[&user.0, &among, &bounds.first, &limit],
            )
            .await?;
        decode_page(&rows, bounds, |row| {
            Ok(UserOrganization {
                organization: OrganizationId(row.try_get(3)?),
                role: row.try_get(4)?,
            })
        })
    }

    /// An organization's counts and the head of their snapshot; `None` where there is no such organization.
    ///
    /// # Errors
    /// As [`Connection::permission_holders`].
    pub async fn organization_summary(
        self,
        organization: OrganizationId,
        from: ReadFrom,
    ) -> Result<(Position, Option<OrganizationSummary>), StoreError> {
        let believe_summary = from == ReadFrom::MatrixOrView;
        let rows = self
            .query(
                Question::Summary,
                ORGANIZATION_SUMMARY,
                &[&organization.0, &believe_summary],
            )
            .await?;
        let (head, row) = decode_first(&rows)?;
        if row.try_get::<_, Option<Uuid>>(3)?.is_none() {
            return Ok((head, None));
        }
        let summary = OrganizationSummary {
            name: row.try_get(4)?,
            total_available_permissions: row.try_get(5)?,
            total_custom_permissions: row.try_get(6)?,
            enabled_custom_permissions: row.try_get(7)?,
            disabled_custom_permissions: row.try_get(8)?,
            admin_only_permissions: row.try_get(9)?,
            board_member_permissions: row.try_get(10)?,
            committee_lead_permissions: row.try_get(11)?,
            volunteer_permissions: row.try_get(12)?,
            last_permission_update: row.try_get(13)?,
        };
        Ok((head, Some(summary)))
    }
}

impl PageBounds {
    /// One more than the page has: it tells where the next page begins.
    fn row_limit(self) -> i32 {
        i32::from(self.size) + 1
    }
}

/// The head, and the row that it stands in.
fn decode_first(rows: &[Row]) -> Result<(Position, &Row), StoreError> {
    let first = rows
        .first()
        .ok_or_else(|| StoreError::Wrong("a list without its first row".to_owned()))?;
    refuse_standby(first, 2)?;
    Ok((decode_head(first, 0)?, first))
}

fn decode_page<T>(
    rows: &[Row],
    bounds: PageBounds,
    decode: impl Fn(&Row) -> Result<T, StoreError>,
) -> Result<Page<T>, StoreError> {
    let (head, first) = decode_first(rows)?;
    if first.try_get::<_, Option<Uuid>>(3)?.is_none() {
        return Ok(Page {
            head,
            rows: Vec::new(),
            next: None,
        });
    }
    let size = usize::from(bounds.size);
    Ok(Page {
        head,
        rows: rows
            .iter()
            .take(size)
            .map(decode)
            .collect::<Result<_, _>>()?,
        next: rows.get(size).map(|row| row.try_get(3)).transpose()?,
    })
}
