//! A connection of HTTP/2 whose calls are answered together: it reads what has come, answers all of it, and writes the
//! answers at once.
//!
//! hyper gives each call to an executor. A runtime's would make each a task, which wakes the connection when it has its
//! answer, and the connection would then write that one answer: a system call a check, which costs more than the check.
//!
//! Invariant: a call that is not answered at once is a task like any other, and one that panics ends alone.

use std::{
    future::Future,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use pin_project_lite::pin_project;

type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Each has its places among the calls under way from when it is read: a caller that sends a thousand at once has no more of
/// them than if they were answered one by one. A write of so many answers is a kilobyte or two, and its cost is little each.
const TOGETHER_MAX: usize = 32;

/// When calls that are answered together have taken so long, the rest of them are tasks: long ones do not keep short ones waiting
/// while other threads have nothing to do. The time counts anew for the next [`TOGETHER_MAX`]: a task keeps its place until
/// a thread has time for it, and a connection that went on to read and make tasks would take all places of its caller.
const TOGETHER_TIME_MAX: Duration = Duration::from_micros(500);

/// The calls that a connection has read and nobody has polled.
#[derive(Default)]
pub(super) struct Calls(Arc<Mutex<Vec<Call>>>);

/// What hyper gives calls to. Each call has one of these, so that it must not keep alive what the call is in.
#[derive(Clone)]
pub(super) struct Queue(Weak<Mutex<Vec<Call>>>);

impl<F> hyper::rt::Executor<F> for Queue
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, call: F) {
        // Where the connection is gone, so is whoever would have the answer.
        let Some(calls) = self.0.upgrade().map(Calls) else {
            return;
        };
        let is_full = {
            let mut waiting = calls.lock();
            waiting.push(Box::pin(call));
            waiting.len() >= TOGETHER_MAX
        };
        if is_full {
            calls.answer();
        }
    }
}

impl Calls {
    pub(super) fn queue(&self) -> Queue {
        Queue(Arc::downgrade(&self.0))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        // Nothing panics under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers what can be answered now; says whether there was anything.
    fn answer(&self) -> bool {
        let calls = mem::take(&mut *self.lock());
        let any = !calls.is_empty();
        let started = Instant::now();
        for mut call in calls {
            if started.elapsed() > TOGETHER_TIME_MAX {
                drop(tokio::spawn(call));
                continue;
            }
            // Whoever has to wait is polled again by a task, and tells that one's waker.
            let mut nobody = Context::from_waker(Waker::noop());
            let polled = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(&mut nobody)));
            match polled {
                Ok(Poll::Ready(())) => {}
                Ok(Poll::Pending) => drop(tokio::spawn(call)),
                Err(_) => tracing::error!("a call panicked"),
            }
        }
        any
    }
}

pin_project! {
    /// A connection that hyper serves with [`Calls`] as its executor.
    pub(super) struct Batched<C> {
        #[pin]
        connection: C,
        calls: Calls,
    }
}

impl<C> Batched<C> {
    pub(super) fn new(connection: C, calls: Calls) -> Self {
        Self { connection, calls }
    }

    pub(super) fn connection(self: Pin<&mut Self>) -> Pin<&mut C> {
        self.project().connection
    }
}

impl<C: Future> Future for Batched<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<C::Output> {
        let mut this = self.project();
        loop {
            let polled = this.connection.as_mut().poll(context);
            // What was read before the connection ended is done all the same.
            if !this.calls.answer() || polled.is_ready() {
                return polled;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future;

    use hyper::rt::Executor as _;
    use tokio::sync::mpsc;

    use super::*;

    /// A call that takes a thread for some time, and tells which task it was.
    fn call(time: Duration, ended: &mpsc::UnboundedSender<Option<tokio::task::Id>>) -> Call {
        let ended = ended.clone();
        Box::pin(future::poll_fn(move |_| {
            let started = Instant::now();
            while started.elapsed() < time {}
            let _ = ended.send(tokio::task::try_id());
            Poll::Ready(())
        }))
    }

    #[tokio::test]
    async fn calls_behind_a_long_one_are_tasks() {
        let (sender, mut ended) = mpsc::unbounded_channel();
        let calls = Calls::default();
        for time in [2 * TOGETHER_TIME_MAX, Duration::ZERO, Duration::ZERO] {
            calls.queue().execute(call(time, &sender));
        }
        assert!(calls.answer());
        let own = tokio::task::try_id();
        assert_eq!(ended.recv().await, Some(own), "the long one");
        for _ in 0..2 {
            let task = ended.recv().await.flatten();
            assert!(task.is_some() && task != own, "was {task:?}");
        }
    }
}
