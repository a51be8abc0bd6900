//! The one integration binary: a module for each part, all on real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may panic, in its helpers too"
)]

mod analysis;
mod belief;
mod bypass;
mod calls;
mod commands;
mod commit_order;
mod database;
mod deadlines;
mod embedded;
mod executors;
mod feed;
mod freshness;
mod histories;
mod history;
mod indexes;
mod inspect;
mod limits;
mod lists;
mod log;
mod matrix;
mod migrate;
mod names;
mod operations;
mod oracle;
mod outage;
mod positions;
mod privileges;
mod property;
mod proxy;
mod race;
mod retention;
mod roles;
mod scenario;
mod scenarios;
mod server;
mod service;
mod sql;
mod standby;
mod start_stop;
mod support;
mod tidy;
mod torture;
