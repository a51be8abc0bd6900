//! The one integration binary: a module for each part, all on real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may panic, in its helpers too"
)]

mod belief;
mod commit_order;
mod database;
mod embedded;
mod executors;
mod inspect;
mod log;
mod matrix;
mod migrate;
mod names;
mod operations;
mod oracle;
mod privileges;
mod property;
mod race;
mod scenario;
mod scenarios;
mod service;
mod sql;
mod support;
mod tidy;
