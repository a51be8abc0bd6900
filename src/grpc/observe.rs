//! Counts every call of gRPC: that it began, what it ended with, how long it took. Outside of all other layers, so that
//! nothing is refused unseen.
//!
//! Invariant: a call that began ends once, however it ends; one whose caller went away ended CANCELLED.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use crate::{auth::access::Answer, counters::Calls, limits::Method};

/// google.rpc.Code has so many.
pub const CODES: usize = 17;

/// Counts the calls of a service.
#[derive(Clone)]
pub struct ObserveLayer(pub Arc<Calls>);

/// A service whose calls are counted.
#[derive(Clone)]
pub struct Observe<S> {
    calls: Arc<Calls>,
    inner: S,
}

/// A call under way; it has ended when this is dropped.
struct Call {
    calls: Arc<Calls>,
    method: usize,
    code: Code,
    since: Instant,
}

impl Drop for Call {
    fn drop(&mut self) {
        // A code is its number.
        self.calls
            .ended(self.method, self.code as usize, self.since);
    }
}

pin_project! {
    /// A call until its answer begins.
    pub struct Observed<F> {
        #[pin]
        answer: F,
        call: Option<Call>,
        is_whole: bool,
    }
}

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe {
            calls: Arc::clone(&self.0),
            inner,
        }
    }
}

impl<S, B> Service<Request<B>> for Observe<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Observed<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = Method::of(&request);
        self.calls.begun(method.index);
        Observed {
            call: Some(Call {
                calls: Arc::clone(&self.calls),
                method: method.index,
                code: Code::Cancelled,
                since: Instant::now(),
            }),
            is_whole: method.answer == Answer::Message,
            answer: self.inner.call(request),
        }
    }
}

impl<F, E> Future for Observed<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(context));
        let Some(mut call) = this.call.take() else {
            return Poll::Ready(answer);
        };
        Poll::Ready(answer.map(|response| {
            let code = code(response.headers());
            if code.is_some() || *this.is_whole {
                call.code = code.unwrap_or(Code::Ok);
                drop(call);
                return response;
            }
            response.map(|messages| Body::new(Streaming { messages, call }))
        }))
    }
}

pin_project! {
    /// The messages of a stream, until its last.
    struct Streaming {
        #[pin]
        messages: Body,
        call: Call,
    }
}

impl http_body::Body for Streaming {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = self.project();
        let polled = this.messages.poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(trailers) = frame.trailers_ref()
        {
            this.call.code = code(trailers).unwrap_or(Code::Ok);
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

/// What headers or trailers say that the call ended with.
fn code(headers: &HeaderMap) -> Option<Code> {
    let code = headers.get(Status::GRPC_STATUS)?;
    Some(Code::from_bytes(code.as_bytes()))
}
