//! The one integration binary: a module for each part, all on real PostgreSQL.

mod embedded;
mod support;
