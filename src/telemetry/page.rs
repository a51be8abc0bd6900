//! A page of metrics as it is written: OpenMetrics text, by prometheus-client.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use crate::counters::{Distribution, Histograms};

pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

/// Durations are counted in microseconds, and shown in seconds.
pub(super) const MICROS: f64 = 1e-6;

/// A metric's labels and their values.
pub(super) type Labels<const N: usize> = [(&'static str, &'static str); N];

impl Page<'_> {
    /// `_total` is added to the name.
    pub(super) fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        counts: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, count) in counts {
            let mut counter = family.encode_family(&labels)?;
            counter.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, count: u64) -> fmt::Result {
        let mut counter = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        counter.encode_counter::<NoLabelSet, _, u64>(&count, None)
    }

    pub(super) fn seconds_counter(&mut self, name: &str, help: &str, seconds: f64) -> fmt::Result {
        let mut counter = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        counter.encode_counter::<NoLabelSet, _, f64>(&seconds, None)
    }

    pub(super) fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let mut gauge = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        gauge.encode_gauge(&value)
    }

    /// `series` are places in `histograms`, whose values are `unit` each.
    pub(super) fn histograms<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        (histograms, unit): (&Histograms, f64),
        series: impl IntoIterator<Item = (L, usize)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, place) in series {
            encode(family.encode_family(&labels)?, histograms, unit, place)?;
        }
        Ok(())
    }

    /// The first series of `histograms`.
    pub(super) fn histogram(
        &mut self,
        name: &str,
        help: &str,
        (histograms, unit): (&Histograms, f64),
    ) -> fmt::Result {
        let histogram = self
            .0
            .encode_descriptor(name, help, None, MetricType::Histogram)?;
        encode(histogram, histograms, unit, 0)
    }
}

fn encode(
    mut encoder: MetricEncoder<'_>,
    histograms: &Histograms,
    unit: f64,
    place: usize,
) -> fmt::Result {
    let Distribution { sum, buckets } = histograms.read(place);
    let count = buckets.iter().sum();
    let bounds = histograms.bounds().iter();
    let bounds = bounds.map(|bound| float(*bound) * unit);
    let buckets: Vec<(f64, u64)> = bounds.chain([f64::INFINITY]).zip(buckets).collect();
    encoder.encode_histogram::<NoLabelSet>(float(sum) * unit, count, &buckets, None)
}

pub(super) fn flag(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
pub(super) fn signed(count: i64) -> f64 {
    count as f64
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
pub(super) fn float(count: u64) -> f64 {
    count as f64
}
