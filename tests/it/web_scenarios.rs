//! Every file of `tests/scenarios` over HTTP: what the oracle says, and the same lists as over gRPC.

use futures_util::future::join_all;
use hallpass::server::Config;
use hallpass_client::v1::{Consistency, ListUserPermissionsRequest, consistency::Requirement};
use serde_json::{Value, json};

use crate::{
    database::Database,
    names::{Names, id},
    oracle::{Question, World},
    scenarios::{REFRESH_INTERVAL, run_all},
    server::{Server, config},
    web::Web,
};

#[tokio::test]
async fn http_decides_as_the_scenarios_state() {
    let database = Database::create().await;
    let server = Server::start(Config {
        matrix_refresh_interval: REFRESH_INTERVAL,
        ..config(&database.url)
    })
    .await;
    let web = Web::of(&server);
    run_all(&database, async |run, world| {
        server.catch_up(run.client).await;
        let names = &run.scenario.names;
        for fully_consistent in [false, true] {
            let consistency = json!({ "fully_consistent": fully_consistent });
            for found in [
                check_disagreements(&web, world, names, &consistency).await,
                batch_disagreements(&web, world, names, &consistency).await,
                list_disagreements(&web, &server, names, fully_consistent).await,
            ] {
                found.into_iter().for_each(|line| run.fail(line));
            }
        }
    })
    .await;
    server.stop().await;
}

fn asked(question: &Question) -> Value {
    json!({
        "organization_id": id(&question.organization).to_string(),
        "user_id": id(&question.user).to_string(),
        "permission": question.permission,
    })
}

/// Where an answer is not the oracle's.
fn disagreement(call: &str, world: &World, question: &Question, answer: &Value) -> Option<String> {
    let expected = world.decide(question);
    let agrees = answer["allowed"] == expected.allowed && answer["reason"] == expected.reason;
    (!agrees).then(|| format!("{call}: {question}: says {answer}, the oracle {expected:?}"))
}

async fn check_disagreements(
    web: &Web,
    world: &World,
    names: &Names,
    consistency: &Value,
) -> Vec<String> {
    let questions = names.questions();
    let answers = questions.iter().map(async |question| {
        let mut asked = asked(question);
        asked["consistency"] = consistency.clone();
        web.post("/v1/check", &asked).await.body
    });
    let answers = join_all(answers).await;
    let both = questions.iter().zip(&answers);
    both.filter_map(|(question, answer)| disagreement("check", world, question, answer))
        .collect()
}

async fn batch_disagreements(
    web: &Web,
    world: &World,
    names: &Names,
    consistency: &Value,
) -> Vec<String> {
    let questions = names.questions();
    let items: Vec<Value> = questions.iter().map(asked).collect();
    let batch = json!({ "items": items, "consistency": consistency });
    let answer = web.post("/v1/batch-check", &batch).await;
    let results = answer.body["results"].as_array().unwrap();
    assert_eq!(results.len(), questions.len());
    let both = questions.iter().zip(results);
    both.filter_map(|(question, answer)| disagreement("batch-check", world, question, answer))
        .collect()
}

/// The list's facts are compared with gRPC's, whose own test compares them with the oracle's.
async fn list_disagreements(
    web: &Web,
    server: &Server,
    names: &Names,
    fully_consistent: bool,
) -> Vec<String> {
    let mut found = Vec::new();
    for organization in &names.organizations {
        for user in &names.users {
            let (organization_id, user_id) = (id(organization), id(user));
            let path = format!(
                "/v1/organizations/{organization_id}/users/{user_id}/permissions?fully_consistent={fully_consistent}"
            );
            let said = web.get(&path).await.body;
            let request = ListUserPermissionsRequest {
                organization_id: organization_id.to_string(),
                user_id: user_id.to_string(),
                consistency: fully_consistent.then_some(Consistency {
                    requirement: Some(Requirement::FullyConsistent(true)),
                }),
                ..ListUserPermissionsRequest::default()
            };
            let listed = server.client().list_user_permissions(request).await;
            let listed = listed.unwrap().into_inner();
            let permissions: Vec<Value> = listed
                .permissions
                .iter()
                .map(|permission| {
                    let reason = permission.reason().as_str_name();
                    json!({
                        "permission": permission.permission,
                        "name": permission.name,
                        "module": permission.module,
                        "allowed": permission.allowed,
                        "reason": reason.trim_start_matches("REASON_"),
                        "effective_min_role": permission.effective_min_role,
                        "enabled": permission.enabled,
                    })
                })
                .collect();
            if said["permissions"] != json!(permissions) || said["role"] != listed.role {
                found.push(format!(
                    "permissions: {organization} {user}: says {said}, gRPC {listed:?}"
                ));
            }
        }
    }
    found
}
