//! The real service on a test's database, and gRPC as a way to ask for decisions.

use std::time::Duration;

use futures_util::future::join_all;
use hallpass::server::{self, Config, Listener, ServeError};
use hallpass_client::v1::{
    BatchCheckPermissionsItem, BatchCheckPermissionsRequest, BatchCheckPermissionsResponse,
    CheckPermissionRequest, Consistency, Evidence, ListUserPermissionsRequest,
    ListUserPermissionsResponse, Reason, Source,
    batch_check_permissions_result::Result as ItemResult, consistency::Requirement,
    permission_service_client::PermissionServiceClient,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_postgres::Client;
use tonic::transport::Channel;

use crate::{
    database::{Database, eventually},
    names::{NO_ORGANIZATION, NO_PERMISSION, NO_USER, Names, id},
    oracle::{Question, World},
};

/// How fresh the answers must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    MinimizeLatency,
    FullyConsistent,
}

/// A running service; it ends with its runtime, or by [`Service::stop`].
pub(crate) struct Service {
    pub(crate) client: PermissionServiceClient<Channel>,
    shutdown: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServeError>>,
}

/// Answers counted by their source.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sources {
    pub(crate) cache: usize,
    pub(crate) database: usize,
}

impl Service {
    /// Returns when it is ready.
    pub(crate) async fn start(database: &Database, matrix_refresh_interval: Duration) -> Self {
        let config = Config {
            database: database.url.parse().unwrap(),
            staleness_bound: Duration::from_secs(2),
            cache_capacity: 10_000,
            warm_up_max: Duration::from_secs(10),
            matrix_refresh_interval,
            lame_duck: Duration::ZERO,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (shutdown, stopped) = oneshot::channel();
        let (ready, is_ready) = oneshot::channel();
        let running = tokio::spawn(server::run(
            config,
            Listener::Tcp(listener),
            move || ready.send(()).unwrap_or_default(),
            async { drop(stopped.await) },
        ));
        is_ready.await.unwrap();
        let channel = hallpass_client::connect(&endpoint).await.unwrap();
        Self {
            client: PermissionServiceClient::new(channel),
            shutdown,
            running,
        }
    }

    pub(crate) async fn stop(self) {
        self.shutdown.send(()).unwrap();
        self.running.await.unwrap().unwrap();
    }

    /// Waits until the cache has applied everything that is committed now.
    pub(crate) async fn catch_up(&self, database: &Client) {
        let row = database.query_one("SELECT hallpass.head()", &[]).await;
        let head: String = row.unwrap().get(0);
        eventually("the cache is at the head", async || {
            let nothing = Question {
                organization: NO_ORGANIZATION.to_owned(),
                user: NO_USER.to_owned(),
                permission: NO_PERMISSION.to_owned(),
            };
            let (_, evidence) = self.check(&nothing, Freshness::MinimizeLatency).await;
            evidence.source() == Source::Cache && seq(&evidence.position) >= seq(&head)
        })
        .await;
    }

    async fn check(&self, question: &Question, freshness: Freshness) -> (Said, Evidence) {
        let request = CheckPermissionRequest {
            organization_id: id(&question.organization).to_string(),
            user_id: id(&question.user).to_string(),
            permission: question.permission.clone(),
            consistency: Some(freshness.into()),
            explain: false,
        };
        let response = self.client.clone().check_permission(request).await;
        let response = response.unwrap().into_inner();
        let said = Said::new(response.allowed, response.reason());
        (said, response.evidence.unwrap())
    }

    /// Each question by itself.
    pub(crate) async fn check_disagreements(
        &self,
        world: &World,
        names: &Names,
        freshness: Freshness,
    ) -> (Vec<String>, Sources) {
        let (mut found, mut sources) = (Vec::new(), Sources::default());
        let questions = names.questions();
        let asked = questions.iter().map(|q| self.check(q, freshness));
        for (question, (said, evidence)) in questions.iter().zip(join_all(asked).await) {
            found.extend(said.disagreement("CheckPermission", world, question, &evidence));
            sources.count(&evidence, 1);
        }
        (found, sources)
    }

    /// All questions in one batch.
    pub(crate) async fn batch_disagreements(
        &self,
        world: &World,
        names: &Names,
        freshness: Freshness,
    ) -> (Vec<String>, Sources) {
        let questions = names.questions();
        let response = self.batch(&questions, freshness).await;
        let evidence = response.evidence.unwrap();
        assert_eq!(response.results.len(), questions.len());
        let found = questions
            .iter()
            .zip(response.results)
            .filter_map(|(question, result)| match result.result {
                Some(ItemResult::Answer(answer)) => Said::new(answer.allowed, answer.reason())
                    .disagreement("BatchCheckPermissions", world, question, &evidence),
                other => Some(format!("BatchCheckPermissions: {question}: {other:?}")),
            })
            .collect();
        let mut sources = Sources::default();
        sources.count(&evidence, questions.len());
        (found, sources)
    }

    async fn batch(
        &self,
        questions: &[Question],
        freshness: Freshness,
    ) -> BatchCheckPermissionsResponse {
        let items = questions
            .iter()
            .map(|question| BatchCheckPermissionsItem {
                organization_id: id(&question.organization).to_string(),
                user_id: id(&question.user).to_string(),
                permission: question.permission.clone(),
            })
            .collect();
        let request = BatchCheckPermissionsRequest {
            items,
            consistency: Some(freshness.into()),
        };
        let response = self.client.clone().batch_check_permissions(request).await;
        response.unwrap().into_inner()
    }

    /// Everybody's list in every organization: exactly the catalog, in order, with its facts.
    pub(crate) async fn list_disagreements(
        &self,
        world: &World,
        names: &Names,
        freshness: Freshness,
    ) -> (Vec<String>, Sources) {
        let (mut found, mut sources) = (Vec::new(), Sources::default());
        let members: Vec<(&String, &String)> = names
            .organizations
            .iter()
            .flat_map(|organization| names.users.iter().map(move |user| (organization, user)))
            .collect();
        let asked = members
            .iter()
            .map(|(organization, user)| self.list(organization, user, freshness));
        for ((organization, user), response) in members.iter().zip(join_all(asked).await) {
            let evidence = response.evidence.clone().unwrap();
            sources.count(&evidence, world.catalog.len());
            let said: Vec<_> = response
                .permissions
                .iter()
                .map(|p| Listed {
                    permission: p.permission.clone(),
                    module: p.module.clone(),
                    said: Said::new(p.allowed, p.reason()),
                    min_role: p.effective_min_role.clone(),
                    enabled: p.enabled,
                })
                .collect();
            let (role, expected) = expected_list(world, organization, user);
            if (&response.role, &said) != (&role, &expected) {
                found.push(format!(
                    "ListUserPermissions: {organization} {user}: {evidence:?}\n  says   {} {said:?}\n  oracle {role} {expected:?}",
                    response.role
                ));
            }
        }
        (found, sources)
    }

    async fn list(
        &self,
        organization: &str,
        user: &str,
        freshness: Freshness,
    ) -> ListUserPermissionsResponse {
        let request = ListUserPermissionsRequest {
            organization_id: id(organization).to_string(),
            user_id: id(user).to_string(),
            module: String::new(),
            allowed_only: false,
            consistency: Some(freshness.into()),
        };
        let response = self.client.clone().list_user_permissions(request).await;
        response.unwrap().into_inner()
    }
}

/// One line of a list.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    permission: String,
    module: String,
    said: Said,
    min_role: String,
    enabled: bool,
}

/// A decision as the wire has it.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    allowed: bool,
    reason: String,
}

/// The role and the list; both are bare for who is no member.
fn expected_list(world: &World, organization: &str, user: &str) -> (String, Vec<Listed>) {
    let member = (organization.to_owned(), user.to_owned());
    let membership = world.members.get(&member);
    let role = membership.cloned().flatten().unwrap_or_default();
    let list = world
        .catalog
        .iter()
        .map(|(permission, template)| {
            let question = Question {
                organization: organization.to_owned(),
                user: user.to_owned(),
                permission: permission.clone(),
            };
            let decision = world.decide(&question);
            let min_role = world.min_role(organization, permission).unwrap_or_default();
            Listed {
                permission: permission.clone(),
                module: template.module.clone(),
                said: Said {
                    allowed: decision.allowed,
                    reason: decision.reason.to_owned(),
                },
                min_role: membership.map(|_| min_role.to_owned()).unwrap_or_default(),
                enabled: membership.is_some() && world.is_enabled(organization, permission),
            }
        })
        .collect();
    (role, list)
}

impl Said {
    fn new(allowed: bool, reason: Reason) -> Self {
        let reason = reason.as_str_name().trim_start_matches("REASON_");
        Self {
            allowed,
            reason: reason.to_owned(),
        }
    }

    fn disagreement(
        &self,
        call: &str,
        world: &World,
        question: &Question,
        evidence: &Evidence,
    ) -> Option<String> {
        let expected = world.decide(question);
        let agrees = (self.allowed, self.reason.as_str()) == (expected.allowed, expected.reason);
        (!agrees).then(|| {
            format!("{call}: {question}: says {self:?}, the oracle {expected:?} ({evidence:?})")
        })
    }
}

impl Sources {
    fn count(&mut self, evidence: &Evidence, answers: usize) {
        match evidence.source() {
            Source::Cache => self.cache += answers,
            _ => self.database += answers,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.cache += other.cache;
        self.database += other.database;
    }
}

impl From<Freshness> for Consistency {
    fn from(freshness: Freshness) -> Self {
        Self {
            requirement: Some(match freshness {
                Freshness::MinimizeLatency => Requirement::MinimizeLatency(true),
                Freshness::FullyConsistent => Requirement::FullyConsistent(true),
            }),
        }
    }
}

/// The number of a position, `812-5f0c9ae1`.
fn seq(position: &str) -> i64 {
    let (seq, _) = position.split_once('-').unwrap();
    seq.parse().unwrap()
}
