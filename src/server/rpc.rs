//! Where calls of gRPC come in.
//!
//! Invariant: whatever comes in passes the same layers, in the same order.

use std::{
    convert::Infallible,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::future::{Either, TryFutureExt, ready};
use http::{Request, Response};
use http_body::Body;
use hyper::{body::Incoming, server::conn::http2::Builder, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prost::bytes::Bytes;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tonic::{Status, codec::CompressionEncoding, service::Routes, transport::Server};
use tonic_health::pb::health_server::{Health, HealthServer};
use tower::{Service, ServiceBuilder};

use super::{
    ServeError,
    accept::Acceptor,
    batch::{Batched, Calls, Queue},
    connections::{
        Connections, ERROR_RESETS_MAX, FRAME_BYTES_MAX, HEADER_LIST_BYTES_MAX,
        STREAMS_A_CONNECTION_MAX, UNSEEN_RESETS_MAX, WINDOW_BYTES,
    },
    drive::{drive, goodbye},
    io::Io,
};
use crate::{
    auth::Authenticator,
    grpc::{
        direct::Direct,
        gate::GateLayer,
        limit::{CallerLayer, DeadlineLayer, DoorLayer},
        observe::ObserveLayer,
        v1,
    },
    http::Services,
    limits::Limits,
};

/// 10,000 items, with two ids of 36 bytes each and a permission's key of 76 on average: three times as long as keys are.
/// Keys may have 255 bytes, and fewer items of such a length fit. A request that is packed has this bound unpacked, too.
const REQUEST_BYTES_MAX: usize = 3 << 19;

/// A setting that names 10,000 users by ids of 36 bytes, with room. An id that is empty is 2 bytes, and 24 of memory.
const CHANGE_REQUEST_BYTES_MAX: usize = 512 << 10;

/// A question about health or reflection: a name. Whoever asks for health needs no credential.
const NAME_REQUEST_BYTES_MAX: usize = 4 << 10;

/// Everything that is served over gRPC.
pub(super) fn grpc_routes(
    services: &Services,
    health: HealthServer<impl Health>,
) -> Result<Direct<Routes>, ServeError> {
    let routes = Routes::new(health.max_decoding_message_size(NAME_REQUEST_BYTES_MAX))
        .add_service(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .build_v1()?
                .max_decoding_message_size(NAME_REQUEST_BYTES_MAX),
        )
        .add_service(
            v1::permission_service_server::PermissionServiceServer::from_arc(Arc::clone(
                &services.permissions,
            ))
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip)
            .send_compressed(CompressionEncoding::Gzip),
        )
        .add_service(
            v1::admin_service_server::AdminServiceServer::from_arc(Arc::clone(&services.admin))
                .max_decoding_message_size(CHANGE_REQUEST_BYTES_MAX)
                .accept_compressed(CompressionEncoding::Gzip)
                .send_compressed(CompressionEncoding::Gzip),
        )
        .add_service(
            v1::audit_service_server::AuditServiceServer::from_arc(Arc::clone(&services.audit))
                .accept_compressed(CompressionEncoding::Gzip)
                .send_compressed(CompressionEncoding::Gzip),
        );
    Ok(Direct::new(
        Arc::clone(&services.permissions),
        routes.prepare(),
    ))
}

pub(super) async fn serve_grpc(
    routes: Direct<Routes>,
    authenticator: Arc<Authenticator>,
    limits: Arc<Limits>,
    observe: ObserveLayer,
    acceptor: Acceptor,
    connections: Connections,
    stop: impl Future<Output = ()>,
) {
    // What a call comes through, from outside: the counting of all, a place among those in flight and its address's share, a time by
    // which it ends, who calls and whether that fits, and the caller's share.
    let calls = ServiceBuilder::new()
        .layer(observe)
        .layer(DoorLayer(Arc::clone(&limits)))
        .layer(DeadlineLayer(Arc::clone(&limits)))
        .layer(GateLayer(authenticator, Arc::clone(&limits)))
        .layer(CallerLayer(limits))
        .service(routes);
    drive(acceptor, stop, |io, stops| {
        connection(calls.clone(), io, connections.clone(), stops)
    })
    .await;
}

async fn connection<S, B>(calls: S, io: Io, connections: Connections, stops: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send,
    S::Future: Send + 'static,
    B: Body<Data = Bytes, Error = Status> + Send + 'static,
{
    let peer = io.peer().clone();
    // One connection's calls come one after the other: nobody waits for this lock.
    let calls = Mutex::new(calls);
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let called = catch_unwind(AssertUnwindSafe(|| {
            let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
            calls.call(request)
        }));
        if let Ok(answer) = called {
            Either::Left(answer.map_err(|never| match never {}))
        } else {
            tracing::error!("a call panicked");
            Either::Right(ready(Err(Panicked)))
        }
    });
    let batch = Calls::default();
    let connection =
        builder(&connections, batch.queue()).serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(Batched::new(connection, batch));
    let mut says_goodbye = pin!(goodbye(&connections, &stops));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = &mut says_goodbye => {
            connection.as_mut().connection().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

/// A call that ends alone: its stream is reset, and the connection goes on.
#[derive(Debug, Error)]
#[error("a call panicked")]
struct Panicked;

fn builder(connections: &Connections, calls: Queue) -> Builder<Queue> {
    let mut builder = Builder::new(calls);
    builder
        .timer(TokioTimer::new())
        // Of no use to a call: its client knows what time it is.
        .auto_date_header(false)
        .keep_alive_interval(connections.keepalive_interval)
        .keep_alive_timeout(connections.keepalive_timeout)
        .max_concurrent_streams(STREAMS_A_CONNECTION_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .initial_connection_window_size(WINDOW_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_pending_accept_reset_streams(UNSEEN_RESETS_MAX)
        .max_local_error_reset_streams(ERROR_RESETS_MAX);
    builder
}

/// A server of tonic's with these bounds.
#[must_use]
pub fn tonic_server(connections: &Connections) -> Server {
    let server = Server::builder()
        .http2_keepalive_interval(Some(connections.keepalive_interval))
        .http2_keepalive_timeout(Some(connections.keepalive_timeout))
        .max_concurrent_streams(STREAMS_A_CONNECTION_MAX)
        .http2_max_header_list_size(HEADER_LIST_BYTES_MAX)
        .initial_connection_window_size(WINDOW_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(UNSEEN_RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(ERROR_RESETS_MAX));
    match connections.age_max {
        // Not tonic's grace: with one it says no goodbye, and only cuts off. The end is [`Io`]'s.
        Some(age_max) => server.max_connection_age(age_max),
        None => server,
    }
}
