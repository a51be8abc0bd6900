-- What the audit log is listed by, newest first: everything, an organization, the user affected, the actor, a permission.
-- Each has the order of the list behind its column, so that a page reads its own rows alone (src/store/audit.rs).

CREATE INDEX IF NOT EXISTS permission_audit_log_time ON public.permission_audit_log (created_at, entry_id, n);
-- Readers of an entry, the feed among them, read by it too: they know when the entry's transaction began.
DROP INDEX IF EXISTS public.permission_audit_log_entry;
CREATE INDEX IF NOT EXISTS permission_audit_log_organization
    ON public.permission_audit_log (org_id, created_at, entry_id, n) WHERE org_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS permission_audit_log_affected_user
    ON public.permission_audit_log (affected_user_id, created_at, entry_id, n) WHERE affected_user_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS permission_audit_log_actor
    ON public.permission_audit_log (changed_by, created_at, entry_id, n) WHERE changed_by IS NOT NULL;
CREATE INDEX IF NOT EXISTS permission_audit_log_permission
    ON public.permission_audit_log (permission_key, created_at, entry_id, n) WHERE permission_key IS NOT NULL;

-- Consumers: a listed row's place in the log; the place in the log that a time stands for.
CREATE INDEX log_entry ON hallpass.log (entry_id);
CREATE INDEX log_committed_at ON hallpass.log (committed_at, seq);

-- The last entry that retention has removed from the beginning of the log: a reader who stands before it has missed
-- something, and one who stands on it has not.
CREATE TABLE hallpass.log_removed (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    seq bigint NOT NULL,
    uid integer NOT NULL,
    committed_at timestamptz NOT NULL
);
INSERT INTO hallpass.log_removed (seq, uid, committed_at) VALUES (0, 0, '-infinity');

CREATE FUNCTION hallpass.note_removed() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE hallpass.log_removed r SET seq = gone.seq, uid = gone.uid, committed_at = gone.committed_at
    FROM (SELECT * FROM removed ORDER BY seq DESC LIMIT 1) gone
    WHERE gone.seq > r.seq AND gone.seq < (SELECT min(seq) FROM hallpass.log);
    RETURN NULL;
END $$;
CREATE TRIGGER note_removed AFTER DELETE ON hallpass.log
    REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION hallpass.note_removed();

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'SELECT', 'TABLE hallpass.log_removed'),
    ('hallpass_auditor', 'SELECT', 'TABLE hallpass.log_removed');

CALL hallpass.reset_privileges();
