-- What uninstall.sql has left: nobody is in the middle of it any more. It goes with schema hallpass.
DO $$
DECLARE
    going record;
BEGIN
    FOR going IN
        SELECT 'FUNCTION' AS kind, signature
        FROM hallpass.public_object JOIN hallpass.public_function() f USING (name)
        WHERE to_regprocedure('public.' || signature) IS NOT NULL
        UNION ALL
        SELECT CASE relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'VIEW' END, o.name
        FROM hallpass.public_object o JOIN pg_class c ON c.oid = to_regclass('public.' || o.name)
        WHERE relkind IN ('v', 'm')
    LOOP
        EXECUTE format('ALTER %s public.%s SET SCHEMA hallpass', going.kind, going.signature);
    END LOOP;
END $$;
