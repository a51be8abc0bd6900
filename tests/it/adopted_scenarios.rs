//! Every scenario on PTO Connect's own tables, in either shape, adopted: the decisions are those of hallpass's tables.

use crate::{
    database::Shape,
    lists::lists_and_counts,
    pto,
    scenario::{self, Scenario},
    scenarios::{
        decides_in_sql, decides_in_the_refreshed_matrix, decides_over_grpc, has_user_of_several,
    },
};

/// What shape B cannot hold, and nothing else is left out there.
const OF_SEVERAL_ORGANIZATIONS: [&str; 10] = [
    "03_specific_users.yaml",
    "05_disabled.yaml",
    "06_effective_min_role.yaml",
    "07_roles_that_the_ladder_does_not_know.yaml",
    "09_ladder_changes.yaml",
    "12_several_organizations.yaml",
    "14_organization_deleted.yaml",
    "17_statements_of_every_kind.yaml",
    "20_settings_of_an_override_together.yaml",
    "21_overrides_move.yaml",
];

#[test]
fn shape_b_leaves_out_who_has_several_organizations() {
    let all = scenario::all();
    let left_out = all.iter().filter(|scenario| has_user_of_several(scenario));
    let left_out: Vec<&str> = left_out
        .map(|Scenario { file, .. }| file.as_str())
        .collect();
    assert_eq!(left_out, OF_SEVERAL_ORGANIZATIONS);
}

#[tokio::test]
async fn sql_decides_in_shape_a() {
    decides_in_sql(&pto::for_scenarios(Shape::A).await).await;
}

#[tokio::test]
async fn sql_decides_in_shape_b() {
    decides_in_sql(&pto::for_scenarios(Shape::B).await).await;
}

#[tokio::test]
async fn the_refreshed_matrix_decides_in_shape_a() {
    decides_in_the_refreshed_matrix(&pto::for_scenarios(Shape::A).await).await;
}

#[tokio::test]
async fn the_refreshed_matrix_decides_in_shape_b() {
    decides_in_the_refreshed_matrix(&pto::for_scenarios(Shape::B).await).await;
}

#[tokio::test]
async fn grpc_decides_in_shape_a() {
    decides_over_grpc(&pto::for_scenarios(Shape::A).await).await;
}

#[tokio::test]
async fn grpc_decides_in_shape_b() {
    decides_over_grpc(&pto::for_scenarios(Shape::B).await).await;
}

#[tokio::test]
async fn lists_and_counts_are_the_oracle_s_in_shape_b() {
    lists_and_counts(&pto::for_scenarios(Shape::B).await).await;
}
