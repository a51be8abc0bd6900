//! hallpass answers one question for many services: may this user do this in this organization?

pub mod cache;
pub mod check;
pub mod cli;
pub mod config;
pub mod embedded;
pub mod feed;
pub mod grpc;
pub mod loader;
pub mod model;
pub mod server;
pub mod store;
pub mod upkeep;
