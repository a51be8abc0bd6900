-- hallpass: runs the statements that this query selects, each by itself
-- The indexes of the application's tables that hallpass reads by, where nothing the application has serves as well. They
-- are built CONCURRENTLY: nobody waits for them. One that was left INVALID, or has another definition, is dropped first.
--
-- Consumers: the keys (they also keep rows apart that decisions take for one): hallpass.load, explain and
-- permission_holders, and the audit triggers' readers. profiles_user_org: hallpass.user_organizations and
-- only_organization, get_user_permissions_bulk; where a profile's id is the user its primary key serves.
WITH shape AS (
    SELECT CASE WHEN to_regclass('public.profiles') IS NULL
                  OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.profiles')
                             AND attname = 'user_id' AND NOT attisdropped) THEN 'user_id' ELSE 'id' END AS user_column
), wanted (name, target, columns, is_unique) AS (
    SELECT 'hallpass_members_key', 'profiles', ARRAY['org_id', user_column], true FROM shape
    UNION ALL SELECT 'hallpass_overrides_key', 'organization_permissions', ARRAY['org_id', 'permission_key'], true
    UNION ALL SELECT 'hallpass_catalog_key', 'organization_permission_templates', ARRAY['permission_key'], true
    UNION ALL SELECT 'hallpass_profiles_user_org', 'profiles', ARRAY['user_id', 'org_id'], false FROM shape
              WHERE user_column = 'user_id'
), existing AS (
    SELECT i.indexrelid, i.indrelid, c.relname AS name, i.indisvalid, i.indisunique,
           ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k (attnum, n)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                 WHERE k.n <= i.indnkeyatts ORDER BY k.n) AS columns
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam AND am.amname = 'btree'
    WHERE i.indpred IS NULL AND i.indexprs IS NULL
      AND c.relnamespace = 'public'::regnamespace
), missing AS (
    -- A table that is not there yet will be made with its keys.
    SELECT w.* FROM wanted w
    WHERE NOT (is_unique AND to_regclass('public.' || w.target) IS NULL) AND NOT EXISTS (
        SELECT FROM existing e
        WHERE e.indrelid = to_regclass('public.' || w.target) AND e.indisvalid AND e.indisunique >= w.is_unique
          AND CASE WHEN w.is_unique THEN e.columns = w.columns ELSE e.columns[:cardinality(w.columns)] = w.columns END)
)
SELECT statement FROM missing m, LATERAL (
    SELECT 1 AS step, format('DROP INDEX CONCURRENTLY public.%I', m.name) AS statement
    WHERE to_regclass('public.' || m.name) IS NOT NULL
    UNION ALL
    SELECT 2, format('CREATE %s INDEX CONCURRENTLY %I ON public.%I (%s)', CASE WHEN m.is_unique THEN 'UNIQUE' END,
                     m.name, m.target, array_to_string(m.columns, ', '))
) steps
ORDER BY m.target, m.name, step
