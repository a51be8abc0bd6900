//! hallpass answers one question for many services: may this user do this in this organization?

pub mod cli;
pub mod embedded;
pub mod model;
pub mod store;
