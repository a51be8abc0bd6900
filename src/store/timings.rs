//! How long the database takes to answer what it is asked for an answer.

use std::time::Instant;

use crate::counters::{BUCKETS_MICROS, Cells, Histograms};

/// What the database is asked while somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// All permissions of some subjects.
    Load,
    Explain,
    Holders,
    Organizations,
    Summary,
    FindPositions,
    TouchedSince,
    NextMembers,
    AuditPage,
    AuditHead,
    AuditList,
    Change,
    Preview,
    Settings,
    Ping,
}

impl Question {
    pub const ALL: [Self; 15] = [
        Self::Load,
        Self::Explain,
        Self::Holders,
        Self::Organizations,
        Self::Summary,
        Self::FindPositions,
        Self::TouchedSince,
        Self::NextMembers,
        Self::AuditPage,
        Self::AuditHead,
        Self::AuditList,
        Self::Change,
        Self::Preview,
        Self::Settings,
        Self::Ping,
    ];

    /// As metrics have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Explain => "explain",
            Self::Holders => "holders",
            Self::Organizations => "organizations",
            Self::Summary => "summary",
            Self::FindPositions => "find_positions",
            Self::TouchedSince => "touched_since",
            Self::NextMembers => "next_members",
            Self::AuditPage => "audit_page",
            Self::AuditHead => "audit_head",
            Self::AuditList => "audit_list",
            Self::Change => "change",
            Self::Preview => "preview",
            Self::Settings => "settings",
            Self::Ping => "ping",
        }
    }
}

/// What became of the questions since the start.
pub struct Timings {
    /// By [`Question`] as a number; those that were given up, too.
    pub micros: Histograms,
    errors: Cells,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            micros: Histograms::new(Question::ALL.len(), &BUCKETS_MICROS),
            errors: Cells::new(Question::ALL.len()),
        }
    }
}

impl Timings {
    pub(super) fn ended(&self, question: Question, since: Instant) {
        self.micros.observe_since(question as usize, since);
    }

    pub(super) fn failed(&self, question: Question) {
        self.errors.add(question as usize, 1);
    }

    /// Questions that the database refused, or did not answer in time.
    #[must_use]
    pub fn errors(&self, question: Question) -> u64 {
        self.errors.sum(question as usize)
    }
}
