//! What every answer over HTTP has, and what is refused before anybody is asked.

use std::io::Read;

use flate2::read::GzDecoder;
use hallpass::{auth::api_key::Pepper, http::Settings, limits::Bounds, server::Config};
use http::{HeaderValue, Method};
use serde_json::{Value, json};

use crate::{
    database::Database,
    keyring::{Made, TIMING, config_with_keys},
    names::id,
    server::{APPROVE, Server, bounds, config, fill},
    web::{Web, WebAnswer},
};

const ORIGIN: &str = "https://admin.example.org";

async fn serve() -> (Database, Server, Web) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    (database, server, web)
}

fn question() -> Value {
    json!({
        "organization_id": id("lincoln").to_string(),
        "user_id": id("bob").to_string(),
        "permission": APPROVE,
    })
}

/// Bodies of `/v1/check`, what they come to, and what the complaint is about.
#[tokio::test]
async fn a_body_that_is_wrong_is_told_what_is() {
    let (_database, server, web) = serve().await;
    let good = question().to_string();
    let cases = [
        (good.clone(), "200 ", "", ""),
        (format!(" {good}\n"), "200 ", "", ""),
        (String::new(), "400 INVALID_REQUEST", "body", "EOF"),
        ("{".to_owned(), "400 INVALID_REQUEST", "body", "EOF"),
        (
            "[]".to_owned(),
            "400 INVALID_REQUEST",
            "body",
            "must be a JSON object",
        ),
        (
            "null".to_owned(),
            "400 INVALID_REQUEST",
            "body",
            "must be a JSON object",
        ),
        (
            "{}".to_owned(),
            "400 INVALID_REQUEST",
            "body",
            "missing field `organization_id`",
        ),
        (
            format!("{good}{good}"),
            "400 INVALID_REQUEST",
            "body",
            "trailing",
        ),
        (
            good.replace("\"user_id\"", "\"user\""),
            "400 INVALID_REQUEST",
            "user",
            "unknown field `user`",
        ),
        (
            good.replacen('{', "{\"explain\":1,", 1),
            "400 INVALID_REQUEST",
            "explain",
            "invalid type",
        ),
        (
            good.replacen('{', "{\"permission\":\"x\",", 1),
            "400 INVALID_REQUEST",
            "body",
            "duplicate field",
        ),
        (
            good.replacen('{', "{\"consistency\":{\"max_staleness_ms\":-1},", 1),
            "400 INVALID_REQUEST",
            "consistency.max_staleness_ms",
            "invalid value",
        ),
        (
            good.replace(APPROVE, ""),
            "400 INVALID_REQUEST",
            "permission",
            "",
        ),
        (
            good.replace(&id("bob").to_string(), "bob"),
            "400 INVALID_REQUEST",
            "user_id",
            "UUID",
        ),
    ];
    for (body, expected, field, complaint) in cases {
        let answer = web
            .send(Method::POST, "/v1/check", Some(body.clone()))
            .await;
        assert_eq!(answer.failed(), expected, "{body}: {answer:?}");
        if !field.is_empty() {
            let named = &answer.body["fields"][0];
            assert_eq!(named["field"], field, "{body}: {answer:?}");
            let error = named["error"].as_str().unwrap();
            assert!(error.contains(complaint), "{body}: {error}");
        }
    }
    // What is quoted of a request does not come back at its length.
    let long = format!("{{\"{}\":1}}", "x".repeat(100_000));
    let answer = web.send(Method::POST, "/v1/check", Some(long)).await;
    assert_eq!(answer.failed(), "400 INVALID_REQUEST");
    assert!(answer.bytes.len() < 4_000, "{}", answer.bytes.len());
    let bytes = String::from_utf8_lossy(&[0xff, 0xfe]).into_owned();
    let answer = web.send(Method::POST, "/v1/check", Some(bytes)).await;
    assert_eq!(answer.failed(), "400 INVALID_REQUEST");
    server.stop().await;
}

#[tokio::test]
async fn a_body_of_another_kind_or_length_is_refused() {
    let (_database, server, web) = serve().await;
    let good = question().to_string();
    let kinds = [
        ("content-type", "application/json; charset=utf-8", "200 "),
        ("content-type", "Application/JSON", "200 "),
        ("content-type", "text/plain", "415 NOT_JSON"),
        (
            "content-type",
            "application/x-www-form-urlencoded",
            "415 NOT_JSON",
        ),
        ("content-encoding", "identity", "200 "),
        ("content-encoding", "gzip", "415 BODY_ENCODED"),
        ("content-encoding", "br, gzip", "415 BODY_ENCODED"),
    ];
    for (name, value, expected) in kinds {
        let web = web.clone().with(name, value);
        let answer = web
            .send(Method::POST, "/v1/check", Some(good.clone()))
            .await;
        assert_eq!(answer.failed(), expected, "{name}: {value}");
    }
    let padded = |bytes: usize| format!("{good}{}", " ".repeat(bytes - good.len()));
    let batch = |bytes: usize| {
        let batch = json!({ "items": [question()] }).to_string();
        format!("{batch}{}", " ".repeat(bytes - batch.len()))
    };
    let lengths = [
        ("/v1/check", padded(512 << 10), "200 "),
        ("/v1/check", padded((512 << 10) + 1), "413 BODY_TOO_LONG"),
        ("/v1/batch-check", batch(2 << 20), "200 "),
        ("/v1/batch-check", batch((2 << 20) + 1), "413 BODY_TOO_LONG"),
    ];
    for (path, body, expected) in lengths {
        let bytes = body.len();
        let answer = web.send(Method::POST, path, Some(body.clone())).await;
        assert_eq!(answer.failed(), expected, "{path} {bytes}");
        let answer = web.send_chunked(path, body).await;
        assert_eq!(answer.failed(), expected, "{path} {bytes} in chunks");
    }
    server.stop().await;
}

#[tokio::test]
async fn paths_and_methods_that_are_not_there_are_told_so() {
    let (_database, server, web) = serve().await;
    let organization = id("lincoln");
    let summary = format!("/v1/organizations/{organization}/summary");
    let cases = [
        (Method::GET, "/", "404 PATH_UNKNOWN", ""),
        (Method::POST, "/v1/check/", "404 PATH_UNKNOWN", ""),
        (Method::POST, "/V1/check", "404 PATH_UNKNOWN", ""),
        (
            Method::GET,
            "/v1/organizations/x/summary/y",
            "404 PATH_UNKNOWN",
            "",
        ),
        (
            Method::GET,
            "/hallpass.v1.PermissionService/CheckPermission",
            "404 PATH_UNKNOWN",
            "",
        ),
        (Method::OPTIONS, "/nowhere", "404 PATH_UNKNOWN", ""),
        (Method::GET, "/v1/check", "405 METHOD_NOT_ALLOWED", "POST"),
        (
            Method::OPTIONS,
            "/v1/check",
            "405 METHOD_NOT_ALLOWED",
            "POST",
        ),
        (
            Method::DELETE,
            &summary,
            "405 METHOD_NOT_ALLOWED",
            "GET, HEAD",
        ),
        (
            Method::TRACE,
            "/api/health",
            "405 METHOD_NOT_ALLOWED",
            "GET, HEAD",
        ),
        (
            Method::GET,
            "/v1/organizations/lincoln/summary",
            "400 INVALID_REQUEST",
            "",
        ),
        (
            Method::GET,
            "/v1/organizations/%ff/summary",
            "400 INVALID_REQUEST",
            "",
        ),
        (Method::GET, &summary, "200 ", ""),
    ];
    for (method, path, expected, allow) in cases {
        let answer = web.send(method.clone(), path, None).await;
        assert_eq!(answer.failed(), expected, "{method} {path}: {answer:?}");
        assert_eq!(answer.header("allow"), allow, "{method} {path}");
    }
    let head = web.send(Method::HEAD, &summary, None).await;
    assert_eq!((head.status.as_u16(), head.bytes.len()), (200, 0));
    server.stop().await;
}

#[tokio::test]
async fn every_answer_names_its_request_and_is_safe_in_a_browser() {
    let (_database, server, web) = serve().await;
    let longest = "r".repeat(128);
    for (given, is_kept) in [
        ("abc-123", true),
        (longest.as_str(), true),
        (&format!("{longest}r"), false),
        ("two words", false),
        ("", false),
    ] {
        let web = web.clone().with("x-request-id", given);
        for answer in [web.get("/nowhere").await, web.get("/api/health").await] {
            let id = answer.header("x-request-id");
            assert_eq!(id == given, is_kept, "{given}: {id}");
            assert!(!id.is_empty());
            if answer.status == 404 {
                assert_eq!(answer.body["request_id"], id);
            }
        }
    }
    let made = web.get("/nowhere").await;
    assert_ne!(
        made.header("x-request-id"),
        web.get("/nowhere").await.header("x-request-id")
    );
    let refused = web.post("/v1/check", &json!({})).await;
    let answered = web.post("/v1/check", &question()).await;
    for answer in [made, refused, answered] {
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-store"),
            ("cross-origin-resource-policy", "same-origin"),
            ("content-type", "application/json"),
            // Not without TLS, and not without being asked for.
            ("strict-transport-security", ""),
            ("access-control-allow-origin", ""),
        ] {
            assert_eq!(answer.header(name), value, "{name}");
        }
        let policy = answer.header("content-security-policy");
        assert!(policy.contains("default-src 'none'"), "{policy}");
    }
    server.stop().await;
}

#[tokio::test]
async fn long_answers_are_compressed_for_who_takes_them() {
    let (_database, server, web) = serve().await;
    let list = format!(
        "/v1/organizations/{}/users/{}/permissions",
        id("lincoln"),
        id("bob")
    );
    let plain = web.get(&list).await;
    assert_eq!(plain.header("content-encoding"), "");
    let takes_gzip = web.with("accept-encoding", "gzip");
    let packed = takes_gzip.get(&list).await;
    assert_eq!(packed.header("content-encoding"), "gzip");
    assert!(packed.header("vary").contains("accept-encoding"));
    assert!(packed.bytes.len() * 3 < plain.bytes.len());
    let mut unpacked = Vec::new();
    GzDecoder::new(&packed.bytes[..])
        .read_to_end(&mut unpacked)
        .unwrap();
    let unpacked: Value = serde_json::from_slice(&unpacked).unwrap();
    assert_eq!(unpacked["permissions"], plain.body["permissions"]);
    let short = takes_gzip.post("/v1/check", &question()).await;
    assert_eq!(short.header("content-encoding"), "", "{short:?}");
    server.stop().await;
}

/// Where nobody has to say who it is, a page of elsewhere whose name leads here (DNS rebinding) is not let in.
#[tokio::test]
async fn without_credentials_only_this_machine_is_asked_for() {
    let (_database, server, web) = serve().await;
    for (host, is_let_in) in [
        ("127.0.0.1:8080", true),
        ("localhost", true),
        ("LOCALHOST:80", true),
        ("[::1]:8080", true),
        ("127.1.2.3", true),
        ("evil.example:8080", false),
        ("localhost.evil.example", false),
        ("192.0.2.1", false),
        ("127.0.0.1.evil.example", false),
    ] {
        let answer = web
            .clone()
            .with("host", host)
            .post("/v1/check", &question())
            .await;
        let expected = if is_let_in {
            "200 "
        } else {
            "421 HOST_NOT_LOCAL"
        };
        assert_eq!(answer.failed(), expected, "{host}");
    }
    server.stop().await;
    let database = Database::create().await;
    let config = config_with_keys(&database.url, TIMING, Pepper::default());
    let server = Server::start(config).await;
    let web = Web::of(&server).with("host", "hallpass.example");
    let answer = web.post("/v1/check", &question()).await;
    assert_eq!(answer.failed(), "401 CREDENTIAL_MISSING");
    server.stop().await;
}

fn preflight(web: &Web, origin: &str) -> impl Future<Output = WebAnswer> {
    let web = web
        .clone()
        .with("origin", origin)
        .with("access-control-request-method", "POST")
        .with("access-control-request-headers", "authorization");
    async move { web.send(Method::OPTIONS, "/v1/check", None).await }
}

#[tokio::test]
async fn pages_of_listed_origins_alone_may_call() {
    let database = Database::create().await;
    let config = config_with_keys(&database.url, TIMING, Pepper::default());
    let server = Server::start(Config {
        http: Settings {
            cors_origins: vec![HeaderValue::from_static(ORIGIN)],
            ..config.http
        },
        ..config
    })
    .await;
    let web = Web::of(&server);
    // Without a credential: browsers send none with the question whether they may.
    let asked = preflight(&web, ORIGIN).await;
    assert_eq!(asked.status, 200, "{asked:?}");
    assert_eq!(asked.header("access-control-allow-origin"), ORIGIN);
    assert!(
        asked
            .header("access-control-allow-headers")
            .contains("authorization")
    );
    assert_eq!(asked.header("access-control-allow-credentials"), "");
    let other = preflight(&web, "https://evil.example.org").await;
    assert_eq!(other.header("access-control-allow-origin"), "");
    // A page is to read why it is refused, too.
    let refused = web.clone().with("origin", ORIGIN);
    let refused = refused.post("/v1/check", &question()).await;
    assert_eq!(refused.failed(), "401 CREDENTIAL_MISSING");
    assert_eq!(refused.header("access-control-allow-origin"), ORIGIN);
    assert_eq!(
        refused.header("access-control-expose-headers"),
        "x-request-id,retry-after"
    );
    assert!(refused.header("vary").contains("origin"));
    server.stop().await;
}

#[tokio::test]
async fn who_asks_too_much_is_told_when_to_come_again() {
    let database = Database::create().await;
    let url = &database.url;
    fill(&database.client().await).await;
    let key = Made::default().make(url).await;
    let server = Server::start(Config {
        bounds: Bounds {
            caller_rate_max: 1,
            ..bounds()
        },
        ..config_with_keys(url, TIMING, Pepper::default())
    })
    .await;
    let web = Web::of(&server).with("authorization", format!("Bearer {key}"));
    let mut answer = web.post("/v1/check", &question()).await;
    assert_eq!(answer.status, 200);
    for _ in 0..100 {
        answer = web.post("/v1/check", &question()).await;
        if answer.status != 200 {
            break;
        }
    }
    assert_eq!(answer.failed(), "429 RATE_LIMITED");
    let retry_after: u64 = answer.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&retry_after), "{retry_after}");
    assert_eq!(web.get("/api/health").await.status, 200);
    server.stop().await;
}
