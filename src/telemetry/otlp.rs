//! The metrics as a collector takes them, over OTLP and gRPC, for those whom nobody scrapes.
//!
//! Invariant: it sends what a scrape would show, under the same names, and nobody waits for it.

use std::{
    str::FromStr,
    time::{Duration, SystemTime},
};

use http::{HeaderName, HeaderValue};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::{
        ExportMetricsServiceRequest, metrics_service_client::MetricsServiceClient,
    },
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
    },
    resource::v1::Resource,
};
use percent_encoding::percent_decode_str;
use tokio::time::{MissedTickBehavior, interval};
use tonic::{
    Extensions, Request,
    metadata::MetadataMap,
    transport::{Channel, ClientTlsConfig, Endpoint, Error},
};

use super::Metrics;
use crate::traces::resource;

/// How long the collector may take; what it misses, the next export has.
const EXPORT_WAIT_MAX: Duration = Duration::from_secs(5);

/// Where metrics are sent, and how often.
#[derive(Clone, Debug)]
pub struct Export {
    pub endpoint: String,
    pub interval: Duration,
    /// What the collector wants to be told: see [`headers`].
    pub headers: MetadataMap,
}

/// `NAME=VALUE,...`, values percent-encoded, as `OTEL_EXPORTER_OTLP_HEADERS` has it for traces as well. What is no
/// header is left out, as it is of traces. Values are secret: they are not shown.
#[must_use]
pub fn headers(text: &str) -> MetadataMap {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let header = |(name, value): (&str, &str)| {
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_str(name.trim()).ok()?, value))
    };
    MetadataMap::from_headers(pairs.filter_map(header).collect())
}

impl Export {
    /// A way to the collector; it connects when there is something to send. Must be called in a runtime.
    ///
    /// # Errors
    /// When the endpoint cannot be one.
    pub fn channel(&self) -> Result<Channel, Error> {
        let endpoint = Endpoint::from_shared(self.endpoint.clone())?
            .connect_timeout(EXPORT_WAIT_MAX)
            .timeout(EXPORT_WAIT_MAX);
        let endpoint = if self.endpoint.starts_with("https:") {
            endpoint.tls_config(ClientTlsConfig::new().with_native_roots())?
        } else {
            endpoint
        };
        Ok(endpoint.connect_lazy())
    }

    /// Sends until it is dropped.
    pub async fn run(self, channel: Channel, metrics: Metrics) {
        let mut client = MetricsServiceClient::new(channel);
        let begun = now();
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_up = true;
        loop {
            ticks.tick().await;
            let Ok(page) = metrics.page() else {
                continue;
            };
            let message = request(&page, begun, now());
            let message = Request::from_parts(self.headers.clone(), Extensions::new(), message);
            let exported = client.export(message).await;
            match &exported {
                Ok(_) if !is_up => tracing::info!("the collector takes metrics again"),
                Err(error) if is_up => {
                    tracing::warn!(%error, "the collector does not take metrics");
                }
                _ => {}
            }
            is_up = exported.is_ok();
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "said to others; nothing is measured with it"
)]
fn now() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_1970.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

fn request(page: &str, begun: u64, now: u64) -> ExportMetricsServiceRequest {
    let attributes = resource();
    let attributes = attributes
        .iter()
        .map(|(name, value)| attribute(name.as_str(), &value.to_string()));
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(Resource {
                attributes: attributes.collect(),
                ..Resource::default()
            }),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(InstrumentationScope {
                    name: "hallpass".to_owned(),
                    ..InstrumentationScope::default()
                }),
                metrics: metrics(page, begun, now),
                ..ScopeMetrics::default()
            }],
            ..ResourceMetrics::default()
        }],
    }
}

fn attribute(name: &str, value: &str) -> KeyValue {
    KeyValue {
        key: name.to_owned(),
        value: Some(AnyValue {
            value: Some(any_value::Value::StringValue(value.to_owned())),
        }),
        ..KeyValue::default()
    }
}

/// The families of a page of ours: its labels hold no quotation marks.
fn metrics(page: &str, begun: u64, now: u64) -> Vec<Metric> {
    let mut metrics: Vec<Metric> = Vec::new();
    let mut help = "";
    for line in page.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some(family) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = family.split_once(' ') else {
                continue;
            };
            let cumulative = AggregationTemporality::Cumulative.into();
            let (suffix, data) = match kind {
                "counter" => (
                    "_total",
                    Data::Sum(Sum {
                        aggregation_temporality: cumulative,
                        is_monotonic: true,
                        ..Sum::default()
                    }),
                ),
                "histogram" => (
                    "",
                    Data::Histogram(Histogram {
                        aggregation_temporality: cumulative,
                        ..Histogram::default()
                    }),
                ),
                _ => ("", Data::Gauge(Gauge::default())),
            };
            metrics.push(Metric {
                name: format!("{name}{suffix}"),
                description: help.to_owned(),
                data: Some(data),
                ..Metric::default()
            });
        } else if let (Some(metric), Some((sample, value))) =
            (metrics.last_mut(), line.rsplit_once(' '))
            && let (Some(data), Ok(value)) = (&mut metric.data, value.parse())
        {
            let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
            let labels = labels.strip_suffix('}').unwrap_or(labels);
            let times = (begun, now);
            match data {
                Data::Sum(sum) => sum.data_points.push(point(labels, value, times)),
                Data::Gauge(gauge) => gauge.data_points.push(point(labels, value, times)),
                Data::Histogram(histogram) => add(histogram, name, labels, value, times),
                _ => {}
            }
        }
    }
    metrics.retain(has_points);
    metrics
}

/// Some families have none: without TLS there is no certificate.
fn has_points(metric: &Metric) -> bool {
    match &metric.data {
        Some(Data::Sum(sum)) => !sum.data_points.is_empty(),
        Some(Data::Gauge(gauge)) => !gauge.data_points.is_empty(),
        Some(Data::Histogram(histogram)) => !histogram.data_points.is_empty(),
        _ => false,
    }
}

fn labels(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let pairs = text.split("\",").filter_map(|pair| pair.split_once("=\""));
    pairs.map(|(name, value)| (name, value.trim_end_matches('"')))
}

fn attributes(text: &str) -> Vec<KeyValue> {
    labels(text)
        .filter(|(name, _)| *name != "le")
        .map(|(name, value)| attribute(name, value))
        .collect()
}

fn point(labels: &str, value: f64, (begun, now): (u64, u64)) -> NumberDataPoint {
    NumberDataPoint {
        attributes: attributes(labels),
        start_time_unix_nano: begun,
        time_unix_nano: now,
        value: Some(number_data_point::Value::AsDouble(value)),
        ..NumberDataPoint::default()
    }
}

/// A series' sum comes first, then its count, then its buckets, each with those before it.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts, exact up to 2^53"
)]
fn add(histogram: &mut Histogram, name: &str, text: &str, value: f64, (begun, now): (u64, u64)) {
    if name.ends_with("_sum") {
        histogram.data_points.push(HistogramDataPoint {
            attributes: attributes(text),
            start_time_unix_nano: begun,
            time_unix_nano: now,
            sum: Some(value),
            ..HistogramDataPoint::default()
        });
        return;
    }
    let Some(point) = histogram.data_points.last_mut() else {
        return;
    };
    if name.ends_with("_count") {
        point.count = value as u64;
        return;
    }
    let bound = labels(text).find(|(name, _)| *name == "le");
    let bound = bound.and_then(|(_, bound)| bound.parse().ok());
    point
        .explicit_bounds
        .extend(bound.filter(|bound: &f64| bound.is_finite()));
    let before: u64 = point.bucket_counts.iter().sum();
    point
        .bucket_counts
        .push((value as u64).saturating_sub(before));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_and_are_secret() {
        let found = headers("authorization=Bearer%20s3cret, x-tenant = a=b,,nothing,b d=1,c=%0a");
        let found = found.into_headers();
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found["authorization"], "Bearer s3cret");
        assert_eq!(found["x-tenant"], "a=b");
        assert!(!format!("{found:?}").contains("s3cret"));
    }

    #[test]
    fn a_page_says_the_same_over_otlp() {
        let page = "# HELP calls Calls that began.\n# TYPE calls counter\n\
            calls_total{route=\"/a/{b}\",code=\"OK\"} 3\n\
            # HELP age Since.\n# TYPE age gauge\nage +Inf\n\
            # HELP took How long.\n# TYPE took histogram\n\
            took_sum{m=\"x\"} 1.5\ntook_count{m=\"x\"} 4\n\
            took_bucket{le=\"0.1\",m=\"x\"} 1\ntook_bucket{le=\"1.0\",m=\"x\"} 3\ntook_bucket{le=\"+Inf\",m=\"x\"} 4\n# EOF\n";
        let found = metrics(page, 1, 2);
        let names: Vec<&str> = found.iter().map(|metric| &*metric.name).collect();
        assert_eq!(names, ["calls_total", "age", "took"]);
        let Some(Data::Sum(calls)) = &found[0].data else {
            panic!("{found:?}")
        };
        assert!(calls.is_monotonic);
        assert_eq!(
            calls.data_points[0].attributes,
            [attribute("route", "/a/{b}"), attribute("code", "OK")]
        );
        let Some(Data::Gauge(age)) = &found[1].data else {
            panic!("{found:?}")
        };
        let infinite = number_data_point::Value::AsDouble(f64::INFINITY);
        assert_eq!(age.data_points[0].value, Some(infinite));
        let Some(Data::Histogram(took)) = &found[2].data else {
            panic!("{found:?}")
        };
        let [series] = &took.data_points[..] else {
            panic!("{found:?}")
        };
        assert_eq!((series.count, series.sum), (4, Some(1.5)));
        assert_eq!(series.bucket_counts, [1, 2, 1]);
        assert_eq!(series.explicit_bounds, [0.1, 1.0]);
        assert_eq!(series.attributes, [attribute("m", "x")]);
    }
}
