//! JSON Web Tokens (RFC 7519): a token that the issuer signed becomes a caller.
//!
//! A request's way: the token's digest leads to what was verified before; else, if its address may try, its key is looked
//! up, its signature and claims are checked, and the grants say what it may do. A key that is unknown is asked for, within
//! a bound of time.
//!
//! Invariant: nothing that a token says is believed before its signature fits, and its header chooses nothing but the
//! key. Keys that nobody has confirmed for [`Pace::age_max`] verify nothing.

pub(super) mod claims;
mod key_set;
mod key_source;

use std::{collections::HashSet, fmt, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use futures_util::future::FutureExt;
use jsonwebtoken::{
    Algorithm, Header, Validation, decode, decode_header, errors::ErrorKind, get_current_timestamp,
};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

pub use self::key_source::{HttpClient, KeySource, shown};
use self::{
    claims::Claim,
    key_set::{Key, KeySet, Verified},
};
use super::{AuthError, Authentication, Caller, grants::Grants};
use crate::model::BootTime;

/// Bytes of a token: an issuer's with a user's groups in it; what is longer is no header that proxies let through.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Bytes of a token's subject, as OpenID Connect has it.
const SUBJECT_BYTES_MAX: usize = 255;

/// Requests that wait for keys at the same time, each with its token: 8 MiB.
const WAITING_MAX: usize = 1_000;

/// The most that clocks of machines that keep time at all differ, and far from underflowing the time of day.
pub const LEEWAY_MAX: Duration = Duration::from_secs(5 * 60);

/// Which tokens are good here, and what for.
#[derive(Clone, Debug)]
pub struct TokenRules {
    /// `iss` must be this.
    pub issuer: String,
    /// `aud` must be this, or list it.
    pub audience: String,
    /// How far the issuer's clock may be off, up to [`LEEWAY_MAX`]; in whole seconds, as tokens have it.
    pub leeway: Duration,
    pub grants: Grants,
}

impl TokenRules {
    fn leeway_seconds(&self) -> u64 {
        self.leeway.min(LEEWAY_MAX).as_secs()
    }
}

/// When keys are read, and how long is waited for them.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between readings of a URL: issuers announce a key minutes to days before they sign with it.
    pub url_interval: Duration,
    /// Between readings of a file: whoever has just changed it looks for the effect.
    pub file_interval: Duration,
    /// Reading takes no longer.
    pub read_max: Duration,
    /// A request waits no longer for a key that is unknown.
    pub wait_max: Duration,
    /// Unknown keys make keys be read no more often, nor do failures: anybody can send a token with an unknown key.
    pub hasten_interval: Duration,
    /// Keys that could not be read again for so long are believed no more: a key that the issuer takes back because
    /// it was stolen works no longer than this, whoever keeps us from hearing of it.
    pub age_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            url_interval: Duration::from_secs(5 * 60),
            file_interval: Duration::from_secs(2),
            read_max: Duration::from_secs(5),
            wait_max: Duration::from_secs(2),
            hasten_interval: Duration::from_secs(10),
            age_max: Duration::from_secs(60 * 60),
        }
    }
}

/// Knows callers by their tokens. A cheap handle.
#[derive(Clone)]
pub struct Tokens(Arc<Shared>);

struct Shared {
    rules: TokenRules,
    source: KeySource,
    pace: Pace,
    /// `None` until keys were read for the first time.
    keys: ArcSwapOption<Believed>,
    rounds: watch::Sender<Rounds>,
    waiting: Semaphore,
}

/// Keys, and the instant before they were last asked for and found to be these.
struct Believed {
    keys: Arc<KeySet>,
    confirmed: BootTime,
}

/// The readings of the keys so far, counted, so that a request can wait for one that begins after it.
#[derive(Default)]
struct Rounds {
    begun: u64,
    ended: u64,
    /// Keys are to be read until this round has ended.
    wanted: u64,
    /// When a request last wanted one.
    hastened: Option<BootTime>,
    /// Whether the last one brought nothing.
    has_failed: bool,
}

/// A token that has not been verified yet.
pub struct Unverified {
    tokens: Tokens,
    token: String,
}

impl Unverified {
    /// Finds out whose token it is: the work of a signature, or a wait for keys that have to be fetched.
    #[must_use]
    pub fn verify(self) -> Authentication {
        match self.tokens.look_at(&self.token) {
            Found::Verdict(verdict) => Authentication::Known(verdict),
            Found::KeyUnknown => Authentication::Pending(
                async move { self.tokens.wait_for_key(&self.token).await }.boxed(),
            ),
        }
    }
}

/// What a look at a token finds.
enum Found {
    Verdict(Result<Arc<Caller>, AuthError>),
    /// Whether it is good depends on keys that are not here.
    KeyUnknown,
}

impl Tokens {
    #[must_use]
    pub fn new(rules: TokenRules, source: KeySource, pace: Pace) -> Self {
        let rounds = Rounds {
            wanted: 1,
            ..Rounds::default()
        };
        Self(Arc::new(Shared {
            rules,
            source,
            pace,
            keys: ArcSwapOption::empty(),
            rounds: watch::Sender::new(rounds),
            waiting: Semaphore::new(WAITING_MAX),
        }))
    }

    /// Whose token it is, where that is remembered.
    #[must_use]
    pub fn authenticate(&self, token: &str) -> Authentication {
        if token.len() > TOKEN_BYTES_MAX {
            return Authentication::Known(Err(refused("it is too long")));
        }
        match self.remembered(token) {
            Some(verdict) => Authentication::Known(verdict),
            None => Authentication::Unverified(Unverified {
                tokens: self.clone(),
                token: token.to_owned(),
            }),
        }
    }

    fn remembered(&self, token: &str) -> Option<Result<Arc<Caller>, AuthError>> {
        let believed = self.0.keys.load();
        let believed = believed.as_deref()?;
        if BootTime::now().since(believed.confirmed) > self.0.pace.age_max {
            return Some(Err(AuthError::Unavailable));
        }
        let digest = blake3::hash(token.as_bytes());
        let verified = believed.keys.verified.get(&digest)?;
        // By the clock by which it was found good.
        Some(if verified.good_until < get_current_timestamp() {
            Err(AuthError::Expired)
        } else {
            Ok(verified.caller)
        })
    }

    fn look_at(&self, token: &str) -> Found {
        if let Some(verdict) = self.remembered(token) {
            return Found::Verdict(verdict);
        }
        let Some(believed) = &*self.0.keys.load() else {
            return Found::KeyUnknown;
        };
        let keys = &believed.keys;
        let Some(header) = decode_header(token).ok().filter(is_understood) else {
            return Found::Verdict(Err(refused("its header is not understood")));
        };
        let Some(key_id) = &header.kid else {
            return Found::Verdict(Err(refused("it names no key")));
        };
        let Some(key) = keys.get(key_id) else {
            return Found::KeyUnknown;
        };
        Found::Verdict(verify(token, key, &self.0.rules).map(|verified| {
            let digest = blake3::hash(token.as_bytes());
            keys.verified.insert(digest, verified.clone());
            verified.caller
        }))
    }

    /// Looks again once keys have been read that were asked for after the token came.
    async fn wait_for_key(&self, token: &str) -> Result<Arc<Caller>, AuthError> {
        let shared = &*self.0;
        let Ok(_permit) = shared.waiting.try_acquire() else {
            return Err(AuthError::Unavailable);
        };
        let mut rounds = shared.rounds.subscribe();
        if let Some(round) = self.want_keys() {
            let ended = rounds.wait_for(|rounds| rounds.ended >= round);
            if timeout(shared.pace.wait_max, ended).await.is_err() {
                return Err(AuthError::Unavailable);
            }
        }
        match self.look_at(token) {
            Found::Verdict(verdict) => verdict,
            Found::KeyUnknown if rounds.borrow().has_failed => Err(AuthError::Unavailable),
            Found::KeyUnknown => Err(refused("the issuer has no such key")),
        }
    }

    /// The round of reading to wait for, `None` when keys were hastened so lately that they are not again.
    fn want_keys(&self) -> Option<u64> {
        let mut round = None;
        self.0.rounds.send_if_modified(|rounds| {
            let is_wanted = rounds.wanted > rounds.ended;
            let now = BootTime::now();
            let is_time = rounds
                .hastened
                .is_none_or(|last| now.since(last) >= self.0.pace.hasten_interval);
            let hastens = !is_wanted && is_time;
            if hastens {
                rounds.hastened = Some(now);
                rounds.wanted = rounds.begun + 1;
            }
            round = (is_wanted || hastens).then_some(rounds.wanted);
            hastens
        });
        round
    }

    /// Reads the issuer's keys, again and again and when they are wanted; never returns.
    pub async fn follow(self) {
        let shared = &*self.0;
        let mut rounds = shared.rounds.subscribe();
        loop {
            let asked = BootTime::now();
            shared.rounds.send_modify(|rounds| rounds.begun += 1);
            let read = timeout(shared.pace.read_max, shared.source.read()).await;
            let read = read.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            let taken = read.and_then(|document| self.take(&document, asked));
            if let Err(error) = &taken {
                // At most once an interval: failures are retried no more often.
                let age = shared
                    .keys
                    .load_full()
                    .map(|keys| asked.since(keys.confirmed));
                tracing::warn!(source = %shared.source, ?age, error, "the issuer's keys cannot be read");
            }
            shared.rounds.send_modify(|rounds| {
                rounds.ended = rounds.begun;
                rounds.has_failed = taken.is_err();
            });
            let pause = match shared.source {
                _ if taken.is_err() => shared.pace.hasten_interval,
                KeySource::Url(..) => shared.pace.url_interval,
                KeySource::File(_) => shared.pace.file_interval,
            };
            let wanted = rounds.wait_for(|rounds| rounds.wanted > rounds.ended);
            // Wanted or not, it is time. The sender lives as long as this.
            drop(timeout(pause, wanted).await);
        }
    }

    /// Believes what was read from now on. The same document confirms the keys, with all that they have verified.
    fn take(&self, document: &[u8], asked: BootTime) -> Result<(), String> {
        let keys = match &*self.0.keys.load() {
            Some(known) if known.keys.digest == blake3::hash(document) => Arc::clone(&known.keys),
            _ => Arc::new(KeySet::parse(document)?),
        };
        self.0.keys.store(Some(Arc::new(Believed {
            keys,
            confirmed: asked,
        })));
        Ok(())
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.0.source)
    }
}

/// Says why in the log, at a level for those who look for it; the caller hears nothing of it.
pub(super) fn refused(why: impl fmt::Display) -> AuthError {
    // Some of it may be the token's own words.
    let why = why.to_string();
    tracing::debug!(why = %why.escape_debug(), "a token was refused");
    AuthError::Invalid
}

/// No extension that must be understood, and no other kind of signed message (RFC 8725 section 3.11).
fn is_understood(header: &Header) -> bool {
    let is_token = |kind: &String| {
        let kind = kind.to_ascii_lowercase();
        let kind = kind.strip_prefix("application/").unwrap_or(&kind);
        matches!(kind, "jwt" | "at+jwt")
    };
    header.crit.is_none() && header.typ.as_ref().is_none_or(is_token)
}

fn verify(token: &str, key: &Key, rules: &TokenRules) -> Result<Verified, AuthError> {
    let decoded = decode::<Claim>(token, &key.decoding_key, &validation(key.algorithm, rules));
    let claims = match decoded {
        Ok(decoded) => decoded.claims,
        Err(error) => {
            return Err(match error.kind() {
                ErrorKind::ExpiredSignature => AuthError::Expired,
                _ => refused(error),
            });
        }
    };
    let (Some(Claim::Number(expires)), Some(Claim::Text(subject))) =
        (claims.get("exp"), claims.get("sub"))
    else {
        return Err(refused("it lacks exp or sub"));
    };
    if subject.is_empty() || subject.len() > SUBJECT_BYTES_MAX {
        return Err(refused("its subject is empty or too long"));
    }
    Ok(Verified {
        caller: Arc::new(rules.grants.caller_of_token(subject, &claims)?),
        good_until: expires.saturating_add(rules.leeway_seconds()),
    })
}

/// What a token signed with this algorithm must say.
fn validation(algorithm: Algorithm, rules: &TokenRules) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    validation.iss = Some(HashSet::from([rules.issuer.clone()]));
    validation.aud = Some(HashSet::from([rules.audience.clone()]));
    validation.validate_nbf = true;
    validation.leeway = rules.leeway_seconds();
    validation
}
