//! Who calls, and what it may do: a credential becomes a [`Caller`], a path becomes a [`access::Need`].
//!
//! Invariant: nothing here fails open. What is absent, wrong, expired, revoked or cannot be looked up is an error, and
//! a bearer credential that is wrong is refused even where a certificate would do. Nobody's is looked at where nobody has
//! to say who it is: by [`Authenticator::open`], and for calls that need nothing ([`access::Need::Nothing`]).

pub mod access;
pub mod api_key;
pub mod certificates;
pub mod grants;
pub mod keys;
pub mod standing;
pub mod tokens;

use std::{
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::{Arc, LazyLock},
};

use futures_util::future::BoxFuture;
use http::{HeaderMap, header::AUTHORIZATION};
use thiserror::Error;

use self::{
    access::Need,
    api_key::PREFIX,
    certificates::Certificates,
    keys::ApiKeys,
    tokens::{Tokens, Unverified},
};
use crate::model::{OrganizationId, Subject, UserId};

/// What a caller may do. Which call needs which is in [`access`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Ask whether a user may.
    Check,
    /// List permissions, holders, memberships and counts.
    List,
    /// Read the audit log.
    Audit,
    /// Change permissions.
    Admin,
    /// Read the service's own metrics.
    Metrics,
}

impl Scope {
    pub const ALL: [Self; 5] = [
        Self::Check,
        Self::List,
        Self::Audit,
        Self::Admin,
        Self::Metrics,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::List => "list",
            Self::Audit => "audit",
            Self::Admin => "admin",
            Self::Metrics => "metrics",
        }
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|scope| scope.name() == name)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::name).join(", ");
                format!("`{}` is no scope: {names}", name.escape_debug())
            })
    }
}

/// A set of scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    #[must_use]
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }

    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL
            .into_iter()
            .filter(move |scope| self.contains(*scope))
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(
            scopes
                .into_iter()
                .fold(0, |bits, scope| bits | (1 << scope as u8)),
        )
    }
}

/// Which organizations a caller may ask about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Organizations {
    All,
    /// These, in order.
    Only(Arc<[OrganizationId]>),
}

impl Organizations {
    pub fn only(organizations: impl IntoIterator<Item = OrganizationId>) -> Self {
        let mut listed: Vec<OrganizationId> = organizations.into_iter().collect();
        listed.sort_unstable();
        listed.dedup();
        Self::Only(listed.into())
    }

    /// `None`: all.
    #[must_use]
    pub fn listed(&self) -> Option<&[OrganizationId]> {
        match self {
            Self::All => None,
            Self::Only(listed) => Some(listed),
        }
    }

    #[must_use]
    pub fn contain(&self, organization: OrganizationId) -> bool {
        match self {
            Self::All => true,
            Self::Only(listed) => listed.binary_search(&organization).is_ok(),
        }
    }
}

/// Who a caller is, as logs and limits name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// Whoever can reach a service that asks for no credential.
    Anyone,
    /// An API key, by its public id.
    Key(Arc<str>),
    /// The subject of a JWT.
    Token(Arc<str>),
    /// A name in a client's certificate.
    Certificate(Arc<str>),
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anyone => f.write_str("anyone"),
            Self::Key(id) => write!(f, "key:{id}"),
            Self::Token(subject) => write!(f, "jwt:{}", subject.escape_debug()),
            Self::Certificate(name) => write!(f, "certificate:{}", name.escape_debug()),
        }
    }
}

/// Whoever makes a call, once it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub identity: Identity,
    pub scopes: Scopes,
    pub organizations: Organizations,
    /// The only user that it may ask about; a user's own token has itself here.
    pub only_user: Option<UserId>,
}

static ANYONE: LazyLock<Arc<Caller>> = LazyLock::new(|| {
    Arc::new(Caller {
        identity: Identity::Anyone,
        scopes: Scope::ALL.into_iter().collect(),
        organizations: Organizations::All,
        only_user: None,
    })
});

/// What a caller that is known may not ask. It says nothing of whether what was asked about exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Forbidden {
    #[error("the credential does not have the scope `{}`", .0.name())]
    Scope(Scope),
    #[error("the credential is not for this organization")]
    Organization,
    #[error("the credential is for questions about its own user alone")]
    User,
    /// What is asked for concerns all organizations.
    #[error("the credential is not for all organizations")]
    AllOrganizations,
}

impl Caller {
    /// Whoever can reach a service that asks for no credential: everything is open to it.
    #[must_use]
    pub fn anyone() -> Arc<Self> {
        Arc::clone(&ANYONE)
    }

    /// Somebody who is known, and may do what any credential may.
    #[must_use]
    pub fn without_scope(identity: Identity) -> Self {
        Self {
            identity,
            scopes: Scopes::default(),
            organizations: Organizations::only([]),
            only_user: None,
        }
    }

    /// # Errors
    /// When it does not have the scope.
    pub fn may(&self, scope: Scope) -> Result<(), Forbidden> {
        if self.scopes.contains(scope) {
            Ok(())
        } else {
            Err(Forbidden::Scope(scope))
        }
    }

    /// # Errors
    /// When it may not ask about this user in this organization.
    pub fn may_ask_about(&self, subject: Subject) -> Result<(), Forbidden> {
        self.may_ask_about_user(subject.user)?;
        if self.organizations.contain(subject.organization) {
            Ok(())
        } else {
            Err(Forbidden::Organization)
        }
    }

    /// # Errors
    /// When it may not ask about this user anywhere.
    pub fn may_ask_about_user(&self, user: UserId) -> Result<(), Forbidden> {
        match self.only_user {
            Some(only) if only != user => Err(Forbidden::User),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// When it may not change what holds for all organizations.
    pub fn may_change_the_catalog(&self) -> Result<(), Forbidden> {
        if self.only_user.is_some() {
            Err(Forbidden::User)
        } else if self.organizations == Organizations::All {
            Ok(())
        } else {
            Err(Forbidden::AllOrganizations)
        }
    }

    /// # Errors
    /// When it may not read an organization's audit entries; `None`: those of whatever organizations are its own.
    pub fn may_audit(&self, organization: Option<OrganizationId>) -> Result<(), Forbidden> {
        match organization {
            Some(organization) => self.may_ask_about_all_of(organization),
            None if self.only_user.is_some() => Err(Forbidden::User),
            None => Ok(()),
        }
    }

    /// # Errors
    /// When it may not ask about an organization as a whole.
    pub fn may_ask_about_all_of(&self, organization: OrganizationId) -> Result<(), Forbidden> {
        if self.only_user.is_some() {
            return Err(Forbidden::User);
        }
        if self.organizations.contain(organization) {
            Ok(())
        } else {
            Err(Forbidden::Organization)
        }
    }
}

/// Why nobody is known to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AuthError {
    #[error("no credential: send `authorization: Bearer <key or token>`")]
    Missing,
    /// Unknown, malformed or forged: which of them is nobody's business.
    #[error("the credential is not valid here")]
    Invalid,
    /// It was genuine.
    #[error("the credential has expired")]
    Expired,
    /// It was genuine.
    #[error("the credential has been revoked")]
    Revoked,
    /// Whether it is genuine cannot be found out at present.
    #[error("credentials cannot be verified at present")]
    Unavailable,
}

/// The other end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// `None` for a Unix socket.
    pub address: Option<IpAddr>,
    /// The names in the certificate that it proved to hold, empty where it has none.
    pub certificate_names: Arc<[Box<str>]>,
}

/// The outcome of a look at a credential: at once wherever nothing has to be fetched.
pub enum Authentication {
    Known(Result<Arc<Caller>, AuthError>),
    /// Something has to be fetched, for the holder of a credential; for a stranger only by [`Unverified::verify`].
    Pending(BoxFuture<'static, Result<Arc<Caller>, AuthError>>),
    /// Whoever sends it is a stranger so far, and to find out more is work.
    Unverified(Unverified),
}

/// Knows callers by what they send, in every way that the service was told to accept; by default in none.
#[derive(Clone, Debug, Default)]
pub struct Authenticator {
    is_open: bool,
    keys: Option<ApiKeys>,
    tokens: Option<Tokens>,
    certificates: Option<Certificates>,
}

impl Authenticator {
    /// Lets everybody in, with every scope: for sockets that only this machine can reach.
    #[must_use]
    pub fn open() -> Self {
        Self {
            is_open: true,
            ..Self::default()
        }
    }

    /// Whether nobody has to say who it is.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Accepts these API keys too.
    #[must_use]
    pub fn with_keys(self, keys: ApiKeys) -> Self {
        let keys = Some(keys);
        Self { keys, ..self }
    }

    /// Accepts these tokens too.
    #[must_use]
    pub fn with_tokens(self, tokens: Tokens) -> Self {
        let tokens = Some(tokens);
        Self { tokens, ..self }
    }

    /// Accepts these certificates too.
    #[must_use]
    pub fn with_certificates(self, certificates: Certificates) -> Self {
        let certificates = Some(certificates);
        Self {
            certificates,
            ..self
        }
    }

    /// The API keys that are to be followed in the database.
    #[must_use]
    pub fn keys(&self) -> Option<&ApiKeys> {
        self.keys.as_ref()
    }

    /// The tokens whose issuer's keys are to be followed.
    #[must_use]
    pub fn tokens(&self) -> Option<&Tokens> {
        self.tokens.as_ref()
    }

    /// Finds out who makes a call with this need. Whether the caller has what is needed is [`Need::opens_to`]'s to say.
    #[must_use]
    pub fn authenticate(&self, headers: &HeaderMap, peer: &Peer, need: Need) -> Authentication {
        self.authenticate_by(bearer(headers), peer, need)
    }

    /// As [`Authenticator::authenticate`], by what [`bearer`] has found.
    fn authenticate_by(
        &self,
        credential: Result<Option<&str>, AuthError>,
        peer: &Peer,
        need: Need,
    ) -> Authentication {
        let credential = match credential {
            _ if self.is_open => return Authentication::Known(Ok(Caller::anyone())),
            Err(error) => return Authentication::Known(Err(error)),
            Ok(credential) => credential,
        };
        let known = match credential {
            Some(key) if key.starts_with(PREFIX) => match &self.keys {
                Some(keys) => return keys.authenticate(key, need),
                None => Err(AuthError::Invalid),
            },
            Some(token) => match &self.tokens {
                Some(tokens) => return tokens.authenticate(token),
                // One that is wrong here is refused even if a certificate is there.
                None => Err(AuthError::Invalid),
            },
            None => match &self.certificates {
                Some(certificates) => certificates.authenticate(&peer.certificate_names),
                None => Err(AuthError::Missing),
            },
        };
        Authentication::Known(known)
    }
}

/// The credential that a request carries. More than one is malformed: which one counts must not be guessed.
///
/// # Errors
/// When it is malformed.
pub fn bearer(headers: &HeaderMap) -> Result<Option<&str>, AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(AuthError::Invalid);
    }
    let (scheme, credential) = value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .ok_or(AuthError::Invalid)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        Ok(Some(credential.trim()))
    } else {
        Err(AuthError::Invalid)
    }
}
