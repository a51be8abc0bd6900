//! The one path that is short: a check, or a batch of them, that is cached, from the bytes of its message to those of its
//! answer.
//!
//! tonic carries any call, in buffers, boxes and routes that cost more than the check. What is here reads the message where it
//! lies and writes the answer whole; it gives up, and leaves the request to tonic as it was, wherever there is anything to
//! wait for, to explain or to complain of.
//!
//! Invariant: what is answered here, tonic's path would answer the same.

mod wire;

use std::{
    convert::Infallible,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use futures_util::future::{BoxFuture, Either, Ready, ready};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, header::CONTENT_TYPE, request::Parts,
};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use prost::bytes::Bytes;
use tonic::{Status, body::Body, metadata::GRPC_CONTENT_TYPE};
use tower::Service;

use self::wire::Asked;
use super::{parse, permission_service::PermissionService, status};
use crate::{
    auth::Caller,
    check::{Evidence, Known},
    model::{BootTime, OrganizationId, Reason, Subject, UserId},
};

const CHECK: &str = "/hallpass.v1.PermissionService/CheckPermission";
const BATCH: &str = "/hallpass.v1.PermissionService/BatchCheckPermissions";

const GRPC_ENCODING: &str = "grpc-encoding";

/// Whether a message is packed, in a byte, and its length.
const HEAD_BYTES: usize = 5;

/// Answers checks from the cache, and leaves everything else to what tonic has generated.
#[derive(Clone)]
pub struct Direct<S> {
    permissions: Arc<PermissionService>,
    inner: S,
}

impl<S> Direct<S> {
    #[must_use]
    pub fn new(permissions: Arc<PermissionService>, inner: S) -> Self {
        Self { permissions, inner }
    }
}

type Answered = Result<Response<Body>, Infallible>;

impl<S, B> Service<Request<B>> for Direct<S>
where
    S: Service<Request<Reread<B>>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes, Error: Send> + Send + Unpin + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    /// What is not answered at once is boxed: a future is moved from layer to layer, and tonic's is large.
    type Future = Either<Ready<Answered>, BoxFuture<'static, Answered>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (head, rest) = request.into_parts();
        let mut body = Reread {
            read: [None, None],
            rest,
        };
        // A batch may take as long as a hundred checks: not while its connection still reads.
        if head.uri.path() == BATCH {
            let mut own = self.clone();
            return Either::Right(Box::pin(async move {
                match own.answer(&head, &mut body) {
                    Some(answer) => Ok(answer),
                    None => own.inner.call(Request::from_parts(head, body)).await,
                }
            }));
        }
        match self.answer(&head, &mut body) {
            Some(answer) => Either::Left(ready(Ok(answer))),
            None => Either::Right(Box::pin(self.inner.call(Request::from_parts(head, body)))),
        }
    }
}

impl<S> Direct<S> {
    /// The answer, if it is there.
    fn answer<B>(&self, head: &Parts, body: &mut Reread<B>) -> Option<Response<Body>>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        let is_check = match head.uri.path() {
            CHECK => true,
            BATCH => false,
            _ => return None,
        };
        if head.method != Method::POST || head.headers.contains_key(GRPC_ENCODING) {
            return None;
        }
        let caller = head.extensions.get::<Arc<Caller>>()?;
        let message = body.message()?;
        let answer = if is_check {
            let asked = wire::read_check(message)?;
            let (reason, evidence) = self.recall(caller, &asked)?;
            wire::write_check(reason, &evidence)
        } else {
            let items = wire::read_batch(message)?;
            match self.recall_all(caller, &items)? {
                Ok((reasons, evidence)) => wire::write_batch(&reasons, &evidence),
                Err(refused) => return Some(refused.into_http()),
            }
        };
        let mut response = Response::new(Body::new(Answer::Message(answer)));
        (response.headers_mut()).insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
        Some(response)
    }

    /// The decision, if it is cached and the question says nothing of how fresh it is to be. `None` for what
    /// `check_permission` has to say more about.
    fn recall(&self, caller: &Caller, asked: &Asked<'_>) -> Option<(Reason, Evidence)> {
        let arrived = BootTime::now();
        let known = self
            .permissions
            .checker
            .recall(&subject(caller, asked)?, arrived)?;
        self.permissions.checker.counts.found(1);
        Some((
            self.permissions.checker.decide(&known, asked.permission),
            known.evidence,
        ))
    }

    /// As [`Direct::recall`], for a batch: all of it, or nothing.
    fn recall_all(
        &self,
        caller: &Caller,
        items: &[Asked<'_>],
    ) -> Option<Result<(Vec<Reason>, Evidence), Status>> {
        let arrived = BootTime::now();
        let known = items.iter().map(|asked| {
            let subject = subject(caller, asked)?;
            self.permissions.checker.recall(&subject, arrived)
        });
        let known: Vec<Known> = known.collect::<Option<_>>()?;
        let evidence = known.iter().map(|known| known.evidence);
        let evidence = evidence.reduce(Evidence::min)?;
        if let Err(refusal) = self.permissions.limits.batch_items(caller, items.len()) {
            return Some(Err(status::refused(refusal)));
        }
        self.permissions.checker.counts.found(items.len());
        let reasons = (known.iter().zip(items))
            .map(|(known, asked)| self.permissions.checker.decide(known, asked.permission));
        Some(Ok((reasons.collect(), evidence)))
    }
}

/// Whom a well-formed question is about, if the caller may ask.
fn subject(caller: &Caller, asked: &Asked<'_>) -> Option<Subject> {
    let subject = Subject {
        organization: OrganizationId(parse::uuid(asked.organization)?),
        user: UserId(parse::uuid(asked.user)?),
    };
    let fits = parse::wrong_key(asked.permission).is_none();
    (fits && caller.may_ask_about(subject).is_ok()).then_some(subject)
}

pin_project! {
    /// A body of which some has been read, as if it had not.
    pub struct Reread<B: http_body::Body> {
        read: [Option<Result<Frame<B::Data>, B::Error>>; 2],
        #[pin]
        rest: B,
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> Reread<B> {
    /// The message, without gRPC's head, if all of it has come.
    fn message(&mut self) -> Option<&[u8]> {
        for slot in &mut self.read {
            if self.rest.is_end_stream() {
                break;
            }
            // Whoever has to wait for more is polled by tonic, and wakes its task.
            let mut nobody = Context::from_waker(Waker::noop());
            match Pin::new(&mut self.rest).poll_frame(&mut nobody) {
                Poll::Ready(Some(frame)) => *slot = Some(frame),
                Poll::Ready(None) => break,
                Poll::Pending => return None,
            }
        }
        let [first, second] = &self.read;
        let is_whole = self.rest.is_end_stream()
            && (second.is_none() || data(second.as_ref()).is_some_and(Bytes::is_empty));
        let (head, message) = data(first.as_ref())?.split_at_checked(HEAD_BYTES)?;
        let [is_packed, length @ ..] = head.first_chunk::<HEAD_BYTES>()?;
        let fits = usize::try_from(u32::from_be_bytes(*length)) == Ok(message.len());
        (is_whole && fits && *is_packed == 0).then_some(message)
    }
}

fn data<E>(read: Option<&Result<Frame<Bytes>, E>>) -> Option<&Bytes> {
    read?.as_ref().ok()?.data_ref()
}

impl<B: http_body::Body> http_body::Body for Reread<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        match this.read.iter_mut().find_map(Option::take) {
            Some(frame) => Poll::Ready(Some(frame)),
            None => this.rest.poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.iter().all(Option::is_none) && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.read.iter().all(Option::is_none) {
            return self.rest.size_hint();
        }
        SizeHint::default()
    }
}

/// One message, and that all is well.
enum Answer {
    Message(Bytes),
    Trailers,
    Ended,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.as_mut().get_mut();
        Poll::Ready(match mem::replace(this, Self::Ended) {
            Self::Message(message) => {
                *this = Self::Trailers;
                Some(Ok(Frame::data(message)))
            }
            Self::Trailers => {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
                Some(Ok(Frame::trailers(trailers)))
            }
            Self::Ended => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Ended)
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Message(message) => SizeHint::with_exact(message.len() as u64),
            Self::Trailers | Self::Ended => SizeHint::with_exact(0),
        }
    }
}
