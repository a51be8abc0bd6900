//! Load over gRPC that costs little to make: requests are encoded once, and of most answers only the heads of frames are
//! read. A real client would need more of a machine than the service that it loads.
//!
//! Invariant: a latency counts from when its call was due, not from when there was room to send it; what was due and had no
//! answer in time is counted, too.

mod connection;
mod transport;

use std::{
    fs, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp1, Zipf};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::setpriority_process,
    time::{ClockId, clock_gettime},
};

use self::connection::{Connection, Ended};
pub use self::{connection::Request, transport::Target};

/// An answer later than this is no answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Calls that the service allows at once on a connection.
const STREAMS_MAX: usize = 1_000;

/// More claim to a core than other processes have.
const NICENESS: i32 = -10;

/// Latencies are kept to three digits, up to this.
const LATENCY_MICROS_MAX: u64 = 60_000_000;

/// What is asked: a method, and messages that are taken as `draw` says.
#[derive(Clone, Debug)]
pub struct Questions {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// Sent with each call.
    pub token: Option<String>,
    /// Encoded, without gRPC's head.
    pub messages: Arc<[Vec<u8>]>,
    pub draw: Draw,
}

/// Which message comes next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Draw {
    /// One after the other; none comes twice before all have come.
    InTurn,
    Uniform,
    /// The n-th is asked `n^-exponent` as often as the first.
    Zipf(f64),
}

/// How much is asked at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// So many calls are under way all the time, on all connections together: a closed loop.
    AtOnce(usize),
    /// So many calls a second become due, at random, whatever has become of those before: an open loop.
    ASecond(f64),
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Callers {
    pub connections: usize,
    /// That share the connections.
    pub threads: usize,
    /// What is due is sent, and what has come is read, once in this time and no more often: a thread then takes less of its
    /// core, and each latency is longer by one to two of these.
    pub turn: Duration,
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Calls answered in time with a message.
    pub answered: u64,
    /// Calls answered by a status alone.
    pub refused: u64,
    /// Calls answered after a second, or reset, or never.
    pub lost: u64,
    /// Calls that became due when each connection had as many under way as it carries.
    pub unsent: u64,
    /// Microseconds from when a call was due until its answer had ended.
    pub answered_in: Histogram<u64>,
    pub refused_in: Histogram<u64>,
    /// One answer in some hundreds.
    pub samples: Vec<Vec<u8>>,
    pub elapsed: Duration,
    /// Processor time of the threads that made the load, of `elapsed` times as many as they are.
    pub generator: f64,
}

impl Outcome {
    /// Answers a second.
    #[must_use]
    pub fn a_second(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a number of calls")]
        let answered = self.answered as f64;
        answered / self.elapsed.as_secs_f64()
    }
}

/// Asks for some time. Blocks.
///
/// # Errors
/// When a connection cannot be made, is lost, or says what a gRPC service does not say.
pub fn run(
    target: &Target,
    questions: &Questions,
    pace: Pace,
    callers: Callers,
    time: Duration,
) -> io::Result<Outcome> {
    let connections = callers.connections;
    let threads = callers.threads.clamp(1, connections);
    let pace = match pace {
        Pace::AtOnce(calls) => Pace::AtOnce(calls.div_ceil(connections)),
        #[allow(clippy::cast_precision_loss, reason = "a number of threads")]
        Pace::ASecond(calls) => Pace::ASecond(calls / threads as f64),
    };
    let mut loads = Vec::new();
    for thread in 0..threads {
        let own = (connections - thread).div_ceil(threads);
        let connections: io::Result<Vec<Connection>> = (0..own)
            .map(|_| Connection::open(target, Request::new(target, questions)))
            .collect();
        loads.push(Load {
            connections: connections?,
            messages: Arc::clone(&questions.messages),
            picker: Picker::new(questions, thread, threads),
            pace,
            turn: callers.turn,
            outcome: Outcome::new()?,
            time,
        });
    }
    let started = Instant::now();
    let outcomes: io::Result<Vec<Outcome>> = thread::scope(|scope| {
        let running: Vec<_> = loads
            .into_iter()
            .map(|load| scope.spawn(move || load.run(started)))
            .collect();
        let joined = running.into_iter().map(|thread| {
            (thread.join())
                .unwrap_or_else(|_| Err(io::Error::other("a thread of the load panicked")))
        });
        joined.collect()
    });
    let mut all = Outcome::new()?;
    for outcome in outcomes? {
        all.add(outcome);
    }
    #[allow(clippy::cast_precision_loss, reason = "a number of threads")]
    let threads = threads as f64;
    all.generator /= threads;
    all.elapsed = time;
    Ok(all)
}

impl Outcome {
    /// Nothing yet.
    ///
    /// # Errors
    /// Never: the bounds of the histograms fit.
    pub fn new() -> io::Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, LATENCY_MICROS_MAX, 3);
        let histogram = || histogram().map_err(io::Error::other);
        Ok(Self {
            answered: 0,
            refused: 0,
            lost: 0,
            unsent: 0,
            answered_in: histogram()?,
            refused_in: histogram()?,
            samples: Vec::new(),
            elapsed: Duration::ZERO,
            generator: 0.0,
        })
    }

    /// Counts what another came to as its own; `elapsed` stays.
    pub fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.lost += other.lost;
        self.unsent += other.unsent;
        // The bounds are the same.
        let _ = self.answered_in.add(other.answered_in);
        let _ = self.refused_in.add(other.refused_in);
        self.samples.extend(other.samples);
        self.generator += other.generator;
    }

    fn count(&mut self, ended: Ended, due: Instant, now: Instant) {
        let took = now - due;
        let (count, histogram) = match ended {
            Ended::Reset => (&mut self.lost, None),
            _ if took > PATIENCE => (&mut self.lost, None),
            Ended::Answered => (&mut self.answered, Some(&mut self.answered_in)),
            Ended::Refused => (&mut self.refused, Some(&mut self.refused_in)),
        };
        *count += 1;
        if let Some(histogram) = histogram {
            histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }
}

/// Draws the index of the next message.
struct Picker {
    random: StdRng,
    kind: Kind,
}

enum Kind {
    InTurn { next: usize, step: usize, of: usize },
    Uniform(usize),
    Zipf(Zipf<f64>),
}

impl Picker {
    /// Of one of several threads, which between them take each message once in a turn.
    fn new(questions: &Questions, thread: usize, threads: usize) -> Self {
        let of = questions.messages.len();
        #[allow(clippy::cast_precision_loss, reason = "a number of messages")]
        let count = of as f64;
        let kind = match questions.draw {
            Draw::InTurn => Kind::InTurn {
                next: thread,
                step: threads,
                of,
            },
            Draw::Uniform => Kind::Uniform(of),
            Draw::Zipf(exponent) => {
                Zipf::new(count, exponent).map_or(Kind::Uniform(of), Kind::Zipf)
            }
        };
        // The same load each time.
        let random = StdRng::seed_from_u64(thread as u64);
        Self { random, kind }
    }

    fn pick(&mut self) -> usize {
        match &mut self.kind {
            Kind::InTurn { next, step, of } => {
                let index = *next % *of;
                *next += *step;
                index
            }
            Kind::Uniform(of) => self.random.random_range(0..*of),
            Kind::Zipf(zipf) => {
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "from 1 to the number of messages"
                )]
                let rank = zipf.sample(&mut self.random) as usize;
                rank - 1
            }
        }
    }

    /// From one call that becomes due to the next.
    fn gap(&mut self, a_second: f64) -> Duration {
        let gap: f64 = Exp1.sample(&mut self.random);
        Duration::from_secs_f64(gap / a_second)
    }
}

/// What one thread asks.
struct Load {
    connections: Vec<Connection>,
    messages: Arc<[Vec<u8>]>,
    picker: Picker,
    pace: Pace,
    turn: Duration,
    outcome: Outcome,
    time: Duration,
}

impl Load {
    fn run(mut self, started: Instant) -> io::Result<Outcome> {
        // Where this process may: an answer is read when it comes, not when a database on the same core pauses.
        let _ = setpriority_process(None, NICENESS);
        let processor_time = thread_time();
        let end = started + self.time;
        let mut next_due = started;
        // To be asked, in an open loop.
        let mut next_connection = 0;
        let mut now = Instant::now();
        while now < end {
            match self.pace {
                Pace::AtOnce(calls) => {
                    for connection in &mut self.connections {
                        while connection.under_way() < calls {
                            let message = &self.messages[self.picker.pick()];
                            connection.ask(message, now);
                        }
                    }
                }
                Pace::ASecond(calls) => {
                    while next_due <= now && next_due < end {
                        let message = &self.messages[self.picker.pick()];
                        let count = self.connections.len();
                        let mut in_turn = next_connection..next_connection + count;
                        let has_room =
                            |next: &usize| self.connections[next % count].under_way() < STREAMS_MAX;
                        match in_turn.find(has_room) {
                            Some(found) => {
                                self.connections[found % count].ask(message, next_due);
                                next_connection = found + 1;
                            }
                            None => self.outcome.unsent += 1,
                        }
                        next_due += self.picker.gap(calls);
                    }
                }
            }
            self.send()?;
            let rest = (now + self.turn).saturating_duration_since(Instant::now());
            if !rest.is_zero() {
                poll(&mut [], Some(&timespec(rest)))?;
            }
            let until = match self.pace {
                Pace::AtOnce(_) => end,
                Pace::ASecond(_) => next_due.min(end),
            };
            now = self.receive(until)?;
        }
        self.outcome.generator =
            (thread_time() - processor_time).as_secs_f64() / self.time.as_secs_f64();
        // What has not come by then is lost anyway.
        let end = end + PATIENCE;
        while now < end
            && self
                .connections
                .iter()
                .any(|connection| connection.under_way() > 0)
        {
            self.send()?;
            now = self.receive(end)?;
        }
        let under_way = self.connections.iter().map(Connection::under_way);
        self.outcome.lost += under_way.sum::<usize>() as u64;
        Ok(self.outcome)
    }

    fn send(&mut self) -> io::Result<()> {
        self.connections.iter_mut().try_for_each(Connection::send)
    }

    /// Takes what has come, or waits for that; returns when.
    fn receive(&mut self, until: Instant) -> io::Result<Instant> {
        let wait = until.saturating_duration_since(Instant::now());
        let mut ready: Vec<PollFd<'_>> = (self.connections.iter())
            .map(|connection| {
                let write = if connection.has_more_to_send() {
                    PollFlags::OUT
                } else {
                    PollFlags::empty()
                };
                PollFd::from_borrowed_fd(connection.fd(), PollFlags::IN | write)
            })
            .collect();
        poll(&mut ready, Some(&timespec(wait)))?;
        let readable: Vec<bool> = (ready.iter()).map(|fd| !fd.revents().is_empty()).collect();
        for (connection, _) in (self.connections.iter_mut().zip(readable)).filter(|(_, is)| *is) {
            connection.receive(|ended, due, sample| {
                self.outcome.count(ended, due, Instant::now());
                self.outcome.samples.extend(sample);
            })?;
        }
        Ok(Instant::now())
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Of the calling thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

/// Processor time so far of all threads that a process has, to the nanosecond.
///
/// # Errors
/// When there is no such process, or it is another's.
pub fn processor_time(pid: u32) -> io::Result<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended meanwhile.
        let schedstat = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        let spent = schedstat.split_whitespace().next();
        nanos += spent
            .and_then(|spent| spent.parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}
