-- API keys: who may call the service, and for what. The service reads them and says when they were used; only the owner,
-- and so hallpass_migrator, makes, changes or revokes one.

CREATE TABLE hallpass.api_keys (
    -- The public part of the key: what it is called in logs and commands.
    id text PRIMARY KEY CHECK (id ~ '^[a-z2-7]{16}$'),
    -- BLAKE3 of the secret, keyed by the id and the service's pepper: see src/auth/api_key.rs.
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    name text NOT NULL CHECK (name ~ '^[^[:cntrl:]]{1,100}$'),
    scopes text[] NOT NULL CHECK (
        scopes <@ ARRAY['check', 'list', 'audit', 'admin', 'metrics'] AND cardinality(scopes) BETWEEN 1 AND 5),
    -- NULL: all. The service keeps every key in memory, so the list has a bound.
    organization_ids uuid[] CHECK (
        cardinality(organization_ids) BETWEEN 1 AND 1000 AND array_position(organization_ids, NULL) IS NULL),
    created_at timestamptz NOT NULL DEFAULT now(),
    created_by text NOT NULL DEFAULT session_user,
    -- NULL: never.
    expires_at timestamptz CHECK (expires_at > created_at AND isfinite(expires_at)),
    revoked_at timestamptz
);

-- When a key was used last, to about a minute. Apart, for use is no change of a key.
CREATE TABLE hallpass.api_key_use (
    key_id text PRIMARY KEY REFERENCES hallpass.api_keys ON DELETE CASCADE,
    last_used_at timestamptz NOT NULL
);

-- Another one after every change of the keys. The row's lock puts those changes in order, each ending before the next
-- one's edition is drawn: who sees the same edition twice has seen the same keys twice. Drawn at random and not counted,
-- because a number that a failover loses would come back and stand for other keys.
CREATE TABLE hallpass.api_keys_edition (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    edition uuid NOT NULL
);
INSERT INTO hallpass.api_keys_edition (edition) VALUES (gen_random_uuid());

CREATE FUNCTION hallpass.api_keys_changed() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- As many as the service reads (KEYS_MAX in src/store/api_keys.rs).
    keys_max CONSTANT integer := 10000;
BEGIN
    UPDATE hallpass.api_keys_edition SET edition = gen_random_uuid();
    -- Under the lock of the row above, so nobody else is adding any.
    IF TG_OP IN ('INSERT', 'UPDATE') AND keys_max < (
        SELECT count(*) FROM hallpass.api_keys k
        WHERE k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now()))
    THEN
        RAISE EXCEPTION 'there may be % keys at most that are neither expired nor revoked', keys_max
            USING ERRCODE = 'program_limit_exceeded';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER api_keys_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON hallpass.api_keys
FOR EACH STATEMENT EXECUTE FUNCTION hallpass.api_keys_changed();
ALTER TABLE hallpass.api_keys ENABLE ALWAYS TRIGGER api_keys_changed;

-- Notes when keys were used, as seconds ago; never takes back a later use, which another replica may have seen.
CREATE FUNCTION hallpass.record_api_key_use(key_ids text[], seconds_ago double precision[]) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO hallpass.api_key_use AS known (key_id, last_used_at)
    SELECT k.id, now() - make_interval(secs => greatest(max(used.ago), 0))
    FROM unnest(key_ids, seconds_ago) used (id, ago)
    JOIN hallpass.api_keys k ON k.id = used.id
    GROUP BY k.id
    -- In one order, so that replicas do not wait for each other in a circle.
    ORDER BY k.id
    ON CONFLICT (key_id) DO UPDATE SET last_used_at = greatest(known.last_used_at, EXCLUDED.last_used_at);
END $$;

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'SELECT', 'TABLE hallpass.api_keys'),
    ('hallpass_service', 'SELECT', 'TABLE hallpass.api_keys_edition'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.record_api_key_use(text[], double precision[])');

CALL hallpass.reset_privileges();
