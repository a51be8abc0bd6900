-- How the service learns that a change may have gone past the triggers.

-- What the last inspection saw of the recorded tables and their triggers.
CREATE TABLE hallpass.fingerprint (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    value text NOT NULL
);

-- The five tables that decisions are made of.
CREATE FUNCTION hallpass.recorded_tables() RETURNS regclass[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN ARRAY['public.profiles', 'public.organization_permissions', 'public.organizations',
                 'public.organization_permission_templates', 'public.permission_roles'];
END $$;

-- Changes when a table is rewritten or altered, an enum of its columns gains a label, or a trigger of ours is
-- touched: disabling and enabling one writes its pg_trigger row anew, hence xmin.
CREATE FUNCTION hallpass.take_fingerprint() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (SELECT md5(string_agg(fact, E'\n' ORDER BY fact)) FROM (
        SELECT format('table %s %s', oid, relfilenode) AS fact
        FROM pg_class WHERE oid = ANY (hallpass.recorded_tables())
        UNION ALL
        SELECT format('column %s %s %s %s %s', attrelid, attnum, attname, atttypid, atttypmod)
        FROM pg_attribute WHERE attrelid = ANY (hallpass.recorded_tables()) AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT format('label %s %s %s', enumtypid, enumsortorder, enumlabel)
        FROM pg_enum WHERE enumtypid IN (SELECT atttypid FROM pg_attribute
                                         WHERE attrelid = ANY (hallpass.recorded_tables()))
        UNION ALL
        SELECT format('trigger %s %s %s %s', tgrelid, tgname, tgenabled, xmin)
        FROM pg_trigger WHERE tgname LIKE 'hallpass\_record\_%' AND tgrelid = ANY (hallpass.recorded_tables())
           OR tgrelid = 'hallpass.log_pending'::regclass
    ) facts);
END $$;

INSERT INTO hallpass.fingerprint (value) VALUES (hallpass.take_fingerprint());

-- Looks for what would make the log incomplete and returns a line a problem; none: the log can be believed.
-- Repairs a numbering sequence that is behind the log, and logs that everything may have changed when the
-- fingerprint is another than the last time.
CREATE FUNCTION hallpass.inspect() RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    newest bigint;
    seen text;
BEGIN
    RETURN QUERY
    SELECT format('trigger %s on %s is %s: changes go unrecorded', expected.name, expected.target,
                  CASE WHEN t.oid IS NULL THEN 'missing' ELSE 'not ENABLE ALWAYS' END)
    FROM (SELECT 'hallpass_record_' || event AS name, target
          FROM unnest(hallpass.recorded_tables()) target, unnest(ARRAY['insert', 'update', 'delete', 'truncate']) event
          UNION ALL SELECT 'number_entry', 'hallpass.log_pending'::regclass
          -- Without it no revocation of an API key is heard of.
          UNION ALL SELECT 'api_keys_changed', 'hallpass.api_keys'::regclass) expected
    LEFT JOIN pg_trigger t ON t.tgrelid = expected.target AND t.tgname = expected.name
    WHERE t.tgenabled IS DISTINCT FROM 'A'
    ORDER BY 1;

    RETURN QUERY
    SELECT format('row-level security on %s hides rows from %s', target, current_user)
    FROM unnest(hallpass.recorded_tables()) target WHERE row_security_active(target);

    IF (SELECT last_value + is_called::integer FROM hallpass.log_seq) <= (SELECT max(seq) FROM hallpass.log) THEN
        PERFORM pg_advisory_xact_lock(1751215212, 2);
        newest := (SELECT max(seq) FROM hallpass.log);
        IF (SELECT last_value + is_called::integer FROM hallpass.log_seq) <= newest THEN
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

INSERT INTO hallpass.intended_privilege VALUES ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.inspect()');

CALL hallpass.reset_privileges();
