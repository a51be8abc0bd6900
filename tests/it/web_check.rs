//! Checks over HTTP.

use serde_json::{Value, json};

use crate::{
    database::Database,
    names::id,
    server::{APPROVE, Server, config, fill},
    web::Web,
};

fn question(user: &str) -> Value {
    json!({
        "organization_id": id("lincoln").to_string(),
        "user_id": id(user).to_string(),
        "permission": APPROVE,
    })
}

#[tokio::test]
async fn a_check_is_answered_as_over_grpc() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    let answer = web.post("/v1/check", &question("bob")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.body["allowed"], true);
    let malformed = web.post("/v1/check", &json!({"user_id": 7})).await;
    assert_eq!(malformed.failed(), "400 INVALID_REQUEST", "{malformed:?}");
    assert_eq!(
        web.get("/v1/check").await.failed(),
        "405 METHOD_NOT_ALLOWED"
    );
    assert_eq!(web.get("/nowhere").await.failed(), "404 PATH_UNKNOWN");
    let mut unknown = question("bob");
    unknown["permision"] = json!("typo");
    let unknown = web.post("/v1/check", &unknown).await;
    assert_eq!(unknown.failed(), "400 INVALID_REQUEST", "{unknown:?}");
    server.stop().await;
}
