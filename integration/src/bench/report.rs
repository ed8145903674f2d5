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
    /// What became of the limit.
    pub verdict: Verdict,
}

/// What became of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Holds,
    /// It does not, or nobody knows.
    Missed,
    /// There is none.
    NoLimit,
}

impl Verdict {
    fn of(holds: bool) -> Self {
        if holds { Verdict::Holds } else { Verdict::Missed }
    }

    fn text(self) -> &'static str {
        match self {
            Verdict::Holds => "PASS",
            Verdict::Missed => "**FAIL**",
            Verdict::NoLimit => "-",
        }
    }
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
            verdict: Verdict::of(value <= limit),
        });
    }

    /// A value with a lower limit.
    pub fn at_least(&mut self, work: impl Into<String>, value: f64, limit: f64, unit: &str, detail: &str) {
        self.0.push(Row {
            work: work.into(),
            measured: format!("{value:.2}{unit}{detail}"),
            limit: format!("at least {limit}{unit}"),
            verdict: Verdict::of(value >= limit),
        });
    }

    /// A value that nothing is asked of.
    pub fn shown(&mut self, work: impl Into<String>, measured: String) {
        self.0.push(Row { work: work.into(), measured, limit: "none".to_owned(), verdict: Verdict::NoLimit });
    }

    /// Something that could not be measured counts as missed.
    pub fn missed(&mut self, work: impl Into<String>, why: String) {
        self.0.push(Row { work: work.into(), measured: why, limit: String::new(), verdict: Verdict::Missed });
    }

    /// True where no limit was missed.
    pub fn holds(&self) -> bool {
        self.0.iter().all(|row| row.verdict != Verdict::Missed)
    }

    /// As a Markdown table.
    pub fn table(&self) -> String {
        let mut out = String::from("| work | measured | limit | |\n|---|---|---|---|\n");
        for row in &self.0 {
            let verdict = row.verdict.text();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_limit_passes_or_fails() {
        let mut report = Report::default();
        report.at_most("a", 1.0, 2.0, " ms", "");
        report.shown("b", "3".to_owned());
        assert!(report.holds());
        report.at_least("c", 1.0, 2.0, "x", "");
        assert!(!report.holds());
        let table = report.table();
        let verdicts: Vec<_> = table.lines().skip(2).map(|line| line.rsplit('|').nth(1)).collect();
        assert_eq!(verdicts, [" PASS ", " - ", " **FAIL** "].map(Some));
    }
}
