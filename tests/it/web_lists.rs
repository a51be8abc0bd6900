//! Batches, lists, summaries and health over HTTP.

use std::time::Duration;

use hallpass::server::Config;
use http::Method;
use serde_json::{Value, json};

use crate::{
    database::{Database, eventually},
    names::id,
    proxy::{Proxy, Way},
    server::{APPROVE, Server, config, fill, run_sql},
    web::Web,
};

async fn serve() -> (Database, Server, Web) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    (database, server, web)
}

fn item(user: &str, permission: &str) -> Value {
    json!({
        "organization_id": id("lincoln").to_string(),
        "user_id": id(user).to_string(),
        "permission": permission,
    })
}

#[tokio::test]
async fn a_malformed_item_has_an_error_in_its_place() {
    let (_database, server, web) = serve().await;
    let mut nobody = item("bob", APPROVE);
    nobody["user_id"] = json!("bob");
    let batch = json!({ "items": [item("bob", APPROVE), nobody, item("vic", APPROVE)] });
    let answer = web.post("/v1/batch-check", &batch).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let results = &answer.body["results"];
    assert_eq!(
        results[0],
        json!({"allowed": true, "reason": "GRANTED_BY_ROLE"})
    );
    assert_eq!(
        results[2],
        json!({"allowed": false, "reason": "ROLE_TOO_LOW"})
    );
    assert_eq!(results[1]["code"], "INVALID_REQUEST");
    assert_eq!(results[1]["fields"][0]["field"], "items[1].user_id");
    assert_eq!(results[1].get("allowed"), None, "an error is no decision");
    let position = answer.body["evidence"]["position"].as_str();
    assert!(position.unwrap().contains('-'), "{answer:?}");

    let all_wrong = json!({ "items": [{"organization_id": "", "user_id": "", "permission": ""}] });
    let answer = web.post("/v1/batch-check", &all_wrong).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.body["evidence"], Value::Null);
    server.stop().await;
}

#[tokio::test]
async fn a_batch_has_one_to_ten_thousand_items() {
    let (_database, server, web) = serve().await;
    // As long as an item of the greatest batch may be on average.
    let key = "k".repeat(76);
    for (items, expected) in [(0, 400), (1, 200), (10_000, 200), (10_001, 400)] {
        let batch = json!({ "items": vec![item("bob", &key); items] });
        let answer = web.post("/v1/batch-check", &batch).await;
        assert_eq!(
            answer.status, expected,
            "{items}: {:?}",
            answer.body["error"]
        );
        match expected {
            200 => assert_eq!(answer.body["results"].as_array().unwrap().len(), items),
            _ => assert_eq!(answer.body["fields"][0]["field"], "items"),
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn lists_are_filtered() {
    let (_database, server, web) = serve().await;
    let list = async |user: &str, query: &str| {
        let (organization, user) = (id("lincoln"), id(user));
        let path = format!("/v1/organizations/{organization}/users/{user}/permissions{query}");
        web.get(&path).await
    };
    let all = list("bob", "").await;
    assert_eq!(all.body["role"], "board_member");
    let permissions = all.body["permissions"].as_array().unwrap();
    let module = &permissions[0]["module"];
    let filtered = [
        (
            format!("?module={}", module.as_str().unwrap()),
            permissions
                .iter()
                .filter(|p| p["module"] == *module)
                .count(),
        ),
        (
            "?allowed_only=true&max_staleness_ms=1000".to_owned(),
            permissions.iter().filter(|p| p["allowed"] == true).count(),
        ),
    ];
    for (query, expected) in filtered {
        let some = list("bob", &query).await;
        let some = some.body["permissions"].as_array().unwrap();
        assert_eq!(some.len(), expected, "{query}");
        assert!((1..permissions.len()).contains(&expected), "{query}");
        assert!(some.iter().all(|p| permissions.contains(p)), "{query}");
    }
    let stranger = list("eve", "").await;
    assert_eq!(stranger.body["role"], "");
    let denied = stranger.body["permissions"].as_array().unwrap();
    assert!(denied.iter().all(|p| p["reason"] == "NOT_A_MEMBER"));
    let refused = [
        "?allowed=true",
        "?allowed_only=yes",
        "?max_staleness_ms=-1",
        "?at_least_as_fresh=x",
        "?fully_consistent=true&max_staleness_ms=1",
        "?module=a&module=b",
    ];
    for query in refused {
        let refused = list("bob", query).await;
        assert_eq!(
            refused.failed(),
            "400 INVALID_REQUEST",
            "{query}: {refused:?}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn summaries_count() {
    let (database, server, web) = serve().await;
    let client = database.client().await;
    let set = "INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required, is_enabled)
        VALUES (:lincoln, 'can_approve_expenses', 'admin', false)";
    run_sql(&client, set).await;
    let path = format!(
        "/v1/organizations/{}/summary?fully_consistent=true",
        id("lincoln")
    );
    let answer = web.get(&path).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let summary = &answer.body["summary"];
    let expected = [
        ("organization_name", json!("lincoln")),
        ("total_custom_permissions", json!(1)),
        ("enabled_custom_permissions", json!(0)),
        ("disabled_custom_permissions", json!(1)),
        ("admin_only_permissions", json!(1)),
        ("volunteer_permissions", json!(0)),
    ];
    for (name, value) in expected {
        assert_eq!(summary[name], value, "{name}");
    }
    let updated = summary["last_permission_update"].as_str().unwrap();
    assert!(updated.contains('T') && updated.ends_with('Z'), "{updated}");
    let nowhere = format!("/v1/organizations/{}/summary", id("nowhere"));
    let nowhere = web.get(&nowhere).await;
    assert_eq!(nowhere.failed(), "404 ORGANIZATION_NOT_FOUND");
    server.stop().await;
}

#[tokio::test]
async fn health_says_what_is_away_and_no_more() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = Server::start(Config {
        staleness_bound: Duration::from_millis(500),
        ..config(&proxy.url)
    })
    .await;
    let web = Web::of(&server);
    let up = web.get("/api/health").await;
    assert_eq!(up.status, 200, "{up:?}");
    assert_eq!(up.body["status"], "healthy");
    assert_eq!(up.body["environment"], "test");
    assert_eq!(up.body["version"], env!("CARGO_PKG_VERSION"));
    assert!(up.body["uptime"].as_f64().unwrap() > 0.0);
    let all_up = json!({"database": "up", "log": "up", "cache": "up"});
    assert_eq!(up.body["dependencies"], all_up);
    let told: Vec<&String> = up.body.as_object().unwrap().keys().collect();
    let expected = [
        "dependencies",
        "environment",
        "status",
        "timestamp",
        "uptime",
        "version",
    ];
    assert_eq!(told, expected);
    let head = web.send(Method::HEAD, "/api/health", None).await;
    assert_eq!((head.status.as_u16(), head.bytes.len()), (200, 0));

    proxy.set(Way::Closed);
    eventually("health says that the database is away", async || {
        let down = web.get("/api/health").await;
        let away = json!({"database": "down", "log": "up", "cache": "down"});
        down.status == 503
            && down.body["status"] == "unhealthy"
            && down.body["dependencies"] == away
    })
    .await;
    proxy.set(Way::Open);
    eventually("health says that the database is back", async || {
        let up = web.get("/api/health").await;
        up.status == 200 && up.body["dependencies"] == all_up
    })
    .await;
    server.stop().await;
}
