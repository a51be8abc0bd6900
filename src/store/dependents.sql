-- What would go, or stand in the way, if hallpass's objects went: a line each. What is hallpass's own does not count, nor
-- what uses the audit log, which stays.
WITH own AS (
    SELECT c.oid, c.reltype FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname = 'hallpass'
       OR nspname = 'public' AND relkind IN ('v', 'm') AND relname IN (SELECT name FROM hallpass.public_object)
    UNION ALL
    -- The keys that adoption built: a foreign key may have come to use one.
    SELECT oid, 0 FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'i'
       AND EXISTS (SELECT FROM hallpass.undo u WHERE u.statement LIKE 'DROP INDEX %.' || quote_ident(relname))
    UNION ALL
    SELECT oid, 0 FROM pg_proc WHERE pronamespace = to_regnamespace('hallpass')
    UNION ALL
    SELECT to_regprocedure('public.' || signature), 0
    FROM hallpass.public_object JOIN hallpass.public_function() f USING (name) WHERE NOT keeps_grants
), used AS (
    SELECT oid FROM own WHERE oid IS NOT NULL
    UNION SELECT t.oid FROM pg_type t JOIN own ON own.reltype <> 0 AND own.reltype IN (t.oid, t.typelem)
)
SELECT DISTINCT CASE WHEN rulename = '_RETURN' THEN pg_describe_object('pg_class'::regclass, ev_class, 0)
                     ELSE pg_describe_object(d.classid, d.objid, 0) END
       || ' depends on ' || pg_describe_object(d.refclassid, d.refobjid, 0)
FROM pg_depend d
LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
LEFT JOIN pg_trigger t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
LEFT JOIN pg_constraint c ON d.classid = 'pg_constraint'::regclass AND c.oid = d.objid
LEFT JOIN pg_attrdef a ON d.classid = 'pg_attrdef'::regclass AND a.oid = d.objid
WHERE d.refobjid IN (SELECT oid FROM used) AND d.deptype = 'n'
  AND coalesce(ev_class, tgrelid, nullif(conrelid, 0), adrelid, d.objid) NOT IN (SELECT oid FROM used)
  AND coalesce(tgname, '') NOT LIKE 'hallpass\_record\_%'
ORDER BY 1
