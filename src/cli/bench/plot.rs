//! Latency against load, drawn.

use anyhow::anyhow;
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoFont, IntoLogRange, LineSeries, PathElement,
    RGBColor, SVGBackend, SeriesLabelPosition, WHITE,
};

use super::report::{Report, Row};

const SIZE: (u32, u32) = (960, 540);

/// A percentile, how it is read from a row, and its colour.
type Curve = (&'static str, fn(&Row) -> u64, RGBColor);

const CURVES: [Curve; 3] = [
    ("p50", |row| row.p50_micros, RGBColor(0x2b, 0x8c, 0xbe)),
    ("p99", |row| row.p99_micros, RGBColor(0xe6, 0x8a, 0x00)),
    ("p99.9", |row| row.p999_micros, RGBColor(0xc0, 0x39, 0x2b)),
];

/// Of the open loops, as SVG; the latencies on a logarithmic scale.
pub(super) fn latency_by_load(report: &Report) -> anyhow::Result<String> {
    let most_offered = report
        .open_loop
        .iter()
        .filter_map(|row| row.offered_a_second);
    let most_offered = most_offered.fold(1.0, f64::max);
    let longest = report.open_loop.iter().map(|row| row.p999_micros).max();
    #[allow(clippy::cast_precision_loss, reason = "microseconds of a call")]
    let longest = longest.unwrap_or(1).max(100) as f64 / 1e3;
    let mut svg = String::new();
    {
        let failed = |error: &dyn std::fmt::Display| anyhow!("cannot draw: {error}");
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(
                "Latency of a check against load",
                ("sans-serif", 22).into_font(),
            )
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..most_offered * 1.05, (0.01..longest * 2.0).log_scale())
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .max_light_lines(4)
            .x_desc("checks a second, open loop")
            .y_desc("milliseconds from when a check is due")
            .x_label_formatter(&|value| format!("{value:.0}"))
            .y_label_formatter(&|value| format!("{value}"))
            .draw()
            .map_err(|error| failed(&error))?;
        for (name, micros, colour) in CURVES {
            let points = report.open_loop.iter().filter_map(|row| {
                #[allow(clippy::cast_precision_loss, reason = "microseconds of a call")]
                let millis = micros(row).max(10) as f64 / 1e3;
                Some((row.offered_a_second?, millis))
            });
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))
                .map_err(|error| failed(&error))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE)
            .border_style(RGBColor(0xbb, 0xbb, 0xbb))
            .draw()
            .map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(svg)
}
