//! The issuer's keys (a JSON Web Key Set, RFC 7517) and the tokens that were verified with them.
//!
//! Invariant: a key has one algorithm, the set's word on it and not a token's; and what a set has verified is forgotten
//! with the set, so that no token outlives its key.

use std::{collections::HashMap, sync::Arc};

use blake3::Hash;
use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse},
};
use moka::sync::Cache;
use serde::Deserialize;
use serde_json::Value;

use crate::auth::Caller;

/// Keys of a set: issuers have two or three, and one for each of their products at most.
const KEYS_MAX: usize = 100;

/// Tokens remembered: users who are active at the same time, at some 300 bytes each.
const VERIFIED_MAX: u64 = 20_000;

/// Shorter RSA moduli can be factored (NIST SP 800-131A).
const RSA_BITS_MIN: usize = 2_048;

/// Longer ones make each signature check cost the service milliseconds.
const RSA_BITS_MAX: usize = 8_192;

/// The first byte of an uncompressed point of P-256, and its two coordinates.
const P256_POINT_BYTES: usize = 1 + 2 * 32;

const ED25519_KEY_BYTES: usize = 32;

/// The keys of one document.
pub(super) struct KeySet {
    /// Of the document that the keys are from.
    pub(super) digest: Hash,
    keys: HashMap<String, Key>,
    /// By the token's digest: what is remembered cannot be presented.
    pub(super) verified: Cache<Hash, Verified>,
}

/// A key, and the one algorithm that it is for.
pub(super) struct Key {
    pub(super) algorithm: Algorithm,
    pub(super) decoding_key: DecodingKey,
}

/// What a token that was verified stands for.
#[derive(Clone)]
pub(super) struct Verified {
    pub(super) caller: Arc<Caller>,
    /// `exp` and the leeway, in seconds since 1970.
    pub(super) good_until: u64,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

impl KeySet {
    /// Keys that are not for signatures of ours are left out, as RFC 7517 section 5 asks; so are those without an id.
    ///
    /// # Errors
    /// When the document is no key set.
    pub(super) fn parse(document: &[u8]) -> Result<Self, String> {
        let parsed: Document = serde_json::from_slice(document)
            .map_err(|error| format!("not a JSON Web Key Set: {error}"))?;
        if parsed.keys.len() > KEYS_MAX {
            return Err(format!("more than {KEYS_MAX} keys"));
        }
        let count = parsed.keys.len();
        let mut keys = HashMap::new();
        for key in parsed.keys {
            if let Some((id, key)) = usable(key) {
                // Of two keys with one id the first: which one a token means cannot be told.
                keys.entry(id).or_insert(key);
            }
        }
        let left_out = count - keys.len();
        tracing::info!(
            keys = keys.len(),
            left_out,
            "the issuer's keys have changed"
        );
        Ok(Self {
            digest: blake3::hash(document),
            keys,
            verified: Cache::new(VERIFIED_MAX),
        })
    }

    pub(super) fn get(&self, id: &str) -> Option<&Key> {
        self.keys.get(id)
    }
}

/// The key's id and the key, where it is one for signatures that we check.
fn usable(key: Value) -> Option<(String, Key)> {
    let jwk: Jwk = serde_json::from_value(key).ok()?;
    let is_for_signatures = matches!(
        jwk.common.public_key_use,
        None | Some(PublicKeyUse::Signature)
    );
    let is_for_verifying = jwk
        .common
        .key_operations
        .as_ref()
        .is_none_or(|operations| operations.contains(&KeyOperations::Verify));
    if !is_for_signatures || !is_for_verifying {
        return None;
    }
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            Algorithm::EdDSA
        }
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            Algorithm::ES256
        }
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        _ => return None,
    };
    let says_otherwise = |said: KeyAlgorithm| said != KeyAlgorithm::from(algorithm);
    if jwk.common.key_algorithm.is_some_and(says_otherwise) {
        return None;
    }
    let decoding_key = DecodingKey::from_jwk(&jwk).ok()?;
    let is_well_formed = match decoding_key.kind() {
        DecodingKeyKind::SecretOrDer(bytes) if algorithm == Algorithm::ES256 => {
            bytes.len() == P256_POINT_BYTES
        }
        DecodingKeyKind::SecretOrDer(bytes) => bytes.len() == ED25519_KEY_BYTES,
        DecodingKeyKind::RsaModulusExponent { n, .. } => {
            (RSA_BITS_MIN..=RSA_BITS_MAX).contains(&bits(n))
        }
    };
    let key = Key {
        algorithm,
        decoding_key,
    };
    is_well_formed.then_some((jwk.common.key_id?, key))
}

/// Of a big-endian number.
fn bits(number: &[u8]) -> usize {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let significant = &number[zeros..];
    let leading = significant.first().map_or(0, |byte| byte.leading_zeros());
    significant.len() * 8 - leading as usize
}
