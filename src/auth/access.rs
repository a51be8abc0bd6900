//! The table of what each call needs. A call that has no row is refused, whoever makes it.

use axum::extract::MatchedPath;
use http::{Method, Request};

use super::{Caller, Forbidden, Scope};

/// What a call needs of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Anybody may, without a credential: load balancers ask for health.
    Nothing,
    /// Nothing, either; but it has limits as any call.
    Open,
    /// Any credential that is valid.
    Credential,
    Scope(Scope),
}

impl Need {
    /// # Errors
    /// When the caller does not have what is needed.
    pub fn opens_to(self, caller: &Caller) -> Result<(), Forbidden> {
        match self {
            Self::Nothing | Self::Open | Self::Credential => Ok(()),
            Self::Scope(scope) => caller.may(scope),
        }
    }
}

/// What a call is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Message,
    /// As many messages as are wanted, until it is too old.
    Stream,
    /// A stream that ends by itself when it is too old, or its caller's [`Standing`](super::standing::Standing) is
    /// lost, and says where to go on.
    EndingStream,
}

/// Marks a request that came over HTTP, where gRPC's paths are none.
#[derive(Clone, Copy, Debug)]
pub struct OverHttp;

/// What a call is called, what it needs, and what it is answered with. Of gRPC, its path; of HTTP, its method and route.
pub type Row = (&'static str, Need, Answer);

/// Every method of every listener, the most frequent first.
pub const ACCESS: [Row; 42] = [
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
    ("POST /v1/check", Need::Scope(Scope::Check), Answer::Message),
    (
        "POST /v1/batch-check",
        Need::Scope(Scope::Check),
        Answer::Message,
    ),
    (
        "GET /v1/organizations/{organization_id}/users/{user_id}/permissions",
        Need::Scope(Scope::List),
        Answer::Message,
    ),
    (
        "GET /v1/organizations/{organization_id}/summary",
        Need::Scope(Scope::List),
        Answer::Message,
    ),
    ("GET /v1/audit", Need::Scope(Scope::Audit), Answer::Message),
    (
        "GET /v1/audit/stream",
        Need::Scope(Scope::Audit),
        Answer::EndingStream,
    ),
    (
        "GET /api/admin/organization-permissions",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "GET /api/admin/organization-permissions/templates",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "PUT /api/admin/organization-permissions/{permission}",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "DELETE /api/admin/organization-permissions/{permission}",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "POST /api/admin/organization-permissions/bulk-update",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "GET /api/admin/organization-permissions/user/{user_id}",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    (
        "POST /api/admin/organization-permissions/user-overrides",
        Need::Scope(Scope::Admin),
        Answer::Message,
    ),
    ("GET /api/health", Need::Nothing, Answer::Message),
    ("GET /openapi.json", Need::Open, Answer::Message),
    ("GET /docs", Need::Open, Answer::Message),
    ("GET /docs/", Need::Open, Answer::Message),
    ("GET /docs/{asset}", Need::Open, Answer::Message),
    // The operators' listener.
    ("GET /metrics", Need::Scope(Scope::Metrics), Answer::Message),
    ("GET /livez", Need::Nothing, Answer::Message),
    ("GET /readyz", Need::Nothing, Answer::Message),
];

/// A call's row and its place; `None` for what nobody serves.
#[must_use]
pub fn row<B>(request: &Request<B>) -> Option<(usize, &'static Row)> {
    let mut rows = ACCESS.iter().enumerate();
    if request.extensions().get::<OverHttp>().is_none() {
        let path = request.uri().path();
        return rows.find(|(_, (name, ..))| *name == path);
    }
    let route = request.extensions().get::<MatchedPath>()?;
    let method = match *request.method() {
        // What is read can be asked for without its body.
        Method::HEAD => "GET",
        ref method => method.as_str(),
    };
    rows.find(|(_, (name, ..))| name.split_once(' ') == Some((method, route.as_str())))
}

/// What HTTP methods a route has.
pub fn methods_of(route: &str) -> impl Iterator<Item = &'static str> {
    ACCESS
        .iter()
        .filter_map(|(name, ..)| name.split_once(' '))
        .filter(move |(_, of)| *of == route)
        .map(|(method, _)| method)
}
