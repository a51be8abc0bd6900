//! The one integration binary: a module for each part, all on real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may panic, in its helpers too"
)]

mod database;
mod embedded;
mod executors;
mod names;
mod oracle;
mod race;
mod scenario;
mod scenarios;
mod support;
mod tidy;
