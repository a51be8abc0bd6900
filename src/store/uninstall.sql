-- Brings back what hallpass replaced, and stops its record. The application's tables stay, with their rows; the audit log
-- stays as public.hallpass_audit_log, and a later `migrate` goes on with it. However far `migrate` had come:
-- hallpass.public_object says which of the names in public are hallpass's by now.
--
-- Whatever a call may be in the middle of stays until remove.sql: functions take no locks on one another.
LOCK TABLE public.profiles, public.organization_permissions, public.organizations,
           public.organization_permission_templates, public.permission_roles IN ACCESS EXCLUSIVE MODE;

-- The definitions that come back may be of functions whose names are found by the application's search path.
SET LOCAL check_function_bodies = off;

DO $$
DECLARE
    going record;
BEGIN
    FOR going IN
        SELECT tgrelid::regclass AS target, tgname FROM pg_trigger WHERE tgname LIKE 'hallpass\_record\_%'
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', going.tgname, going.target);
    END LOOP;
    -- What gives its name back. With their arguments: the application may have made other functions of these names.
    FOR going IN
        SELECT o.name, 'FUNCTION' AS kind, signature FROM hallpass.public_object o
        JOIN hallpass.public_function() f ON f.name = o.name
        WHERE to_regprocedure('hallpass_replaced.' || signature) IS NOT NULL AND to_regprocedure('public.' || signature) IS NOT NULL
        UNION ALL
        SELECT name, CASE relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'VIEW' END, name
        FROM hallpass.public_object JOIN pg_class c ON c.oid = to_regclass('public.' || name)
        WHERE to_regclass('hallpass_replaced.' || name) IS NOT NULL
    LOOP
        EXECUTE format('ALTER %s public.%s SET SCHEMA hallpass', going.kind, going.signature);
        DELETE FROM hallpass.public_object WHERE name = going.name;
    END LOOP;
    DELETE FROM hallpass.public_object WHERE keeps_grants;
END $$;

DO $$
DECLARE
    partition regclass;
BEGIN
    IF EXISTS (SELECT FROM hallpass.public_object WHERE name = 'permission_audit_log') THEN
        ALTER TABLE public.permission_audit_log RENAME TO hallpass_audit_log;
        DELETE FROM hallpass.public_object WHERE name = 'permission_audit_log';
    ELSIF to_regclass('hallpass.permission_audit_log') IS NOT NULL THEN
        -- It had not begun to record; the rows in it are an earlier installation's.
        ALTER TABLE hallpass.permission_audit_log RENAME TO hallpass_audit_log;
        ALTER TABLE hallpass.hallpass_audit_log SET SCHEMA public;
    END IF;
    FOR partition IN
        SELECT inhrelid FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
        WHERE inhparent = to_regclass('public.hallpass_audit_log') AND relnamespace = 'hallpass'::regnamespace
    LOOP
        EXECUTE format('ALTER TABLE %s SET SCHEMA public', partition);
    END LOOP;
END $$;

DO $$
DECLARE
    undone text;
BEGIN
    FOR undone IN SELECT statement FROM hallpass.undo WHERE step = 'SWITCH' ORDER BY n DESC LOOP
        BEGIN
            EXECUTE undone;
        EXCEPTION WHEN undefined_table OR undefined_object OR undefined_function OR invalid_schema_name THEN
            -- What the application has dropped since, such as its old audit log, does not come back.
            IF undone NOT LIKE 'ALTER %' THEN
                RAISE;
            END IF;
        END;
    END LOOP;
END $$;

DROP SCHEMA IF EXISTS hallpass_replaced;

-- From here on hallpass is not on this database.
DROP TABLE hallpass.schema_migrations;
