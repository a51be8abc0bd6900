//! Databases of so many members, in hallpass's own tables: the product's catalog of 30 permissions, 6 roles in the
//! shares of the demo's district, and for a fifth of the permissions a setting of the organization's own.

use hallpass::{
    embedded::PrivatePostgres,
    model::{OrganizationId, Subject, UserId},
    store::migrations::migrate,
};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{
    Result,
    application::{connect, create},
};

/// A membership, as the cache is keyed by it.
pub(crate) type Member = Subject;

/// The organization that comes before all others, of however many members.
pub(crate) const FIRST_ORGANIZATION: OrganizationId = OrganizationId(Uuid::from_u128(1));

/// How many members a database has.
pub(crate) struct Size {
    pub(crate) first_organization: u32,
    pub(crate) other_organizations: u32,
    pub(crate) of_each_other: u32,
}

/// $1: organizations beside the first.
const ORGANIZATIONS: &str = "
INSERT INTO organizations (id, name)
SELECT CASE i WHEN 0 THEN lpad('1', 32, '0')::uuid ELSE md5('o' || i)::uuid END, 'School ' || i
FROM generate_series(0, $1::integer) i";

/// $1: members of the first organization, $2: of each other, $3: of all together.
const MEMBERS: &str = "
INSERT INTO profiles (org_id, user_id, role, first_name, last_name)
SELECT CASE WHEN i < $1::integer THEN lpad('1', 32, '0')::uuid ELSE md5('o' || 1 + (i - $1) / $2::integer)::uuid END,
       md5('u' || i)::uuid,
       CASE WHEN i % 100 = 0 THEN 'admin' WHEN i % 100 < 5 THEN 'board_member' WHEN i % 100 < 15 THEN 'committee_lead'
            WHEN i % 100 < 40 THEN 'volunteer' WHEN i % 100 < 48 THEN 'teacher' ELSE 'parent_member' END,
       'Ann', 'Archer'
FROM generate_series(0, $3::integer - 1) i";

/// Of 20 permissions two have another minimum role, one has users by name, one is off.
const OVERRIDES: &str = "
INSERT INTO organization_permissions (org_id, permission_key, min_role_required, specific_users, is_enabled)
SELECT o.id, t.permission_key,
       CASE WHEN drawn < 2 THEN (ARRAY['volunteer', 'committee_lead', 'board_member', 'admin'])[1 + (hash / 20) % 4] END,
       CASE WHEN drawn = 2 THEN ARRAY(SELECT user_id FROM profiles p WHERE p.org_id = o.id ORDER BY user_id LIMIT 3) END,
       drawn < 3
FROM organizations o CROSS JOIN organization_permission_templates t
CROSS JOIN LATERAL (SELECT hashtext(o.id || t.permission_key) & 2147483647 AS hash) h
CROSS JOIN LATERAL (SELECT hash % 20 AS drawn) d
WHERE drawn < 4";

/// Neither the record of each row nor the foreign key is what is measured.
const BEFORE_IMPORT: &str = "
BEGIN;
SET LOCAL session_replication_role = replica;
ALTER TABLE profiles DISABLE TRIGGER hallpass_record_insert";

/// The log must not keep silent: who has not heard of a change believes what was before.
const AFTER_IMPORT: &str = "
ALTER TABLE profiles ENABLE ALWAYS TRIGGER hallpass_record_insert;
CALL hallpass.log_everything('UNRECORDED', 'profiles');
COMMIT";

/// A database of this size, whose log says of its members that everything has changed; the planner's statistics are fresh
/// and nothing is left to be written.
pub(crate) async fn database(
    postgres: &PrivatePostgres,
    name: &str,
    size: &Size,
) -> Result<Client> {
    create(postgres, name).await?;
    let url = postgres.url_for(name);
    migrate(&url.parse()?, |_| {}).await?;
    let client = connect(&url).await?;
    let count = |number: u32| i32::try_from(number);
    let first = count(size.first_organization)?;
    let each = count(size.of_each_other)?;
    let all = count(size.all())?;
    let others = count(size.other_organizations)?;
    client.execute(ORGANIZATIONS, &[&others]).await?;
    client.batch_execute(BEFORE_IMPORT).await?;
    client.execute(MEMBERS, &[&first, &each, &all]).await?;
    client.batch_execute(AFTER_IMPORT).await?;
    client.execute(OVERRIDES, &[]).await?;
    client.batch_execute("VACUUM ANALYZE").await?;
    client.batch_execute("CHECKPOINT").await?;
    Ok(client)
}

impl Size {
    pub(crate) fn all(&self) -> u32 {
        self.first_organization + self.other_organizations * self.of_each_other
    }
}

/// All members, in the order in which a warm start takes them.
pub(crate) async fn members(client: &Client) -> Result<Vec<Member>> {
    let all = "SELECT org_id, user_id FROM hallpass.members ORDER BY org_id, user_id";
    let rows = client.query(all, &[]).await?;
    let member = |row: &tokio_postgres::Row| Member {
        organization: OrganizationId(row.get(0)),
        user: UserId(row.get(1)),
    };
    Ok(rows.iter().map(member).collect())
}
