//! What a connection may take, and for how long; the bounds that are no settings, and why.
//!
//! Invariant: whatever the other end does or leaves undone, its connection ends.

use std::time::Duration;

/// Calls take seconds. A stream that is cut goes on where it was, on another connection.
const AGE_GRACE: Duration = Duration::from_secs(5 * 60);

/// Three round trips to the other side of the world, with a packet that is lost three times.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// An honest handshake takes milliseconds, so this many at once are of two thousand new connections a second and more.
const HANDSHAKES_MAX: usize = 500;

/// A peer that does not answer a ping is gone, and so is one that is amid headers that never end: it cannot answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Without a whole request on a connection of HTTP/1.1, be it idle or amid headers. Longer than balancers keep theirs
/// idle, a minute mostly: whoever sends ends a connection, or a request meets its end.
const IDLE_MAX: Duration = Duration::from_secs(75);

/// Connections of the operators' listener: a probe, a scrape and somebody who looks hold one each, and some are left open.
pub const OPS_CONNECTIONS_MAX: usize = 64;

/// Calls at once on one connection: as many as a busy client's pool has in flight, few enough to bound their buffers.
pub(super) const STREAMS_A_CONNECTION_MAX: u32 = 1_000;

/// A token of 8 kB with room for what else a call carries. Past it a call is refused, past four times it the connection
/// ends; so it does after 5 CONTINUATION frames, a number that h2 derives from this one.
pub(super) const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;

/// What a connection may have sent and the service not have read: a request of 10,000 items comes in two round trips.
pub const WINDOW_BYTES: u32 = 1 << 20;

/// The least that HTTP/2 allows. Greater frames would make short calls wait behind long ones.
pub const FRAME_BYTES_MAX: u32 = 16 << 10;

/// Calls that are taken back before they are looked at, on one connection at once (rapid reset). A client that gives up
/// a whole burst of calls at a time comes nowhere near, for they are looked at as they come.
pub(super) const UNSEEN_RESETS_MAX: usize = 20;

/// Calls of one connection in its life that break the protocol and are reset for it. An honest client has none. Unless
/// tonic is told a number it lifts hyper's bound (RUSTSEC-2024-0003).
pub(super) const ERROR_RESETS_MAX: usize = 1_000;

/// What connections may take; where it is a number of them, of gRPC and HTTP together. Operators have their own number.
#[derive(Clone, Debug)]
pub struct Connections {
    pub connections_max: usize,
    /// Of one IPv4 address, or of one /64 with IPv6.
    pub address_connections_max: usize,
    /// After this time a connection takes no new calls; `None`: it is never too old.
    pub age_max: Option<Duration>,
    /// After `age_max`, calls under way may take this long before they are cut off.
    pub age_grace: Duration,
    /// From being accepted to the last byte of the HTTP/2 preface, with TLS in between.
    pub handshake_timeout: Duration,
    /// Connections that are not as far; for each one more, one of the address with the most is given up.
    pub handshakes_max: usize,
    /// Without a request from the peer for this long, it is asked whether it is there.
    pub keepalive_interval: Duration,
    /// For its answer, and for the network to take what is sent to it.
    pub keepalive_timeout: Duration,
    /// With HTTP/1.1, from an answer to the last byte of the next request's headers.
    pub idle_max: Duration,
}

impl Connections {
    /// With the bounds that are settings.
    #[must_use]
    pub fn new(
        connections_max: usize,
        address_connections_max: usize,
        age_max: Option<Duration>,
    ) -> Self {
        Self {
            connections_max,
            address_connections_max,
            age_max,
            age_grace: AGE_GRACE,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            handshakes_max: HANDSHAKES_MAX,
            keepalive_interval: KEEPALIVE_INTERVAL,
            keepalive_timeout: KEEPALIVE_TIMEOUT,
            idle_max: IDLE_MAX,
        }
    }
}
