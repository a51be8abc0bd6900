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

/// Every method of every listener, the most frequent first.
pub const ACCESS: [(&str, Need); 22] = [
    (
        "/hallpass.v1.PermissionService/CheckPermission",
        Need::Scope(Scope::Check),
    ),
    (
        "/hallpass.v1.PermissionService/BatchCheckPermissions",
        Need::Scope(Scope::Check),
    ),
    (
        "/hallpass.v1.PermissionService/ListUserPermissions",
        Need::Scope(Scope::List),
    ),
    (
        "/hallpass.v1.PermissionService/ListPermissionHolders",
        Need::Scope(Scope::List),
    ),
    (
        "/hallpass.v1.PermissionService/ListUserOrganizations",
        Need::Scope(Scope::List),
    ),
    (
        "/hallpass.v1.PermissionService/GetOrganizationSummary",
        Need::Scope(Scope::List),
    ),
    (
        "/hallpass.v1.AuditService/StreamAuditEntries",
        Need::Scope(Scope::Audit),
    ),
    (
        "/hallpass.v1.AuditService/ListAuditEntries",
        Need::Scope(Scope::Audit),
    ),
    (
        "/hallpass.v1.AdminService/ListOrganizationPermissions",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/SetOrganizationPermission",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/BulkSetOrganizationPermissions",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/ResetOrganizationPermission",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/PutMember",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/RemoveMember",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/GrantUserPermission",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/RevokeUserPermission",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/PutPermissionTemplate",
        Need::Scope(Scope::Admin),
    ),
    (
        "/hallpass.v1.AdminService/DeletePermissionTemplate",
        Need::Scope(Scope::Admin),
    ),
    ("/grpc.health.v1.Health/Check", Need::Nothing),
    ("/grpc.health.v1.Health/Watch", Need::Nothing),
    ("/grpc.health.v1.Health/List", Need::Nothing),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Need::Credential,
    ),
];

/// What a call of this path needs; `None` for a path that nobody serves.
#[must_use]
pub fn need(path: &str) -> Option<Need> {
    ACCESS
        .iter()
        .find(|(known, _)| *known == path)
        .map(|(_, need)| *need)
}
