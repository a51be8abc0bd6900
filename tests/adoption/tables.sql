-- The tables that both shapes have in common. Run by pto_owner, before the shape's own.

CREATE FUNCTION update_updated_at_column() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END $$;

CREATE TABLE organizations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    slug text UNIQUE NOT NULL,
    signup_code text UNIQUE NOT NULL,
    subscription_status text DEFAULT 'trial',
    settings jsonb DEFAULT '{}',
    created_at timestamp DEFAULT now(),     -- without a time zone, here and in profiles
    updated_at timestamp DEFAULT now()
);

-- In the oldest script nothing keeps a permission_key from coming twice.
CREATE TABLE organization_permission_templates (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    module_name varchar(50) NOT NULL,
    permission_key varchar(100) NOT NULL,
    permission_name varchar(200) NOT NULL,
    permission_description text,
    default_min_role varchar(20) DEFAULT 'committee_lead',
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);

CREATE TABLE organization_permissions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES organizations ON DELETE CASCADE,
    permission_key varchar(100) NOT NULL,
    min_role_required varchar(20) NOT NULL,
    specific_users uuid[],
    is_enabled boolean DEFAULT true,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now(),
    UNIQUE (org_id, permission_key)
);

-- Two of the many tables whose policies ask for permissions.
CREATE TABLE transactions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES organizations ON DELETE CASCADE,
    description text,
    amount numeric(10, 2) NOT NULL
);

CREATE TABLE events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES organizations ON DELETE CASCADE,
    title text NOT NULL
);

CREATE INDEX idx_org_permissions_org_id ON organization_permissions (org_id);
CREATE INDEX idx_org_permissions_key ON organization_permissions (permission_key);
CREATE INDEX idx_permission_templates_module ON organization_permission_templates (module_name);

CREATE TRIGGER update_organizations_updated_at BEFORE UPDATE ON organizations
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
CREATE TRIGGER update_organization_permission_templates_updated_at BEFORE UPDATE ON organization_permission_templates
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
CREATE TRIGGER update_organization_permissions_updated_at BEFORE UPDATE ON organization_permissions
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
