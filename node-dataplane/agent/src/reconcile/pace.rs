//! When the loop does what nobody asked for: looking for foreign changes, auditing, trying again;
//! and how long changes wait for each other where a pass is dear.

use std::time::{Duration, Instant};

/// A look for foreign changes costs next to nothing; a repair must begin within a second.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The audit's share of one core is one part in this many.
const AUDIT_SHARE: u32 = 100;
/// What one audit step should take.
const AUDIT_STEP: Duration = Duration::from_millis(2);
/// Between two walks over everything.
const AUDIT_REST: Duration = Duration::from_secs(60);
/// Comparisons of everything may take one part in this many of a core while somebody keeps
/// disturbing the tables.
const REPAIR_SHARE: u32 = 4;
/// So much of the time that comparisons must be apart is given in advance: who disturbs the
/// tables now and then, or twice in a row, is answered at once.
const REPAIR_CREDIT: Duration = Duration::from_secs(4);
/// Passes over what changed, while changes do not end: one part in sixteen of the time. A
/// restore of iptables-legacy costs the whole table, whatever changed; a transaction of
/// nftables costs a millisecond, and these budgets never hold it up.
const PASSES: Share = Share {
    rest: 15,
    credit: Duration::from_secs(1),
    longest: |took| took.clamp(ALONE_REST, Duration::from_secs(5)),
};
/// Reading back what they wrote: one part in 71. What waits for it is verified later, not less. With
/// 10,000 Services, iptables-legacy takes more than a second for it, and the longest rest is what counts.
const READ_BACKS: Share = Share {
    rest: 70,
    credit: Duration::from_secs(4),
    longest: |took| (took * 6).clamp(Duration::from_secs(5), Duration::from_secs(15)),
};
/// What comes so long after the last pass and read-back ended comes by itself: changes that do not end are
/// there already. It waits for no more than a second after the pass, however long that took.
const ALONE: Duration = Duration::from_millis(100);
const ALONE_REST: Duration = Duration::from_secs(1);
/// Backoff of a backend that refuses.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// How long to wait before the next try, by the number of bad outcomes before the last.
pub(super) fn retry(outcomes: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2u32.saturating_pow(outcomes)).min(LAST_RETRY)
}

/// How much of the time something may take.
#[derive(Debug)]
struct Share {
    /// What follows it is so many times as long.
    rest: u32,
    /// So much of the rest is given in advance: what comes by itself is done at once, and so is what
    /// comes a few times in a row and does not take long.
    credit: Duration,
    /// No rest is longer than this after what took so long. So nothing waits for a minute, from which
    /// on it counts as stuck.
    longest: fn(Duration) -> Duration,
}

/// What something took so far.
#[derive(Debug)]
struct Spent {
    share: Share,
    /// When it will have kept to its share.
    even_at: Instant,
    next_at: Instant,
}

impl Spent {
    fn new(share: Share, now: Instant) -> Self {
        Self { share, even_at: now, next_at: now }
    }

    fn due(&self, now: Instant) -> bool {
        now >= self.next_at
    }

    /// It was done once more and took this long.
    fn took(&mut self, took: Duration, now: Instant) {
        let Share { rest, credit, longest } = self.share;
        let owed = self.even_at.max(now) + took * rest - now;
        let rest = owed.saturating_sub(credit).min(longest(took));
        if !rest.is_zero() {
            self.next_at = now + rest;
        }
        // What the longest rest lets off is not owed: later ones would pay for it.
        self.even_at = now + owed.min(rest + credit);
    }
}

/// The loop's timetable.
#[derive(Debug)]
pub(super) struct Pace {
    look_at: Instant,
    /// When comparisons will have kept to their share.
    compared_for: Instant,
    audit_at: Instant,
    program_at: Option<Instant>,
    refusals: u32,
    passes: Spent,
    read_backs: Spent,
    /// When the last pass and the last read-back or pass ended.
    passed_at: Option<Instant>,
    busy_until: Option<Instant>,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            look_at: now,
            compared_for: now,
            audit_at: now + AUDIT_REST,
            program_at: None,
            refusals: 0,
            passes: Spent::new(PASSES, now),
            read_backs: Spent::new(READ_BACKS, now),
            passed_at: None,
            busy_until: None,
        }
    }

    /// True where it is time to look for foreign changes.
    pub(super) fn look_due(&mut self, now: Instant) -> bool {
        let due = now >= self.look_at;
        if due {
            self.look_at = now + LOOK_EVERY;
        }
        due
    }

    /// Everything was compared, which took this long.
    pub(super) fn compared(&mut self, took: Duration, now: Instant) {
        self.compared_for = self.compared_for.max(now) + took * REPAIR_SHARE;
        let credit = REPAIR_CREDIT.min(self.compared_for.saturating_duration_since(now));
        self.look_at = self.look_at.max(self.compared_for - credit);
    }

    /// How long an audit step may take, where one is due.
    pub(super) fn audit_due(&self, now: Instant) -> Option<Duration> {
        (now >= self.audit_at).then_some(AUDIT_STEP)
    }

    /// An audit step took this long; `completed` = it was the last of a walk.
    pub(super) fn audited(&mut self, took: Duration, completed: bool, now: Instant) {
        let rest = if completed { AUDIT_REST } else { Duration::ZERO };
        self.audit_at = now + rest.max(took * AUDIT_SHARE);
    }

    /// Changes were programmed, which took this long.
    pub(super) fn changed(&mut self, took: Duration, now: Instant) {
        self.passes.took(took, now);
        (self.passed_at, self.busy_until) = (Some(now), Some(now));
    }

    /// True where changes may be programmed, the first of which came at `since`; until then they wait for
    /// more of them.
    pub(super) fn changes_due(&self, since: Option<Instant>, now: Instant) -> bool {
        let alone = since.zip(self.busy_until).is_some_and(|(since, until)| since >= until + ALONE);
        let rested = self.passed_at.is_none_or(|at| now >= at + ALONE_REST);
        self.passes.due(now) || alone && rested
    }

    /// What was written was read back, which took this long.
    pub(super) fn read_back(&mut self, took: Duration, now: Instant) {
        self.read_backs.took(took, now);
        self.busy_until = Some(now);
    }

    /// True where what is written may be read back.
    pub(super) fn read_back_due(&self, now: Instant) -> bool {
        self.read_backs.due(now)
    }

    /// The backend refused: how long until the next try.
    pub(super) fn refused(&mut self, now: Instant) -> Duration {
        let wait = retry(self.refusals);
        self.program_at = Some(now + wait);
        self.refusals = self.refusals.saturating_add(1);
        wait
    }

    /// The backend works.
    pub(super) fn accepted(&mut self) {
        self.refusals = 0;
        self.program_at = None;
    }

    /// True where a pass may be tried.
    pub(super) fn may_program(&self, now: Instant) -> bool {
        self.program_at.is_none_or(|at| now >= at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_back_off_to_half_a_minute_and_are_forgotten() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert!(pace.may_program(now));
        assert_eq!(pace.refused(now), FIRST_RETRY);
        assert!(!pace.may_program(now) && pace.may_program(now + FIRST_RETRY));
        (0..40).for_each(|_| {
            pace.refused(now);
        });
        assert_eq!(pace.refused(now), LAST_RETRY);
        pace.accepted();
        assert_eq!(pace.refused(now), FIRST_RETRY);
    }

    /// When passes begin and how long they take in all, with one change every 20 ms for `time`.
    fn sustained(pass: Duration, time: Duration) -> (Vec<Duration>, Duration) {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let (mut now, mut begun) = (start, Vec::new());
        while now < start + time {
            if pace.changes_due(begun.last().map(|last| start + *last + pass), now) {
                begun.push(now - start);
                now += pass;
                pace.changed(pass, now);
            }
            now += Duration::from_millis(20);
        }
        let total = pass * u32::try_from(begun.len()).unwrap();
        (begun, total)
    }

    #[test]
    fn a_cheap_pass_is_never_held_up() {
        let (begun, _) = sustained(Duration::from_micros(900), Duration::from_secs(20));
        let apart = begun.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(apart < Duration::from_millis(21), "{apart:?}");
    }

    #[test]
    fn dear_passes_keep_to_their_share_and_no_change_waits_for_much_more_than_a_second() {
        for millis in [20, 50, 90, 150] {
            let pass = Duration::from_millis(millis);
            let (begun, total) = sustained(pass, Duration::from_secs(60));
            let apart = begun.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
            assert!(apart <= Duration::from_millis(1_020) + pass, "{millis} ms: {apart:?}");
            // At 150 ms it is the longest rest that counts.
            assert!(total < Duration::from_secs(60) / 7, "{millis} ms: {total:?}");
            // What the first one owes is given in advance, as far as it goes.
            let rest = (pass * PASSES.rest).saturating_sub(PASSES.credit);
            assert!(begun[1] <= pass + rest + Duration::from_millis(20), "{millis} ms: {:?}", &begun[..2]);
        }
    }

    #[test]
    fn the_rest_grows_with_the_pass_and_has_an_end() {
        for (seconds, rest) in [(2, 2), (4, 4), (30, 5)] {
            let (begun, _) = sustained(Duration::from_secs(seconds), Duration::from_secs(200));
            let apart = begun.last().unwrap().saturating_sub(begun[begun.len() - 2]);
            assert!(
                apart.abs_diff(Duration::from_secs(seconds + rest)) < Duration::from_millis(20),
                "{seconds} s: {apart:?}"
            );
        }
    }

    #[test]
    fn after_a_rest_a_change_is_programmed_at_once_whatever_was_before() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let pass = Duration::from_millis(400);
        for _ in 0..100 {
            now += pass;
            pace.changed(pass, now);
            now = pace.passes.next_at;
        }
        // As after any number of passes, the one after a second comes at once...
        assert!(pace.changes_due(None, now));
        // ...and what was let off is forgotten: soon there is credit again, for two in a row.
        now += Duration::from_secs(10);
        pace.changed(Duration::from_millis(60), now);
        assert!(pace.changes_due(None, now));
    }

    #[test]
    fn reading_back_takes_a_seventieth_and_is_put_off_for_seconds_at_most() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let took = Duration::from_millis(70);
        let (mut now, mut times) = (start, Vec::new());
        while now < start + Duration::from_secs(60) {
            if pace.read_back_due(now) {
                times.push(now);
                now += took;
                pace.read_back(took, now);
            }
            now += Duration::from_millis(10);
        }
        assert!(times[1] - times[0] < Duration::from_secs(1), "some of it is given in advance");
        let apart = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(apart < Duration::from_millis(5_100), "{apart:?}");
        assert!(took * u32::try_from(times.len()).unwrap() < Duration::from_secs(60) / 60, "{}", times.len());
    }

    #[test]
    fn a_change_that_comes_by_itself_waits_for_a_second_at_most() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        pace.changed(Duration::from_secs(3), start);
        let after = |millis| start + Duration::from_millis(millis);
        // It was there when the pass ended.
        assert!(
            !pace.changes_due(Some(after(10)), after(2_900))
                && pace.changes_due(Some(after(10)), after(3_000))
        );
        // It came later.
        assert!(
            !pace.changes_due(Some(after(200)), after(990))
                && pace.changes_due(Some(after(200)), after(1_000))
        );
        // It may have come while what the pass wrote was read back.
        pace.read_back(Duration::from_millis(500), after(500));
        assert!(!pace.changes_due(Some(after(510)), after(2_900)));
    }

    #[test]
    fn a_dear_read_back_takes_a_seventh() {
        let now = Instant::now();
        for (took, rest) in [(1, 6), (2, 12), (10, 15)] {
            let mut pace = Pace::new(now);
            pace.read_back(Duration::from_secs(took), now);
            let due = |after| pace.read_back_due(now + Duration::from_secs(after));
            assert!(due(rest) && !due(rest - 1), "{took} s");
        }
    }

    #[test]
    fn a_read_back_every_five_seconds_is_never_put_off() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..20 {
            assert!(pace.read_back_due(now));
            pace.read_back(Duration::from_millis(70), now);
            now += Duration::from_secs(5);
        }
    }

    #[test]
    fn an_audit_takes_one_percent_at_most() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert!(pace.audit_due(now).is_none());
        let start = now + AUDIT_REST;
        assert_eq!(pace.audit_due(start), Some(AUDIT_STEP));
        pace.audited(Duration::from_millis(30), false, start);
        assert!(pace.audit_due(start + Duration::from_millis(2_999)).is_none());
        assert!(pace.audit_due(start + Duration::from_secs(3)).is_some());
        pace.audited(Duration::from_millis(1), true, start);
        assert!(pace.audit_due(start + AUDIT_REST - Duration::from_millis(1)).is_none());
    }

    #[test]
    fn constant_disturbance_does_not_take_the_core() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!(pace.look_due(start) && !pace.look_due(start));
        let (mut now, mut times) = (start, Vec::new());
        // Whenever somebody looks, there is something to repair, for four minutes.
        while now < start + Duration::from_secs(240) {
            now += LOOK_EVERY;
            if pace.look_due(now) {
                now += Duration::from_millis(250);
                pace.compared(Duration::from_millis(250), now);
                times.push(now - start);
            }
        }
        // The first few come at once, then it is a quarter of the time.
        assert!(times[3] < Duration::from_secs(2), "{:?}", &times[..4]);
        let total = Duration::from_millis(250) * u32::try_from(times.len()).unwrap();
        assert!(total < Duration::from_secs(240) / REPAIR_SHARE + Duration::from_secs(2), "{total:?}");
    }
}
