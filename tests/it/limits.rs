//! What the service refuses, how it says so, and what any gRPC client may expect of it.

use hallpass_client::{
    tonic::{Code, Status, codec::CompressionEncoding},
    v1::{
        BatchCheckPermissionsItem, BatchCheckPermissionsRequest, BatchCheckPermissionsResponse,
        CheckPermissionRequest, Consistency, ListUserPermissionsRequest,
        ListUserPermissionsResponse, batch_check_permissions_result::Result as ItemResult,
        consistency::Requirement,
    },
};
use prost::Message;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tonic_types::{StatusExt, pb};

use crate::{
    database::Database,
    names::id,
    server::{APPROVE, Server, config, fill},
};

const SERVICE: &str = "hallpass.v1.PermissionService";

/// One of the three calls, all of whose requests have the same parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Check,
    Explain,
    /// The organization, user and permission make one item.
    Batch,
    /// The key is the module.
    List,
}

const CALLS: [Call; 4] = [Call::Check, Call::Explain, Call::Batch, Call::List];

struct Parts {
    organization: String,
    user: String,
    key: String,
    consistency: Option<Consistency>,
}

fn well_formed() -> Parts {
    Parts {
        organization: id("lincoln").to_string(),
        user: id("bob").to_string(),
        key: APPROVE.to_owned(),
        consistency: None,
    }
}

fn require(requirement: Option<Requirement>) -> Option<Consistency> {
    Some(Consistency { requirement })
}

fn max_staleness(seconds: i64, nanos: i32) -> Option<Requirement> {
    Some(Requirement::MaxStaleness(prost_types::Duration {
        seconds,
        nanos,
    }))
}

fn at_least_as_fresh(position: &str) -> Option<Requirement> {
    Some(Requirement::AtLeastAsFresh(position.to_owned()))
}

/// A filled database and the service on it.
async fn start() -> Server {
    let database = Database::create().await;
    fill(&database.client().await).await;
    Server::start(config(&database.url)).await
}

async fn call(server: &Server, call: Call, parts: Parts) -> Result<(), Status> {
    match call {
        Call::Check | Call::Explain => {
            let request = CheckPermissionRequest {
                organization_id: parts.organization,
                user_id: parts.user,
                permission: parts.key,
                consistency: parts.consistency,
                explain: call == Call::Explain,
            };
            server.client().check_permission(request).await?;
        }
        Call::Batch => {
            let items = vec![BatchCheckPermissionsItem {
                organization_id: parts.organization,
                user_id: parts.user,
                permission: parts.key,
            }];
            let response = batch(server, items, parts.consistency).await?;
            if let Some(ItemResult::Error(error)) = response.results[0].result.clone() {
                assert_eq!(response.evidence, None);
                return Err(from_message(&error));
            }
        }
        Call::List => {
            list(server, parts).await?;
        }
    }
    Ok(())
}

async fn list(server: &Server, parts: Parts) -> Result<ListUserPermissionsResponse, Status> {
    let request = ListUserPermissionsRequest {
        organization_id: parts.organization,
        user_id: parts.user,
        module: parts.key,
        allowed_only: false,
        consistency: parts.consistency,
    };
    let response = server.client().list_user_permissions(request).await?;
    Ok(response.into_inner())
}

async fn batch(
    server: &Server,
    items: Vec<BatchCheckPermissionsItem>,
    consistency: Option<Consistency>,
) -> Result<BatchCheckPermissionsResponse, Status> {
    let request = BatchCheckPermissionsRequest { items, consistency };
    let response = server.client().batch_check_permissions(request).await?;
    Ok(response.into_inner())
}

fn item(organization: &str, user: &str, permission: &str) -> BatchCheckPermissionsItem {
    BatchCheckPermissionsItem {
        organization_id: organization.to_owned(),
        user_id: user.to_owned(),
        permission: permission.to_owned(),
    }
}

/// The error of an item as the status that a call would have.
fn from_message(error: &pb::Status) -> Status {
    Status::with_details(
        Code::from_i32(error.code),
        error.message.clone(),
        error.encode_to_vec().into(),
    )
}

/// The fields that an INVALID_ARGUMENT names. Everything else that must be so of one is asserted.
pub(crate) fn wrong_fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_is_decent(status);
    let violations = status.get_details_bad_request().unwrap().field_violations;
    for violation in &violations {
        assert!(!violation.description.is_empty(), "{status:?}");
        assert!(status.message().contains(&violation.field), "{status:?}");
    }
    violations.into_iter().map(|v| v.field).collect()
}

/// What every error has: a reason of ours, and nothing of the machinery.
pub(crate) fn assert_is_decent(status: &Status) {
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.domain, "hallpass");
    assert!(!info.reason.is_empty());
    let message = status.message();
    assert!(!message.contains(char::is_control), "{message:?}");
    assert!(message.len() < 1_000, "{message}");
    let lower = message.to_lowercase();
    for machinery in [
        "select",
        "sql",
        "postgres",
        "/tmp",
        "localhost",
        "hallpass.",
    ] {
        assert!(!lower.contains(machinery), "{message}");
    }
}

#[tokio::test]
async fn malformed_requests_name_every_field_that_is_wrong() {
    let server = start().await;
    let hyphenated = id("bob").hyphenated().to_string();
    let malformed = [
        String::new(),
        "bob".to_owned(),
        id("bob").simple().to_string(),
        id("bob").braced().to_string(),
        id("bob").urn().to_string(),
        format!(" {hyphenated}"),
        format!("{hyphenated}\n"),
        hyphenated.replace('-', "_"),
        "\u{0}\r\n\u{1b}[31m\u{7f}\u{85}\u{202e}".to_owned(),
        "0' OR 1=1; --".to_owned(),
        "é".repeat(100_000),
    ];
    for value in malformed {
        for call_kind in CALLS {
            let prefix = if call_kind == Call::Batch {
                "items[0]."
            } else {
                ""
            };
            let mut parts = well_formed();
            parts.organization.clone_from(&value);
            let status = call(&server, call_kind, parts).await.unwrap_err();
            assert_eq!(wrong_fields(&status), [format!("{prefix}organization_id")]);

            let mut parts = well_formed();
            (parts.user, parts.key) = (value.clone(), "x".repeat(256));
            let key = if call_kind == Call::List {
                "module"
            } else {
                "permission"
            };
            let status = call(&server, call_kind, parts).await.unwrap_err();
            let both = [format!("{prefix}user_id"), format!("{prefix}{key}")];
            assert_eq!(wrong_fields(&status), both);
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn keys_have_a_length_and_no_nul() {
    let server = start().await;
    let cases = [
        ("", false),
        ("x", true),
        (&*"x".repeat(255), true),
        (&*"x".repeat(256), false),
        // 256 bytes of 128 characters.
        (&*"é".repeat(128), false),
        (&*"é".repeat(127), true),
        ("a'b\"c\\ \n;", true),
        ("a\u{0}b", false),
    ];
    for (key, is_well_formed) in cases {
        for call_kind in CALLS {
            let parts = Parts {
                key: key.to_owned(),
                ..well_formed()
            };
            let outcome = call(&server, call_kind, parts).await;
            // An empty module is every module.
            if is_well_formed || (call_kind == Call::List && key.is_empty()) {
                outcome.unwrap_or_else(|status| panic!("{call_kind:?} {key:?}: {status:?}"));
                continue;
            }
            let fields = wrong_fields(&outcome.expect_err(key));
            let field = match call_kind {
                Call::Check | Call::Explain => "permission",
                Call::Batch => "items[0].permission",
                Call::List => "module",
            };
            assert_eq!(fields, [field], "{call_kind:?} {key:?}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_consistency_that_is_not_known_is_refused_and_never_weakened() {
    let server = start().await;
    let invalid = [
        (None, "consistency"),
        (
            Some(Requirement::MinimizeLatency(false)),
            "consistency.minimize_latency",
        ),
        (
            Some(Requirement::FullyConsistent(false)),
            "consistency.fully_consistent",
        ),
        (max_staleness(-1, 0), "consistency.max_staleness"),
        (max_staleness(0, -1), "consistency.max_staleness"),
        (max_staleness(1, -1), "consistency.max_staleness"),
        (max_staleness(0, 1_000_000_000), "consistency.max_staleness"),
        (max_staleness(300, 1), "consistency.max_staleness"),
        (max_staleness(i64::MAX, 0), "consistency.max_staleness"),
        (
            max_staleness(i64::MIN, i32::MIN),
            "consistency.max_staleness",
        ),
        (at_least_as_fresh(""), "consistency.at_least_as_fresh"),
        (at_least_as_fresh("812"), "consistency.at_least_as_fresh"),
        (
            at_least_as_fresh("812-5f0c9ae1.20"),
            "consistency.at_least_as_fresh",
        ),
        (
            at_least_as_fresh("\u{1b}[31m\u{202e}"),
            "consistency.at_least_as_fresh",
        ),
        (
            at_least_as_fresh(&"é-".repeat(100_000)),
            "consistency.at_least_as_fresh",
        ),
    ];
    for call_kind in CALLS {
        for (requirement, field) in invalid.clone() {
            let parts = Parts {
                consistency: require(requirement.clone()),
                ..well_formed()
            };
            let status = call(&server, call_kind, parts).await.unwrap_err();
            assert_eq!(wrong_fields(&status), [field]);
            if call_kind != Call::Batch {
                let parts = Parts {
                    organization: "lincoln".to_owned(),
                    user: String::new(),
                    key: "x".repeat(256),
                    consistency: require(requirement),
                };
                let status = call(&server, call_kind, parts).await.unwrap_err();
                assert_eq!(wrong_fields(&status).len(), 4, "{status:?}");
            }
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_batch_has_1_to_10_000_items() {
    let server = start().await;
    let bob = item(
        &id("lincoln").to_string(),
        &id("bob").to_string(),
        "can_view_budget",
    );
    // Those that are too many are not read, nor what stands behind them.
    let expected = [(0, &["items", "consistency"][..]), (10_001, &["items"])];
    for (count, expected) in expected {
        let items = vec![bob.clone(); count];
        let status = batch(&server, items, require(None)).await.unwrap_err();
        assert_eq!(wrong_fields(&status), expected, "{count}");
    }
    // 10,000 users, most of them strangers and none of them in the cache.
    let strangers = (0..9_999).map(|index| {
        let user = id(&format!("stranger {index}")).to_string();
        item(&bob.organization_id, &user, &bob.permission)
    });
    let items: Vec<_> = strangers.chain([bob.clone()]).collect();
    let answered = batch(&server, items, None).await.unwrap();
    let allowed: Vec<bool> = (answered.results.into_iter())
        .map(|result| match result.result {
            Some(ItemResult::Answer(answer)) => answer.allowed,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(allowed.len(), 10_000);
    assert_eq!(allowed.iter().position(|allowed| *allowed), Some(9_999));
    server.stop().await;
}

#[tokio::test]
async fn malformed_items_fail_alone() {
    let server = start().await;
    let (lincoln, bob) = (id("lincoln").to_string(), id("bob").to_string());
    let long = "x".repeat(256);
    let cases = [
        (item(&lincoln, &bob, APPROVE), Ok(true)),
        (item(&lincoln, &id("vic").to_string(), APPROVE), Ok(false)),
        (item("", &bob, APPROVE), Err(vec!["organization_id"])),
        (item(&lincoln, "bob", APPROVE), Err(vec!["user_id"])),
        (item(&lincoln, &bob, ""), Err(vec!["permission"])),
        (
            item("a\nb", "c\u{0}d", &long),
            Err(vec!["organization_id", "user_id", "permission"]),
        ),
        (item(&lincoln, &bob, "no_such_permission"), Ok(false)),
        (item(&lincoln, &bob, APPROVE), Ok(true)),
    ];
    let items = cases.iter().map(|(item, _)| item.clone()).collect();
    let answered = batch(&server, items, None).await.unwrap();
    assert!(answered.evidence.is_some());
    assert_eq!(answered.results.len(), cases.len());
    for (index, ((_, expected), result)) in cases.iter().zip(answered.results).enumerate() {
        match (expected, result.result.unwrap()) {
            (Ok(allowed), ItemResult::Answer(answer)) => assert_eq!(answer.allowed, *allowed),
            (Err(fields), ItemResult::Error(error)) => {
                let fields: Vec<_> = (fields.iter())
                    .map(|field| format!("items[{index}].{field}"))
                    .collect();
                assert_eq!(wrong_fields(&from_message(&error)), fields);
            }
            (expected, result) => panic!("items[{index}]: {result:?}, not {expected:?}"),
        }
    }
    server.stop().await;
}

/// A client takes messages of 4 MiB by default, in every language.
#[tokio::test]
async fn ten_thousand_malformed_items_are_answered_within_what_a_client_takes() {
    let server = start().await;
    for value in ["", "x", &"\u{1}".repeat(64), &"\u{10348}".repeat(16)] {
        let items = vec![item(value, value, ""); 10_000];
        let answered = batch(&server, items, None).await.unwrap();
        assert_eq!(answered.evidence, None);
        for (index, result) in answered.results.into_iter().enumerate() {
            let Some(ItemResult::Error(error)) = result.result else {
                panic!("items[{index}]: {result:?}");
            };
            assert_eq!(error.code, i32::from(Code::InvalidArgument));
            assert!(error.message.contains(&format!("items[{index}].user_id")));
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn messages_over_a_mib_and_a_half_are_refused_compressed_or_not() {
    let server = start().await;
    let bob = item(
        &id("lincoln").to_string(),
        &id("bob").to_string(),
        &"x".repeat(80),
    );
    let request = BatchCheckPermissionsRequest {
        items: vec![bob; 10_000],
        consistency: None,
    };
    assert!(request.encoded_len() > 3 << 19);
    for mut client in [
        server.client(),
        server.client().send_compressed(CompressionEncoding::Gzip),
    ] {
        let status = client.batch_check_permissions(request.clone()).await;
        let code = status.unwrap_err().code();
        assert!(
            [Code::OutOfRange, Code::ResourceExhausted].contains(&code),
            "{code:?}"
        );
    }
    assert!(
        server
            .check("lincoln", "bob", APPROVE)
            .await
            .response
            .allowed
    );
    server.stop().await;
}

#[tokio::test]
async fn gzip_works_both_ways() {
    let server = start().await;
    let mut client = server
        .client()
        .send_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Gzip);
    let request = ListUserPermissionsRequest {
        organization_id: id("lincoln").to_string(),
        user_id: id("bob").to_string(),
        ..ListUserPermissionsRequest::default()
    };
    let response = client.list_user_permissions(request).await.unwrap();
    assert_eq!(response.metadata().get("grpc-encoding").unwrap(), "gzip");
    assert_eq!(response.into_inner().permissions.len(), 30);
    server.stop().await;
}

#[tokio::test]
async fn lists_are_narrowed_by_module_and_by_what_is_allowed() {
    let server = start().await;
    // (module, user, allowed_only) -> how many permissions, how many of them allowed
    let cases = [
        ("", "bob", false, 30, 28),
        ("", "bob", true, 28, 28),
        ("budget", "bob", false, 5, 5),
        ("budget", "cam", false, 5, 3),
        ("budget", "cam", true, 3, 3),
        ("budget", "pat", true, 0, 0),
        ("budget", "stranger", false, 5, 0),
        ("no such module", "bob", false, 0, 0),
        ("Budget", "bob", false, 0, 0),
    ];
    for (module, user, allowed_only, count, allowed) in cases {
        let request = ListUserPermissionsRequest {
            organization_id: id("lincoln").to_string(),
            user_id: id(user).to_string(),
            module: module.to_owned(),
            allowed_only,
            consistency: None,
        };
        let response = server.client().list_user_permissions(request).await;
        let response = response.unwrap().into_inner();
        let found = (
            response.permissions.len(),
            response.permissions.iter().filter(|p| p.allowed).count(),
        );
        assert_eq!(found, (count, allowed), "{module} {user} {allowed_only}");
        let keys: Vec<_> = response.permissions.iter().map(|p| &p.permission).collect();
        assert!(keys.is_sorted(), "{keys:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn reflection_and_health_know_the_service() {
    let server = start().await;
    for name in ["", SERVICE] {
        assert_eq!(server.health(name).await, ServingStatus::Serving);
    }
    let ask = |message_request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message_request),
    };
    let requests = tokio_stream::iter([
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol(SERVICE.to_owned())),
    ]);
    let mut answers = ServerReflectionClient::new(server.channel.clone())
        .server_reflection_info(requests)
        .await
        .unwrap()
        .into_inner();
    let mut answers = async || -> MessageResponse {
        answers
            .message()
            .await
            .unwrap()
            .unwrap()
            .message_response
            .unwrap()
    };
    let MessageResponse::ListServicesResponse(services) = answers().await else {
        panic!("no list of services");
    };
    let names: Vec<_> = services.service.into_iter().map(|s| s.name).collect();
    for name in [SERVICE, "grpc.health.v1.Health"] {
        assert!(names.iter().any(|known| known == name), "{names:?}");
    }
    let MessageResponse::FileDescriptorResponse(files) = answers().await else {
        panic!("the service's file is not known");
    };
    assert!(!files.file_descriptor_proto.is_empty());
    server.stop().await;
}
