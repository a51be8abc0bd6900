//! A page of metrics as it is written: OpenMetrics text, by prometheus-client.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use crate::counters::{BUCKETS_MICROS, Durations};

pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

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

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let mut gauge = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        gauge.encode_gauge(&value)
    }

    /// `_seconds` is added to the name.
    pub(super) fn histograms<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        durations: impl IntoIterator<Item = (L, Durations)>,
    ) -> fmt::Result {
        let mut family =
            self.0
                .encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (labels, durations) in durations {
            let mut histogram = family.encode_family(&labels)?;
            let count = durations.buckets.iter().sum();
            #[expect(clippy::cast_precision_loss, reason = "bounds of some seconds")]
            let bounds = BUCKETS_MICROS.iter().map(|micros| *micros as f64 / 1e6);
            let bounds = bounds.chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(durations.buckets).collect();
            histogram.encode_histogram::<NoLabelSet>(
                durations.sum.as_secs_f64(),
                count,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}
