//! Loads the made-up district of `hallpass demo`.

use uuid::Uuid;

use super::{DedicatedConnection, StoreError};

/// An organization and all that is in it.
pub struct DemoOrganization {
    pub id: Uuid,
    pub name: String,
    pub members: Vec<DemoMember>,
    pub overrides: Vec<DemoOverride>,
}

/// A membership.
pub struct DemoMember {
    pub user_id: Uuid,
    pub role: &'static str,
    pub first_name: &'static str,
    pub last_name: &'static str,
}

/// An organization's own setting for a permission.
pub struct DemoOverride {
    pub permission: String,
    pub min_role: Option<&'static str>,
    pub specific_users: Option<Vec<Uuid>>,
    pub is_enabled: bool,
}

const LOAD_ORGANIZATION: &str = "
INSERT INTO public.organizations (id, name) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING";

const LOAD_MEMBERS: &str = "
INSERT INTO public.profiles (org_id, user_id, role, first_name, last_name)
SELECT $1, * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[])
ON CONFLICT (org_id, user_id) DO NOTHING";

const LOAD_OVERRIDE: &str = "
INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required, specific_users, is_enabled)
VALUES ($1, $2, $3, $4, $5) ON CONFLICT (org_id, permission_key) DO NOTHING";

const RESET_ROLE: &str = "
UPDATE public.profiles SET role = $3 WHERE org_id = $1 AND user_id = $2 AND role IS DISTINCT FROM $3";

const TOGGLE_ROLE: &str = "
UPDATE public.profiles SET role = CASE role WHEN 'volunteer' THEN 'committee_lead' ELSE 'volunteer' END
WHERE org_id = $1 AND user_id = $2";

const ORGANIZATION_EXISTS: &str = "SELECT EXISTS (SELECT FROM public.organizations WHERE id = $1)";

const MEMBERS: &str = "SELECT org_id, user_id FROM hallpass.members ORDER BY user_id";

const PERMISSIONS: &str = "SELECT permission_key::text FROM public.organization_permission_templates ORDER BY permission_key";

impl DedicatedConnection {
    /// The keys of the catalog.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn permission_keys(&self) -> Result<Vec<String>, StoreError> {
        let rows = self.client.query(PERMISSIONS, &[]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// # Errors
    /// When the database is away.
    pub async fn organization_exists(&self, id: Uuid) -> Result<bool, StoreError> {
        Ok(self
            .client
            .query_one(ORGANIZATION_EXISTS, &[&id])
            .await?
            .try_get(0)?)
    }

    /// Puts an organization in, with everything that is in it, in one transaction.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn load_demo_organization(
        &mut self,
        organization: &DemoOrganization,
    ) -> Result<(), StoreError> {
        let users: Vec<Uuid> = organization
            .members
            .iter()
            .map(|member| member.user_id)
            .collect();
        let roles: Vec<&str> = organization
            .members
            .iter()
            .map(|member| member.role)
            .collect();
        let first_names: Vec<&str> = organization
            .members
            .iter()
            .map(|member| member.first_name)
            .collect();
        let last_names: Vec<&str> = organization
            .members
            .iter()
            .map(|member| member.last_name)
            .collect();
        let transaction = self.client.transaction().await?;
        transaction
            .execute(LOAD_ORGANIZATION, &[&organization.id, &organization.name])
            .await?;
        transaction
            .execute(
                LOAD_MEMBERS,
                &[&organization.id, &users, &roles, &first_names, &last_names],
            )
            .await?;
        for setting in &organization.overrides {
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] = [
                &organization.id,
                &setting.permission,
                &setting.min_role,
                &setting.specific_users,
                &setting.is_enabled,
            ];
            transaction.execute(LOAD_OVERRIDE, &parameters).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// All members of all organizations, with the organization of each first.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn demo_members(&self) -> Result<Vec<(Uuid, Uuid)>, StoreError> {
        let rows = self.client.query(MEMBERS, &[]).await?;
        let member = |row: &tokio_postgres::Row| Ok((row.try_get(0)?, row.try_get(1)?));
        rows.iter().map(member).collect()
    }

    /// Gives a member another role than it has.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn toggle_demo_role(&self, organization: Uuid, user: Uuid) -> Result<(), StoreError> {
        self.client
            .execute(TOGGLE_ROLE, &[&organization, &user])
            .await?;
        Ok(())
    }

    /// Gives a member this role.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn set_demo_role(
        &self,
        organization: Uuid,
        user: Uuid,
        role: &str,
    ) -> Result<(), StoreError> {
        self.client
            .execute(RESET_ROLE, &[&organization, &user, &role])
            .await?;
        Ok(())
    }
}
