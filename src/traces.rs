//! What is told of single calls: a trace of those that are sampled, a line in the log for those that are slow.
//!
//! Invariants: a call is looked at when it has ended, so that one which is neither sampled nor slow costs the look at one
//! header and the throw of one die; both are bounded in rate; and no stranger decides what is traced.

mod export;
mod parent;

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue,
    trace::{Span, SpanBuilder, SpanKind, Status, TraceContextExt, TraceId, Tracer},
};
use thiserror::Error;

use self::export::Exporter;
pub use self::{
    export::{Counts, resource},
    parent::Parent,
};
use crate::trail::{Kind, Step, Trail};

/// Whatever callers and the ratio say: some hundred microseconds of a core in each second, and 500 spans.
const TRACES_A_SECOND_MAX: NonZeroU32 = NonZeroU32::new(100).unwrap();

/// When everything is slow, each line says the same.
const SLOW_LINES_A_SECOND_MAX: NonZeroU32 = NonZeroU32::new(10).unwrap();

/// Which calls are told of, and to whom.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The collector's, over gRPC; `None`: nothing is exported.
    pub otlp_endpoint: Option<String>,
    /// Of calls whose caller has not decided, the share that is traced: from 0 to 1.
    pub sample_ratio: f64,
    /// What takes longer is logged; `None`: nothing is.
    pub slow_request: Option<Duration>,
}

/// The collector cannot be reached in the way that was set.
#[derive(Debug, Error)]
#[error("--otlp-endpoint: {0}")]
pub struct EndpointError(String);

/// How a call came in, and the number that says how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With a google.rpc.Code.
    Grpc(u16),
    /// With a status; 0 for one that is not told apart.
    Http(u16),
}

/// What is known of a call when it begins.
#[derive(Debug)]
pub struct Begun {
    parent: Option<Parent>,
}

/// A call that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// As in `auth::access`.
    pub method: &'static str,
    pub ending: Ending,
    pub since: Instant,
    pub took: Duration,
    /// A stream lasts as long as its caller likes.
    pub is_stream: bool,
    /// Whether the method is one that the cache answers.
    pub is_cached: bool,
}

/// What is done about calls that have ended.
pub struct Traces {
    exporter: Option<Exporter>,
    sample_ratio: f64,
    traces_left: DefaultDirectRateLimiter,
    slow_request: Option<Duration>,
    slow_lines_left: DefaultDirectRateLimiter,
    /// Slow calls since the last line.
    unlogged: AtomicU64,
}

impl Traces {
    /// Must be called in a runtime.
    ///
    /// # Errors
    /// When the endpoint is none.
    pub fn new(settings: &Settings) -> Result<Self, EndpointError> {
        let endpoint = settings.otlp_endpoint.as_deref();
        let exporter = endpoint.map(Exporter::new).transpose();
        Ok(Self {
            exporter: exporter.map_err(EndpointError)?,
            sample_ratio: settings.sample_ratio,
            traces_left: RateLimiter::direct(Quota::per_second(TRACES_A_SECOND_MAX)),
            slow_request: settings.slow_request,
            slow_lines_left: RateLimiter::direct(Quota::per_second(SLOW_LINES_A_SECOND_MAX)),
            unlogged: AtomicU64::new(0),
        })
    }

    /// What became of spans; `None` where nothing is exported.
    #[must_use]
    pub fn counts(&self) -> Option<&Counts> {
        Some(&self.exporter.as_ref()?.counts)
    }

    /// What to keep of a call, if anything.
    #[must_use]
    pub fn begin(&self, headers: &HeaderMap) -> Option<(Begun, Trail)> {
        if self.exporter.is_none() && self.slow_request.is_none() {
            return None;
        }
        let parent = Parent::of(headers);
        Some((Begun { parent }, Trail::default()))
    }

    /// Tells of a call, where it is to be told of.
    pub fn end(&self, begun: &Begun, trail: &Trail, call: &Call) {
        let trace_id = self.export(begun, trail, call);
        if let Some(trace_id) = trace_id
            && !call.ending.is_good()
        {
            let (method, ending) = (call.method, call.ending.number());
            tracing::info!(%trace_id, method, ending, "a traced call failed");
        }
        if self.slow_request.is_some_and(|slow| call.took > slow) && !call.is_stream {
            let named = begun.parent.as_ref().map(|parent| parent.trace_id);
            self.log_slow(trail, call, trace_id.or(named));
        }
    }

    /// Sends what waits to the collector, for a bounded time.
    pub async fn shutdown(&self) {
        if let Some(exporter) = &self.exporter {
            exporter.shutdown().await;
        }
    }

    /// A sampled call's trace.
    fn export(&self, begun: &Begun, trail: &Trail, call: &Call) -> Option<TraceId> {
        let exporter = self.exporter.as_ref()?;
        // A stranger neither has itself traced nor joins anybody's trace.
        let parent = begun.parent.as_ref().filter(|_| trail.is_admitted);
        let is_sampled = parent.map_or_else(
            || self.sample_ratio > 0.0 && rand::random_bool(self.sample_ratio),
            |parent| parent.is_sampled,
        );
        if !is_sampled {
            return None;
        }
        let steps = trail.steps();
        let spans = 1 + steps.len();
        if self.traces_left.check().is_err() {
            exporter.counts.count_dropped(spans);
            return None;
        }
        if !exporter.counts.take_room(spans) {
            return None;
        }
        Some(exporter.export(parent, &steps, trail, call))
    }

    fn log_slow(&self, trail: &Trail, call: &Call, trace_id: Option<TraceId>) {
        if self.slow_lines_left.check().is_err() {
            self.unlogged.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let unlogged = self.unlogged.swap(0, Ordering::Relaxed);
        let until = call.since + call.took;
        let steps = trail.steps();
        let spent = |is: fn(Kind) -> bool| -> Duration {
            let steps = steps.iter().filter(|step| is(step.kind));
            steps.map(|step| step.between(call.since, until).1).sum()
        };
        let authentication = spent(|kind| kind == Kind::Authentication);
        let queue = spent(|kind| kind == Kind::Queue);
        let connection = spent(|kind| kind == Kind::Connection);
        let database = spent(|kind| matches!(kind, Kind::Statement(_)));
        // Reading the request, the cache, decoding, encoding, and waiting for a core.
        let rest = call
            .took
            .saturating_sub(authentication + queue + connection + database);
        let statements: Vec<_> = steps
            .iter()
            .filter_map(|step| match step.kind {
                Kind::Statement(name) => Some(name),
                _ => None,
            })
            .collect();
        let trace_id = trace_id.map(tracing::field::display);
        tracing::warn!(
            method = call.method,
            ending = call.ending.number(),
            took_ms = millis(call.took),
            authentication_ms = millis(authentication),
            queue_ms = millis(queue),
            connection_ms = millis(connection),
            database_ms = millis(database),
            rest_ms = millis(rest),
            statements = statements.join(" "),
            trace_id,
            unlogged,
            "a slow call"
        );
    }
}

impl Exporter {
    fn export(
        &self,
        parent: Option<&Parent>,
        steps: &[Step],
        trail: &Trail,
        call: &Call,
    ) -> TraceId {
        let context = Context::new();
        let context = match parent {
            Some(parent) => context.with_remote_span_context(parent.context()),
            None => context,
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "other services' spans are told by the wall's clock, and nothing is decided by these"
        )]
        let began = SystemTime::now() - call.took;
        let at = |instant: Instant| began + instant.saturating_duration_since(call.since);
        let until = call.since + call.took;
        let mut attributes = call.ending.attributes(call.method);
        if let Some(source) = source(trail, call) {
            attributes.push(KeyValue::new("hallpass.source", source));
        }
        let builder = SpanBuilder::from_name(call.method.trim_start_matches('/'))
            .with_kind(SpanKind::Server)
            .with_start_time(began)
            .with_attributes(attributes);
        let mut span = self.tracer.build_with_context(builder, &context);
        let trace_id = span.span_context().trace_id();
        let context = context.with_remote_span_context(span.span_context().clone());
        for step in steps {
            let (began, took) = step.between(call.since, until);
            let builder = describe(step.kind).with_start_time(at(began));
            let mut span = self.tracer.build_with_context(builder, &context);
            span.end_with_timestamp(at(began + took));
        }
        if call.ending.is_our_fault() {
            span.set_status(Status::error(""));
        }
        span.end_with_timestamp(at(until));
        trace_id
    }
}

/// Where the answer came from, where that is a question.
fn source(trail: &Trail, call: &Call) -> Option<&'static str> {
    if trail.reads_database {
        return Some("database");
    }
    (call.is_cached && call.ending.is_good()).then_some("cache")
}

fn describe(kind: Kind) -> SpanBuilder {
    match kind {
        Kind::Authentication => SpanBuilder::from_name("authentication"),
        Kind::Queue => SpanBuilder::from_name("wait for a load"),
        Kind::Connection => SpanBuilder::from_name("wait for a connection"),
        Kind::Statement(name) => SpanBuilder::from_name(name)
            .with_kind(SpanKind::Client)
            .with_attributes([
                KeyValue::new("db.system.name", "postgresql"),
                KeyValue::new("db.operation.name", name),
            ]),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Ending {
    fn number(self) -> u16 {
        match self {
            Self::Grpc(number) | Self::Http(number) => number,
        }
    }

    fn is_good(self) -> bool {
        match self {
            Self::Grpc(code) => code == 0,
            Self::Http(status) => (200..400).contains(&status),
        }
    }

    /// What the conventions have as an error of the server's: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
    /// UNAVAILABLE and DATA_LOSS; 5xx.
    fn is_our_fault(self) -> bool {
        match self {
            Self::Grpc(code) => [2, 4, 12, 13, 14, 15].contains(&code),
            Self::Http(status) => status >= 500,
        }
    }

    /// As <https://opentelemetry.io/docs/specs/semconv/> names them.
    fn attributes(self, method: &'static str) -> Vec<KeyValue> {
        match self {
            Self::Grpc(code) => {
                let parts = method.trim_start_matches('/').split_once('/');
                let (service, method) = parts.unwrap_or(("", method));
                vec![
                    KeyValue::new("rpc.system", "grpc"),
                    KeyValue::new("rpc.service", service),
                    KeyValue::new("rpc.method", method),
                    KeyValue::new("rpc.grpc.status_code", i64::from(code)),
                ]
            }
            Self::Http(status) => {
                let (method, route) = method.split_once(' ').unwrap_or(("_OTHER", method));
                vec![
                    KeyValue::new("http.request.method", method),
                    KeyValue::new("http.route", route),
                    KeyValue::new("http.response.status_code", i64::from(status)),
                ]
            }
        }
    }
}
