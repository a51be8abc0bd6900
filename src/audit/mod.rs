//! The audit log as it grows: one [`tail`] reads the log for all live streams, and each [`stream`] reads its own past.
//!
//! Invariant: a stream passes no entry that it has not looked at. It moves its cursor only over what follows it without
//! a hole, and whatever is not sure of that reads from the database again.

pub mod stream;
pub mod tail;
