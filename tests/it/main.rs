//! The one integration binary: a module for each part, all on real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may panic, in its helpers too"
)]

mod bypass;
mod commands;
mod database;
mod deadlines;
mod embedded;
mod executors;
mod freshness;
mod limits;
mod matrix;
mod names;
mod oracle;
mod outage;
mod proxy;
mod scenario;
mod scenarios;
mod server;
mod start_stop;
mod support;
