-- The rest of Phase 2 in shape A: indexes that hold the names, and the trigger that fills the audit log.

CREATE INDEX IF NOT EXISTS idx_profiles_permission_lookup
    ON profiles (org_id, role) INCLUDE (user_id, first_name, last_name, email);
CREATE INDEX IF NOT EXISTS idx_profiles_user_org ON profiles (user_id, org_id) INCLUDE (role, first_name, last_name);

CREATE FUNCTION log_permission_changes() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    org uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.org_id ELSE NEW.org_id END;
    key text := CASE WHEN TG_OP = 'DELETE' THEN OLD.permission_key ELSE NEW.permission_key END;
BEGIN
    INSERT INTO permission_audit_log
        (org_id, permission_key, changed_by, changed_by_profile_id, old_values, new_values, change_type,
         ip_address, user_agent, request_id)
    VALUES (org, key,
            nullif(current_setting('app.current_user_id', true), '')::uuid,
            nullif(current_setting('app.current_profile_id', true), '')::uuid,
            CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END,
            CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END,
            CASE TG_OP WHEN 'INSERT' THEN 'CREATE' ELSE TG_OP END,
            nullif(current_setting('app.current_ip', true), '')::inet,
            current_setting('app.current_user_agent', true),
            current_setting('app.current_request_id', true));
    RETURN NULL;
END $$;
CREATE TRIGGER permission_audit_trigger AFTER INSERT OR UPDATE OR DELETE ON organization_permissions
    FOR EACH ROW EXECUTE FUNCTION log_permission_changes();
