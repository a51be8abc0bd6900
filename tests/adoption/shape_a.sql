-- Shape A: a profile has a user. Run by pto_owner.

CREATE TABLE profiles (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid,
    org_id uuid REFERENCES organizations ON DELETE SET NULL,
    role text,
    first_name text,
    last_name text,
    email text,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);
