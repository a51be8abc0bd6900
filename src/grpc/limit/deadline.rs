//! A call that ends in time: by its answer, by its deadline, or as a stream by its age.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{HeaderMap, HeaderName, Response};
use http_body::Frame;
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body};

use crate::grpc::status;

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// By so much we are before tonic, whose timer runs for the same time and says CANCELLED.
const HEAD_START: Duration = Duration::from_millis(1);

/// What ends a call; `None`: nothing but its answer.
pub(super) struct Bounds {
    /// The answer, or the beginning of a stream, is there by then, or DEADLINE_EXCEEDED. What the caller has to send for
    /// it must have arrived, too.
    pub(super) deadline: Option<Duration>,
    /// A stream ends by then, counted from its beginning.
    pub(super) age: Option<Duration>,
}

pin_project! {
    /// The future of a call that ends.
    pub struct Bounded<F> {
        #[pin]
        answer: F,
        bounds: Bounds,
        // Most answers are there at once, and need no timer.
        #[pin]
        timer: Option<Sleep>,
    }
}

impl<F> Bounded<F> {
    pub(super) fn new(answer: F, bounds: Bounds) -> Self {
        Self {
            answer,
            bounds,
            timer: None,
        }
    }
}

impl<F, E> Future for Bounded<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        if let Poll::Ready(answer) = this.answer.poll(context) {
            return Poll::Ready(match this.bounds.age {
                Some(age) => {
                    answer.map(|response| response.map(|body| Body::new(Aging::new(body, age))))
                }
                None => answer,
            });
        }
        let Some(deadline) = this.bounds.deadline else {
            return Poll::Pending;
        };
        if this.timer.is_none() {
            this.timer.set(Some(sleep(deadline)));
        }
        if let Some(timer) = this.timer.as_pin_mut() {
            ready!(timer.poll(context));
        }
        Poll::Ready(Ok(status::deadline_exceeded().into_http()))
    }
}

pin_project! {
    /// The messages of a stream until its time is up.
    struct Aging {
        #[pin]
        messages: Body,
        #[pin]
        age: Sleep,
        has_ended: bool,
    }
}

impl Aging {
    fn new(messages: Body, age: Duration) -> Self {
        Self {
            messages,
            age: sleep(age),
            has_ended: false,
        }
    }
}

impl http_body::Body for Aging {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = self.project();
        if *this.has_ended {
            return Poll::Ready(None);
        }
        // First, so that a stream that never pauses ends as well.
        if this.age.poll(context).is_pending() {
            return this.messages.poll_frame(context);
        }
        *this.has_ended = true;
        let mut trailers = HeaderMap::new();
        let written = status::stream_too_old().add_header(&mut trailers);
        Poll::Ready(Some(written.map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended || self.messages.is_end_stream()
    }
}

/// The caller's own deadline, as the gRPC protocol has it: up to eight digits and a unit. One that is malformed is none,
/// as for tonic.
pub(in crate::grpc) fn asked_for(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number = digits.parse().ok()?;
    let deadline = match unit {
        "H" => Duration::from_secs(number * 60 * 60),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Some(deadline - HEAD_START.min(deadline / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_the_protocol_has_them() {
        let cases = [
            ("1S", Some(Duration::from_millis(999))),
            ("100m", Some(Duration::from_millis(99))),
            ("1m", Some(Duration::from_micros(500))),
            ("0S", Some(Duration::ZERO)),
            ("8u", Some(Duration::from_micros(4))),
            ("2M", Some(Duration::from_millis(119_999))),
            (
                "99999999H",
                Some(Duration::from_millis(99_999_999 * 3_600_000 - 1)),
            ),
            ("999999999H", None),
            ("1", None),
            ("S", None),
            ("", None),
            ("+1S", None),
            ("1s", None),
            ("é", None),
        ];
        for (text, expected) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC_TIMEOUT, text.parse().unwrap());
            assert_eq!(asked_for(&headers), expected, "{text}");
        }
        assert_eq!(asked_for(&HeaderMap::new()), None);
    }
}
