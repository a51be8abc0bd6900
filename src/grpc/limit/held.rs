//! What a call holds for as long as its answer is under way: given back when the answer has ended or is dropped, not when
//! it is ready, for an answer that its caller does not take is memory as well.
//!
//! An answer is encoded as soon as it is ready, whether or not its caller has made room for it, so that what it weighs is
//! known before any of it is sent.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Body as _, Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::{Status, body::Body};

/// Shorter data is not held back: it is no more than HTTP/2 keeps of any stream.
const SHORT_BYTES_MAX: usize = 1 << 10;

type Data = <Body as http_body::Body>::Data;

pin_project! {
    /// An answer, and what its call holds meanwhile.
    pub(super) struct Held<T> {
        #[pin]
        messages: Body,
        // Encoded already.
        first: Option<Result<Frame<Data>, Status>>,
        // The last byte of a piece whose other bytes have gone.
        last_byte: Option<Data>,
        holds_back: bool,
        held: Option<T>,
    }
}

impl<T> Held<T> {
    pub(super) fn new(messages: Body, held: Option<T>) -> Self {
        Self {
            messages,
            first: None,
            last_byte: None,
            holds_back: false,
            held,
        }
    }

    /// Ends no sooner than the caller has made room for it. A window of one byte is enough for hyper to hand over a
    /// piece of any size to be sent later, and to be done with the answer; so each is followed by its last byte, which
    /// has to wait until there is room for the others.
    pub(super) fn until_taken(messages: Body, held: Option<T>) -> Self {
        Self {
            holds_back: true,
            ..Self::new(messages, held)
        }
    }

    /// Encodes the first message, if it is there; returns its bytes.
    pub(super) fn encode(&mut self, context: &mut Context<'_>) -> usize {
        if let Poll::Ready(first) = Pin::new(&mut self.messages).poll_frame(context) {
            self.first = first;
        }
        self.first_bytes()
    }

    fn first_bytes(&self) -> usize {
        let frame = self.first.as_ref().and_then(|first| first.as_ref().ok());
        frame.and_then(Frame::data_ref).map_or(0, Data::len)
    }

    pub(super) fn held_mut(&mut self) -> Option<&mut T> {
        self.held.as_mut()
    }
}

impl<T> http_body::Body for Held<T> {
    type Data = Data;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Data>, Status>>> {
        let this = self.project();
        if let Some(last_byte) = this.last_byte.take() {
            return Poll::Ready(Some(Ok(Frame::data(last_byte))));
        }
        let polled = match this.first.take() {
            Some(first) => Poll::Ready(Some(first)),
            None => this.messages.poll_frame(context),
        };
        match polled {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(Ok(match frame.into_data() {
                Ok(mut data) => {
                    if *this.holds_back && data.len() > SHORT_BYTES_MAX {
                        *this.last_byte = Some(data.split_off(data.len() - 1));
                    }
                    Frame::data(data)
                }
                Err(frame) => frame,
            }))),
            Poll::Ready(None) => {
                *this.held = None;
                Poll::Ready(None)
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.last_byte.is_none() && self.messages.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // A piece or one byte is not in the messages any more.
        if self.first.is_some() || self.last_byte.is_some() {
            let mut at_least = SizeHint::default();
            at_least.set_lower(self.first_bytes() as u64);
            return at_least;
        }
        self.messages.size_hint()
    }
}
