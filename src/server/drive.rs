//! Connections out of an [`Acceptor`], each with a task of its own, for any protocol.
//!
//! Invariant: none outlives [`drive`].

use std::{
    future::{Future, pending},
    pin::pin,
};

use futures_util::StreamExt;
use tokio::{
    task::{JoinError, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{accept::Acceptor, connections::Connections, io::Io};

/// Serves what comes until `stop`, and then until the connections end that have been told goodbye.
pub(super) async fn drive<C>(
    acceptor: Acceptor,
    stop: impl Future<Output = ()>,
    connection: impl Fn(Io, CancellationToken) -> C,
) where
    C: Future<Output = ()> + Send + 'static,
{
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
                    tasks.spawn(connection(io, goodbye.clone()));
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

/// A connection that panics ends alone.
fn or_log(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task ended");
    }
}

/// Completes when a connection is to take no new calls: the service stops, or it is too old. That it ends is [`Io`]'s.
pub(super) async fn goodbye(connections: &Connections, stops: &CancellationToken) {
    let too_old = async {
        match connections.age_max {
            Some(age_max) => sleep(age_max).await,
            None => pending().await,
        }
    };
    tokio::select! {
        () = stops.cancelled() => {}
        () = too_old => {}
    }
}
