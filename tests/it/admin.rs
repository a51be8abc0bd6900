//! Changes through the API: what they do to answers and tables, who is said to have made them, what trying one shows.

use std::collections::BTreeSet;

use hallpass_client::{
    tonic::{Code, Request, Status, transport::Channel},
    v1::{
        Actor, BulkSetItem, BulkSetOrganizationPermissionsRequest, ChangeOutcome, Consistency,
        DeletePermissionTemplateRequest, GrantUserPermissionRequest,
        ListOrganizationPermissionsRequest, OrganizationPermission, PermissionEffect,
        PermissionSetting, PutMemberRequest, PutPermissionTemplateRequest, RemoveMemberRequest,
        ResetOrganizationPermissionRequest, RevokeUserPermissionRequest,
        SetOrganizationPermissionRequest, admin_service_client::AdminServiceClient,
        consistency::Requirement,
    },
};
use tokio_postgres::Client;
use tonic_types::StatusExt;

use crate::{
    database::{Database, as_role},
    names::id,
    server::{APPROVE, MEMBERS, ORGANIZATIONS, Server, config, fill, head, question},
};

const VIEW_BUDGET: &str = "can_view_budget";

/// A change, by the name of its call.
#[derive(Clone, Debug)]
enum Change {
    Set(SetOrganizationPermissionRequest),
    Bulk(BulkSetOrganizationPermissionsRequest),
    Reset(ResetOrganizationPermissionRequest),
    PutMember(PutMemberRequest),
    RemoveMember(RemoveMemberRequest),
    Grant(GrantUserPermissionRequest),
    Revoke(RevokeUserPermissionRequest),
    PutTemplate(PutPermissionTemplateRequest),
    DeleteTemplate(DeletePermissionTemplateRequest),
}

struct Administrator(AdminServiceClient<Channel>);

macro_rules! call {
    ($client:expr, $call:ident, $request:expr, $validate:expr) => {{
        let mut request = $request;
        request.validate_only = $validate;
        request.actor.get_or_insert_with(actor);
        let mut request = Request::new(request);
        let metadata = request.metadata_mut();
        metadata.insert("x-request-id", "request 7".parse().unwrap());
        metadata.insert("traceparent", TRACE_PARENT.parse().unwrap());
        $client.$call(request).await?.into_inner().outcome.unwrap()
    }};
}

const TRACE_PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn actor() -> Actor {
    Actor {
        user_id: id("ann").to_string(),
        profile_id: String::new(),
        ip_address: "2001:db8::7".to_owned(),
        user_agent: "the admin's browser".to_owned(),
        session_id: "session 3".to_owned(),
    }
}

impl Administrator {
    async fn make(&mut self, change: Change) -> Result<ChangeOutcome, Status> {
        self.call(change, false).await
    }

    async fn call(&mut self, change: Change, validate: bool) -> Result<ChangeOutcome, Status> {
        let client = &mut self.0;
        Ok(match change {
            Change::Set(r) => call!(client, set_organization_permission, r, validate),
            Change::Bulk(r) => call!(client, bulk_set_organization_permissions, r, validate),
            Change::Reset(r) => call!(client, reset_organization_permission, r, validate),
            Change::PutMember(r) => call!(client, put_member, r, validate),
            Change::RemoveMember(r) => call!(client, remove_member, r, validate),
            Change::Grant(r) => call!(client, grant_user_permission, r, validate),
            Change::Revoke(r) => call!(client, revoke_user_permission, r, validate),
            Change::PutTemplate(r) => call!(client, put_permission_template, r, validate),
            Change::DeleteTemplate(r) => call!(client, delete_permission_template, r, validate),
        })
    }

    /// What the organization's list says of one permission.
    async fn setting(&mut self, permission: &str) -> OrganizationPermission {
        let request = ListOrganizationPermissionsRequest {
            organization_id: lincoln(),
            ..ListOrganizationPermissionsRequest::default()
        };
        let listed = self.0.list_organization_permissions(request).await;
        let listed = listed.unwrap().into_inner().permissions;
        let found = listed.into_iter().find(|p| p.permission == permission);
        found.unwrap()
    }
}

fn lincoln() -> String {
    id("lincoln").to_string()
}

fn set(permission: &str, min_role: &str, enabled: bool, users: &[&str]) -> Change {
    Change::Set(SetOrganizationPermissionRequest {
        organization_id: lincoln(),
        permission: permission.to_owned(),
        setting: Some(setting(min_role, enabled, users)),
        ..SetOrganizationPermissionRequest::default()
    })
}

fn setting(min_role: &str, enabled: bool, users: &[&str]) -> PermissionSetting {
    PermissionSetting {
        min_role: min_role.to_owned(),
        enabled: Some(enabled),
        specific_user_ids: users.iter().map(|user| id(user).to_string()).collect(),
    }
}

fn reset(permission: &str) -> Change {
    Change::Reset(ResetOrganizationPermissionRequest {
        organization_id: lincoln(),
        permission: permission.to_owned(),
        ..ResetOrganizationPermissionRequest::default()
    })
}

fn bulk(items: &[(&str, PermissionSetting)]) -> Change {
    let item = |(permission, setting): &(&str, PermissionSetting)| BulkSetItem {
        permission: (*permission).to_owned(),
        setting: Some(setting.clone()),
        expected_updated_at: None,
    };
    Change::Bulk(BulkSetOrganizationPermissionsRequest {
        organization_id: lincoln(),
        items: items.iter().map(item).collect(),
        ..BulkSetOrganizationPermissionsRequest::default()
    })
}

fn put_member(user: &str, role: &str) -> Change {
    Change::PutMember(PutMemberRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        role: role.to_owned(),
        ..PutMemberRequest::default()
    })
}

fn remove_member(user: &str) -> Change {
    Change::RemoveMember(RemoveMemberRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        ..RemoveMemberRequest::default()
    })
}

fn grant(user: &str, permission: &str) -> Change {
    Change::Grant(GrantUserPermissionRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        permission: permission.to_owned(),
        ..GrantUserPermissionRequest::default()
    })
}

fn revoke(user: &str, permission: &str) -> Change {
    Change::Revoke(RevokeUserPermissionRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        permission: permission.to_owned(),
        ..RevokeUserPermissionRequest::default()
    })
}

fn put_template(permission: &str, min_role: &str) -> Change {
    Change::PutTemplate(PutPermissionTemplateRequest {
        permission: permission.to_owned(),
        name: "A permission".to_owned(),
        description: "What it is for".to_owned(),
        module: "finance".to_owned(),
        default_min_role: min_role.to_owned(),
        ..PutPermissionTemplateRequest::default()
    })
}

fn delete_template(permission: &str) -> Change {
    Change::DeleteTemplate(DeletePermissionTemplateRequest {
        permission: permission.to_owned(),
        ..DeletePermissionTemplateRequest::default()
    })
}

async fn start() -> (Database, Client, Server, Administrator) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let mut config = config(&database.url);
    config.admin_database = Some(as_role(&database.url, "hallpass_admin").parse().unwrap());
    let server = Server::start(config).await;
    let administrator = Administrator(AdminServiceClient::new(server.channel.clone()));
    (database, client, server, administrator)
}

/// The reason of a status, by its details.
fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

/// Each kind of change, in an order in which each has something to do.
fn changes() -> Vec<Change> {
    vec![
        set(APPROVE, "volunteer", true, &[]),
        set(APPROVE, "", false, &["pat"]),
        bulk(&[
            (APPROVE, setting("admin", true, &["pat", "vic"])),
            (VIEW_BUDGET, setting("admin", true, &[])),
        ]),
        revoke("vic", APPROVE),
        grant("cam", APPROVE),
        put_member("eve", "admin"),
        put_member("bob", "volunteer"),
        remove_member("eve"),
        reset(APPROVE),
        put_template("can_do_something_new", "volunteer"),
        put_template(APPROVE, "admin"),
        delete_template("can_do_something_new"),
    ]
}

/// Everything that everybody may, by SQL.
async fn holdings(client: &Client) -> BTreeSet<(String, String, String)> {
    let sql = "SELECT org_id::text, permission_key::text, user_id::text
               FROM effective_user_permissions WHERE user_has_permission";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|r| (r.get(0), r.get(1), r.get(2)))
        .collect()
}

type Holdings = BTreeSet<(String, String, String)>;

/// The effects that turn the one into the other, as the API gives them.
fn difference(before: &Holdings, after: &Holdings) -> Vec<PermissionEffect> {
    let pairs: BTreeSet<(String, String)> = (before.symmetric_difference(after))
        .map(|(organization, permission, _)| (organization.clone(), permission.clone()))
        .collect();
    let users = |of: &Holdings, without: &Holdings, pair: &(String, String)| -> Vec<String> {
        of.difference(without)
            .filter(|(organization, permission, _)| {
                (organization, permission) == (&pair.0, &pair.1)
            })
            .map(|(_, _, user)| user.clone())
            .collect()
    };
    pairs
        .into_iter()
        .map(|pair| {
            let gaining = users(after, before, &pair);
            let losing = users(before, after, &pair);
            PermissionEffect {
                organization_id: pair.0,
                permission: pair.1,
                gained: gaining.len().try_into().unwrap(),
                lost: losing.len().try_into().unwrap(),
                gaining_user_ids: gaining,
                losing_user_ids: losing,
            }
        })
        .collect()
}

#[tokio::test]
async fn a_try_shows_what_the_change_then_does_and_leaves_no_trace() {
    let (_database, client, server, mut administrator) = start().await;
    for change in changes() {
        let (before, head_before) = (holdings(&client).await, head(&client).await);
        let tried = administrator.call(change.clone(), true).await.unwrap();
        assert_eq!(tried.position, "");
        assert_eq!(holdings(&client).await, before, "{change:?}");
        assert_eq!(head(&client).await, head_before, "{change:?}");
        let left = "SELECT count(*) FROM hallpass.log_pending
                    WHERE entry_id > (SELECT max(entry_id) FROM hallpass.log)";
        let left: i64 = client.query_one(left, &[]).await.unwrap().get(0);
        assert_eq!(left, 0, "{change:?}");
        let made = administrator.make(change.clone()).await.unwrap();
        assert!(made.effects.is_empty());
        let after = holdings(&client).await;
        assert_eq!(tried.effects, difference(&before, &after), "{change:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_check_at_a_change_s_position_sees_it() {
    let (_database, _client, server, mut administrator) = start().await;
    let questions = [
        (
            set(APPROVE, "volunteer", true, &[]),
            "vic",
            "allow GRANTED_BY_ROLE",
        ),
        (
            set(APPROVE, "", false, &[]),
            "ann",
            "deny PERMISSION_DISABLED",
        ),
        (reset(APPROVE), "ann", "allow GRANTED_BY_ROLE"),
        (grant("pat", APPROVE), "pat", "allow GRANTED_TO_USER"),
        (revoke("pat", APPROVE), "pat", "deny ROLE_TOO_LOW"),
        (put_member("eve", "admin"), "eve", "allow GRANTED_BY_ROLE"),
        (put_member("eve", "volunteer"), "eve", "deny ROLE_TOO_LOW"),
        (remove_member("eve"), "eve", "deny NOT_A_MEMBER"),
        (put_template(APPROVE, "admin"), "bob", "deny ROLE_TOO_LOW"),
        (delete_template(APPROVE), "ann", "deny UNKNOWN_PERMISSION"),
    ];
    for (change, user, said) in questions {
        // So that there is something stale to answer with.
        server.check("lincoln", user, APPROVE).await;
        let made = administrator.make(change.clone()).await.unwrap();
        let mut question = question("lincoln", user, APPROVE);
        question.consistency = Some(Consistency {
            requirement: Some(Requirement::AtLeastAsFresh(made.position)),
        });
        let answer = server.try_check(question).await.unwrap();
        assert_eq!(answer.said, said, "{change:?}");
    }
    // The other organization has its own settings.
    let other = server.check_now("franklin", "bob", VIEW_BUDGET).await;
    assert!(other.response.allowed);
    server.stop().await;
}

#[tokio::test]
async fn every_change_says_who_made_it_and_what_it_is() {
    let (_database, client, server, mut administrator) = start().await;
    for change in changes() {
        let before = head(&client).await;
        administrator.make(change.clone()).await.unwrap();
        let rows = client
            .query(
                "SELECT a.change_type, a.changed_by = $2 AND a.ip_address = '2001:db8::7'
                        AND a.user_agent = 'the admin''s browser' AND a.session_id = 'session 3'
                        AND a.request_id = 'request 7' AND a.trace_id = '4bf92f3577b34da6a3ce929d0e0e4736'
                        AND a.actor_source = 'SETTINGS' AND a.database_login = 'hallpass_admin'
                 FROM hallpass.log l JOIN permission_audit_log a USING (entry_id) WHERE l.seq > $1",
                &[&before, &id("ann")],
            )
            .await
            .unwrap();
        assert!(!rows.is_empty(), "{change:?}");
        for row in rows {
            assert!(row.get::<_, Option<bool>>(1).unwrap(), "{change:?}");
            let found: &str = row.get(0);
            match change {
                Change::Bulk(_) => assert_eq!(found, "BULK_UPDATE"),
                Change::Reset(_) => assert_eq!(found, "RESET"),
                _ => assert!(["INSERT", "UPDATE", "DELETE"].contains(&found), "{found}"),
            }
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_lost_update_is_refused() {
    let (_database, client, server, mut administrator) = start().await;
    let first = set(APPROVE, "volunteer", true, &[]);
    administrator.make(first).await.unwrap();
    let read = administrator.setting(APPROVE).await;
    assert!(read.has_own_setting);
    assert_eq!(read.effective_min_role, "volunteer");
    let update = "UPDATE organization_permissions SET min_role_required = 'admin', updated_at = clock_timestamp()";
    client.batch_execute(update).await.unwrap();
    let late = |min_role: &str, expected| {
        let Change::Set(mut request) = set(APPROVE, min_role, true, &[]) else {
            unreachable!()
        };
        request.expected_updated_at = expected;
        Change::Set(request)
    };
    for validate_only in [true, false] {
        let refused = administrator
            .call(late("teacher", read.updated_at), validate_only)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert_eq!(reason(&refused), "UPDATED_MEANWHILE");
    }
    let present = administrator.setting(APPROVE).await;
    assert_eq!(present.effective_min_role, "admin");
    administrator
        .make(late("teacher", present.updated_at))
        .await
        .unwrap();
    assert_eq!(
        administrator.setting(APPROVE).await.effective_min_role,
        "teacher"
    );
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
    let mut administrator = Administrator(AdminServiceClient::new(server.channel.clone()));
    let before = head(&client).await;
    for change in changes() {
        let status = administrator.make(change).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(reason(&status), "ADMIN_DISABLED");
    }
    assert_eq!(head(&client).await, before);
    // Reading needs no such login.
    assert!(!administrator.setting(APPROVE).await.has_own_setting);
    assert_eq!((MEMBERS.len(), ORGANIZATIONS.len()), (5, 2));
    server.stop().await;
}
