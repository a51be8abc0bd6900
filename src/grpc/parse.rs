//! Requests parsed: ids, keys, freshness, pages. [`Fields`] collects what is wrong, so that a caller hears of every wrong
//! field at once, and holds each id against what the caller may ask about: an id is not to be had in any other way.

mod admin;
mod audit;

use std::{fmt, sync::Arc, time::Duration};

use tonic::{Request, Status};
use tonic_types::FieldViolation;
use uuid::Uuid;

use super::{status, v1};
use crate::{
    auth::{Caller, Forbidden, standing::Standing},
    check::Freshness,
    model::{OrganizationId, Position, Subject, UserId},
    store::lists::PageBounds,
};

pub(super) use admin::{Change, Origin};
pub(super) use audit::{AuditQuery, AuditStart};

/// Bytes of a permission key or module name.
const KEY_BYTES_MAX: usize = 255;

/// Bytes of user input that a message repeats.
const SHOWN_BYTES_MAX: usize = 64;

/// Wrong fields that a status names: they travel in its headers, of which many clients take 8 KiB.
const VIOLATIONS_MAX: usize = 16;

/// Rows of a page whose size is left to us.
const PAGE_SIZE_DEFAULT: u16 = 100;

/// Rows of a page, well within the 4 MiB that clients take and the statement's time.
const PAGE_SIZE_MAX: u16 = 1_000;

/// Who sent a request: the gate has put it there, or the request has not come through the gate.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Arc<Caller>, Status> {
    let caller = request.extensions().get::<Arc<Caller>>();
    caller.cloned().ok_or_else(status::no_caller)
}

/// Whether who sent a request may go on with it: put there by the gate, too.
pub(super) fn standing<T>(request: &Request<T>) -> Result<Standing, Status> {
    let standing = request.extensions().get::<Standing>();
    standing.cloned().ok_or_else(status::no_caller)
}

/// The fields of one request (or of one item of a batch) as they are read.
pub(super) struct Fields<'a> {
    pub(super) caller: &'a Caller,
    violations: Vec<FieldViolation>,
    forbidden: Option<Forbidden>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(caller: &'a Caller) -> Self {
        Self {
            caller,
            violations: Vec::new(),
            forbidden: None,
        }
    }

    /// What was asked for, if every field fits and the caller may ask for it.
    pub(super) fn all_fit<T>(self, asked: Option<T>) -> Result<T, Status> {
        match (asked, self.forbidden) {
            // What is malformed is nobody's, and says nothing of what exists.
            _ if !self.violations.is_empty() => Err(status::invalid(self.violations)),
            (_, Some(forbidden)) => Err(status::forbidden(forbidden)),
            (Some(asked), None) => Ok(asked),
            (None, None) => Err(status::invalid(self.violations)),
        }
    }

    /// One of the first that are wrong, or it is left out.
    pub(super) fn violation(&mut self, field: impl Into<String>, description: impl Into<String>) {
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations
                .push(FieldViolation::new(field, description));
        }
    }

    fn allow<T>(&mut self, asked: T, allowed: Result<(), Forbidden>) -> Option<T> {
        match allowed {
            Ok(()) => Some(asked),
            Err(forbidden) => {
                self.forbidden = Some(forbidden);
                None
            }
        }
    }

    /// Parses both ids, so that a caller hears of both when both are wrong.
    pub(super) fn subject(
        &mut self,
        prefix: impl fmt::Display,
        organization: &str,
        user: &str,
    ) -> Option<Subject> {
        let organization = self.id(format_args!("{prefix}organization_id"), organization);
        let user = self.id(format_args!("{prefix}user_id"), user);
        let subject = Subject {
            organization: OrganizationId(organization?),
            user: UserId(user?),
        };
        self.allow(subject, self.caller.may_ask_about(subject))
    }

    /// An organization that is asked about as a whole.
    pub(super) fn organization(&mut self, value: &str) -> Option<OrganizationId> {
        let organization = OrganizationId(self.id(format_args!("organization_id"), value)?);
        self.allow(organization, self.caller.may_ask_about_all_of(organization))
    }

    /// A user that is asked about in all organizations that the caller may ask about.
    pub(super) fn user(&mut self, value: &str) -> Option<UserId> {
        let user = UserId(self.id(format_args!("user_id"), value)?);
        self.allow(user, self.caller.may_ask_about_user(user))
    }

    fn page_size(&mut self, size: i32) -> u16 {
        if size < 0 {
            self.violation("page_size", format!("must be 0 or more, not {size}"));
        }
        match u16::try_from(size) {
            Ok(0) => PAGE_SIZE_DEFAULT,
            Ok(size) => size.min(PAGE_SIZE_MAX),
            Err(_) => PAGE_SIZE_MAX,
        }
    }

    fn optional_id(&mut self, field: &str, value: &str) -> Option<Uuid> {
        if value.is_empty() {
            return None;
        }
        self.id(format_args!("{field}"), value)
    }

    fn id(&mut self, field: fmt::Arguments<'_>, value: &str) -> Option<Uuid> {
        let id = uuid(value);
        if id.is_none() {
            let complaint = match value {
                "" => "is missing: a hyphenated UUID".to_owned(),
                _ => format!("must be a hyphenated UUID, not `{}`", shown(value)),
            };
            self.violation(field.to_string(), complaint);
        }
        id
    }

    /// A permission's or a module's key, as far as PostgreSQL can hold it.
    pub(super) fn key(&mut self, field: fmt::Arguments<'_>, key: &str) {
        if let Some(complaint) = wrong_key(key) {
            self.violation(field.to_string(), complaint);
        }
    }

    /// The mode asked for; `staleness_ceiling` is the most that `max_staleness` may be.
    pub(super) fn freshness(
        &mut self,
        consistency: Option<v1::Consistency>,
        staleness_ceiling: Duration,
    ) -> Freshness {
        use v1::consistency::Requirement;
        let Some(consistency) = consistency else {
            return Freshness::MinimizeLatency;
        };
        match consistency.requirement {
            Some(Requirement::MinimizeLatency(true)) => {}
            Some(Requirement::FullyConsistent(true)) => return Freshness::FullyConsistent,
            Some(Requirement::MaxStaleness(max)) => match duration(max) {
                Some(max) if max <= staleness_ceiling => return Freshness::MaxStaleness(max),
                _ => self.violation(
                    "consistency.max_staleness",
                    format!("must be from 0 to {staleness_ceiling:?}, this server's ceiling"),
                ),
            },
            Some(Requirement::AtLeastAsFresh(text)) => match text.parse() {
                // Every answer is.
                Ok(Position::ZERO) => {}
                Ok(position) => return Freshness::AtLeastAsFresh(position),
                Err(error) => self.violation(
                    "consistency.at_least_as_fresh",
                    format!(
                        "{error}: not a position such as `812-5f0c9ae1`: `{}`",
                        shown(&text)
                    ),
                ),
            },
            Some(Requirement::MinimizeLatency(false)) => {
                self.violation("consistency.minimize_latency", "must be true when set");
            }
            Some(Requirement::FullyConsistent(false)) => {
                self.violation("consistency.fully_consistent", "must be true when set");
            }
            None => self.violation("consistency", "holds no requirement that this server knows"),
        }
        Freshness::MinimizeLatency
    }

    /// The page asked for. Without a query, which is malformed then, a token is judged by its form alone.
    pub(super) fn page(
        &mut self,
        size: i32,
        token: &str,
        query: Option<&PagedQuery<'_>>,
    ) -> PageBounds {
        let size = self.page_size(size);
        let first = match token_parts(token) {
            _ if token.is_empty() => Uuid::nil(),
            None => {
                self.violation("page_token", "is no token of this service");
                Uuid::nil()
            }
            Some((digest, _)) if query.is_some_and(|query| query.digest() != digest) => {
                self.violation("page_token", "belongs to another query");
                Uuid::nil()
            }
            Some((_, first)) => first,
        };
        PageBounds { first, size }
    }
}

/// Only the hyphenated form: it is what PostgreSQL prints, and one id must not have two spellings in a log.
pub(super) fn uuid(value: &str) -> Option<Uuid> {
    const HYPHENATED: usize = uuid::fmt::Hyphenated::LENGTH;
    let id = Uuid::try_parse(value).ok();
    id.filter(|_| value.len() == HYPHENATED)
}

/// What is wrong with a permission's or a module's key, if anything is.
pub(super) fn wrong_key(key: &str) -> Option<String> {
    match key.len() {
        1..=KEY_BYTES_MAX if key.contains('\0') => {
            Some("must not contain a NUL character".to_owned())
        }
        1..=KEY_BYTES_MAX => None,
        found => Some(format!("must be 1 to {KEY_BYTES_MAX} bytes, not {found}")),
    }
}

/// User input for a message: short and on one line.
fn shown(value: &str) -> String {
    let mut shown = String::new();
    for c in value.escape_debug() {
        if shown.len() + c.len_utf8() > SHOWN_BYTES_MAX {
            break;
        }
        shown.push(c);
    }
    shown
}

/// A duration in the form that protobuf gives it, which no other value has.
fn duration(value: prost_types::Duration) -> Option<Duration> {
    let nanos = u32::try_from(value.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(u64::try_from(value.seconds).ok()?, nanos))
}

pub(super) fn parse_item(
    caller: &Caller,
    index: usize,
    item: &v1::BatchCheckPermissionsItem,
) -> Result<Subject, Status> {
    let mut fields = Fields::new(caller);
    let prefix = format_args!("items[{index}].");
    let subject = fields.subject(prefix, &item.organization_id, &item.user_id);
    fields.key(format_args!("{prefix}permission"), &item.permission);
    fields.all_fit(subject)
}

/// The query that a page belongs to: what must be the same from page to page.
pub(super) struct PagedQuery<'a> {
    pub(super) call: &'static str,
    pub(super) id: Uuid,
    pub(super) key: &'a str,
}

impl PagedQuery<'_> {
    fn digest(&self) -> u128 {
        let mut hasher = blake3::Hasher::new();
        // The only part that has no fixed length comes last, and calls hold no NUL.
        hasher
            .update(self.call.as_bytes())
            .update(&[0])
            .update(self.id.as_bytes())
            .update(self.key.as_bytes());
        let mut digest = [0; 16];
        hasher.finalize_xof().fill(&mut digest);
        u128::from_be_bytes(digest)
    }

    /// The token of the page of this query that begins with the id `first`.
    ///
    /// Not signed: whoever makes one up gets a page that it may have asked for anyway.
    pub(super) fn token(&self, first: Uuid) -> String {
        format!(
            "{TOKEN_VERSION}{:032x}{:032x}",
            self.digest(),
            first.as_u128()
        )
    }
}

/// Leads a token. Another version would have another form.
const TOKEN_VERSION: char = '1';

/// The digest of the query and the first id.
fn token_parts(token: &str) -> Option<(u128, Uuid)> {
    let digits = token.strip_prefix(TOKEN_VERSION)?;
    // The parser would take a sign and capitals too.
    let is_hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 64 || !digits.bytes().all(is_hex) {
        return None;
    }
    let (digest, first) = digits.split_at(32);
    let number = |hex| u128::from_str_radix(hex, 16).ok();
    Some((number(digest)?, Uuid::from_u128(number(first)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: PagedQuery<'_> = PagedQuery {
        call: "List",
        id: Uuid::from_u128(7),
        key: "can_view",
    };

    fn complaint(size: i32, token: &str) -> Result<PageBounds, String> {
        let caller = Caller::anyone();
        let mut fields = Fields::new(&caller);
        let bounds = fields.page(size, token, Some(&QUERY));
        match fields.violations.pop() {
            None => Ok(bounds),
            Some(violation) => Err(violation.field),
        }
    }

    #[test]
    fn a_token_leads_to_its_page_and_only_in_its_query() {
        for first in [Uuid::nil(), Uuid::from_u128(0xabc), Uuid::max()] {
            let bounds = complaint(0, &QUERY.token(first)).unwrap();
            assert_eq!(bounds.first, first);
        }
        let others = [
            PagedQuery {
                call: "Lis",
                ..QUERY
            },
            PagedQuery {
                id: Uuid::from_u128(8),
                ..QUERY
            },
            PagedQuery {
                key: "can_vie",
                ..QUERY
            },
        ];
        for other in others {
            let token = other.token(Uuid::from_u128(1));
            assert_eq!(complaint(0, &token), Err("page_token".to_owned()));
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let token = QUERY.token(Uuid::from_u128(0xabc));
        let garbage = [
            " ".to_owned(),
            "1".to_owned(),
            token[1..].to_owned(),
            format!("2{}", &token[1..]),
            token[..64].to_owned(),
            format!("{token}0"),
            token.to_uppercase(),
            format!("1+{}", &token[2..]),
            "é".repeat(33),
        ];
        for garbage in garbage {
            assert_eq!(
                complaint(0, &garbage),
                Err("page_token".to_owned()),
                "{garbage}"
            );
        }
    }

    #[test]
    fn a_size_is_100_unless_it_is_given_and_1000_at_most() {
        for (asked, size) in [
            (0, 100),
            (1, 1),
            (1_000, 1_000),
            (1_001, 1_000),
            (i32::MAX, 1_000),
        ] {
            assert_eq!(complaint(asked, "").unwrap().size, size);
        }
        assert_eq!(complaint(-1, ""), Err("page_size".to_owned()));
    }
}
