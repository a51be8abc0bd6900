//! Answers misses: loads subjects from the database, many at once, each at most once at a time.
//!
//! Invariants: its own task, so that a caller who goes away cancels nothing; no error is remembered; what is in
//! flight and what waits is bounded; and a load that must be fresh never joins a statement that is already on its way.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::{Id, JoinError, JoinSet, yield_now},
};

use crate::{
    cache::{Cache, Entry, Epoch},
    counters::Histograms,
    feed::Progress,
    model::{BootTime, Position, Subject},
    store::{
        MISS_CONNECTIONS_MAX, Store, StoreError,
        load::{ReadFrom, SUBJECTS_A_TURN},
    },
    trail::{self, Kind, Running, Steps},
};

/// Statements on their way at once: one a connection.
const FLIGHTS_MAX: usize = MISS_CONNECTIONS_MAX;

/// Requests that wait for a statement, on their way to the loader's task, or for one flight.
const QUEUE_MAX: usize = 4_096;

/// Subjects of all requests that wait for a statement: ten of the largest batches.
const QUEUE_SUBJECTS_MAX: usize = 100_000;

/// Subjects that small requests are put together to. A larger request makes a statement of its own, so that a large
/// batch does not slow the small misses that arrive with it.
const SHARED_SUBJECTS_MAX: usize = 500;

/// Buckets of what a statement loads.
const SIZES: [u64; 12] = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 10_000];

/// What one statement found.
pub struct Load {
    pub entries: HashMap<Subject, Arc<Entry>>,
    pub head: Position,
    /// Whether it is of the history that the cache followed when it was sent.
    pub history_holds: bool,
    pub sent_at: BootTime,
}

/// Why a load has no result.
#[derive(Clone, Debug, Error)]
pub enum LoadError {
    /// The database could not be asked, or did not answer as it must.
    #[error("the database cannot be asked")]
    Unavailable,
    /// Too many requests wait already.
    #[error("too many requests wait for the database")]
    Overloaded,
}

impl From<StoreError> for LoadError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Busy => Self::Overloaded,
            StoreError::Unavailable(_)
            | StoreError::Refused(_)
            | StoreError::Standby
            | StoreError::Wrong(_) => Self::Unavailable,
        }
    }
}

/// Which statements may answer a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// One that is on its way already, sent at this time or later.
    SentSince(BootTime),
    /// Only one that is sent from now on.
    None,
}

struct Request {
    /// Distinct.
    subjects: Vec<Subject>,
    join: Join,
    reply: oneshot::Sender<Result<Arc<Load>, LoadError>>,
    turn: Running,
    asked_at: BootTime,
}

/// A handle to the loader's task.
#[derive(Clone)]
pub struct Loader {
    requests: mpsc::Sender<Request>,
    /// Subjects of each statement.
    pub sizes: Arc<Histograms>,
    oldest: Oldest,
}

/// When the request was made that waits the longest for a statement.
type Oldest = Arc<Mutex<Option<BootTime>>>;

impl Loader {
    /// A handle, and the task to spawn; the task ends with the last handle.
    pub fn new(
        store: Arc<Store>,
        cache: Arc<Cache>,
        progress: Arc<Progress>,
    ) -> (Self, impl Future<Output = ()>) {
        let (requests, receiver) = mpsc::channel(QUEUE_MAX);
        let sizes = Arc::new(Histograms::new(1, &SIZES));
        let oldest = Oldest::default();
        let task = Task {
            source: Arc::new(Source {
                store,
                cache,
                progress,
            }),
            queue: VecDeque::new(),
            queued_subjects: 0,
            flights: JoinSet::new(),
            waiting: HashMap::new(),
            flying: HashMap::new(),
            is_up: true,
            sizes: Arc::clone(&sizes),
            oldest: Arc::clone(&oldest),
        };
        let loader = Self {
            requests,
            sizes,
            oldest,
        };
        (loader, task.run(receiver))
    }

    /// How long the request has waited that waits the longest for a statement, all of which are under way; zero while
    /// none waits.
    #[must_use]
    pub fn waiting(&self) -> Duration {
        let oldest = *self.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        oldest.map_or(Duration::ZERO, |asked_at| BootTime::now().since(asked_at))
    }

    /// Loads distinct subjects with one statement.
    ///
    /// # Errors
    /// When the database cannot be asked, or too many requests wait.
    pub async fn load(&self, subjects: Vec<Subject>, join: Join) -> Result<Arc<Load>, LoadError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .try_send(Request {
                subjects,
                join,
                reply,
                turn: trail::begin(Kind::Queue),
                asked_at: BootTime::now(),
            })
            .map_err(|error| match error {
                TrySendError::Full(_) => LoadError::Overloaded,
                TrySendError::Closed(_) => LoadError::Unavailable,
            })?;
        answer.await.unwrap_or(Err(LoadError::Unavailable))
    }
}

/// What a statement needs.
struct Source {
    store: Arc<Store>,
    cache: Arc<Cache>,
    progress: Arc<Progress>,
}

impl Source {
    async fn load(
        &self,
        subjects: Vec<Subject>,
        from: ReadFrom,
        sent_at: BootTime,
    ) -> Result<Load, StoreError> {
        let epoch = self.cache.epoch();
        let loaded = self
            .store
            .load(&subjects, from, || self.progress.lease_position())
            .await?;
        self.progress.observe(loaded.head);
        // It answers whoever asked. But the cache would give it out at a position of the history that it follows still.
        let epoch = if loaded.history_holds {
            epoch
        } else {
            Epoch::NEVER
        };
        let mut entries = HashMap::with_capacity(loaded.subjects.len());
        for (subject, permissions) in loaded.subjects {
            let entry = self.cache.insert(subject, permissions, loaded.head, epoch);
            entries.insert(subject, entry);
            if entries.len() % SUBJECTS_A_TURN == 0 {
                yield_now().await;
            }
        }
        Ok(Load {
            entries,
            head: loaded.head,
            history_holds: loaded.history_holds,
            sent_at,
        })
    }
}

struct Flight {
    subjects: Vec<Subject>,
    waiters: Vec<oneshot::Sender<Result<Arc<Load>, LoadError>>>,
    sent_at: BootTime,
    steps: Arc<Steps>,
}

struct Task {
    source: Arc<Source>,
    queue: VecDeque<Request>,
    queued_subjects: usize,
    flights: JoinSet<Result<Load, StoreError>>,
    waiting: HashMap<Id, Flight>,
    /// The newest flight that loads each subject.
    flying: HashMap<Subject, Id>,
    is_up: bool,
    sizes: Arc<Histograms>,
    oldest: Oldest,
}

impl Task {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut arrived = Vec::new();
        loop {
            while self.flights.len() < FLIGHTS_MAX && !self.queue.is_empty() {
                self.send_statement();
            }
            let oldest = self.queue.front().map(|request| request.asked_at);
            *self.oldest.lock().unwrap_or_else(PoisonError::into_inner) = oldest;
            let room = QUEUE_MAX - self.queue.len();
            tokio::select! {
                count = requests.recv_many(&mut arrived, room.max(1)), if room > 0 => {
                    if count == 0 {
                        break;
                    }
                    arrived.drain(..).for_each(|request| self.accept(request));
                }
                Some(done) = self.flights.join_next_with_id() => self.land(done),
            }
        }
    }

    /// Lets a request join a flight, or queues it.
    fn accept(&mut self, request: Request) {
        if let (Join::SentSince(earliest), [subject]) = (request.join, request.subjects.as_slice())
            && let Some(flight) = self
                .flying
                .get(subject)
                .and_then(|id| self.waiting.get_mut(id))
            && flight.sent_at >= earliest
            && flight.waiters.len() < QUEUE_MAX
        {
            request.turn.join(&flight.steps);
            flight.waiters.push(request.reply);
            return;
        }
        if self.queued_subjects + request.subjects.len() > QUEUE_SUBJECTS_MAX {
            // A caller who is gone needs no answer.
            let _ = request.reply.send(Err(LoadError::Overloaded));
            return;
        }
        self.queued_subjects += request.subjects.len();
        self.queue.push_back(request);
    }

    /// Sends one statement for the requests at the head of the queue.
    fn send_statement(&mut self) {
        let mut subjects: HashSet<Subject> = HashSet::new();
        let mut waiters = Vec::new();
        let steps = Arc::<Steps>::default();
        let mut from = self.source.progress.read_from();
        while let Some(request) = self.queue.front() {
            if !waiters.is_empty() && subjects.len() + request.subjects.len() > SHARED_SUBJECTS_MAX
            {
                break;
            }
            let Some(request) = self.queue.pop_front() else {
                break;
            };
            self.queued_subjects -= request.subjects.len();
            if request.reply.is_closed() {
                continue;
            }
            // What must be fresh reads the tables themselves, whatever the log says of the matrix.
            if request.join == Join::None {
                from = ReadFrom::View;
            }
            subjects.extend(request.subjects);
            request.turn.join(&steps);
            waiters.push(request.reply);
        }
        if waiters.is_empty() {
            return;
        }
        let subjects: Vec<Subject> = subjects.into_iter().collect();
        self.sizes.observe(0, subjects.len() as u64);
        let sent_at = BootTime::now();
        let source = Arc::clone(&self.source);
        let asked = subjects.clone();
        let work = async move { source.load(asked, from, sent_at).await };
        let work = trail::shared(Arc::clone(&steps), work);
        let id = self.flights.spawn(work).id();
        self.flying
            .extend(subjects.iter().map(|subject| (*subject, id)));
        self.waiting.insert(
            id,
            Flight {
                subjects,
                waiters,
                sent_at,
                steps,
            },
        );
    }

    /// Hands a flight's result to those who wait for it.
    fn land(&mut self, done: Result<(Id, Result<Load, StoreError>), JoinError>) {
        let (id, loaded) = match done {
            Ok((id, loaded)) => (id, loaded),
            // A panic has been reported where it happened; the waiters learn that there is no answer.
            Err(error) => (error.id(), Err(StoreError::Wrong(error.to_string()))),
        };
        let Some(flight) = self.waiting.remove(&id) else {
            return;
        };
        for subject in &flight.subjects {
            if self.flying.get(subject) == Some(&id) {
                self.flying.remove(subject);
            }
        }
        self.report(&loaded);
        let result = loaded.map(Arc::new).map_err(Into::into);
        for waiter in flight.waiters {
            // A caller who is gone needs no answer.
            let _ = waiter.send(result.clone());
        }
    }

    /// Logs a change of state, not each failure.
    fn report(&mut self, loaded: &Result<Load, StoreError>) {
        match loaded {
            Ok(_) if !self.is_up => tracing::info!("the database answers again"),
            Err(error) if self.is_up => tracing::warn!(%error, "the database does not answer"),
            _ => {}
        }
        self.is_up = loaded.is_ok();
    }
}
