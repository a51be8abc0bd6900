-- What `hallpass doctor` asks with the owner's eyes, so that the service's login can. All of it only reads.

-- What would make the log incomplete, and what mends it; triggers first.
CREATE FUNCTION hallpass.unrecorded() RETURNS TABLE (problem text, remedy text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT format('trigger %s on %s is %s: changes go unrecorded', expected.name, expected.target,
                  CASE WHEN t.oid IS NULL THEN 'missing' ELSE 'not ENABLE ALWAYS' END),
           CASE WHEN t.oid IS NULL THEN format(expected.made_by, expected.name, expected.target) || '; ' ELSE '' END
           || format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', expected.target, expected.name)
    FROM (SELECT 'hallpass_record_' || event AS name, target,
                 format('CREATE TRIGGER %%I AFTER %s ON %%s %sFOR EACH STATEMENT EXECUTE FUNCTION hallpass.%I()', upper(event),
                        CASE event WHEN 'insert' THEN 'REFERENCING NEW TABLE AS new_rows '
                                   WHEN 'delete' THEN 'REFERENCING OLD TABLE AS old_rows '
                                   WHEN 'update' THEN 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows '
                                   ELSE '' END,
                        CASE event WHEN 'truncate' THEN 'record_truncate'
                                   ELSE format('record_%s_%s', c.relname, event) END) AS made_by
          FROM unnest(hallpass.recorded_tables()) target JOIN pg_class c ON c.oid = target,
               unnest(ARRAY['insert', 'update', 'delete', 'truncate']) event
          UNION ALL
          SELECT 'number_entry', 'hallpass.log_pending'::regclass,
                 'CREATE CONSTRAINT TRIGGER %I AFTER INSERT ON %s DEFERRABLE INITIALLY DEFERRED '
                 'FOR EACH ROW EXECUTE FUNCTION hallpass.number_entry()'
          -- Without it no revocation of an API key is heard of.
          UNION ALL
          SELECT 'api_keys_changed', 'hallpass.api_keys'::regclass,
                 'CREATE TRIGGER %I AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s '
                 'FOR EACH STATEMENT EXECUTE FUNCTION hallpass.api_keys_changed()') expected
    LEFT JOIN pg_trigger t ON t.tgrelid = expected.target AND t.tgname = expected.name
    WHERE t.tgenabled IS DISTINCT FROM 'A'
    ORDER BY 1;

    -- An owner is bound by FORCE alone, and anybody else by every policy.
    RETURN QUERY
    SELECT format('row-level security on %s hides rows from %s', target, current_user),
           CASE WHEN pg_has_role(c.relowner, 'USAGE') THEN format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY', target)
                ELSE format('ALTER ROLE %I BYPASSRLS', current_user) END
    FROM unnest(hallpass.recorded_tables()) target JOIN pg_class c ON c.oid = target
    WHERE row_security_active(target);
END $$;

-- The next entry would get a number that is given already.
CREATE FUNCTION hallpass.is_sequence_behind() RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT last_value + is_called::integer FROM hallpass.log_seq) <= (SELECT max(seq) FROM hallpass.log), false);
END $$;

-- As it was, by the rules above.
CREATE OR REPLACE FUNCTION hallpass.inspect() RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    newest bigint;
    seen text;
BEGIN
    RETURN QUERY SELECT u.problem FROM hallpass.unrecorded() u;

    IF hallpass.is_sequence_behind() THEN
        PERFORM pg_advisory_xact_lock(1751215212, 2);
        newest := (SELECT max(seq) FROM hallpass.log);
        IF hallpass.is_sequence_behind() THEN
            PERFORM setval('hallpass.log_seq', newest);
            RAISE WARNING 'hallpass.log_seq was behind the log: set to %', newest;
        END IF;
    END IF;

    seen := hallpass.take_fingerprint();
    UPDATE hallpass.fingerprint SET value = seen WHERE value <> seen;
    IF FOUND THEN
        CALL hallpass.log_everything('UNRECORDED', '*');
        RAISE WARNING 'a recorded table or a trigger was altered: everything is taken as changed';
    END IF;
END $$;

-- A line of the doctor's. status: warning or failed.
CREATE TYPE hallpass.diagnosis AS (
    status text,
    problem text,
    remedy text
);

-- What the roles, and this login as the service, are meant to do and may not.
CREATE FUNCTION hallpass.missing_privileges(login name) RETURNS SETOF hallpass.diagnosis
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT 'failed', format('%s lacks %s on %s', rolname, privilege, object),
           format('GRANT %s ON %s TO %I', privilege, object, rolname)
    FROM (SELECT r.oid AS who, r.rolname, i.privilege, i.object
          FROM hallpass.intended_privilege i JOIN pg_roles r ON r.rolname = i.grantee
              OR r.rolname = login AND i.grantee = 'hallpass_service' AND login NOT IN ('hallpass_admin', 'hallpass_auditor')
         ) needed,
         LATERAL (SELECT split_part(object, ' ', 1) AS kind, substr(object, strpos(object, ' ') + 1) AS name) o
    -- By oid: a role that is not there is no error.
    WHERE NOT CASE kind WHEN 'SCHEMA' THEN has_schema_privilege(who, to_regnamespace(name), privilege)
                        WHEN 'TABLE' THEN has_table_privilege(who, to_regclass(name), privilege)
                        WHEN 'SEQUENCE' THEN has_sequence_privilege(who, to_regclass(name), privilege)
                        ELSE has_function_privilege(who, to_regprocedure(name), privilege) END
    ORDER BY rolname, object;
END $$;

-- Functions, tables and views of ours that are gone: those that somebody has a privilege on, and those in schema public.
CREATE FUNCTION hallpass.missing_objects() RETURNS SETOF hallpass.diagnosis
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT 'failed', format('%s is missing', object),
           'restore it: `hallpass migrate --dry-run` on an empty database prints how it is made, then CALL hallpass.reset_privileges()'
    FROM (SELECT i.object FROM hallpass.intended_privilege i
          UNION
          SELECT coalesce('ROUTINE public.' || f.signature, 'TABLE public.' || p.name)
          FROM hallpass.public_object p LEFT JOIN hallpass.public_function() f USING (name)) ours,
         LATERAL (SELECT split_part(object, ' ', 1) AS kind, substr(object, strpos(object, ' ') + 1) AS name) o
    WHERE CASE kind WHEN 'SCHEMA' THEN to_regnamespace(name) IS NULL
                    WHEN 'ROUTINE' THEN to_regprocedure(name) IS NULL
                    ELSE to_regclass(name) IS NULL END
    ORDER BY object;
END $$;

-- The audit log's partitions: without this month's, rows go to DEFAULT, and without DEFAULT, writers would fail.
CREATE FUNCTION hallpass.missing_partitions() RETURNS SETOF hallpass.diagnosis
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT CASE ahead WHEN 0 THEN 'failed' ELSE 'warning' END,
           format('the audit log has no partition for %s', to_char(month_at AT TIME ZONE 'UTC', 'YYYY-MM')),
           'CALL hallpass.make_audit_partitions(); and see that a service runs, which calls it every day'
    FROM generate_series(0, 2) ahead,
         LATERAL (SELECT (date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead))
                         AT TIME ZONE 'UTC' AS month_at) m
    WHERE NOT EXISTS (SELECT FROM hallpass.audit_partitions() p
                      WHERE NOT p.is_default AND p.begins_at <= month_at AND p.ends_at > month_at)
    ORDER BY ahead;

    RETURN QUERY
    SELECT 'failed', 'the audit log has no DEFAULT partition: a change of a month without a partition fails',
           'CREATE TABLE IF NOT EXISTS hallpass.permission_audit_log_default (LIKE public.permission_audit_log INCLUDING ALL '
           'EXCLUDING INDEXES); ALTER TABLE public.permission_audit_log ATTACH PARTITION hallpass.permission_audit_log_default DEFAULT'
    WHERE NOT EXISTS (SELECT FROM hallpass.audit_partitions() p WHERE p.is_default);
END $$;

-- What members and permissions are meant to have and decisions cannot use.
CREATE FUNCTION hallpass.idle_data() RETURNS SETOF hallpass.diagnosis
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT 'warning', 'the catalog is empty: there is no permission to check',
           'INSERT what can be permitted INTO public.organization_permission_templates'
    WHERE NOT EXISTS (SELECT FROM public.organization_permission_templates);

    -- A dozen are enough to see what went wrong.
    RETURN QUERY
    SELECT 'warning', format('%s %L is not on the role ladder: %s %s', what, role, count(*), effect),
           format('INSERT INTO public.permission_roles (role_key, rank) VALUES (%L, …), or correct it in %s', role, target)
    FROM (SELECT 'role' AS what, m.role, 'members satisfy no minimum role' AS effect, 'public.profiles' AS target
          FROM hallpass.members m
          UNION ALL
          SELECT 'minimum role', t.default_min_role::text, 'permissions are denied', 'public.organization_permission_templates'
          FROM public.organization_permission_templates t
          UNION ALL
          SELECT 'minimum role', o.min_role_required::text, 'overrides deny', 'public.organization_permissions'
          FROM public.organization_permissions o) used
    WHERE role IS NOT NULL AND NOT EXISTS (SELECT FROM public.permission_roles r WHERE r.role_key::text = used.role)
    GROUP BY what, role, effect, target ORDER BY count(*) DESC, target, role LIMIT 12;
END $$;

-- Findings of analyze_permission_performance() that ask for something to be done.
CREATE FUNCTION hallpass.diagnosed(found hallpass.finding) RETURNS hallpass.diagnosis
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- A matrix that is not believed costs time and nothing else: the tables answer.
    RETURN (CASE WHEN found.status = 'critical' AND found.metric_name <> 'matrix believed' THEN 'failed' ELSE 'warning' END,
            concat_ws(' ', found.metric_name || ':', found.metric_value, found.metric_unit) || coalesce(', ' || found.detail, ''),
            found.recommendation);
END $$;

-- What is wrong with this topic; no row: nothing is. What the login may not see is looked at with the owner's eyes.
CREATE FUNCTION hallpass.diagnose(topic text, login name) RETURNS SETOF hallpass.diagnosis
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CASE topic
    WHEN 'privileges' THEN
        RETURN QUERY SELECT * FROM hallpass.missing_privileges(login);
    WHEN 'objects' THEN
        RETURN QUERY SELECT * FROM hallpass.missing_objects();
    WHEN 'recording' THEN
        RETURN QUERY SELECT 'failed', u.problem, u.remedy FROM hallpass.unrecorded() u;
    WHEN 'sequence' THEN
        RETURN QUERY
        SELECT 'failed', 'hallpass.log_seq is behind the log: changes cannot be committed',
               format('SELECT setval(%L, (SELECT max(seq) FROM hallpass.log))', 'hallpass.log_seq')
        WHERE hallpass.is_sequence_behind();
    WHEN 'partitions' THEN
        RETURN QUERY SELECT * FROM hallpass.missing_partitions();
    WHEN 'matrix' THEN
        -- It was filled when it was made, by migration 4, and what was made then is all it knows.
        RETURN QUERY
        SELECT 'failed', format('public.%s was never refreshed since it was made', view_name),
               'SELECT public.refresh_permission_materialized_views(); and see why no service does it every --matrix-refresh-interval'
        FROM hallpass.matrix_stamp
        WHERE refreshed_at < (SELECT applied_at FROM hallpass.schema_migrations WHERE version = 5)
          AND seq < (SELECT max(l.seq) FROM hallpass.log l)
        ORDER BY view_name DESC;
        RETURN QUERY SELECT d.* FROM hallpass.findings_of_matrix() f, LATERAL hallpass.diagnosed(f) d
        WHERE f.status IN ('warning', 'critical');
    WHEN 'data' THEN
        RETURN QUERY SELECT * FROM hallpass.idle_data();
    WHEN 'performance' THEN
        RETURN QUERY
        SELECT d.* FROM (SELECT * FROM hallpass.findings_of_tables() UNION ALL SELECT * FROM hallpass.findings_of_indexes()
                         UNION ALL SELECT * FROM hallpass.findings_of_log()
                         UNION ALL SELECT * FROM hallpass.findings_of_statements()) f,
             LATERAL hallpass.diagnosed(f::hallpass.finding) d
        -- Months are the topic of partitions. An index that nobody has read yet does no harm.
        WHERE f.status IN ('warning', 'critical') AND f.metric_name <> 'audit log: months made'
          AND NOT (f.status = 'warning' AND f.metric_name LIKE 'index: %');
    END CASE;
END $$;

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.diagnose(text, name)');

CALL hallpass.reset_privileges();
