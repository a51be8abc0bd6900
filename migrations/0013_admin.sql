-- What the admin API changes: a function a change, each in the place of the statement that an application would write. Only
-- change() and preview() are to be called, which take them as steps: a login that may call these may do nothing else.
--
-- Their errors are the caller's to read, by SQLSTATE: HPN01 no such organization, HPN02 no such permission, HPN03 no such
-- role, HPN04 no such member; HPC01 changed meanwhile; HPF01 not possible with the application's tables.
--
-- What a column takes may be an enum of the application's: a variable of the column's type is what a text is turned into.

-- What a change is called: by its statement, or by what the transaction says that it is, where that fits the statement.
-- BULK_UPDATE: one of several that were made in one go. RESET: back to the template's.
CREATE FUNCTION hallpass.change_kind(statement text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind CONSTANT text := hallpass.setting('app.current_change_kind');
BEGIN
    RETURN CASE WHEN kind = 'BULK_UPDATE' AND statement <> 'DELETE' OR kind = 'RESET' AND statement = 'DELETE'
                THEN kind ELSE statement END;
END $$;

-- Whatever records a change of rows, and what makes more of its kind, names the change in one expression.
DO $$
DECLARE
    by_statement CONSTANT text :=
        $named$CASE WHEN old_values IS NULL THEN 'INSERT' WHEN new_values IS NULL THEN 'DELETE' ELSE 'UPDATE' END$named$;
    recorder oid;
    replaced integer := 0;
BEGIN
    FOR recorder IN
        SELECT oid FROM pg_proc WHERE pronamespace = 'hallpass'::regnamespace AND strpos(prosrc, by_statement) > 0
    LOOP
        EXECUTE replace(pg_get_functiondef(recorder), by_statement, 'hallpass.change_kind(' || by_statement || ')');
        replaced := replaced + 1;
    END LOOP;
    -- Three a table, five tables, and their maker.
    IF replaced <> 16 THEN
        RAISE EXCEPTION '% functions record changes, not 16', replaced;
    END IF;
END $$;

CREATE FUNCTION hallpass.require_organization(asked uuid) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.organizations o WHERE o.id = asked) THEN
        RAISE EXCEPTION 'no organization has the id %', asked USING ERRCODE = 'HPN01';
    END IF;
END $$;

CREATE FUNCTION hallpass.require_role(asked text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.permission_roles r WHERE r.role_key::text = asked) THEN
        -- As JSON without its quotes: on one line, whatever was asked for.
        RAISE EXCEPTION 'the role ladder has no role `%`', substr(left(to_json(left(asked, 64))::text, -1), 2)
            USING ERRCODE = 'HPN03';
    END IF;
END $$;

-- Nobody may change the row between what the caller read and what it writes.
CREATE FUNCTION hallpass.require_unchanged(present timestamptz, expected timestamptz) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF expected IS NOT NULL AND present IS DISTINCT FROM expected THEN
        RAISE EXCEPTION 'last changed at %, not at %', coalesce(present::text, 'no time: it is not there'), expected
            USING ERRCODE = 'HPC01';
    END IF;
END $$;

-- When a permission was last changed as an organization's list shows it: its own setting, or else the template. Locks its own
-- setting, so that what is compared is what is there when the change is made.
CREATE FUNCTION hallpass.setting_updated_at(asked_org_id uuid, asked_key text) RETURNS timestamptz
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    template_updated_at timestamptz;
    own_updated_at timestamptz;
BEGIN
    SELECT t.updated_at INTO template_updated_at FROM public.organization_permission_templates t
    WHERE t.permission_key = asked_key;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the catalog has no permission `%`', asked_key USING ERRCODE = 'HPN02';
    END IF;
    SELECT o.updated_at INTO own_updated_at FROM public.organization_permissions o
    WHERE o.org_id = asked_org_id AND o.permission_key = asked_key FOR UPDATE;
    RETURN CASE WHEN FOUND THEN own_updated_at ELSE template_updated_at END;
END $$;

-- The minimum role of a setting: the asked one, NULL for the template's. Where the application's column takes no NULL it is a copy
-- of the template's, which does not follow it.
CREATE FUNCTION hallpass.own_min_role(asked_key text, min_role text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF min_role IS NULL AND EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = 'public.organization_permissions'::regclass
                                   AND attname = 'min_role_required' AND attnotnull) THEN
        SELECT t.default_min_role::text INTO min_role FROM public.organization_permission_templates t
        WHERE t.permission_key = asked_key;
    END IF;
    RETURN min_role;
END $$;

-- Puts an organization's setting.
CREATE FUNCTION hallpass.set_override(
    asked_org_id uuid, asked_key text, min_role text, enabled boolean, users uuid[], expected timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    present timestamptz;
    role public.organization_permissions.min_role_required%TYPE;
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    IF min_role IS NOT NULL THEN
        PERFORM hallpass.require_role(min_role);
    END IF;
    role := hallpass.own_min_role(asked_key, min_role);
    present := hallpass.setting_updated_at(asked_org_id, asked_key);
    PERFORM hallpass.require_unchanged(present, expected);
    INSERT INTO public.organization_permissions AS o (org_id, permission_key, min_role_required, is_enabled, specific_users)
    VALUES (asked_org_id, asked_key, role, enabled, users)
    ON CONFLICT (org_id, permission_key) DO UPDATE
    SET min_role_required = EXCLUDED.min_role_required, is_enabled = EXCLUDED.is_enabled,
        specific_users = EXCLUDED.specific_users, updated_at = clock_timestamp()
    -- One that was not there a moment ago could not be locked.
    WHERE expected IS NULL OR o.updated_at = expected;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the setting has come meanwhile' USING ERRCODE = 'HPC01';
    END IF;
END $$;

-- Removes an organization's setting, if there is one.
CREATE FUNCTION hallpass.reset_override(asked_org_id uuid, asked_key text, expected timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    PERFORM hallpass.require_unchanged(hallpass.setting_updated_at(asked_org_id, asked_key), expected);
    DELETE FROM public.organization_permissions o WHERE o.org_id = asked_org_id AND o.permission_key = asked_key;
END $$;

-- Adds a user to those who have a permission by name. Each change of the setting is logged with all of them.
CREATE FUNCTION hallpass.grant_user(asked_org_id uuid, asked_user_id uuid, asked_key text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    users_max CONSTANT integer := 10000;
    named integer;
    role CONSTANT public.organization_permissions.min_role_required%TYPE := hallpass.own_min_role(asked_key, NULL);
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    IF NOT EXISTS (SELECT FROM public.organization_permission_templates t WHERE t.permission_key = asked_key) THEN
        RAISE EXCEPTION 'the catalog has no permission `%`', asked_key USING ERRCODE = 'HPN02';
    END IF;
    IF NOT EXISTS (SELECT FROM hallpass.members m WHERE m.org_id = asked_org_id AND m.user_id = asked_user_id) THEN
        RAISE EXCEPTION 'the user is no member of the organization' USING ERRCODE = 'HPN04';
    END IF;
    INSERT INTO public.organization_permissions AS o (org_id, permission_key, min_role_required, is_enabled, specific_users)
    VALUES (asked_org_id, asked_key, role, true, ARRAY[asked_user_id])
    ON CONFLICT (org_id, permission_key) DO UPDATE
    SET specific_users = array_append(o.specific_users, asked_user_id), updated_at = clock_timestamp()
    WHERE NOT coalesce(asked_user_id = ANY (o.specific_users), false)
    RETURNING cardinality(o.specific_users) INTO named;
    IF named > users_max THEN
        RAISE EXCEPTION 'the setting names % users already', users_max USING ERRCODE = 'HPF01';
    END IF;
END $$;

-- Takes a user from those who have a permission by name, if it is among them.
CREATE FUNCTION hallpass.revoke_user(asked_org_id uuid, asked_user_id uuid, asked_key text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    UPDATE public.organization_permissions o
    SET specific_users = array_remove(o.specific_users, asked_user_id), updated_at = clock_timestamp()
    WHERE o.org_id = asked_org_id AND o.permission_key = asked_key AND asked_user_id = ANY (o.specific_users);
END $$;

-- The two shapes of profiles: a membership is a row of its own, or the one row of its user.
DO $outer$
DECLARE
    user_column CONSTANT text := hallpass.profiles_column('user_id', 'id');
    put CONSTANT text := CASE user_column WHEN 'user_id' THEN '
    UPDATE public.profiles p SET role = new_role WHERE p.org_id = asked_org_id AND p.user_id = asked_user_id;
    IF NOT FOUND THEN
        -- One that was left behind when its membership ended.
        UPDATE public.profiles p SET org_id = asked_org_id, role = new_role
        WHERE p.id = (SELECT q.id FROM public.profiles q WHERE q.user_id = asked_user_id AND q.org_id IS NULL
                      ORDER BY q.id LIMIT 1 FOR UPDATE);
    END IF;
    IF NOT FOUND THEN
        INSERT INTO public.profiles (org_id, user_id, role) VALUES (asked_org_id, asked_user_id, new_role);
    END IF;' ELSE '
    SELECT p.org_id INTO member_of FROM public.profiles p WHERE p.id = asked_user_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION ''the application has no profile of this user'' USING ERRCODE = ''HPN04'';
    ELSIF member_of <> asked_org_id THEN
        RAISE EXCEPTION ''the user is a member of another organization, and may be of one alone'' USING ERRCODE = ''HPF01'';
    END IF;
    UPDATE public.profiles p SET org_id = asked_org_id, role = new_role WHERE p.id = asked_user_id;' END;
BEGIN
    EXECUTE format($function$
CREATE FUNCTION hallpass.put_member(asked_org_id uuid, asked_user_id uuid, asked_role text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    member_of uuid;
    new_role public.profiles.role%%TYPE;
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    PERFORM hallpass.require_role(asked_role);
    new_role := asked_role;%1$s
EXCEPTION WHEN not_null_violation OR foreign_key_violation OR invalid_text_representation THEN
    RAISE EXCEPTION 'the application''s table of profiles does not take this member' USING ERRCODE = 'HPF01';
END $body$ $function$, put);

    -- A row that is the application's stays, without its organization; one that hallpass's own table has says nothing more.
    EXECUTE format($function$
CREATE FUNCTION hallpass.remove_member(asked_org_id uuid, asked_user_id uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    %1$s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the user is no member of the organization' USING ERRCODE = 'HPN04';
    END IF;
EXCEPTION WHEN not_null_violation THEN
    RAISE EXCEPTION 'the application''s table of profiles has no row without an organization' USING ERRCODE = 'HPF01';
END $body$ $function$,
        CASE WHEN EXISTS (SELECT FROM hallpass.adopted_table WHERE name = 'profiles')
             THEN 'UPDATE public.profiles p SET org_id = NULL'
             ELSE 'DELETE FROM public.profiles p' END
        || format(' WHERE p.org_id = asked_org_id AND p.%I = asked_user_id', user_column));
END $outer$;

CREATE FUNCTION hallpass.put_template(
    asked_key text, name text, description text, module text, min_role text, expected timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    present timestamptz;
    role public.organization_permission_templates.default_min_role%TYPE;
    new_module public.organization_permission_templates.module_name%TYPE;
BEGIN
    PERFORM hallpass.require_role(min_role);
    role := min_role;
    new_module := module;
    SELECT t.updated_at INTO present FROM public.organization_permission_templates t
    WHERE t.permission_key = asked_key FOR UPDATE;
    PERFORM hallpass.require_unchanged(present, expected);
    INSERT INTO public.organization_permission_templates
        (permission_key, permission_name, permission_description, module_name, default_min_role)
    VALUES (asked_key, name, description, new_module, role)
    ON CONFLICT (permission_key) DO UPDATE
    SET permission_name = EXCLUDED.permission_name, permission_description = EXCLUDED.permission_description,
        module_name = EXCLUDED.module_name, default_min_role = EXCLUDED.default_min_role, updated_at = clock_timestamp();
END $$;

CREATE FUNCTION hallpass.delete_template(asked_key text, expected timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    present timestamptz;
BEGIN
    SELECT t.updated_at INTO present FROM public.organization_permission_templates t
    WHERE t.permission_key = asked_key FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the catalog has no permission `%`', asked_key USING ERRCODE = 'HPN02';
    END IF;
    PERFORM hallpass.require_unchanged(present, expected);
    DELETE FROM public.organization_permission_templates t WHERE t.permission_key = asked_key;
END $$;

-- One change. What it asks is checked here as far as it is a matter of form: the caller's API has named each field.
CREATE FUNCTION hallpass.take_step(step jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    org CONSTANT uuid := step ->> 'org_id';
    who CONSTANT uuid := step ->> 'user_id';
    key CONSTANT text := step ->> 'permission_key';
    -- In microseconds since 1970.
    expected CONSTANT timestamptz :=
        timestamptz '1970-01-01 00:00:00+00' + (step ->> 'expected_updated_at')::bigint * interval '1 microsecond';
BEGIN
    CASE step ->> 'change'
        WHEN 'set_override' THEN
            PERFORM hallpass.set_override(
                org, key, step ->> 'min_role', (step ->> 'enabled')::boolean,
                ARRAY(SELECT named::uuid FROM jsonb_array_elements_text(step -> 'specific_users') WITH ORDINALITY listed (named, n)
                      ORDER BY n), expected);
        WHEN 'reset_override' THEN PERFORM hallpass.reset_override(org, key, expected);
        WHEN 'grant_user' THEN PERFORM hallpass.grant_user(org, who, key);
        WHEN 'revoke_user' THEN PERFORM hallpass.revoke_user(org, who, key);
        WHEN 'put_member' THEN PERFORM hallpass.put_member(org, who, step ->> 'role');
        WHEN 'remove_member' THEN PERFORM hallpass.remove_member(org, who);
        WHEN 'put_template' THEN
            PERFORM hallpass.put_template(key, step ->> 'name', step ->> 'description', step ->> 'module', step ->> 'min_role',
                                          expected);
        WHEN 'delete_template' THEN PERFORM hallpass.delete_template(key, expected);
    END CASE;
END $$;

-- Takes the steps in their order, on behalf of an actor, whose name ends with the transaction. kind: what the audit entries
-- call the change, where it is more than the statement shows (see hallpass.change_kind).
CREATE FUNCTION hallpass.change(steps jsonb, actor jsonb, kind text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    step jsonb;
BEGIN
    PERFORM public.set_session_variables(
        (actor ->> 'user_id')::uuid, (actor ->> 'profile_id')::uuid, NULL, actor ->> 'request_id', actor ->> 'ip_address',
        actor ->> 'user_agent');
    PERFORM set_config('app.current_session_id', coalesce(actor ->> 'session_id', ''), true),
            set_config('app.current_trace_id', coalesce(actor ->> 'trace_id', ''), true),
            set_config('app.current_change_kind', coalesce(kind, ''), true);
    IF actor ->> 'caller' IS NOT NULL THEN
        PERFORM set_config('application_name', actor ->> 'caller', true);
    END IF;
    FOR step IN SELECT * FROM jsonb_array_elements(steps) LOOP
        PERFORM hallpass.take_step(step);
    END LOOP;
END $$;

CREATE TYPE hallpass.holders AS (org_id uuid, permission_key text, user_ids uuid[]);

-- Who holds what, among all that these steps can change. By user it would be a row for each permission of each.
CREATE FUNCTION hallpass.holders_of(steps jsonb) RETURNS hallpass.holders[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    orgs CONSTANT uuid[] := ARRAY(SELECT DISTINCT (step ->> 'org_id')::uuid FROM jsonb_array_elements(steps) step
                                  WHERE step ? 'org_id');
    users CONSTANT uuid[] := ARRAY(SELECT DISTINCT (step ->> 'user_id')::uuid FROM jsonb_array_elements(steps) step
                                   WHERE step ? 'user_id');
    keys CONSTANT text[] := ARRAY(SELECT DISTINCT step ->> 'permission_key' FROM jsonb_array_elements(steps) step
                                  WHERE step ? 'permission_key');
    holders hallpass.holders[];
BEGIN
    -- Planned for what is asked: one organization is a few rows of many.
    EXECUTE 'SELECT array_agg((h.org_id, h.permission_key, h.user_ids)::hallpass.holders) FROM (
             SELECT e.org_id, e.permission_key, array_agg(e.user_id) AS user_ids
             FROM public.effective_user_permissions e WHERE e.user_has_permission'
        || CASE WHEN orgs <> '{}' THEN ' AND e.org_id = ANY ($1)' ELSE '' END
        || CASE WHEN users <> '{}' THEN ' AND e.user_id = ANY ($2)' ELSE '' END
        || CASE WHEN keys <> '{}' THEN ' AND e.permission_key = ANY ($3)' ELSE '' END
        || ' GROUP BY e.org_id, e.permission_key) h'
    INTO holders USING orgs, users, keys;
    RETURN coalesce(holders, '{}');
END $$;

-- How many would gain and lose which permission by these steps: the first effects_max of all the effects, by organization and
-- permission, and of the first named_max of these the first users_max users each way. Nothing of it stays: what the steps do
-- is taken back before this returns. To be called at REPEATABLE READ, so that nobody else's change is counted.
CREATE FUNCTION hallpass.preview(steps jsonb, effects_max integer, named_max integer, users_max integer)
RETURNS TABLE (org_id uuid, permission_key text, gained bigint, lost bigint, gaining uuid[], losing uuid[], effects bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    before CONSTANT hallpass.holders[] := hallpass.holders_of(steps);
    after hallpass.holders[];
BEGIN
    BEGIN
        PERFORM hallpass.change(steps, '{}', NULL);
        after := hallpass.holders_of(steps);
        RAISE EXCEPTION USING ERRCODE = 'HPV01';
    EXCEPTION WHEN SQLSTATE 'HPV01' THEN
        NULL;
    END;
    RETURN QUERY
    SELECT difference.org_id, difference.permission_key,
           cardinality(difference.gains)::bigint, cardinality(difference.loses)::bigint,
           difference.gains[:CASE WHEN row_number() OVER listed <= named_max THEN users_max ELSE 0 END],
           difference.loses[:CASE WHEN row_number() OVER listed <= named_max THEN users_max ELSE 0 END],
           count(*) OVER ()
    FROM (
        SELECT coalesce(now.org_id, was.org_id) AS org_id, coalesce(now.permission_key, was.permission_key) AS permission_key,
               ARRAY(SELECT unnest(now.user_ids) EXCEPT SELECT unnest(was.user_ids) ORDER BY 1) AS gains,
               ARRAY(SELECT unnest(was.user_ids) EXCEPT SELECT unnest(now.user_ids) ORDER BY 1) AS loses
        FROM unnest(before) was
        FULL JOIN unnest(after) now ON now.org_id = was.org_id AND now.permission_key = was.permission_key
        WHERE now.user_ids IS DISTINCT FROM was.user_ids
        OFFSET 0    -- so that each difference is made once
    ) difference
    WHERE difference.gains <> '{}' OR difference.loses <> '{}'
    WINDOW listed AS (ORDER BY difference.org_id, difference.permission_key)
    ORDER BY difference.org_id, difference.permission_key
    LIMIT effects_max;
END $$;

-- The catalog as it stands for an organization, and the head of that snapshot; one row of NULLs where there is none.
CREATE FUNCTION hallpass.organization_settings(asked_org_id uuid)
RETURNS TABLE (head_seq bigint, head_uid integer, in_recovery boolean, permission_key text, permission_name text,
               description text, module text, default_min_role text, effective_min_role text, enabled boolean,
               specific_users uuid[], has_own_setting boolean, updated_at timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM hallpass.require_organization(asked_org_id);
    CALL hallpass.lock_against_truncate();
    RETURN QUERY
    SELECT h.seq, h.uid, pg_is_in_recovery(), t.permission_key::text, t.permission_name::text, t.permission_description::text,
           t.module_name::text, t.default_min_role::text, coalesce(o.min_role_required, t.default_min_role)::text,
           coalesce(o.is_enabled, true), coalesce(o.specific_users, '{}'), o.org_id IS NOT NULL,
           CASE WHEN o.org_id IS NULL THEN t.updated_at ELSE o.updated_at END
    FROM (VALUES (1)) one
    LEFT JOIN LATERAL (SELECT l.seq, l.uid FROM hallpass.log l ORDER BY l.seq DESC LIMIT 1) h ON true
    LEFT JOIN public.organization_permission_templates t ON true
    LEFT JOIN public.organization_permissions o ON o.org_id = asked_org_id AND o.permission_key = t.permission_key
    ORDER BY t.permission_key;
END $$;

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_admin', 'USAGE', 'SCHEMA hallpass'),
    ('hallpass_admin', 'EXECUTE', 'ROUTINE hallpass.change(jsonb, jsonb, text)'),
    ('hallpass_admin', 'EXECUTE', 'ROUTINE hallpass.preview(jsonb, integer, integer, integer)'),
    ('hallpass_admin', 'EXECUTE', 'ROUTINE hallpass.head()'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.organization_settings(uuid)');

CALL hallpass.reset_privileges();
