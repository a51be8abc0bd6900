-- What SQL users call, under PTO Connect's names and signatures: the views, checks for policies and queries, the actor of
-- a transaction, the refresh.

CALL hallpass.publish_view('effective_user_permissions');
CALL hallpass.publish_view('user_permission_matrix');
CALL hallpass.publish_view('org_permission_summary');

CREATE FUNCTION public.user_has_permission_in_org(org_id uuid, user_id uuid, permission_key text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT e.user_has_permission FROM public.effective_user_permissions e
                     WHERE e.org_id = $1 AND e.user_id = $2 AND e.permission_key = $3), false);
END $$;

-- The one organization of a user; NULL for none. Raises when there are several: a question without an organization
-- has no answer then.
CREATE FUNCTION hallpass.only_organization(user_id uuid) RETURNS uuid
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    orgs CONSTANT uuid[] := ARRAY(SELECT m.org_id FROM hallpass.members m WHERE m.user_id = $1 LIMIT 2);
BEGIN
    IF cardinality(orgs) > 1 THEN
        RAISE EXCEPTION 'user % belongs to several organizations', $1
            USING ERRCODE = 'cardinality_violation',
                  HINT = 'Name the organization: user_has_permission_in_org(org_id, user_id, permission_key).';
    END IF;
    RETURN orgs[1];
END $$;

CALL hallpass.make_room('user_has_org_permission(uuid, character varying)', in_place => true);
CREATE OR REPLACE FUNCTION public.user_has_org_permission(user_id_param uuid, permission_key_param character varying)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Cast: a function that takes a varchar here, whoever made it, would fit better, and run as the owner.
    RETURN public.user_has_permission_in_org(
        hallpass.only_organization(user_id_param), user_id_param, permission_key_param::text);
END $$;

CALL hallpass.make_room('user_has_org_permission_enhanced(uuid, text, boolean)', in_place => true);
-- use_cache: read the materialized matrix, where it is the truth.
CREATE OR REPLACE FUNCTION public.user_has_org_permission_enhanced(
    user_id_param uuid, permission_key_param text, use_cache boolean DEFAULT true) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    org CONSTANT uuid := hallpass.only_organization(user_id_param);
BEGIN
    IF use_cache AND hallpass.matrix_is_true(org) THEN
        RETURN coalesce((SELECT e.user_has_permission FROM public.user_permission_matrix e
                         WHERE e.org_id = org AND e.user_id = user_id_param
                           AND e.permission_key = permission_key_param), false);
    END IF;
    RETURN public.user_has_permission_in_org(org, user_id_param, permission_key_param);
END $$;

CALL hallpass.make_room('get_user_permissions_bulk(uuid, text)');
-- Every permission of a user, in each of the user's organizations; of one module, or of all where it is NULL.
CREATE FUNCTION public.get_user_permissions_bulk(user_id_param uuid, module_filter text DEFAULT NULL)
RETURNS TABLE (permission_key text, module_name text, permission_name text, has_permission boolean,
               effective_min_role text, is_enabled boolean, org_id uuid, role text, reason text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT e.permission_key::text, e.module_name::text, e.permission_name::text, e.user_has_permission,
           e.effective_min_role, e.is_enabled, e.org_id, e.role, e.reason
    FROM public.effective_user_permissions e
    WHERE e.user_id = user_id_param AND (module_filter IS NULL OR e.module_name = module_filter)
    ORDER BY e.org_id, e.module_name, e.permission_name, e.permission_key;
END $$;

CALL hallpass.make_room('set_session_variables(uuid, uuid, uuid, text, text, text)');
-- Says who makes the changes of this transaction. It ends with the transaction: a pooled connection hands no actor on.
CREATE FUNCTION public.set_session_variables(
    user_id uuid, profile_id uuid DEFAULT NULL, org_id uuid DEFAULT NULL,
    request_id text DEFAULT NULL, ip_address text DEFAULT NULL, user_agent text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM set_config('app.current_user_id', coalesce(user_id::text, ''), true),
            set_config('app.current_profile_id', coalesce(profile_id::text, ''), true),
            set_config('app.current_org_id', coalesce(org_id::text, ''), true),
            set_config('app.current_request_id', coalesce(request_id, ''), true),
            set_config('app.current_ip', coalesce(ip_address, ''), true),
            set_config('app.current_user_agent', coalesce(user_agent, ''), true);
END $$;

CALL hallpass.make_room('refresh_permission_materialized_views()');
-- Refreshes both materialized views without blocking their readers; one without data has none to block. Each view
-- stamps itself: see hallpass.stamp. Returns a sentence to show, with the time it took.
CREATE FUNCTION public.refresh_permission_materialized_views() RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    began CONSTANT timestamptz := clock_timestamp();
BEGIN
    -- In the order in which everything of hallpass asks for them; a query's own order is its plan's.
    LOCK TABLE public.organizations IN ACCESS SHARE MODE;
    CALL hallpass.lock_against_truncate();
    IF hallpass.is_populated('public.user_permission_matrix') THEN
        REFRESH MATERIALIZED VIEW CONCURRENTLY public.user_permission_matrix;
    ELSE
        REFRESH MATERIALIZED VIEW public.user_permission_matrix;
    END IF;
    IF hallpass.is_populated('public.org_permission_summary') THEN
        REFRESH MATERIALIZED VIEW CONCURRENTLY public.org_permission_summary;
    ELSE
        REFRESH MATERIALIZED VIEW public.org_permission_summary;
    END IF;
    RETURN format('Refreshed user_permission_matrix and org_permission_summary in %s s.',
                  round(extract(epoch FROM clock_timestamp() - began)::numeric, 3));
END $$;

-- Those that were replaced in place are there already.
INSERT INTO hallpass.public_object VALUES
    ('effective_user_permissions'), ('user_permission_matrix'), ('org_permission_summary'),
    ('user_has_permission_in_org'), ('user_has_org_permission'), ('user_has_org_permission_enhanced'),
    ('get_user_permissions_bulk'), ('set_session_variables'), ('refresh_permission_materialized_views')
ON CONFLICT DO NOTHING;
INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_service', 'EXECUTE', 'ROUTINE public.refresh_permission_materialized_views()');

CALL hallpass.reset_privileges();
