//! What a change did, or would do.

use serde::Serialize;
use utoipa::ToSchema;

use super::shapes::Setting;
use crate::grpc::v1;

/// What every change is answered with.
#[derive(Serialize, ToSchema)]
struct Outcome {
    /// Always: what did not succeed is an error.
    success: bool,
    /// Behind which the change is, for `at_least_as_fresh`; not with `validate_only`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "812-5f0c9ae1")]
    position: Option<String>,
    /// With `validate_only`: who would gain or lose what, by permission.
    #[serde(skip_serializing_if = "Option::is_none")]
    preview: Option<Preview>,
}

/// What a change would do.
#[derive(Serialize, ToSchema)]
struct Preview {
    /// The first 1,000, by permission.
    effects: Vec<Effect>,
    /// How many there are, listed or not.
    effect_count: i64,
}

/// How many users would gain or lose one permission.
#[derive(Serialize, ToSchema)]
struct Effect {
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
    #[schema(example = "can_approve_expenses")]
    permission_key: String,
    #[schema(example = 54)]
    gained: i64,
    #[schema(example = 0)]
    lost: i64,
    /// The first of them by id, up to 100; of the first 100 effects alone.
    gaining_users: Vec<String>,
    /// As `gaining_users`.
    losing_users: Vec<String>,
}

impl From<Option<v1::ChangeOutcome>> for Outcome {
    fn from(outcome: Option<v1::ChangeOutcome>) -> Self {
        let outcome = outcome.unwrap_or_default();
        // A change has a position, a try has none.
        let preview = outcome.position.is_empty().then(|| Preview {
            effects: outcome.effects.into_iter().map(Into::into).collect(),
            effect_count: outcome.effect_count,
        });
        Self {
            success: true,
            position: Some(outcome.position).filter(|position| !position.is_empty()),
            preview,
        }
    }
}

impl From<v1::PermissionEffect> for Effect {
    fn from(effect: v1::PermissionEffect) -> Self {
        Self {
            organization_id: effect.organization_id,
            permission_key: effect.permission,
            gained: effect.gained,
            lost: effect.lost,
            gaining_users: effect.gaining_user_ids,
            losing_users: effect.losing_user_ids,
        }
    }
}

/// A setting that was put.
#[derive(Serialize, ToSchema)]
pub(super) struct SetAnswer {
    permission: Setting,
    #[serde(flatten)]
    outcome: Outcome,
}

impl SetAnswer {
    pub(super) fn new(permission: Setting, outcome: Option<v1::ChangeOutcome>) -> Self {
        Self {
            permission,
            outcome: outcome.into(),
        }
    }
}

/// Settings that were put.
#[derive(Serialize, ToSchema)]
pub(super) struct BulkSet {
    #[schema(example = 1)]
    updated_count: usize,
    permissions: Vec<Setting>,
    #[serde(flatten)]
    outcome: Outcome,
}

impl BulkSet {
    pub(super) fn new(permissions: Vec<Setting>, outcome: Option<v1::ChangeOutcome>) -> Self {
        Self {
            updated_count: permissions.len(),
            permissions,
            outcome: outcome.into(),
        }
    }
}

/// A setting that was removed.
#[derive(Serialize, ToSchema)]
pub(super) struct Reset {
    /// For people.
    message: &'static str,
    #[serde(flatten)]
    outcome: Outcome,
}

impl Reset {
    pub(super) fn new(outcome: Option<v1::ChangeOutcome>) -> Self {
        let outcome = Outcome::from(outcome);
        Self {
            message: match outcome.preview {
                None => "Permission reset to default",
                Some(_) => "Permission would be reset to default",
            },
            outcome,
        }
    }
}

/// Permissions by name that were given or taken back.
#[derive(Serialize, ToSchema)]
pub(super) struct Overridden {
    #[schema(example = 1)]
    updated_count: usize,
    #[serde(flatten)]
    outcome: Outcome,
}

impl Overridden {
    pub(super) fn new(updated_count: usize, outcome: Option<v1::ChangeOutcome>) -> Self {
        Self {
            updated_count,
            outcome: outcome.into(),
        }
    }
}
