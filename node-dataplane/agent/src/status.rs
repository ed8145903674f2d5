//! What the reconcile thread tells the rest of the process about itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Work that waits for longer than this makes the agent unhealthy, as kube-proxy's does.
pub const STUCK: Duration = Duration::from_secs(60);

/// Shared between the reconcile thread, which writes, and the HTTP servers, which read.
#[derive(Debug, Default)]
pub struct Status(Mutex<Snapshot>);

/// The agent at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Mode in use; empty before it is known.
    pub mode: &'static str,
    /// When the kernel was last found or made equal to the plan.
    pub programmed: Option<SystemTime>,
    /// Since when something waits to be programmed.
    pub pending_since: Option<Instant>,
    /// What is in force comes from the disk: no control plane has confirmed it yet.
    pub stale: bool,
    /// When a control plane last confirmed what is held, or when it was saved.
    pub confirmed: Option<SystemTime>,
    /// A control plane has answered on the live connection.
    pub connected: bool,
    /// The control plane says that the cluster has no Node object of this name.
    pub node_unknown: bool,
    /// Load balancers may send new connections to this node.
    pub eligible: bool,
    /// Transactions in force, in the control plane's count.
    pub applied_seq: u64,
    /// Of these, read back.
    pub verified_seq: u64,
    /// Resources that are not in force as they should be.
    pub failures: usize,
    /// Services and endpoint sets held.
    pub resources: u64,
}

impl Status {
    /// Changes it.
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.lock());
    }

    /// A copy of it.
    pub fn snapshot(&self) -> Snapshot {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Snapshot> {
        // A reader that panicked has changed nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Snapshot {
    /// Programmed once, and not stuck since. Losing the control plane is no reason to be
    /// unhealthy: what is in force stays in force.
    pub fn healthy(&self, now: Instant) -> bool {
        self.programmed.is_some() && !self.stuck(now)
    }

    /// Something has waited to be programmed for too long.
    pub fn stuck(&self, now: Instant) -> bool {
        self.pending_since.is_some_and(|since| now.saturating_duration_since(since) > STUCK)
    }

    /// For how long nobody has confirmed what is held; zero while somebody does.
    pub fn stale_for(&self, now: SystemTime) -> Duration {
        if self.connected && !self.stale {
            return Duration::ZERO;
        }
        self.confirmed.and_then(|confirmed| now.duration_since(confirmed).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_needs_one_pass_and_no_stuck_work() {
        let now = Instant::now();
        let mut snapshot = Snapshot::default();
        assert!(!snapshot.healthy(now));
        snapshot.programmed = Some(SystemTime::now());
        assert!(snapshot.healthy(now));
        snapshot.pending_since = Some(now);
        assert!(snapshot.healthy(now + STUCK));
        assert!(!snapshot.healthy(now + STUCK + Duration::from_millis(1)));
    }

    #[test]
    fn staleness_is_counted_while_nobody_confirms() {
        let now = SystemTime::now();
        let confirmed = Some(now - Duration::from_secs(9));
        let mut snapshot = Snapshot { confirmed, connected: true, ..Snapshot::default() };
        assert_eq!(snapshot.stale_for(now), Duration::ZERO);
        snapshot.stale = true;
        assert_eq!(snapshot.stale_for(now), Duration::from_secs(9));
        snapshot = Snapshot { connected: false, stale: false, ..snapshot };
        assert_eq!(snapshot.stale_for(now), Duration::from_secs(9));
    }
}
