//! HTTP/2 and HTTP/1.1 for everything but gRPC: connections out of an [`Acceptor`], each with a task of its own.
//!
//! Invariant: whatever its client does or leaves undone, a connection ends: by the wait for its next request, by the
//! deadline of a call, or by its age. None outlives [`serve`].

use std::{
    future::{Future, pending},
    pin::pin,
};

use axum::{Router, body::Body, extract::Request};
use futures_util::StreamExt;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    task::{JoinError, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{
    accept::Acceptor,
    connections::{
        Connections, ERROR_RESETS_MAX, FRAME_BYTES_MAX, HEADER_LIST_BYTES_MAX,
        STREAMS_A_CONNECTION_MAX, UNSEEN_RESETS_MAX, WINDOW_BYTES,
    },
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
    let goodbye = CancellationToken::new();
    // Aborted when this function is dropped.
    let mut tasks = JoinSet::new();
    {
        let mut incoming = pin!(acceptor.incoming());
        let mut stop = pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                Some(Ok(io)) = incoming.next() => {
                    let connection = connection(
                        builder.clone(),
                        router.clone(),
                        io,
                        connections.clone(),
                        goodbye.clone(),
                    );
                    tasks.spawn(connection);
                }
                Some(ended) = tasks.join_next() => or_log(ended),
            }
        }
    }
    goodbye.cancel();
    while let Some(ended) = tasks.join_next().await {
        or_log(ended);
    }
}

/// A call that panics ends its connection, and no other.
fn or_log(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task ended");
    }
}

async fn connection(
    builder: Builder<TokioExecutor>,
    router: Router,
    io: Io,
    connections: Connections,
    goodbye: CancellationToken,
) {
    let peer = io.peer().clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.clone());
        router.clone().oneshot(request)
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut says_goodbye = pin!(async {
        tokio::select! {
            () = goodbye.cancelled() => {}
            () = too_old(&connections) => {}
        }
    });
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

/// After that a connection takes no new calls; that it ends is [`Io`]'s.
async fn too_old(connections: &Connections) {
    match connections.age_max {
        Some(age_max) => sleep(age_max).await,
        None => pending().await,
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
