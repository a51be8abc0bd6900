//! `/v1/batch-check`: many questions at once.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};
use tonic_types::pb;
use utoipa::ToSchema;

use super::{
    Services,
    call::{Call, Json, answer},
    evidence::{Consistency, Evidence, Reason},
    failure::{Failure, FieldError, said},
};
use crate::grpc::{
    permission_service::BATCH_ITEMS_MAX,
    status,
    v1::{
        self, batch_check_permissions_result::Result as Outcome,
        permission_service_server::PermissionService,
    },
};

/// Questions.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BatchCheckRequest {
    /// Answered in this order.
    #[schema(min_items = 1, max_items = 10_000)]
    items: Vec<BatchItem>,
    #[serde(default)]
    consistency: Consistency,
}

/// One question of a batch.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BatchItem {
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
    #[schema(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7")]
    user_id: String,
    #[schema(example = "can_create_events")]
    permission: String,
}

impl From<BatchCheckRequest> for v1::BatchCheckPermissionsRequest {
    fn from(request: BatchCheckRequest) -> Self {
        let items = request
            .items
            .into_iter()
            .map(|item| v1::BatchCheckPermissionsItem {
                organization_id: item.organization_id,
                user_id: item.user_id,
                permission: item.permission,
            });
        Self {
            items: items.collect(),
            consistency: request.consistency.into_message(),
        }
    }
}

/// Decisions.
#[derive(Serialize, ToSchema)]
pub(super) struct BatchCheckAnswer {
    /// One an item, in the order of the items.
    results: Vec<BatchResult>,
    /// Of all decisions together; null where no item has one.
    evidence: Option<Evidence>,
}

/// What one item came to.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum BatchResult {
    Decision(BatchDecision),
    Error(BatchError),
}

/// The decision on one item.
#[derive(Serialize, ToSchema)]
struct BatchDecision {
    allowed: bool,
    reason: Reason,
}

/// Why an item has no decision: not an allow.
#[derive(Serialize, ToSchema)]
struct BatchError {
    /// For people.
    #[schema(example = "items[3].user_id: is missing: a hyphenated UUID")]
    error: String,
    /// For programs; does not change.
    #[schema(example = "INVALID_REQUEST")]
    code: String,
    /// The fields that are wrong, each with what is wrong with it; of the first 1,000 malformed items.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fields: Vec<FieldError>,
}

impl From<v1::BatchCheckPermissionsResponse> for BatchCheckAnswer {
    fn from(response: v1::BatchCheckPermissionsResponse) -> Self {
        let results = response.results.into_iter().map(|result| result.result);
        Self {
            results: results.map(Into::into).collect(),
            evidence: response.evidence.map(Into::into),
        }
    }
}

impl From<Option<Outcome>> for BatchResult {
    fn from(outcome: Option<Outcome>) -> Self {
        match outcome {
            Some(Outcome::Answer(answer)) => Self::Decision(BatchDecision {
                allowed: answer.allowed,
                reason: answer.reason().into(),
            }),
            Some(Outcome::Error(error)) => Self::Error(error.into()),
            // Our own handler always says something.
            None => Self::Error(status::to_message(&status::internal()).into()),
        }
    }
}

impl From<pb::Status> for BatchError {
    fn from(error: pb::Status) -> Self {
        let details = prost::Message::encode_to_vec(&error);
        let status =
            Status::with_details(Code::from_i32(error.code), error.message, details.into());
        let (code, fields) = said(&status);
        Self {
            error: status.message().to_owned(),
            code,
            fields,
        }
    }
}

/// May these users do this in these organizations?
///
/// 1 to 10,000 questions, answered from one round trip at most. An item that is malformed has an error in its place; the
/// others are answered.
#[utoipa::path(
    post,
    path = "/v1/batch-check",
    tag = "Checks",
    request_body = BatchCheckRequest,
    responses(
        (status = 200, description = "A decision or an error for each item", body = BatchCheckAnswer),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
pub(super) async fn batch_check(
    State(services): State<Services>,
    call: Call,
    Json(request): Json<BatchCheckRequest>,
) -> Result<Json<BatchCheckAnswer>, Failure> {
    if request.items.len() > BATCH_ITEMS_MAX {
        return Err(status::too_many_items(request.items.len()).into());
    }
    let request = call.with(request.into());
    answer(services.permissions.batch_check_permissions(request).await)
}
