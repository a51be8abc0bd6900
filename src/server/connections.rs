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

/// What connections may take; of all listeners together, where it is a number of them.
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
