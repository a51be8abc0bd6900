//! Callers who keep what they have opened: answers that are not taken, streams, requests that are too long or too many.

use std::time::Duration;

use hallpass::limits::Bounds;
use hallpass_client::{
    tonic::{Code, IntoRequest, Status, Streaming, codec::CompressionEncoding},
    v1::{
        BatchCheckPermissionsItem, BatchCheckPermissionsRequest, CheckPermissionRequest,
        ListUserPermissionsRequest,
    },
};
use http::{Request, Response};
use prost::{Message, bytes::Bytes};
use tokio::net::TcpStream;
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};
use tonic_types::StatusExt;

use crate::{
    database::{Database, eventually},
    limits::wrong_fields,
    names::id,
    server::{APPROVE, Server, bounds, config, fill, question, within},
};

const PROMPT: Duration = Duration::from_secs(4);

const LIST: &str = "/hallpass.v1.PermissionService/ListUserPermissions";
const BATCH: &str = "/hallpass.v1.PermissionService/BatchCheckPermissions";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// A service with these bounds, for whom the test is a proxy.
async fn start(bounds: Bounds) -> (Server, Database) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let config = hallpass::server::Config {
        bounds: Bounds {
            trusted_proxies: vec!["127.0.0.1/32".parse().unwrap()],
            ..bounds
        },
        ..config(&database.url)
    };
    (Server::start(config).await, database)
}

/// The reason that a call from this address is refused for, if it is. It is malformed, and answered without a body.
async fn refused(server: &Server, address: &str) -> Option<String> {
    let mut asked = question("", "", "").into_request();
    let metadata = asked.metadata_mut();
    metadata.insert("x-forwarded-for", address.parse().unwrap());
    let status = server.try_check(asked).await.unwrap_err();
    match status.code() {
        Code::InvalidArgument => None,
        _ => Some(status.get_details_error_info().unwrap().reason),
    }
}

/// A client that makes room for so many bytes of each answer.
async fn with_window(server: &Server, window: u32) -> h2::client::SendRequest<Bytes> {
    let address = server.endpoint.trim_start_matches("http://");
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(window)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    client.ready().await.unwrap()
}

/// Begins a call from an address; the answer's body, not read, once it has begun.
async fn begin(
    server: &Server,
    client: &mut h2::client::SendRequest<Bytes>,
    path: &str,
    address: &str,
    message: Option<&[u8]>,
) -> (Option<h2::SendStream<Bytes>>, Response<h2::RecvStream>) {
    let request = Request::post(format!("{}{path}", server.endpoint))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-forwarded-for", address)
        .body(())
        .unwrap();
    let (answer, mut body) = client.send_request(request, false).unwrap();
    // A stream's caller may speak later.
    let open = match message {
        None => Some(body),
        Some(message) => {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            let framed = [&[0], length.as_slice(), message].concat();
            body.send_data(framed.into(), true).unwrap();
            None
        }
    };
    let answer = within("the beginning of an answer", PROMPT, answer).await;
    (open, answer.unwrap())
}

#[tokio::test]
async fn who_takes_no_answer_keeps_its_places() {
    let list = ListUserPermissionsRequest {
        organization_id: id("lincoln").to_string(),
        user_id: id("bob").to_string(),
        ..ListUserPermissionsRequest::default()
    };
    let list = list.encode_to_vec();
    let of_caller = Bounds {
        caller_in_flight_max: 3,
        ..bounds()
    };
    let of_all = Bounds {
        requests_in_flight_max: 3,
        ..bounds()
    };
    for (bounds, reason) in [(of_caller, "RATE_LIMITED"), (of_all, "OVERLOADED")] {
        let (server, _database) = start(bounds).await;
        // A stream of which nothing is asked has no end, whatever room there is.
        let cases = [
            (LIST, Some(list.as_slice()), 0),
            (LIST, Some(list.as_slice()), 1),
            (LIST, Some(list.as_slice()), 1_000),
            (REFLECTION, None, 65_535),
        ];
        for (path, message, window) in cases {
            let mut client = with_window(&server, window).await;
            let mut kept = Vec::new();
            for _ in 0..3 {
                kept.push(begin(&server, &mut client, path, "198.51.100.1", message).await);
            }
            // Whatever the service has to do yet is done meanwhile.
            for _ in 0..20 {
                let said = refused(&server, "198.51.100.1").await;
                assert_eq!(said.as_deref(), Some(reason), "{path} {window}");
            }
            let other = refused(&server, "198.51.100.2").await;
            assert_eq!(other.is_some(), reason == "OVERLOADED", "{path} {window}");
            assert_eq!(server.health("").await, ServingStatus::Serving);
            // One that is taken gives its place back, and so do those that are given up.
            if message.is_some() && window > 0 {
                let (_, answer) = kept.pop().unwrap();
                let mut taken = answer.into_body();
                while let Some(data) = within("an answer", PROMPT, taken.data()).await {
                    let room = data.unwrap().len();
                    taken.flow_control().release_capacity(room).unwrap();
                }
                eventually("its place is free", async || {
                    refused(&server, "198.51.100.1").await.is_none()
                })
                .await;
            }
            drop(kept);
            eventually("all have gone", async || {
                refused(&server, "198.51.100.1").await.is_none()
            })
            .await;
        }
        server.stop().await;
    }
}

/// Packed, too: what packs an answer must not take it.
#[tokio::test]
async fn who_takes_no_answer_over_http_keeps_its_places() {
    let (server, _database) = start(Bounds {
        caller_in_flight_max: 3,
        ..bounds()
    })
    .await;
    let stream = TcpStream::connect(server.http).await.unwrap();
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(1)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut client: h2::client::SendRequest<Bytes> = client.ready().await.unwrap();
    let mut kept = Vec::new();
    for _ in 0..3 {
        let request = Request::get(format!("http://{}/v1/audit?page_size=100", server.http))
            .header("accept-encoding", "gzip")
            .header("x-forwarded-for", "198.51.100.1")
            .body(())
            .unwrap();
        let (answer, _body) = client.send_request(request, true).unwrap();
        let answer = within("the beginning of an answer", PROMPT, answer)
            .await
            .unwrap();
        assert_eq!(answer.headers()["content-encoding"], "gzip");
        kept.push(answer);
    }
    for _ in 0..20 {
        let said = refused(&server, "198.51.100.1").await;
        assert_eq!(said.as_deref(), Some("RATE_LIMITED"));
    }
    drop(kept);
    eventually("their places are free", async || {
        refused(&server, "198.51.100.1").await.is_none()
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn a_heavy_answer_counts_as_many_calls() {
    let request = |item| BatchCheckPermissionsRequest {
        items: vec![item; 10_000],
        ..BatchCheckPermissionsRequest::default()
    };
    let light = BatchCheckPermissionsItem {
        organization_id: id("lincoln").to_string(),
        user_id: id("bob").to_string(),
        permission: APPROVE.to_owned(),
    };
    // About 60 kB as an answer, and more than a megabyte.
    let light = request(light).encode_to_vec();
    let heavy = request(BatchCheckPermissionsItem::default()).encode_to_vec();
    let of_caller = Bounds {
        caller_in_flight_max: 40,
        ..bounds()
    };
    let of_all = Bounds {
        requests_in_flight_max: 40,
        ..bounds()
    };
    for (bounds, reason) in [(of_caller, "RATE_LIMITED"), (of_all, "OVERLOADED")] {
        let (server, _database) = start(bounds).await;
        let mut client = with_window(&server, 0).await;
        let address = "198.51.100.1";
        let one = begin(&server, &mut client, BATCH, address, Some(&light)).await;
        assert_eq!(refused(&server, address).await, None);
        // One that weighs more than there is left is answered all the same, for it could never be otherwise.
        let another = begin(&server, &mut client, BATCH, address, Some(&heavy)).await;
        assert_eq!(refused(&server, address).await.as_deref(), Some(reason));
        drop((one, another));
        eventually("their places are free", async || {
            refused(&server, address).await.is_none()
        })
        .await;
        server.stop().await;
    }
}

/// Watches health from an address.
async fn watch(server: &Server, address: &str) -> Result<Streaming<HealthCheckResponse>, Status> {
    let mut asked = HealthCheckRequest::default().into_request();
    let metadata = asked.metadata_mut();
    metadata.insert("x-forwarded-for", address.parse().unwrap());
    let mut client = HealthClient::new(server.channel.clone());
    client
        .watch(asked)
        .await
        .map(hallpass_client::tonic::Response::into_inner)
}

#[tokio::test]
async fn an_address_watches_health_so_often_and_no_more() {
    let (server, _database) = start(bounds()).await;
    let mut watches = Vec::new();
    let status = loop {
        match watch(&server, "198.51.100.1").await {
            Ok(stream) => watches.push(stream),
            Err(status) => break status,
        }
        assert!(watches.len() <= 500);
    };
    assert_eq!(watches.len(), 200);
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    drop(watch(&server, "198.51.100.2").await.unwrap());
    // Health is asked for and checks are answered as ever, for the address too.
    assert_eq!(server.health("").await, ServingStatus::Serving);
    assert_eq!(refused(&server, "198.51.100.1").await, None);
    drop(watches);
    eventually("their places are free", async || {
        watch(&server, "198.51.100.1").await.is_ok()
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn health_and_reflection_take_names_and_nothing_longer() {
    let (server, _database) = start(bounds()).await;
    for (length, expected) in [(4_000, Code::NotFound), (5_000, Code::OutOfRange)] {
        let service = "x".repeat(length);
        let asked = HealthCheckRequest {
            service: service.clone(),
        };
        let mut health = HealthClient::new(server.channel.clone());
        let status = health.check(asked.clone()).await.unwrap_err();
        assert_eq!(status.code(), expected, "{status:?}");
        let status = health.watch(asked).await.unwrap_err();
        assert_eq!(status.code(), expected, "{status:?}");
        let asked = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(service)),
        };
        let mut reflection = ServerReflectionClient::new(server.channel.clone());
        let asked = tokio_stream::iter([asked]);
        let answered = reflection.server_reflection_info(asked).await;
        let answer = answered.unwrap().into_inner().message().await;
        match answer {
            Err(status) => assert_eq!(status.code(), Code::NotFound, "{status:?}"),
            // The stream ends without a word.
            Ok(answer) => assert_eq!((answer, expected), (None, Code::OutOfRange)),
        }
    }
    server.stop().await;
}

/// More items than a batch may have, and what makes the message malformed behind them: who reads on to there has made
/// room for all of them.
#[tokio::test]
async fn too_many_items_are_refused_before_they_are_decoded() {
    let (server, _database) = start(bounds()).await;
    let items = |count| BatchCheckPermissionsRequest {
        items: vec![BatchCheckPermissionsItem::default(); count],
        consistency: None,
    };
    let batch = "/hallpass.v1.PermissionService/BatchCheckPermissions";
    for (count, expected) in [(10_000, Code::Internal), (10_001, Code::InvalidArgument)] {
        let mut message = items(count).encode_to_vec();
        message.push(0xff);
        let mut client = with_window(&server, 65_535).await;
        let (_, answer) = begin(&server, &mut client, batch, "198.51.100.1", Some(&message)).await;
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.code(), expected, "{count}: {status:?}");
    }
    // Packed, it is 1 kB or so.
    for mut client in [
        server.client(),
        server.client().send_compressed(CompressionEncoding::Gzip),
    ] {
        let asked = client.batch_check_permissions(items(700_000)).await;
        assert_eq!(wrong_fields(&asked.unwrap_err()), ["items"]);
        let asked = client.batch_check_permissions(items(800_000)).await;
        let code = asked.unwrap_err().code();
        assert!([Code::OutOfRange, Code::ResourceExhausted].contains(&code));
    }
    // What is no batch is decoded as ever.
    let asked: CheckPermissionRequest = question("lincoln", "bob", APPROVE);
    assert!(server.try_check(asked).await.is_ok());
    server.stop().await;
}

/// hyper ends a connection on which somebody asks it to be a proxy, with what it has read before.
#[tokio::test]
async fn a_connection_that_ends_amid_calls_gives_their_places_back() {
    const CALLS: usize = 20;
    let (server, _database) = start(Bounds {
        requests_in_flight_max: 2 * CALLS,
        ..bounds()
    })
    .await;
    for _ in 0..4 {
        let mut client = with_window(&server, 65_535).await;
        let mut open = Vec::new();
        // Without a pause: they go out together.
        for _ in 0..CALLS {
            let request = Request::post(format!("{}/nobody.serves/This", server.endpoint));
            open.push(
                client
                    .send_request(request.body(()).unwrap(), false)
                    .unwrap(),
            );
        }
        let proxy = Request::connect("127.0.0.1:1").header("content-length", "1");
        let (answer, _body) = client.send_request(proxy.body(()).unwrap(), false).unwrap();
        assert!(
            within("the end of the connection", PROMPT, answer)
                .await
                .is_err()
        );
    }
    eventually("calls find their places", async || {
        let mut free = Vec::new();
        for _ in 0..CALLS {
            free.push(refused(&server, "192.0.2.1").await.is_none());
        }
        free.iter().all(|is_free| *is_free)
    })
    .await;
    server.stop().await;
}
