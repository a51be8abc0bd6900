//! Who the holder of a client certificate is. That the peer holds it, and that an authority that is trusted here issued
//! it, has been proven when its names arrive.
//!
//! Invariant: a certificate is one caller. Where two of its names have grants, which one counts is not guessed.

use std::{collections::HashMap, sync::Arc};

use super::{AuthError, Caller, Identity, grants::Grants};

/// Knows callers by the names in their certificates.
#[derive(Clone, Debug)]
pub struct Certificates(Arc<HashMap<Box<str>, Arc<Caller>>>);

impl Certificates {
    #[must_use]
    pub fn new(grants: &Grants) -> Self {
        Self(Arc::new(grants.certificates().clone()))
    }

    /// The caller that these names (the URI and DNS names of one certificate) belong to; without a scope when none of
    /// them has a grant.
    ///
    /// # Errors
    /// When there is no name, or several have grants.
    pub fn authenticate(&self, names: &[Box<str>]) -> Result<Arc<Caller>, AuthError> {
        let mut known: Option<&Arc<Caller>> = None;
        for caller in names.iter().filter_map(|name| self.0.get(name)) {
            if known.is_some_and(|known| known.identity != caller.identity) {
                return Err(AuthError::Invalid);
            }
            known = Some(caller);
        }
        if let Some(caller) = known {
            return Ok(Arc::clone(caller));
        }
        let name = names.first().ok_or(AuthError::Missing)?;
        let identity = Identity::Certificate((**name).into());
        Ok(Arc::new(Caller::without_scope(identity)))
    }
}
