//! Whether a credential is still what it was when its call came: for calls that last.
//!
//! Invariant: a call that lasts goes no further than `LOOK_INTERVAL` beyond an instant at which a new one with its
//! credential would have been let in as the same caller. What cannot be found out ends it, too.

use std::{pin::pin, sync::Arc, time::Duration};

use http::HeaderMap;
use thiserror::Error;
use tokio::time::timeout;

use super::{
    AuthError, Authentication, Authenticator, Caller, Forbidden, Peer, access::Need, bearer,
};

/// How often a credential is looked at again: as often as the keys are asked for, and as a stream says where it is.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// A credential that has opened a call, and what it was then. It holds the credential itself, so that it is judged by
/// all that a new call's is; hence no `Debug`.
#[derive(Clone)]
pub struct Standing {
    authenticator: Arc<Authenticator>,
    /// `None`: it is its peer's certificate.
    credential: Option<Arc<str>>,
    peer: Peer,
    need: Need,
    caller: Arc<Caller>,
}

/// Why a credential is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Lost {
    #[error(transparent)]
    Credential(#[from] AuthError),
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// It is still good for such a call, and for other organizations or scopes than before.
    #[error("what the credential is for has changed")]
    Changed,
}

impl Standing {
    /// Of the credential that these say, by which `caller` was found to have what is needed.
    #[must_use]
    pub fn new(
        authenticator: Arc<Authenticator>,
        headers: &HeaderMap,
        peer: Peer,
        need: Need,
        caller: Arc<Caller>,
    ) -> Self {
        Self {
            authenticator,
            // What is malformed is let in only where none is asked for.
            credential: bearer(headers).ok().flatten().map(Arc::from),
            peer,
            need,
            caller,
        }
    }

    /// Does the work for as long as the credential is what it was. While that is being found out, the work rests.
    ///
    /// # Errors
    /// When the credential is not what it was: the work is dropped.
    pub async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, Lost> {
        let mut work = pin!(work);
        loop {
            match timeout(LOOK_INTERVAL, &mut work).await {
                Ok(done) => return Ok(done),
                Err(_) => self.look().await?,
            }
        }
    }

    async fn look(&self) -> Result<(), Lost> {
        let credential = Ok(self.credential.as_deref());
        let found = (self.authenticator).authenticate_by(credential, &self.peer, self.need);
        let found = match found {
            // Whoever sent it has been let in by it: no stranger's work.
            Authentication::Unverified(token) => token.verify(),
            found => found,
        };
        let caller = match found {
            Authentication::Known(caller) => caller?,
            Authentication::Pending(caller) => caller.await?,
            // It has been verified above, or refused.
            Authentication::Unverified(_) => return Err(AuthError::Invalid.into()),
        };
        self.need.opens_to(&caller)?;
        if caller == self.caller {
            Ok(())
        } else {
            Err(Lost::Changed)
        }
    }
}
