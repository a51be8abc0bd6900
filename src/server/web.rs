//! HTTP/2 and HTTP/1.1 for everything but gRPC: connections out of an [`Acceptor`], each with a task of its own.
//!
//! Invariant: whatever its client does or leaves undone, a connection ends: by the wait for its next request, by the
//! deadline of a call, or by its age. None outlives [`serve`].

use std::{future::Future, pin::pin};

use axum::{Router, body::Body, extract::Request};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{
    accept::Acceptor,
    connections::{
        Connections, ERROR_RESETS_MAX, FRAME_BYTES_MAX, HEADER_LIST_BYTES_MAX,
        STREAMS_A_CONNECTION_MAX, UNSEEN_RESETS_MAX, WINDOW_BYTES,
    },
    drive::{drive, goodbye},
    io::Io,
};

/// What HTTP/1.1 reads ahead of a request, its headers included: whoever sends requests without waiting for the answers
/// has so much of them taken, and one is answered at a time.
const READ_AHEAD_BYTES_MAX: usize = HEADER_LIST_BYTES_MAX as usize;

/// Serves until `stop`, and then until the calls under way are answered.
pub(super) async fn serve(
    router: Router,
    acceptor: Acceptor,
    connections: Connections,
    stop: impl Future<Output = ()>,
) {
    let builder = builder(&connections);
    drive(acceptor, stop, |io, stops| {
        connection(
            builder.clone(),
            router.clone(),
            io,
            connections.clone(),
            stops,
        )
    })
    .await;
}

async fn connection(
    builder: Builder<TokioExecutor>,
    router: Router,
    io: Io,
    connections: Connections,
    stops: CancellationToken,
) {
    let peer = io.peer().clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.clone());
        router.clone().oneshot(request)
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut says_goodbye = pin!(goodbye(&connections, &stops));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = &mut says_goodbye => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

fn builder(connections: &Connections) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(connections.idle_max)
        .max_buf_size(READ_AHEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
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
