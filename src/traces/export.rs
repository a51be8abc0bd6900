//! Hands spans to a collector, over OTLP and gRPC, in batches.
//!
//! Invariants: no call waits for the collector, and what waits for it is bounded; what does not fit is dropped whole traces
//! at a time, and counted. When the service stops, the collector gets a bounded time to take the rest.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{
    WithExportConfig, WithTonicConfig, tonic_types::transport::ClientTlsConfig,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    resource::EnvResourceDetector,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
        SpanExporter,
    },
};

/// Spans that wait for the collector, those on their way to it among them: under 2 MB.
const WAITING_SPANS_MAX: usize = 2_048;

/// Spans of one request to the collector, as the specification has it by default.
const BATCH_SPANS_MAX: usize = 512;

/// How long a span waits for company.
const BATCH_WAIT_MAX: Duration = Duration::from_secs(1);

/// How long the collector may take for a batch. Until then no other is sent.
const EXPORT_WAIT_MAX: Duration = Duration::from_secs(5);

/// How long the service's end waits for the collector: longer than a collector takes, shorter than an orchestrator's
/// patience.
const FLUSH_WAIT_MAX: Duration = Duration::from_secs(2);

/// What became of spans.
#[derive(Debug, Default)]
pub struct Counts {
    /// The collector has taken them.
    pub exported: AtomicU64,
    /// The collector refused them, or did not answer.
    pub failed: AtomicU64,
    /// There was no room to wait in, or too many traces in one second.
    pub dropped: AtomicU64,
    waiting: AtomicUsize,
}

/// The way to the collector.
pub(super) struct Exporter {
    provider: SdkTracerProvider,
    pub(super) tracer: SdkTracer,
    pub(super) counts: Arc<Counts>,
}

/// Who exports. What the environment says of where this runs (`OTEL_RESOURCE_ATTRIBUTES`) has precedence.
pub fn resource() -> Resource {
    Resource::builder_empty()
        .with_service_name("hallpass")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_detector(Box::new(EnvResourceDetector::new()))
        .build()
}

impl Exporter {
    /// Connects when there is something to export. Must be called in a runtime.
    pub(super) fn new(endpoint: &str) -> Result<Self, String> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_WAIT_MAX);
        let exporter = if endpoint.starts_with("https:") {
            exporter.with_tls_config(ClientTlsConfig::new().with_native_roots())
        } else {
            exporter
        };
        let counts = Arc::new(Counts::default());
        let counted = Counted {
            exporter: exporter.build().map_err(|error| error.to_string())?,
            counts: Arc::clone(&counts),
            is_up: AtomicBool::new(true),
        };
        let batches = BatchConfigBuilder::default()
            // Never full: see `Counts::take_room`.
            .with_max_queue_size(WAITING_SPANS_MAX)
            .with_max_export_batch_size(BATCH_SPANS_MAX)
            .with_scheduled_delay(BATCH_WAIT_MAX)
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::new(counted, batches))
            // Which calls are traced has been decided before there is a span.
            .with_sampler(Sampler::AlwaysOn)
            .with_resource(resource())
            .build();
        Ok(Self {
            tracer: provider.tracer("hallpass"),
            provider,
            counts,
        })
    }

    /// Sends what waits, and gives up in time.
    pub(super) async fn shutdown(&self) {
        let provider = self.provider.clone();
        let flush = move || provider.shutdown_with_timeout(FLUSH_WAIT_MAX);
        let flushed = tokio::task::spawn_blocking(flush).await;
        if !matches!(flushed, Ok(Ok(()))) {
            let spans = self.counts.waiting.load(Ordering::Relaxed);
            tracing::warn!(
                spans,
                "the collector of traces did not take the last of them in time"
            );
        }
    }
}

impl Counts {
    /// Whether there is room for so many spans to wait: they have it then.
    pub(super) fn take_room(&self, spans: usize) -> bool {
        let before = self.waiting.fetch_add(spans, Ordering::Relaxed);
        let has_room = before + spans <= WAITING_SPANS_MAX;
        if !has_room {
            self.waiting.fetch_sub(spans, Ordering::Relaxed);
            self.count_dropped(spans);
        }
        has_room
    }

    pub(super) fn count_dropped(&self, spans: usize) {
        self.dropped.fetch_add(spans as u64, Ordering::Relaxed);
    }
}

/// Counts what becomes of batches, and logs a change of state.
#[derive(Debug)]
struct Counted {
    exporter: opentelemetry_otlp::SpanExporter,
    counts: Arc<Counts>,
    is_up: AtomicBool,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.exporter.export(batch).await;
        let became = match &result {
            Ok(()) => &self.counts.exported,
            Err(_) => &self.counts.failed,
        };
        became.fetch_add(spans as u64, Ordering::Relaxed);
        self.counts.waiting.fetch_sub(spans, Ordering::Relaxed);
        let was_up = self.is_up.swap(result.is_ok(), Ordering::Relaxed);
        match &result {
            Ok(()) if !was_up => tracing::info!("the collector of traces takes them again"),
            Err(error) if was_up => {
                tracing::warn!(%error, "the collector of traces does not take them");
            }
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_waits_whole_or_is_dropped_whole() {
        let counts = Counts::default();
        assert!(counts.take_room(WAITING_SPANS_MAX - 1));
        assert!(!counts.take_room(2));
        assert!(counts.take_room(1));
        assert!(!counts.take_room(1));
        assert_eq!(counts.dropped.load(Ordering::Relaxed), 3);
    }
}
