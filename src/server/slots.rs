//! How many connections there are, in all and of each address.
//!
//! Invariant: a connection counts from before its handshake until it is dropped, whatever becomes of it.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::connections::{Connections, OPS_CONNECTIONS_MAX};
use crate::limits::network;

/// The bounds on connections, and what counts against them. The callers' listeners share one; the operators' has its own,
/// so that whoever takes all of the callers' makes no probe fail.
#[derive(Debug)]
pub struct Slots {
    connections_max: usize,
    address_connections_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    in_all: usize,
    /// No network is kept that has none.
    by_network: HashMap<IpAddr, usize>,
}

/// A connection's place among all, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    network: Option<IpAddr>,
}

/// Why there is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    Service,
    Address,
}

impl Slots {
    #[must_use]
    pub fn new(connections: &Connections) -> Arc<Self> {
        Arc::new(Self {
            connections_max: connections.connections_max,
            address_connections_max: connections.address_connections_max,
            taken: Mutex::default(),
        })
    }

    /// The operators', of whom no address has a share.
    pub(super) fn of_operators() -> Arc<Self> {
        Arc::new(Self {
            connections_max: OPS_CONNECTIONS_MAX,
            address_connections_max: OPS_CONNECTIONS_MAX,
            taken: Mutex::default(),
        })
    }

    /// A slot for a connection from this address; `None` is a Unix socket, of which only the whole is bounded.
    pub(super) fn take(self: &Arc<Self>, address: Option<IpAddr>) -> Result<Slot, Full> {
        let network = address.map(network);
        let mut taken = self.lock();
        if taken.in_all >= self.connections_max {
            return Err(Full::Service);
        }
        if let Some(network) = network {
            let of_network = taken.by_network.get(&network).copied().unwrap_or(0);
            if of_network >= self.address_connections_max {
                return Err(Full::Address);
            }
            taken.by_network.insert(network, of_network + 1);
        }
        taken.in_all += 1;
        Ok(Slot {
            slots: Arc::clone(self),
            network,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Nothing panics while it is held.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        taken.in_all -= 1;
        let Some(network) = self.network else {
            return;
        };
        if let Some(of_network) = taken.by_network.get_mut(&network) {
            *of_network -= 1;
            if *of_network == 0 {
                taken.by_network.remove(&network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_by_network_and_come_back() {
        let slots = Slots::new(&Connections::new(4, 2, None));
        let take = |address: &str| slots.take(Some(address.parse().unwrap()));
        let first = take("10.0.0.1").unwrap();
        let _second = take("10.0.0.1").unwrap();
        assert_eq!(take("10.0.0.1").unwrap_err(), Full::Address);
        let _third = take("2001:db8::1").unwrap();
        let _fourth = take("2001:db8::ffff:1").unwrap();
        assert_eq!(take("10.0.0.2").unwrap_err(), Full::Service);
        assert_eq!(slots.take(None).unwrap_err(), Full::Service);
        drop(first);
        assert_eq!(take("2001:db8::2").unwrap_err(), Full::Address);
        let fifth = take("10.0.0.1").unwrap();
        drop(fifth);
        assert!(slots.take(None).is_ok());
        assert_eq!(slots.lock().by_network.len(), 2);
    }
}
