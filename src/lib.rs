//! hallpass answers one question for many services: may this user do this in this organization?

pub mod model;
pub mod store;
