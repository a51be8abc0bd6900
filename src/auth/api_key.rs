//! The form of an API key, `hp_<id>_<secret>`, and what is kept of it.
//!
//! Invariant: a secret is never printed, nor kept as it is. What is kept is its BLAKE3 hash, keyed by the id, so that a
//! row says nothing under another id, and by the pepper, so that who can only write rows cannot make a key. A secret is
//! 256 random bits: nobody finds it by trying, so the hash need not be slow.

use std::fmt;

use subtle::ConstantTimeEq;

/// What leads an API key, and nothing else that is sent as a credential.
pub const PREFIX: &str = "hp_";

/// Characters of an id, of 5 bits each: 80 random bits do not meet.
pub const ID_LEN: usize = 16;

/// Random bytes of a secret, written as two characters each.
const SECRET_BYTES: usize = 32;
const SECRET_LEN: usize = 2 * SECRET_BYTES;

/// Digits of base 32 that are hard to mistake: RFC 4648's, small.
const ID_ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Sets these hashes apart from all others, and from those of another form of key, should there be one.
const CONTEXT: &str = "hallpass 2026-11 hash of an API key's secret";

/// The public part of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId([u8; ID_LEN]);

impl KeyId {
    /// Reads what an id's digits make up, and nothing else.
    #[must_use]
    pub fn parse(id: &str) -> Option<Self> {
        let id: [u8; ID_LEN] = id.as_bytes().try_into().ok()?;
        id.iter()
            .all(|digit| matches!(digit, b'a'..=b'z' | b'2'..=b'7'))
            .then_some(Self(id))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        // Its digits are ASCII.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// A key as its caller sends it.
#[derive(Clone, Copy)]
pub struct ApiKey {
    pub id: KeyId,
    /// As it is written: another way to write the same bits is another secret.
    secret: [u8; SECRET_LEN],
}

/// Not the secret.
impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}_***", self.id.as_str())
    }
}

impl ApiKey {
    /// `None` for what is no key.
    #[must_use]
    pub fn parse(credential: &str) -> Option<Self> {
        let (id, secret) = credential.strip_prefix(PREFIX)?.split_once('_')?;
        Some(Self {
            id: KeyId::parse(id)?,
            secret: secret.as_bytes().try_into().ok()?,
        })
    }

    /// A new key.
    ///
    /// # Errors
    /// When the operating system has no random bits to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let (mut id, mut bytes) = ([0; ID_LEN], [0; SECRET_BYTES]);
        getrandom::fill(&mut id)?;
        getrandom::fill(&mut bytes)?;
        let mut secret = [0; SECRET_LEN];
        for (digits, byte) in secret.chunks_exact_mut(2).zip(bytes) {
            digits.copy_from_slice(format!("{byte:02x}").as_bytes());
        }
        Ok(Self {
            id: KeyId(id.map(|byte| ID_ALPHABET[usize::from(byte % 32)])),
            secret,
        })
    }

    /// The key in full, to be shown once.
    #[must_use]
    pub fn reveal(&self) -> String {
        let secret = std::str::from_utf8(&self.secret).unwrap_or_default();
        format!("{PREFIX}{}_{secret}", self.id.as_str())
    }

    /// What is kept of it.
    #[must_use]
    pub fn hash(&self, pepper: &Pepper) -> [u8; 32] {
        Hasher::new(&self.id, pepper).hash(self)
    }
}

/// What the service has and the database does not, mixed into every hash; empty where none is given.
#[derive(Clone, Default)]
pub struct Pepper(Vec<u8>);

impl Pepper {
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Pepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Hashes the secrets that are sent with one id.
struct Hasher([u8; 32]);

impl Hasher {
    fn new(id: &KeyId, pepper: &Pepper) -> Self {
        let mut key = blake3::Hasher::new_derive_key(CONTEXT);
        // The id has a fixed length: nothing of the one can be taken for the other.
        key.update(&id.0).update(&pepper.0);
        Self(key.finalize().into())
    }

    fn hash(&self, key: &ApiKey) -> [u8; 32] {
        blake3::keyed_hash(&self.0, &key.secret).into()
    }
}

/// Tells whether a key is the one that a hash was made of.
pub struct Verifier {
    hasher: Hasher,
    hash: [u8; 32],
}

impl Verifier {
    #[must_use]
    pub fn new(id: &KeyId, hash: [u8; 32], pepper: &Pepper) -> Self {
        Self {
            hasher: Hasher::new(id, pepper),
            hash,
        }
    }

    /// One that no key fits.
    #[must_use]
    pub fn decoy() -> Self {
        Self {
            hasher: Hasher([0; 32]),
            hash: [0; 32],
        }
    }

    /// Takes the same time whatever was sent.
    #[must_use]
    pub fn fits(&self, key: &ApiKey) -> bool {
        self.hasher.hash(key).ct_eq(&self.hash).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_it_is_shown() {
        for _ in 0..1_000 {
            let key = ApiKey::generate().unwrap();
            let read = ApiKey::parse(&key.reveal()).unwrap();
            assert_eq!((read.id, read.secret), (key.id, key.secret));
            assert!(!format!("{key:?}").contains(&key.reveal()[20..]));
        }
    }

    #[test]
    fn what_is_no_key_is_not_read() {
        let key = ApiKey::generate().unwrap().reveal();
        let mut wrong = vec![
            String::new(),
            "hp_".to_owned(),
            "hp__".to_owned(),
            format!("{key}0"),
            format!("{key}_"),
            format!(" {key}"),
            key.replacen("hp_", "hq_", 1),
            key.replacen("hp_", "HP_", 1),
            key.replacen('_', "-", 2),
            format!("hp_{}_{}", "a".repeat(ID_LEN + 1), &key[20..]),
            format!("hp_{}_{}", "A".repeat(ID_LEN), &key[20..]),
            format!("hp_{}_{}", "é".repeat(ID_LEN / 2), &key[20..]),
            "hp_".repeat(100_000),
        ];
        wrong.extend((0..key.len()).map(|len| key[..len].to_owned()));
        for wrong in wrong {
            assert!(ApiKey::parse(&wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_hash_is_of_its_id_its_pepper_and_its_secret() {
        let key = ApiKey::generate().unwrap();
        let other = ApiKey::generate().unwrap();
        let pepper = Pepper::new(b"pepper".to_vec());
        let hash = key.hash(&pepper);
        let fits = |id: &ApiKey, pepper: &Pepper, sent: &ApiKey| {
            Verifier::new(&id.id, hash, pepper).fits(sent)
        };
        assert!(fits(&key, &pepper, &key));
        assert!(!fits(&key, &pepper, &other));
        assert!(!fits(&other, &pepper, &key));
        assert!(!fits(&key, &Pepper::default(), &key));
    }
}
