//! Counts every call: that it began, what it ended with, how long it took. Outside of all other layers, so that nothing is
//! refused unseen.
//!
//! Invariant: a call that began ends once, however it ends; one whose caller went away ended cancelled.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::{auth::access::Answer, counters::Calls, limits::Method};

/// What calls of a protocol can end with, by number.
#[derive(Clone, Copy, Debug)]
pub struct Outcomes {
    pub count: usize,
    good: usize,
    /// Of a call whose caller went away.
    cancelled: usize,
    /// What an answer, or its trailers, say that is not `good`.
    other: fn(StatusCode, &HeaderMap) -> Option<usize>,
}

/// google.rpc.Code, each as its own number.
pub const GRPC_OUTCOMES: Outcomes = Outcomes {
    count: 17,
    good: Code::Ok as usize,
    cancelled: Code::Cancelled as usize,
    other: |_, headers| {
        let code = headers.get(Status::GRPC_STATUS)?;
        Some(Code::from_bytes(code.as_bytes()) as usize)
    },
};

/// What the service answers over HTTP; 499, as nginx has it, is a caller that went away, and the last stands for any other.
pub const HTTP_STATUSES: [&str; 24] = [
    "200", "499", "204", "302", "304", "400", "401", "403", "404", "405", "406", "408", "409",
    "410", "412", "413", "415", "421", "422", "429", "500", "503", "504", "other",
];

/// Statuses of HTTP, each by its place in [`HTTP_STATUSES`].
pub const HTTP_OUTCOMES: Outcomes = Outcomes {
    count: HTTP_STATUSES.len(),
    good: 0,
    cancelled: 1,
    other: |status, _| {
        let status = status.as_str();
        let known = HTTP_STATUSES.iter().position(|known| *known == status);
        Some(known.unwrap_or(HTTP_STATUSES.len() - 1)).filter(|outcome| *outcome > 0)
    },
};

/// Counts the calls of a service.
#[derive(Clone)]
pub struct ObserveLayer {
    calls: Arc<Calls>,
    outcomes: Outcomes,
}

impl ObserveLayer {
    /// `calls` has as many outcomes as these are.
    #[must_use]
    pub fn new(calls: Arc<Calls>, outcomes: Outcomes) -> Self {
        Self { calls, outcomes }
    }
}

/// A service whose calls are counted.
#[derive(Clone)]
pub struct Observe<S> {
    layer: ObserveLayer,
    inner: S,
}

/// A call under way; it has ended when this is dropped.
struct Call {
    calls: Arc<Calls>,
    method: usize,
    outcome: usize,
    since: Instant,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.calls.ended(self.method, self.outcome, self.since);
    }
}

pin_project! {
    /// A call until its answer begins.
    pub struct Observed<F> {
        #[pin]
        answer: F,
        call: Option<Call>,
        outcomes: Outcomes,
        is_whole: bool,
    }
}

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe {
            layer: self.clone(),
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
        let ObserveLayer { calls, outcomes } = &self.layer;
        let method = Method::of(&request);
        calls.begun(method.index);
        Observed {
            call: Some(Call {
                calls: Arc::clone(calls),
                method: method.index,
                outcome: outcomes.cancelled,
                since: Instant::now(),
            }),
            outcomes: *outcomes,
            is_whole: method.answer == Answer::Message,
            answer: self.inner.call(request),
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
        let answer = ready!(this.answer.poll(context));
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
        outcomes: Outcomes,
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
        let polled = this.messages.poll_frame(context);
        let Some(call) = this.call else {
            return polled;
        };
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
