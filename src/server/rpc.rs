//! Where calls of gRPC come in.
//!
//! Invariant: whatever comes in passes the same layers, in the same order.

use std::{future::Future, sync::Arc};

use tonic::{
    codec::CompressionEncoding,
    service::Routes,
    transport::{Server, server::Connected},
};
use tonic_health::pb::health_server::{Health, HealthServer};

use super::{
    ServeError,
    accept::Acceptor,
    connections::{
        Connections, ERROR_RESETS_MAX, FRAME_BYTES_MAX, HEADER_LIST_BYTES_MAX,
        STREAMS_A_CONNECTION_MAX, UNSEEN_RESETS_MAX, WINDOW_BYTES,
    },
    io::Io,
};
use crate::{
    auth::{Authenticator, Peer},
    grpc::{
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
) -> Result<Routes, ServeError> {
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
    Ok(routes)
}

pub(super) async fn serve_grpc(
    routes: Routes,
    authenticator: Arc<Authenticator>,
    limits: Arc<Limits>,
    observe: ObserveLayer,
    acceptor: Acceptor,
    connections: Connections,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    tonic_server(&connections)
        // What a call comes through, from outside: the counting of all, a place among those in flight and its address's share, a time by
        // which it ends, who calls and whether that fits, and the caller's share.
        .layer(observe)
        .layer(DoorLayer(Arc::clone(&limits)))
        .layer(DeadlineLayer(Arc::clone(&limits)))
        .layer(GateLayer(authenticator, Arc::clone(&limits)))
        .layer(CallerLayer(limits))
        .add_routes(routes)
        .serve_with_incoming_shutdown(acceptor.incoming(), stop)
        .await?;
    Ok(())
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

impl Connected for Io {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer().clone()
    }
}
