//! The table of what each call needs, through HTTP.

use std::collections::BTreeMap;

use hallpass::auth::{
    Scope,
    access::{ACCESS, Need},
    api_key::Pepper,
};
use http::Method;
use serde_json::{Value, json};

use crate::{
    database::Database,
    keyring::{Made, TIMING, config_with_keys, key_id, revoke},
    names::id,
    server::{APPROVE, Server, fill},
    web::{Web, WebAnswer},
};

/// What has a listener of its own.
const OPERATORS: [&str; 3] = ["GET /livez", "GET /metrics", "GET /readyz"];

/// As the table has it.
type Named = BTreeMap<String, Need>;

fn rows() -> Named {
    ACCESS
        .into_iter()
        .filter(|(name, ..)| name.contains(' '))
        .map(|(name, need, _)| (name.to_owned(), need))
        .collect()
}

/// The call, with ids in its path and the body that a call of its kind has at least.
async fn call(web: &Web, name: &str) -> WebAnswer {
    let (method, route) = name.split_once(' ').unwrap();
    let path = route
        .replace("{organization_id}", &id("lincoln").to_string())
        .replace("{user_id}", &id("bob").to_string())
        .replace("{permission}", APPROVE)
        .replace("{asset}", "start.js");
    let body = matches!(method, "POST" | "PUT").then(|| "{}".to_owned());
    web.send(method.parse::<Method>().unwrap(), &path, body)
        .await
}

/// Why a call was not let in; empty where it was.
fn refusal(answer: &WebAnswer) -> String {
    match answer.status.as_u16() {
        401 | 403 => answer.failed(),
        _ => String::new(),
    }
}

#[test]
fn the_table_of_http_is_this() {
    let mut table: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, need) in rows() {
        table.entry(format!("{need:?}")).or_default().push(name);
    }
    let admin = [
        "DELETE /api/admin/organization-permissions/{permission}",
        "GET /api/admin/organization-permissions",
        "GET /api/admin/organization-permissions/templates",
        "GET /api/admin/organization-permissions/user/{user_id}",
        "POST /api/admin/organization-permissions/bulk-update",
        "POST /api/admin/organization-permissions/user-overrides",
        "PUT /api/admin/organization-permissions/{permission}",
    ];
    let list = [
        "GET /v1/organizations/{organization_id}/summary",
        "GET /v1/organizations/{organization_id}/users/{user_id}/permissions",
    ];
    let expected = [
        (
            "Nothing",
            vec!["GET /api/health", "GET /livez", "GET /readyz"],
        ),
        (
            "Open",
            vec![
                "GET /docs",
                "GET /docs/",
                "GET /docs/{asset}",
                "GET /openapi.json",
            ],
        ),
        ("Scope(Admin)", admin.to_vec()),
        (
            "Scope(Audit)",
            vec!["GET /v1/audit", "GET /v1/audit/stream"],
        ),
        (
            "Scope(Check)",
            vec!["POST /v1/batch-check", "POST /v1/check"],
        ),
        ("Scope(List)", list.to_vec()),
        ("Scope(Metrics)", vec!["GET /metrics"]),
    ];
    let expected = expected.map(|(need, names)| {
        let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        (need.to_owned(), names)
    });
    assert_eq!(table, BTreeMap::from(expected));
}

/// Each call with each kind of credential. A call that is let in fails for another reason, or succeeds.
#[tokio::test]
async fn every_call_asks_for_what_it_needs() {
    let database = Database::create().await;
    let url = &database.url;
    fill(&database.client().await).await;
    let good = Made::default().make(url).await;
    let expired = Made::expired().make(url).await;
    let revoked = Made::default().make(url).await;
    revoke(url, &revoked).await;
    let wrong = format!("hp_{}_{}", key_id(&good), "0".repeat(64));
    let mut with_all_but = BTreeMap::new();
    for missing in Scope::ALL {
        let others = Scope::ALL.into_iter().filter(|scope| *scope != missing);
        let made = Made {
            scopes: others.map(Scope::name).collect(),
            ..Made::default()
        };
        with_all_but.insert(missing.name(), made.make(url).await);
    }
    let server = Server::start(config_with_keys(url, TIMING, Pepper::default())).await;
    for (name, need) in rows() {
        let web = Web::at(if OPERATORS.contains(&&*name) {
            server.ops
        } else {
            server.http
        });
        let with = |header: &str| web.clone().with("authorization", header);
        let said = async |header: &str| refusal(&call(&with(header), &name).await);
        let said_to = async |key: &str| said(&format!("Bearer {key}")).await;
        let is_open = matches!(need, Need::Nothing | Need::Open);
        let refused = |reason: &'static str| if is_open { "" } else { reason };
        let nobody = call(&web, &name).await;
        assert_eq!(
            refusal(&nobody),
            refused("401 CREDENTIAL_MISSING"),
            "{name}"
        );
        let invalid = refused("401 CREDENTIAL_INVALID");
        assert_eq!(said_to(&wrong).await, invalid, "{name}");
        for malformed in ["hp_", "Basic aGFsbDpwYXNz", "Bearer", "Bearer "] {
            assert_eq!(said(malformed).await, invalid, "{name} {malformed}");
        }
        let expected = refused("401 CREDENTIAL_EXPIRED");
        assert_eq!(said_to(&expired).await, expected, "{name}");
        let expected = refused("401 CREDENTIAL_REVOKED");
        assert_eq!(said_to(&revoked).await, expected, "{name}");
        assert_eq!(said_to(&good).await, "", "{name}");
        for (missing, key) in &with_all_but {
            let needs_it = matches!(need, Need::Scope(scope) if scope.name() == *missing);
            let expected = if needs_it { "403 SCOPE_MISSING" } else { "" };
            assert_eq!(said_to(key).await, expected, "{name} without {missing}");
        }
    }
    server.stop().await;
}

/// What PTO Connect's clients look for.
#[tokio::test]
async fn a_token_that_is_missing_or_malformed_is_told_so() {
    let database = Database::create().await;
    let url = &database.url;
    let server = Server::start(config_with_keys(url, TIMING, Pepper::default())).await;
    let web = Web::of(&server);
    let missing = call(&web, "POST /v1/check").await;
    assert_eq!(missing.body["error"], "Missing or malformed auth token");
    assert_eq!(missing.header("www-authenticate"), "Bearer");
    for malformed in ["hp_x", "Basic aGFsbDpwYXNz", "Bearer", "Bearer "] {
        let web = web.clone().with("authorization", malformed);
        let answer = call(&web, "POST /v1/check").await;
        assert_eq!(
            answer.body["error"], "Missing or malformed auth token",
            "{malformed}"
        );
    }
    let twice = web
        .clone()
        .with("authorization", "Bearer a")
        .with("authorization", "Bearer b");
    let twice = call(&twice, "POST /v1/check").await;
    assert_eq!(twice.body["error"], "Missing or malformed auth token");
    let wrong = call(&web.with("authorization", "Bearer hp_x"), "POST /v1/check").await;
    assert_eq!(wrong.failed(), "401 CREDENTIAL_INVALID");
    assert_ne!(wrong.body["error"], "Missing or malformed auth token");
    server.stop().await;
}

/// Nobody finds out by asking which organizations there are.
#[tokio::test]
async fn another_organization_is_as_good_as_none() {
    let database = Database::create().await;
    let url = &database.url;
    fill(&database.client().await).await;
    let made = Made {
        organizations: Some(vec![id("franklin")]),
        ..Made::default()
    };
    let key = made.make(url).await;
    let server = Server::start(config_with_keys(url, TIMING, Pepper::default())).await;
    let web = Web::of(&server)
        .with("authorization", format!("Bearer {key}"))
        .with("x-request-id", "the-same");
    let ask = async |organization: &str| {
        let organization = id(organization).to_string();
        let question = json!({
            "organization_id": organization,
            "user_id": id("bob").to_string(),
            "permission": APPROVE,
        });
        let user = id("bob");
        let paths = [
            format!("/v1/organizations/{organization}/users/{user}/permissions"),
            format!("/v1/organizations/{organization}/summary"),
        ];
        let mut answers = vec![
            web.post("/v1/check", &question).await,
            web.post("/v1/batch-check", &json!({ "items": [question] }))
                .await,
        ];
        for path in &paths {
            answers.push(web.get(path).await);
        }
        let said = |answer: WebAnswer| {
            let (status, mut body) = (answer.status.as_u16(), answer.body);
            if let Value::Object(body) = &mut body {
                body.remove("evidence");
            }
            (status, body)
        };
        answers.into_iter().map(said).collect::<Vec<_>>()
    };
    let (of_others, of_nobody) = (ask("lincoln").await, ask("nowhere").await);
    assert_eq!(of_others, of_nobody);
    let statuses: Vec<u16> = of_others.iter().map(|(status, _)| *status).collect();
    assert_eq!(statuses, [403, 200, 403, 403], "{of_others:?}");
    let item = &of_others[1].1["results"][0];
    assert_eq!(item["code"], "ORGANIZATION_NOT_ALLOWED");
    let own: Vec<u16> = ask("franklin").await.into_iter().map(|(s, _)| s).collect();
    assert_eq!(own, [200; 4]);
    server.stop().await;
}
