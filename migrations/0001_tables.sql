-- The application's tables, under the names and columns of PTO Connect, for a database that does not have them yet:
-- organizations, memberships, the role ladder, the catalog of permissions and each organization's overrides.

CREATE TABLE public.organizations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- One row a membership. A person who loses the organization keeps the row: a NULL org_id is no membership.
CREATE TABLE public.profiles (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL,
    org_id uuid REFERENCES public.organizations (id) ON DELETE SET NULL,
    role text,
    first_name text,
    last_name text,
    email text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (org_id, user_id)
);

-- The role ladder. A role that is not on it satisfies nothing and is satisfied by nobody.
CREATE TABLE public.permission_roles (
    role_key text PRIMARY KEY,
    rank integer NOT NULL
);

-- The catalog: what each permission is called and which role has it unless an organization says otherwise.
CREATE TABLE public.organization_permission_templates (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    module_name text NOT NULL,
    permission_key text NOT NULL UNIQUE,
    permission_name text NOT NULL,
    permission_description text,
    default_min_role text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- Overrides. min_role_required NULL: the template's default applies. is_enabled NULL: enabled.
CREATE TABLE public.organization_permissions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES public.organizations (id) ON DELETE CASCADE,
    permission_key text NOT NULL,
    min_role_required text,
    specific_users uuid[],
    is_enabled boolean DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (org_id, permission_key)
);

INSERT INTO public.permission_roles (role_key, rank) VALUES
    ('parent_member', 0),
    ('teacher', 0),
    ('volunteer', 1),
    ('committee_lead', 2),
    ('board_member', 3),
    ('admin', 4);

INSERT INTO public.organization_permission_templates
    (module_name, permission_key, permission_name, default_min_role) VALUES
    ('communications', 'can_view_messages', 'View Messages', 'volunteer'),
    ('communications', 'can_create_messages', 'Create Messages', 'committee_lead'),
    ('communications', 'can_edit_messages', 'Edit Messages', 'committee_lead'),
    ('communications', 'can_delete_messages', 'Delete Messages', 'board_member'),
    ('communications', 'can_create_email_drafts', 'Create Email Drafts', 'committee_lead'),
    ('communications', 'can_send_emails', 'Send Emails', 'board_member'),
    ('budget', 'can_view_budget', 'View Budget', 'volunteer'),
    ('budget', 'can_create_budget_items', 'Create Budget Items', 'committee_lead'),
    ('budget', 'can_edit_budget_items', 'Edit Budget Items', 'committee_lead'),
    ('budget', 'can_delete_budget_items', 'Delete Budget Items', 'board_member'),
    ('budget', 'can_approve_expenses', 'Approve Expenses', 'board_member'),
    ('events', 'can_view_events', 'View Events', 'volunteer'),
    ('events', 'can_create_events', 'Create Events', 'committee_lead'),
    ('events', 'can_edit_events', 'Edit Events', 'committee_lead'),
    ('events', 'can_delete_events', 'Delete Events', 'board_member'),
    ('events', 'can_manage_volunteers', 'Manage Event Volunteers', 'committee_lead'),
    ('fundraising', 'can_view_fundraisers', 'View Fundraisers', 'volunteer'),
    ('fundraising', 'can_create_fundraisers', 'Create Fundraisers', 'committee_lead'),
    ('fundraising', 'can_edit_fundraisers', 'Edit Fundraisers', 'committee_lead'),
    ('fundraising', 'can_delete_fundraisers', 'Delete Fundraisers', 'board_member'),
    ('documents', 'can_view_documents', 'View Documents', 'volunteer'),
    ('documents', 'can_upload_documents', 'Upload Documents', 'committee_lead'),
    ('documents', 'can_delete_documents', 'Delete Documents', 'board_member'),
    ('teacher_requests', 'can_view_requests', 'View Teacher Requests', 'volunteer'),
    ('teacher_requests', 'can_create_requests', 'Create Teacher Requests', 'volunteer'),
    ('teacher_requests', 'can_fulfill_requests', 'Fulfill Teacher Requests', 'committee_lead'),
    ('user_management', 'can_view_users', 'View Users', 'committee_lead'),
    ('user_management', 'can_edit_user_roles', 'Edit User Roles', 'admin'),
    ('user_management', 'can_invite_users', 'Invite Users', 'board_member'),
    ('user_management', 'can_remove_users', 'Remove Users', 'admin');

-- Every statement of hallpass reads memberships here and nowhere else.
CREATE VIEW hallpass.members AS
    SELECT org_id, user_id, id AS profile_id, role::text AS role, first_name, last_name
    FROM public.profiles
    WHERE org_id IS NOT NULL AND user_id IS NOT NULL;

-- Takes every privilege on hallpass's own objects away from everyone but their owner: default privileges of the
-- database (a hosted one may grant everything to everyone) must not reach them. Each migration ends with it.
CREATE PROCEDURE hallpass.reset_privileges()
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    public_names CONSTANT text[] := ARRAY[
        'permission_audit_log', 'effective_user_permissions', 'user_permission_matrix', 'org_permission_summary',
        'user_has_permission_in_org', 'user_has_org_permission', 'user_has_org_permission_enhanced',
        'get_user_permissions_bulk', 'set_session_variables', 'refresh_permission_materialized_views'];
    own CONSTANT oid := to_regnamespace('hallpass');
    held record;
BEGIN
    FOR held IN
        SELECT DISTINCT object, grantee FROM (
            SELECT 'SCHEMA hallpass' AS object, nspowner AS owner, coalesce(nspacl, acldefault('n', nspowner)) AS acl
            FROM pg_namespace WHERE oid = own
            UNION ALL
            SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || format('%I.%I', nspname, relname),
                   relowner, coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
            FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
            WHERE relkind IN ('r', 'p', 'v', 'm', 'S')
              AND (relnamespace = own OR nspname = 'public' AND relname = ANY (public_names))
            UNION ALL
            SELECT 'ROUTINE ' || p.oid::regprocedure, proowner, coalesce(proacl, acldefault('f', proowner))
            FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
            WHERE pronamespace = own OR nspname = 'public' AND proname = ANY (public_names)
        ) objects, aclexplode(acl) WHERE grantee <> owner
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', held.object,
                       CASE held.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(held.grantee)) END);
    END LOOP;
END $$;

-- The tables made above are the application's from here on, but default privileges must not open them either.
DO $$
DECLARE
    held record;
BEGIN
    FOR held IN
        SELECT DISTINCT c.oid::regclass AS object, grantee
        FROM pg_class c, aclexplode(coalesce(relacl, acldefault('r', relowner)))
        WHERE c.oid IN ('public.organizations'::regclass, 'public.profiles'::regclass,
                        'public.permission_roles'::regclass, 'public.organization_permission_templates'::regclass,
                        'public.organization_permissions'::regclass)
          AND grantee <> relowner
    LOOP
        EXECUTE format('REVOKE ALL ON TABLE %s FROM %s CASCADE', held.object,
                       CASE held.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(held.grantee)) END);
    END LOOP;
END $$;

CALL hallpass.reset_privileges();
