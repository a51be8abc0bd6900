-- Rows of the application, in either shape. Run by pto_owner. `:user` is the column of profiles that is the user; every
-- other word after a colon names an organization or a user, and stands for the id.

INSERT INTO organizations (id, name, slug, signup_code) VALUES
    (:lincoln, 'Lincoln PTO', 'lincoln', 'LIN-1'),
    (:franklin, 'Franklin PTA', 'franklin', 'FRA-1'),
    (:madison, 'Madison PTA', 'madison', 'MAD-1');    -- without members

INSERT INTO auth.users (id, email)
SELECT id, email FROM (VALUES
    (:ann::uuid, 'ann@example.org'), (:bob, 'bob@example.org'), (:cam, 'cam@example.org'), (:vic, 'vic@example.org'),
    (:pat, 'pat@example.org'), (:tia, 'tia@example.org'), (:dan, 'dan@example.org'), (:eve, 'eve@example.org'),
    (:lou, 'lou@example.org')) users (id, email);

INSERT INTO profiles (:user, org_id, role, email)
SELECT u.id, member.org_id, member.role, u.email
FROM (VALUES
    (:ann::uuid, :lincoln::uuid, 'admin'),
    (:bob, :lincoln, 'board_member'),
    (:cam, :lincoln, 'committee_lead'),
    (:vic, :lincoln, 'volunteer'),
    (:pat, :lincoln, 'parent_member'),
    (:tia, :lincoln, 'teacher'),
    (:dan, :franklin, 'admin'),
    (:eve, :franklin, 'volunteer'),
    (:lou, NULL, 'volunteer')) member (user_id, org_id, role)  -- of no organization any more
JOIN auth.users u ON u.id = member.user_id;

INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role) VALUES
    ('budget', 'can_view_budget', 'View Budget', 'volunteer'),
    ('budget', 'can_create_budget_items', 'Create Budget Items', 'committee_lead'),
    ('budget', 'can_approve_expenses', 'Approve Expenses', 'board_member'),
    ('communications', 'can_send_emails', 'Send Emails', 'board_member'),
    ('events', 'can_view_events', 'View Events', 'volunteer'),
    ('user_management', 'can_edit_user_roles', 'Edit User Roles', 'admin');

INSERT INTO organization_permissions (org_id, permission_key, min_role_required, is_enabled, specific_users) VALUES
    (:lincoln, 'can_create_budget_items', 'admin', true, NULL),                         -- raised
    (:lincoln, 'can_approve_expenses', 'board_member', true, ARRAY[:vic, :ann]::uuid[]),-- vic has it by name only
    (:lincoln, 'can_send_emails', 'board_member', false, ARRAY[:tia]::uuid[]),          -- disabled, for her too
    (:franklin, 'can_approve_expenses', 'volunteer', true, '{}'),                       -- lowered
    (:franklin, 'can_edit_user_roles', 'admin', true, ARRAY[:eve, :vic]::uuid[]),       -- vic is no member here
    (:franklin, 'can_fly_kites', 'volunteer', true, NULL);                              -- its template is gone

INSERT INTO transactions (org_id, description, amount) VALUES
    (:lincoln, 'Bake sale', 120.50), (:franklin, 'Bus', -80);
INSERT INTO events (org_id, title) VALUES (:lincoln, 'Spring fair'), (:franklin, 'Book fair');
