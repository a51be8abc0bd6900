//! The claims of a token, as far as grants read them.
//!
//! Invariant: no object has a name twice, at any depth. Two readers of such a token could see two different tokens.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};

/// A claim, or all of them: the token's payload is an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::auth) enum Claim {
    Object(BTreeMap<String, Claim>),
    List(Vec<Claim>),
    Text(String),
    /// A number that is not negative, without its fraction.
    Number(u64),
    /// What no grant looks at: `true`, `null`, a negative number.
    Other,
}

impl Claim {
    /// The claim of this name inside of this one.
    pub(in crate::auth) fn get(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Object(claims) => claims.get(name),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Claim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ClaimVisitor)
    }
}

struct ClaimVisitor;

impl<'de> Visitor<'de> for ClaimVisitor {
    type Value = Claim;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claim, A::Error> {
        let mut claims = BTreeMap::new();
        while let Some((name, claim)) = map.next_entry::<String, Claim>()? {
            if claims.insert(name, claim).is_some() {
                return Err(A::Error::custom("an object has a name twice"));
            }
        }
        Ok(Claim::Object(claims))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Claim, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element()? {
            elements.push(element);
        }
        Ok(Claim::List(elements))
    }

    fn visit_str<E>(self, text: &str) -> Result<Claim, E> {
        Ok(Claim::Text(text.to_owned()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Claim, E> {
        Ok(Claim::Number(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Claim, E> {
        let whole = Duration::try_from_secs_f64(number).map(|duration| duration.as_secs());
        Ok(whole.map_or(Claim::Other, Claim::Number))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_unit<E>(self) -> Result<Claim, E> {
        Ok(Claim::Other)
    }
}
