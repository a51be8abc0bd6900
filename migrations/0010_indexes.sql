-- hallpass: runs the statements that this query selects, each by itself
-- The indexes of the application's tables that hallpass reads by, where none of the application's own serves. They are
-- built CONCURRENTLY: nobody waits for them. What has the name but is INVALID, or has other columns, is dropped first.
--
-- The three keys also keep apart what decisions take for one. Consumers: warm start reads memberships in the order of
-- theirs (hallpass.next_members); every decision looks up an override and a template by theirs.
-- idx_profiles_user_org: hallpass.load, explain, user_organizations, only_organization and get_user_permissions_bulk. It
-- holds the role, so that it costs less than reading an organization in idx_profiles_org_role, which holds all the same.
-- idx_profiles_org_role: hallpass.permission_holders.
WITH shape AS (
    SELECT CASE WHEN to_regclass('public.profiles') IS NULL
                  OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.profiles')
                             AND attname = 'user_id' AND NOT attisdropped) THEN 'user_id' ELSE 'id' END AS user_column
), wanted (name, target, columns, included, is_unique) AS (
    SELECT 'hallpass_members_key', 'profiles', ARRAY['org_id', user_column], '{}'::text[], true FROM shape
    UNION ALL SELECT 'hallpass_overrides_key', 'organization_permissions', ARRAY['org_id', 'permission_key'], '{}', true
    UNION ALL SELECT 'hallpass_catalog_key', 'organization_permission_templates', ARRAY['permission_key'], '{}', true
    UNION ALL SELECT 'idx_profiles_user_org', 'profiles', ARRAY[user_column, 'org_id'], '{role}', false FROM shape
    UNION ALL SELECT 'idx_profiles_org_role', 'profiles', ARRAY['org_id', 'role', user_column], '{}', false FROM shape
), existing AS (
    SELECT i.indrelid, i.indisvalid, i.indisunique, has.columns[:i.indnkeyatts] AS columns,
           has.columns[i.indnkeyatts + 1:] AS included
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam,
         LATERAL (SELECT array_agg(attname::text ORDER BY n) AS columns FROM unnest(i.indkey) WITH ORDINALITY k (attnum, n)
                  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) has
    WHERE am.amname = 'btree' AND i.indpred IS NULL AND i.indexprs IS NULL
), missing AS (
    -- A table that is not there yet will be made with its keys.
    SELECT w.*, to_regclass('public.' || w.name) AS in_the_way FROM wanted w
    WHERE NOT (is_unique AND to_regclass('public.' || w.target) IS NULL) AND NOT EXISTS (
        SELECT FROM existing e
        WHERE e.indrelid = to_regclass('public.' || w.target) AND e.indisvalid AND e.indisunique >= w.is_unique
          AND e.columns = w.columns AND e.included @> w.included)
)
SELECT statement FROM missing m, LATERAL (
    -- Both before anything is dropped: undone backwards, whatever has the name goes and what had it comes back.
    SELECT 1 AS step, undone FROM pg_index, LATERAL (
        SELECT regexp_replace(pg_get_indexdef(in_the_way), 'INDEX', 'INDEX CONCURRENTLY')) u (undone)
    WHERE indexrelid = in_the_way AND indisvalid
    UNION ALL
    SELECT 2, format('DROP INDEX CONCURRENTLY IF EXISTS public.%I', name)
    UNION ALL
    SELECT 3, format('DROP INDEX CONCURRENTLY public.%I', name) WHERE in_the_way IS NOT NULL
    UNION ALL
    SELECT 4, concat_ws(' ', 'CREATE', CASE WHEN is_unique THEN 'UNIQUE' END, 'INDEX CONCURRENTLY', name, 'ON',
                        format('public.%I (%s)', target, array_to_string(columns, ', ')),
                        'INCLUDE (' || nullif(array_to_string(included, ', '), '') || ')')
) steps (step, sql), LATERAL (
    -- An attempt that was cut short has said what it undoes.
    SELECT CASE WHEN step > 2 THEN sql ELSE format(
        'INSERT INTO hallpass.undo (statement, step) SELECT %1$L, %2$L WHERE NOT EXISTS (SELECT FROM hallpass.undo WHERE statement = %1$L)',
        sql, 'LAST') END AS statement) said
ORDER BY target, name, step
