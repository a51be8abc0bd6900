//! The one integration binary: a module for each part, all on real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may panic, in its helpers too"
)]

mod embedded;
mod support;
