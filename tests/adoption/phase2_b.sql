-- The rest of Phase 2 in shape B. Its script makes the audit log and no trigger that would fill it.

CREATE INDEX IF NOT EXISTS idx_profiles_permission_lookup ON profiles (org_id, role) INCLUDE (id);
CREATE INDEX IF NOT EXISTS idx_profiles_user_org ON profiles (id, org_id) INCLUDE (role);
