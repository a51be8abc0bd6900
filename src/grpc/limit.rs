//! The limits as layers of the stack that every call comes through: the door outside, then the deadline, then the gate,
//! then the caller's own share.
//!
//! Invariant: a call gives its place back however it ends, and not before its answer is taken; what it came to is counted once, at the door, and the line that
//! is logged of it holds nothing that the caller wrote but its identity, escaped.

pub(super) mod deadline;
mod held;

use std::{
    future::Future,
    mem,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_util::future::{Either, Ready, ready};
use http::{Extensions, HeaderMap, Request, Response};
use http_body::Body as _;
use pin_project_lite::pin_project;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use self::held::Held;
use super::status;
use crate::{
    auth::{Caller, Peer, access::Answer},
    limits::{Class, Limits, Method, Place, Refusal, Share},
};

/// Whose address a request comes from, as far as the limits believe it.
pub(super) fn client_address<B>(limits: &Limits, request: &Request<B>) -> Option<IpAddr> {
    limits.client_address(peer_address(request.extensions()), request.headers())
}

fn peer_address(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<Peer>()?.address
}

/// Outermost: takes a place among the requests in flight, counts the address's calls, and counts what calls came to.
#[derive(Clone)]
pub struct DoorLayer(pub Arc<Limits>);

/// A service behind the door.
#[derive(Clone)]
pub struct Door<S> {
    limits: Arc<Limits>,
    inner: S,
}

pin_project! {
    /// A call that has come to the door.
    pub struct AtTheDoor<F> {
        #[pin]
        answer: F,
        method: Method,
        address: Option<IpAddr>,
        place: Option<Place>,
        limits: Arc<Limits>,
    }
}

type Refused<E> = Ready<Result<Response<Body>, E>>;

impl<S> Layer<S> for DoorLayer {
    type Service = Door<S>;

    fn layer(&self, inner: S) -> Door<S> {
        Door {
            limits: Arc::clone(&self.0),
            inner,
        }
    }
}

impl<S, B> Service<Request<B>> for Door<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = AtTheDoor<Either<S::Future, Refused<S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = Method::of(&request);
        let address = client_address(&self.limits, &request);
        let entered = match method.class {
            Class::Free if method.answer != Answer::Message => self.limits.watch(address).map(Some),
            Class::Free => Ok(None),
            Class::Check | Class::List => {
                let place = self.limits.enter(method.class);
                place.and_then(|place| self.limits.address(address).map(|()| Some(place)))
            }
        };
        let (answer, place) = match entered {
            Ok(place) => (Either::Left(self.inner.call(request)), place),
            Err(refusal) => {
                let response = status::refused(refusal).into_http();
                (Either::Right(ready(Ok(response))), None)
            }
        };
        AtTheDoor {
            answer,
            method,
            address,
            place,
            limits: Arc::clone(&self.limits),
        }
    }
}

impl<F, E> Future for AtTheDoor<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let mut answer = ready!(this.answer.poll(context));
        if let (Ok(response), Some(mut place)) = (&mut answer, this.place.take()) {
            // What the caller's share has been told already.
            let bytes = usize::try_from(response.body().size_hint().lower()).unwrap_or(usize::MAX);
            match this.limits.weigh(&mut place, bytes) {
                Ok(()) => {
                    let messages = mem::take(response.body_mut());
                    *response.body_mut() = Body::new(Held::until_taken(messages, Some(place)));
                }
                Err(refusal) => *response = status::refused(refusal).into_http(),
            }
        }
        if let Ok(response) = &answer
            && let Some(code) = code(response.headers())
            && let Some(left_out) = this.limits.tally.failed(code.into())
        {
            log(this.method, *this.address, response, left_out);
        }
        Poll::Ready(answer)
    }
}

/// What the call failed with; an answer of a single message says so before it.
fn code(headers: &HeaderMap) -> Option<Code> {
    let code = Code::from_bytes(headers.get(Status::GRPC_STATUS)?.as_bytes());
    (code != Code::Ok).then_some(code)
}

fn log(method: &Method, address: Option<IpAddr>, response: &Response<Body>, left_out: u64) {
    let status = Status::from_header_map(response.headers());
    let (code, reason) = status.map_or((Code::Unknown, String::new()), |status| {
        (status.code(), status::reason(&status))
    });
    let caller = response.extensions().get::<Arc<Caller>>();
    tracing::warn!(
        method = method.name,
        ?code,
        reason,
        address = address.map(tracing::field::display),
        caller = caller.map(|caller| tracing::field::display(&caller.identity)),
        left_out,
        "refused or failed"
    );
}

/// Gives every call a deadline, and every stream an age. Outside of it tonic only knows the caller's own deadline, and
/// calls it CANCELLED.
#[derive(Clone)]
pub struct DeadlineLayer(pub Arc<Limits>);

/// A service whose calls end.
#[derive(Clone)]
pub struct Deadline<S> {
    limits: Arc<Limits>,
    inner: S,
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline {
            limits: Arc::clone(&self.0),
            inner,
        }
    }
}

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = deadline::Bounded<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let asked = deadline::asked_for(request.headers());
        let most = self.limits.request_deadline_max;
        let ages = Method::of(&request).answer == Answer::Stream;
        let bounds = deadline::Bounds {
            deadline: asked.into_iter().chain(most).min(),
            age: self.limits.stream_age_max.filter(|_| ages),
        };
        deadline::Bounded::new(self.inner.call(request), bounds)
    }
}

/// Innermost: counts the caller's calls, and names the caller of one that fails.
#[derive(Clone)]
pub struct CallerLayer(pub Arc<Limits>);

/// A service that each caller has a share of.
#[derive(Clone)]
pub struct Shared<S> {
    limits: Arc<Limits>,
    inner: S,
}

pin_project! {
    /// A call whose caller is known.
    pub struct OfCaller<F> {
        #[pin]
        answer: F,
        caller: Option<Arc<Caller>>,
        share: Option<Share>,
        // A stream's messages are made as they are taken.
        is_whole: bool,
        limits: Arc<Limits>,
    }
}

impl<S> Layer<S> for CallerLayer {
    type Service = Shared<S>;

    fn layer(&self, inner: S) -> Shared<S> {
        Shared {
            limits: Arc::clone(&self.0),
            inner,
        }
    }
}

impl<S, B> Service<Request<B>> for Shared<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = OfCaller<Either<S::Future, Refused<S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // Without a caller, a call that is open to everybody; a handler that needs one refuses it.
        let caller = request.extensions().get::<Arc<Caller>>().cloned();
        let method = Method::of(&request);
        let is_whole = method.answer == Answer::Message;
        let share = caller.as_ref().map_or(Ok(None), |caller| {
            self.share(caller, method.class, &request)
        });
        let (answer, share) = match share {
            Ok(share) => (Either::Left(self.inner.call(request)), share),
            Err(refusal) => {
                let response = status::refused(refusal).into_http();
                (Either::Right(ready(Ok(response))), None)
            }
        };
        OfCaller {
            answer,
            caller,
            share,
            is_whole,
            limits: Arc::clone(&self.limits),
        }
    }
}

impl<S> Shared<S> {
    fn share<B>(
        &self,
        caller: &Caller,
        class: Class,
        request: &Request<B>,
    ) -> Result<Option<Share>, Refusal> {
        self.limits.caller(caller, class)?;
        match class {
            Class::Free => Ok(None),
            Class::Check | Class::List => {
                let address = client_address(&self.limits, request);
                self.limits.share(caller, address)
            }
        }
    }
}

impl<F, E> Future for OfCaller<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let mut answer = ready!(this.answer.poll(context));
        if let Ok(response) = &mut answer {
            let messages = mem::take(response.body_mut());
            let mut held = Held::new(messages, this.share.take());
            let weighed = if *this.is_whole {
                let bytes = held.encode(context);
                let share = held.held_mut();
                share.map_or(Ok(()), |share| this.limits.weigh_share(share, bytes))
            } else {
                Ok(())
            };
            match weighed {
                Ok(()) => *response.body_mut() = Body::new(held),
                Err(refusal) => *response = status::refused(refusal).into_http(),
            }
        }
        if let (Ok(response), Some(caller)) = (&mut answer, this.caller.take())
            && code(response.headers()).is_some()
        {
            response.extensions_mut().insert(caller);
        }
        Poll::Ready(answer)
    }
}
