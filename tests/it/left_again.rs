//! hallpass taken off PTO Connect's database again: what it had replaced is back, as it was.

use hallpass::store::migrations::uninstall;
use tokio_postgres::Client;

use crate::{
    database::{Shape, as_role},
    pto::{OWNER, Phase, Pto, adopt, resolve},
    sql::{lines, run},
};

/// All there is in `public`, with its privileges.
const PUBLIC: &str = "
SELECT format('%s %s %s %s %s', relkind, c.oid::regclass, pg_get_userbyid(relowner), relispopulated, relacl)
FROM pg_class c WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = indrelid
WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT format('%s %s', c.oid::regclass, pg_get_viewdef(c.oid)) FROM pg_class c
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'm')
UNION ALL SELECT format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT format('%s %s', tgenabled, pg_get_triggerdef(t.oid)) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
WHERE relnamespace = 'public'::regnamespace AND NOT tgisinternal
UNION ALL SELECT format('%s %s', proacl, pg_get_functiondef(oid)) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT p::text FROM pg_policies p
UNION ALL SELECT nspname FROM pg_namespace WHERE nspname LIKE 'hallpass%'
ORDER BY 1";

/// What stays: the ladder, and the audit rows with the partitions that they are in.
const STAYS: [&str; 9] = [
    "permission_roles",
    "hallpass_audit_log",
    "permission_audit_log_2",
    "permission_audit_log_default",
    "permission_audit_log_actor",
    "permission_audit_log_affected_user",
    "permission_audit_log_organization",
    "permission_audit_log_permission",
    "permission_audit_log_time",
];

#[tokio::test]
async fn leaving_brings_back_what_was_replaced() {
    for pto in Pto::ALL {
        let database = pto.found().await;
        let client = database.client().await;
        let before = public(&client).await;
        adopt(&database.url).await;
        override_of_madison(&client, pto, "can_send_emails").await;
        uninstall(&as_role(&database.url, OWNER).parse().unwrap(), |_| {})
            .await
            .unwrap();
        let mut after = public(&client).await;
        after.retain(|line| !STAYS.iter().any(|name| line.contains(name)));
        let gone: Vec<_> = before.iter().filter(|l| !after.contains(l)).collect();
        let come: Vec<_> = after.iter().filter(|l| !before.contains(l)).collect();
        assert!(
            gone.is_empty() && come.is_empty(),
            "{pto:?} {gone:#?} {come:#?}"
        );

        // And works: its views know the change of the meantime, its trigger records the next one.
        override_of_madison(&client, pto, "can_view_events").await;
        if pto.phase == Phase::Two {
            run(
                &client,
                "SET ROLE service_role; SELECT refresh_permission_materialized_views()",
            )
            .await;
            let counts =
                "SELECT total_custom_permissions FROM org_permission_summary ORDER BY org_name";
            assert_eq!(lines(&client, counts).await, ["2", "3", "2"], "{pto:?}");
            let audited = "SELECT count(*) FROM permission_audit_log WHERE permission_key = 'can_view_events'";
            let audited = lines(&client, audited).await;
            let expected = if pto.shape == Shape::A { "1" } else { "0" };
            assert_eq!(audited, [expected], "{pto:?}");
        }
    }
}

async fn public(client: &Client) -> Vec<String> {
    lines(client, PUBLIC).await
}

async fn override_of_madison(client: &Client, pto: Pto, permission: &str) {
    let insert = format!(
        "INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
         VALUES (:madison, '{permission}', 'admin')"
    );
    run(client, &resolve(pto.shape, &insert)).await;
}
