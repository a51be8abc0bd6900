//! API keys, known from memory: what a credential is held against, and how long memory may be believed.
//!
//! Invariant: a key that was revoked is refused from the staleness bound after on, wherever the database can be reached.
//! Memory dates from before the poll that found it current was sent. Past the bound it is believed only after the
//! database was found to be away, and up to the staleness ceiling, when no answer from the cache is given any more; for
//! metrics, which no answer is taken from, as long as the database is away: they are there for an outage above all.

mod follow;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use futures_util::future::FutureExt;
use tokio::{sync::watch, time::timeout};

use super::{
    AuthError, Authentication, Caller, Identity, Organizations, Scope,
    access::Need,
    api_key::{ApiKey, KeyId, Pepper, Verifier},
};
use crate::{
    model::BootTime,
    store::api_keys::{KeysState, StoredKey},
};

/// How long a caller waits to hear whether a key that memory may not answer for is still good: as long as the database
/// may take for a poll, and for another connection.
const RENEWAL_WAIT_MAX: Duration = Duration::from_secs(2);

/// How long memory may be believed, and how often the use of keys is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long memory is believed by itself.
    pub staleness_bound: Duration,
    /// How long memory is believed while the database is away.
    pub staleness_ceiling: Duration,
    pub record_interval: Duration,
}

/// The keys that the service accepts. Cheap to clone.
#[derive(Clone)]
pub struct ApiKeys(Arc<Inner>);

struct Inner {
    timing: Timing,
    pepper: Pepper,
    /// `None` until they have been read.
    known: ArcSwapOption<Known>,
    /// How the last look at the database ended; told again after each.
    outcome: watch::Sender<Outcome>,
    /// Does for a key that is not known the work that one that is known costs.
    decoy: Verifier,
}

/// How a look at the keys in the database ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// None has ended yet, or memory is as the database was.
    Renewed,
    /// The database cannot be reached at all: memory is the best there is.
    Away,
    /// The database answers, but not this: nothing is believed past the bound.
    Unreadable,
}

/// The keys as the database had them at `sent_at`, or later.
struct Known {
    keys: Arc<HashMap<KeyId, Key>>,
    state: KeysState,
    /// Before the statement was sent that said so.
    sent_at: BootTime,
}

struct Key {
    verifier: Verifier,
    caller: Arc<Caller>,
    expires_at: Option<SystemTime>,
    is_revoked: bool,
    /// The last use, in whole seconds since the boot; 0: none.
    used_at: AtomicU64,
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeys")
            .field("timing", &self.0.timing)
            .finish_non_exhaustive()
    }
}

impl ApiKeys {
    /// Knows no key until it follows a database.
    #[must_use]
    pub fn new(timing: Timing, pepper: Pepper) -> Self {
        Self(Arc::new(Inner {
            timing,
            pepper,
            known: ArcSwapOption::empty(),
            outcome: watch::Sender::new(Outcome::Renewed),
            decoy: Verifier::decoy(),
        }))
    }

    /// Whose key this is: from memory where that may be believed for a call with this need, else once the database has
    /// been heard of.
    #[must_use]
    pub fn authenticate(&self, credential: &str, need: Need) -> Authentication {
        let Some(sent) = ApiKey::parse(credential) else {
            return Authentication::Known(Err(AuthError::Invalid));
        };
        let known = self.0.known.load();
        let Some(known) = known.as_deref() else {
            return Authentication::Known(Err(AuthError::Unavailable));
        };
        let arrived = BootTime::now();
        // What does not fit memory is not worth a question: anybody can make it up.
        match known.key(&sent, &self.0.decoy) {
            None => Authentication::Known(Err(AuthError::Invalid)),
            Some(key) if known.is_within(self.0.timing.staleness_bound, arrived) => {
                Authentication::Known(known.admit(key, arrived))
            }
            Some(_) => {
                // In an outage the last look has decided, for everybody.
                let outcome = *self.0.outcome.borrow();
                let answer = self.answer_after(outcome, &sent, need, arrived);
                answer.map_or_else(
                    || Authentication::Pending(self.clone().confirm(sent, need, arrived).boxed()),
                    Authentication::Known,
                )
            }
        }
    }

    /// Whose key this is, now that memory is too old to be believed by itself.
    async fn confirm(
        self,
        sent: ApiKey,
        need: Need,
        arrived: BootTime,
    ) -> Result<Arc<Caller>, AuthError> {
        // Listens before it looks.
        let mut outcomes = self.0.outcome.subscribe();
        let answer = async {
            loop {
                let outcome = *outcomes.borrow_and_update();
                if let Some(answer) = self.answer_after(outcome, &sent, need, arrived) {
                    return answer;
                }
                if outcomes.changed().await.is_err() {
                    return Err(AuthError::Unavailable);
                }
            }
        };
        timeout(RENEWAL_WAIT_MAX, answer)
            .await
            .unwrap_or(Err(AuthError::Unavailable))
    }

    /// `None`: another look at the database is under way, and decides.
    fn answer_after(
        &self,
        outcome: Outcome,
        sent: &ApiKey,
        need: Need,
        arrived: BootTime,
    ) -> Option<Result<Arc<Caller>, AuthError>> {
        let known = self.0.known.load();
        let known = known.as_deref()?;
        let now = BootTime::now();
        let outlasts_outages = need == Need::Scope(Scope::Metrics);
        let is_believed = known.is_within(self.0.timing.staleness_bound, arrived)
            || (outcome == Outcome::Away
                && (outlasts_outages || known.is_within(self.0.timing.staleness_ceiling, now)));
        match known.key(sent, &self.0.decoy) {
            Some(key) if is_believed => Some(known.admit(key, now)),
            None if is_believed => Some(Err(AuthError::Invalid)),
            _ if outcome == Outcome::Renewed => None,
            _ => Some(Err(AuthError::Unavailable)),
        }
    }

    /// Knows the keys of these rows and no others, as the database had them when it was asked at `sent_at`, or later.
    pub fn take(&self, stored: Vec<StoredKey>, state: KeysState, sent_at: BootTime) {
        let keys: HashMap<_, _> = stored
            .into_iter()
            .filter_map(|stored| Key::new(stored, &self.0.pepper))
            .collect();
        let known = self.0.known.load();
        // A use that is noted meanwhile is lost; the next one is not.
        for (id, key) in &keys {
            let before = known.as_deref().and_then(|known| known.keys.get(id));
            let used_at = before.map_or(0, |key| key.used_at.load(Ordering::Relaxed));
            key.used_at.store(used_at, Ordering::Relaxed);
        }
        self.remember(Arc::new(keys), state, sent_at);
    }

    fn remember(&self, keys: Arc<HashMap<KeyId, Key>>, state: KeysState, sent_at: BootTime) {
        let known = Known {
            keys,
            state,
            sent_at,
        };
        self.0.known.store(Some(Arc::new(known)));
    }

    /// Returns when the keys have been read for the first time.
    pub async fn read(&self) {
        let mut outcome = self.0.outcome.subscribe();
        // An error is impossible: the sender is here.
        drop(outcome.wait_for(|_| self.0.known.load().is_some()).await);
    }
}

impl Known {
    fn is_within(&self, bound: Duration, now: BootTime) -> bool {
        now.since(self.sent_at) <= bound
    }

    /// The key that this is, if its secret fits. An id that is not known takes as long as one that is.
    fn key(&self, sent: &ApiKey, decoy: &Verifier) -> Option<&Key> {
        let key = self.keys.get(&sent.id);
        let fits = key.map_or(decoy, |key| &key.verifier).fits(sent);
        key.filter(|_| fits)
    }

    /// What becomes of a caller whose secret fits.
    fn admit(&self, key: &Key, now: BootTime) -> Result<Arc<Caller>, AuthError> {
        if key.is_revoked {
            return Err(AuthError::Revoked);
        }
        if key.expires_at.is_some_and(|at| at <= self.clock(now)) {
            return Err(AuthError::Expired);
        }
        key.note_use(now);
        Ok(Arc::clone(&key.caller))
    }

    /// The database's clock, by which keys are made and expire: so replicas agree, and this machine's own may be wrong.
    /// It was read after `sent_at`, so a key expires early rather than late, by a round trip at most.
    fn clock(&self, now: BootTime) -> SystemTime {
        self.state.clock + now.since(self.sent_at)
    }
}

impl Key {
    /// `None`, logged, for a row that the table's checks should not have let in.
    fn new(stored: StoredKey, pepper: &Pepper) -> Option<(KeyId, Self)> {
        let id = KeyId::parse(&stored.id);
        let hash = <[u8; 32]>::try_from(stored.hash).ok();
        let Some((id, hash)) = id.zip(hash) else {
            tracing::error!(id = ?stored.id, "an API key is malformed, and not accepted");
            return None;
        };
        let caller = Caller {
            identity: Identity::Key(id.as_str().into()),
            // A scope that this program does not know opens nothing.
            scopes: (stored.scopes.iter())
                .filter_map(|scope| scope.parse().ok())
                .collect(),
            organizations: stored
                .organizations
                .map_or(Organizations::All, Organizations::only),
            only_user: None,
        };
        let key = Self {
            verifier: Verifier::new(&id, hash, pepper),
            caller: Arc::new(caller),
            expires_at: stored.expires_at,
            is_revoked: stored.is_revoked,
            used_at: AtomicU64::new(0),
        };
        Some((id, key))
    }

    /// Writes once a second at most: a key in heavy use is read by all cores.
    fn note_use(&self, now: BootTime) {
        let second = now.as_secs();
        if self.used_at.load(Ordering::Relaxed) != second {
            self.used_at.store(second, Ordering::Relaxed);
        }
    }
}
