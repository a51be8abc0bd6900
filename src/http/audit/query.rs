//! What can be asked of the audit log behind the question mark.

use axum::http::HeaderValue;
use prost_types::Timestamp;
use serde::Deserialize;
use utoipa::IntoParams;

use super::entry::ChangeType;
use crate::{
    grpc::v1::{self, stream_audit_entries_request::Start},
    http::failure::Failure,
};

/// A page: the fields of a filter, and which.
#[derive(Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct ListQuery {
    /// Entries of this organization.
    #[param(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11", required = false)]
    organization_id: String,
    /// Changes of this user's membership.
    #[param(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7", required = false)]
    affected_user_id: String,
    /// Changes that this user made, as far as the application said so.
    #[param(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7", required = false)]
    actor_user_id: String,
    /// Changes of this permission's template or of an organization's setting for it.
    #[param(example = "can_create_events", required = false)]
    permission: String,
    /// Changes of this table.
    #[param(example = "organization_permissions", required = false)]
    table: String,
    /// Changes of this kind.
    #[param(example = "UPDATE")]
    change_type: Option<ChangeType>,
    /// 100 without it, or with 0. A greater one than 1,000 counts as 1,000.
    #[param(example = 100, minimum = 0, required = false)]
    page_size: i32,
    /// `next_page_token` of the page before.
    #[param(required = false)]
    page_token: String,
}

impl From<ListQuery> for v1::ListAuditEntriesRequest {
    fn from(query: ListQuery) -> Self {
        Self {
            filter: Some(v1::AuditFilter {
                organization_id: query.organization_id,
                affected_user_id: query.affected_user_id,
                actor_user_id: query.actor_user_id,
                permission: query.permission,
                table: query.table,
                change_type: change_type(query.change_type),
            }),
            page_size: query.page_size,
            page_token: query.page_token,
        }
    }
}

/// A stream: the fields of a filter, and one of `cursor`, `earliest`, `now` and `since`.
#[derive(Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct StreamQuery {
    /// Begin after this: the id of an event, or a position.
    #[param(example = "812-5f0c9ae1.20")]
    cursor: Option<String>,
    /// Begin with the earliest entry that is kept.
    #[param(example = true)]
    earliest: Option<bool>,
    /// Begin with the next that is committed.
    #[param(example = true)]
    now: Option<bool>,
    /// Begin with the first that was committed at or after this time.
    #[param(format = DateTime, example = "2026-05-01T00:00:00Z")]
    since: Option<String>,
    /// Entries of this organization.
    #[param(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11", required = false)]
    organization_id: String,
    /// Changes of this user's membership.
    #[param(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7", required = false)]
    affected_user_id: String,
    /// Changes that this user made, as far as the application said so.
    #[param(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7", required = false)]
    actor_user_id: String,
    /// Changes of this permission's template or of an organization's setting for it.
    #[param(example = "can_create_events", required = false)]
    permission: String,
    /// Changes of this table.
    #[param(example = "organization_permissions", required = false)]
    table: String,
    /// Changes of this kind.
    #[param(example = "UPDATE")]
    change_type: Option<ChangeType>,
}

impl StreamQuery {
    /// `last_event_id` wins over where the query says to begin: the query is as old as the page that it stands in.
    pub(super) fn into_message(
        self,
        last_event_id: Option<&HeaderValue>,
    ) -> Result<v1::StreamAuditEntriesRequest, Failure> {
        let start = match last_event_id.filter(|id| !id.is_empty()) {
            None => self.start()?,
            Some(id) => match id.to_str() {
                Ok(id) => Some(Start::Cursor(id.to_owned())),
                Err(_) => return Err(Failure::malformed("Last-Event-ID", "is no cursor")),
            },
        };
        Ok(v1::StreamAuditEntriesRequest {
            start,
            filter: Some(v1::AuditFilter {
                organization_id: self.organization_id,
                affected_user_id: self.affected_user_id,
                actor_user_id: self.actor_user_id,
                permission: self.permission,
                table: self.table,
                change_type: change_type(self.change_type),
            }),
        })
    }

    fn start(&self) -> Result<Option<Start>, Failure> {
        let since = match self.since.as_deref().map(str::parse::<Timestamp>) {
            None => None,
            Some(Ok(time)) => Some(Start::Since(time)),
            Some(Err(_)) => {
                let complaint = "must be a time such as `2026-05-01T00:00:00Z`";
                return Err(Failure::malformed("since", complaint));
            }
        };
        let mut starts = [
            self.cursor.clone().map(Start::Cursor),
            self.earliest.map(Start::Earliest),
            self.now.map(Start::Now),
            since,
        ]
        .into_iter()
        .flatten();
        match (starts.next(), starts.next()) {
            (start, None) => Ok(start),
            (_, Some(_)) => {
                let complaint = "must be one of cursor, earliest, now and since";
                Err(Failure::malformed("start", complaint))
            }
        }
    }
}

fn change_type(asked: Option<ChangeType>) -> i32 {
    asked
        .map_or(v1::ChangeType::Unspecified, ChangeType::message)
        .into()
}
