//! PTO Connect's admin calls that are refused: nothing is changed, and the caller hears why, in the names that it used.

use http::Method;
use serde_json::json;

use crate::{
    admin::VIEW_BUDGET,
    admin_callers::{newest, start_with_keys, start_with_tokens},
    keyring::{Made, key_id},
    names::id,
    server::{APPROVE, head},
    web::Web,
    web_admin::{Call, PATH, bulk, by_name, delete, listed, put, send, start},
};

#[tokio::test]
async fn what_is_wrong_is_refused_and_named() {
    let (_database, client, server, web) = start().await;
    let before = head(&client).await;
    let ok = json!({"permission_key": VIEW_BUDGET, "min_role_required": "admin"});
    // As (call, how it fails, what its message names).
    let cases: Vec<(Call, &str, &str)> = vec![
        (
            put(APPROVE, json!({"min_role_required": "wizard"})),
            "400 ROLE_UNKNOWN",
            "wizard",
        ),
        (
            bulk(json!([ok, {"permission_key": APPROVE, "min_role_required": "wizard"}])),
            "400 ROLE_UNKNOWN",
            "wizard",
        ),
        (
            put("can_fly", json!({"is_enabled": true})),
            "404 PERMISSION_NOT_FOUND",
            "no permission",
        ),
        (
            bulk(json!([ok, {"permission_key": "can_fly"}])),
            "404 PERMISSION_NOT_FOUND",
            "no permission",
        ),
        (
            delete("can_fly"),
            "404 PERMISSION_NOT_FOUND",
            "no permission",
        ),
        (
            by_name(&[("pat", APPROVE, true), ("pat", "can_fly", true)]),
            "404 PERMISSION_NOT_FOUND",
            "no permission",
        ),
        (
            by_name(&[("pat", APPROVE, true), ("stranger", APPROVE, true)]),
            "404 MEMBER_NOT_FOUND",
            "member",
        ),
        (
            by_name(&[("pat", APPROVE, true), ("pat", APPROVE, false)]),
            "400 INVALID_REQUEST",
            "overrides: ",
        ),
        (by_name(&[]), "400 INVALID_REQUEST", "overrides: "),
        (bulk(json!([])), "400 INVALID_REQUEST", "permissions: "),
        (bulk(json!([ok, ok])), "400 INVALID_REQUEST", VIEW_BUDGET),
        (
            bulk(json!([ok, {"permission_key": ""}])),
            "400 INVALID_REQUEST",
            "permissions[1].permission_key: ",
        ),
        (
            put(APPROVE, json!({"specific_users": ["pat"]})),
            "400 INVALID_REQUEST",
            "specific_users[0]: ",
        ),
        (
            put(APPROVE, json!({"min_role_requierd": "admin"})),
            "400 INVALID_REQUEST",
            "min_role_requierd",
        ),
        (
            put(APPROVE, json!({"is_enabled": "yes"})),
            "400 INVALID_REQUEST",
            "is_enabled",
        ),
        (
            put(APPROVE, json!({"expected_updated_at": "yesterday"})),
            "400 INVALID_REQUEST",
            "must be a time",
        ),
        (
            (
                Method::DELETE,
                format!("/{APPROVE}?validate=true"),
                json!(null),
            ),
            "400 INVALID_REQUEST",
            "validate",
        ),
        (
            (Method::PATCH, format!("/{APPROVE}"), json!({})),
            "405 METHOD_NOT_ALLOWED",
            "PUT",
        ),
    ];
    for (call, failed, named) in cases {
        let answer = send(&web, Some("lincoln"), call.clone()).await;
        assert_eq!(answer.failed(), failed, "{call:?}: {answer:?}");
        let message = answer.body["error"].as_str().unwrap();
        assert!(message.contains(named), "{call:?}: {message}");
        assert_eq!(answer.body["request_id"], answer.header("x-request-id"));
    }
    let nowhere = send(&web, Some("nowhere"), put(APPROVE, json!({}))).await;
    assert_eq!(
        nowhere.failed(),
        "404 ORGANIZATION_NOT_FOUND",
        "{nowhere:?}"
    );
    for (header, value) in [
        ("x-actor-user-id", "ann"),
        ("x-actor-user-id", "ann\u{e9}"),
        ("x-actor-profile-id", "7"),
    ] {
        let web = Web::of(&server).with(header, value);
        let answer = send(&web, Some("lincoln"), put(APPROVE, json!({}))).await;
        assert_eq!(answer.body["fields"][0]["field"], header, "{answer:?}");
    }
    let twice = Web::of(&server)
        .with("x-actor-user-id", id("ann").to_string())
        .with("x-actor-user-id", id("bob").to_string());
    let answer = send(&twice, Some("lincoln"), delete(APPROVE)).await;
    assert_eq!(answer.failed(), "400 INVALID_REQUEST", "{answer:?}");
    assert_eq!(head(&client).await, before);
    server.stop().await;
}

#[tokio::test]
async fn a_lost_update_is_a_conflict() {
    let (_database, client, server, web) = start().await;
    let read = listed(&web, APPROVE).await["updated_at"].clone();
    let first = json!({"min_role_required": "admin", "expected_updated_at": read});
    let made = send(&web, Some("lincoln"), put(APPROVE, first)).await;
    assert_eq!(made.status, 200, "{made:?}");
    let before = head(&client).await;
    let late = |role: &str| json!({"min_role_required": role, "expected_updated_at": read});
    let mut in_bulk = late("teacher");
    in_bulk["permission_key"] = json!(APPROVE);
    let reset = format!("/{APPROVE}?expected_updated_at={}", read.as_str().unwrap());
    for call in [
        put(APPROVE, late("teacher")),
        bulk(json!([{"permission_key": VIEW_BUDGET}, in_bulk])),
        (Method::DELETE, reset, json!(null)),
    ] {
        let answer = send(&web, Some("lincoln"), call.clone()).await;
        assert_eq!(
            answer.failed(),
            "409 UPDATED_MEANWHILE",
            "{call:?}: {answer:?}"
        );
    }
    assert_eq!(head(&client).await, before);
    let now = listed(&web, APPROVE).await;
    assert_eq!(now["current_min_role"], "admin");
    let reset = format!(
        "/{APPROVE}?expected_updated_at={}",
        now["updated_at"].as_str().unwrap()
    );
    let made = send(&web, Some("lincoln"), (Method::DELETE, reset, json!(null))).await;
    assert_eq!(made.status, 200, "{made:?}");
    server.stop().await;
}

/// Every route, as (method, path behind [`PATH`], body).
fn routes() -> Vec<Call> {
    vec![
        (Method::GET, String::new(), json!(null)),
        (Method::GET, "/templates".to_owned(), json!(null)),
        (Method::GET, format!("/user/{}", id("pat")), json!(null)),
        put(APPROVE, json!({"min_role_required": "teacher"})),
        bulk(json!([{"permission_key": APPROVE, "is_enabled": false}])),
        by_name(&[("pat", APPROVE, true)]),
        delete(APPROVE),
    ]
}

#[tokio::test]
async fn the_organization_is_the_credential_s_own() {
    let of = |organizations: Option<&[&str]>| Made {
        organizations: organizations.map(|names| names.iter().map(|name| id(name)).collect()),
        ..Made::default()
    };
    let reader = Made {
        scopes: vec!["check", "list", "audit"],
        ..of(Some(&["lincoln"]))
    };
    let made = [
        of(Some(&["lincoln"])),
        of(Some(&["lincoln", "franklin"])),
        of(None),
        reader,
    ];
    let (_database, client, server, [one, two, all, reader]) = start_with_keys(made).await;
    let web = |key: &str| Web::of(&server).with("authorization", format!("Bearer {key}"));
    let before = head(&client).await;
    let missing = "400 INVALID_REQUEST";
    for route in routes() {
        for (key, organization, failed) in [
            (&one, Some("franklin"), "403 ORGANIZATION_NOT_ALLOWED"),
            (&one, Some("nowhere"), "403 ORGANIZATION_NOT_ALLOWED"),
            (&two, None, missing),
            (&all, None, missing),
            (&reader, None, "403 SCOPE_MISSING"),
        ] {
            let answer = send(&web(key), organization, route.clone()).await;
            assert_eq!(answer.failed(), failed, "{route:?}: {answer:?}");
            if failed == missing {
                assert_eq!(answer.body["fields"][0]["field"], "organization_id");
            }
        }
        let nobody = send(&Web::of(&server), Some("lincoln"), route.clone()).await;
        assert_eq!(nobody.failed(), "401 CREDENTIAL_MISSING");
    }
    assert_eq!(head(&client).await, before);
    for route in routes() {
        for (key, organization) in [
            (&one, None),
            (&two, Some("lincoln")),
            (&all, Some("lincoln")),
        ] {
            let answer = send(&web(key), organization, route.clone()).await;
            assert_eq!(answer.status, 200, "{route:?}: {answer:?}");
        }
    }
    let list = web(&one).get(PATH).await;
    assert_eq!(list.body["organization_id"], id("lincoln").to_string());
    // A key says on whose behalf it changes.
    let named = web(&one).with("x-actor-user-id", id("bob").to_string());
    let made = send(&named, None, put(APPROVE, json!({"is_enabled": false}))).await;
    assert_eq!(made.status, 200, "{made:?}");
    let found = newest(&client).await;
    assert!(found.starts_with(&id("bob").to_string()), "{found}");
    assert!(found.ends_with(&format!("key:{}", key_id(&one))), "{found}");
    server.stop().await;
}

#[tokio::test]
async fn a_token_speaks_for_its_subject_alone_over_http_too() {
    let (_database, client, server, issuer) = start_with_tokens().await;
    let (ann, bob) = (id("ann").to_string(), id("bob").to_string());
    let token = format!("Bearer {}", issuer.token(&ann));
    let web = Web::of(&server).with("authorization", token);
    let before = head(&client).await;
    let other = web.clone().with("x-actor-user-id", bob);
    let refused = send(&other, Some("lincoln"), put(APPROVE, json!({}))).await;
    assert_eq!(
        refused.body["fields"][0]["field"], "x-actor-user-id",
        "{refused:?}"
    );
    assert_eq!(head(&client).await, before);
    for web in [&web, &web.clone().with("x-actor-user-id", ann.clone())] {
        for call in [
            put(APPROVE, json!({"min_role": "teacher"})),
            delete(APPROVE),
        ] {
            let made = send(web, Some("lincoln"), call).await;
            assert_eq!(made.status, 200, "{made:?}");
            let found = newest(&client).await;
            assert!(found.starts_with(&ann), "{found}");
        }
    }
    server.stop().await;
}
