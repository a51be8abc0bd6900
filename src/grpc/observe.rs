//! Counts every call: that it began, what it ended with, how long it took; and hands it to [`Traces`] when it has ended.
//! Outside of all other layers, so that nothing is refused unseen.
//!
//! Invariant: a call that began ends once, however it ends; one whose caller went away ended cancelled, or too late where
//! that was at its deadline; and one that panicked as a defect.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::limit::deadline;
use crate::{
    auth::access::Answer,
    counters::Calls,
    limits::{Class, Method},
    traces::{self, Begun, Ending, Traces},
    trail::{self, Trail},
};

/// The caller's clock began before ours, by the call's way here: whoever leaves in the last tenth of its deadline leaves
/// for that. Few leave then for another reason, and an error that is counted without cause is better than none.
const LAST_PART: u32 = 10;

/// What calls of a protocol can end with, by number.
#[derive(Clone, Copy, Debug)]
pub struct Outcomes {
    pub count: usize,
    good: usize,
    /// Of a call whose caller went away.
    cancelled: usize,
    /// Of a call whose caller went away at the deadline that it had given.
    late: usize,
    /// Of a call that panicked.
    panicked: usize,
    /// What an answer, or its trailers, say that is not `good`.
    other: fn(StatusCode, &HeaderMap) -> Option<usize>,
    /// What an outcome is to a trace.
    ending: fn(usize) -> Ending,
}

/// google.rpc.Code, each as its own number.
pub static GRPC_OUTCOMES: Outcomes = Outcomes {
    count: 17,
    good: Code::Ok as usize,
    cancelled: Code::Cancelled as usize,
    late: Code::DeadlineExceeded as usize,
    panicked: Code::Internal as usize,
    other: |_, headers| {
        let code = headers.get(Status::GRPC_STATUS)?;
        Some(Code::from_bytes(code.as_bytes()) as usize)
    },
    ending: |outcome| Ending::Grpc(u16::try_from(outcome).unwrap_or(u16::MAX)),
};

/// What the service answers over HTTP; 499, as nginx has it, is a caller that went away, and the last stands for any other.
pub const HTTP_STATUSES: [&str; 24] = [
    "200", "499", "204", "302", "304", "400", "401", "403", "404", "405", "406", "408", "409",
    "410", "412", "413", "415", "421", "422", "429", "500", "503", "504", "other",
];

/// Places of 500 and 504 in [`HTTP_STATUSES`].
const HTTP_INTERNAL: usize = 20;
const HTTP_LATE: usize = 22;
const _: () = assert!(matches!(HTTP_STATUSES[HTTP_INTERNAL].as_bytes(), b"500"));
const _: () = assert!(matches!(HTTP_STATUSES[HTTP_LATE].as_bytes(), b"504"));

/// Statuses of HTTP, each by its place in [`HTTP_STATUSES`].
pub static HTTP_OUTCOMES: Outcomes = Outcomes {
    count: HTTP_STATUSES.len(),
    good: 0,
    cancelled: 1,
    late: HTTP_LATE,
    panicked: HTTP_INTERNAL,
    other: |status, _| {
        let status = status.as_str();
        let known = HTTP_STATUSES.iter().position(|known| *known == status);
        Some(known.unwrap_or(HTTP_STATUSES.len() - 1)).filter(|outcome| *outcome > 0)
    },
    ending: |outcome| Ending::Http(HTTP_STATUSES[outcome].parse().unwrap_or(0)),
};

/// Counts the calls of a service.
#[derive(Clone)]
pub struct ObserveLayer(Arc<Observer>);

/// Who is told of calls.
struct Observer {
    calls: Arc<Calls>,
    outcomes: &'static Outcomes,
    traces: Arc<Traces>,
}

impl ObserveLayer {
    /// `calls` has as many outcomes as these are.
    #[must_use]
    pub fn new(calls: Arc<Calls>, outcomes: &'static Outcomes, traces: Arc<Traces>) -> Self {
        Self(Arc::new(Observer {
            calls,
            outcomes,
            traces,
        }))
    }
}

/// A service whose calls are counted.
#[derive(Clone)]
pub struct Observe<S> {
    observer: Arc<Observer>,
    inner: S,
}

/// A call under way; it has ended when this is dropped.
struct Call {
    observer: Arc<Observer>,
    method: Method,
    outcome: usize,
    since: Instant,
    /// The caller's own. Whether its clock or ours ends the call is chance, and it does not say why it left.
    deadline: Option<Duration>,
    /// `None` where nothing is told of the call.
    begun: Option<Begun>,
    trail: Option<Trail>,
}

impl Call {
    /// Works on the call. A panic leaves it panicked: what is dropped later than it unwinds could not tell.
    fn work<T>(&mut self, work: impl FnOnce(&mut Option<Trail>) -> T) -> T {
        self.outcome = self.observer.outcomes.panicked;
        let done = work(&mut self.trail);
        self.outcome = self.observer.outcomes.cancelled;
        done
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let took = self.since.elapsed();
        let Observer {
            calls,
            outcomes,
            traces,
        } = &*self.observer;
        let is_late = self.outcome == outcomes.cancelled
            && (self.deadline).is_some_and(|deadline| took + deadline / LAST_PART >= deadline);
        let outcome = if is_late { outcomes.late } else { self.outcome };
        calls.ended(self.method.index, outcome, took);
        if let (Some(begun), Some(trail)) = (&self.begun, &self.trail) {
            let call = traces::Call {
                method: self.method.name,
                ending: (outcomes.ending)(outcome),
                since: self.since,
                took,
                is_stream: self.method.answer != Answer::Message,
                is_cached: self.method.class == Class::Check,
            };
            traces.end(begun, trail, &call);
        }
    }
}

pin_project! {
    /// A call until its answer begins.
    pub struct Observed<F> {
        #[pin]
        answer: F,
        call: Option<Call>,
        outcomes: &'static Outcomes,
        is_whole: bool,
    }
}

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe {
            observer: Arc::clone(&self.0),
            inner,
        }
    }
}

impl<S, B, A> Service<Request<B>> for Observe<S>
where
    S: Service<Request<B>, Response = Response<A>>,
{
    type Response = Response<Counted<A>>;
    type Error = S::Error;
    type Future = Observed<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Observer {
            calls,
            outcomes,
            traces,
        } = &*self.observer;
        let method = Method::of(&request);
        calls.begun(method.index);
        let deadline = deadline::asked_for(request.headers());
        // Probes and scrapes are many, and nobody follows them.
        let begun = match method.class {
            Class::Free => None,
            Class::Check | Class::List => traces.begin(request.headers()),
        };
        let (begun, trail) = begun.unzip();
        let mut call = Call {
            observer: Arc::clone(&self.observer),
            method,
            outcome: outcomes.cancelled,
            since: Instant::now(),
            deadline,
            begun,
            trail,
        };
        Observed {
            is_whole: method.answer == Answer::Message,
            answer: call.work(|trail| trail::within(trail, || self.inner.call(request))),
            outcomes,
            call: Some(call),
        }
    }
}

impl<F, A, E> Future for Observed<F>
where
    F: Future<Output = Result<Response<A>, E>>,
{
    type Output = Result<Response<Counted<A>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = match this.call {
            Some(call) => call.work(|trail| trail::within(trail, || this.answer.poll(context))),
            None => this.answer.poll(context),
        };
        let answer = ready!(answer);
        let (mut call, outcomes) = (this.call.take(), *this.outcomes);
        Poll::Ready(answer.map(|response| {
            let other = (outcomes.other)(response.status(), response.headers());
            // A stream goes on until its messages have ended, unless it never began.
            if (*this.is_whole || other.is_some())
                && let Some(mut call) = call.take()
            {
                call.outcome = other.unwrap_or(outcomes.good);
            }
            response.map(|messages| Counted {
                messages,
                call,
                outcomes,
            })
        }))
    }
}

pin_project! {
    /// What a call answers; of a stream, its messages until the last.
    pub struct Counted<A> {
        #[pin]
        messages: A,
        call: Option<Call>,
        outcomes: &'static Outcomes,
    }
}

impl<A: Body> Body for Counted<A> {
    type Data = A::Data;
    type Error = A::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<A::Data>, A::Error>>> {
        let this = self.project();
        let Some(call) = this.call else {
            return this.messages.poll_frame(context);
        };
        let polled = call.work(|_| this.messages.poll_frame(context));
        match &polled {
            Poll::Ready(None) => {
                call.outcome = this.outcomes.good;
                *this.call = None;
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let other = (this.outcomes.other)(StatusCode::OK, trailers);
                    call.outcome = other.unwrap_or(this.outcomes.good);
                    *this.call = None;
                }
            }
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.messages.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.messages.size_hint()
    }
}
