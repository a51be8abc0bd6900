//! The table of what each call needs. A call that has no row is refused, whoever makes it.

use super::{Caller, Forbidden, Scope};

/// What a call needs of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Anybody may, without a credential: load balancers ask for health.
    Nothing,
    /// Any credential that is valid.
    Credential,
    Scope(Scope),
}

impl Need {
    /// # Errors
    /// When the caller does not have what is needed.
    pub fn opens_to(self, caller: &Caller) -> Result<(), Forbidden> {
        match self {
            Self::Nothing | Self::Credential => Ok(()),
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

/// Every method of every listener, the most frequent first.
pub const ACCESS: [(&str, Need, Answer); 11] = [
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

/// What a call of this path needs, and is answered with; `None` for a path that nobody serves.
#[must_use]
pub fn row(path: &str) -> Option<(Need, Answer)> {
    ACCESS
        .iter()
        .find(|(known, ..)| *known == path)
        .map(|(_, need, answer)| (*need, *answer))
}
