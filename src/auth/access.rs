//! The table of what each call needs. A call that has no row is refused, whoever makes it.

use super::Scope;

/// What a call needs of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Anybody may, without a credential: load balancers ask for health.
    Nothing,
    /// Any credential that is valid.
    Credential,
    Scope(Scope),
}

/// What a call is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Message,
    /// As many messages as are wanted, until it is too old.
    Stream,
    /// A stream that ends by itself when it is too old, and says where to go on.
    EndingStream,
}

/// Every method of every listener, the most frequent first.
pub const ACCESS: [(&str, Need, Answer); 21] = [
    (
        "/hallpass.v1.PermissionService/CheckPermission",
        Need::Scope(Scope::Check),
        Answer::Message,
    ),
    (
        "/hallpass.v1.PermissionService/BatchCheckPermissions",
        Need::Scope(Scope::Check),
        Answer::Message,
    ),
    (
        "/hallpass.v1.PermissionService/ListUserPermissions",
        Need::Scope(Scope::List),
        Answer::Message,
    ),
    (
        "/hallpass.v1.PermissionService/ListPermissionHolders",
        Need::Scope(Scope::List),
        Answer::Message,
    ),
    (
        "/hallpass.v1.PermissionService/ListUserOrganizations",
        Need::Scope(Scope::List),
        Answer::Message,
    ),
    (
        "/hallpass.v1.PermissionService/GetOrganizationSummary",
        Need::Scope(Scope::List),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AuditService/StreamAuditEntries",
        Need::Scope(Scope::Audit),
        Answer::EndingStream,
    ),
    (
        "/hallpass.v1.AuditService/ListAuditEntries",
        Need::Scope(Scope::Audit),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/ListOrganizationPermissions",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/SetOrganizationPermission",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/BulkSetOrganizationPermissions",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/ResetOrganizationPermission",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/PutMember",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/RemoveMember",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/GrantUserPermission",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/RevokeUserPermission",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/PutPermissionTemplate",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/hallpass.v1.AdminService/DeletePermissionTemplate",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "/grpc.health.v1.Health/Check",
        Need::Nothing,
        Answer::Message,
    ),
    (
        "/grpc.health.v1.Health/Watch",
        Need::Nothing,
        Answer::Stream,
    ),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Need::Credential,
        Answer::Stream,
    ),
];

/// What a call of this path needs; `None` for a path that nobody serves.
#[must_use]
pub fn need(path: &str) -> Option<Need> {
    ACCESS
        .iter()
        .find(|(known, ..)| *known == path)
        .map(|(_, need, _)| *need)
}
