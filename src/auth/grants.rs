//! What a token or a client certificate may do: the grants file, read whole before anything starts.
//!
//! Invariant: no order of the file matters, and no token gets more than one of its grants says. Grants that match the
//! same token add up in their scopes alone; where they disagree about organizations or users, the token is refused.

mod file;

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use uuid::Uuid;

use super::{
    AuthError, Caller, Identity, Organizations, Scopes,
    tokens::{claims::Claim, refused},
};
use crate::model::{OrganizationId, UserId};

/// Bytes of a grants file: some thousand grants, and each token is held against all of them.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The grants of a file, none at all by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    tokens: Vec<TokenGrant>,
    /// By name; what several grants of one name say is added up.
    certificates: HashMap<Box<str>, Arc<Caller>>,
}

/// What a token may do whose `claim` has the `value`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TokenGrant {
    claim: ClaimPath,
    value: Box<str>,
    scopes: Scopes,
    reach: Reach,
}

/// Whom a grant lets ask about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reach {
    organizations: GrantedOrganizations,
    only_own_user: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum GrantedOrganizations {
    Fixed(Organizations),
    /// Those that this claim lists.
    Claim(ClaimPath),
}

/// The names that lead to a claim, from the outermost inwards.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ClaimPath(Box<[Box<str>]>);

impl Grants {
    /// # Errors
    /// When the file cannot be read, and with every mistake in it, each with its line.
    pub fn read(path: &Path) -> Result<Self, String> {
        let bytes = fs::metadata(path).map(|metadata| metadata.len());
        if bytes.is_ok_and(|bytes| bytes > FILE_BYTES_MAX) {
            return Err(format!("is larger than {FILE_BYTES_MAX} bytes"));
        }
        Self::parse(&fs::read_to_string(path).map_err(|error| error.to_string())?)
    }

    /// # Errors
    /// With every mistake in the text, each with its line.
    pub fn parse(text: &str) -> Result<Self, String> {
        file::parse(text)
    }

    /// The holder of a token whose `sub` is `subject`; without a scope when no grant matches.
    ///
    /// # Errors
    /// When the grants that match contradict one another, or the token is to be its user's own and `subject` is none.
    pub(super) fn caller_of_token(
        &self,
        subject: &str,
        claims: &Claim,
    ) -> Result<Caller, AuthError> {
        let mut matching = self.tokens.iter().filter(|grant| grant.matches(claims));
        let identity = Identity::Token(subject.into());
        let Some(first) = matching.next() else {
            return Ok(Caller::without_scope(identity));
        };
        let mut scopes = first.scopes;
        for other in matching {
            if other.reach != first.reach {
                return Err(refused("its grants contradict one another"));
            }
            scopes = scopes.iter().chain(other.scopes.iter()).collect();
        }
        let only_user = if first.reach.only_own_user {
            let user = hyphenated(subject);
            Some(UserId(user.ok_or_else(|| {
                refused("its subject is to be a user, and is no id")
            })?))
        } else {
            None
        };
        Ok(Caller {
            identity,
            scopes,
            organizations: first.reach.organizations.of(claims),
            only_user,
        })
    }

    /// What each name in a certificate may do.
    #[must_use]
    pub fn certificates(&self) -> &HashMap<Box<str>, Arc<Caller>> {
        &self.certificates
    }
}

impl TokenGrant {
    /// Whether the claim is the value, has it as a word (as in OAuth's `scope`), or as an element.
    fn matches(&self, claims: &Claim) -> bool {
        match self.claim.of(claims) {
            Some(Claim::Text(text)) => {
                **text == *self.value || text.split(' ').any(|word| *word == *self.value)
            }
            Some(Claim::List(elements)) => elements
                .iter()
                .any(|element| matches!(element, Claim::Text(text) if **text == *self.value)),
            _ => false,
        }
    }
}

impl GrantedOrganizations {
    /// A claim that is absent, or anything but one id or a list of ids, grants none.
    fn of(&self, claims: &Claim) -> Organizations {
        let claim = match self {
            Self::Fixed(organizations) => return organizations.clone(),
            Self::Claim(path) => path.of(claims),
        };
        let id = |claim: &Claim| match claim {
            Claim::Text(text) => hyphenated(text).map(OrganizationId),
            _ => None,
        };
        let listed: Option<Vec<OrganizationId>> = match claim {
            Some(Claim::List(elements)) => elements.iter().map(id).collect(),
            Some(one) => id(one).map(|id| vec![id]),
            None => None,
        };
        Organizations::only(listed.unwrap_or_default())
    }
}

impl ClaimPath {
    fn of<'a>(&self, claims: &'a Claim) -> Option<&'a Claim> {
        self.0
            .iter()
            .try_fold(claims, |claim, name| claim.get(name))
    }
}

/// The one form in which requests hold ids.
fn hyphenated(text: &str) -> Option<Uuid> {
    (text.len() == uuid::fmt::Hyphenated::LENGTH)
        .then(|| Uuid::try_parse(text).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const GRANTS: &str = r#"
        [[grant]]
        claim = "scope"
        value = "hallpass:check"
        scopes = ["check"]
        organizations = { claim = ["https://district.example/org"] }
        [[grant]]
        claim = "scope"
        value = "hallpass:list"
        scopes = ["list"]
        organizations = { claim = ["https://district.example/org"] }
        [[grant]]
        claim = "realm.roles"
        value = "auditor"
        scopes = ["audit"]
        organizations = "all"
    "#;

    const ORGANIZATION: &str = "6fa459ea-ee8a-3ca4-894e-db77e160355e";

    /// `check,list in 1`, with the number of organizations, or `refused`.
    fn granted(grants: &str, claims: &Value) -> String {
        let grants = Grants::parse(grants).unwrap();
        let claims: Claim = serde_json::from_value(claims.clone()).unwrap();
        match grants.caller_of_token("somebody", &claims) {
            Ok(caller) => {
                let scopes: Vec<&str> = caller.scopes.iter().map(|scope| scope.name()).collect();
                let organizations = caller.organizations.listed().map(<[_]>::len);
                let count = organizations.map_or_else(|| "all".to_owned(), |n| n.to_string());
                format!("{} in {count}", scopes.join(","))
            }
            Err(_) => "refused".to_owned(),
        }
    }

    #[test]
    fn grants_that_match_add_up_in_their_scopes_alone() {
        let with_scope =
            |scope: Value| json!({"scope": scope, "https://district.example/org": ORGANIZATION});
        let cases = [
            (with_scope(json!("hallpass:check")), "check in 1"),
            (
                with_scope(json!("hallpass:list hallpass:check openid")),
                "check,list in 1",
            ),
            (
                with_scope(json!(["hallpass:list", "hallpass:check"])),
                "check,list in 1",
            ),
            (with_scope(json!(["hallpass:list hallpass:check"])), " in 0"),
            (with_scope(json!("hallpass:checks")), " in 0"),
            (with_scope(json!("hallpass:check,hallpass:list")), " in 0"),
            (with_scope(json!("HALLPASS:CHECK")), " in 0"),
            (with_scope(json!({"hallpass:check": true})), " in 0"),
            (with_scope(json!(true)), " in 0"),
            (with_scope(json!(null)), " in 0"),
            (json!({"scope": "hallpass:check"}), "check in 0"),
            (json!({"realm": {"roles": ["auditor"]}}), "audit in all"),
            (json!({"realm": {"roles": [["auditor"]]}}), " in 0"),
            (json!({"realm.roles": "auditor"}), " in 0"),
            (json!({"roles": "auditor"}), " in 0"),
            (json!({"realm": [{"roles": "auditor"}]}), " in 0"),
            (
                json!({"scope": "hallpass:check", "realm": {"roles": "auditor"}}),
                "refused",
            ),
            (json!({}), " in 0"),
        ];
        // The order of the grants does not matter.
        let mut turned: Vec<&str> = GRANTS.split("[[grant]]").skip(1).collect();
        turned.reverse();
        let turned = format!("[[grant]]{}", turned.join("[[grant]]"));
        for (claims, expected) in cases {
            assert_eq!(granted(GRANTS, &claims), expected, "{claims}");
            assert_eq!(granted(&turned, &claims), expected, "{claims}");
        }
    }
}
