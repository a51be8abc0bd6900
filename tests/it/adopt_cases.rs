//! Databases that hallpass is not put on, each with what stands against it.

use crate::{
    database::Shape,
    pto::{Phase, Pto},
};

pub(crate) const EMPTY: Option<Pto> = None;
pub(crate) const PHASE_1: Pto = Pto::new(Shape::A, Phase::One);
pub(crate) const PHASE_2: Pto = Pto::new(Shape::A, Phase::Two);

pub(crate) struct Case {
    /// As which it begins.
    pub(crate) on: Option<Pto>,
    /// As its owner, unless it says RESET ROLE; `:name` stands for an id.
    pub(crate) done: &'static str,
    /// `$name` stands for an id, `$database` for the database.
    pub(crate) blockers: &'static [&'static str],
}

const fn empty(done: &'static str, blockers: &'static [&'static str]) -> Case {
    Case {
        on: EMPTY,
        done,
        blockers,
    }
}

const fn phase_1(done: &'static str, blockers: &'static [&'static str]) -> Case {
    Case {
        on: Some(PHASE_1),
        done,
        blockers,
    }
}

const fn phase_2(done: &'static str, blockers: &'static [&'static str]) -> Case {
    Case {
        on: Some(PHASE_2),
        done,
        blockers,
    }
}

pub(crate) const CASES: &[Case] = &[
    // Who migrates.
    phase_2(
        "RESET ROLE; DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || current_database() || ' OWNER TO hallpass'; END $$;
         REVOKE CREATE ON SCHEMA public FROM PUBLIC, pto_owner",
        &[
            "pto_owner may not create schemas in this database: GRANT CREATE ON DATABASE $database TO pto_owner",
            "pto_owner may not create objects in schema public: GRANT CREATE ON SCHEMA public TO pto_owner",
        ],
    ),
    phase_1(
        "RESET ROLE; ALTER TABLE organization_permissions OWNER TO hallpass",
        &[
            "public.organization_permissions belongs to hallpass, whose rights pto_owner has not: run this as hallpass",
        ],
    ),
    phase_2(
        "RESET ROLE; ALTER FUNCTION get_user_permissions_bulk(uuid, text) OWNER TO hallpass",
        &[
            "function public.get_user_permissions_bulk(uuid, text) belongs to hallpass: run this as hallpass",
        ],
    ),
    phase_2(
        "RESET ROLE; ALTER MATERIALIZED VIEW org_permission_summary OWNER TO hallpass",
        &[
            "view public.org_permission_summary belongs to hallpass, whose rights pto_owner has not",
        ],
    ),
    // Names that are taken.
    phase_1(
        "CREATE SCHEMA hallpass",
        &["schema hallpass is there already, and is not hallpass's"],
    ),
    phase_1(
        "CREATE SCHEMA hallpass; CREATE TABLE hallpass.undo ()",
        &["`hallpass migrate --uninstall` did not finish here: run it again first"],
    ),
    phase_1(
        "CREATE SCHEMA hallpass_replaced",
        &[
            "schema hallpass_replaced is there already: it is where hallpass puts what it replaces",
        ],
    ),
    phase_1(
        "CREATE TABLE effective_user_permissions ()",
        &["public.effective_user_permissions is no view, and hallpass needs the name"],
    ),
    phase_1(
        "CREATE VIEW permission_audit_log AS SELECT 1",
        &["public.permission_audit_log is no table, and hallpass needs the name"],
    ),
    phase_2(
        "CREATE TABLE permission_audit_log_before_hallpass ()",
        &[
            "public.permission_audit_log_before_hallpass is there already: the present audit log cannot be given that name",
        ],
    ),
    // Tables that are not what they must be.
    empty(
        "CREATE TABLE organizations (id uuid, name text) PARTITION BY HASH (id)",
        &[
            "public.organizations is a partitioned table: hallpass's triggers need an ordinary table",
        ],
    ),
    empty(
        "CREATE VIEW organizations AS SELECT NULL::uuid AS id, ''::text AS name",
        &["public.organizations is a view: hallpass's triggers need an ordinary table"],
    ),
    empty(
        "CREATE MATERIALIZED VIEW organizations AS SELECT NULL::uuid AS id, ''::text AS name",
        &[
            "public.organizations is a materialized view: hallpass's triggers need an ordinary table",
        ],
    ),
    empty(
        "RESET ROLE; CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
         CREATE FOREIGN TABLE profiles (id uuid, user_id uuid, org_id uuid, role text) SERVER nowhere;
         ALTER FOREIGN TABLE profiles OWNER TO pto_owner",
        &["public.profiles is a foreign table: hallpass's triggers need an ordinary table"],
    ),
    empty(
        "CREATE SEQUENCE permission_roles",
        &[
            "public.permission_roles is a relation of kind S: hallpass's triggers need an ordinary table",
            "public.permission_roles has no column role_key (text or character varying)",
            "public.permission_roles has no column rank (integer)",
        ],
    ),
    phase_1(
        "CREATE TABLE heirs () INHERITS (organization_permissions)",
        &[
            "public.organization_permissions inherits from another table, is a partition of one, or has heirs: its triggers would not see every row",
        ],
    ),
    phase_1(
        "CREATE TABLE ancestor (name text NOT NULL); ALTER TABLE organizations INHERIT ancestor",
        &[
            "public.organizations inherits from another table, is a partition of one, or has heirs: its triggers would not see every row",
        ],
    ),
    empty(
        "CREATE TABLE whole (id uuid, name text) PARTITION BY HASH (id);
         CREATE TABLE organizations PARTITION OF whole FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        &[
            "public.organizations inherits from another table, is a partition of one, or has heirs: its triggers would not see every row",
        ],
    ),
    empty(
        "CREATE TABLE organizations (id uuid)",
        &["public.organizations has no column name (text or character varying)"],
    ),
    phase_1(
        "ALTER TABLE organization_permissions ALTER specific_users TYPE text[]",
        &["public.organization_permissions.specific_users is text[], not uuid[]"],
    ),
    phase_1(
        "ALTER TABLE organization_permission_templates ALTER module_name TYPE char(50)",
        &[
            "public.organization_permission_templates.module_name is character(50), not text or character varying",
        ],
    ),
    phase_1(
        "ALTER TABLE organization_permissions ALTER updated_at DROP DEFAULT, ALTER updated_at TYPE date,
                                              ALTER min_role_required DROP NOT NULL,
                                              ALTER min_role_required TYPE text[] USING NULL",
        &[
            "public.organization_permissions.min_role_required is text[], not text or character varying or an enum",
            "public.organization_permissions.updated_at is date, not timestamp with time zone or timestamp without time zone",
        ],
    ),
    // Of a type that has no equality: its rows cannot be compared, and that hides nothing.
    empty(
        "CREATE TABLE profiles (id uuid, user_id uuid, org_id json, role text)",
        &["public.profiles.org_id is json, not uuid"],
    ),
    // Functions.
    phase_1(
        "CREATE FUNCTION user_has_org_permission(text) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        &[
            "function public.user_has_org_permission(text) has other arguments than hallpass's (uuid, character varying), and calls would still reach it: drop or rename it",
        ],
    ),
    phase_2(
        "CREATE FUNCTION cleanup_old_audit_logs(days integer, really boolean) RETURNS text LANGUAGE sql AS 'SELECT NULL'",
        &[
            "function public.cleanup_old_audit_logs(integer, boolean) has other arguments than hallpass's (integer), and calls would still reach it: drop or rename it",
        ],
    ),
    empty(
        "CREATE FUNCTION user_has_org_permission(a uuid, b varchar) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        &[
            "function public.user_has_org_permission(uuid, character varying) cannot be replaced in place: it must be a function (user_id_param, permission_key_param) that returns boolean",
        ],
    ),
    empty(
        "CREATE FUNCTION user_has_org_permission(user_id_param uuid, permission_key_param varchar)
         RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        &[
            "function public.user_has_org_permission(uuid, character varying) cannot be replaced in place: it must be a function (user_id_param, permission_key_param) that returns boolean",
        ],
    ),
    empty(
        "CREATE FUNCTION user_has_org_permission(user_id_param uuid, permission_key_param varchar)
         RETURNS SETOF boolean LANGUAGE sql AS 'SELECT true'",
        &[
            "function public.user_has_org_permission(uuid, character varying) cannot be replaced in place: it must be a function (user_id_param, permission_key_param) that returns boolean",
        ],
    ),
    empty(
        "CREATE FUNCTION user_has_org_permission(user_id_param uuid, permission_key_param varchar DEFAULT '')
         RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        &[
            "function public.user_has_org_permission(uuid, character varying) cannot be replaced in place: it must be a function (user_id_param, permission_key_param) that returns boolean",
        ],
    ),
    // A default that is added could not be taken away again.
    empty(
        "CREATE FUNCTION user_has_org_permission_enhanced(
             user_id_param uuid, permission_key_param text, use_cache boolean)
         RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        &[
            "function public.user_has_org_permission_enhanced(uuid, text, boolean) cannot be replaced in place: it must be a function (user_id_param, permission_key_param, use_cache DEFAULT true) that returns boolean",
        ],
    ),
    // What depends on what is set aside.
    phase_2(
        "CREATE VIEW latest AS SELECT user_id, org_id, matrix_generated_at FROM user_permission_matrix",
        &[
            "view public.latest depends on public.user_permission_matrix, which is replaced: drop it, and make it again afterwards",
        ],
    ),
    phase_2(
        "CREATE POLICY by_list ON events
         USING (EXISTS (SELECT FROM get_user_permissions_bulk(auth.uid()) WHERE has_permission))",
        &[
            "policy by_list on table public.events depends on public.get_user_permissions_bulk(uuid, text), which is replaced: drop it, and make it again afterwards",
        ],
    ),
    phase_2(
        "CREATE FUNCTION rows_of(uuid) RETURNS SETOF user_permission_matrix LANGUAGE sql AS
             'SELECT * FROM user_permission_matrix WHERE user_id = $1'",
        &[
            "function public.rows_of(uuid) depends on public.user_permission_matrix, which is replaced: drop it, and make it again afterwards",
        ],
    ),
    phase_2(
        "CREATE FUNCTION list_of(uuid) RETURNS user_permission_matrix[] LANGUAGE sql AS 'SELECT ARRAY[CAST(NULL AS user_permission_matrix)]'",
        &[
            "function public.list_of(uuid) depends on public.user_permission_matrix, which is replaced: drop it, and make it again afterwards",
        ],
    ),
    phase_2(
        "ALTER TABLE events ADD refreshed text DEFAULT refresh_permission_materialized_views()",
        &[
            "default value for column refreshed of table public.events depends on public.refresh_permission_materialized_views(), which is replaced: drop it, and make it again afterwards",
        ],
    ),
    // The audit log.
    phase_2(
        "CREATE TRIGGER audit_events AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION log_permission_changes()",
        &[
            "trigger audit_events on public.events writes to permission_audit_log, which changes its shape: drop or disable it",
        ],
    ),
    // Rows.
    phase_2(
        "INSERT INTO profiles (user_id, org_id, role) VALUES (:vic, :lincoln, 'admin')",
        &[
            "public.profiles: 1 values of (org_id, user_id) come more than once, such as ($lincoln, $vic)",
        ],
    ),
    phase_2(
        "ALTER TABLE organization_permissions DROP CONSTRAINT organization_permissions_org_id_permission_key_key;
         INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
         VALUES (:lincoln, 'can_send_emails', 'admin')",
        &[
            "public.organization_permissions: 1 values of (org_id, permission_key) come more than once, such as ($lincoln, can_send_emails)",
        ],
    ),
    phase_1(
        "INSERT INTO organization_permission_templates (module_name, permission_key, permission_name)
         VALUES ('events', 'can_view_events', 'See'), ('budget', 'can_view_budget', 'See')",
        &[
            "public.organization_permission_templates: 2 values of (permission_key) come more than once, such as (can_view_budget)",
        ],
    ),
    phase_2(
        "CREATE FUNCTION keep_record(org uuid, key text) RETURNS void LANGUAGE sql AS
             $$ INSERT INTO permission_audit_log (org_id, permission_key, change_type) VALUES (org, key, 'UPDATE') $$;
         CREATE FUNCTION record_setting() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM keep_record(NEW.org_id, NEW.permission_key); RETURN NULL; END $$;
         CREATE TRIGGER by_helper AFTER INSERT ON organization_permissions FOR EACH ROW EXECUTE FUNCTION record_setting()",
        &[
            "trigger by_helper on public.organization_permissions calls public.keep_record, which inserts into permission_audit_log: drop or disable it",
        ],
    ),
    // Names that others have, or have made before us.
    phase_1(
        "CREATE UNIQUE INDEX idx_profiles_user_org ON profiles (user_id, email)",
        &[
            "public.idx_profiles_user_org is a unique index of other columns, and hallpass needs the name: rename it",
        ],
    ),
    phase_1(
        "CREATE TABLE hallpass_audit_log (id integer)",
        &["public.hallpass_audit_log is none that `migrate --uninstall` has left: rename it"],
    ),
    phase_1(
        "RESET ROLE; CREATE TABLE public.permission_roles (role_key text PRIMARY KEY, rank integer NOT NULL);
         ALTER TABLE permission_roles OWNER TO service_role",
        &[
            "public.permission_roles belongs to service_role and public.profiles to pto_owner: one role must own them",
        ],
    ),
];
