-- What stands against putting hallpass on this database, and what will change when it is put there: (is_blocker, finding).
-- Reads the catalogs alone; works on a database without any of the tables.
WITH shape AS (
    SELECT CASE WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.profiles')
                             AND attname = 'user_id' AND NOT attisdropped) THEN 'user_id' ELSE 'id' END AS user_column
), tables AS (
    SELECT name, c.oid, c.relkind, c.relowner, format('public.%I', name) AS target
    FROM unnest(ARRAY['organizations', 'profiles', 'permission_roles', 'organization_permission_templates',
                      'organization_permissions']) name
    JOIN pg_class c ON c.oid = to_regclass(format('public.%I', name))
), needed_columns (name, attname, types) AS (
    SELECT v.name, v.attname, CASE v.kind
        WHEN 'id' THEN ARRAY['uuid']
        WHEN 'text' THEN ARRAY['text', 'character varying']
        WHEN 'role' THEN ARRAY['text', 'character varying', 'an enum']
        WHEN 'time' THEN ARRAY['timestamp with time zone', 'timestamp without time zone']
        ELSE ARRAY[v.kind] END
    FROM shape, LATERAL (VALUES
        ('organizations', 'id', 'id'), ('organizations', 'name', 'text'),
        ('profiles', 'id', 'id'), ('profiles', user_column, 'id'), ('profiles', 'org_id', 'id'), ('profiles', 'role', 'role'),
        ('permission_roles', 'role_key', 'text'), ('permission_roles', 'rank', 'integer'),
        ('organization_permission_templates', 'module_name', 'text'),
        ('organization_permission_templates', 'permission_key', 'text'),
        ('organization_permission_templates', 'permission_name', 'text'),
        ('organization_permission_templates', 'default_min_role', 'role'),
        ('organization_permissions', 'org_id', 'id'), ('organization_permissions', 'permission_key', 'text'),
        ('organization_permissions', 'min_role_required', 'role'),
        ('organization_permissions', 'specific_users', 'uuid[]'), ('organization_permissions', 'is_enabled', 'boolean'),
        ('organization_permissions', 'updated_at', 'time')
    ) v (name, attname, kind)
), ours (name, arguments, parameters, result) AS (
    -- parameters and result: of those that are replaced in place, which must have them; NULL: of those that are set aside.
    VALUES ('user_has_org_permission', 'uuid, character varying', '{user_id_param,permission_key_param}', 'boolean'),
           ('user_has_org_permission_enhanced', 'uuid, text, boolean',
            '{user_id_param,permission_key_param,use_cache}', 'boolean'),
           ('user_has_permission_in_org', 'uuid, uuid, text', NULL, NULL),
           ('get_user_permissions_bulk', 'uuid, text', NULL, NULL),
           ('set_session_variables', 'uuid, uuid, uuid, text, text, text', NULL, NULL),
           ('refresh_permission_materialized_views', '', NULL, NULL),
           ('cleanup_old_audit_logs', 'integer', NULL, NULL),
           ('analyze_permission_performance', '', NULL, NULL)
), functions AS (
    SELECT p.oid, p.proowner, p.proacl, ours.*, oidvectortypes(p.proargtypes) AS has_arguments,
           format('public.%s(%s)', p.proname, oidvectortypes(p.proargtypes)) AS target,
           ours.parameters IS NOT NULL AS stays_in_place,
           p.proargnames::text IS NOT DISTINCT FROM ours.parameters AND format_type(p.prorettype, NULL) = ours.result
               AND NOT p.proretset AND p.prokind = 'f'
               -- Exactly: a default can be added in place, but not taken away again when hallpass goes.
               AND p.pronargdefaults = (ours.name = 'user_has_org_permission_enhanced')::integer AS fits
    FROM ours JOIN pg_proc p ON p.proname = ours.name AND p.pronamespace = 'public'::regnamespace
), views AS (
    SELECT c.oid, c.reltype, c.relkind, c.relowner, c.relacl, format('public.%I', relname) AS target
    FROM pg_class c
    WHERE relnamespace = 'public'::regnamespace
      AND relname IN ('effective_user_permissions', 'user_permission_matrix', 'org_permission_summary')
), going AS (
    SELECT oid, proowner AS owner, coalesce(proacl, acldefault('f', proowner)) AS acl, target FROM functions WHERE NOT stays_in_place AND has_arguments = arguments
    UNION ALL
    SELECT oid, relowner, relacl, target FROM views WHERE relkind IN ('v', 'm')
), audit_log AS (
    SELECT c.oid, relkind FROM pg_class c WHERE c.oid = to_regclass('public.permission_audit_log')
), audit_writers AS (
    SELECT p.oid, format('%I.%I', nspname, proname) AS name, prorettype = 'trigger'::regtype AS is_trigger
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE prosrc ~* '\minsert\s+into\s+("?public"?\s*\.\s*)?"?permission_audit_log\M' AND nspname NOT IN ('pg_catalog', 'hallpass')
)
SELECT true, format('PostgreSQL %s is older than 14', current_setting('server_version'))
WHERE current_setting('server_version_num')::integer < 140000

UNION ALL
SELECT true, format('%s may not create schemas in this database: GRANT CREATE ON DATABASE %I TO %1$I',
                    current_user, current_database())
WHERE NOT has_database_privilege(current_database(), 'CREATE')
UNION ALL
SELECT true, format('%s may not create objects in schema public: GRANT CREATE ON SCHEMA public TO %1$I', current_user)
WHERE NOT has_schema_privilege('public', 'CREATE')
UNION ALL
SELECT true, CASE WHEN to_regclass('hallpass.undo') IS NULL THEN 'schema hallpass is there already, and is not hallpass''s'
                  ELSE '`hallpass migrate --uninstall` did not finish here: run it again first' END
WHERE to_regnamespace('hallpass') IS NOT NULL AND to_regclass('hallpass.schema_migrations') IS NULL
UNION ALL
SELECT true, 'schema hallpass_replaced is there already: it is where hallpass puts what it replaces'
WHERE to_regnamespace('hallpass_replaced') IS NOT NULL

UNION ALL
SELECT true, format('%s is a %s: hallpass''s triggers need an ordinary table', target,
                    CASE relkind WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view'
                                 WHEN 'f' THEN 'foreign table' ELSE 'relation of kind ' || relkind::text END)
FROM tables WHERE relkind <> 'r'
UNION ALL
SELECT true, format('%s inherits from another table, is a partition of one, or has heirs: its triggers would not see every row', target)
FROM tables WHERE EXISTS (SELECT FROM pg_inherits WHERE oid IN (inhrelid, inhparent)) AND relkind <> 'p'
UNION ALL
SELECT true, format('%s has no column %s (%s)', target, n.attname, array_to_string(n.types, ' or '))
FROM tables JOIN needed_columns n USING (name)
WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = tables.oid AND a.attname = n.attname AND NOT a.attisdropped)
UNION ALL
SELECT true, format('%s.%I is %s, not %s', target, a.attname, format_type(a.atttypid, a.atttypmod), array_to_string(n.types, ' or '))
FROM tables JOIN needed_columns n USING (name)
JOIN pg_attribute a ON a.attrelid = tables.oid AND a.attname = n.attname AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid
WHERE format_type(a.atttypid, NULL) <> ALL (n.types) AND NOT (t.typtype = 'e' AND 'an enum' = ANY (n.types))
UNION ALL
SELECT true, format('%s belongs to %I, whose rights %I has not: run this as %2$I', target, pg_get_userbyid(relowner), current_user)
FROM tables WHERE NOT pg_has_role(relowner, 'USAGE')
UNION ALL
SELECT true, format('%s belongs to %I and public.profiles to %I: one role must own them', t.target,
                    pg_get_userbyid(t.relowner), pg_get_userbyid(p.relowner))
FROM tables t JOIN tables p ON p.name = 'profiles' AND p.relowner <> t.relowner WHERE pg_has_role(t.relowner, 'USAGE')
UNION ALL
SELECT true, 'public.hallpass_audit_log is none that `migrate --uninstall` has left: rename it'
FROM pg_class c WHERE c.oid = to_regclass('public.hallpass_audit_log')
 AND (relkind <> 'p' OR NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = 'entry_id' AND NOT attisdropped)
      OR EXISTS (SELECT FROM tables WHERE tables.relowner <> c.relowner))
UNION ALL
SELECT true, format('public.%I is a unique index of other columns, and hallpass needs the name: rename it', c.relname)
FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
WHERE c.relnamespace = 'public'::regnamespace AND indisunique AND indisvalid
  AND c.relname IN ('idx_profiles_user_org', 'idx_profiles_org_role')
UNION ALL
SELECT true, format('row-level security on %s hides rows from %I, its owner: ALTER TABLE %1$s NO FORCE ROW LEVEL SECURITY', target, current_user)
FROM tables WHERE pg_has_role(relowner, 'USAGE') AND row_security_active(oid)

UNION ALL
SELECT true, format('function %s has other arguments than hallpass''s (%s), and calls would still reach it: drop or rename it',
                    target, arguments)
FROM functions WHERE has_arguments <> arguments
UNION ALL
SELECT true, format('function %s cannot be replaced in place: it must be a function (%s) that returns %s', target,
                    replace(btrim(parameters, '{}'), ',', ', ') || CASE WHEN parameters LIKE '%use_cache}' THEN ' DEFAULT true' ELSE '' END,
                    result)
FROM functions WHERE has_arguments = arguments AND stays_in_place AND NOT fits
UNION ALL
SELECT true, format('function %s belongs to %I: run this as %2$I', target, pg_get_userbyid(proowner))
FROM functions WHERE has_arguments = arguments AND pg_get_userbyid(proowner) <> current_user
UNION ALL
SELECT true, format('%s is no view, and hallpass needs the name', target) FROM views WHERE relkind NOT IN ('v', 'm')
UNION ALL
SELECT true, format('view %s belongs to %I, whose rights %I has not', target, pg_get_userbyid(relowner), current_user)
FROM views WHERE relkind IN ('v', 'm') AND NOT pg_has_role(relowner, 'USAGE')
UNION ALL
SELECT true, format('%s depends on %s, which is replaced: drop it, and make it again afterwards', dependent, g.target)
FROM (SELECT DISTINCT g.target, CASE WHEN rulename = '_RETURN' THEN pg_describe_object('pg_class'::regclass, ev_class, 0)
                                     ELSE pg_describe_object(d.classid, d.objid, 0) END AS dependent
      FROM going g
      JOIN pg_depend d ON d.deptype = 'n' AND d.refobjid IN (
          SELECT g.oid
          UNION SELECT t.oid FROM views v JOIN pg_type t ON v.reltype IN (t.oid, t.typelem) WHERE v.oid = g.oid)
      LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
      WHERE ev_class IS DISTINCT FROM g.oid
     ) g

UNION ALL
SELECT true, 'public.permission_audit_log is no table, and hallpass needs the name' FROM audit_log WHERE relkind NOT IN ('r', 'p')
UNION ALL
SELECT true, 'public.permission_audit_log_before_hallpass is there already: the present audit log cannot be given that name'
FROM audit_log WHERE to_regclass('public.permission_audit_log_before_hallpass') IS NOT NULL
UNION ALL
SELECT true, format('trigger %I on %s writes to permission_audit_log, which changes its shape: drop or disable it', tgname, tgrelid::regclass)
FROM pg_trigger t JOIN audit_writers w ON w.oid = t.tgfoid
WHERE tgenabled <> 'D' AND tgrelid NOT IN (SELECT oid FROM tables) AND EXISTS (SELECT FROM audit_log)

UNION ALL
SELECT true, format('trigger %I on %s calls %s, which inserts into permission_audit_log: drop or disable it', tgname,
                    tgrelid::regclass, w.name)
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
JOIN audit_writers w ON NOT w.is_trigger AND p.prosrc ~ ('\m' || split_part(w.name, '.', 2) || '\M')
WHERE tgenabled <> 'D' AND NOT tgisinternal AND EXISTS (SELECT FROM audit_log)

UNION ALL
SELECT false, 'anybody may create objects in schema public: REVOKE CREATE ON SCHEMA public FROM PUBLIC'
WHERE has_schema_privilege('public', 'public', 'CREATE')
UNION ALL
SELECT false, format('%s is the user of a membership', CASE user_column WHEN 'id' THEN 'profiles.id' ELSE 'profiles.user_id' END)
FROM shape WHERE to_regclass('public.profiles') IS NOT NULL
UNION ALL
SELECT false, format('function %s is replaced in place, with the privileges it has', target)
FROM functions WHERE has_arguments = arguments AND stays_in_place
UNION ALL
SELECT false, 'replaced, the old ones set aside in schema hallpass_replaced: ' || string_agg(target, ', ' ORDER BY target)
FROM going HAVING count(*) > 0
UNION ALL
SELECT false, format('row-level security binds %s, who may no longer use %s', grantees,
                     string_agg(target, ', ' ORDER BY target))
FROM (SELECT target, string_agg(DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(grantee)::text END, ', ') AS grantees
      FROM going, aclexplode(acl) LEFT JOIN pg_roles r ON r.oid = grantee
      WHERE grantee <> owner AND NOT coalesce(rolbypassrls, false) AND privilege_type IN ('SELECT', 'EXECUTE')
      GROUP BY target) lost
GROUP BY grantees
UNION ALL
SELECT false, 'public.permission_audit_log becomes public.permission_audit_log_before_hallpass' FROM audit_log
UNION ALL
SELECT false, format('trigger %I on %s is disabled: hallpass records instead', tgname, tgrelid::regclass)
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
WHERE tgenabled <> 'D' AND NOT tgisinternal AND tgrelid IN (SELECT oid FROM tables) AND prosrc ~* '\mpermission_audit_log\M'
UNION ALL
SELECT false, format('function %s inserts into permission_audit_log and will fail from now on', name)
FROM audit_writers WHERE NOT is_trigger AND EXISTS (SELECT FROM audit_log)
UNION ALL
SELECT false, 'the audit rows of an earlier installation, in public.hallpass_audit_log, go on in permission_audit_log'
WHERE to_regclass('public.hallpass_audit_log') IS NOT NULL
UNION ALL
SELECT false, 'district_permission_templates is not read: what a district locks, hallpass does not know'
WHERE to_regclass('public.district_permission_templates') IS NOT NULL
