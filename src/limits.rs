//! How much of the service everybody together, one address and one caller may have; which of it a call was refused.
//!
//! Invariants: nothing grows with the number of callers or addresses; a place that is taken is given back however the
//! call ends; and nothing here speaks a protocol: every listener asks the same and words the same [`Refusal`].

mod forwarded;
mod rate;
mod shares;
mod tally;

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Request};
use ipnet::IpNet;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use self::{forwarded::network, shares::Share};
use self::{rate::Rate, shares::Shares, tally::Tally};
use crate::auth::{
    Caller, Identity, Scope,
    access::{self, Answer, Need},
};

/// Items of a batch that cost as much as a call: an item is about 1 µs of work, a call about 8. What items cost the
/// database is bounded where it is asked.
const BATCH_ITEMS_A_CALL: u32 = 10;

/// A check that the database must answer costs the two together about as much as so many that are cached.
const DATABASE_CHECK_CALLS: u32 = 10;

/// Calls that watch health, all at once: one for each client that minds, in about 20 MB.
const WATCHES_MAX: usize = 2_000;

/// Of those, one address's: a tenth, for they need no credential.
const ADDRESS_WATCHES_MAX: u32 = 200;

/// The bounds, as set; 0 and `None`: none.
#[derive(Clone, Debug)]
pub struct Bounds {
    pub requests_in_flight_max: usize,
    /// Requests in flight of one caller.
    pub caller_in_flight_max: u32,
    /// Calls a second from one address.
    pub address_rate_max: u32,
    /// Credentials a second, from one address, that are wrong or need a key that has to be fetched.
    pub credential_rate_max: u32,
    /// Checks a second of one caller.
    pub caller_rate_max: u32,
    /// Calls a second of one caller that are not checks.
    pub caller_list_rate_max: u32,
    /// Proxies that are believed about whom they speak for.
    pub trusted_proxies: Vec<IpNet>,
    pub request_deadline_max: Option<Duration>,
    pub stream_age_max: Option<Duration>,
}

/// What an answer may weigh that counts as one call; a heavier one is so many calls, for as long as it is not taken.
const ANSWER_BYTES_A_PLACE: usize = 16 << 10;

/// What can be exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    InFlight,
    CallerInFlight,
    Address,
    Credentials,
    Checks,
    Lists,
}

impl Limit {
    pub const ALL: [Self; 6] = [
        Self::InFlight,
        Self::CallerInFlight,
        Self::Address,
        Self::Credentials,
        Self::Checks,
        Self::Lists,
    ];

    /// As callers are told; the setting's name without `--` and `-max`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InFlight => "requests-in-flight",
            Self::CallerInFlight => "caller-in-flight",
            Self::Address => "address-rate",
            Self::Credentials => "credential-rate",
            Self::Checks => "caller-rate",
            Self::Lists => "caller-list-rate",
        }
    }
}

/// Why a call is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// It is not this caller's fault.
    #[error("the service is overloaded")]
    Overloaded,
    #[error("more calls at once than `{}` allows", Limit::CallerInFlight.name())]
    TooManyAtOnce,
    #[error("more calls than `{}` allows", .limit.name())]
    TooMany {
        limit: Limit,
        /// It may pass then.
        retry_after: Duration,
    },
}

/// What the limits have to know of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Its place in [`access::ACCESS`]; of an unknown one, the place behind the last.
    pub index: usize,
    /// As in [`access::ACCESS`]; `unknown` for one that nobody serves: what a caller makes up is not logged.
    pub name: &'static str,
    pub class: Class,
    pub answer: Answer,
}

/// Which limits are for a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Health: answered whatever else is refused.
    Free,
    /// Answered from the cache most of the time.
    Check,
    /// Everything else is work for the database.
    List,
}

impl Method {
    #[must_use]
    pub fn of<B>(request: &Request<B>) -> Self {
        let Some((index, (name, need, answer))) = access::row(request) else {
            return Self {
                index: access::ACCESS.len(),
                name: "unknown",
                class: Class::List,
                answer: Answer::Message,
            };
        };
        Self {
            index,
            name,
            class: match need {
                // What operators look at must answer when nothing else does.
                Need::Nothing | Need::Scope(Scope::Metrics) => Class::Free,
                Need::Scope(Scope::Check) => Class::Check,
                Need::Open | Need::Credential | Need::Scope(_) => Class::List,
            },
            answer: *answer,
        }
    }
}

/// The limits, and how far they are used.
pub struct Limits {
    in_flight: Arc<Semaphore>,
    shares: Option<Arc<Shares>>,
    watches: Arc<Semaphore>,
    address_watches: Arc<Shares>,
    addresses: Rate,
    credentials: Rate,
    checks: Rate,
    lists: Rate,
    trusted_proxies: Vec<IpNet>,
    pub request_deadline_max: Option<Duration>,
    pub stream_age_max: Option<Duration>,
    /// Of this process alone: nobody can choose a key that meets another's slots.
    hashes: RandomState,
    pub tally: Tally,
}

/// A place among the requests in flight, or among the watches of health; given back when it is dropped.
pub struct Place {
    permit: OwnedSemaphorePermit,
    class: Class,
    _share: Option<Share>,
}

impl Limits {
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let places = match bounds.requests_in_flight_max {
            0 => Semaphore::MAX_PERMITS,
            max => max.min(Semaphore::MAX_PERMITS),
        };
        Self {
            in_flight: Arc::new(Semaphore::new(places)),
            shares: match bounds.caller_in_flight_max {
                0 => None,
                max => Some(Arc::new(Shares::new(max))),
            },
            watches: Arc::new(Semaphore::new(WATCHES_MAX)),
            address_watches: Arc::new(Shares::new(ADDRESS_WATCHES_MAX)),
            addresses: Rate::a_second(bounds.address_rate_max),
            credentials: Rate::a_second(bounds.credential_rate_max),
            checks: Rate::a_second(bounds.caller_rate_max),
            lists: Rate::a_second(bounds.caller_list_rate_max),
            trusted_proxies: bounds.trusted_proxies,
            request_deadline_max: bounds.request_deadline_max,
            stream_age_max: bounds.stream_age_max,
            hashes: RandomState::new(),
            tally: Tally::default(),
        }
    }

    /// Other rates from now on; what else is in these bounds stays as it was.
    pub fn set_rates(&self, bounds: &Bounds) {
        self.addresses.set(bounds.address_rate_max);
        self.credentials.set(bounds.credential_rate_max);
        self.checks.set(bounds.caller_rate_max);
        self.lists.set(bounds.caller_list_rate_max);
    }

    /// Whose address a call comes from; `None` for a Unix socket's peer.
    #[must_use]
    pub fn client_address(&self, peer: Option<IpAddr>, headers: &HeaderMap) -> Option<IpAddr> {
        peer.map(|peer| forwarded::client_address(peer, headers, &self.trusted_proxies))
    }

    /// Takes a place among the requests in flight.
    ///
    /// # Errors
    /// When there is none.
    pub fn enter(&self, class: Class) -> Result<Place, Refusal> {
        self.place(class, None)
    }

    /// Takes a place among the watches of health, and one of the address's own; a loopback address has as many as there
    /// are, for it tells nobody from anybody.
    ///
    /// # Errors
    /// When there is none, or the address has all of its own already.
    pub fn watch(&self, address: Option<IpAddr>) -> Result<Place, Refusal> {
        let share = match address {
            Some(address) if !address.is_loopback() => {
                let key = self.hashes.hash_one(forwarded::network(address));
                let Some(share) = self.address_watches.take(key) else {
                    self.tally.refused(Limit::CallerInFlight);
                    return Err(Refusal::TooManyAtOnce);
                };
                Some(share)
            }
            _ => None,
        };
        self.place(Class::Free, share)
    }

    fn place(&self, class: Class, share: Option<Share>) -> Result<Place, Refusal> {
        let places = match class {
            Class::Free => &self.watches,
            Class::Check | Class::List => &self.in_flight,
        };
        match Arc::clone(places).try_acquire_owned() {
            Ok(permit) => Ok(Place {
                permit,
                class,
                _share: share,
            }),
            Err(_) => {
                self.tally.turned_away(class);
                Err(Refusal::Overloaded)
            }
        }
    }

    /// Takes the further places that an answer of this size needs until it is taken, or those that are left.
    ///
    /// # Errors
    /// When there is none.
    pub fn weigh(&self, place: &mut Place, answer_bytes: usize) -> Result<(), Refusal> {
        let places = further_places(answer_bytes);
        if places == 0 {
            return Ok(());
        }
        let semaphore = Arc::clone(place.permit.semaphore());
        let left = u32::try_from(semaphore.available_permits()).unwrap_or(u32::MAX);
        match semaphore.try_acquire_many_owned(places.min(left).max(1)) {
            Ok(permits) => {
                place.permit.merge(permits);
                Ok(())
            }
            Err(_) => {
                self.tally.turned_away(place.class);
                Err(Refusal::Overloaded)
            }
        }
    }

    /// Takes the further places of the caller's own that an answer of this size needs until it is taken.
    ///
    /// # Errors
    /// When the caller had more than its own already.
    pub fn weigh_share(&self, share: &mut Share, answer_bytes: usize) -> Result<(), Refusal> {
        let places = further_places(answer_bytes);
        if places == 0 || share.grow(places) {
            return Ok(());
        }
        self.tally.refused(Limit::CallerInFlight);
        Err(Refusal::TooManyAtOnce)
    }

    /// Counts a call from an address. A loopback address tells nobody from anybody, and has no limit.
    ///
    /// # Errors
    /// When the address has had its share.
    pub fn address(&self, address: Option<IpAddr>) -> Result<(), Refusal> {
        match address {
            Some(address) if !address.is_loopback() => {
                self.take_of_address(Limit::Address, &self.addresses, address)
            }
            _ => Ok(()),
        }
    }

    /// Counts a credential that is wrong or needs a key that has to be fetched. What is known to be right is not held against it, so
    /// that a stranger locks nobody out who shares its address.
    ///
    /// # Errors
    /// When the address has had its share.
    pub fn credential(&self, address: Option<IpAddr>) -> Result<(), Refusal> {
        match address {
            Some(address) => self.take_of_address(Limit::Credentials, &self.credentials, address),
            None => Ok(()),
        }
    }

    /// Whether a credential may be looked at that may turn out to be wrong; counts nothing.
    ///
    /// # Errors
    /// When the address has had its share.
    pub fn may_try_credential(&self, address: Option<IpAddr>) -> Result<(), Refusal> {
        let Some(address) = address else {
            return Ok(());
        };
        let key = self.hashes.hash_one(forwarded::network(address));
        self.took(Limit::Credentials, self.credentials.has_one(key))
    }

    /// Takes one of the caller's own places, of its address's where nobody has to say who it is. So a caller that sends
    /// no more than the beginning of its requests takes places from itself alone.
    ///
    /// # Errors
    /// When it has all of them already.
    pub fn share(
        &self,
        caller: &Caller,
        address: Option<IpAddr>,
    ) -> Result<Option<Share>, Refusal> {
        let key = match (&caller.identity, address) {
            (Identity::Anyone, None) => return Ok(None),
            (Identity::Anyone, Some(address)) => self.hashes.hash_one(forwarded::network(address)),
            (identity, _) => self.hashes.hash_one(identity),
        };
        match self.shares.as_ref().map(|shares| shares.take(key)) {
            None => Ok(None),
            Some(Some(share)) => Ok(Some(share)),
            Some(None) => {
                self.tally.refused(Limit::CallerInFlight);
                Err(Refusal::TooManyAtOnce)
            }
        }
    }

    /// Counts a caller's call.
    ///
    /// # Errors
    /// When the caller has had its share.
    pub fn caller(&self, caller: &Caller, class: Class) -> Result<(), Refusal> {
        match class {
            Class::Free => Ok(()),
            Class::Check => self.take_of_caller(Limit::Checks, &self.checks, caller, 1),
            Class::List => self.take_of_caller(Limit::Lists, &self.lists, caller, 1),
        }
    }

    /// Counts a check that the database must answer, whatever is cached, beyond what the call itself cost.
    ///
    /// # Errors
    /// When the caller has had its share.
    pub fn database_check(&self, caller: &Caller) -> Result<(), Refusal> {
        self.take_of_caller(
            Limit::Checks,
            &self.checks,
            caller,
            DATABASE_CHECK_CALLS - 1,
        )
    }

    /// Counts the items of a batch that the database must answer, each as a call: together they cost it less than alone.
    ///
    /// # Errors
    /// When the caller has had its share.
    pub fn database_items(&self, caller: &Caller, items: usize) -> Result<(), Refusal> {
        let cells = u32::try_from(items).unwrap_or(u32::MAX);
        self.take_of_caller(Limit::Checks, &self.checks, caller, cells)
    }

    /// Counts the items of a batch, beyond what the call itself cost.
    ///
    /// # Errors
    /// When the caller has had its share.
    pub fn batch_items(&self, caller: &Caller, items: usize) -> Result<(), Refusal> {
        let cells = u32::try_from(items).unwrap_or(u32::MAX) / BATCH_ITEMS_A_CALL;
        self.take_of_caller(Limit::Checks, &self.checks, caller, cells)
    }

    fn take_of_address(&self, limit: Limit, rate: &Rate, address: IpAddr) -> Result<(), Refusal> {
        let key = self.hashes.hash_one(forwarded::network(address));
        self.took(limit, rate.take(key, 1))
    }

    fn take_of_caller(
        &self,
        limit: Limit,
        rate: &Rate,
        caller: &Caller,
        cells: u32,
    ) -> Result<(), Refusal> {
        // Where nobody has to say who it is, one who asks much is not told from many who ask little.
        if caller.identity == Identity::Anyone {
            return Ok(());
        }
        self.took(
            limit,
            rate.take(self.hashes.hash_one(&caller.identity), cells),
        )
    }

    fn took(&self, limit: Limit, taken: Result<(), Duration>) -> Result<(), Refusal> {
        taken.map_err(|retry_after| {
            self.tally.refused(limit);
            Refusal::TooMany { limit, retry_after }
        })
    }
}

/// Beyond the call's own place.
fn further_places(answer_bytes: usize) -> u32 {
    u32::try_from(answer_bytes / ANSWER_BYTES_A_PLACE).unwrap_or(u32::MAX)
}
