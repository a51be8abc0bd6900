//! The settings of what is told of single calls, their defaults and why.

use std::{env, time::Duration};

use clap::Args;
use http::Uri;

use super::parse_duration;
use crate::{
    telemetry::otlp::{self, Export},
    traces::Settings,
};

/// One in a thousand: a busy replica makes some traces a second, an idle one a few a day.
const DEFAULT_TRACE_SAMPLE: &str = "0.001";

/// They are scraped, as a rule.
const DEFAULT_OTLP_METRICS_INTERVAL: &str = "0s";

/// A hundred times what a miss takes: who waits as long has noticed.
const DEFAULT_SLOW_REQUEST: &str = "500ms";

/// Where OpenTelemetry has what a collector of metrics wants to be told; the first that is set counts.
const HEADERS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
    "OTEL_EXPORTER_OTLP_HEADERS",
];

/// Traces and slow calls.
#[derive(Args, Clone, Debug)]
pub struct TraceSettings {
    /// Where a collector takes traces: http://HOST:PORT or https://HOST:PORT, over gRPC; without it none are exported
    #[arg(long, env = "HALLPASS_OTLP_ENDPOINT", value_parser = parse_endpoint)]
    pub otlp_endpoint: Option<String>,

    /// Send metrics to the collector as well, this often; 0s sends none
    #[arg(long, env = "HALLPASS_OTLP_METRICS_INTERVAL", default_value = DEFAULT_OTLP_METRICS_INTERVAL, value_parser = parse_duration)]
    pub otlp_metrics_interval: Duration,

    /// The share of calls to trace whose callers do not say, from 0 to 1
    #[arg(long, env = "HALLPASS_TRACE_SAMPLE", default_value = DEFAULT_TRACE_SAMPLE, value_parser = parse_ratio)]
    pub trace_sample: f64,

    /// Log calls that take longer than this, and where their time went; 0s logs none
    #[arg(long, env = "HALLPASS_SLOW_REQUEST", default_value = DEFAULT_SLOW_REQUEST, value_parser = parse_duration)]
    pub slow_request: Duration,
}

impl TraceSettings {
    /// Where metrics are sent, if anywhere.
    #[must_use]
    pub fn metrics_export(&self) -> Option<Export> {
        let endpoint = self.otlp_endpoint.clone()?;
        let interval = self.otlp_metrics_interval;
        let headers = HEADERS.iter().find_map(|name| env::var(name).ok());
        (!interval.is_zero()).then(|| Export {
            endpoint,
            interval,
            headers: headers.as_deref().map(otlp::headers).unwrap_or_default(),
        })
    }
}

impl From<TraceSettings> for Settings {
    fn from(settings: TraceSettings) -> Self {
        let slow = settings.slow_request;
        Self {
            otlp_endpoint: settings.otlp_endpoint,
            sample_ratio: settings.trace_sample,
            slow_request: (!slow.is_zero()).then_some(slow),
        }
    }
}

fn parse_endpoint(text: &str) -> Result<String, String> {
    let uri: Option<Uri> = text.parse().ok();
    let is_endpoint = uri.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some()
    });
    if !is_endpoint {
        return Err("not http://HOST:PORT or https://HOST:PORT".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok();
    ratio
        .filter(|ratio| (0.0..=1.0).contains(ratio))
        .ok_or_else(|| "not a number from 0 to 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_from_0_to_1() {
        for (text, expected) in [("0", 0.0), ("0.001", 0.001), ("1", 1.0)] {
            assert_eq!(parse_ratio(text), Ok(expected));
        }
        for wrong in ["", "-0.1", "1.1", "NaN", "inf", "1%"] {
            assert!(parse_ratio(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_endpoint_is_a_url() {
        for good in ["http://localhost:4317", "https://collector.example.org"] {
            assert_eq!(parse_endpoint(good).as_deref(), Ok(good));
        }
        for wrong in ["", "localhost:4317", "ftp://localhost", "http://", "/"] {
            assert!(parse_endpoint(wrong).is_err(), "{wrong}");
        }
    }
}
