-- Takes hallpass off the database and brings back what it replaced. The application's tables stay, with their rows; the
-- audit log stays as public.hallpass_audit_log, and a later `migrate` goes on with it.

-- Everything is dropped without CASCADE: whatever else came to depend on hallpass makes the whole fail and is named.
LOCK TABLE public.profiles, public.organization_permissions, public.organizations,
           public.organization_permission_templates, public.permission_roles IN ACCESS EXCLUSIVE MODE;

DO $$
DECLARE
    going record;
BEGIN
    FOR going IN
        SELECT tgrelid::regclass AS target, tgname FROM pg_trigger WHERE tgname LIKE 'hallpass\_record\_%'
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', going.tgname, going.target);
    END LOOP;
    FOR going IN
        SELECT p.oid::regprocedure AS signature FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
        WHERE nspname = 'public' AND proname IN (SELECT name FROM hallpass.public_object WHERE NOT keeps_grants)
    LOOP
        EXECUTE format('DROP FUNCTION %s', going.signature);
    END LOOP;
END $$;

DROP MATERIALIZED VIEW public.user_permission_matrix, public.org_permission_summary;
DROP VIEW public.effective_user_permissions;

DO $$
DECLARE
    partition regclass;
BEGIN
    ALTER TABLE public.permission_audit_log RENAME TO hallpass_audit_log;
    FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'public.hallpass_audit_log'::regclass LOOP
        EXECUTE format('ALTER TABLE %s SET SCHEMA public', partition);
    END LOOP;
END $$;

DO $$
DECLARE
    undone text;
BEGIN
    FOR undone IN SELECT statement FROM hallpass.undo ORDER BY n DESC LOOP
        EXECUTE undone;
    END LOOP;
END $$;

DROP SCHEMA IF EXISTS hallpass_replaced;

DO $$
DECLARE
    dependents CONSTANT text := (
        SELECT string_agg(DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid), ', ')
        FROM pg_depend d,
             LATERAL pg_identify_object(d.classid, d.objid, d.objsubid) AS dependent,
             LATERAL pg_identify_object(d.refclassid, d.refobjid, d.refobjsubid) AS used
        WHERE d.deptype = 'n' AND d.refclassid <> 'pg_namespace'::regclass AND used.schema = 'hallpass'
          AND dependent.schema IS DISTINCT FROM 'hallpass' AND dependent.identity !~ '(^| )(on|for) hallpass\.');
BEGIN
    IF dependents IS NOT NULL THEN
        RAISE EXCEPTION 'these depend on hallpass: %', dependents
            USING ERRCODE = 'dependent_objects_still_exist', HINT = 'Drop or change them, then try again.';
    END IF;
    DROP SCHEMA hallpass CASCADE;
END $$;
