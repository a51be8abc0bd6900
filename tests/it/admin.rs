//! Changes through the API: what they do to answers and tables, who is said to have made them, what trying one shows.

use std::{collections::BTreeSet, time::Duration};

use hallpass::server::Config;
use hallpass_client::{
    tonic::{Request, Status, transport::Channel},
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
    server::{APPROVE, Server, config, fill, head, question},
};

pub(crate) const VIEW_BUDGET: &str = "can_view_budget";

/// A change, by the name of its call.
#[derive(Clone, Debug)]
pub(crate) enum Change {
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

/// Whoever makes changes, and what it says of itself.
pub(crate) struct Administrator {
    pub(crate) client: AdminServiceClient<Channel>,
    /// A key or a token; empty: none.
    pub(crate) credential: String,
    pub(crate) actor: Actor,
    pub(crate) timeout: Option<Duration>,
}

macro_rules! call {
    ($who:expr, $call:ident, $request:expr, $validate:expr) => {{
        let mut request = $request;
        request.validate_only = $validate;
        request.actor = Some($who.actor.clone());
        let request = $who.request(request);
        let answer = $who.client.$call(request).await?;
        answer.into_inner().outcome.unwrap()
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
    /// One with everything that an actor may have.
    pub(crate) fn of(server: &Server) -> Self {
        Self {
            client: AdminServiceClient::new(server.channel.clone()),
            credential: String::new(),
            actor: actor(),
            timeout: None,
        }
    }

    /// One of whom nothing is known but its key or token.
    pub(crate) fn with_credential(server: &Server, credential: &str) -> Self {
        Self {
            credential: credential.to_owned(),
            actor: Actor::default(),
            ..Self::of(server)
        }
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        let metadata = request.metadata_mut();
        metadata.insert("x-request-id", "request 7".parse().unwrap());
        metadata.insert("traceparent", TRACE_PARENT.parse().unwrap());
        if !self.credential.is_empty() {
            let bearer = format!("Bearer {}", self.credential).parse().unwrap();
            metadata.insert("authorization", bearer);
        }
        request
    }

    pub(crate) async fn make(&mut self, change: Change) -> Result<ChangeOutcome, Status> {
        self.call(change, false).await
    }

    pub(crate) async fn call(
        &mut self,
        change: Change,
        validate: bool,
    ) -> Result<ChangeOutcome, Status> {
        Ok(match change {
            Change::Set(r) => call!(self, set_organization_permission, r, validate),
            Change::Bulk(r) => call!(self, bulk_set_organization_permissions, r, validate),
            Change::Reset(r) => call!(self, reset_organization_permission, r, validate),
            Change::PutMember(r) => call!(self, put_member, r, validate),
            Change::RemoveMember(r) => call!(self, remove_member, r, validate),
            Change::Grant(r) => call!(self, grant_user_permission, r, validate),
            Change::Revoke(r) => call!(self, revoke_user_permission, r, validate),
            Change::PutTemplate(r) => call!(self, put_permission_template, r, validate),
            Change::DeleteTemplate(r) => call!(self, delete_permission_template, r, validate),
        })
    }

    /// What the organization's list says of one permission.
    pub(crate) async fn setting(&mut self, permission: &str) -> OrganizationPermission {
        let request = ListOrganizationPermissionsRequest {
            organization_id: lincoln(),
            ..ListOrganizationPermissionsRequest::default()
        };
        let listed = self.client.list_organization_permissions(request).await;
        let listed = listed.unwrap().into_inner().permissions;
        let found = listed.into_iter().find(|p| p.permission == permission);
        found.unwrap()
    }
}

pub(crate) fn lincoln() -> String {
    id("lincoln").to_string()
}

pub(crate) fn set(permission: &str, min_role: &str, enabled: bool, users: &[&str]) -> Change {
    Change::Set(SetOrganizationPermissionRequest {
        organization_id: lincoln(),
        permission: permission.to_owned(),
        setting: Some(setting(min_role, enabled, users)),
        ..SetOrganizationPermissionRequest::default()
    })
}

pub(crate) fn setting(min_role: &str, enabled: bool, users: &[&str]) -> PermissionSetting {
    PermissionSetting {
        min_role: min_role.to_owned(),
        enabled: Some(enabled),
        specific_user_ids: users.iter().map(|user| id(user).to_string()).collect(),
    }
}

pub(crate) fn reset(permission: &str) -> Change {
    Change::Reset(ResetOrganizationPermissionRequest {
        organization_id: lincoln(),
        permission: permission.to_owned(),
        ..ResetOrganizationPermissionRequest::default()
    })
}

pub(crate) fn bulk(items: &[(&str, PermissionSetting)]) -> Change {
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

pub(crate) fn put_member(user: &str, role: &str) -> Change {
    Change::PutMember(PutMemberRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        role: role.to_owned(),
        ..PutMemberRequest::default()
    })
}

pub(crate) fn remove_member(user: &str) -> Change {
    Change::RemoveMember(RemoveMemberRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        ..RemoveMemberRequest::default()
    })
}

pub(crate) fn grant(user: &str, permission: &str) -> Change {
    Change::Grant(GrantUserPermissionRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        permission: permission.to_owned(),
        ..GrantUserPermissionRequest::default()
    })
}

pub(crate) fn revoke(user: &str, permission: &str) -> Change {
    Change::Revoke(RevokeUserPermissionRequest {
        organization_id: lincoln(),
        user_id: id(user).to_string(),
        permission: permission.to_owned(),
        ..RevokeUserPermissionRequest::default()
    })
}

pub(crate) fn put_template(permission: &str, min_role: &str) -> Change {
    Change::PutTemplate(PutPermissionTemplateRequest {
        permission: permission.to_owned(),
        name: "A permission".to_owned(),
        description: "What it is for".to_owned(),
        module: "finance".to_owned(),
        default_min_role: min_role.to_owned(),
        ..PutPermissionTemplateRequest::default()
    })
}

pub(crate) fn delete_template(permission: &str) -> Change {
    Change::DeleteTemplate(DeletePermissionTemplateRequest {
        permission: permission.to_owned(),
        ..DeletePermissionTemplateRequest::default()
    })
}

/// A service that may change permissions.
pub(crate) fn config_to_change(database: &Database) -> Config {
    let login = as_role(&database.url, "hallpass_admin");
    Config {
        admin_database: Some(login.parse().unwrap()),
        ..config(&database.url)
    }
}

pub(crate) async fn start() -> (Database, Client, Server, Administrator) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config_to_change(&database)).await;
    let administrator = Administrator::of(&server);
    (database, client, server, administrator)
}

/// The reason of a status, by its details.
pub(crate) fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

/// Each kind of change, in an order in which each has something to do.
pub(crate) fn changes() -> Vec<Change> {
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
pub(crate) async fn holdings(client: &Client) -> BTreeSet<(String, String, String)> {
    let sql = "SELECT org_id::text, permission_key::text, user_id::text
               FROM effective_user_permissions WHERE user_has_permission";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|r| (r.get(0), r.get(1), r.get(2)))
        .collect()
}

pub(crate) type Holdings = BTreeSet<(String, String, String)>;

/// The effects that turn the one into the other, as the API gives them.
pub(crate) fn difference(before: &Holdings, after: &Holdings) -> Vec<PermissionEffect> {
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
