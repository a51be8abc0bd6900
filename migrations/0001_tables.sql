-- The application's tables, under the names and columns of PTO Connect: organizations, memberships, the role ladder, the
-- catalog of permissions and each organization's overrides. One that is there already stays as it is, rows, columns and
-- privileges; one that is not is made.

-- Those that were there.
CREATE TABLE hallpass.adopted_table (name text PRIMARY KEY);
INSERT INTO hallpass.adopted_table
    SELECT relname FROM pg_class
    WHERE relnamespace = 'public'::regnamespace
      AND relname IN ('organizations', 'profiles', 'permission_roles', 'organization_permission_templates',
                      'organization_permissions');

CREATE TABLE IF NOT EXISTS public.organizations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- One row a membership. A person who loses the organization keeps the row: a NULL org_id is no membership.
CREATE TABLE IF NOT EXISTS public.profiles (
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
CREATE TABLE IF NOT EXISTS public.permission_roles (
    role_key text PRIMARY KEY,
    rank integer NOT NULL
);

-- The catalog: what each permission is called and which role has it unless an organization says otherwise.
CREATE TABLE IF NOT EXISTS public.organization_permission_templates (
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
CREATE TABLE IF NOT EXISTS public.organization_permissions (
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

INSERT INTO public.permission_roles (role_key, rank)
SELECT * FROM (VALUES
    ('parent_member', 0),
    ('teacher', 0),
    ('volunteer', 1),
    ('committee_lead', 2),
    ('board_member', 3),
    ('admin', 4)
) ladder WHERE NOT EXISTS (SELECT FROM hallpass.adopted_table WHERE name = 'permission_roles');

-- Not one statement with a condition: where the column is an enum of the application's, it would not even be planned.
DO $$
BEGIN
    IF EXISTS (SELECT FROM hallpass.adopted_table WHERE name = 'organization_permission_templates') THEN
        RETURN;
    END IF;
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
END $$;

-- Every statement of hallpass reads memberships here and nowhere else. Of the two shapes of profiles, one has the user in
-- user_id; in the other a profile's id is the user, who then belongs to one organization at most.
CREATE FUNCTION hallpass.profiles_column(wanted text, instead text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'public.profiles'::regclass
                             AND attname = wanted AND NOT attisdropped) THEN wanted ELSE instead END;
END $$;

DO $$
BEGIN
    EXECUTE format('CREATE VIEW hallpass.members AS
    SELECT org_id, %1$s AS user_id, id AS profile_id, role::text AS role, %2$s AS first_name, %3$s AS last_name
    FROM public.profiles
    WHERE org_id IS NOT NULL AND %1$s IS NOT NULL',
        hallpass.profiles_column('user_id', 'id'),
        hallpass.profiles_column('first_name', 'NULL::text'), hallpass.profiles_column('last_name', 'NULL::text'));
END $$;

-- hallpass's objects in schema public, where nothing but the name tells them from the application's: the migration that
-- makes one says so here. keeps_grants: it took the place of the application's own, whose grants stay as they are.
CREATE TABLE hallpass.public_object (
    name text PRIMARY KEY,
    keeps_grants boolean NOT NULL DEFAULT false
);

-- The functions among them. The application may have others of the same names.
CREATE FUNCTION hallpass.public_function(OUT name text, OUT signature text) RETURNS SETOF record
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY VALUES
        ('user_has_org_permission', 'user_has_org_permission(uuid, character varying)'),
        ('user_has_org_permission_enhanced', 'user_has_org_permission_enhanced(uuid, text, boolean)'),
        ('user_has_permission_in_org', 'user_has_permission_in_org(uuid, uuid, text)'),
        ('get_user_permissions_bulk', 'get_user_permissions_bulk(uuid, text)'),
        ('set_session_variables', 'set_session_variables(uuid, uuid, uuid, text, text, text)'),
        ('refresh_permission_materialized_views', 'refresh_permission_materialized_views()'),
        ('cleanup_old_audit_logs', 'cleanup_old_audit_logs(integer)'),
        ('analyze_permission_performance', 'analyze_permission_performance()');
END $$;

-- Who but the owner is meant to do what, in the words of GRANT: the migration that makes an object says it here.
CREATE TABLE hallpass.intended_privilege (
    grantee text,                           -- a role, which need not exist yet; or PUBLIC
    privilege text,
    object text,                            -- SCHEMA s, TABLE s.t, SEQUENCE s.t or ROUTINE s.f(types)
    PRIMARY KEY (grantee, privilege, object)
);

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'USAGE', 'SCHEMA hallpass'),
    ('hallpass_service', 'SELECT', 'TABLE hallpass.schema_migrations'),
    ('hallpass_auditor', 'USAGE', 'SCHEMA hallpass'),
    ('hallpass_auditor', 'SELECT', 'TABLE hallpass.schema_migrations');

-- Takes every privilege on one object away from everyone but its owner.
CREATE PROCEDURE hallpass.revoke_all(object text, owner oid, acl aclitem[])
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held record;
BEGIN
    FOR held IN SELECT DISTINCT grantee FROM aclexplode(acl) WHERE grantee <> owner LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', object,
                       CASE held.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(held.grantee)) END);
    END LOOP;
END $$;

-- Gives hallpass's own objects the privileges that are intended and no others: default privileges of the database (a
-- hosted one may grant everything to everyone) must not reach them. Each migration ends with it, and so does
-- deploy/sql/roles.sql, which makes the roles.
CREATE PROCEDURE hallpass.reset_privileges()
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    own CONSTANT oid := to_regnamespace('hallpass');
    closed_names CONSTANT text[] := ARRAY(SELECT name FROM hallpass.public_object WHERE NOT keeps_grants);
    opened record;
    intended hallpass.intended_privilege;
BEGIN
    FOR opened IN
        SELECT 'SCHEMA hallpass' AS object, nspowner AS owner, coalesce(nspacl, acldefault('n', nspowner)) AS acl
        FROM pg_namespace WHERE oid = own
        UNION ALL
        SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || format('%I.%I', nspname, relname),
               relowner, coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
        FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
        WHERE relkind IN ('r', 'p', 'v', 'm', 'S')
          AND (relnamespace = own OR nspname = 'public' AND relname = ANY (closed_names))
        UNION ALL
        SELECT 'ROUTINE ' || p.oid::regprocedure, proowner, coalesce(proacl, acldefault('f', proowner))
        FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
        WHERE pronamespace = own
           OR p.oid IN (SELECT to_regprocedure('public.' || f.signature) FROM hallpass.public_function() f
                        WHERE f.name = ANY (closed_names))
    LOOP
        CALL hallpass.revoke_all(opened.object, opened.owner, opened.acl);
    END LOOP;

    -- A role may be made after this, and an object by a later migration.
    FOR intended IN
        SELECT i.* FROM hallpass.intended_privilege i,
             LATERAL (SELECT split_part(object, ' ', 1) AS kind, substr(object, strpos(object, ' ') + 1) AS name) o
        WHERE (grantee = 'PUBLIC' OR to_regrole(quote_ident(grantee)) IS NOT NULL)
          AND CASE WHEN kind = 'SCHEMA' THEN to_regnamespace(name) IS NOT NULL
                   WHEN kind IN ('TABLE', 'SEQUENCE') THEN to_regclass(name) IS NOT NULL
                   ELSE to_regprocedure(name) IS NOT NULL END
    LOOP
        EXECUTE format('GRANT %s ON %s TO %s', intended.privilege, intended.object,
                       CASE intended.grantee WHEN 'PUBLIC' THEN 'PUBLIC' ELSE quote_ident(intended.grantee) END);
    END LOOP;
END $$;

-- Adoption: how hallpass takes the place of what the application had under the same names.

-- The statements that bring back what was replaced or switched off, run in reverse order by `migrate --uninstall`. What
-- takes long is run FIRST or LAST, each by itself, when nobody is made to wait; the rest in one transaction.
CREATE TABLE hallpass.undo (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    statement text NOT NULL,
    step text NOT NULL DEFAULT 'SWITCH' CHECK (step IN ('FIRST', 'SWITCH', 'LAST'))
);

-- The privileges that roles keep on what takes an object's place. Only those of roles that row-level security does not
-- bind: our views and functions show rows to whoever may use them.
CREATE PROCEDURE hallpass.keep_privileges(new_object text, acl aclitem[])
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO hallpass.intended_privilege (grantee, privilege, object)
    SELECT DISTINCT rolname, privilege_type, new_object
    FROM aclexplode(acl) JOIN pg_roles r ON r.oid = grantee
    WHERE rolbypassrls AND rolname <> current_user AND privilege_type IN ('SELECT', 'EXECUTE');
END $$;

-- Moves an object of the application out of public, into a schema that is open to nobody.
CREATE PROCEDURE hallpass.set_aside(kind text, name text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    granted record;
BEGIN
    IF to_regnamespace('hallpass_replaced') IS NULL THEN
        CREATE SCHEMA hallpass_replaced;
        SELECT nspowner, nspacl INTO granted FROM pg_namespace WHERE nspname = 'hallpass_replaced';
        CALL hallpass.revoke_all('SCHEMA hallpass_replaced', granted.nspowner, granted.nspacl);
    END IF;
    EXECUTE format('ALTER %s public.%s SET SCHEMA hallpass_replaced', kind, name);
    INSERT INTO hallpass.undo (statement) VALUES (format('ALTER %s hallpass_replaced.%s SET SCHEMA public', kind, name));
END $$;

-- Gives a view that was made in schema hallpass its name in public. One that has the name there is set aside, and a
-- materialized one emptied.
CREATE PROCEDURE hallpass.publish_view(name text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kinds CONSTANT jsonb := '{"v": "VIEW", "m": "MATERIALIZED VIEW"}';
    old record;
BEGIN
    SELECT oid, kinds ->> relkind::text AS kind, relacl, relispopulated INTO old
    FROM pg_class WHERE oid = to_regclass('public.' || name);
    IF FOUND THEN
        CALL hallpass.keep_privileges('TABLE public.' || name, old.relacl);
        IF old.kind = 'MATERIALIZED VIEW' AND old.relispopulated THEN
            INSERT INTO hallpass.undo (statement, step)
            SELECT format('DO $do$ BEGIN IF to_regclass(%L) IS NOT NULL THEN REFRESH MATERIALIZED VIEW %1$s; END IF; END $do$',
                          'hallpass_replaced.' || name), 'FIRST';
        END IF;
        CALL hallpass.set_aside(old.kind, name);
        IF old.kind = 'MATERIALIZED VIEW' THEN
            EXECUTE format('REFRESH MATERIALIZED VIEW hallpass_replaced.%I WITH NO DATA', name);
        END IF;
    END IF;
    EXECUTE format('ALTER %s hallpass.%I SET SCHEMA public',
                   (SELECT kinds ->> relkind::text FROM pg_class WHERE oid = to_regclass('hallpass.' || name)), name);
END $$;

-- Makes room in public for a function of ours: one of the application that has the same name and arguments is set aside,
-- or kept in place to be replaced there, with its privileges, where policies may call it.
CREATE PROCEDURE hallpass.make_room(signature text, in_place boolean DEFAULT false)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old CONSTANT regprocedure := to_regprocedure('public.' || signature);
    acl CONSTANT aclitem[] := (SELECT proacl FROM pg_proc WHERE oid = old);
BEGIN
    IF old IS NULL THEN
        RETURN;
    END IF;
    IF in_place THEN
        INSERT INTO hallpass.undo (statement) VALUES (pg_get_functiondef(old));
        INSERT INTO hallpass.public_object VALUES (split_part(signature, '(', 1), true);
    ELSE
        CALL hallpass.keep_privileges('ROUTINE public.' || signature, acl);
        CALL hallpass.set_aside('ROUTINE', signature);
    END IF;
END $$;

-- The tables made above are the application's from here on, but default privileges must not open them either. Those that
-- were there keep the privileges that the application has given.
DO $$
DECLARE
    made record;
BEGIN
    FOR made IN
        SELECT 'TABLE ' || c.oid::regclass AS object, relowner, relacl
        FROM pg_class c
        WHERE c.oid IN ('public.organizations'::regclass, 'public.profiles'::regclass,
                        'public.permission_roles'::regclass, 'public.organization_permission_templates'::regclass,
                        'public.organization_permissions'::regclass)
          AND relname NOT IN (SELECT name FROM hallpass.adopted_table)
    LOOP
        CALL hallpass.revoke_all(made.object, made.relowner, made.relacl);
    END LOOP;
END $$;

CALL hallpass.reset_privileges();
