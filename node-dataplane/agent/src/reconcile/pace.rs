//! When the loop does what nobody asked for: looking for foreign changes, auditing, trying again.

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
/// Backoff of a backend that refuses.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// How long to wait before the next try, by the number of bad outcomes before the last.
pub(super) fn retry(outcomes: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2u32.saturating_pow(outcomes)).min(LAST_RETRY)
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
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { look_at: now, compared_for: now, audit_at: now + AUDIT_REST, program_at: None, refusals: 0 }
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
