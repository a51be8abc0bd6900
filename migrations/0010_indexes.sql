-- hallpass: runs the statements that this query selects, each by itself
-- The indexes of the application's tables that hallpass reads by, where none of the application's own serves. They are
-- built CONCURRENTLY: nobody waits for them. What has the name but is INVALID, or has other columns, is dropped first.
--
-- The three keys also keep apart what decisions take for one. Consumers: warm start reads memberships in the order of
-- theirs (hallpass.next_members); every decision looks up an override and a template by theirs.
-- idx_profiles_user_org: hallpass.load, user_organizations, only_organization and get_user_permissions_bulk; where a
-- profile's id is the user, its primary key serves. idx_profiles_org_role: hallpass.permission_holders.
WITH shape AS (
    SELECT CASE WHEN to_regclass('public.profiles') IS NULL
                  OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.profiles')
                             AND attname = 'user_id' AND NOT attisdropped) THEN 'user_id' ELSE 'id' END AS user_column
), wanted (name, target, columns, is_unique) AS (
    SELECT 'hallpass_members_key', 'profiles', ARRAY['org_id', user_column], true FROM shape
    UNION ALL SELECT 'hallpass_overrides_key', 'organization_permissions', ARRAY['org_id', 'permission_key'], true
    UNION ALL SELECT 'hallpass_catalog_key', 'organization_permission_templates', ARRAY['permission_key'], true
    UNION ALL SELECT 'idx_profiles_user_org', 'profiles', ARRAY['user_id', 'org_id'], false FROM shape
              WHERE user_column = 'user_id'
    UNION ALL SELECT 'idx_profiles_org_role', 'profiles', ARRAY['org_id', 'role', user_column], false FROM shape
), existing AS (
    SELECT i.indrelid, i.indisvalid, i.indisunique,
           ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k (attnum, n)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                 WHERE k.n <= i.indnkeyatts ORDER BY k.n) AS columns
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
    WHERE am.amname = 'btree' AND i.indpred IS NULL AND i.indexprs IS NULL
), missing AS (
    -- A table that is not there yet will be made with its keys.
    SELECT w.*, to_regclass('public.' || w.name) AS in_the_way FROM wanted w
    WHERE NOT (is_unique AND to_regclass('public.' || w.target) IS NULL) AND NOT EXISTS (
        SELECT FROM existing e
        WHERE e.indrelid = to_regclass('public.' || w.target) AND e.indisvalid AND e.indisunique >= w.is_unique
          AND CASE WHEN w.is_unique THEN e.columns = w.columns ELSE e.columns[:cardinality(w.columns)] = w.columns END)
)
SELECT statement FROM missing m, LATERAL (
    SELECT 1 AS step, format('INSERT INTO hallpass.undo (statement) VALUES (%L)', pg_get_indexdef(in_the_way)) AS statement
    WHERE (SELECT indisvalid FROM pg_index WHERE indexrelid = in_the_way)
    UNION ALL
    SELECT 2, format('DROP INDEX CONCURRENTLY public.%I', name) WHERE in_the_way IS NOT NULL
    UNION ALL
    SELECT 3, format('INSERT INTO hallpass.undo (statement) VALUES (%L)', format('DROP INDEX IF EXISTS public.%I', name))
    UNION ALL
    SELECT 4, format('CREATE %s INDEX CONCURRENTLY %I ON public.%I (%s)', CASE WHEN is_unique THEN 'UNIQUE' END,
                     name, target, array_to_string(columns, ', '))
) steps
ORDER BY target, name, step
