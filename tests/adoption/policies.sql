-- Phase 1, over either shape: the first indexes of profiles, the functions, row-level security. Run by pto_owner.
-- `:user` is the column of profiles that is the user.

CREATE INDEX idx_profiles_org_id ON profiles (org_id);
CREATE INDEX idx_profiles_role ON profiles (role);
CREATE TRIGGER update_profiles_updated_at BEFORE UPDATE ON profiles
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();

-- The ladder is code here, and whatever it does not know is at its foot.
CREATE FUNCTION pto_rank(role text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE role WHEN 'admin' THEN 4 WHEN 'board_member' THEN 3 WHEN 'committee_lead' THEN 2
                     WHEN 'volunteer' THEN 1 ELSE 0 END
$$;

CREATE FUNCTION get_user_org_id() RETURNS uuid LANGUAGE sql STABLE SECURITY DEFINER AS $$
    SELECT org_id FROM profiles WHERE :user = auth.uid() LIMIT 1
$$;

CREATE FUNCTION user_has_min_role(required text) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER AS $$
    SELECT pto_rank(role) >= pto_rank(required) FROM profiles WHERE :user = auth.uid() LIMIT 1
$$;

-- A permission without a template needs no role: everybody has it.
CREATE FUNCTION user_has_org_permission(user_id_param uuid, permission_key_param varchar(100)) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    member record;
    setting record;
    needed text;
BEGIN
    SELECT org_id, role INTO member FROM profiles WHERE :user = user_id_param LIMIT 1;
    IF member.org_id IS NULL THEN
        RETURN false;
    END IF;
    SELECT min_role_required, is_enabled, specific_users INTO setting FROM organization_permissions
    WHERE org_id = member.org_id AND permission_key = permission_key_param;
    IF setting.is_enabled = false THEN
        RETURN false;
    END IF;
    SELECT default_min_role INTO needed FROM organization_permission_templates
    WHERE permission_key = permission_key_param;
    RETURN coalesce(user_id_param = ANY (setting.specific_users), false)
        OR pto_rank(member.role) >= pto_rank(coalesce(setting.min_role_required, needed));
END $$;

ALTER TABLE profiles ENABLE ROW LEVEL SECURITY;
ALTER TABLE organization_permission_templates ENABLE ROW LEVEL SECURITY;
ALTER TABLE organization_permissions ENABLE ROW LEVEL SECURITY;
ALTER TABLE transactions ENABLE ROW LEVEL SECURITY;
ALTER TABLE events ENABLE ROW LEVEL SECURITY;

CREATE POLICY "members see their organization" ON profiles
    FOR SELECT TO authenticated USING (org_id = get_user_org_id());
CREATE POLICY "templates are readable" ON organization_permission_templates
    FOR SELECT TO authenticated USING (true);
-- FOR ALL would let every member write: policies are joined by OR, so the others are restrictive.
CREATE POLICY "members see their organization's permissions" ON organization_permissions
    FOR ALL TO authenticated USING (org_id = get_user_org_id());
CREATE POLICY "admins insert permissions" ON organization_permissions
    AS RESTRICTIVE FOR INSERT TO authenticated WITH CHECK (user_has_min_role('admin'));
CREATE POLICY "admins update permissions" ON organization_permissions
    AS RESTRICTIVE FOR UPDATE TO authenticated USING (user_has_min_role('admin'));
CREATE POLICY "admins delete permissions" ON organization_permissions
    AS RESTRICTIVE FOR DELETE TO authenticated USING (user_has_min_role('admin'));
CREATE POLICY "transactions are read by who may" ON transactions
    FOR SELECT TO authenticated
    USING (org_id = get_user_org_id() AND user_has_org_permission(auth.uid(), 'can_view_budget'));
CREATE POLICY "transactions are made by who may" ON transactions
    FOR INSERT TO authenticated
    WITH CHECK (org_id = get_user_org_id() AND user_has_org_permission(auth.uid(), 'can_create_budget_items'));
CREATE POLICY "events are for who may" ON events
    FOR ALL TO authenticated
    USING (org_id = get_user_org_id() AND user_has_org_permission(auth.uid(), 'can_view_events'));
