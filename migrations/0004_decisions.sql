-- What a decision is. It is written in effective_user_permissions and nowhere else; the matrix is a copy of it that
-- knows how old it is, and hallpass.load is the one place that says when the copy may be believed.
--
-- The views are made and filled in schema hallpass and get their names in public with the functions (0005), in one short
-- transaction.

-- One row a (member, permission). A permission without a template and a user without a membership have no row.
CREATE VIEW hallpass.effective_user_permissions AS
    SELECT m.user_id, m.org_id, m.role, m.first_name, m.last_name,
           t.module_name, t.permission_key, t.permission_name,
           minimum.role AS effective_min_role,
           coalesce(o.is_enabled, true) AS is_enabled,
           decision.reason IN ('GRANTED_BY_ROLE', 'GRANTED_TO_USER') AS user_has_permission,
           decision.reason,
           held.rank AS role_rank,
           CASE WHEN o.min_role_required IS NULL THEN 'TEMPLATE' ELSE 'OVERRIDE' END AS min_role_source,
           coalesce(m.user_id = ANY (o.specific_users), false) AS specific_user
    FROM hallpass.members m
    CROSS JOIN public.organization_permission_templates t
    LEFT JOIN public.organization_permissions o ON o.org_id = m.org_id AND o.permission_key = t.permission_key
    CROSS JOIN LATERAL (SELECT coalesce(o.min_role_required::text, t.default_min_role::text) AS role) minimum
    LEFT JOIN public.permission_roles held ON held.role_key = m.role
    LEFT JOIN public.permission_roles needed ON needed.role_key = minimum.role
    CROSS JOIN LATERAL (SELECT CASE
        WHEN NOT o.is_enabled THEN 'PERMISSION_DISABLED'
        WHEN held.rank >= needed.rank THEN 'GRANTED_BY_ROLE'
        WHEN m.user_id = ANY (o.specific_users) THEN 'GRANTED_TO_USER'
        ELSE 'ROLE_TOO_LOW'
    END AS reason) decision;

-- Up to which entry each materialized view holds every change, and since when. -1: never refreshed.
CREATE TABLE hallpass.matrix_stamp (
    view_name text PRIMARY KEY,
    seq bigint NOT NULL,
    refreshed_at timestamptz NOT NULL
);
INSERT INTO hallpass.matrix_stamp VALUES ('user_permission_matrix', -1, now()), ('org_permission_summary', -1, now());

-- Writes the stamp of a view, from within the view's own query: so every refresh, whoever makes it and at whatever
-- isolation level, stamps the view with the head of the very snapshot that its rows come from.
CREATE FUNCTION hallpass.stamp(stamped_view text, head_seq bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE hallpass.matrix_stamp SET seq = coalesce(head_seq, 0), refreshed_at = clock_timestamp()
    WHERE view_name = stamped_view;
    RETURN true;
END $$;

-- skip_duplicate_check is always NULL: REFRESH CONCURRENTLY sorts all rows without a NULL twice, by all columns, to
-- look for duplicates, which the unique index rules out already; that was three quarters of the time of a refresh.
CREATE MATERIALIZED VIEW hallpass.user_permission_matrix AS
    SELECT user_id, org_id, role, first_name, last_name, module_name, permission_key, permission_name,
           effective_min_role, is_enabled, user_has_permission, reason, NULL::boolean AS skip_duplicate_check
    FROM hallpass.effective_user_permissions
    WHERE (SELECT hallpass.stamp('user_permission_matrix', (SELECT max(seq) FROM hallpass.log)))
    ORDER BY org_id, user_id, permission_key;

-- Consumers: hallpass.load, and REFRESH CONCURRENTLY, which needs a unique index.
CREATE UNIQUE INDEX user_permission_matrix_key ON hallpass.user_permission_matrix (org_id, user_id, permission_key);

-- Counts an organization, now. All but the first count overrides, those of a role by their own minimum role, enabled or
-- not; an override of a key that has no template counts nowhere. A condition on org_id reaches the tables.
CREATE VIEW hallpass.organization_counts AS
    SELECT o.id AS org_id,
           o.name AS org_name,
           count(t.permission_key) AS total_available_permissions,
           count(p.permission_key) AS total_custom_permissions,
           count(p.permission_key) FILTER (WHERE p.is_enabled IS NOT FALSE) AS enabled_custom_permissions,
           count(p.permission_key) FILTER (WHERE p.is_enabled IS FALSE) AS disabled_custom_permissions,
           count(*) FILTER (WHERE p.min_role_required::text = 'admin') AS admin_only_permissions,
           count(*) FILTER (WHERE p.min_role_required::text = 'board_member') AS board_member_permissions,
           count(*) FILTER (WHERE p.min_role_required::text = 'committee_lead') AS committee_lead_permissions,
           count(*) FILTER (WHERE p.min_role_required::text = 'volunteer') AS volunteer_permissions,
           max(p.updated_at) AS last_permission_update
    FROM public.organizations o
    LEFT JOIN public.organization_permission_templates t ON true
    LEFT JOIN public.organization_permissions p ON p.org_id = o.id AND p.permission_key = t.permission_key
    GROUP BY o.id, o.name;

CREATE MATERIALIZED VIEW hallpass.org_permission_summary AS
    SELECT *
    FROM hallpass.organization_counts
    WHERE (SELECT hallpass.stamp('org_permission_summary', (SELECT max(seq) FROM hallpass.log)))
    ORDER BY org_id;

CREATE UNIQUE INDEX org_permission_summary_key ON hallpass.org_permission_summary (org_id);

INSERT INTO hallpass.intended_privilege VALUES ('hallpass_service', 'SELECT', 'TABLE hallpass.matrix_stamp');

-- Whether a materialized view has data: one refreshed WITH NO DATA, or restored without, cannot be read.
CREATE FUNCTION hallpass.is_populated(materialized_view regclass) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (SELECT relispopulated FROM pg_class WHERE oid = materialized_view);
END $$;

-- Whether the matrix may have rows that this snapshot's stamp speaks of.
--
-- A REFRESH without CONCURRENTLY puts another file under every snapshot, older ones too, with newer rows or (when it
-- waited for a newer refresh) older ones, or none (WITH NO DATA): the matrix is believed only by a snapshot that knows
-- the present file. A statement that reads nothing locks it, so that the file stays until the caller's transaction
-- ends; where such a REFRESH holds it, the live view answers sooner than waiting would.
CREATE FUNCTION hallpass.matrix_file_is_known() RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms' AS $$
BEGIN
    PERFORM FROM public.user_permission_matrix WHERE false;
    RETURN (SELECT relispopulated AND relfilenode = pg_relation_filenode(oid)
            FROM pg_class WHERE oid = 'public.user_permission_matrix'::regclass);
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END $$;

-- Those of the organizations whose rows of the matrix are the truth in this snapshot: no entry that touches them, or
-- everything, is newer than the stamp, and this transaction has no change that is not numbered yet.
CREATE FUNCTION hallpass.true_in_matrix(org_ids uuid[]) RETURNS uuid[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    stamp CONSTANT bigint := (SELECT seq FROM hallpass.matrix_stamp WHERE view_name = 'user_permission_matrix');
    untouched uuid[];
BEGIN
    IF stamp < 0
       OR EXISTS (SELECT FROM hallpass.log_org
                  WHERE org_id = '00000000-0000-0000-0000-000000000000' AND seq > stamp)
       OR hallpass.has_pending()
    THEN
        RETURN '{}';
    END IF;
    untouched := ARRAY(
        SELECT DISTINCT asked.id FROM unnest(org_ids) asked (id)
        WHERE NOT EXISTS (SELECT FROM hallpass.log_org l WHERE l.org_id = asked.id AND l.seq > stamp));
    RETURN CASE WHEN untouched <> '{}' AND hallpass.matrix_file_is_known() THEN untouched ELSE '{}' END;
END $$;

CREATE FUNCTION hallpass.matrix_is_true(org_id uuid) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN hallpass.true_in_matrix(ARRAY[org_id]) <> '{}';
END $$;

-- What hallpass.load returns: first one row that says what holds for all (org_id NULL: the head, whether this is a
-- standby, the catalog by key), then one row a member. A pair without a row is no member.
CREATE TYPE hallpass.loaded AS (
    org_id uuid,
    user_id uuid,
    role text,
    permission_keys text[],                 -- the first row: the catalog's; a member's: those decided, in any order
    reasons text[],
    min_roles text[],
    enabled boolean[],
    permission_names text[],                -- from here on: of the first row alone
    module_names text[],
    head_seq bigint,
    head_uid integer,
    in_recovery boolean
);

CREATE FUNCTION hallpass.load_header() RETURNS hallpass.loaded
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    header hallpass.loaded;
BEGIN
    SELECT array_agg(permission_key::text ORDER BY permission_key COLLATE "C"),
           array_agg(permission_name::text ORDER BY permission_key COLLATE "C"),
           array_agg(module_name::text ORDER BY permission_key COLLATE "C")
    INTO header.permission_keys, header.permission_names, header.module_names
    FROM public.organization_permission_templates;
    SELECT seq, uid INTO header.head_seq, header.head_uid FROM hallpass.log ORDER BY seq DESC LIMIT 1;
    header.in_recovery := pg_is_in_recovery();
    RETURN header;
END $$;

-- What hallpass.load returns, in the snapshot of the statement that calls it.
CREATE FUNCTION hallpass.load_in_snapshot(org_ids uuid[], user_ids uuid[], believe_matrix boolean)
RETURNS SETOF hallpass.loaded
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    header CONSTANT hallpass.loaded := hallpass.load_header();
    -- A matrix without permissions does not show who is a member.
    from_matrix CONSTANT uuid[] := CASE WHEN believe_matrix AND header.permission_keys IS NOT NULL
                                        THEN hallpass.true_in_matrix(org_ids) ELSE '{}' END;
BEGIN
    RETURN NEXT header;
    IF cardinality(from_matrix) > 0 THEN
        RETURN QUERY
        SELECT asked.org_id, asked.user_id, max(e.role::text),
               array_agg(e.permission_key::text),
               array_agg(e.reason),
               array_agg(e.effective_min_role::text),
               array_agg(e.is_enabled),
               NULL::text[], NULL::text[], NULL::bigint, NULL::integer, NULL::boolean
        FROM unnest(org_ids, user_ids) asked (org_id, user_id)
        JOIN public.user_permission_matrix e ON e.org_id = asked.org_id AND e.user_id = asked.user_id
        WHERE asked.org_id = ANY (from_matrix)
        GROUP BY asked.org_id, asked.user_id;
    END IF;
    IF cardinality(from_matrix) = 0 OR NOT org_ids <@ from_matrix THEN
        RETURN QUERY
        SELECT asked.org_id, asked.user_id, max(m.role::text),
               array_agg(e.permission_key::text),
               array_agg(e.reason),
               array_agg(e.effective_min_role::text),
               array_agg(e.is_enabled),
               NULL::text[], NULL::text[], NULL::bigint, NULL::integer, NULL::boolean
        FROM unnest(org_ids, user_ids) asked (org_id, user_id)
        JOIN hallpass.members m ON m.org_id = asked.org_id AND m.user_id = asked.user_id
        LEFT JOIN public.effective_user_permissions e ON e.org_id = asked.org_id AND e.user_id = asked.user_id
        WHERE asked.org_id <> ALL (from_matrix)
        GROUP BY asked.org_id, asked.user_id;
    END IF;
END $$;

-- Locks the tables that decisions are made of, so that the next statement's snapshot is younger than the locks.
--
-- TRUNCATE empties a table for older snapshots too. A statement that waited for a transaction that truncates and refills
-- a table would see neither the old rows nor the new ones, and without the row that disables a permission the
-- permission is granted.
CREATE PROCEDURE hallpass.lock_against_truncate()
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE public.profiles, public.organization_permissions, public.organization_permission_templates,
               public.permission_roles IN ACCESS SHARE MODE;
END $$;

-- Loads a set of (organization, user) pairs, which must be distinct, in one snapshot: from the matrix where it is
-- the truth and may be believed, else from the view. VOLATILE: its second statement has a snapshot of its own.
CREATE FUNCTION hallpass.load(org_ids uuid[], user_ids uuid[], believe_matrix boolean) RETURNS SETOF hallpass.loaded
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CALL hallpass.lock_against_truncate();
    RETURN QUERY SELECT * FROM hallpass.load_in_snapshot(org_ids, user_ids, believe_matrix);
END $$;

-- One decision and the facts behind it, from the live view, in one snapshot. reason is NULL where the view has no row:
-- the permission is not known, or the user is no member.
CREATE FUNCTION hallpass.explain(asked_org_id uuid, asked_user_id uuid, asked_permission_key text)
RETURNS TABLE (head_seq bigint, head_uid integer, in_recovery boolean, is_known boolean, is_member boolean, role text,
               role_rank integer, effective_min_role text, min_role_is_override boolean, is_enabled boolean,
               specific_user boolean, reason text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CALL hallpass.lock_against_truncate();
    RETURN QUERY
    SELECT h.seq, h.uid, pg_is_in_recovery(), t.permission_key IS NOT NULL, m.org_id IS NOT NULL,
           coalesce(m.role::text, ''), r.rank, coalesce(e.effective_min_role, t.default_min_role::text, ''),
           e.min_role_source = 'OVERRIDE', coalesce(e.is_enabled, false), coalesce(e.specific_user, false), e.reason
    FROM (VALUES (1)) one
    LEFT JOIN LATERAL (SELECT seq, uid FROM hallpass.log ORDER BY seq DESC LIMIT 1) h ON true
    LEFT JOIN public.organization_permission_templates t ON t.permission_key = asked_permission_key
    LEFT JOIN hallpass.members m ON m.org_id = asked_org_id AND m.user_id = asked_user_id
    LEFT JOIN public.permission_roles r ON r.role_key = m.role
    LEFT JOIN public.effective_user_permissions e
           ON e.org_id = asked_org_id AND e.user_id = asked_user_id AND e.permission_key = asked_permission_key;
END $$;

-- The next members after a pair, in order; the nil ids come before all.
CREATE FUNCTION hallpass.next_members(after_org_id uuid, after_user_id uuid, row_limit integer)
RETURNS TABLE (org_id uuid, user_id uuid)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT m.org_id, m.user_id FROM hallpass.members m
    WHERE (m.org_id, m.user_id) > (after_org_id, after_user_id)
    ORDER BY m.org_id, m.user_id LIMIT row_limit;
END $$;

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.load(uuid[], uuid[], boolean)'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.explain(uuid, uuid, text)'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.next_members(uuid, uuid, integer)');

CALL hallpass.reset_privileges();
