//! What is remembered of each subject, and when it may still be believed: lookup, insert and invalidation together.
//!
//! Invariant: an entry is valid while its epoch is the current one, its head is at or after the last change of its
//! organization's overrides, and at or after the last change of everything. A changed membership removes its entry.
//! Insert and removal exclude each other, by organization: looking again after an insert instead of before would let
//! a load that is older than a removal put back what was removed.

use std::{
    collections::HashMap,
    hash::RandomState,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use moka::{notification::RemovalCause, sync::Cache as Moka};

use crate::model::{Change, OrganizationId, Position, Subject, SubjectPermissions};

/// Locks between loads and the feed. Enough that two loads at once seldom meet.
const STRIPES: usize = 256;

/// Organizations whose changes a stripe remembers before it forgets those without entries; about a million in all.
const STRIPE_ORGANIZATIONS_MAX: usize = 4_096;

/// One subject's decisions as of `head`.
pub struct Entry {
    pub permissions: SubjectPermissions,
    /// The head as seen by the statement that loaded this.
    pub head: Position,
    pub epoch: Epoch,
    /// The last entry of the log that changed the overrides of this entry's organization.
    overrides_seq: Arc<AtomicI64>,
}

/// One stretch of uninterrupted history. An entry of another epoch is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(u64);

impl Epoch {
    /// One that is never current: what is loaded in it is not remembered.
    pub const NEVER: Self = Self(u64::MAX);
}

/// The cache.
pub struct Cache {
    entries: Moka<Subject, Arc<Entry>, RandomState>,
    epoch: AtomicU64,
    /// The last entry of the log that changed everything.
    everything_seq: AtomicI64,
    stripes: Box<[Mutex<Stripe>]>,
    pub invalidations: Invalidations,
}

/// What was made invalid since the start, by cause.
#[derive(Default)]
pub struct Invalidations {
    /// Changed memberships, and the entries that they removed.
    pub memberships: AtomicU64,
    pub membership_entries: AtomicU64,
    /// Users who came to be, or ceased to be, named by an override; and the entries that this removed.
    pub named_users: AtomicU64,
    pub named_user_entries: AtomicU64,
    /// Changed overrides. Each ends all entries of its organization, which are found out when they are asked for.
    pub overrides: AtomicU64,
    /// Changes of everything: the catalog, the ladder, or more than can be named.
    pub everything: AtomicU64,
    /// Histories begun after the first: each ends all entries.
    pub epochs: AtomicU64,
    /// Entries that made room for others.
    pub evicted_entries: Arc<AtomicU64>,
}

/// What the feed has told of the organizations that share a lock.
#[derive(Default)]
struct Stripe {
    changes: HashMap<OrganizationId, OrganizationChanges>,
    /// The last change of any organization that is not in `changes`: where the feed began, or what was forgotten.
    floor: i64,
    forget_above: usize,
}

struct OrganizationChanges {
    /// The last change of any kind: a load must not be older to be inserted.
    last_seq: i64,
    overrides_seq: Arc<AtomicI64>,
}

impl Cache {
    /// A cache of at most `capacity` subjects that takes no entry before [`Cache::begin_epoch`].
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        let closed = || {
            Mutex::new(Stripe {
                floor: i64::MAX,
                forget_above: STRIPE_ORGANIZATIONS_MAX,
                ..Stripe::default()
            })
        };
        let invalidations = Invalidations::default();
        let evicted = Arc::clone(&invalidations.evicted_entries);
        Self {
            entries: Moka::builder()
                .max_capacity(capacity)
                .eviction_listener(move |_, _, cause| {
                    count(&evicted, cause == RemovalCause::Size);
                })
                .build_with_hasher(RandomState::new()),
            epoch: AtomicU64::new(0),
            everything_seq: AtomicI64::new(0),
            stripes: std::iter::repeat_with(closed).take(STRIPES).collect(),
            invalidations,
        }
    }

    /// The entry of a subject, if there is one that is valid.
    ///
    /// Read the lease that the answer will lean on first: an entry that is still here afterwards has survived all
    /// that the lease's position includes.
    #[must_use]
    pub fn get(&self, subject: &Subject) -> Option<Arc<Entry>> {
        let entry = self.entries.get(subject)?;
        // The epoch last: whoever sees what the beginning of an epoch forgets sees the epoch too.
        let valid = entry.head.seq >= entry.overrides_seq.load(Ordering::Acquire)
            && entry.head.seq >= self.everything_seq.load(Ordering::Acquire)
            && entry.epoch == self.epoch();
        valid.then_some(entry)
    }

    /// Subjects remembered, and at most; some of them may not be valid any more.
    #[must_use]
    pub fn size(&self) -> (u64, u64) {
        let capacity = self.entries.policy().max_capacity();
        (self.entries.entry_count(), capacity.unwrap_or(u64::MAX))
    }

    /// The current epoch: to be taken before a load's SQL is sent, and given to [`Cache::insert`].
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Remembers what a load found, unless something changed since that the load may not have seen. Returns the entry
    /// either way: it answers whoever waits for the load.
    pub fn insert(
        &self,
        subject: Subject,
        permissions: SubjectPermissions,
        head: Position,
        epoch: Epoch,
    ) -> Arc<Entry> {
        let mut stripe = self.stripe(subject.organization);
        let (last_seq, overrides_seq) = stripe.changes_of(subject.organization);
        let entry = Arc::new(Entry {
            permissions,
            head,
            epoch,
            overrides_seq,
        });
        if epoch == self.epoch() && head.seq >= last_seq {
            self.entries.insert(subject, Arc::clone(&entry));
        }
        entry
    }

    /// Makes everything invalid that entry `seq` of the log changes.
    pub fn apply(&self, seq: i64, change: &Change) {
        let causes = &self.invalidations;
        match change {
            Change::Everything => {
                self.everything_seq.store(seq, Ordering::Release);
                count(&causes.everything, true);
            }
            Change::Organization(organization) => {
                let mut stripe = self.stripe(*organization);
                stripe
                    .record(*organization, seq)
                    .store(seq, Ordering::Release);
                count(&causes.overrides, true);
            }
            Change::Membership(subject) => {
                count(&causes.memberships, true);
                count(&causes.membership_entries, self.remove(seq, subject));
            }
            Change::NamedUser(subject) => {
                count(&causes.named_users, true);
                count(&causes.named_user_entries, self.remove(seq, subject));
            }
        }
    }

    /// Removes a subject that entry `seq` of the log changes; says whether there was an entry.
    fn remove(&self, seq: i64, subject: &Subject) -> bool {
        let mut stripe = self.stripe(subject.organization);
        // The change first, then the removal, both under the lock: see `insert`.
        stripe.record(subject.organization, seq);
        self.entries.remove(subject).is_some()
    }

    /// Removes a subject's entry, whose decisions turned out to be wrong.
    pub fn forget(&self, subject: &Subject) {
        let _stripe = self.stripe(subject.organization);
        self.entries.invalidate(subject);
    }

    /// Forgets everything, and takes loads whose head is at or after `head` from here on.
    pub fn begin_epoch(&self, head: Position) -> Epoch {
        // Closed to loads before anything is forgotten, and open again only in the new epoch: an entry must not point
        // to changes that are forgotten.
        for stripe in &self.stripes {
            let mut stripe = lock(stripe);
            stripe.changes.clear();
            stripe.floor = i64::MAX;
        }
        let before = self.epoch.fetch_add(1, Ordering::AcqRel);
        count(&self.invalidations.epochs, before > 0);
        self.everything_seq.store(0, Ordering::Release);
        for stripe in &self.stripes {
            let mut stripe = lock(stripe);
            stripe.changes.clear();
            stripe.floor = head.seq;
        }
        Epoch(before + 1)
    }

    fn stripe(&self, organization: OrganizationId) -> MutexGuard<'_, Stripe> {
        let low_bytes = organization.0.as_u64_pair().1 ^ organization.0.as_u64_pair().0;
        lock(&self.stripes[usize::try_from(low_bytes % STRIPES as u64).unwrap_or(0)])
    }
}

/// Counters order nothing, so the weakest order will do.
fn count(counter: &AtomicU64, holds: bool) {
    counter.fetch_add(u64::from(holds), Ordering::Relaxed);
}

/// A thread that panicked while it held a stripe left it whole: each step under the lock is complete in itself.
fn lock(stripe: &Mutex<Stripe>) -> MutexGuard<'_, Stripe> {
    stripe.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stripe {
    /// The last change of an organization, and where its entries look for changes of its overrides.
    fn changes_of(&mut self, organization: OrganizationId) -> (i64, Arc<AtomicI64>) {
        let changes = self.entry(organization);
        (changes.last_seq, Arc::clone(&changes.overrides_seq))
    }

    /// Stores a change of an organization; returns where changes of its overrides are stored.
    fn record(&mut self, organization: OrganizationId, seq: i64) -> &AtomicI64 {
        let changes = self.entry(organization);
        changes.last_seq = seq;
        &changes.overrides_seq
    }

    fn entry(&mut self, organization: OrganizationId) -> &mut OrganizationChanges {
        if self.changes.len() >= self.forget_above {
            self.forget_unused();
        }
        let floor = self.floor;
        self.changes
            .entry(organization)
            .or_insert_with(|| OrganizationChanges {
                last_seq: floor,
                overrides_seq: Arc::new(AtomicI64::new(0)),
            })
    }

    /// Forgets the organizations that no entry points to; the floor then stands for them.
    fn forget_unused(&mut self) {
        let mut floor = self.floor;
        self.changes.retain(|_, changes| {
            let used = Arc::strong_count(&changes.overrides_seq) > 1;
            if !used {
                floor = floor.max(changes.last_seq);
            }
            used
        });
        self.floor = floor;
        self.forget_above = STRIPE_ORGANIZATIONS_MAX.max(self.changes.len() * 2);
    }
}
