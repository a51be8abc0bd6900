//! Those who ask: batches and single checks, in all modes, of one replica each; what they are told goes into the book.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use hallpass_client::{
    tonic::{Code, Request, Response, Status, transport::Channel},
    v1::{
        BatchCheckPermissionsRequest, CheckPermissionRequest, Consistency, Evidence, Reason,
        Source, batch_check_permissions_result::Result as ItemResult, consistency::Requirement,
        permission_service_client::PermissionServiceClient,
    },
};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::history::{Decision, Micros, Mode, Position};

use super::{
    Run,
    book::{Call, Said},
    report::{Asked, CALM},
    world::ORGANIZATIONS,
};

/// What a caller waits for. A replica that is dead costs each of its readers this much a question.
const DEADLINE: Duration = Duration::from_millis(800);

/// A replica that is stopped does not keep the deadline it was given.
const GRACE: Duration = Duration::from_millis(100);

/// Between a reader's questions: the machine has other things to do.
const PAUSE: Duration = Duration::from_millis(8);

/// After an error: whoever is down is down for a while.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(40);

const BATCH_ITEMS: std::ops::Range<usize> = 50..110;

/// Answers that wait to be judged, while the database is away and nobody knows what was written. Past it readers wait.
const CALLS_WAITING_MAX: usize = 100_000;

/// What a reader says that it has waited for: what it was told last, or something of the log.
struct Reader {
    run: Arc<Run>,
    replica: usize,
    random: StdRng,
    last: Option<Position>,
}

/// Asks in batches until the run is over.
pub(super) async fn read_batches(run: Arc<Run>, replica: usize, random: StdRng) {
    let mut reader = Reader::new(run, replica, random);
    let total = reader.run.questions.len();
    while reader.goes_on().await {
        let count = reader.random.random_range(BATCH_ITEMS);
        // About one organization, as a page of an application asks.
        let keys_each = total / ORGANIZATIONS.len();
        let first = keys_each * reader.random.random_range(0..ORGANIZATIONS.len());
        let keys: Vec<usize> = (0..count)
            .map(|_| first + reader.random.random_range(0..keys_each))
            .collect();
        let said = reader.ask_batch(&keys).await;
        reader.pause(said).await;
    }
}

/// Asks one question at a time until the run is over.
pub(super) async fn read_singly(run: Arc<Run>, replica: usize, random: StdRng) {
    let mut reader = Reader::new(run, replica, random);
    let total = reader.run.questions.len();
    while reader.goes_on().await {
        let key = reader.random.random_range(0..total);
        let mode = reader.mode();
        let said = reader.ask(key, None, mode).await;
        reader.pause(said).await;
    }
}

/// Asks once for a user whom nobody knows, whom the replica must look up.
pub(super) async fn ask_for_a_stranger(run: Arc<Run>, replica: usize, random: StdRng) {
    let mut reader = Reader::new(run, replica, random);
    let key = reader.run.questions.of_a_stranger();
    let user = Uuid::from_u128(reader.random.random());
    reader.ask(key, Some(user), Mode::MinimizeLatency).await;
}

impl Reader {
    fn new(run: Arc<Run>, replica: usize, random: StdRng) -> Self {
        Self {
            run,
            replica,
            random,
            last: None,
        }
    }

    async fn goes_on(&self) -> bool {
        while self.run.book().waiting() > CALLS_WAITING_MAX {
            sleep(PAUSE).await;
        }
        !self.run.over.load(Ordering::Relaxed)
    }

    async fn pause(&self, was_answered: bool) {
        sleep(if was_answered {
            PAUSE
        } else {
            PAUSE_AFTER_ERROR
        })
        .await;
    }

    fn mode(&mut self) -> Mode {
        match self.random.random_range(0..100) {
            0..50 => Mode::MinimizeLatency,
            50..65 => Mode::MaxStaleness(self.random.random_range(100_000..5_000_000)),
            65..80 => Mode::AtLeastAsFresh(self.position()),
            _ => Mode::FullyConsistent,
        }
    }

    /// Something the log has, or had.
    fn position(&mut self) -> Position {
        if let Some(last) = self.last.filter(|_| self.random.random_bool(0.3)) {
            return last;
        }
        let (recent, lost) = self.run.book().positions();
        let from = if self.random.random_bool(0.1) && !lost.is_empty() {
            &lost
        } else {
            &recent
        };
        *from.choose(&mut self.random).unwrap()
    }

    fn client(&self) -> PermissionServiceClient<Channel> {
        PermissionServiceClient::new(self.run.replicas[self.replica].channel.clone())
    }

    async fn ask_batch(&mut self, keys: &[usize]) -> bool {
        let mode = self.mode();
        let items = (keys.iter())
            .map(|key| self.run.questions.items[*key].clone())
            .collect();
        let request = timed(BatchCheckPermissionsRequest {
            items,
            consistency: consistency(mode),
        });
        let began = self.begin();
        let response = within_deadline(self.client().batch_check_permissions(request)).await;
        let said = match response {
            Ok(response) => {
                let results = response.results.into_iter().map(|result| result.result);
                let decisions: Vec<(u16, Decision)> = (keys.iter().zip(results))
                    .filter_map(|(key, result)| match result {
                        Some(ItemResult::Answer(answer)) => {
                            Some((*key, answer.allowed, answer.reason()))
                        }
                        _ => None,
                    })
                    .map(|(key, allowed, reason)| decided(key, allowed, reason))
                    .collect();
                let unanswered = keys.len() - decisions.len();
                self.answers(decisions, unanswered, response.evidence)
            }
            Err(status) => refused(&status, mode, keys.len()),
        };
        self.finish(began, mode, said)
    }

    async fn ask(&mut self, key: usize, user: Option<Uuid>, mode: Mode) -> bool {
        let item = self.run.questions.items[key].clone();
        let request = timed(CheckPermissionRequest {
            organization_id: item.organization_id,
            user_id: user.map_or(item.user_id, |user| user.to_string()),
            permission: item.permission,
            consistency: consistency(mode),
            explain: false,
        });
        let began = self.begin();
        let response = within_deadline(self.client().check_permission(request)).await;
        let said = match response {
            Ok(response) => {
                let decision = decided(key, response.allowed, response.reason());
                self.answers(vec![decision], 0, response.evidence)
            }
            Err(status) => refused(&status, mode, 1),
        };
        self.finish(began, mode, said)
    }

    fn answers(
        &mut self,
        decisions: Vec<(u16, Decision)>,
        unanswered: usize,
        evidence: Option<Evidence>,
    ) -> Said {
        let Some(evidence) = evidence else {
            return Said::Nothing(unanswered);
        };
        let from_cache = evidence.source() == Source::Cache;
        let staleness = evidence.staleness.unwrap();
        let position = parse(&evidence.position);
        self.last = Some(position);
        Said::Answers {
            decisions,
            unanswered,
            from_cache,
            position,
            // Rounded up: it is an upper bound.
            staleness: Micros::try_from(staleness.seconds).unwrap() * 1_000_000
                + Micros::try_from(staleness.nanos).unwrap().div_ceil(1_000),
        }
    }

    fn begin(&self) -> (Micros, &'static str) {
        (self.run.clock.now(), self.fault())
    }

    fn fault(&self) -> &'static str {
        *self.run.replicas[self.replica].fault.lock().unwrap()
    }

    fn finish(&self, (invoked, fault): (Micros, &'static str), mode: Mode, said: Said) -> bool {
        let replied = self.run.clock.now();
        let fault = if fault == CALM { self.fault() } else { fault };
        let was_answered = !matches!(said, Said::Nothing(_));
        self.run.book().answered(Call {
            asked: Asked {
                mode: name(mode),
                fault,
                replica: self.replica,
            },
            invoked,
            replied,
            mode,
            said,
        });
        was_answered
    }
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::MinimizeLatency => "minimize_latency",
        Mode::MaxStaleness(_) => "max_staleness",
        Mode::AtLeastAsFresh(_) => "at_least_as_fresh",
        Mode::FullyConsistent => "fully_consistent",
    }
}

fn consistency(mode: Mode) -> Option<Consistency> {
    let requirement = match mode {
        Mode::MinimizeLatency => return None,
        Mode::MaxStaleness(micros) => {
            Requirement::MaxStaleness(Duration::from_micros(micros).try_into().unwrap())
        }
        Mode::AtLeastAsFresh(Position { seq, uid }) => {
            Requirement::AtLeastAsFresh(format!("{seq}-{uid:08x}"))
        }
        Mode::FullyConsistent => Requirement::FullyConsistent(true),
    };
    Some(Consistency {
        requirement: Some(requirement),
    })
}

pub(super) fn parse(position: &str) -> Position {
    let (seq, uid) = position.split_once('-').unwrap();
    Position {
        seq: seq.parse().unwrap(),
        uid: u32::from_str_radix(uid, 16).unwrap(),
    }
}

fn decided(key: usize, allowed: bool, reason: Reason) -> (u16, Decision) {
    let reason = u8::try_from(i32::from(reason)).unwrap();
    (u16::try_from(key).unwrap(), Decision { allowed, reason })
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

async fn within_deadline<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    timeout(DEADLINE + GRACE, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("nobody answers")))
        .map(Response::into_inner)
}

/// What an error comes to. What is neither the database's absence nor the replica's is a defect.
fn refused(status: &Status, mode: Mode, items: usize) -> Said {
    match status.code() {
        Code::Unimplemented if !matches!(mode, Mode::MinimizeLatency | Mode::FullyConsistent) => {
            Said::NotServed(items)
        }
        Code::InvalidArgument => Said::Refused(items),
        Code::Unavailable
        | Code::ResourceExhausted
        | Code::DeadlineExceeded
        | Code::Cancelled
        // A connection that breaks in the middle of an answer.
        | Code::Unknown
        | Code::Internal => Said::Nothing(items),
        _ => panic!("{status:?}"),
    }
}
