//! Changes that are refused, and what comes between them: nothing is changed, and the caller hears why.

use std::time::Duration;

use hallpass_client::tonic::Code;
use tonic_types::StatusExt;

use crate::{
    admin::{
        Administrator, Change, VIEW_BUDGET, bulk, changes, delete_template, grant, put_member,
        put_template, reason, remove_member, reset, revoke, set, setting, start,
    },
    database::{Database, eventually},
    names::id,
    server::{APPROVE, Server, config, fill, head, run_sql, within},
    sql::value,
};

/// Sessions of the admin API that wait for a lock of somebody else's.
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND usename = 'hallpass_admin' AND wait_event_type = 'Lock'";

/// A change that is refused unless what it changes is as it was read.
fn expecting(mut change: Change, expected: Option<prost_types::Timestamp>) -> Change {
    match &mut change {
        Change::Set(request) => request.expected_updated_at = expected,
        Change::Reset(request) => request.expected_updated_at = expected,
        Change::PutTemplate(request) => request.expected_updated_at = expected,
        Change::DeleteTemplate(request) => request.expected_updated_at = expected,
        other => panic!("{other:?} expects nothing"),
    }
    change
}

#[tokio::test]
async fn a_lost_update_is_refused() {
    let (_database, client, server, mut administrator) = start().await;
    // Read without a setting of its own, then with one.
    for own in [false, true] {
        let read = administrator.setting(APPROVE).await;
        assert_eq!(read.has_own_setting, own);
        run_sql(
            &client,
            "INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
             VALUES (:lincoln, 'can_approve_expenses', 'admin')
             ON CONFLICT (org_id, permission_key) DO UPDATE SET is_enabled = false, updated_at = clock_timestamp();
             UPDATE organization_permission_templates SET permission_name = 'Approve', updated_at = clock_timestamp()
             WHERE permission_key = 'can_approve_expenses'",
        )
        .await;
        let before = head(&client).await;
        for late in [
            set(APPROVE, "teacher", true, &[]),
            reset(APPROVE),
            put_template(APPROVE, "teacher"),
            delete_template(APPROVE),
        ] {
            let late = expecting(late, read.updated_at);
            for validate_only in [true, false] {
                let refused = administrator.call(late.clone(), validate_only).await;
                let refused = refused.unwrap_err();
                assert_eq!(refused.code(), Code::Aborted, "{late:?}");
                assert_eq!(reason(&refused), "UPDATED_MEANWHILE", "{late:?}");
                // It would be refused again.
                assert!(refused.get_details_retry_info().is_none());
            }
        }
        assert_eq!(head(&client).await, before);
    }
    let present = administrator.setting(APPROVE).await;
    assert_eq!(
        (&*present.effective_min_role, present.enabled),
        ("admin", false)
    );
    let in_time = set(APPROVE, "teacher", true, &[]);
    let in_time = expecting(in_time, present.updated_at);
    administrator.make(in_time.clone()).await.unwrap();
    let made = administrator.setting(APPROVE).await;
    assert_eq!(made.effective_min_role, "teacher");
    let again = administrator.make(in_time).await.unwrap_err();
    assert_eq!(reason(&again), "UPDATED_MEANWHILE");
    let reset = expecting(reset(APPROVE), made.updated_at);
    administrator.make(reset).await.unwrap();
    assert!(!administrator.setting(APPROVE).await.has_own_setting);
    server.stop().await;
}

#[tokio::test]
async fn a_setting_that_comes_meanwhile_is_not_overwritten() {
    let (database, client, server, mut administrator) = start().await;
    let read = administrator.setting(APPROVE).await;
    let watcher = database.client().await;
    run_sql(
        &client,
        "BEGIN; INSERT INTO organization_permissions (org_id, permission_key, is_enabled)
         VALUES (:lincoln, 'can_approve_expenses', false)",
    )
    .await;
    let late = expecting(set(APPROVE, "volunteer", true, &[]), read.updated_at);
    let waits = tokio::spawn(async move { administrator.make(late).await });
    eventually("the change waits", async || {
        value(&watcher, WAITING).await == "1"
    })
    .await;
    run_sql(&client, "COMMIT").await;
    let refused = waits.await.unwrap().unwrap_err();
    assert_eq!(reason(&refused), "UPDATED_MEANWHILE");
    let mut administrator = Administrator::of(&server);
    assert!(!administrator.setting(APPROVE).await.enabled);
    server.stop().await;
}

#[tokio::test]
async fn a_change_that_nobody_waits_for_is_taken_back() {
    let (database, client, server, mut administrator) = start().await;
    let first = set(APPROVE, "admin", true, &[]);
    administrator.make(first).await.unwrap();
    let before = head(&client).await;
    let watcher = database.client().await;
    let lock = "BEGIN; SELECT FROM organization_permissions FOR UPDATE";
    run_sql(&client, lock).await;
    administrator.timeout = Some(Duration::from_secs(1));
    let waits = tokio::spawn(async move {
        let change = set(APPROVE, "volunteer", true, &[]);
        administrator.make(change).await
    });
    eventually("the change waits", async || {
        value(&watcher, WAITING).await == "1"
    })
    .await;
    let status = waits.await.unwrap().unwrap_err();
    // By the client's timer, or the service's.
    let ended = [Code::DeadlineExceeded, Code::Cancelled];
    assert!(ended.contains(&status.code()), "{status:?}");
    // Long before its statement's own time is up.
    let gone = eventually("the change waits no more", async || {
        value(&watcher, WAITING).await == "0"
    });
    within("the change is given up", Duration::from_secs(2), gone).await;
    run_sql(&client, "COMMIT").await;
    // A change of the same row, behind whatever was left of the other.
    let mut administrator = Administrator::of(&server);
    let next = set(APPROVE, "board_member", true, &[]);
    administrator.make(next).await.unwrap();
    let entries = format!("SELECT count(*) FROM hallpass.log WHERE seq > {before}");
    assert_eq!(value(&client, &entries).await, "1");
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_made_changes_nothing_and_says_why() {
    let (_database, client, server, mut administrator) = start().await;
    let elsewhere = |change: Change| match change {
        Change::Set(mut request) => {
            request.organization_id = id("nowhere").to_string();
            Change::Set(request)
        }
        other => other,
    };
    let long = vec!["ann"; 10_001];
    let cases = [
        (
            elsewhere(set(APPROVE, "", true, &[])),
            Code::NotFound,
            "ORGANIZATION_NOT_FOUND",
        ),
        (
            set("can_fly", "", true, &[]),
            Code::NotFound,
            "PERMISSION_NOT_FOUND",
        ),
        (
            set(APPROVE, "king", true, &[]),
            Code::InvalidArgument,
            "ROLE_UNKNOWN",
        ),
        (
            set(APPROVE, "", true, &long),
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
        (
            set("", "", true, &[]),
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
        (grant("eve", APPROVE), Code::NotFound, "MEMBER_NOT_FOUND"),
        (
            grant("ann", "can_fly"),
            Code::NotFound,
            "PERMISSION_NOT_FOUND",
        ),
        (remove_member("eve"), Code::NotFound, "MEMBER_NOT_FOUND"),
        (
            put_member("eve", "king"),
            Code::InvalidArgument,
            "ROLE_UNKNOWN",
        ),
        (
            delete_template("can_fly"),
            Code::NotFound,
            "PERMISSION_NOT_FOUND",
        ),
        (
            put_template("can_fly", "king"),
            Code::InvalidArgument,
            "ROLE_UNKNOWN",
        ),
        (bulk(&[]), Code::InvalidArgument, "INVALID_REQUEST"),
        (
            bulk(&[
                (APPROVE, setting("", true, &[])),
                (APPROVE, setting("", true, &[])),
            ]),
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
        // The second one fails: the first is not made either.
        (
            bulk(&[
                (APPROVE, setting("admin", true, &[])),
                ("can_fly", setting("", true, &[])),
            ]),
            Code::NotFound,
            "PERMISSION_NOT_FOUND",
        ),
    ];
    let before = head(&client).await;
    for (change, code, said) in cases {
        let status = administrator.make(change.clone()).await.unwrap_err();
        assert_eq!(status.code(), code, "{change:?}: {status:?}");
        assert_eq!(reason(&status), said, "{change:?}");
    }
    assert_eq!(head(&client).await, before);
    server.stop().await;
}

#[tokio::test]
async fn what_is_there_already_is_no_change() {
    let (_database, client, server, mut administrator) = start().await;
    administrator.make(grant("pat", APPROVE)).await.unwrap();
    let before = head(&client).await;
    for change in [
        grant("pat", APPROVE),
        revoke("vic", APPROVE),
        put_member("bob", "board_member"),
        reset(VIEW_BUDGET),
    ] {
        administrator.make(change.clone()).await.unwrap();
        assert_eq!(head(&client).await, before, "{change:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn without_a_login_that_may_change_something_nothing_is_changed() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let mut administrator = Administrator::of(&server);
    let before = head(&client).await;
    for change in changes() {
        let status = administrator.make(change).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(reason(&status), "ADMIN_DISABLED");
    }
    assert_eq!(head(&client).await, before);
    // Reading needs no such login.
    assert!(!administrator.setting(APPROVE).await.has_own_setting);
    server.stop().await;
}
