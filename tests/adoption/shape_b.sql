-- Shape B: a profile is a user, who has one organization at most. Run by pto_owner.

CREATE TABLE profiles (
    id uuid PRIMARY KEY REFERENCES auth.users (id) ON DELETE CASCADE,
    org_id uuid REFERENCES organizations ON DELETE CASCADE,
    email text NOT NULL,
    full_name text,
    role text NOT NULL
        CHECK (role IN ('admin', 'board_member', 'committee_lead', 'volunteer', 'parent_member', 'teacher')),
    phone text,
    avatar_url text,
    is_active boolean DEFAULT true,
    last_login timestamp,
    created_at timestamp DEFAULT now(),
    updated_at timestamp DEFAULT now(),
    UNIQUE (email, org_id)
);

-- Its scripts are the newer ones.
ALTER TABLE organizations ADD type text, ADD subdomain text, ADD school_id uuid, ADD district_id uuid;
ALTER TABLE organization_permission_templates ADD UNIQUE (permission_key);
