//! The table: what was measured, the limit, and whether it holds.

use std::fmt::Write as _;
use std::time::Duration;

/// One line.
#[derive(Debug)]
pub struct Row {
    /// What was measured.
    pub work: String,
    /// The value, with its unit.
    pub measured: String,
    /// The limit, with its unit.
    pub limit: String,
    /// Whether the limit holds.
    pub holds: bool,
}

/// The lines, in order.
#[derive(Debug, Default)]
pub struct Report(Vec<Row>);

impl Report {
    /// A value with an upper limit.
    pub fn at_most(&mut self, work: impl Into<String>, value: f64, limit: f64, unit: &str, detail: &str) {
        self.0.push(Row {
            work: work.into(),
            measured: format!("{value:.2}{unit}{detail}"),
            limit: format!("at most {limit}{unit}"),
            holds: value <= limit,
        });
    }

    /// A value with a lower limit.
    pub fn at_least(&mut self, work: impl Into<String>, value: f64, limit: f64, unit: &str, detail: &str) {
        self.0.push(Row {
            work: work.into(),
            measured: format!("{value:.2}{unit}{detail}"),
            limit: format!("at least {limit}{unit}"),
            holds: value >= limit,
        });
    }

    /// A value that nothing is asked of.
    pub fn shown(&mut self, work: impl Into<String>, measured: String) {
        self.0.push(Row { work: work.into(), measured, limit: "none".to_owned(), holds: true });
    }

    /// Something that could not be measured counts as missed.
    pub fn missed(&mut self, work: impl Into<String>, why: String) {
        self.0.push(Row { work: work.into(), measured: why, limit: String::new(), holds: false });
    }

    /// True where no limit was missed.
    pub fn holds(&self) -> bool {
        self.0.iter().all(|row| row.holds)
    }

    /// As a Markdown table.
    pub fn table(&self) -> String {
        let mut out = String::from("| work | measured | limit | |\n|---|---|---|---|\n");
        for row in &self.0 {
            let verdict = if row.holds { "PASS" } else { "**FAIL**" };
            let _ = writeln!(out, "| {} | {} | {} | {verdict} |", row.work, row.measured, row.limit);
        }
        out
    }
}

/// A time in the unit that reads best.
pub fn text(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    if micros < 1000.0 { format!("{micros:.1} µs") } else { format!("{:.1} ms", micros / 1000.0) }
}
