-- The log: one commit-ordered record of every permission-relevant change.
--
-- A changing statement writes its audit rows and one row into log_pending. At COMMIT a deferred trigger numbers it
-- under a lock that PostgreSQL gives back only after the commit is visible, so whoever sees seq n sees every seq
-- below n.

CREATE SEQUENCE hallpass.entry_id;
CREATE SEQUENCE hallpass.log_seq;

-- The audit rows of an earlier installation, which `migrate --uninstall` leaves as public.hallpass_audit_log, go on here.
DO $$
DECLARE
    partition regclass;
BEGIN
    IF to_regclass('public.hallpass_audit_log') IS NOT NULL THEN
        FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'public.hallpass_audit_log'::regclass LOOP
            EXECUTE format('ALTER TABLE %s SET SCHEMA hallpass', partition);
        END LOOP;
        ALTER TABLE public.hallpass_audit_log SET SCHEMA hallpass;
        ALTER TABLE hallpass.hallpass_audit_log RENAME TO permission_audit_log;
        PERFORM setval('hallpass.entry_id', coalesce((SELECT max(entry_id) FROM hallpass.permission_audit_log), 0) + 1);
    END IF;
END $$;

-- What changed, who changed it, from where: one row a changed row. No foreign keys: it outlives what it speaks of.
-- It gets its name in public when it begins to record.
CREATE TABLE IF NOT EXISTS hallpass.permission_audit_log (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    org_id uuid,
    permission_key text,
    changed_by uuid,
    changed_by_profile_id uuid,
    old_values jsonb,
    new_values jsonb,
    change_type text NOT NULL,              -- INSERT, UPDATE, DELETE, TRUNCATE, RESET, BULK_UPDATE; UNRECORDED: see hallpass.inspect
    ip_address inet,
    user_agent text,
    request_id text,
    session_id text,
    created_at timestamptz NOT NULL DEFAULT transaction_timestamp(),
    entry_id bigint NOT NULL,
    n integer NOT NULL,                     -- order within the entry, from 1
    table_name text NOT NULL,
    affected_user_id uuid,
    actor_source text NOT NULL,             -- SETTINGS, JWT, NONE: where changed_by comes from
    database_role text NOT NULL,
    database_login text NOT NULL,
    client_address inet,
    application_name text,
    trace_id text
) PARTITION BY RANGE (created_at);

-- Takes every row that no monthly partition takes: a missing month must not stop the application.
CREATE TABLE IF NOT EXISTS hallpass.permission_audit_log_default
    PARTITION OF hallpass.permission_audit_log DEFAULT;

-- Consumers: the feed and every other reader of an entry, by entry and row. Not unique: an entry id that came twice
-- would be a nuisance to a reader and must not fail a writer.
CREATE INDEX IF NOT EXISTS permission_audit_log_entry ON hallpass.permission_audit_log (entry_id, created_at, n);

CREATE TABLE hallpass.log (
    seq bigint PRIMARY KEY,
    uid integer NOT NULL,                   -- random; tells one history from another
    entry_id bigint NOT NULL,
    xid xid8 NOT NULL,
    created_at timestamptz NOT NULL,        -- the transaction's start, as in the entry's audit rows
    committed_at timestamptz NOT NULL
);

-- Which organizations an entry touches. The nil UUID: everything.
CREATE TABLE hallpass.log_org (
    org_id uuid NOT NULL,
    seq bigint NOT NULL,
    PRIMARY KEY (org_id, seq)
);

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'SELECT', 'TABLE hallpass.log'),
    ('hallpass_service', 'SELECT', 'TABLE hallpass.log_org'),
    ('hallpass_auditor', 'SELECT', 'TABLE hallpass.log'),
    ('hallpass_auditor', 'SELECT', 'TABLE hallpass.log_org');

-- Entries on their way to the log. Insert-only; upkeep deletes what is committed, hence numbered.
-- pass 1: written by the statement. pass 2: written at COMMIT, and numbered after everything else that is deferred.
CREATE TABLE hallpass.log_pending (
    entry_id bigint NOT NULL,
    org_ids uuid[] NOT NULL,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    pass smallint NOT NULL DEFAULT 1
);

-- Where a publication is FOR ALL TABLES, a row without an identity cannot be deleted.
ALTER TABLE hallpass.log_pending REPLICA IDENTITY FULL;
ALTER TABLE hallpass.permission_audit_log_default REPLICA IDENTITY FULL;

-- Consumer: hallpass.has_pending.
CREATE INDEX log_pending_xid ON hallpass.log_pending (xid);

-- Numbers an entry at COMMIT. Reads no table, so that it never fails a SERIALIZABLE or REPEATABLE READ writer.
-- Pass 1 only queues pass 2: the deferred foreign keys and triggers of the application run before the lock is taken.
CREATE FUNCTION hallpass.number_entry() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    next_seq bigint;
BEGIN
    IF NEW.pass = 1 THEN
        INSERT INTO hallpass.log_pending (entry_id, org_ids, xid, pass) VALUES (NEW.entry_id, NEW.org_ids, NEW.xid, 2);
        RETURN NULL;
    END IF;
    -- The lock, then the number: a number drawn before it could commit after a greater one.
    PERFORM pg_advisory_xact_lock(1751215212, 2);
    next_seq := nextval('hallpass.log_seq');
    INSERT INTO hallpass.log (seq, uid, entry_id, xid, created_at, committed_at)
    VALUES (next_seq, ('x' || left(gen_random_uuid()::text, 8))::bit(32)::integer, NEW.entry_id, NEW.xid,
            transaction_timestamp(), clock_timestamp());
    INSERT INTO hallpass.log_org (org_id, seq) SELECT org_id, next_seq FROM unnest(NEW.org_ids) org_id;
    PERFORM pg_notify('hallpass_log', '');
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER number_entry AFTER INSERT ON hallpass.log_pending
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hallpass.number_entry();
ALTER TABLE hallpass.log_pending ENABLE ALWAYS TRIGGER number_entry;

-- The newest position: `seq-uid`, or `0-0` before the first entry.
CREATE FUNCTION hallpass.head() RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce(
        (SELECT seq || '-' || lpad(to_hex(uid), 8, '0') FROM hallpass.log ORDER BY seq DESC LIMIT 1), '0-0');
END $$;

-- Whether this transaction has changed something that is not numbered yet.
CREATE FUNCTION hallpass.has_pending() RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN pg_current_xact_id_if_assigned() IS NOT NULL
       AND EXISTS (SELECT FROM hallpass.log_pending WHERE xid = pg_current_xact_id_if_assigned());
END $$;

-- Deletes entries on their way that have arrived, up to 100,000 a call, and returns how many: a row that another
-- transaction sees is committed, hence numbered. The caller's own are not, and has_pending asks for them.
CREATE FUNCTION hallpass.clear_pending() RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    cleared bigint;
BEGIN
    DELETE FROM hallpass.log_pending
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM hallpass.log_pending
                            WHERE xid IS DISTINCT FROM pg_current_xact_id_if_assigned() LIMIT 100000));
    GET DIAGNOSTICS cleared = ROW_COUNT;
    RETURN cleared;
END $$;

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.head()'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.clear_pending()'),
    ('hallpass_auditor', 'EXECUTE', 'ROUTINE hallpass.head()');

CALL hallpass.reset_privileges();
