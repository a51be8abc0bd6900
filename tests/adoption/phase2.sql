-- Phase 2, what both shapes have of it. Run by pto_owner.
-- `:user` is the column of profiles that is the user, `:names` the columns of its names, each after a comma, or none.

CREATE INDEX IF NOT EXISTS idx_org_permissions_lookup
    ON organization_permissions (org_id, permission_key, is_enabled);
CREATE INDEX IF NOT EXISTS idx_org_permissions_composite
    ON organization_permissions (org_id, permission_key, is_enabled, min_role_required);
CREATE INDEX IF NOT EXISTS idx_org_permissions_key_enabled
    ON organization_permissions (permission_key, is_enabled) WHERE is_enabled = true;
CREATE INDEX IF NOT EXISTS idx_org_permissions_org_enabled
    ON organization_permissions (org_id, is_enabled) INCLUDE (permission_key, min_role_required);
CREATE INDEX IF NOT EXISTS idx_profiles_org_role ON profiles (org_id, role, :user);
CREATE INDEX IF NOT EXISTS idx_profiles_role_org ON profiles (role, org_id) WHERE org_id IS NOT NULL;
-- Does nothing: the first index of this name, on module_name alone, is there.
CREATE INDEX IF NOT EXISTS idx_permission_templates_module
    ON organization_permission_templates (module_name, permission_key);
CREATE INDEX IF NOT EXISTS idx_permission_templates_key
    ON organization_permission_templates (permission_key) INCLUDE (module_name, permission_name, default_min_role);
CREATE INDEX IF NOT EXISTS idx_permission_templates_module_role
    ON organization_permission_templates (module_name, default_min_role);

CREATE TABLE permission_audit_log (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES organizations ON DELETE CASCADE,
    permission_key text NOT NULL,
    changed_by uuid REFERENCES auth.users ON DELETE SET NULL,
    changed_by_profile_id uuid REFERENCES profiles ON DELETE SET NULL,
    old_values jsonb,
    new_values jsonb,
    change_type text NOT NULL CHECK (change_type IN ('CREATE', 'UPDATE', 'DELETE', 'RESET', 'BULK_UPDATE')),
    ip_address inet,
    user_agent text,
    request_id text,
    session_id text,
    created_at timestamptz DEFAULT now()
);
CREATE INDEX idx_permission_audit_org_time ON permission_audit_log (org_id, created_at DESC);
CREATE INDEX idx_permission_audit_permission_time ON permission_audit_log (permission_key, created_at DESC);
CREATE INDEX idx_permission_audit_user_time ON permission_audit_log (changed_by, created_at DESC)
    WHERE changed_by IS NOT NULL;
CREATE INDEX idx_permission_audit_change_type ON permission_audit_log (change_type, created_at DESC);

CREATE MATERIALIZED VIEW org_permission_summary AS
    SELECT o.id AS org_id, o.name AS org_name,
           count(t.id) AS total_available_permissions,
           count(p.id) AS total_custom_permissions,
           count(p.id) FILTER (WHERE p.is_enabled = true) AS enabled_custom_permissions,
           count(p.id) FILTER (WHERE p.is_enabled = false) AS disabled_custom_permissions,
           count(p.id) FILTER (WHERE p.min_role_required = 'admin') AS admin_only_permissions,
           count(p.id) FILTER (WHERE p.min_role_required = 'board_member') AS board_member_permissions,
           count(p.id) FILTER (WHERE p.min_role_required = 'committee_lead') AS committee_lead_permissions,
           count(p.id) FILTER (WHERE p.min_role_required = 'volunteer') AS volunteer_permissions,
           max(p.updated_at) AS last_permission_update,
           now() AS summary_generated_at
    FROM organizations o
    CROSS JOIN organization_permission_templates t
    LEFT JOIN organization_permissions p ON p.org_id = o.id AND p.permission_key = t.permission_key
    GROUP BY o.id, o.name;
CREATE UNIQUE INDEX idx_org_permission_summary_org_id ON org_permission_summary (org_id);
CREATE INDEX idx_org_permission_summary_last_update ON org_permission_summary (last_permission_update);

-- Forgets specific_users. No unique index: it cannot be refreshed CONCURRENTLY.
CREATE MATERIALIZED VIEW user_permission_matrix AS
    SELECT m.:user AS user_id, m.org_id, m.role:names, t.module_name, t.permission_key, t.permission_name,
           coalesce(p.min_role_required, t.default_min_role) AS effective_min_role,
           coalesce(p.is_enabled, true) AS is_enabled,
           coalesce(p.is_enabled, true)
               AND pto_rank(m.role) >= pto_rank(coalesce(p.min_role_required, t.default_min_role))
               AS user_has_permission,
           now() AS matrix_generated_at
    FROM profiles m
    CROSS JOIN organization_permission_templates t
    LEFT JOIN organization_permissions p ON p.org_id = m.org_id AND p.permission_key = t.permission_key
    WHERE m.org_id IS NOT NULL;
CREATE INDEX idx_user_permission_matrix_user_org ON user_permission_matrix (user_id, org_id);
CREATE INDEX idx_user_permission_matrix_org_permission ON user_permission_matrix (org_id, permission_key);
CREATE INDEX idx_user_permission_matrix_user_permission ON user_permission_matrix (user_id, permission_key);
CREATE INDEX idx_user_permission_matrix_module ON user_permission_matrix (org_id, module_name);

-- The cache is the matrix, however old.
CREATE FUNCTION user_has_org_permission_enhanced(
    user_id_param uuid, permission_key_param text, use_cache boolean DEFAULT true) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    cached boolean;
BEGIN
    IF use_cache THEN
        SELECT user_has_permission INTO cached FROM user_permission_matrix
        WHERE user_id = user_id_param AND permission_key = permission_key_param;
    END IF;
    RETURN coalesce(cached, user_has_org_permission(user_id_param, permission_key_param::varchar));
END $$;

CREATE FUNCTION get_user_permissions_bulk(user_id_param uuid, module_filter text DEFAULT NULL)
RETURNS TABLE (permission_key text, module_name text, permission_name text, has_permission boolean,
               effective_min_role text, is_enabled boolean)
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    RETURN QUERY
    SELECT m.permission_key::text, m.module_name::text, m.permission_name::text, m.user_has_permission,
           m.effective_min_role::text, m.is_enabled
    FROM user_permission_matrix m
    WHERE m.user_id = user_id_param AND (module_filter IS NULL OR m.module_name = module_filter);
END $$;

-- For the session, not the transaction: the next user of a pooled connection is taken for this one.
CREATE FUNCTION set_session_variables(
    user_id uuid, profile_id uuid, org_id uuid,
    request_id text DEFAULT NULL, ip_address text DEFAULT NULL, user_agent text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM set_config('app.current_user_id', user_id::text, false),
            set_config('app.current_profile_id', profile_id::text, false),
            set_config('app.current_org_id', org_id::text, false),
            set_config('app.current_request_id', request_id, false),
            set_config('app.current_ip', ip_address, false),
            set_config('app.current_user_agent', user_agent, false);
END $$;

CREATE FUNCTION analyze_permission_performance()
RETURNS TABLE (metric_name text, metric_value numeric, metric_unit text, recommendation text)
LANGUAGE sql SECURITY DEFINER AS $$
    SELECT 'audit_log_rows', count(*)::numeric, 'rows', 'Archive old rows' FROM permission_audit_log
$$;

CREATE FUNCTION refresh_permission_materialized_views() RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    REFRESH MATERIALIZED VIEW org_permission_summary;
    REFRESH MATERIALIZED VIEW user_permission_matrix;
    RETURN 'refreshed';
END $$;

CREATE FUNCTION cleanup_old_audit_logs(retention_days integer DEFAULT 365) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    DELETE FROM permission_audit_log WHERE created_at < now() - make_interval(days => retention_days);
    RETURN 'cleaned up';
END $$;
