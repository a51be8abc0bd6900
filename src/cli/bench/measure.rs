//! The workloads: each row of the table is measured here.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use hallpass_client::v1::{CheckPermissionResponse, Source};
use prost::Message;
use tokio::task::spawn_blocking;

use super::{
    Workload,
    empty::{self, Payload},
    own::{Own, Place, Process, free_address, until_listening},
    questions::Asked,
    report::{HEADING, Promise, Report, Row, line, median, together},
    target::Target,
};
use crate::{
    cli::list::connect,
    load::{self, Callers, Draw, Outcome, Pace, Questions, Target as Address},
    server::connections,
};

/// In which a check and an empty RPC take turns; the first is not counted.
const ROUNDS: u32 = 11;

/// Of the calls a second that the closed loop came to.
const SHARES: [f64; 6] = [0.1, 0.25, 0.5, 0.6, 0.75, 0.9];

const MISSES_A_SECOND: f64 = 1_000.0;

/// Before anything is counted: connections, branch predictors and allocators get used to it.
const WARM_UP: Duration = Duration::from_millis(500);

/// What is promised.
const RATIO_MAX: f64 = 1.0;
const BATCH_DECISIONS_A_CORE_MIN: f64 = 900_000.0;
const HALF_PEAK_P99_MICROS_MAX: f64 = 1_000.0;
const HALF_PEAK_P999_MICROS_MAX: f64 = 5_000.0;
const MISS_P99_MICROS_MAX: f64 = 5_000.0;

/// What is measured, and how.
pub(super) struct Bench<'a> {
    pub(super) settings: &'a super::Bench,
    pub(super) target: Target,
    pub(super) asked: Asked,
    pub(super) draw: Draw,
    pub(super) own: Option<(&'a Own, &'a Place)>,
}

/// The same RPC as a check, but for what a check does.
struct Empty {
    _process: Process,
    target: Target,
    questions: Questions,
}

impl Bench<'_> {
    /// Measures, and prints each row as it is there.
    pub(super) async fn run(&self, workloads: &[Workload]) -> anyhow::Result<Report> {
        let mut report = Report::default();
        let answer = self.first_answer().await?;
        let empty = match self.own {
            Some((_, place)) if self.settings.baseline => Some(self.empty(place, &answer).await?),
            _ => None,
        };
        self.describe(&mut report, &answer);
        println!("\n{HEADING}");
        for workload in workloads {
            match workload {
                Workload::Unary => self.unary(&mut report, empty.as_ref()).await?,
                Workload::Batch => self.batch(&mut report).await?,
                Workload::List => {
                    let lists = self.asked.lists(&self.target, self.draw);
                    let row = self.row("list", &lists, self.closed(), 1).await?;
                    show(&mut report.rows, row);
                }
                Workload::Miss => self.miss(&mut report).await?,
                Workload::Mixed => self.mixed(&mut report).await?,
                Workload::Audit => {
                    let (own, _) = self.own.context("audit needs a service of its own")?;
                    let row = self.audit(own).await?;
                    show(&mut report.rows, row);
                }
            }
        }
        if self.own.is_some() && !report.promises.is_empty() {
            println!("\npromised of a release build on a core of its own");
            for promise in &report.promises {
                println!("{}", promise.line());
            }
        }
        Ok(report)
    }

    /// Sees that the service answers as it should before it is loaded; returns what an answer takes.
    async fn first_answer(&self) -> anyhow::Result<CheckPermissionResponse> {
        let mut client = connect(&self.target.client).await?;
        let answer = client.check_permission(self.asked.first()).await;
        Ok(answer.context("the service does not answer")?.into_inner())
    }

    async fn empty(
        &self,
        place: &Place,
        answer: &CheckPermissionResponse,
    ) -> anyhow::Result<Empty> {
        let address = free_address()?;
        let answer_bytes = answer.encoded_len().to_string();
        let arguments = [
            "bench-empty",
            "--listen",
            &address,
            "--answer-bytes",
            &answer_bytes,
        ];
        let mut process = place.start(&arguments)?;
        until_listening(&mut process, &address).await?;
        let question = Payload::of(self.asked.first().encoded_len());
        let target = Target {
            address: Address::Tcp(address),
            token: None,
            pid: Some(process.pid()),
            ..self.target.clone()
        };
        Ok(Empty {
            _process: process,
            target,
            questions: Questions {
                path: empty::PATH,
                token: None,
                messages: Arc::new([question.encode_to_vec()]),
                draw: Draw::InTurn,
            },
        })
    }

    fn describe(&self, report: &mut Report, answer: &CheckPermissionResponse) {
        let settings = self.settings;
        let mut say = |what: &str, value: String| {
            println!("{what:12}{value}");
            report.settings.push((what.to_owned(), value));
        };
        let build = if cfg!(debug_assertions) {
            "a debug build: its figures mean nothing"
        } else {
            "a release build"
        };
        match self.own {
            Some((_, place)) => {
                say(
                    "service",
                    format!(
                        "hallpass {} serve, {build}; API key, limits, metrics and self-checks on; cores {:?}, a thread each",
                        env!("CARGO_PKG_VERSION"),
                        place.service
                    ),
                );
                say(
                    "database",
                    format!(
                        "a private PostgreSQL with {} organizations, {} members, 30 permissions; cores {:?}",
                        settings.organizations,
                        self.asked.len(),
                        place.others
                    ),
                );
            }
            None => say("service", self.target.client.endpoint.clone()),
        }
        say(
            "load",
            format!(
                "{} connections, {} thread{}, {:?} a row; closed loops of {} calls; users {:?}",
                settings.connections,
                settings.threads,
                if settings.threads == 1 { "" } else { "s" },
                settings.duration,
                settings.in_flight,
                self.draw,
            ),
        );
        if settings.baseline {
            say(
                "empty RPC",
                format!(
                    "generated by tonic, no layers; the same program, runtime and cores; HTTP/2 windows {} and {} bytes, frames {}; \
                     messages of {} and {} bytes as a check's",
                    connections::WINDOW_BYTES,
                    connections::WINDOW_BYTES,
                    connections::FRAME_BYTES_MAX,
                    self.asked.first().encoded_len(),
                    answer.encoded_len(),
                ),
            );
        }
    }

    fn closed(&self) -> Pace {
        Pace::AtOnce(self.settings.in_flight)
    }

    async fn load(
        &self,
        target: &Target,
        questions: &Questions,
        pace: Pace,
        time: Duration,
    ) -> anyhow::Result<(Outcome, Option<Duration>)> {
        let before = target.processor_time()?;
        let (address, questions) = (target.address.clone(), questions.clone());
        let callers = Callers {
            connections: self.settings.connections,
            threads: self.settings.threads,
            turn: Duration::ZERO,
        };
        let run = move || load::run(&address, &questions, pace, callers, time);
        let outcome = spawn_blocking(run).await?.context("the load failed")?;
        let spent = target.processor_time_since(before)?;
        Ok((outcome, spent))
    }

    async fn row(
        &self,
        what: &str,
        questions: &Questions,
        pace: Pace,
        decisions: usize,
    ) -> anyhow::Result<Row> {
        if matches!(pace, Pace::AtOnce(_)) {
            self.load(&self.target, questions, pace, WARM_UP).await?;
        }
        let time = self.settings.duration;
        let (outcome, spent) = self.load(&self.target, questions, pace, time).await?;
        if outcome.answered == 0 {
            bail!(
                "no call of `{what}` was answered: {} refused, {} lost",
                outcome.refused,
                outcome.lost
            );
        }
        let memory = self.target.memory()?;
        Ok(Row::new(what, &outcome, decisions, spent, memory))
    }

    /// Checks in a closed loop, in turns with empty RPCs where that is asked for; then in open loops.
    async fn unary(&self, report: &mut Report, empty: Option<&Empty>) -> anyhow::Result<()> {
        let checks = self.asked.checks(&self.target, self.draw);
        let time = self.settings.duration / (ROUNDS - 1);
        let (mut own, mut others, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let check = self
                .load(&self.target, &checks, self.closed(), time)
                .await?;
            let other = match empty {
                Some(empty) => Some(
                    self.load(&empty.target, &empty.questions, self.closed(), time)
                        .await?,
                ),
                None => None,
            };
            if round == 0 {
                continue;
            }
            if let (Some(check), Some(other)) = (cost(&check), other.as_ref().and_then(cost)) {
                ratios.push(check / other);
            }
            own.push(check);
            others.extend(other);
        }
        let range = ratios
            .iter()
            .copied()
            .fold((f64::MAX, f64::MIN), |(least, most), ratio| {
                (least.min(ratio), most.max(ratio))
            });
        if let Some(empty) = empty
            && let Some(row) = whole("empty RPC", others, empty.target.memory()?)
        {
            show(&mut report.rows, row);
        }
        let (samples, cached) = cached(&own);
        let row = whole("check", own, self.target.memory()?).context("no round was measured")?;
        let peak = row.calls_a_second;
        if peak == 0.0 {
            bail!(
                "no check was answered: {} refused, {} lost",
                row.refused,
                row.lost
            );
        }
        show(&mut report.rows, row);
        println!(
            "{:28}{cached} of {samples} answers that were looked into came from the cache",
            ""
        );
        report.ratio_to_empty_rpc = median(ratios);
        if let Some(ratio) = report.ratio_to_empty_rpc {
            println!(
                "{:28}ratio_to_empty_rpc {ratio:.3}, the service's processor time a call, median of {} rounds ({:.3} to {:.3})",
                "",
                ROUNDS - 1,
                range.0,
                range.1
            );
            report
                .promises
                .push(Promise::at_most("check / empty RPC, cpu", ratio, RATIO_MAX));
        }
        let rates = &self.settings.rates;
        let shares = SHARES.map(|share| (Some(share), peak * share));
        let rates: Vec<(Option<f64>, f64)> = if rates.is_empty() {
            shares.to_vec()
        } else {
            rates.iter().map(|rate| (None, *rate)).collect()
        };
        println!("open loop: calls come at random, and wait from when they are due");
        for (share, rate) in rates {
            let what = match share {
                Some(share) => format!("  {:.0} % of the closed loop", share * 100.0),
                None => format!("  {rate:.0} a second"),
            };
            let row = self
                .row(&what, &checks, Pace::ASecond(rate), 1)
                .await?
                .offered(rate);
            if share == Some(0.5) {
                #[allow(clippy::cast_precision_loss, reason = "microseconds of a call")]
                let (p99, p999) = (row.p99_micros as f64, row.p999_micros as f64);
                report.promises.extend([
                    Promise::at_most("half the load: p99, µs", p99, HALF_PEAK_P99_MICROS_MAX),
                    Promise::at_most("half the load: p99.9, µs", p999, HALF_PEAK_P999_MICROS_MAX),
                ]);
            }
            show(&mut report.open_loop, row);
        }
        Ok(())
    }

    async fn batch(&self, report: &mut Report) -> anyhow::Result<()> {
        let items = self.settings.batch_items;
        let batches = self.asked.batches(&self.target, self.draw, items);
        let row = self
            .row(
                &format!("batches of {items}"),
                &batches,
                self.closed(),
                items,
            )
            .await?;
        if let Some(micros) = row.cpu_micros_a_decision.filter(|_| items == 100) {
            let what = "batches of 100: decisions a second of one core";
            let a_core = 1e6 / micros;
            report
                .promises
                .push(Promise::at_least(what, a_core, BATCH_DECISIONS_A_CORE_MIN));
        }
        show(&mut report.rows, row);
        Ok(())
    }

    async fn miss(&self, report: &mut Report) -> anyhow::Result<()> {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a number of calls"
        )]
        let count = (MISSES_A_SECOND * self.settings.duration.as_secs_f64() * 1.5) as usize + 1_000;
        let strangers = self.asked.checks_of_strangers(&self.target, count);
        let pace = Pace::ASecond(MISSES_A_SECOND);
        let row = self
            .row("miss, 1,000 a second", &strangers, pace, 1)
            .await?;
        #[allow(clippy::cast_precision_loss, reason = "microseconds of a call")]
        let p99 = row.p99_micros as f64;
        report.promises.push(Promise::at_most(
            "misses: p99, µs",
            p99,
            MISS_P99_MICROS_MAX,
        ));
        show(&mut report.rows, row.offered(MISSES_A_SECOND));
        Ok(())
    }

    /// Checks, while an application changes memberships.
    async fn mixed(&self, report: &mut Report) -> anyhow::Result<()> {
        let (own, _) = self.own.context("mixed needs a service of its own")?;
        let checks = self.asked.checks(&self.target, self.draw);
        let what = format!("check, {} writes a second", self.settings.writes);
        let measured = self.row(&what, &checks, self.closed(), 1);
        let row = own.write(self.settings.writes, measured).await?;
        show(&mut report.rows, row?);
        Ok(())
    }
}

fn show(rows: &mut Vec<Row>, row: Row) {
    println!("{}", line(&row));
    rows.push(row);
}

/// Processor time of the service a call, in microseconds.
fn cost((outcome, spent): &(Outcome, Option<Duration>)) -> Option<f64> {
    #[allow(clippy::cast_precision_loss, reason = "a number of calls")]
    let answered = outcome.answered as f64;
    Some(spent.as_ref()?.as_secs_f64() * 1e6 / answered).filter(|cost| cost.is_finite())
}

/// One row of all rounds.
fn whole(what: &str, rounds: Vec<(Outcome, Option<Duration>)>, memory: Option<u64>) -> Option<Row> {
    let (outcomes, spent): (Vec<Outcome>, Vec<Option<Duration>>) = rounds.into_iter().unzip();
    let spent: Option<Duration> = spent.into_iter().sum();
    Some(Row::new(what, &together(outcomes)?, 1, spent, memory))
}

/// Answers that were looked into, and those of them that came from the cache.
fn cached(rounds: &[(Outcome, Option<Duration>)]) -> (usize, usize) {
    let samples = rounds.iter().flat_map(|(outcome, _)| &outcome.samples);
    let from_cache = samples.clone().filter(|sample| {
        let answer = CheckPermissionResponse::decode(sample.as_slice());
        let evidence = answer.ok().and_then(|answer| answer.evidence);
        evidence.is_some_and(|evidence| evidence.source() == Source::Cache)
    });
    (samples.clone().count(), from_cache.count())
}
