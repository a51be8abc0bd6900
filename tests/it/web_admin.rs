//! PTO Connect's admin calls: what they answer, what they change, and who is said to have changed it.

use http::Method;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::{
    admin::{VIEW_BUDGET, config_to_change, difference, holdings, lincoln},
    database::Database,
    names::id,
    server::{APPROVE, Server, fill, head},
    sql::lines,
    web::{Web, WebAnswer},
};

pub(crate) const PATH: &str = "/api/admin/organization-permissions";

/// A call that changes something: its method, the path behind [`PATH`], its body.
pub(crate) type Call = (Method, String, Value);

pub(crate) fn put(permission: &str, body: Value) -> Call {
    (Method::PUT, format!("/{permission}"), body)
}

pub(crate) fn delete(permission: &str) -> Call {
    (Method::DELETE, format!("/{permission}"), Value::Null)
}

pub(crate) fn bulk(permissions: Value) -> Call {
    let body = json!({ "permissions": permissions });
    (Method::POST, "/bulk-update".to_owned(), body)
}

pub(crate) fn by_name(overrides: &[(&str, &str, bool)]) -> Call {
    let overrides: Vec<Value> = overrides
        .iter()
        .map(|(user, permission, granted)| {
            json!({"user_id": id(user), "permission_key": permission, "is_enabled": granted})
        })
        .collect();
    let body = json!({ "overrides": overrides });
    (Method::POST, "/user-overrides".to_owned(), body)
}

/// Sends it for an organization; `None`: for the credential's own.
pub(crate) async fn send(web: &Web, organization: Option<&str>, call: Call) -> WebAnswer {
    let (method, path, body) = call;
    let query = organization.map_or_else(String::new, |organization| {
        format!("organization_id={}", id(organization))
    });
    let separator = if path.contains('?') { '&' } else { '?' };
    let body = Some(body).filter(|body| !body.is_null());
    let path = format!("{PATH}{path}{separator}{query}");
    web.send(method, &path, body.map(|body| body.to_string()))
        .await
}

/// The same, to be tried.
fn tried(call: Call) -> Call {
    let (method, mut path, mut body) = call;
    if body.is_null() {
        path.push_str("?validate_only=true");
    } else {
        body["validate_only"] = json!(true);
    }
    (method, path, body)
}

/// Each kind of change, in an order in which each has something to do; what the next check says of a user then; and what
/// the audit log calls it.
fn changes() -> Vec<(Call, &'static str, &'static str, &'static str)> {
    vec![
        (
            put(APPROVE, json!({"min_role_required": "volunteer"})),
            "vic",
            "GRANTED_BY_ROLE",
            "INSERT",
        ),
        (
            put(
                APPROVE,
                json!({"specific_users": [id("pat")], "min_role": "admin", "is_enabled": true}),
            ),
            "pat",
            "GRANTED_TO_USER",
            "UPDATE",
        ),
        (
            put(APPROVE, json!({"is_enabled": false})),
            "ann",
            "PERMISSION_DISABLED",
            "UPDATE",
        ),
        (
            bulk(json!([
                {"permission_key": VIEW_BUDGET, "min_role_required": "admin"},
                {"permission_key": APPROVE, "min_role_required": "committee_lead", "specific_users": null},
            ])),
            "cam",
            "GRANTED_BY_ROLE",
            "BULK_UPDATE",
        ),
        (
            by_name(&[("vic", APPROVE, true), ("pat", VIEW_BUDGET, true)]),
            "vic",
            "GRANTED_TO_USER",
            "BULK_UPDATE",
        ),
        (
            by_name(&[("vic", APPROVE, false)]),
            "vic",
            "ROLE_TOO_LOW",
            "BULK_UPDATE",
        ),
        (delete(APPROVE), "cam", "ROLE_TOO_LOW", "RESET"),
    ]
}

pub(crate) async fn start() -> (Database, Client, Server, Web) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config_to_change(&database)).await;
    let web = Web::of(&server);
    (database, client, server, web)
}

#[tokio::test]
async fn the_next_check_sees_a_change_and_the_log_says_whose_it_is() {
    let (_database, client, server, web) = start().await;
    let web = web
        .with("x-actor-user-id", id("ann").to_string())
        .with("x-actor-profile-id", id("ann's profile").to_string())
        .with("x-actor-session-id", "session 3")
        .with("x-request-id", "request-7")
        .with("user-agent", "the admin's browser")
        .with(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        );
    for (call, user, reason, change_type) in changes() {
        // So that there is something stale to answer with.
        server.check("lincoln", user, APPROVE).await;
        let before = head(&client).await;
        let made = send(&web, Some("lincoln"), call.clone()).await;
        assert_eq!(made.status, 200, "{call:?}: {made:?}");
        assert_eq!(made.body["success"], true);
        assert_eq!(made.body.get("preview"), None);
        assert_eq!(made.header("x-request-id"), "request-7");
        let question = json!({
            "organization_id": lincoln(), "user_id": id(user), "permission": APPROVE,
            "consistency": {"at_least_as_fresh": made.body["position"]},
        });
        let checked = web.post("/v1/check", &question).await;
        assert_eq!(checked.body["reason"], reason, "{call:?}: {checked:?}");
        let sql = format!(
            "SELECT DISTINCT change_type, changed_by, changed_by_profile_id, session_id, request_id, user_agent,
                    host(ip_address), trace_id
             FROM permission_audit_log JOIN hallpass.log USING (entry_id) WHERE seq > {before}"
        );
        let said = format!(
            "{change_type} | {} | {} | session 3 | request-7 | the admin's browser | 127.0.0.1 | 4bf92f3577b34da6a3ce929d0e0e4736",
            id("ann"),
            id("ann's profile"),
        );
        assert_eq!(lines(&client, &sql).await, [said], "{call:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_try_shows_what_the_change_then_does_and_leaves_no_trace() {
    let (_database, client, server, web) = start().await;
    for (call, ..) in changes() {
        let (before, head_before) = (holdings(&client).await, head(&client).await);
        let shown = send(&web, Some("lincoln"), tried(call.clone())).await;
        assert_eq!(shown.status, 200, "{call:?}: {shown:?}");
        assert_eq!(shown.body.get("position"), None);
        assert_eq!(holdings(&client).await, before, "{call:?}");
        assert_eq!(head(&client).await, head_before, "{call:?}");
        let made = send(&web, Some("lincoln"), call.clone()).await;
        assert_eq!(made.status, 200, "{made:?}");
        let effects: Vec<Value> = difference(&before, &holdings(&client).await)
            .into_iter()
            .map(|effect| {
                json!({
                    "organization_id": effect.organization_id, "permission_key": effect.permission,
                    "gained": effect.gained, "lost": effect.lost,
                    "gaining_users": effect.gaining_user_ids, "losing_users": effect.losing_user_ids,
                })
            })
            .collect();
        let preview = json!({"effect_count": effects.len(), "effects": effects});
        assert_eq!(shown.body["preview"], preview, "{call:?}");
    }
    server.stop().await;
}

/// What a list says of one permission, which stands under its module as well.
pub(crate) async fn listed(web: &Web, permission: &str) -> Value {
    let list = web
        .get(&format!("{PATH}?organization_id={}", lincoln()))
        .await;
    assert_eq!(list.status, 200, "{list:?}");
    let find = |permissions: &Value| {
        let permissions = permissions.as_array().unwrap();
        let found = permissions
            .iter()
            .find(|p| p["permission_key"] == permission);
        found.cloned()
    };
    let found = find(&list.body["permissions"]).unwrap();
    let module = found["module_name"].as_str().unwrap();
    assert_eq!(find(&list.body["grouped"][module]).as_ref(), Some(&found));
    found
}

#[tokio::test]
async fn the_list_is_the_templates_merged_with_the_organizations_own_settings() {
    let (_database, client, server, web) = start().await;
    let by_default = listed(&web, APPROVE).await;
    let updated_at = |permission: &Value| permission["updated_at"].as_str().map(str::to_owned);
    let expected = json!({
        "permission_key": APPROVE,
        "permission_name": by_default["permission_name"],
        "permission_description": by_default["permission_description"],
        "module_name": by_default["module_name"],
        "default_min_role": "board_member",
        "current_min_role": "board_member",
        "specific_users": [],
        "is_enabled": true,
        "has_custom_setting": false,
        "updated_at": updated_at(&by_default),
    });
    assert_eq!(by_default, expected);
    let own =
        json!({"min_role_required": "admin", "specific_users": [id("pat")], "is_enabled": false});
    let made = send(&web, Some("lincoln"), put(APPROVE, own.clone())).await;
    let set = json!({
        "org_id": lincoln(), "permission_key": APPROVE, "min_role_required": "admin",
        "specific_users": [id("pat")], "is_enabled": false,
    });
    assert_eq!(made.body["permission"], set);
    let present = listed(&web, APPROVE).await;
    assert_ne!(updated_at(&present), updated_at(&by_default));
    let mut expected = expected;
    expected["current_min_role"] = json!("admin");
    expected["specific_users"] = json!([id("pat")]);
    expected["is_enabled"] = json!(false);
    expected["has_custom_setting"] = json!(true);
    expected["updated_at"] = present["updated_at"].clone();
    assert_eq!(present, expected);
    // The catalog is what it was.
    let path = format!("{PATH}/templates?organization_id={}", lincoln());
    let templates = web.get(&path).await.body;
    let count = "SELECT count(*) FROM organization_permission_templates";
    let count: i64 = client.query_one(count, &[]).await.unwrap().get(0);
    let all = templates["templates"].as_array().unwrap();
    assert_eq!(i64::try_from(all.len()).unwrap(), count);
    let approve = all.iter().find(|t| t["permission_key"] == APPROVE).unwrap();
    assert_eq!(approve["default_min_role"], "board_member");
    assert_eq!(approve["module_name"], by_default["module_name"]);
    server.stop().await;
}

#[tokio::test]
async fn a_member_s_permissions_are_what_the_database_says_now() {
    let (_database, client, server, web) = start().await;
    let made = send(&web, Some("lincoln"), by_name(&[("pat", APPROVE, true)])).await;
    assert_eq!(made.status, 200, "{made:?}");
    let path = |user| format!("{PATH}/user/{}?organization_id={}", id(user), lincoln());
    let answer = web.get(&path("pat")).await;
    let user = json!({"user_id": id("pat"), "org_id": lincoln(), "role": "parent_member"});
    assert_eq!(answer.body["user"], user, "{answer:?}");
    let sql = format!(
        "SELECT t.module_name, t.permission_key, t.permission_name, e.user_has_permission, e.reason
         FROM organization_permission_templates t JOIN effective_user_permissions e USING (permission_key)
         WHERE e.org_id = '{}' AND e.user_id = '{}'",
        lincoln(),
        id("pat")
    );
    let mut told = 0;
    for row in client.query(&sql, &[]).await.unwrap() {
        let (module, key): (&str, &str) = (row.get(0), row.get(1));
        let permission = json!({
            "permission_name": row.get::<_, &str>(2),
            "has_permission": row.get::<_, bool>(3),
            "reason": row.get::<_, &str>(4),
        });
        assert_eq!(answer.body["permissions"][module][key], permission);
        told += 1;
    }
    let modules = answer.body["permissions"].as_object().unwrap().values();
    let listed: usize = modules
        .map(|module| module.as_object().unwrap().len())
        .sum();
    assert_eq!(listed, told);
    let stranger = web.get(&path("stranger")).await;
    assert_eq!(stranger.failed(), "404 MEMBER_NOT_FOUND");
    server.stop().await;
}
