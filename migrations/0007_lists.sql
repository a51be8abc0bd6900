-- What the service lists beside decisions: who holds a permission, where a user is a member, and an organization's
-- counts. Each function locks, so that no TRUNCATE opens a hole in what it reads (see hallpass.lock_against_truncate),
-- and then reads in one snapshot. Its first row, and every other, says that snapshot's head and whether this is a
-- standby; where there is nothing to list, the first row has NULLs for the rest.

-- Members who hold a permission, by user, from the first user id on.
--
-- In one organization the members of a role either all hold a permission or hold it by name alone; those of a role that
-- the ladder does not know, by name alone. So the first of each role, and those that are named, are all that can be on
-- the page: no more are decided, however large the organization.
CREATE FUNCTION hallpass.permission_holders(
    asked_org_id uuid, asked_permission_key text, first_user_id uuid, row_limit integer)
RETURNS TABLE (head_seq bigint, head_uid integer, in_recovery boolean, user_id uuid, role text, reason text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    CALL hallpass.lock_against_truncate();
    RETURN QUERY
    WITH candidate AS (
        SELECT first.user_id
        FROM public.permission_roles r
        CROSS JOIN LATERAL (
            SELECT m.user_id FROM hallpass.members m
            WHERE m.org_id = asked_org_id AND m.role = r.role_key AND m.user_id >= first_user_id
            ORDER BY m.user_id LIMIT row_limit) first
        UNION
        SELECT named.user_id
        FROM public.organization_permissions o CROSS JOIN LATERAL unnest(o.specific_users) named (user_id)
        WHERE o.org_id = asked_org_id AND o.permission_key = asked_permission_key AND named.user_id >= first_user_id
    ), listed AS (
        SELECT e.user_id, e.role, e.reason
        FROM candidate c
        JOIN public.effective_user_permissions e
          ON e.org_id = asked_org_id AND e.permission_key = asked_permission_key AND e.user_id = c.user_id
        WHERE e.user_has_permission
        ORDER BY e.user_id LIMIT row_limit
    )
    SELECT h.seq, h.uid, pg_is_in_recovery(), l.user_id, coalesce(l.role, ''), l.reason
    FROM (VALUES (1)) one
    LEFT JOIN LATERAL (SELECT g.seq, g.uid FROM hallpass.log g ORDER BY g.seq DESC LIMIT 1) h ON true
    LEFT JOIN listed l ON true
    ORDER BY l.user_id;
END $$;

-- A user's memberships of some organizations (NULL: all), by organization, from the first organization id on.
CREATE FUNCTION hallpass.user_organizations(
    asked_user_id uuid, among_org_ids uuid[], first_org_id uuid, row_limit integer)
RETURNS TABLE (head_seq bigint, head_uid integer, in_recovery boolean, org_id uuid, role text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    CALL hallpass.lock_against_truncate();
    RETURN QUERY
    SELECT h.seq, h.uid, pg_is_in_recovery(), listed.org_id, coalesce(listed.role::text, '')
    FROM (VALUES (1)) one
    LEFT JOIN LATERAL (SELECT l.seq, l.uid FROM hallpass.log l ORDER BY l.seq DESC LIMIT 1) h ON true
    LEFT JOIN LATERAL (
        SELECT m.org_id, m.role
        FROM hallpass.members m
        WHERE m.user_id = asked_user_id AND m.org_id >= first_org_id
          AND (among_org_ids IS NULL OR m.org_id = ANY (among_org_ids))
        ORDER BY m.org_id LIMIT row_limit) listed ON true
    ORDER BY listed.org_id;
END $$;

-- Whether an organization's row of org_permission_summary is the truth in this snapshot: hallpass.true_in_matrix and
-- hallpass.matrix_file_is_known for the summary, by the summary's own stamp and file. True of an organization that
-- does not exist, too: then the summary rightly has no row.
--
-- Not of last_permission_update: a statement that changes nothing but updated_at is no change to the log.
CREATE FUNCTION hallpass.summary_is_true(org_id uuid) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms' AS $$
DECLARE
    stamp CONSTANT bigint := coalesce(
        (SELECT seq FROM hallpass.matrix_stamp WHERE view_name = 'org_permission_summary'), -1);
BEGIN
    IF stamp < 0
       OR EXISTS (SELECT FROM hallpass.log_org l WHERE l.org_id = $1 AND l.seq > stamp)
       OR EXISTS (SELECT FROM hallpass.log_org l
                  WHERE l.org_id = '00000000-0000-0000-0000-000000000000' AND l.seq > stamp)
       OR hallpass.has_pending()
    THEN
        RETURN false;
    END IF;
    PERFORM FROM public.org_permission_summary WHERE false;
    RETURN (SELECT relispopulated AND relfilenode = pg_relation_filenode(oid)
            FROM pg_class WHERE oid = 'public.org_permission_summary'::regclass);
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END $$;

-- What hallpass.organization_summary returns, in the snapshot of the statement that calls it: from the summary where
-- it is the truth and may be believed, else counted now.
CREATE FUNCTION hallpass.organization_summary_in_snapshot(asked_org_id uuid, believe_summary boolean)
RETURNS TABLE (head_seq bigint, head_uid integer, in_recovery boolean, org_id uuid, org_name text,
               total_available_permissions integer, total_custom_permissions integer,
               enabled_custom_permissions integer, disabled_custom_permissions integer,
               admin_only_permissions integer, board_member_permissions integer,
               committee_lead_permissions integer, volunteer_permissions integer, last_permission_update timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    -- Not the view's row type: looking that up waits for a REFRESH that holds the view.
    counts record;
BEGIN
    IF believe_summary AND hallpass.summary_is_true(asked_org_id) THEN
        SELECT s.* INTO counts FROM public.org_permission_summary s WHERE s.org_id = asked_org_id;
        counts.last_permission_update := (
            SELECT max(p.updated_at)
            FROM public.organization_permissions p
            JOIN public.organization_permission_templates t ON t.permission_key = p.permission_key
            WHERE p.org_id = asked_org_id);
    ELSE
        SELECT c.* INTO counts FROM hallpass.organization_counts c WHERE c.org_id = asked_org_id;
    END IF;
    RETURN QUERY
    SELECT h.seq, h.uid, pg_is_in_recovery(), counts.org_id, counts.org_name::text,
           counts.total_available_permissions::integer, counts.total_custom_permissions::integer,
           counts.enabled_custom_permissions::integer, counts.disabled_custom_permissions::integer,
           counts.admin_only_permissions::integer, counts.board_member_permissions::integer,
           counts.committee_lead_permissions::integer, counts.volunteer_permissions::integer,
           counts.last_permission_update::timestamptz
    FROM (VALUES (1)) one
    LEFT JOIN LATERAL (SELECT l.seq, l.uid FROM hallpass.log l ORDER BY l.seq DESC LIMIT 1) h ON true;
END $$;

-- An organization's counts; one row, with a NULL org_id where there is no such organization. VOLATILE: its second
-- statement has a snapshot of its own.
CREATE FUNCTION hallpass.organization_summary(asked_org_id uuid, believe_summary boolean)
RETURNS TABLE (head_seq bigint, head_uid integer, in_recovery boolean, org_id uuid, org_name text,
               total_available_permissions integer, total_custom_permissions integer,
               enabled_custom_permissions integer, disabled_custom_permissions integer,
               admin_only_permissions integer, board_member_permissions integer,
               committee_lead_permissions integer, volunteer_permissions integer, last_permission_update timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- First, as TRUNCATE ... CASCADE comes to it first: in another order the two could wait for each other.
    LOCK TABLE public.organizations IN ACCESS SHARE MODE;
    CALL hallpass.lock_against_truncate();
    RETURN QUERY SELECT * FROM hallpass.organization_summary_in_snapshot(asked_org_id, believe_summary);
END $$;

INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.permission_holders(uuid, text, uuid, integer)'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.user_organizations(uuid, uuid[], uuid, integer)'),
    ('hallpass_service', 'EXECUTE', 'ROUTINE hallpass.organization_summary(uuid, boolean)');

CALL hallpass.reset_privileges();
