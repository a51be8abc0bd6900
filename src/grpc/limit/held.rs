//! What a call holds for as long as its answer is under way: given back when the answer has ended or is dropped, not when
//! it is ready, for an answer that its caller does not take is memory as well.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Frame, SizeHint};
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
        // The last byte of a piece whose other bytes have gone.
        last_byte: Option<Data>,
        holds_back: bool,
        held: Option<T>,
    }
}

impl<T> Held<T> {
    pub(super) fn new(messages: Body, held: T) -> Self {
        Self {
            messages,
            last_byte: None,
            holds_back: false,
            held: Some(held),
        }
    }

    /// Ends no sooner than the caller has made room for it. A window of one byte is enough for hyper to hand over a
    /// piece of any size to be sent later, and to be done with the answer; so each is followed by its last byte, which
    /// has to wait until there is room for the others.
    pub(super) fn until_taken(messages: Body, held: T) -> Self {
        Self {
            holds_back: true,
            ..Self::new(messages, held)
        }
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
        let polled = this.messages.poll_frame(context);
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
        self.last_byte.is_none() && self.messages.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // One byte is not in it any more.
        if self.last_byte.is_some() {
            return SizeHint::default();
        }
        self.messages.size_hint()
    }
}
