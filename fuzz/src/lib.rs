//! The service in the fuzzer's process: gate, decoding, parsing and errors are the real ones, no network is between, and
//! the database is away.
//!
//! Invariant: an answer is one that a caller may get. A panic, an unknown status or a message of two lines is a finding.

use std::{cell::LazyCell, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use hallpass::{
    auth::Authenticator,
    cache::Cache,
    check::Checker,
    feed::Progress,
    grpc::{
        gate::{Gate, GateLayer},
        permission_service::PermissionService,
        v1::permission_service_server::PermissionServiceServer,
    },
    limits::{Bounds, Limits},
    loader::Loader,
    selfcheck,
    store::Store,
};
use http::{Request, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full};
use tokio::runtime::{Builder, Runtime};
use tonic::{Code, Status, body::Body};
use tower::{Layer, ServiceExt};

/// The methods, by the number that an input begins with.
pub const METHODS: [&str; 6] = [
    "CheckPermission",
    "BatchCheckPermissions",
    "ListUserPermissions",
    "ListPermissionHolders",
    "ListUserOrganizations",
    "GetOrganizationSummary",
];

/// How tonic begins what it says of a message that is none.
const NOT_PROTOBUF: &str = "failed to decode Protobuf message";

thread_local! {
    static SERVICE: LazyCell<(Runtime, Gate<PermissionServiceServer<PermissionService>>)> =
        LazyCell::new(start);
}

fn start() -> (Runtime, Gate<PermissionServiceServer<PermissionService>>) {
    // Who waits for something is told at once that it has not come.
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let url = "postgresql:///none?host=/nonexistent&user=none".parse();
    let store = Store::new(&url.expect("a URL"))
        .map(Arc::new)
        .expect("a store");
    let (cache, progress) = (Arc::new(Cache::new(1)), Arc::new(Progress::default()));
    let (loader, nobody_loads) = Loader::new(
        Arc::clone(&store),
        Arc::clone(&cache),
        Arc::clone(&progress),
    );
    drop(nobody_loads);
    let (sampler, _) = selfcheck::sampler(selfcheck::SAMPLE_EVERY);
    let staleness_bound = Duration::from_secs(2);
    let checker = Checker::new(cache, progress, loader, store, staleness_bound, sampler);
    let limits = Arc::new(Limits::new(Bounds {
        requests_in_flight_max: 0,
        caller_in_flight_max: 0,
        address_rate_max: 0,
        credential_rate_max: 0,
        caller_rate_max: 0,
        caller_list_rate_max: 0,
        trusted_proxies: Vec::new(),
        request_deadline_max: None,
        stream_age_max: None,
    }));
    let ceiling = Duration::from_secs(300);
    let service = PermissionService::new(Arc::new(checker), ceiling, Arc::clone(&limits));
    let gate = GateLayer(Arc::new(Authenticator::open()), limits);
    (runtime, gate.layer(PermissionServiceServer::new(service)))
}

/// Calls a method with the bytes of a message, and returns what the caller is told.
///
/// # Panics
/// When that is nothing that a caller may be told.
pub fn call(method: &str, message: &[u8]) -> Status {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(message.len().try_into().expect("less than 4 GiB"));
    frame.put_slice(message);
    let request = Request::post(format!("/hallpass.v1.PermissionService/{method}"))
        .header(CONTENT_TYPE, "application/grpc")
        .body(Body::new(Full::new(Bytes::from(frame))))
        .expect("a request");
    let status = SERVICE.with(|service| {
        let (runtime, gate) = &**service;
        runtime.block_on(async {
            let response = gate.clone().oneshot(request).await;
            let (parts, body) = response.expect("a response").into_parts();
            let body = body.collect().await.expect("a body");
            Status::from_header_map(&parts.headers)
                .or_else(|| Status::from_header_map(body.trailers()?))
                .expect("a status")
        })
    });
    let message = status.message();
    let is_told = match status.code() {
        Code::Ok | Code::InvalidArgument | Code::Unavailable => true,
        Code::Internal => message.starts_with(NOT_PROTOBUF),
        _ => false,
    };
    assert!(is_told, "{status:?}");
    assert!(!message.chars().any(char::is_control), "{message:?}");
    status
}
