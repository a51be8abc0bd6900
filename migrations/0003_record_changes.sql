-- What writes the log: statement triggers on the five tables that decisions are made of.

CREATE FUNCTION hallpass.try_uuid(value text) RETURNS uuid
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE WHEN value ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN value::uuid END;
END $$;

CREATE FUNCTION hallpass.try_inet(value text) RETURNS inet
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF value IS NULL OR value = '' THEN
        RETURN NULL;
    END IF;
    RETURN value::inet;
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END $$;

CREATE FUNCTION hallpass.try_jsonb(value text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF value IS NULL OR value = '' THEN
        RETURN NULL;
    END IF;
    RETURN value::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN   -- the second: nested deeper than the stack
    RETURN NULL;
END $$;

-- A transaction-local setting, NULL when unset: after the transaction that set it, a setting reads ''.
CREATE FUNCTION hallpass.setting(name text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN nullif(left(current_setting(name, true), 1024), '');
END $$;

-- Who makes the present change, as far as the session says. Every value is read on its own: a bad one is NULL and
-- the others survive. Whoever holds the connection can forge the settings, so role, login and address stand beside.
CREATE FUNCTION hallpass.actor(
    OUT changed_by uuid, OUT changed_by_profile_id uuid, OUT actor_source text,
    OUT ip_address inet, OUT user_agent text, OUT request_id text, OUT session_id text, OUT trace_id text,
    OUT database_role text, OUT database_login text, OUT client_address inet, OUT application_name text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    claims CONSTANT jsonb := hallpass.try_jsonb(current_setting('request.jwt.claims', true));
    headers CONSTANT jsonb := hallpass.try_jsonb(current_setting('request.headers', true));
BEGIN
    IF coalesce(hallpass.setting('app.current_user_id'), hallpass.setting('app.current_profile_id')) IS NOT NULL THEN
        actor_source := 'SETTINGS';
        changed_by := hallpass.try_uuid(hallpass.setting('app.current_user_id'));
        changed_by_profile_id := hallpass.try_uuid(hallpass.setting('app.current_profile_id'));
    ELSIF claims ->> 'sub' IS NOT NULL THEN
        actor_source := 'JWT';
        changed_by := hallpass.try_uuid(claims ->> 'sub');
    ELSE
        actor_source := 'NONE';
    END IF;
    ip_address := coalesce(hallpass.try_inet(hallpass.setting('app.current_ip')),
                           hallpass.try_inet(trim(split_part(headers ->> 'x-forwarded-for', ',', 1))));
    user_agent := coalesce(hallpass.setting('app.current_user_agent'), left(headers ->> 'user-agent', 1024));
    request_id := coalesce(hallpass.setting('app.current_request_id'), left(headers ->> 'x-request-id', 1024));
    session_id := coalesce(hallpass.setting('app.current_session_id'), left(claims ->> 'session_id', 1024));
    trace_id := hallpass.setting('app.current_trace_id');
    -- SET ROLE shows in the setting; inside a SECURITY DEFINER caller current_user is the definer.
    database_role := coalesce(nullif(current_setting('role'), 'none'), session_user);
    database_login := session_user;
    client_address := inet_client_addr();
    application_name := nullif(current_setting('application_name'), '');
END $$;

-- What a change is called: by its statement, or by what the transaction says that it is, where that fits the statement.
-- BULK_UPDATE: one of several that an administrator made in one go. RESET: back to the template's.
CREATE FUNCTION hallpass.change_kind(statement text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind CONSTANT text := hallpass.setting('app.current_change_kind');
BEGIN
    RETURN CASE WHEN kind = 'BULK_UPDATE' AND statement <> 'DELETE' OR kind = 'RESET' AND statement = 'DELETE'
                THEN kind ELSE statement END;
END $$;

-- Hands an entry on to be numbered. No organization: nothing changed. A NULL one, or more than 1,000: everything.
CREATE PROCEDURE hallpass.log_entry(entry bigint, orgs uuid[])
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF orgs IS NULL THEN
        RETURN;
    END IF;
    IF cardinality(orgs) > 1000 OR array_position(orgs, NULL) IS NOT NULL THEN
        orgs := ARRAY['00000000-0000-0000-0000-000000000000'::uuid];
    END IF;
    INSERT INTO hallpass.log_pending (entry_id, org_ids) VALUES (entry, orgs);
END $$;

-- Logs that everything may have changed, for a cause that has no rows to show.
CREATE PROCEDURE hallpass.log_everything(change text, changed_table text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    entry CONSTANT bigint := nextval('hallpass.entry_id');
BEGIN
    INSERT INTO public.permission_audit_log
        (entry_id, n, table_name, change_type,
         changed_by, changed_by_profile_id, actor_source, ip_address, user_agent, request_id, session_id, trace_id,
         database_role, database_login, client_address, application_name)
    SELECT entry, 1, changed_table, change, actor.* FROM hallpass.actor() actor;
    CALL hallpass.log_entry(entry, ARRAY[NULL::uuid]);
END $$;

CREATE FUNCTION hallpass.record_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CALL hallpass.log_everything('TRUNCATE', TG_TABLE_NAME);
    RETURN NULL;
END $$;

-- Puts the four recording triggers on a table, each with a function made for it.
--
-- identity: the columns that say which thing a row speaks of (a row with a NULL among them speaks of nothing);
-- a row whose identity changes is one thing gone and another come, a change for both sides.
-- content: the columns whose change matters. organization, permission, affected_user: the columns that hold them.
CREATE PROCEDURE hallpass.record_changes(
    target regclass, identity text[], content text[], organization text, permission text, affected_user text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $outer$
DECLARE
    table_name CONSTANT text := (SELECT relname FROM pg_class WHERE oid = target);
    same_thing CONSTANT text := (SELECT string_agg(format('before.%1$I = after.%1$I', c), ' AND ') FROM unnest(identity) c);
    known CONSTANT text := (SELECT string_agg(format('%I IS NOT NULL', c), ' AND ') FROM unnest(identity) c);
    -- The values of a side as a JSON object; NULL where the thing was not there.
    side CONSTANT text := 'CASE WHEN %1$s.' || quote_ident(identity[1]) || ' IS NOT NULL THEN jsonb_build_object('
        || (SELECT string_agg(format('%L, %%1$s.%I', c, c), ', ') FROM unnest(identity || content) c) || ') END';
    present text;
    event text;
BEGIN
    FOREACH event IN ARRAY ARRAY['INSERT', 'UPDATE', 'DELETE'] LOOP
        EXECUTE format($function$
CREATE OR REPLACE FUNCTION hallpass.%1$I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    entry CONSTANT bigint := nextval('hallpass.entry_id');
    orgs uuid[];
BEGIN
    WITH change AS (
        SELECT %2$s AS org_id,
               %3$s AS permission_key,
               %4$s AS affected_user_id,
               %5$s AS old_values,
               %6$s AS new_values
        FROM (SELECT * FROM %7$s WHERE %9$s) before
        FULL JOIN (SELECT * FROM %8$s WHERE %9$s) after
               ON %10$s
        WHERE before.%11$I IS NULL OR after.%11$I IS NULL
           OR (%12$s) IS DISTINCT FROM (%13$s)
    ), recorded AS (
        INSERT INTO public.permission_audit_log
            (entry_id, n, table_name, org_id, permission_key, affected_user_id, old_values, new_values, change_type,
             changed_by, changed_by_profile_id, actor_source, ip_address, user_agent, request_id, session_id, trace_id,
             database_role, database_login, client_address, application_name)
        SELECT entry, row_number() OVER (), %14$L, org_id, permission_key, affected_user_id, old_values, new_values,
               hallpass.change_kind(
                   CASE WHEN old_values IS NULL THEN 'INSERT' WHEN new_values IS NULL THEN 'DELETE' ELSE 'UPDATE' END),
               actor.*
        FROM change CROSS JOIN hallpass.actor() actor
        RETURNING org_id
    )
    SELECT array_agg(org_id) INTO orgs FROM (SELECT DISTINCT org_id FROM recorded LIMIT 1001) touched;
    CALL hallpass.log_entry(entry, orgs);
    RETURN NULL;
END $body$ $function$,
            format('record_%s_%s', table_name, lower(event)),
            coalesce('coalesce(after.' || quote_ident(organization) || ', before.' || quote_ident(organization) || ')', 'NULL::uuid'),
            coalesce('coalesce(after.' || quote_ident(permission) || ', before.' || quote_ident(permission) || ')', 'NULL::text'),
            coalesce('coalesce(after.' || quote_ident(affected_user) || ', before.' || quote_ident(affected_user) || ')', 'NULL::uuid'),
            format(side, 'before'), format(side, 'after'),
            CASE event WHEN 'INSERT' THEN '(SELECT * FROM new_rows WHERE false) none' ELSE 'old_rows' END,
            CASE event WHEN 'DELETE' THEN '(SELECT * FROM old_rows WHERE false) none' ELSE 'new_rows' END,
            known, same_thing, identity[1],
            (SELECT string_agg(format('before.%I', c), ', ') FROM unnest(content) c),
            (SELECT string_agg(format('after.%I', c), ', ') FROM unnest(content) c),
            table_name);
        EXECUTE format(
            'CREATE TRIGGER hallpass_record_%1$s AFTER %2$s ON %3$s REFERENCING %4$s '
            'FOR EACH STATEMENT EXECUTE FUNCTION hallpass.%5$I()',
            lower(event), event, target,
            CASE event WHEN 'INSERT' THEN 'NEW TABLE AS new_rows' WHEN 'DELETE' THEN 'OLD TABLE AS old_rows'
                       ELSE 'OLD TABLE AS old_rows NEW TABLE AS new_rows' END,
            format('record_%s_%s', table_name, lower(event)));
    END LOOP;
    EXECUTE format('CREATE TRIGGER hallpass_record_truncate AFTER TRUNCATE ON %s '
                   'FOR EACH STATEMENT EXECUTE FUNCTION hallpass.record_truncate()', target);
    -- ALWAYS: session_replication_role = replica must not switch the record off.
    FOREACH event IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER hallpass_record_%s', target, event);
    END LOOP;
END $outer$;

-- The log begins to record, and in the same transaction the application's own audit triggers stop and its audit log gives
-- up its name: no change is recorded twice, or not at all. Writers wait for what comes from here on; readers do not.
LOCK TABLE public.profiles, public.organization_permissions, public.organizations,
           public.organization_permission_templates, public.permission_roles IN SHARE ROW EXCLUSIVE MODE;

DO $$
DECLARE
    old record;
BEGIN
    FOR old IN
        SELECT tgrelid::regclass AS target, tgname, tgenabled
        FROM pg_trigger t JOIN pg_proc p ON p.oid = tgfoid
        WHERE tgrelid IN ('public.profiles'::regclass, 'public.organization_permissions'::regclass,
                          'public.organizations'::regclass, 'public.organization_permission_templates'::regclass,
                          'public.permission_roles'::regclass)
          AND NOT tgisinternal AND tgenabled <> 'D' AND prosrc ~* '\mpermission_audit_log\M'
    LOOP
        EXECUTE format('ALTER TABLE %s DISABLE TRIGGER %I', old.target, old.tgname);
        INSERT INTO hallpass.undo (statement) VALUES (format('ALTER TABLE %s ENABLE %s TRIGGER %I', old.target,
            CASE old.tgenabled WHEN 'A' THEN 'ALWAYS' WHEN 'R' THEN 'REPLICA' ELSE '' END, old.tgname));
    END LOOP;
    IF to_regclass('public.permission_audit_log') IS NOT NULL THEN
        SELECT relacl INTO old FROM pg_class WHERE oid = 'public.permission_audit_log'::regclass;
        CALL hallpass.keep_privileges('TABLE public.permission_audit_log', old.relacl);
        ALTER TABLE public.permission_audit_log RENAME TO permission_audit_log_before_hallpass;
        INSERT INTO hallpass.undo (statement)
        VALUES ('ALTER TABLE public.permission_audit_log_before_hallpass RENAME TO permission_audit_log');
    END IF;
    ALTER TABLE hallpass.permission_audit_log SET SCHEMA public;
    CALL hallpass.record_changes('public.profiles', ARRAY['org_id', hallpass.profiles_column('user_id', 'id')], '{role}',
                                 'org_id', NULL, hallpass.profiles_column('user_id', 'id'));
END $$;

CALL hallpass.record_changes('public.organization_permissions', '{org_id,permission_key}',
                             '{min_role_required,is_enabled,specific_users}', 'org_id', 'permission_key', NULL);
CALL hallpass.record_changes('public.organizations', '{id}', '{name}', 'id', NULL, NULL);
CALL hallpass.record_changes('public.organization_permission_templates', '{permission_key}',
                             '{module_name,permission_name,default_min_role}', NULL, 'permission_key', NULL);
CALL hallpass.record_changes('public.permission_roles', '{role_key}', '{rank}', NULL, NULL, NULL);

INSERT INTO hallpass.public_object VALUES ('permission_audit_log');
INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'SELECT', 'TABLE public.permission_audit_log'),
    ('hallpass_auditor', 'SELECT', 'TABLE public.permission_audit_log');

CALL hallpass.reset_privileges();
