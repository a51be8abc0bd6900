//! The gate that every call comes through: what it needs, who calls, whether that fits. Handlers find the caller in the
//! request's extensions, and those whose calls last its [`Standing`].
//!
//! Invariant: a call reaches no handler without a caller, and no handler that its caller's scopes do not open.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::{BoxFuture, Either, FutureExt, Ready, ready};
use http::{Request, Response};
use tonic::Status;
use tower::{Layer, Service};

use super::{limit, status};
use crate::{
    auth::{
        AuthError, Authentication, Authenticator, Caller, Peer,
        access::{self, Answer, Need},
        standing::Standing,
        tokens::Unverified,
    },
    limits::{Limits, Refusal},
    trail::{self, Kind},
};

/// Puts the gate in front of a service.
#[derive(Clone)]
pub struct GateLayer(pub Arc<Authenticator>, pub Arc<Limits>);

/// A service behind the gate.
#[derive(Clone)]
pub struct Gate<S> {
    authenticator: Arc<Authenticator>,
    limits: Arc<Limits>,
    inner: S,
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate {
            authenticator: Arc::clone(&self.0),
            limits: Arc::clone(&self.1),
            inner,
        }
    }
}

type Outcome<S, B> = Result<<S as Service<B>>::Response, <S as Service<B>>::Error>;
type Passed<S, B> = <S as Service<B>>::Future;

impl<S, B, R> Service<Request<B>> for Gate<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Send + 'static,
    R: Default + Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<
        Passed<S, Request<B>>,
        Either<Ready<Outcome<S, Request<B>>>, BoxFuture<'static, Outcome<S, Request<B>>>>,
    >;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let refuse = |status: Status| Either::Right(Either::Left(ready(Ok(status.into_http()))));
        let row = match access::row(&request).map(|(_, (_, need, answer))| (*need, *answer)) {
            None => return refuse(status::no_such_method()),
            Some((Need::Nothing | Need::Open, _)) => return Either::Left(self.inner.call(request)),
            Some(row) => row,
        };
        let nobody = Peer::default();
        let peer = request.extensions().get::<Peer>().unwrap_or(&nobody);
        let (need, _) = row;
        let found = match (self.authenticator).authenticate(request.headers(), peer, need) {
            Authentication::Unverified(token) => match self.verify(token, &request) {
                Ok(found) => found,
                Err(refusal) => return refuse(status::refused(refusal)),
            },
            found => found,
        };
        match found {
            // It has been verified above, or refused.
            Authentication::Unverified(_) => refuse(status::unauthenticated(AuthError::Invalid)),
            Authentication::Known(caller) => {
                match caller
                    .map_err(|error| self.unauthenticated(error, &request))
                    .and_then(|caller| admit(caller, row, &self.authenticator, &mut request))
                {
                    Ok(()) => Either::Left(self.inner.call(request)),
                    Err(status) => refuse(status),
                }
            }
            Authentication::Pending(caller) => {
                // The service that was said to be ready is the one to call.
                let ready = self.inner.clone();
                let mut inner = std::mem::replace(&mut self.inner, ready);
                let authenticator = Arc::clone(&self.authenticator);
                let answer = async move {
                    let waits = trail::begin(Kind::Authentication);
                    let caller = caller.await.map_err(status::unauthenticated);
                    drop(waits);
                    match caller.and_then(|caller| admit(caller, row, &authenticator, &mut request))
                    {
                        Ok(()) => inner.call(request).await,
                        Err(status) => Ok(status.into_http()),
                    }
                };
                Either::Right(Either::Right(answer.boxed()))
            }
        }
    }
}

impl<S> Gate<S> {
    /// Does a stranger's work within the bound of its address: a fetch is held against it, a token that is good is not.
    fn verify<B>(
        &self,
        token: Unverified,
        request: &Request<B>,
    ) -> Result<Authentication, Refusal> {
        let address = limit::client_address(&self.limits, request);
        self.limits.may_try_credential(address)?;
        let found = token.verify();
        if matches!(found, Authentication::Pending(_)) {
            self.limits.credential(address)?;
        }
        Ok(found)
    }

    /// A wrong credential is held against its address; none at all costs nothing.
    fn unauthenticated<B>(&self, error: AuthError, request: &Request<B>) -> Status {
        let counted = match error {
            AuthError::Missing | AuthError::Unavailable => Ok(()),
            AuthError::Invalid | AuthError::Expired | AuthError::Revoked => self
                .limits
                .credential(limit::client_address(&self.limits, request)),
        };
        match counted {
            Ok(()) => status::unauthenticated(error),
            Err(refusal) => status::refused(refusal),
        }
    }
}

/// Says in the request who calls, if that fits what its row of the table needs.
fn admit<B>(
    caller: Arc<Caller>,
    (need, answer): (Need, Answer),
    authenticator: &Arc<Authenticator>,
    request: &mut Request<B>,
) -> Result<(), Status> {
    need.opens_to(&caller).map_err(status::forbidden)?;
    trail::admit();
    if answer == Answer::EndingStream {
        let (authenticator, caller) = (Arc::clone(authenticator), Arc::clone(&caller));
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.unwrap_or_default();
        let standing = Standing::new(authenticator, request.headers(), peer, need, caller);
        request.extensions_mut().insert(standing);
    }
    request.extensions_mut().insert(caller);
    Ok(())
}
