//! Requests for audit entries: a filter held against what the caller may read, where a stream begins, which page of a list.

use std::time::{Duration, SystemTime};

use super::{Fields, TOKEN_VERSION, shown};
use crate::{
    grpc::v1,
    model::{Cursor, OrganizationId},
    store::audit::{AuditFilter, list::ListKey},
};

/// The seconds that a protobuf timestamp may have; PostgreSQL's times go further.
const TIMES: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// Where a stream of audit entries begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::grpc) enum AuditStart {
    After(Cursor),
    Earliest,
    Now,
    Since(SystemTime),
}

impl Fields<'_> {
    /// Which audit entries a caller asks for: those of the organizations that it may ask about, if it names none.
    pub(in crate::grpc) fn audit_filter(
        &mut self,
        filter: Option<v1::AuditFilter>,
    ) -> Option<AuditFilter> {
        let filter = filter.unwrap_or_default();
        let organization = (!filter.organization_id.is_empty()).then(|| {
            self.id(
                format_args!("filter.organization_id"),
                &filter.organization_id,
            )
        });
        let affected_user = self.optional_id("filter.affected_user_id", &filter.affected_user_id);
        let actor = self.optional_id("filter.actor_user_id", &filter.actor_user_id);
        for (field, key) in [
            ("filter.permission", &filter.permission),
            ("filter.table", &filter.table),
        ] {
            if !key.is_empty() {
                self.key(format_args!("{field}"), key);
            }
        }
        let change_type = match v1::ChangeType::try_from(filter.change_type) {
            Ok(v1::ChangeType::Unspecified) => None,
            Ok(known) => known.as_str_name().strip_prefix("CHANGE_TYPE_"),
            Err(_) => {
                self.violation(
                    "filter.change_type",
                    "is no change type that this server knows",
                );
                None
            }
        };
        let organization = match organization {
            Some(organization) => Some(OrganizationId(organization?)),
            None => None,
        };
        let filter = AuditFilter {
            organizations: match organization {
                Some(organization) => Some(vec![organization.0]),
                None => (self.caller.organizations.listed())
                    .map(|listed| listed.iter().map(|organization| organization.0).collect()),
            },
            affected_user,
            actor,
            permission: Some(filter.permission).filter(|key| !key.is_empty()),
            table: Some(filter.table).filter(|table| !table.is_empty()),
            change_type: change_type.map(str::to_owned),
        };
        self.allow(filter, self.caller.may_audit(organization))
    }

    /// The page asked for. Without a query, which is malformed then, a token is judged by its form alone.
    pub(in crate::grpc) fn audit_page(
        &mut self,
        size: i32,
        token: &str,
        query: Option<&AuditQuery<'_>>,
    ) -> AuditPageBounds {
        let size = self.page_size(size);
        let after = match audit_token_parts(token) {
            _ if token.is_empty() => None,
            None => {
                self.violation("page_token", "is no token of this service");
                None
            }
            Some((digest, _)) if query.is_some_and(|query| query.digest() != digest) => {
                self.violation("page_token", "belongs to another query");
                None
            }
            Some((_, key)) => Some(key),
        };
        AuditPageBounds { after, size }
    }

    /// Where a stream of audit entries begins.
    pub(in crate::grpc) fn audit_start(
        &mut self,
        start: Option<v1::stream_audit_entries_request::Start>,
    ) -> Option<AuditStart> {
        use v1::stream_audit_entries_request::Start;
        match start {
            Some(Start::Cursor(text)) => match text.parse() {
                Ok(cursor) => return Some(AuditStart::After(cursor)),
                Err(error) => {
                    let text = shown(&text);
                    let complaint =
                        format!("{error}: not a cursor such as `812-5f0c9ae1.20`: `{text}`");
                    self.violation("cursor", complaint);
                }
            },
            Some(Start::Earliest(true)) => return Some(AuditStart::Earliest),
            Some(Start::Now(true)) => return Some(AuditStart::Now),
            Some(Start::Since(time)) => match SystemTime::try_from(time) {
                Ok(at) if TIMES.contains(&time.seconds) => return Some(AuditStart::Since(at)),
                _ => self.violation("since", "must be from the year 1 to the year 9999"),
            },
            Some(Start::Earliest(false)) => self.violation("earliest", "must be true when set"),
            Some(Start::Now(false)) => self.violation("now", "must be true when set"),
            None => self.violation("start", "is missing: a cursor, earliest, now or since"),
        }
        None
    }
}

/// The filter that a page of audit entries belongs to.
pub(in crate::grpc) struct AuditQuery<'a>(pub(in crate::grpc) &'a AuditFilter);

/// A page of audit entries.
pub(in crate::grpc) struct AuditPageBounds {
    pub(in crate::grpc) after: Option<ListKey>,
    pub(in crate::grpc) size: u16,
}

impl AuditQuery<'_> {
    fn digest(&self) -> String {
        // Debug tells every two filters apart: it quotes what it prints.
        let filter = format!("{:?}", self.0);
        blake3::hash(filter.as_bytes()).to_hex()[..32].to_owned()
    }

    /// The token of the page behind `key`. Not signed, as those of other lists.
    pub(in crate::grpc) fn token(&self, key: ListKey) -> String {
        let since_epoch = key.transaction_time.duration_since(SystemTime::UNIX_EPOCH);
        // PostgreSQL's times are whole microseconds.
        let micros = since_epoch.map_or(0, |time| time.as_micros());
        format!(
            "{TOKEN_VERSION}{}{micros:016x}{:016x}{:08x}",
            self.digest(),
            key.entry_id,
            key.row
        )
    }
}

/// The digest of the filter and the key.
fn audit_token_parts(token: &str) -> Option<(&str, ListKey)> {
    let digits = token.strip_prefix(TOKEN_VERSION)?;
    let is_hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 72 || !digits.bytes().all(is_hex) {
        return None;
    }
    let number = |hex: &str| i64::from_str_radix(hex, 16).ok();
    let micros = u64::try_from(number(&digits[32..48])?).ok()?;
    let key = ListKey {
        transaction_time: SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(micros))?,
        entry_id: number(&digits[48..64])?,
        row: i32::try_from(number(&digits[64..])?).ok()?,
    };
    Some((&digits[..32], key))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use uuid::Uuid;

    use super::*;
    use crate::{
        auth::{Caller, Identity, Organizations, Scope},
        model::UserId,
    };

    fn caller(organizations: Organizations, only_user: Option<UserId>) -> Caller {
        Caller {
            identity: Identity::Anyone,
            scopes: [Scope::Audit].into_iter().collect(),
            organizations,
            only_user,
        }
    }

    /// The organizations whose entries a caller gets.
    fn reads(caller: &Caller, asked: Option<Uuid>) -> Result<Option<Vec<Uuid>>, Code> {
        let mut fields = Fields::new(caller);
        let filter = fields.audit_filter(Some(v1::AuditFilter {
            organization_id: asked.map_or(String::new(), |id| id.to_string()),
            ..v1::AuditFilter::default()
        }));
        let filter = fields.all_fit(filter).map_err(|status| status.code())?;
        Ok(filter.organizations)
    }

    #[test]
    fn a_caller_reads_the_entries_of_its_organizations_alone() {
        let [own, other, foreign] = [1, 2, 3].map(Uuid::from_u128);
        let all = caller(Organizations::All, None);
        assert_eq!(reads(&all, None), Ok(None));
        assert_eq!(reads(&all, Some(foreign)), Ok(Some(vec![foreign])));
        let some = [other, own].map(OrganizationId);
        let some = caller(Organizations::only(some), None);
        assert_eq!(reads(&some, None), Ok(Some(vec![own, other])));
        assert_eq!(reads(&some, Some(own)), Ok(Some(vec![own])));
        assert_eq!(reads(&some, Some(foreign)), Err(Code::PermissionDenied));
        let none = caller(Organizations::only([]), None);
        assert_eq!(reads(&none, None), Ok(Some(vec![])));
        // A user's own token: the audit log says what others did.
        let user = caller(
            Organizations::only([OrganizationId(own)]),
            Some(UserId(own)),
        );
        for asked in [None, Some(own)] {
            assert_eq!(reads(&user, asked), Err(Code::PermissionDenied));
        }
    }

    #[test]
    fn a_token_leads_on_in_its_filter() {
        let filter = AuditFilter {
            actor: Some(Uuid::from_u128(7)),
            ..AuditFilter::default()
        };
        let key = ListKey {
            transaction_time: SystemTime::UNIX_EPOCH + Duration::from_micros(1_777_627_800_123_456),
            entry_id: i64::MAX,
            row: i32::MAX,
        };
        let token = AuditQuery(&filter).token(key);
        let (digest, parsed) = audit_token_parts(&token).unwrap();
        assert_eq!(parsed, key);
        assert_eq!(digest, AuditQuery(&filter).digest());
        assert_ne!(digest, AuditQuery(&AuditFilter::default()).digest());
    }
}
