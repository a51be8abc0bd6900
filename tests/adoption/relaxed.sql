-- Lets the scenarios' data in: run by pto_owner between the shape and Phase 2, whose views fix the types of columns.
--
-- A scenario grants by name without a role, has members with no role or one that only its ladder knows, users that
-- nobody has authenticated, and organizations of which it says nothing but the id.
ALTER TABLE organization_permissions ALTER min_role_required DROP NOT NULL, ALTER min_role_required TYPE text;
ALTER TABLE organization_permission_templates ALTER default_min_role TYPE text;
ALTER TABLE profiles DROP CONSTRAINT IF EXISTS profiles_role_check, DROP CONSTRAINT IF EXISTS profiles_id_fkey,
                     ALTER role DROP NOT NULL, ALTER email SET DEFAULT gen_random_uuid()::text;
ALTER TABLE organizations ALTER slug SET DEFAULT gen_random_uuid()::text,
                          ALTER signup_code SET DEFAULT gen_random_uuid()::text;
