//! The gRPC services of `hallpass.v1`: each parses a request whole, asks, and answers.
//!
//! Invariant: no SQL, SQLSTATE or host name reaches a caller; every error is made in `status`.

pub mod admin_service;
pub mod audit_service;
pub mod codec;
pub mod direct;
pub mod gate;
pub mod limit;
pub mod observe;
mod parse;
pub mod permission_service;
pub mod status;

/// The messages and servers of `hallpass.v1`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    reason = "generated from proto/hallpass/v1"
)]
pub mod v1 {
    tonic::include_proto!("hallpass.v1");

    /// The compiled protos, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hallpass.v1.binpb"));
}
