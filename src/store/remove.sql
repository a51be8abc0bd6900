-- What uninstall.sql has left: nobody is in the middle of it any more. Everything in public is dropped without CASCADE:
-- whatever came to depend on it a moment ago makes the whole fail.
DO $$
DECLARE
    going record;
BEGIN
    FOR going IN
        SELECT signature FROM hallpass.public_object JOIN hallpass.public_function() f USING (name)
    LOOP
        EXECUTE format('DROP FUNCTION public.%s', going.signature);
    END LOOP;
    -- Those that are read from after those that read them.
    FOR going IN
        SELECT CASE relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'VIEW' END AS kind, c.oid::regclass AS name
        FROM hallpass.public_object o JOIN pg_class c ON c.oid = to_regclass('public.' || o.name)
        WHERE relkind IN ('v', 'm') ORDER BY relkind = 'v'
    LOOP
        EXECUTE format('DROP %s %s', going.kind, going.name);
    END LOOP;
END $$;
