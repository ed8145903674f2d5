//! What passed, what failed, and how long it took.

use std::time::Duration;

/// The outcome of one part.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Tests and checks that passed.
    pub(crate) passed: usize,
    /// Names of those that failed.
    pub(crate) failed: Vec<String>,
}

/// The outcomes of all parts that ran, in order.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    rows: Vec<(&'static str, Outcome, Duration)>,
}

/// Counts what a test program says, line by line.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    passed: usize,
    failed: usize,
    names: Vec<String>,
}

impl Outcome {
    /// One check, done or not.
    pub(crate) fn check(&mut self, name: &str, ok: bool) {
        if ok {
            self.passed += 1;
        } else {
            self.failed.push(name.to_owned());
        }
    }
}

impl Counter {
    /// Takes one line of libtest's output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.passed += number_before(rest, " passed");
            self.failed += number_before(rest, " failed");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.names.push(name.to_owned());
        }
    }

    /// Adds what was counted. A program that failed without saying which test (it crashed,
    /// or ran out of time) counts as one failure.
    pub(crate) fn add_to(self, outcome: &mut Outcome, program: &str, success: bool) {
        outcome.passed += self.passed;
        let unnamed = self.failed.saturating_sub(self.names.len());
        let none_seen = self.failed == 0 && self.names.is_empty();
        outcome.failed.extend(self.names.into_iter().map(|name| format!("{program}: {name}")));
        outcome.failed.extend((0..unnamed).map(|_| format!("{program}: a test")));
        if !success && none_seen {
            outcome.failed.push(format!("{program}: ended early"));
        }
    }
}

impl Summary {
    /// Adds a part.
    pub(crate) fn add(&mut self, part: &'static str, outcome: Outcome, time: Duration) {
        self.rows.push((part, outcome, time));
    }

    /// True where nothing failed.
    pub(crate) fn good(&self) -> bool {
        self.rows.iter().all(|(_, outcome, _)| outcome.failed.is_empty())
    }

    /// The table, the failures by name, and the line `N passed, N failed`.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("\n{:<12} {:>7} {:>7} {:>9}\n", "part", "passed", "failed", "time");
        let (mut passed, mut failed) = (0, 0);
        for (part, outcome, time) in &self.rows {
            passed += outcome.passed;
            failed += outcome.failed.len();
            text.push_str(&format!(
                "{part:<12} {:>7} {:>7} {:>7.1} s\n",
                outcome.passed,
                outcome.failed.len(),
                time.as_secs_f64()
            ));
        }
        for (part, outcome, _) in &self.rows {
            for name in &outcome.failed {
                text.push_str(&format!("\nfailed in {part}: {name}"));
            }
        }
        text.push_str(&format!("\n{passed} passed, {failed} failed\n"));
        text
    }
}

fn number_before(text: &str, word: &str) -> usize {
    let Some(end) = text.find(word) else { return 0 };
    text[..end].rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(lines: &[&str], success: bool) -> Outcome {
        let mut counter = Counter::default();
        for line in lines {
            counter.line(line);
        }
        let mut outcome = Outcome::default();
        counter.add_to(&mut outcome, "model", success);
        outcome
    }

    #[test]
    fn passed_and_failed_tests_are_counted_and_named() {
        let outcome = counted(
            &[
                "test a::b ... ok",
                "test a::c ... FAILED",
                "test result: FAILED. 7 passed; 1 failed; 0 ignored",
            ],
            false,
        );
        assert_eq!(outcome.passed, 7);
        assert_eq!(outcome.failed, ["model: a::c"]);
    }

    #[test]
    fn a_crash_is_a_failure() {
        assert_eq!(counted(&["test a::b ... ok"], false).failed, ["model: ended early"]);
    }

    #[test]
    fn the_last_line_is_for_machines() {
        let mut summary = Summary::default();
        summary.add(
            "unit",
            counted(&["test result: ok. 7 passed; 0 failed; 0 ignored"], true),
            Duration::ZERO,
        );
        assert!(summary.good());
        assert!(summary.text().ends_with("\n7 passed, 0 failed\n"));
    }
}
