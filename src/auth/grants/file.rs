//! The grants file's form. A reader takes what it knows out of a table, and whatever is left or does not fit is a mistake
//! with its line; nothing is guessed, and nothing is skipped.

use std::{collections::HashMap, fmt::Write as _, ops::Range, str::FromStr, sync::Arc};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{ClaimPath, GrantedOrganizations, Grants, Reach, TokenGrant, hyphenated};
use crate::{
    auth::{Caller, Identity, Organizations, Scope, Scopes},
    model::OrganizationId,
};

const FIELDS: &str = "claim, value, certificate, scopes, organizations, only_own_user";

const ORGANIZATIONS: &str = "must be \"all\", a list of hyphenated UUIDs, or { claim = \"NAME\" }";

const CLAIM: &str =
    "must be a claim's name, NAME.NAME for one inside another, or a list of such names";

type Value<'a> = Spanned<DeValue<'a>>;

/// Who a grant is for.
enum Holder {
    Token { claim: ClaimPath, value: Box<str> },
    Certificate(Box<str>),
}

/// The mistakes found so far, with where they begin.
#[derive(Default)]
struct Mistakes(Vec<(usize, String)>);

impl Mistakes {
    fn add(&mut self, span: &Range<usize>, message: impl Into<String>) {
        self.0.push((span.start, message.into()));
    }

    /// `line 3: …; line 7: …`
    fn report(mut self, text: &str) -> String {
        self.0.sort_by_key(|(at, _)| *at);
        let mut report = String::new();
        for (at, message) in self.0 {
            let line = 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
            let separator = if report.is_empty() { "" } else { "; " };
            // Writing to a string cannot fail.
            let _ = write!(report, "{separator}line {line}: {message}");
        }
        report
    }
}

pub(super) fn parse(text: &str) -> Result<Grants, String> {
    let mut mistakes = Mistakes::default();
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let message = error.message().escape_debug().to_string();
        mistakes.add(&error.span().unwrap_or_default(), message);
    }
    let mut grants = Grants::default();
    if mistakes.0.is_empty() {
        read_document(document.get_ref(), &mut grants, &mut mistakes);
    }
    if mistakes.0.is_empty() {
        Ok(grants)
    } else {
        Err(mistakes.report(text))
    }
}

fn read_document(document: &DeTable<'_>, grants: &mut Grants, mistakes: &mut Mistakes) {
    for (key, value) in document {
        match value.get_ref().as_array() {
            Some(entries) if key.get_ref() == "grant" => {
                for entry in entries.iter() {
                    read_grant(entry, grants, mistakes);
                }
            }
            _ => mistakes.add(
                &key.span(),
                format!("`{}`: expected [[grant]]", key.get_ref().escape_debug()),
            ),
        }
    }
}

fn read_grant(entry: &Value<'_>, grants: &mut Grants, mistakes: &mut Mistakes) {
    let Some(table) = entry.get_ref().as_table() else {
        return mistakes.add(&entry.span(), "expected a table [[grant]]");
    };
    let (mut claim, mut value, mut certificate) = (None, None, None);
    let (mut scopes, mut organizations, mut only_own_user) = (None, None, None);
    for (key, found) in table {
        let field = match &**key.get_ref() {
            "claim" => &mut claim,
            "value" => &mut value,
            "certificate" => &mut certificate,
            "scopes" => &mut scopes,
            "organizations" => &mut organizations,
            "only_own_user" => &mut only_own_user,
            unknown => {
                let unknown = unknown.escape_debug();
                mistakes.add(&key.span(), format!("`{unknown}` is none of {FIELDS}"));
                continue;
            }
        };
        *field = Some(found);
    }
    let own = only_own_user.map_or(Some(false), |value| flag(value, mistakes));
    let holder = holder(entry, (claim, value, certificate), mistakes);
    let scopes = require("scopes", scopes, entry, mistakes)
        .and_then(|value| read_scopes(value, own == Some(true), mistakes));
    let organizations = require("organizations", organizations, entry, mistakes)
        .and_then(|value| read_organizations(value, mistakes));
    let (Some(only_own_user), Some(holder), Some(scopes), Some(organizations)) =
        (own, holder, scopes, organizations)
    else {
        return;
    };
    match holder {
        Holder::Token { claim, value } => grants.tokens.push(TokenGrant {
            claim,
            value,
            scopes,
            reach: Reach {
                organizations,
                only_own_user,
            },
        }),
        Holder::Certificate(_) if only_own_user => {
            mistakes.add(&entry.span(), "only_own_user: a certificate is no user's");
        }
        Holder::Certificate(name) => match organizations {
            GrantedOrganizations::Claim(_) => {
                mistakes.add(&entry.span(), "organizations: a certificate has no claims");
            }
            GrantedOrganizations::Fixed(organizations) => {
                if let Err(name) =
                    add_certificate(&mut grants.certificates, name, scopes, organizations)
                {
                    let message = format!(
                        "`{}` has another grant, for other organizations",
                        name.escape_debug()
                    );
                    mistakes.add(&entry.span(), message);
                }
            }
        },
    }
}

/// Adds up the scopes of grants for the same name; gives the name back where they are for other organizations.
fn add_certificate(
    certificates: &mut HashMap<Box<str>, Arc<Caller>>,
    name: Box<str>,
    scopes: Scopes,
    organizations: Organizations,
) -> Result<(), Box<str>> {
    let former = certificates.get(&name);
    if former.is_some_and(|former| former.organizations != organizations) {
        return Err(name);
    }
    let former = former.map_or_else(Scopes::default, |former| former.scopes);
    let caller = Caller {
        identity: Identity::Certificate((*name).into()),
        scopes: former.iter().chain(scopes.iter()).collect(),
        organizations,
        only_user: None,
    };
    certificates.insert(name, Arc::new(caller));
    Ok(())
}

fn require<'a, 'i>(
    field: &str,
    value: Option<&'a Value<'i>>,
    entry: &Value<'_>,
    mistakes: &mut Mistakes,
) -> Option<&'a Value<'i>> {
    if value.is_none() {
        mistakes.add(&entry.span(), format!("{field} is missing"));
    }
    value
}

type Found<'a, 'i> = Option<&'a Value<'i>>;

fn holder(
    entry: &Value<'_>,
    found: (Found<'_, '_>, Found<'_, '_>, Found<'_, '_>),
    mistakes: &mut Mistakes,
) -> Option<Holder> {
    match found {
        (Some(claim), Some(value), None) => {
            let claim = read_claim(claim, "claim", CLAIM, mistakes);
            let value = text(value, "value", mistakes);
            Some(Holder::Token {
                claim: claim?,
                value: value?,
            })
        }
        (None, None, Some(certificate)) => {
            text(certificate, "certificate", mistakes).map(Holder::Certificate)
        }
        _ => {
            mistakes.add(&entry.span(), "needs claim and value, or certificate alone");
            None
        }
    }
}

fn text(value: &Value<'_>, field: &str, mistakes: &mut Mistakes) -> Option<Box<str>> {
    let found = value.get_ref().as_str().filter(|text| !text.is_empty());
    if found.is_none() {
        mistakes.add(
            &value.span(),
            format!("{field} must be a string, not empty"),
        );
    }
    found.map(Into::into)
}

fn flag(value: &Value<'_>, mistakes: &mut Mistakes) -> Option<bool> {
    let found = value.get_ref().as_bool();
    if found.is_none() {
        mistakes.add(&value.span(), "only_own_user must be true or false");
    }
    found
}

/// `"a.b"` leads to `b` inside of `a`; a list holds names that may have dots themselves, as URLs do.
fn read_claim(
    value: &Value<'_>,
    field: &str,
    expected: &str,
    mistakes: &mut Mistakes,
) -> Option<ClaimPath> {
    let names: Option<Box<[Box<str>]>> = match value.get_ref() {
        DeValue::String(path) => Some(path.split('.').map(Into::into).collect()),
        DeValue::Array(names) => names
            .iter()
            .map(|name| name.get_ref().as_str().map(Into::into))
            .collect(),
        _ => None,
    };
    let names =
        names.filter(|names| !names.is_empty() && names.iter().all(|name| !name.is_empty()));
    if names.is_none() {
        mistakes.add(&value.span(), format!("{field} {expected}"));
    }
    names.map(ClaimPath)
}

fn read_scopes(value: &Value<'_>, is_own_users: bool, mistakes: &mut Mistakes) -> Option<Scopes> {
    let listed = value
        .get_ref()
        .as_array()
        .filter(|listed| !listed.is_empty());
    let Some(listed) = listed else {
        mistakes.add(&value.span(), "scopes must be a list, not empty");
        return None;
    };
    let before = mistakes.0.len();
    let mut scopes = Vec::new();
    for scope in listed.iter() {
        match scope.get_ref().as_str().map(Scope::from_str) {
            // The other scopes are not about a user.
            Some(Ok(scope_found))
                if is_own_users && !matches!(scope_found, Scope::Check | Scope::List) =>
            {
                let message = format!(
                    "only_own_user goes with check and list, not with `{}`",
                    scope_found.name()
                );
                mistakes.add(&scope.span(), message);
            }
            Some(Ok(scope)) => scopes.push(scope),
            Some(Err(error)) => mistakes.add(&scope.span(), error),
            None => mistakes.add(&scope.span(), "a scope must be a string"),
        }
    }
    (mistakes.0.len() == before).then(|| scopes.into_iter().collect())
}

fn read_organizations(value: &Value<'_>, mistakes: &mut Mistakes) -> Option<GrantedOrganizations> {
    let found = match value.get_ref() {
        DeValue::String(all) if all == "all" => Some(Organizations::All),
        DeValue::Array(ids) => {
            let ids: Option<Vec<OrganizationId>> = ids
                .iter()
                .map(|id| {
                    id.get_ref()
                        .as_str()
                        .and_then(hyphenated)
                        .map(OrganizationId)
                })
                .collect();
            ids.map(Organizations::only)
        }
        DeValue::Table(table) => {
            let claim = table.iter().find(|(key, _)| key.get_ref() == "claim");
            if let (Some((_, claim)), 1) = (claim, table.len()) {
                let path = read_claim(claim, "organizations: claim", CLAIM, mistakes);
                return path.map(GrantedOrganizations::Claim);
            }
            None
        }
        _ => None,
    };
    if found.is_none() {
        mistakes.add(&value.span(), format!("organizations {ORGANIZATIONS}"));
    }
    found.map(GrantedOrganizations::Fixed)
}
