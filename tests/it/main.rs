//! The one integration binary: a module for each part, all on real PostgreSQL.

mod commit_order;
mod inspect;
mod log;
mod matrix;
mod migrate;
mod privileges;
mod scratch;
mod sql;
