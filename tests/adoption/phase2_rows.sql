-- Rows of the audit log, beside those that shape A's trigger has made, and both views of this moment. Run by pto_owner,
-- with names as in rows.sql.

INSERT INTO permission_audit_log
    (org_id, permission_key, changed_by, old_values, new_values, change_type, ip_address, request_id, created_at)
VALUES
    (:lincoln, 'can_send_emails', :ann, NULL, jsonb_build_object('is_enabled', false), 'CREATE', '192.0.2.7', 'r-1',
     '2025-01-15'),
    (:lincoln, 'can_send_emails', :ann, jsonb_build_object('is_enabled', false), NULL, 'RESET', NULL, NULL,
     '2025-02-15'),
    (:franklin, 'can_view_budget', NULL, NULL, jsonb_build_object('count', 12), 'BULK_UPDATE', NULL, NULL,
     '2025-03-15'),
    (:franklin, 'can_approve_expenses', :dan, jsonb_build_object('min_role_required', 'admin'),
     jsonb_build_object('min_role_required', 'volunteer'), 'UPDATE', NULL, NULL, '2025-04-15');

SELECT refresh_permission_materialized_views();
