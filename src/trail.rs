//! Where the time of a call goes: its waits and its statements, kept from where they happen until the call ends.
//!
//! Invariant: a call that waits for nothing allocates nothing and reads no clock here. What is kept is bounded, names no
//! values, and changes no answer.

use std::{
    cell::RefCell,
    mem::swap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use pin_project_lite::pin_project;

/// More than any call takes: a batch has a queue, a connection and a statement, and as many again for positions.
const STEPS_MAX: usize = 32;

/// Loads that a call can have joined: one, and with room.
const JOINED_MAX: usize = 4;

/// What a call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Finding out who calls, where that takes a question to somebody else.
    Authentication,
    /// A statement's turn in the loader.
    Queue,
    /// A connection to the database.
    Connection,
    /// PostgreSQL; with the name that the question has in metrics.
    Statement(&'static str),
}

/// One wait.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub kind: Kind,
    pub began: Instant,
    /// `None` while it lasts.
    ended: Option<Instant>,
}

impl Step {
    /// The part of the step that lies between two instants: when it began, and how long it took.
    #[must_use]
    pub fn between(&self, since: Instant, until: Instant) -> (Instant, Duration) {
        let began = self.began.clamp(since, until);
        let ended = self.ended.unwrap_or(until).clamp(began, until);
        (began, ended - began)
    }
}

/// The steps of one call, or of one load that calls have joined.
#[derive(Debug, Default)]
pub struct Steps(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    steps: Vec<Step>,
    joined: Vec<Arc<Steps>>,
}

impl Steps {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, kind: Kind) -> Running {
        let mut kept = self.lock();
        let index = kept.steps.len();
        if index == STEPS_MAX {
            return Running(None);
        }
        let began = Instant::now();
        kept.steps.push(Step {
            kind,
            began,
            ended: None,
        });
        drop(kept);
        Running(Some((Arc::clone(self), index)))
    }
}

/// A step under way: it ends when this is dropped.
#[derive(Debug)]
#[must_use = "the step ends when this is dropped"]
pub struct Running(Option<(Arc<Steps>, usize)>);

impl Running {
    /// Ends this wait: the steps of what was waited for are the call's from now on.
    pub fn join(self, steps: &Arc<Steps>) {
        let Some((own, _)) = &self.0 else {
            return;
        };
        let mut kept = own.lock();
        if kept.joined.len() < JOINED_MAX {
            kept.joined.push(Arc::clone(steps));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some((steps, index)) = &self.0 else {
            return;
        };
        if let Some(step) = steps.lock().steps.get_mut(*index) {
            step.ended = Some(Instant::now());
        }
    }
}

/// What is kept of one call.
#[derive(Debug, Default)]
pub struct Trail {
    steps: Option<Arc<Steps>>,
    /// Whether the caller is known, and may make the call.
    pub is_admitted: bool,
    /// Whether an answer had to be read from the database.
    pub reads_database: bool,
}

impl Trail {
    /// All that the call waited for, in no order.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        let Some(steps) = &self.steps else {
            return Vec::new();
        };
        let kept = steps.lock();
        let mut all = kept.steps.clone();
        for joined in &kept.joined {
            all.extend(&joined.lock().steps);
        }
        all
    }
}

thread_local! {
    /// That of the call, or the load, that is being polled.
    static CURRENT: RefCell<Option<Trail>> = const { RefCell::new(None) };
}

/// Polls with `trail` as the current one; `None`: nothing is kept.
pub fn within<T>(trail: &mut Option<Trail>, poll: impl FnOnce() -> T) -> T {
    /// Puts back what was current, after a panic too.
    struct Swapped<'a>(&'a mut Option<Trail>);

    impl Drop for Swapped<'_> {
        fn drop(&mut self) {
            CURRENT.with_borrow_mut(|current| swap(current, self.0));
        }
    }

    if trail.is_none() {
        return poll();
    }
    CURRENT.with_borrow_mut(|current| swap(current, trail));
    let _swapped = Swapped(trail);
    poll()
}

/// Begins a step of the current call; outside of any, nothing is kept.
pub fn begin(kind: Kind) -> Running {
    current().map_or(Running(None), |steps| steps.begin(kind))
}

/// Notes that the caller of the current call was let in.
pub fn admit() {
    note(|trail| trail.is_admitted = true);
}

/// Notes that the current call is answered from the database.
pub fn read_database() {
    note(|trail| trail.reads_database = true);
}

fn note(change: impl FnOnce(&mut Trail)) {
    CURRENT.with_borrow_mut(|current| current.as_mut().map(change));
}

fn current() -> Option<Arc<Steps>> {
    CURRENT.with_borrow_mut(|current| {
        let trail = current.as_mut()?;
        Some(Arc::clone(trail.steps.get_or_insert_default()))
    })
}

pin_project! {
    /// A task's work whose steps are kept with those of a call.
    pub struct Carried<F> {
        #[pin]
        work: F,
        trail: Option<Trail>,
    }
}

/// Work for a task of its own, as a part of the current call.
pub fn carried<F: Future>(work: F) -> Carried<F> {
    let trail = current().map(of);
    Carried { work, trail }
}

/// Work for a task of its own that many calls may join.
pub fn shared<F: Future>(steps: Arc<Steps>, work: F) -> Carried<F> {
    let trail = Some(of(steps));
    Carried { work, trail }
}

fn of(steps: Arc<Steps>) -> Trail {
    Trail {
        steps: Some(steps),
        ..Trail::default()
    }
}

impl<F: Future> Future for Carried<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        within(this.trail, || this.work.poll(context))
    }
}
