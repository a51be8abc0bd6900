//! hallpass answers one question for many services: may this user do this in this organization?
//!
//! A guided tour, in the order in which to read:
//!
//! 1. [`model`]: the words as types: subject, reason, position, catalog.
//! 2. [`check`]: the hot path. An answer comes from the cache if the lease allows it, else from the database.
//! 3. [`cache`]: what is remembered, and the rule that says when it may still be believed.
//! 4. [`feed`]: follows the log, drops what changed, renews the lease; [`history`]: which positions are of that log.
//! 5. [`loader`]: turns misses into few statements.
//! 6. [`store`]: the SQL, each a const above its caller, and the migrations. The decision itself is a view in
//!    `migrations/0004_decisions.sql`; the log is `0002_log.sql` and `0003_record_changes.sql`.
//! 7. [`upkeep`]: inspection, refresh and warm start, in the background; [`selfcheck`]: cached answers, doubted.
//! 8. [`auth`]: who calls, by a key, a token or a certificate, and what it may do. [`limits`]: how much.
//! 9. [`grpc`]: requests parsed, errors mapped; [`mod@http`]: the same as JSON. [`server`]: everything put together and run.
//! 10. [`trail`]: where a call's time goes; [`traces`]: to whom that is told; [`telemetry`]: metrics.
//! 11. [`cli`], [`config`] and [`embedded`]: the program around it, and a PostgreSQL of its own to try it on. [`load`]: the
//!     other side of the wire, for `hallpass bench`.
//!
//! `ARCHITECTURE.md` tells the same as data flow and invariants.

pub mod audit;
pub mod auth;
pub mod cache;
pub mod check;
pub mod cli;
pub mod config;
pub mod counters;
pub mod embedded;
pub mod feed;
pub mod grpc;
pub mod history;
pub mod http;
pub mod limits;
pub mod load;
pub mod loader;
pub mod model;
pub mod selfcheck;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod traces;
pub mod trail;
pub mod upkeep;
