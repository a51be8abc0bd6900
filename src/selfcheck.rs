//! Doubts the cache: compares a share of its answers with the tables, in the background.
//!
//! Invariant: an answer that is given pays a counter at most, and never waits. A comparison says nothing where something
//! that touches the organization was committed since the answer.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::mpsc, time::sleep};

use crate::{
    cache::{Cache, Entry},
    feed::Progress,
    model::{Position, Subject, SubjectPermissions},
    store::{Store, StoreError, load::ReadFrom},
};

/// One cached answer in so many is compared: at 10,000 a second one a second.
pub const SAMPLE_EVERY: NonZeroU32 = NonZeroU32::MIN.saturating_add(9_999);

/// The rest between two comparisons: ten a second at most, which a database does not notice.
const REST: Duration = Duration::from_millis(100);

/// Answers that wait to be compared; more are let go.
const WAITING_MAX: usize = 16;

/// An answer of the cache.
struct Sample {
    subject: Subject,
    entry: Arc<Entry>,
    /// What the answer said of itself.
    position: Position,
}

/// What became of the comparisons since the start.
#[derive(Default)]
pub struct Comparisons {
    pub agreed: AtomicU64,
    /// Something was committed since the answer.
    pub overtaken: AtomicU64,
    pub diverged: AtomicU64,
}

/// Takes every so many answers aside.
pub struct Sampler {
    every: NonZeroU32,
    answers: AtomicU32,
    samples: mpsc::Sender<Sample>,
    pub comparisons: Arc<Comparisons>,
}

/// Compares what a sampler has taken.
pub struct SelfCheck {
    samples: mpsc::Receiver<Sample>,
    comparisons: Arc<Comparisons>,
}

/// A sampler of one answer in `every`, and what compares them.
#[must_use]
pub fn sampler(every: NonZeroU32) -> (Sampler, SelfCheck) {
    let (sender, samples) = mpsc::channel(WAITING_MAX);
    let comparisons = Arc::new(Comparisons::default());
    let sampler = Sampler {
        every,
        answers: AtomicU32::new(0),
        samples: sender,
        comparisons: Arc::clone(&comparisons),
    };
    let check = SelfCheck {
        samples,
        comparisons,
    };
    (sampler, check)
}

impl Sampler {
    /// Counts an answer that is given, and takes it aside if it is its turn.
    pub fn count(&self, subject: &Subject, entry: &Arc<Entry>, position: Position) {
        let answers = self.answers.fetch_add(1, Ordering::Relaxed);
        if answers.is_multiple_of(self.every.get()) {
            // One that finds no room is let go: others come.
            let _full = self.samples.try_send(Sample {
                subject: *subject,
                entry: Arc::clone(entry),
                position,
            });
        }
    }
}

impl SelfCheck {
    /// Compares until the sampler is gone.
    pub async fn run(mut self, store: Arc<Store>, cache: Arc<Cache>, progress: Arc<Progress>) {
        while let Some(sample) = self.samples.recv().await {
            let counter = match compare(&store, &sample).await {
                Ok(Comparison::Agreed) => Some(&self.comparisons.agreed),
                Ok(Comparison::Overtaken) => Some(&self.comparisons.overtaken),
                Ok(Comparison::Diverged(live, head)) => {
                    say(&sample, &live, head);
                    // What the log does not have the matrix need not have either: first, for whoever loads it next.
                    progress.disbelieve_matrix();
                    cache.forget(&sample.subject);
                    Some(&self.comparisons.diverged)
                }
                // Whoever needs the database says that it is away.
                Err(error) => {
                    tracing::debug!(%error, "an answer was not compared");
                    None
                }
            };
            if let Some(counter) = counter {
                counter.fetch_add(1, Ordering::Relaxed);
            }
            sleep(REST).await;
        }
    }
}

fn say(sample: &Sample, live: &SubjectPermissions, head: Position) {
    let cached = &sample.entry.permissions;
    tracing::error!(
        organization = %sample.subject.organization.0,
        user = %sample.subject.user.0,
        answered_at = %sample.position,
        answered = differences(cached, live),
        tables_at = %head,
        tables = differences(live, cached),
        "a cached answer was wrong: something changed that the log does not have"
    );
}

enum Comparison {
    Agreed,
    Overtaken,
    /// What the tables say, and the head of their snapshot.
    Diverged(SubjectPermissions, Position),
}

async fn compare(store: &Store, sample: &Sample) -> Result<Comparison, StoreError> {
    let connection = store.reads.acquire().await?;
    let mut loaded = store
        .load_on(
            connection,
            &[sample.subject],
            ReadFrom::View,
            Position::ZERO,
        )
        .await?;
    let live = loaded
        .subjects
        .remove(&sample.subject)
        .ok_or_else(|| StoreError::Wrong("a load without its subject".to_owned()))?;
    let cached = &sample.entry.permissions;
    if differences(&live, cached).is_empty() && differences(cached, &live).is_empty() {
        return Ok(Comparison::Agreed);
    }
    // Asked for after the tables were read: what is not there now was not there then.
    let connection = store.reads.acquire().await?;
    let touched = connection
        .touched_since(sample.subject.organization, sample.position)
        .await?;
    Ok(if touched {
        Comparison::Overtaken
    } else {
        Comparison::Diverged(live, loaded.head)
    })
}

/// What `these` decide otherwise than `those`, and the role where it is another; empty when they are the same.
fn differences(these: &SubjectPermissions, those: &SubjectPermissions) -> String {
    let role = |permissions: &SubjectPermissions| {
        let membership = permissions.membership.as_ref();
        membership.map(|membership| membership.role.clone())
    };
    let mut found = Vec::new();
    if role(these) != role(those) {
        found.push(format!("role {:?}", role(these)));
    }
    for permission in these.catalog.permissions() {
        let reason = these.decide(&permission.key);
        if reason != those.decide(&permission.key) {
            found.push(format!("{}: {reason:?}", permission.key));
        }
    }
    found.join(", ")
}
