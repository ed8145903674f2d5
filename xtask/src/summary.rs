//! What passed, what failed, and how long it took.

use std::time::Duration;

/// The outcome of one part.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Tests and checks that passed.
    pub(crate) passed: usize,
    /// Those that failed.
    pub(crate) failed: Vec<Failed>,
}

/// A test or check that failed.
#[derive(Debug, Default)]
pub(crate) struct Failed {
    /// Its name.
    pub(crate) name: String,
    /// What it said, in lines; empty where it said nothing of its own.
    said: Vec<String>,
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
    named: Vec<Failed>,
    /// What was said since a test ended.
    since: Vec<String>,
    /// The test whose output this is, where libtest shows it after all have ended.
    showing: Option<String>,
}

/// Lines of what a failed test said that are said again at the end, from its begin and from its end each.
const SAID: usize = 20;

impl Outcome {
    /// One check, done or not.
    pub(crate) fn check(&mut self, name: &str, ok: bool) {
        if ok {
            self.passed += 1;
        } else {
            self.failed.push(Failed::new(name));
        }
    }

    /// Names of those that failed.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.failed.iter().map(|failed| failed.name.as_str()).collect()
    }
}

impl Failed {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), said: Vec::new() }
    }

    /// The name and below it what was said; where that is long, without its middle.
    fn text(&self) -> String {
        let left_out = self.said.len().saturating_sub(2 * SAID);
        let mut text = self.name.clone();
        for (index, line) in self.said.iter().enumerate() {
            match index.checked_sub(SAID).filter(|beyond| *beyond < left_out) {
                None => text.push_str(&format!("\n    {line}")),
                Some(0) => text.push_str(&format!("\n    [{left_out} lines]")),
                Some(_) => {}
            }
        }
        text
    }
}

impl Counter {
    /// Takes one line of libtest's output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.showing = None;
            self.passed += number_before(rest, " passed");
            self.failed += number_before(rest, " failed");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            // Those that do not show it afterwards say it just before.
            let begin = format!("{name}: ");
            let begin = self.since.iter().rposition(|line| line.starts_with(&begin));
            let said = begin.map(|begin| self.since.split_off(begin)).unwrap_or_default();
            self.since.clear();
            self.named.push(Failed { name: name.to_owned(), said });
        } else if let Some(name) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.showing = Some(name.to_owned());
        } else if line == "failures:" || line == "successes:" {
            self.showing = None;
        } else if let Some(name) = &self.showing {
            let failed = self.named.iter_mut().find(|failed| failed.name == *name);
            if let Some(failed) = failed.filter(|_| !line.is_empty()) {
                failed.said.push(line.to_owned());
            }
        } else if line.starts_with("test ") {
            self.since.clear();
        } else {
            self.since.push(line.to_owned());
        }
    }

    /// Adds what was counted. A program that failed without saying which test (it crashed,
    /// or ran out of time) counts as one failure.
    pub(crate) fn add_to(self, outcome: &mut Outcome, program: &str, success: bool) {
        outcome.passed += self.passed;
        let unnamed = self.failed.saturating_sub(self.named.len());
        let none_seen = self.failed == 0 && self.named.is_empty();
        let of_program = |failed: Failed| Failed { name: format!("{program}: {}", failed.name), ..failed };
        outcome.failed.extend(self.named.into_iter().map(of_program));
        outcome.failed.extend((0..unnamed).map(|_| Failed::new(format!("{program}: a test"))));
        if !success && none_seen {
            outcome.failed.push(Failed::new(format!("{program}: ended early")));
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

    /// The table, the failures by name and with what they said, and the line `N passed, N failed`.
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
            for failed in &outcome.failed {
                text.push_str(&format!("\nfailed in {part}: {}", failed.text()));
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
        assert_eq!(outcome.names(), ["model: a::c"]);
    }

    #[test]
    fn what_a_failed_test_said_is_said_again() {
        let libtest = [
            "running 2 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "successes:",
            "---- a::b stdout ----",
            "something",
            "failures:",
            "---- a::c stdout ----",
            "",
            "panicked at 1 != 2",
            "failures:",
            "    a::c",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored",
        ];
        let own = [
            "test ipvs/x ... ok",
            "of nobody",
            "ipvs/y: step 1: refused",
            "and no answer",
            "test ipvs/y ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored",
        ];
        assert_eq!(counted(&libtest, false).failed[0].said, ["panicked at 1 != 2"]);
        let outcome = counted(&own, false);
        assert_eq!(outcome.failed[0].said, ["ipvs/y: step 1: refused", "and no answer"]);
        let mut summary = Summary::default();
        summary.add("unit", outcome, Duration::ZERO);
        let text = summary.text();
        let end = "failed in unit: model: ipvs/y\n    ipvs/y: step 1: refused\n    and no answer\n1 passed, 1 failed\n";
        assert!(text.ends_with(end), "{text}");
    }

    #[test]
    fn of_much_the_begin_and_the_end_are_said_again() {
        let said = (1..=2 * SAID + 3).map(|number| number.to_string()).collect();
        let text = Failed { name: "a".to_owned(), said }.text();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 2 * SAID + 2);
        assert_eq!(lines[SAID..SAID + 3], ["20", "[3 lines]", "24"]);
    }

    #[test]
    fn a_crash_is_a_failure() {
        assert_eq!(counted(&["test a::b ... ok"], false).names(), ["model: ended early"]);
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
