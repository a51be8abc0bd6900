//! From a listening socket to connections that are ready for HTTP, in a stream of [`Io`]. It knows nothing of gRPC.
//!
//! Invariant: nobody waits for another's handshake, and whatever goes wrong with one connection or with accepting
//! ends neither the loop nor another connection. A connection that is turned away is counted.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    io,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, stream};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout},
};

use super::{
    connections::Connections,
    io::{Io, Transport},
    slots::{Full, Slot, Slots},
    tls::Tls,
};
use crate::{auth::Peer, limits::network};

/// Without file descriptors `accept` fails at once, again and again; some come back within this time, or many do.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A line a minute for each reason: an attack fills no disk, and is not overlooked.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// A bound socket.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum Accepted {
    Tcp(TcpStream, IpAddr),
    Unix(UnixStream),
}

type Failure = (Loss, Option<IpAddr>, io::Error);

/// Accepts connections of one listener.
pub struct Acceptor {
    listener: Listener,
    /// For TCP; who may open a Unix socket is the file system's to say.
    tls: Option<Arc<Tls>>,
    connections: Connections,
    slots: Arc<Slots>,
    handshakes: JoinSet<Result<Io, Failure>>,
    /// The handshakes with their networks, and some that have ended.
    oldest_first: VecDeque<(Option<IpAddr>, AbortHandle)>,
    losses: Losses,
}

impl Acceptor {
    #[must_use]
    pub fn new(
        listener: Listener,
        tls: Option<Arc<Tls>>,
        connections: Connections,
        slots: Arc<Slots>,
    ) -> Self {
        Self {
            listener,
            tls,
            connections,
            slots,
            handshakes: JoinSet::new(),
            oldest_first: VecDeque::new(),
            losses: Losses::default(),
        }
    }

    /// The connections as they become ready, without end. Who drops it closes the listener and ends the handshakes.
    pub fn incoming(self) -> impl Stream<Item = Result<Io, Infallible>> {
        stream::unfold(self, async |mut acceptor| {
            let io = acceptor.next().await;
            Some((Ok(io), acceptor))
        })
    }

    async fn next(&mut self) -> Io {
        loop {
            tokio::select! {
                // What is done makes room first.
                biased;
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(Ok(io)) => return io,
                    Ok(Err((loss, address, error))) => self.losses.count(loss, address, &error),
                    // Counted when it was given up.
                    Err(error) if error.is_cancelled() => {}
                    Err(panic) => self.losses.count(Loss::Handshake, None, &panic),
                },
                accepted = self.listener.accept() => match accepted {
                    Ok(accepted) => self.admit(accepted),
                    Err(error) => {
                        self.losses.count(Loss::Accept, None, &error);
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// Gives the connection a slot and begins its handshake, or closes it.
    fn admit(&mut self, accepted: Accepted) {
        let address = accepted.address();
        let slot = match self.slots.take(address) {
            Ok(slot) => slot,
            Err(Full::Service) => return self.losses.count(Loss::Full, address, &"closed"),
            Err(Full::Address) => return self.losses.count(Loss::AddressFull, address, &"closed"),
        };
        self.make_room();
        let tls = self.tls.clone();
        let connections = self.connections.clone();
        let handshake = self.handshakes.spawn(async move {
            let limit = connections.handshake_timeout;
            timeout(limit, shake_hands(accepted, tls, slot, &connections))
                .await
                .map_err(|slow| (Loss::SlowHandshake, address, slow.into()))?
                .map_err(|error| (Loss::Handshake, address, error))
        });
        self.oldest_first
            .push_back((address.map(network), handshake));
    }

    /// Where there are as many handshakes as may be, gives up one: of the network that has the most under way, the one
    /// that has taken the longest. Honest ones take milliseconds and are few, so thousands that are begun and left keep
    /// none of them out: neither a queue nor turning away who comes last can do that.
    fn make_room(&mut self) {
        // A handle keeps the memory of its handshake.
        if self.oldest_first.len() >= self.connections.handshakes_max {
            self.oldest_first
                .retain(|(_, handshake)| !handshake.is_finished());
        }
        if self.oldest_first.len() < self.connections.handshakes_max {
            return;
        }
        let mut under_way: HashMap<Option<IpAddr>, usize> = HashMap::new();
        for (network, _) in &self.oldest_first {
            *under_way.entry(*network).or_default() += 1;
        }
        let most = under_way
            .into_iter()
            .max_by_key(|(_, handshakes)| *handshakes);
        let given_up = self
            .oldest_first
            .iter()
            .position(|(network, _)| most.is_some_and(|(with_most, _)| with_most == *network));
        if let Some((_, handshake)) = given_up.and_then(|at| self.oldest_first.remove(at)) {
            handshake.abort();
            let last = "others had to begin";
            self.losses.count(Loss::SlowHandshake, None, &last);
        }
    }
}

/// All that comes before the first request: TLS, and the first bytes.
async fn shake_hands(
    accepted: Accepted,
    tls: Option<Arc<Tls>>,
    slot: Slot,
    connections: &Connections,
) -> io::Result<Io> {
    let mut peer = Peer {
        address: accepted.address(),
        ..Peer::default()
    };
    let transport = match (accepted, tls) {
        (Accepted::Unix(stream), _) => Transport::Unix(stream),
        (Accepted::Tcp(stream, _), None) => {
            set_options(&stream, connections)?;
            Transport::Tcp(stream)
        }
        (Accepted::Tcp(stream, _), Some(tls)) => {
            set_options(&stream, connections)?;
            let (stream, names) = tls.accept(stream).await?;
            peer.certificate_names = names;
            Transport::Tls(Box::new(stream))
        }
    };
    Io::begin(transport, peer, slot, connections).await
}

/// Answers are small and waited for. Whoever takes nothing of what is sent to it is gone: the pings of HTTP/2 do not
/// tell, for they wait in the same queue.
fn set_options(stream: &TcpStream, connections: &Connections) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let taken_within = connections.keepalive_interval + connections.keepalive_timeout;
    let millis = u32::try_from(taken_within.as_millis()).unwrap_or(u32::MAX);
    Ok(rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?)
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // A socket of both families shows IPv4 addresses as IPv6 ones.
                Ok(Accepted::Tcp(stream, address.ip().to_canonical()))
            }
            Self::Unix(listener) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

impl Accepted {
    fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(_, address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

/// Why a connection was not, or a call of `accept` failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    Full,
    AddressFull,
    Handshake,
    SlowHandshake,
    Accept,
}

impl Loss {
    const COUNT: usize = 5;

    fn reason(self) -> &'static str {
        match self {
            Self::Full => "there are as many as may be (--connections-max)",
            Self::AddressFull => "there are --address-connections-max from its address",
            Self::Handshake => "the handshake failed",
            Self::SlowHandshake => "the handshake took too long",
            Self::Accept => "it could not be accepted",
        }
    }
}

/// Connections turned away, by reason, since the last line about it.
#[derive(Default)]
struct Losses([(u64, Option<Instant>); Loss::COUNT]);

impl Losses {
    fn count(&mut self, loss: Loss, address: Option<IpAddr>, last: &dyn std::fmt::Display) {
        let (count, reported_at) = &mut self.0[loss as usize];
        *count += 1;
        if reported_at.is_none_or(|at| at.elapsed() >= REPORT_INTERVAL) {
            tracing::warn!(reason = loss.reason(), count, ?address, %last, "connections turned away");
            *count = 0;
            *reported_at = Some(Instant::now());
        }
    }
}
