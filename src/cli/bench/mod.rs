//! `hallpass bench`: loads a service and tells what it did: one that runs, or one that it starts on a database of its own.
//!
//! Each figure is of one run; what is compared takes turns, so that what else the machine does falls on both alike.

mod audit;
pub(crate) mod empty;
mod measure;
mod own;
mod plot;
mod questions;
mod report;
mod target;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use self::{
    measure::Bench as Measured,
    own::{Own, Place},
    questions::Asked,
    target::Target,
};
use crate::{
    cli::interrupted,
    config::{ClientSettings, parse_duration},
    load::Draw,
};

/// Load a service and print what it did: latencies, answers a second, processor time an answer
#[derive(Debug, Args)]
pub(super) struct Bench {
    /// Load the running service at --endpoint instead of one of its own, with these questions: lines of
    /// ORGANIZATION,USER,PERMISSION
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,

    /// The running service's process on this machine, for its processor time and memory
    #[arg(long, requires = "questions", value_name = "PID")]
    server_pid: Option<u32>,

    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',')]
    workloads: Vec<Workload>,

    /// Compare a check with an empty RPC, in turns: needs a service of its own
    #[arg(long, conflicts_with = "questions")]
    baseline: bool,

    /// Of the service's own database
    #[arg(long, default_value_t = 50, conflicts_with = "questions")]
    organizations: usize,

    /// Of the service's own database, in all organizations together
    #[arg(long, default_value_t = 10_000, conflicts_with = "questions")]
    members: usize,

    /// Where the service's own database is kept, for the next time
    #[arg(long, default_value = ".hallpass", conflicts_with = "questions")]
    data_dir: PathBuf,

    /// Cores of the service's own; the load and the database have the others, where there are any
    #[arg(long, default_value_t = 1, conflicts_with = "questions")]
    server_cores: usize,

    /// Connections to the service
    #[arg(long, default_value_t = 16)]
    connections: usize,

    /// Calls at once in a closed loop, on all connections together
    #[arg(long, default_value_t = 64)]
    in_flight: usize,

    /// Threads that make the load
    #[arg(long, default_value_t = 1)]
    threads: usize,

    /// For how long to measure each row
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    duration: Duration,

    /// Calls a second in open loops, with commas between; by default shares of the closed loop's
    #[arg(long, value_delimiter = ',')]
    rates: Vec<f64>,

    /// Whom questions are about: all alike, or some far more often (exponent 1)
    #[arg(long, value_enum, default_value_t = Users::Zipf)]
    users: Users,

    /// Items of a batch
    #[arg(long, default_value_t = 100)]
    batch_items: usize,

    /// Changes a second in the mixed and audit workloads
    #[arg(long, default_value_t = 50)]
    writes: u32,

    /// Streams of the audit workload
    #[arg(long, default_value_t = 10)]
    streams: usize,

    /// Write the figures as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw latency against load to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    #[command(flatten)]
    client: ClientSettings,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Checks, one a call, in a closed loop and in open ones
    Unary,
    /// Checks, --batch-items a call
    Batch,
    /// All permissions of a user
    List,
    /// Checks of users who are not cached, 1,000 a second
    Miss,
    /// Checks while memberships change
    Mixed,
    /// Streams of the audit log while memberships change
    Audit,
}

/// Whom questions are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Users {
    Uniform,
    Zipf,
}

/// Of what else is asked, the second user is asked about half as often as the first, the third a third as often.
const ZIPF_EXPONENT: f64 = 1.0;

impl Bench {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        for (what, is_zero) in [
            ("--connections", self.connections == 0),
            ("--in-flight", self.in_flight == 0),
            ("--duration", self.duration.is_zero()),
            ("--batch-items", self.batch_items == 0),
            ("--organizations", self.organizations == 0),
            ("--server-cores", self.server_cores == 0),
            (
                "each of --rates",
                !self
                    .rates
                    .iter()
                    .all(|rate| rate.is_finite() && *rate > 0.0),
            ),
        ] {
            if is_zero {
                bail!("{what} must be more than 0");
            }
        }
        if self.members < self.organizations {
            bail!("--members must be at least --organizations, so that each has one");
        }
        let draw = match self.users {
            Users::Uniform => Draw::Uniform,
            Users::Zipf => Draw::Zipf(ZIPF_EXPONENT),
        };
        if let Some(file) = &self.questions {
            let target = Target::running(&self.client, self.server_pid)?;
            return self.measure(target, Asked::read(file)?, draw, None).await;
        }
        // The programs that it has started end with it.
        let interrupted = interrupted()?;
        tokio::select! {
            measured = self.measure_own(draw) => measured,
            () = interrupted => bail!("interrupted"),
        }
    }

    async fn measure_own(&self, draw: Draw) -> anyhow::Result<ExitCode> {
        let place = Place::of(self.server_cores)?;
        place.leave_the_service_its_cores()?;
        let own = Own::start(&self.data_dir, self.organizations, self.members, &place).await?;
        let measured = self
            .measure(own.target(), own.asked().await?, draw, Some((&own, &place)))
            .await;
        own.stop().await?;
        measured
    }

    async fn measure(
        &self,
        target: Target,
        asked: Asked,
        draw: Draw,
        own: Option<(&Own, &Place)>,
    ) -> anyhow::Result<ExitCode> {
        let workloads = self.workloads(own.is_some())?;
        let bench = Measured {
            settings: self,
            target,
            asked,
            draw,
            own,
        };
        let report = bench.run(&workloads).await?;
        if let Some(path) = &self.json {
            let json = serde_json::to_string_pretty(&report)? + "\n";
            fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
        }
        if let Some(path) = &self.svg {
            let drawn = plot::latency_by_load(&report);
            fs::write(path, drawn?).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn workloads(&self, is_own: bool) -> anyhow::Result<Vec<Workload>> {
        let writes = [Workload::Mixed, Workload::Audit];
        if !is_own
            && self
                .workloads
                .iter()
                .any(|workload| writes.contains(workload))
        {
            bail!("mixed and audit change memberships, and are for a service of its own alone");
        }
        let mut workloads = self.workloads.clone();
        if workloads.is_empty() {
            workloads.extend(Workload::value_variants());
            workloads.retain(|workload| is_own || !writes.contains(workload));
        }
        Ok(workloads)
    }
}
