//! How long to wait before the next try.

use std::time::Duration;

/// The first wait is up to this long.
const BASE: Duration = Duration::from_millis(100);
/// No wait is longer, unless a server asks for it.
const CAP: Duration = Duration::from_secs(15);
/// Least wait of an agent that was replaced by a newer one with its name.
const SUPERSEDED: Duration = Duration::from_secs(30);
/// The longest a server may send a client away for.
const MAX_AWAY: Duration = Duration::from_secs(300);

/// Full jitter: each wait is anything between nothing and a bound that doubles, so that a
/// cluster's nodes come back spread out.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The next wait. `away` is what the server asked for.
    pub(super) fn next(&mut self, away: Option<Duration>, superseded: bool) -> Duration {
        let jitter = Self::bound(self.failures).mul_f64(fastrand::f64());
        self.failures = self.failures.saturating_add(1);
        let asked = away.unwrap_or_default().min(MAX_AWAY);
        let replaced = if superseded { SUPERSEDED.mul_f64(1.0 + fastrand::f64()) } else { Duration::ZERO };
        let least = asked.max(replaced);
        least + jitter
    }

    fn bound(failures: u32) -> Duration {
        BASE.saturating_mul(2u32.saturating_pow(failures)).min(CAP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_start_over() {
        let mut backoff = Backoff::default();
        for failures in 0..40 {
            let bound = Backoff::bound(failures);
            assert!(backoff.next(None, false) <= bound && bound <= CAP);
        }
        assert_eq!(Backoff::bound(39), CAP);
        backoff.reset();
        assert!(backoff.next(None, false) <= BASE);
    }

    #[test]
    fn a_server_and_a_successor_are_heeded() {
        let mut backoff = Backoff::default();
        assert!(backoff.next(Some(Duration::from_secs(7)), false) >= Duration::from_secs(7));
        assert!(backoff.next(None, true) >= SUPERSEDED);
        assert!(backoff.next(Some(Duration::from_millis(1)), true) >= SUPERSEDED);
        assert!(backoff.next(Some(Duration::from_secs(86_400)), false) <= MAX_AWAY + CAP);
    }
}
