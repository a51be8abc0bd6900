//! The short path of a cached check beside tonic's: the same requests by both, and every answer compared.
//!
//! A request whose message comes in two frames is left to tonic; so the same bytes go either way.

use std::{io::Read, time::Duration};

use flate2::read::GzDecoder;
use hallpass::{auth::api_key::Pepper, limits::Bounds, server::Config};
use hallpass_client::v1::{
    BatchCheckPermissionsItem, BatchCheckPermissionsRequest, BatchCheckPermissionsResponse,
    CheckPermissionRequest, CheckPermissionResponse, Consistency, consistency::Requirement,
};
use http::{HeaderMap, Request, StatusCode};
use prost::{Message, bytes::Bytes};
use tokio::net::TcpStream;

use crate::{
    database::Database,
    keyring::{CHECK, Made, TIMING, config_with_keys},
    names::id,
    server::{APPROVE, Server, bounds, fill, within},
};

const BATCH: &str = "/hallpass.v1.PermissionService/BatchCheckPermissions";

const PROMPT: Duration = Duration::from_secs(4);

/// How a message is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Whole,
    /// With an empty frame that ends it.
    ThenEnded,
    InTwo,
    /// Once the service has read that there will be one.
    Later,
}

/// What came back, without how stale it was.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    message: Option<String>,
    trailers: Option<HeaderMap>,
}

struct Caller {
    client: h2::client::SendRequest<Bytes>,
    endpoint: String,
    key: String,
}

impl Caller {
    async fn connect(server: &Server, key: &str) -> Self {
        let stream = TcpStream::connect(server.address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        Self {
            client: client.ready().await.unwrap(),
            endpoint: server.endpoint.clone(),
            key: key.to_owned(),
        }
    }

    /// Sends these bytes as the body of a call that would take its answer packed.
    async fn call(&mut self, path: &str, body: &[u8], sent: Sent) -> Answer {
        let request = Request::post(format!("{}{path}", self.endpoint))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-accept-encoding", "gzip")
            .header("authorization", format!("Bearer {}", self.key));
        let (answer, mut stream) = self
            .client
            .send_request(request.body(()).unwrap(), false)
            .unwrap();
        let bytes = Bytes::copy_from_slice(body);
        match sent {
            Sent::Whole => stream.send_data(bytes, true).unwrap(),
            Sent::ThenEnded => {
                stream.send_data(bytes, false).unwrap();
                stream.send_data(Bytes::new(), true).unwrap();
            }
            Sent::InTwo => {
                let half = body.len() / 2;
                stream.send_data(bytes.slice(..half), false).unwrap();
                stream.send_data(bytes.slice(half..), true).unwrap();
            }
            Sent::Later => {
                let other = check("lincoln", "ann", APPROVE).encode_to_vec();
                let other = Box::pin(self.call(CHECK, &framed(&other), Sent::Whole)).await;
                assert!(other.message.is_some(), "{other:?}");
                stream.send_data(bytes, true).unwrap();
            }
        }
        let answer = within("an answer", PROMPT, answer).await.unwrap();
        let (head, mut body) = answer.into_parts();
        let mut received = Vec::new();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            received.extend_from_slice(&data);
        }
        Answer {
            status: head.status,
            message: (!received.is_empty()).then(|| shown(path, &unpacked(&received))),
            trailers: body.trailers().await.unwrap(),
            headers: head.headers,
        }
    }
}

/// Without gRPC's head.
fn unpacked(received: &[u8]) -> Vec<u8> {
    let (head, message) = received.split_at(5);
    assert_eq!(
        u32::from_be_bytes(head[1..].try_into().unwrap()) as usize,
        message.len()
    );
    if head[0] == 0 {
        return message.to_vec();
    }
    let mut unpacked = Vec::new();
    GzDecoder::new(message).read_to_end(&mut unpacked).unwrap();
    unpacked
}

fn shown(path: &str, message: &[u8]) -> String {
    if path == CHECK {
        let mut answer = CheckPermissionResponse::decode(message).unwrap();
        answer.evidence.as_mut().unwrap().staleness = None;
        format!("{answer:?}")
    } else {
        let mut answer = BatchCheckPermissionsResponse::decode(message).unwrap();
        if let Some(evidence) = &mut answer.evidence {
            evidence.staleness = None;
        }
        format!("{answer:?}")
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], length.as_slice(), message].concat()
}

fn check(organization: &str, user: &str, permission: &str) -> CheckPermissionRequest {
    let named = |name: &str| match name.strip_prefix('=') {
        Some(literal) => literal.to_owned(),
        None => id(name).to_string(),
    };
    CheckPermissionRequest {
        organization_id: named(organization),
        user_id: named(user),
        permission: permission.to_owned(),
        ..CheckPermissionRequest::default()
    }
}

fn item(check: CheckPermissionRequest) -> BatchCheckPermissionsItem {
    BatchCheckPermissionsItem {
        organization_id: check.organization_id,
        user_id: check.user_id,
        permission: check.permission,
    }
}

/// Bodies of checks, and whether the short path has the answer.
fn checks() -> Vec<(Vec<u8>, bool)> {
    let long = "k".repeat(256);
    let upper = format!("={}", id("lincoln").to_string().to_uppercase());
    let simple = format!("={}", id("bob").simple());
    let questions = [
        (check("lincoln", "bob", APPROVE), true),
        (check("lincoln", "pat", APPROVE), true),
        (check("lincoln", "bob", "can_do_what_nobody_knows"), true),
        (check(&upper, "bob", APPROVE), true),
        (check("lincoln", "bob", &long[1..]), true),
        (check("lincoln", "bob", &long), false),
        (check("lincoln", "bob", ""), false),
        (check("lincoln", "bob", "can\0view"), false),
        (check("lincoln", &simple, APPROVE), false),
        (check("=", "=not a uuid", APPROVE), false),
        // What the caller may not ask about.
        (check("franklin", "bob", APPROVE), false),
    ];
    let of = |request: &CheckPermissionRequest| framed(&request.encode_to_vec());
    let mut bodies: Vec<_> = (questions.iter())
        .map(|(request, is_short)| (of(request), *is_short))
        .collect();
    let plain = questions[0].0.clone();
    let consistency = |requirement| CheckPermissionRequest {
        consistency: Some(Consistency {
            requirement: Some(requirement),
        }),
        ..plain.clone()
    };
    let explained = CheckPermissionRequest {
        explain: true,
        ..plain.clone()
    };
    bodies.extend([
        (of(&consistency(Requirement::MinimizeLatency(true))), false),
        (of(&consistency(Requirement::FullyConsistent(true))), false),
        (of(&explained), false),
    ]);
    let whole = of(&plain);
    // Another message behind it, none, one that is cut off, one that says it is packed, and one that is no message.
    bodies.push(([whole.as_slice(), &whole].concat(), false));
    bodies.push((Vec::new(), false));
    bodies.push((whole[..whole.len() - 1].to_vec(), false));
    bodies.push(([&[1], &whole[1..]].concat(), false));
    bodies.push((framed(&plain.encode_to_vec()[..50]), false));
    bodies.push((framed(&[0x0a, 0x02, 0xff, 0xfe]), false));
    bodies
}

fn batches() -> Vec<(Vec<u8>, bool)> {
    let batch = |items: &[CheckPermissionRequest]| {
        let items = items.iter().cloned().map(item).collect();
        let request = BatchCheckPermissionsRequest {
            items,
            consistency: None,
        };
        framed(&request.encode_to_vec())
    };
    let known = [
        check("lincoln", "bob", APPROVE),
        check("lincoln", "pat", APPROVE),
        check("lincoln", "bob", "can_do_what_nobody_knows"),
    ];
    let with = |other| batch(&[&known[..], &[other]].concat());
    vec![
        (batch(&known), true),
        (batch(&vec![known.clone(); 40].concat()), true),
        (batch(&[]), false),
        (with(check("franklin", "bob", APPROVE)), false),
        (with(check("lincoln", "=", APPROVE)), false),
    ]
}

async fn start(bounds: Bounds) -> (Server, Database, String) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let key = Made {
        organizations: Some(vec![id("lincoln")]),
        ..Made::default()
    };
    let key = key.make(&database.url).await;
    let config = Config {
        bounds,
        ..config_with_keys(&database.url, TIMING, Pepper::default())
    };
    (Server::start(config).await, database, key)
}

#[tokio::test]
async fn both_paths_answer_the_same() {
    let (server, _database, key) = start(bounds()).await;
    let mut caller = Caller::connect(&server, &key).await;
    let calls = (checks().into_iter().map(|call| (CHECK, call)))
        .chain(batches().into_iter().map(|call| (BATCH, call)));
    for (path, (body, is_short)) in calls {
        let mut tonic = caller.call(path, &body, Sent::InTwo).await;
        let packs = tonic.headers.remove("grpc-encoding").is_some();
        for sent in [Sent::Whole, Sent::ThenEnded, Sent::Later] {
            let mut found = caller.call(path, &body, sent).await;
            let is_packed = found.headers.remove("grpc-encoding").is_some();
            // What is answered in short is not packed, and tells so which way it came. Where more is to come, either may.
            if sent == Sent::Whole {
                assert_eq!(packs && !is_packed, is_short, "{path} {body:?} {found:?}");
            }
            assert_eq!(found, tonic, "{path} {sent:?} {body:?}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_batch_counts_the_same_on_both_paths() {
    for sent in [Sent::Whole, Sent::InTwo] {
        // Ten items are a call: this batch is more than a second's worth, and takes all of it.
        let bounds = Bounds {
            caller_rate_max: 3,
            ..bounds()
        };
        let (server, _database, key) = start(bounds).await;
        let mut caller = Caller::connect(&server, &key).await;
        let (large, _) = batches().remove(1);
        let answer = caller.call(BATCH, &large, sent).await;
        let code = answer
            .headers
            .get("grpc-status")
            .map(|code| code.to_str().unwrap());
        assert_eq!(code, Some("8"), "{sent:?} {answer:?}");
        server.stop().await;
    }
}
