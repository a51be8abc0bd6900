//! The description at `/openapi.json`, against the routes and against what they answer; and the page that shows it.

use std::collections::BTreeSet;

use hallpass::auth::access::{ACCESS, Answer};
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};

use crate::{
    database::{Database, as_role},
    server::{Server, config},
    sql::run,
    web::Web,
};

/// What the description is in, and what shows it.
const NOT_DESCRIBED: [&str; 7] = [
    "GET /livez",
    "GET /metrics",
    "GET /readyz",
    "GET /openapi.json",
    "GET /docs",
    "GET /docs/",
    "GET /docs/{asset}",
];

/// One operation of the description.
struct Operation<'a> {
    /// As in the table: `POST /v1/check`.
    name: String,
    method: Method,
    path: &'a str,
    is: &'a Value,
}

fn operations(description: &Value) -> Vec<Operation<'_>> {
    let paths = description["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(move |(method, is)| {
            let method = method.to_uppercase();
            Operation {
                name: format!("{method} {path}"),
                method: method.parse().unwrap(),
                path,
                is,
            }
        })
    });
    operations.collect()
}

/// A service that may change things, on a database with what the examples speak of.
async fn start() -> (Database, Server) {
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "INSERT INTO organizations (id, name) VALUES ('0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11', 'Example');
         INSERT INTO profiles (org_id, user_id, role)
         VALUES ('0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11', '7c9e6679-7425-40de-944b-e07fc1f90ae7', 'admin')",
    )
    .await;
    let mut config = config(&database.url);
    config.admin_database = Some(as_role(&database.url, "hallpass_admin").parse().unwrap());
    let server = Server::start(config).await;
    (database, server)
}

async fn description(web: &Web) -> Value {
    let answer = web.get("/openapi.json").await;
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(
        answer.body["openapi"].as_str().unwrap().get(..4),
        Some("3.1.")
    );
    answer.body
}

/// Follows a reference.
fn resolved<'a>(description: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => description.pointer(&reference[1..]).unwrap(),
        None => schema,
    }
}

/// The example that a schema has, else one that is made of its required parts' examples.
fn example(description: &Value, schema: &Value) -> Value {
    let schema = resolved(description, schema);
    if let Some(example) = schema.get("example") {
        return example.clone();
    }
    if schema.get("items").is_some() {
        return json!([example(description, &schema["items"])]);
    }
    let required = schema["required"].as_array().into_iter().flatten();
    let parts = required.map(|name| {
        let name = name.as_str().unwrap();
        let part = example(description, &schema["properties"][name]);
        (name.to_owned(), part)
    });
    Value::Object(parts.collect::<Map<_, _>>())
}

/// The path with the examples of its parameters in it, and the required ones behind it.
fn path(operation: &Operation<'_>) -> String {
    let mut path = operation.path.to_owned();
    let mut query = String::new();
    for parameter in operation.is["parameters"].as_array().into_iter().flatten() {
        let name = parameter["name"].as_str().unwrap();
        let value = match &parameter["example"] {
            Value::String(text) => text.clone(),
            Value::Null => continue,
            other => other.to_string(),
        };
        match parameter["in"].as_str().unwrap() {
            "path" => path = path.replace(&format!("{{{name}}}"), &value),
            "query" if parameter["required"] == true => query += &format!("&{name}={value}"),
            _ => {}
        }
    }
    // Where to begin is required, though no one way of saying so is; so is an organization where no credential names one.
    let names = |wanted: &str| {
        let mut parameters = operation.is["parameters"].as_array().into_iter().flatten();
        parameters.any(|parameter| parameter["name"] == wanted)
    };
    if names("earliest") {
        query += "&earliest=true";
    }
    if names("organization_id") && operation.path.starts_with("/api/admin/") {
        query += "&organization_id=0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11";
    }
    format!("{path}?{}", query.trim_start_matches('&'))
}

/// The schema of the JSON that an operation answers with this status, if any is described.
fn schema<'a>(description: &'a Value, operation: &'a Value, status: u16) -> Option<&'a Value> {
    let responses = &operation["responses"];
    let response = (responses.get(status.to_string()))
        .or_else(|| responses.get(format!("{}XX", status / 100)))?;
    resolved(description, response).pointer("/content/application~1json/schema")
}

/// Complains of a body that is not as it is described.
fn compare(description: &Value, operation: &Operation<'_>, status: u16, body: &Value) {
    let name = &operation.name;
    let schema = schema(description, operation.is, status)
        .unwrap_or_else(|| panic!("{name} does not describe a {status}: {body}"));
    let mut whole = schema.clone();
    // What it refers to.
    whole["components"] = description["components"].clone();
    let schema = jsonschema::draft202012::options()
        .should_validate_formats(true)
        .build(&whole)
        .unwrap();
    let complaints: Vec<String> = schema
        .iter_errors(body)
        .map(|error| error.to_string())
        .collect();
    assert_eq!(complaints, [""; 0], "{name} {status}: {body}");
}

#[tokio::test]
async fn every_route_is_described_and_nothing_else() {
    let (_database, server) = start().await;
    let description = description(&Web::of(&server)).await;
    let described: BTreeSet<String> = (operations(&description).into_iter())
        .map(|operation| operation.name)
        .collect();
    let rows: BTreeSet<String> = (ACCESS.iter().map(|(name, ..)| *name))
        .filter(|name| !name.starts_with('/') && !NOT_DESCRIBED.contains(name))
        .map(str::to_owned)
        .collect();
    assert_eq!(described, rows);
}

#[tokio::test]
async fn every_operation_has_what_callers_need_to_know() {
    let (_database, server) = start().await;
    let description = description(&Web::of(&server)).await;
    let mut ids = BTreeSet::new();
    for operation in operations(&description) {
        let (name, is) = (&operation.name, operation.is);
        assert!(is["summary"].is_string(), "{name} has no summary");
        assert!(is["tags"].is_array(), "{name} has no tag");
        assert!(
            ids.insert(is["operationId"].as_str().unwrap()),
            "{name}'s id is another's"
        );
        for status in ["4XX", "5XX"] {
            assert!(
                is["responses"].get(status).is_some(),
                "{name} has no {status}"
            );
        }
        for parameter in is["parameters"].as_array().into_iter().flatten() {
            let parameter_name = parameter["name"].as_str().unwrap();
            assert!(
                parameter["description"].is_string(),
                "{name}: {parameter_name}"
            );
            let is_opaque = parameter_name == "page_token";
            let has_example = !parameter["example"].is_null();
            assert!(
                has_example || is_opaque,
                "{name}: {parameter_name} has no example"
            );
        }
        if let Some(body) = is.get("requestBody") {
            let body = &body["content"]["application/json"];
            let example = body.get("example").cloned();
            let example = example.unwrap_or_else(|| example_of(&description, body));
            assert_ne!(example, json!({}), "{name} has no example");
        }
    }
}

fn example_of(description: &Value, body: &Value) -> Value {
    example(description, &body["schema"])
}

/// With its example, and with what it cannot take: it answers as it is described.
#[tokio::test]
async fn every_operation_answers_as_it_is_described() {
    let (_database, server) = start().await;
    let web = Web::of(&server);
    let description = description(&web).await;
    for operation in operations(&description) {
        let (name, path) = (&operation.name, path(&operation));
        let body = operation.is.get("requestBody").map(|body| {
            let body = &body["content"]["application/json"];
            let example = body.get("example").cloned();
            example
                .unwrap_or_else(|| example_of(&description, body))
                .to_string()
        });
        let row = ACCESS.iter().find(|(row, ..)| row == name).unwrap();
        if row.2 == Answer::Message {
            let answer = web.send(operation.method.clone(), &path, body).await;
            assert_eq!(answer.status, 200, "{name}: {answer:?}");
            compare(&description, &operation, 200, &answer.body);
        } else {
            let answer = web.open(operation.method.clone(), &path, body).await;
            assert_eq!(answer.status(), 200, "{name}");
            let content_type = answer.headers()["content-type"].to_str().unwrap();
            let described = &operation.is["responses"]["200"]["content"];
            assert!(
                described.get(content_type).is_some(),
                "{name}: {content_type}"
            );
            let first = answer.into_body().frame().await.unwrap().unwrap();
            assert!(first.into_data().unwrap().starts_with(b"retry: "), "{name}");
        }
        let wrong = web
            .send(
                operation.method.clone(),
                &path.replace('?', "?nonsense=1&"),
                Some("{".to_owned()),
            )
            .await;
        // What asks nothing can be asked nothing wrong.
        if wrong.status != 200 {
            compare(&description, &operation, wrong.status.as_u16(), &wrong.body);
        }
    }
}

/// Everything that the page loads is there, and its policy keeps it from loading anything else.
#[tokio::test]
async fn the_page_is_whole() {
    let (_database, server) = start().await;
    let web = Web::of(&server);
    let to_page = web.get("/docs").await;
    assert_eq!(
        (to_page.status.as_u16(), to_page.header("location")),
        (302, "docs/")
    );
    let page = web.open(Method::GET, "/docs/", None).await;
    let policy = page.headers()["content-security-policy"]
        .to_str()
        .unwrap()
        .to_owned();
    for part in [
        "default-src 'none'",
        "script-src 'self'",
        "connect-src 'self'",
    ] {
        assert!(policy.contains(part), "{policy}");
    }
    let page = page.into_body().collect().await.unwrap().to_bytes();
    let page = std::str::from_utf8(&page).unwrap();
    let attributes = page.split('"').collect::<Vec<_>>();
    let loaded: Vec<&str> = (attributes.chunks_exact(2))
        .filter(|chunk| chunk[0].ends_with("src=") || chunk[0].ends_with("href="))
        .map(|chunk| chunk[1])
        .filter(|link| *link != "data:,")
        .collect();
    assert_eq!(
        loaded,
        ["swagger-ui.css", "swagger-ui-bundle.js", "start.js"]
    );
    for name in loaded {
        let asset = web.open(Method::GET, &format!("/docs/{name}"), None).await;
        assert_eq!(asset.status(), 200, "{name}");
        assert_eq!(asset.headers()["x-content-type-options"], "nosniff");
    }
    assert_eq!(web.get("/docs/nonsense").await.failed(), "404 PATH_UNKNOWN");
}

/// Packed once; as it is for who takes nothing else.
#[tokio::test]
async fn the_description_is_sent_packed_to_who_takes_it() {
    let (_database, server) = start().await;
    let plain = Web::of(&server)
        .open(Method::GET, "/openapi.json", None)
        .await;
    assert!(plain.headers().get("content-encoding").is_none());
    let plain = plain.into_body().collect().await.unwrap().to_bytes();
    let web = Web::of(&server).with("accept-encoding", "deflate, gzip");
    let packed = web.open(Method::GET, "/openapi.json", None).await;
    assert_eq!(packed.headers()["content-encoding"], "gzip");
    let packed = packed.into_body().collect().await.unwrap().to_bytes();
    let mut unpacked = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(&*packed), &mut unpacked).unwrap();
    assert_eq!(unpacked, plain);
    assert!(packed.len() < plain.len() / 2);
}
