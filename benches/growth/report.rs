//! What was measured, each figure beside what is asked of it: as a table while it is measured, as JSON at the end.

use std::fmt;

use serde::Serialize;

/// Everything that one run measured.
#[derive(Default, Serialize)]
pub(crate) struct Report {
    figures: Vec<Figure>,
}

/// One figure.
#[derive(Serialize)]
struct Figure {
    section: String,
    what: String,
    found: f64,
    unit: Unit,
    at_most: Option<f64>,
    /// `None` where nothing is asked.
    holds: Option<bool>,
}

/// What a figure counts. Its name in JSON says it whole.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Nanoseconds,
    Milliseconds,
    Seconds,
    /// A million bytes.
    Megabytes,
    Bytes,
    ASecond,
    Times,
    Percent,
}

impl Report {
    /// Begins a section of the table; what follows is its own until the next.
    pub(crate) fn section<'a>(&'a mut self, title: &str, notes: &[&str]) -> Section<'a> {
        println!("\n{title}");
        for note in notes {
            println!("  ({note})");
        }
        Section {
            first: self.figures.len(),
            title: title.to_owned(),
            report: self,
        }
    }

    /// Whether all that is asked for held.
    pub(crate) fn holds(&self) -> bool {
        self.figures
            .iter()
            .all(|figure| figure.holds != Some(false))
    }

    pub(crate) fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }
}

/// A section of the table. When it ends it says what held.
pub(crate) struct Section<'a> {
    report: &'a mut Report,
    title: String,
    first: usize,
}

impl Section<'_> {
    /// A figure of which nothing is asked.
    pub(crate) fn tell(&mut self, what: &str, found: f64, unit: Unit) {
        self.add(what, found, unit, None);
    }

    /// A figure that may be so much.
    pub(crate) fn ask(&mut self, what: &str, found: f64, unit: Unit, at_most: f64) {
        self.add(what, found, unit, Some(at_most));
    }

    fn add(&mut self, what: &str, found: f64, unit: Unit, at_most: Option<f64>) {
        let asked = at_most.map_or(String::new(), |most| {
            format!("asked: at most {}", Value(most, unit))
        });
        let row = format!(
            "  {what:64}{:>14}   {asked}",
            Value(found, unit).to_string()
        );
        println!("{}", row.trim_end());
        self.report.figures.push(Figure {
            section: self.title.clone(),
            what: what.to_owned(),
            found,
            unit,
            at_most,
            holds: at_most.map(|most| found <= most),
        });
    }
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        for figure in &self.report.figures[self.first..] {
            let (Some(holds), Some(most)) = (figure.holds, figure.at_most) else {
                continue;
            };
            let (found, most) = (Value(figure.found, figure.unit), Value(most, figure.unit));
            let verdict = if holds { "holds:" } else { "FAILS:" };
            println!("  {verdict} {} is at most {most}: {found}", figure.what);
        }
    }
}

/// A number as people read it, with its unit.
struct Value(f64, Unit);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, fraction_digits) = match self.1 {
            Unit::Nanoseconds => ("ns", 0),
            Unit::Milliseconds => ("ms", 2),
            Unit::Seconds => ("s", 2),
            Unit::Megabytes => ("MB", 0),
            Unit::Bytes => ("B", 0),
            Unit::ASecond => ("/s", 0),
            Unit::Times => ("x", 2),
            Unit::Percent => ("%", 1),
        };
        write!(f, "{:.*} {unit}", fraction_digits, self.0)
    }
}
