//! The one integration binary: a module for each part, all on real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may panic, in its helpers too"
)]

mod admin;
mod adopt_cases;
mod adopt_guarded;
mod adopt_indexes;
mod adopt_load;
mod adopt_refused;
mod adopted;
mod adopted_scenarios;
mod adoption;
mod analysis;
mod belief;
mod bypass;
mod calls;
mod commands;
mod commit_order;
mod database;
mod deadlines;
mod dump;
mod embedded;
mod executors;
mod feed;
mod freshness;
mod histories;
mod history;
mod indexes;
mod inspect;
mod left_again;
mod limits;
mod lists;
mod log;
mod matrix;
mod migrate;
mod names;
mod operations;
mod oracle;
mod outage;
mod pools;
mod positions;
mod privileges;
mod property;
mod proxy;
mod pto;
mod race;
mod retention;
mod roles;
mod scenario;
mod scenarios;
mod selfcheck;
mod server;
mod service;
mod sql;
mod standby;
mod start_stop;
mod support;
mod tidy;
mod torture;
mod uninstall;
mod upgrade;
mod writers;
