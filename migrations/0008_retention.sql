-- The audit log's months: partitions made ahead, old ones taken away, and what forbids that.

-- A hold forbids every removal from the log and the audit log while it is in force: until lifted_at is set.
CREATE TABLE hallpass.legal_hold (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    placed_by text NOT NULL CHECK (placed_by <> ''),
    reason text NOT NULL CHECK (reason <> ''),
    placed_at timestamptz NOT NULL DEFAULT now(),
    lifted_at timestamptz
);
INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'SELECT', 'TABLE hallpass.legal_hold'),
    ('hallpass_auditor', 'SELECT', 'TABLE hallpass.legal_hold');

-- The least retention that remove_expired takes from anybody but the owner. Who may apply retention, as the service
-- may, must not be able to wipe out yesterday's traces.
CREATE TABLE hallpass.retention_floor (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    days integer NOT NULL CHECK (days BETWEEN 1 AND 36500)
);
INSERT INTO hallpass.retention_floor (days) VALUES (30);

-- The partitions with their bounds; NULL: without a bound on that side.
CREATE FUNCTION hallpass.audit_partitions()
RETURNS TABLE (name regclass, is_default boolean, begins_at timestamptz, ends_at timestamptz)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO' AS $$
BEGIN
    RETURN QUERY
    SELECT c.oid::regclass, bounds.said = 'DEFAULT',
           substring(bounds.said FROM 'FROM \(''([^'']+)''\)')::timestamptz,
           substring(bounds.said FROM 'TO \(''([^'']+)''\)')::timestamptz
    FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid,
         LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid)) bounds (said)
    WHERE inhparent = 'public.permission_audit_log'::regclass
    ORDER BY 3 NULLS FIRST;
END $$;

-- Makes the partitions of this month (UTC) and the next two. A month that has rows in DEFAULT already stays there as
-- a whole: rows that move would be missing for a transaction with an older snapshot.
--
-- ATTACH scans DEFAULT under an exclusive lock, for which readers wait (writers do not: their month has a partition).
-- So a DEFAULT larger than default_bytes_max, about 0.3 s of scanning, gets no more partitions beside it until
-- somebody calls this with a greater limit in a quiet hour. Until then rows go to DEFAULT, and nothing fails.
CREATE PROCEDURE hallpass.make_audit_partitions(default_bytes_max bigint DEFAULT 268435456)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
    this_month CONSTANT timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    month timestamp;
    begins timestamptz;
    ends timestamptz;
    made text;
    opened record;
BEGIN
    PERFORM pg_advisory_xact_lock(1751215212, 4);
    FOREACH month IN ARRAY ARRAY[this_month, this_month + interval '1 month', this_month + interval '2 months'] LOOP
        begins := month AT TIME ZONE 'UTC';
        ends := (month + interval '1 month') AT TIME ZONE 'UTC';
        CONTINUE WHEN EXISTS (
            SELECT FROM hallpass.audit_partitions() p
            WHERE NOT p.is_default AND tstzrange(p.begins_at, p.ends_at) && tstzrange(begins, ends));
        IF pg_relation_size('hallpass.permission_audit_log_default') > default_bytes_max THEN
            RAISE WARNING 'hallpass.permission_audit_log_default is too large for a partition beside it'
                USING HINT = 'In a quiet hour: CALL hallpass.make_audit_partitions(default_bytes_max => …).';
            RETURN;
        END IF;
        CONTINUE WHEN EXISTS (SELECT FROM hallpass.permission_audit_log_default
                              WHERE created_at >= begins AND created_at < ends);
        made := format('hallpass.%I', 'permission_audit_log_' || to_char(month, 'YYYY_MM'));
        BEGIN
            -- A writer who has chosen DEFAULT before ATTACH and inserts after it fails: this month's must be waited
            -- for, and kept waiting, at the parent. Later months have no writers yet.
            IF begins <= now() THEN
                LOCK TABLE ONLY public.permission_audit_log IN SHARE ROW EXCLUSIVE MODE;
            END IF;
            EXECUTE format('CREATE TABLE %s (LIKE public.permission_audit_log INCLUDING ALL EXCLUDING INDEXES)', made);
            -- Readers of the log need privileges on the log alone.
            SELECT relowner, relacl INTO STRICT opened FROM pg_class WHERE oid = made::regclass;
            CALL hallpass.revoke_all('TABLE ' || made, opened.relowner, opened.relacl);
            EXECUTE format('ALTER TABLE public.permission_audit_log ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                           made, begins, ends);
        EXCEPTION WHEN check_violation THEN
            -- A row of the month came into DEFAULT a moment ago.
            RAISE NOTICE '% is left to the DEFAULT partition', made;
        END;
    END LOOP;
END $$;

-- One bounded step of retention: up to rows_max rows of each table, or, when none is left, the partitions. is_done:
-- nothing was left to remove. audit_rows: how many audit rows this step removed.
--
-- The log goes first. A reader whose position is gone knows that it has missed something; one whose entries have lost
-- their rows might not. What stays, however old: the newest entry that is old, on which a reader in a quiet time
-- stands (so the head, too), and each organization's newest row of log_org, the nil UUID's too, by which
-- hallpass.true_in_matrix tells what it may believe.
CREATE FUNCTION hallpass.remove_expired(
    retention_days integer, rows_max integer, OUT audit_rows bigint, OUT is_done boolean)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
    days_min CONSTANT integer := (SELECT days FROM hallpass.retention_floor);
    cutoff timestamptz;
    hold hallpass.legal_hold;
    newest_old bigint;
    removed bigint;
    log_rows bigint;
    expired regclass[];
    partition regclass;
BEGIN
    IF retention_days IS NULL OR retention_days NOT BETWEEN 1 AND 36500 THEN
        RAISE EXCEPTION 'retention_days must be from 1 to 36500, not %', coalesce(retention_days::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- Here current_user is the owner; session_user is who logged in, whatever role was set since.
    IF retention_days < days_min AND NOT pg_has_role(session_user, current_user, 'MEMBER') THEN
        RAISE EXCEPTION '% may not remove what is younger than % days', session_user, days_min
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'The owner sets the floor: UPDATE hallpass.retention_floor SET days = ….';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'an older snapshot may not show a legal hold: run this at READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    cutoff := now() - make_interval(days => retention_days);

    PERFORM pg_advisory_xact_lock(1751215212, 4);
    -- Whoever places a hold waits for a step that is under way, so that nothing goes once it is in force.
    LOCK TABLE hallpass.legal_hold IN SHARE MODE;
    SELECT * INTO hold FROM hallpass.legal_hold WHERE lifted_at IS NULL ORDER BY id LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'legal hold % by % forbids removal: %', hold.id, hold.placed_by, hold.reason
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Set lifted_at in hallpass.legal_hold when it is no longer in force.';
    END IF;

    newest_old := (SELECT max(seq) FROM (SELECT seq, committed_at FROM hallpass.log ORDER BY seq LIMIT rows_max + 1) first
                   WHERE committed_at < cutoff);
    DELETE FROM hallpass.log WHERE seq < newest_old AND committed_at < cutoff;
    GET DIAGNOSTICS log_rows = ROW_COUNT;

    DELETE FROM hallpass.log_org
    WHERE ctid = ANY (ARRAY(
        SELECT o.ctid FROM hallpass.log_org o
        WHERE o.seq < (SELECT min(seq) FROM hallpass.log)
          AND EXISTS (SELECT FROM hallpass.log_org newer WHERE newer.org_id = o.org_id AND newer.seq > o.seq)
        LIMIT rows_max));
    GET DIAGNOSTICS removed = ROW_COUNT;
    log_rows := log_rows + removed;

    audit_rows := 0;
    is_done := log_rows = 0;
    IF NOT is_done THEN
        RETURN;
    END IF;

    DELETE FROM hallpass.permission_audit_log_default
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM hallpass.permission_audit_log_default
                            WHERE created_at < cutoff LIMIT rows_max));
    GET DIAGNOSTICS audit_rows = ROW_COUNT;
    is_done := audit_rows = 0;
    IF NOT is_done THEN
        RETURN;
    END IF;

    -- DETACH CONCURRENTLY, which would block nobody, is not for tables with a DEFAULT partition. DROP waits for those
    -- who use the log, and others wait behind it, for 200 ms at most: the lock must be the last thing asked for.
    expired := ARRAY(SELECT p.name FROM hallpass.audit_partitions() p JOIN pg_class c ON c.oid = p.name
                     WHERE p.ends_at <= cutoff AND c.relnamespace = 'hallpass'::regnamespace ORDER BY p.ends_at);
    IF expired <> '{}' THEN
        FOREACH partition IN ARRAY expired LOOP
            EXECUTE format('SELECT count(*) FROM %s', partition) INTO removed;
            audit_rows := audit_rows + removed;
        END LOOP;
        EXECUTE 'DROP TABLE ' || array_to_string(expired, ', ');
    END IF;
END $$;

CALL hallpass.make_room('cleanup_old_audit_logs(integer)');
-- Removes what is older from the audit log and the log, and returns a sentence to show, with the number of audit rows
-- that are gone. A month's partition goes as a whole once all of it is older. Everything in one transaction; the
-- service takes bounded steps.
CREATE FUNCTION public.cleanup_old_audit_logs(retention_days integer DEFAULT 365) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    removed bigint := 0;
    step record;
BEGIN
    LOOP
        step := hallpass.remove_expired(retention_days, 100000);
        removed := removed + step.audit_rows;
        EXIT WHEN step.is_done;
    END LOOP;
    RETURN format('Removed %s of the audit log''s rows at a retention of %s days.', removed, retention_days);
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'the audit log is in use, nothing was removed: try again'
        USING ERRCODE = 'lock_not_available';
END $$;

-- The first months. Where somebody holds the audit log right now, the service makes them at its start.
DO $$
BEGIN
    CALL hallpass.make_audit_partitions();
EXCEPTION WHEN lock_not_available THEN
    RAISE NOTICE 'the first partitions of the audit log are left to the service';
END $$;

INSERT INTO hallpass.public_object VALUES ('cleanup_old_audit_logs');
INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.make_audit_partitions(bigint)'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.remove_expired(integer, integer)');

CALL hallpass.reset_privileges();
