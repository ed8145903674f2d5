//! The reconcile loop: the only place that changes anything.
//!
//! ```text
//! Event ──take──> Session, pending work ──(everything that waits is taken first)──> pass:
//!     view.update ─> backend.apply ─> cache ─> ack APPLIED ─> backend.verify ─> ack VERIFIED
//! ```
//!
//! The cache is another thread's. It has what the kernel has before VERIFIED is said, or says of
//! itself that it is outdated: a process that is killed and comes back goes back behind nothing
//! that was verified.
//!
//! Where passes are dear, changes wait for more of them, and what was written is read back with
//! what was written after it (see `pace`): both are put off by seconds at most, and acknowledged
//! when they are done.
//!
//! The first time that what was read back is equal, the rules of other modes go, before the ack.
//!
//! State-driven: what is pending is *which Services to look at*, never a delta, so a pass that
//! fails loses nothing and the next one compares everything. Nothing is written to the kernel
//! before the first complete state, from the stream or from the disk.

mod failures;
mod follow;
mod pace;
mod pass;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use lockstep_client::cache::{Cache, Restored};
use lockstep_client::session::{Committed, Identity, Now, Session, Step};
use lockstep_client::transport::{self, Outbox};
use lockstep_client::{Position, Report};
use lockstep_model::ServiceKey;
use lockstep_view::{Backend, View, ViewConfig, load_balancers_may_use};
use lockstep_wire::v1;
use tokio::sync::mpsc;

use crate::follow_up::FollowUp;
use crate::metrics::{Changes, Metrics};
use crate::mode::Remains;
use crate::status::Status;
use failures::Failures;
use pace::Pace;

/// Events taken in before a pass at most, so that a flood cannot keep the kernel waiting.
const MERGE: usize = 64;

/// What is done from time to time is done no more often than this, however busy the loop is.
const CHORES_EVERY: Duration = Duration::from_millis(100);
/// Rules of other modes stay so long for a family that cannot be written.
const KEEP_OTHERS: Duration = Duration::from_secs(60);
/// Names that no resource uses any more are dropped this often.
const SHRINK_EVERY: Duration = Duration::from_secs(600);
/// After a pass over everything, or over so many Services in any number of passes, memory is
/// given back to the kernel; not at once, so that the cache has written too.
const GIVE_BACK_FROM: usize = 1_000;
const GIVE_BACK_AFTER: Duration = Duration::from_secs(3);

/// Everything that can happen to the loop.
#[derive(Debug)]
pub enum Event {
    /// The connection to the control plane.
    Link(transport::Event),
    /// Wakes the loop up, so that it sees that time passed.
    Tick,
    /// The process is asked to end.
    Shutdown,
}

impl From<transport::Event> for Event {
    fn from(event: transport::Event) -> Self {
        Event::Link(event)
    }
}

/// Removes the rules that earlier processes left in other modes: one outcome per interface, the
/// number of objects that are gone.
pub type RemoveOthers = Box<dyn FnMut() -> Vec<(Remains, anyhow::Result<usize>)> + Send>;

/// The addresses of the node's interfaces, where they changed since the last call.
pub type NewAddresses = Box<dyn FnMut() -> Option<Vec<IpAddr>> + Send>;

/// What the loop is made of.
pub struct Parts {
    /// Puts plans in force.
    pub backend: Box<dyn Backend + Send>,
    /// Called when the backend's rules have been read back for the first time, until it works.
    pub remove_others: Option<RemoveOthers>,
    /// `None` = nothing depends on them.
    pub new_addresses: Option<NewAddresses>,
    /// Keeps the state on disk; `None` = nowhere.
    pub cache: Option<Cache>,
    /// What an earlier process left.
    pub restored: Option<Restored>,
    /// Who this node is.
    pub identity: Identity,
    /// How the view decides.
    pub view_config: ViewConfig,
    /// What follows every pass.
    pub follow_ups: Vec<Box<dyn FollowUp>>,
    /// For the HTTP servers.
    pub status: Arc<Status>,
    /// For the HTTP servers.
    pub metrics: Metrics,
    /// Set when the process is asked to end: nothing new is begun.
    pub stopping: Arc<AtomicBool>,
}

/// The loop's state.
pub struct Reconciler {
    backend: Box<dyn Backend + Send>,
    /// `None` = no other mode has rules of ours any more.
    remove_others: Option<RemoveOthers>,
    /// They stay, because a family could not be written, since then.
    others_kept_since: Option<Instant>,
    new_addresses: Option<NewAddresses>,
    session: Session,
    view: View,
    cache: Option<Cache>,
    outbox: Option<Outbox>,
    pending: Pending,
    failures: Failures,
    follow_ups: Vec<Box<dyn FollowUp>>,
    pace: Pace,
    report: Report,
    /// An Ack could not be sent: it is tried again.
    ack_due: bool,
    /// Something has been programmed by this process.
    programmed: bool,
    /// The server of the live connection has confirmed or brought the state.
    confirmed: bool,
    /// The view knows the whole state.
    viewed: bool,
    /// The cache is older than the rules in the kernel: those stay until the control plane speaks.
    held_back: bool,
    /// What is programmed comes from such a cache, and no control plane has spoken yet.
    outdated: bool,
    /// What was applied last is not read back yet: reading back had its share of the time.
    unread: bool,
    /// Read back, but not settled in the cache yet.
    unsettled: Option<Position>,
    chores_at: Instant,
    shrink_at: Instant,
    give_back_at: Option<Instant>,
    /// Services programmed since memory was given back last.
    touched: usize,
    /// Read-backs in a row that differed.
    differing: u32,
    /// A read-back differed and nothing counts as verified until everything has been compared,
    /// which is due then. Changes go on meanwhile.
    recheck_at: Option<Instant>,
    /// When the log last spoke of a repair.
    repair_logged: Option<Instant>,
    status: Arc<Status>,
    metrics: Metrics,
    stopping: Arc<AtomicBool>,
}

/// What waits to be programmed.
#[derive(Default)]
struct Pending {
    /// Something waits at all.
    any: bool,
    /// Services that changed, in order of arrival, possibly twice.
    services: Vec<ServiceKey>,
    /// Services that failed in the kernel and whose time has come.
    retries: Vec<ServiceKey>,
    /// The whole kernel state must be compared.
    full: bool,
    /// The facts of this node changed. The plan has some of that already, so nothing is to be done
    /// by it before all of them are in it.
    node: bool,
    since: Option<Now>,
    trigger: Option<SystemTime>,
    /// Transactions that this merges.
    transactions: u32,
    /// Changes of Services and of endpoint sets in them.
    changes: Changes,
    /// Taken in, not handed to the cache yet: kernel first, then the disk.
    committed: Vec<Committed>,
}

impl Reconciler {
    /// A loop that has done nothing yet.
    pub fn new(mut parts: Parts, now: Now) -> Self {
        let description = parts.backend.describe();
        let outdated = parts.restored.as_ref().is_some_and(|restored| restored.outdated);
        // Where the kernel cannot be read, nothing can be programmed either.
        let held_back = outdated && parts.backend.standing().unwrap_or(true);
        let held = parts.restored.map(|restored| {
            let saved_at = restored.saved_at;
            parts.status.update(|status| {
                status.stale = true;
                status.confirmed = Some(saved_at);
            });
            (restored.held, saved_at)
        });
        let pending = Pending {
            any: held.is_some() && !held_back,
            full: true,
            since: (held.is_some() && !held_back).then_some(now),
            ..Pending::default()
        };
        if let Some((held, saved_at)) = &held {
            let age = now.wall.duration_since(*saved_at).unwrap_or_default();
            let (position, resources, age_seconds) = (held.position, held.state.len(), age.as_secs());
            if held_back {
                tracing::warn!(
                    %position, resources, age_seconds,
                    "the rules in the kernel are newer than the cached state: they stay as they are until a control \
                     plane is reached"
                );
            } else {
                tracing::warn!(
                    %position, resources, age_seconds,
                    "programming cached state from {age_seconds} s ago, control plane not reached yet"
                );
            }
        }
        parts.status.update(|status| status.mode = description.mode);
        let session = Session::new(parts.identity, held.map(|(held, _)| held));
        let mut view = View::new(parts.view_config);
        view.set_node(session.node().clone());
        if let Some(addresses) = parts.new_addresses.as_mut().and_then(|new| new()) {
            view.set_interface_addresses(addresses);
        }
        parts.status.update(|status| status.eligible = load_balancers_may_use(session.node()));
        Self {
            backend: parts.backend,
            remove_others: parts.remove_others,
            others_kept_since: None,
            new_addresses: parts.new_addresses,
            session,
            view,
            cache: parts.cache,
            outbox: None,
            pending,
            failures: Failures::default(),
            follow_ups: parts.follow_ups,
            pace: Pace::new(now.monotonic),
            report: Report::default(),
            ack_due: false,
            programmed: false,
            confirmed: false,
            viewed: false,
            held_back,
            outdated,
            unread: false,
            unsettled: None,
            chores_at: now.monotonic,
            shrink_at: now.monotonic + SHRINK_EVERY,
            give_back_at: None,
            touched: 0,
            differing: 0,
            recheck_at: None,
            repair_logged: None,
            status: parts.status,
            metrics: parts.metrics,
            stopping: parts.stopping,
        }
    }

    /// Runs until it is asked to end, or until nobody can ask any more.
    pub fn run(mut self, mut events: mpsc::Receiver<Event>) {
        self.turn(Now::read());
        while let Some(event) = events.blocking_recv() {
            let mut go_on = self.take(event, Now::read());
            // What arrived in the meantime belongs to the same pass.
            for _ in 0..MERGE {
                let Ok(event) = events.try_recv() else { break };
                go_on &= self.take(event, Now::read());
            }
            if !go_on || self.stopping.load(Ordering::Relaxed) {
                break;
            }
            self.turn(Now::read());
        }
        let applied = self.report.applied.map(|position| position.to_string()).unwrap_or_default();
        tracing::info!(applied, "ending; the rules stay in force");
        self.acknowledge();
    }

    /// Everything that is due. Ticks only wake the loop up: what depends on the time is not put
    /// off by a flood of changes that leaves no room for them.
    fn turn(&mut self, now: Now) {
        let chores = now.monotonic >= self.chores_at;
        if chores {
            self.chores_at = now.monotonic + CHORES_EVERY;
            self.chores(now);
        }
        self.work(now);
        if !chores {
            return;
        }
        if let Some(position) = self.unsettled {
            self.settle(position, Duration::ZERO);
        }
        if self.ack_due {
            self.acknowledge();
        }
        // Changes that wait for more of them hold nothing else up.
        if self.programmed && (!self.pending.any || self.rests(now)) {
            self.look_around(now);
        }
    }

    /// Takes an event in. False = the loop is to end.
    fn take(&mut self, event: Event, now: Now) -> bool {
        match event {
            Event::Shutdown => return false,
            Event::Tick => {}
            Event::Link(transport::Event::Connected(outbox)) => {
                let hello = self.session.connected(now);
                self.outbox = Some(outbox);
                self.send(hello);
            }
            Event::Link(transport::Event::Frame(frame)) => {
                let step = self.session.receive(*frame, now);
                self.step(step, now);
            }
            Event::Link(transport::Event::Lost(_)) => {
                self.metrics.disconnects.inc();
                self.lost();
            }
        }
        true
    }

    fn lost(&mut self) {
        self.session.disconnected();
        self.outbox = None;
        self.confirmed = false;
        self.status.update(|status| status.connected = false);
    }

    fn step(&mut self, step: Step, now: Now) {
        if let Some(why) = step.end {
            tracing::warn!(why, "giving the connection up");
            self.lost();
            return;
        }
        if step.node_changed {
            self.node_changed(now);
        }
        if let Some(committed) = step.committed {
            self.committed(committed, now);
        }
        if let Some(request) = step.send {
            self.send(request);
        }
        if !self.session.confirmed() {
            return;
        }
        if std::mem::take(&mut self.outdated) && self.recheck_at.is_some() {
            // Rules of other modes were waiting for this.
            (self.recheck_at, self.differing) = (Some(now.monotonic), 0);
        }
        if std::mem::take(&mut self.held_back) {
            self.pending.wait(now);
        }
        if !std::mem::replace(&mut self.confirmed, true) && self.session.node().uid.is_none() {
            self.warn_of_no_node();
        }
        let node_unknown = self.session.node().uid.is_none();
        self.status.update(|status| {
            status.connected = true;
            status.stale = false;
            status.node_unknown = node_unknown;
            status.confirmed = Some(now.wall);
        });
    }

    fn node_changed(&mut self, now: Now) {
        let node = self.session.node();
        if node.uid.is_some() {
            tracing::info!(node = %node.name, zone = node.zone.as_deref(), addresses = ?node.addresses, pod_cidrs = ?node.pod_cidrs, "this node's facts");
            if node.pod_cidrs.is_empty() && self.view.follows_pod_cidrs() {
                tracing::warn!(
                    node = %node.name,
                    "the Node object has no spec.podCIDRs, so --detect-local-mode NodeCIDR tells no pods from others: they \
                     have no short circuit, and nobody is masqueraded at cluster IPs"
                );
            }
        } else if self.confirmed {
            self.warn_of_no_node();
        }
        self.view.set_node(node.clone());
        let eligible = load_balancers_may_use(node);
        if self.status.snapshot().eligible != eligible {
            let being_removed = node.being_removed;
            tracing::info!(
                eligible,
                being_removed,
                "what /healthz tells load balancers of this node changes"
            );
            self.status.update(|status| status.eligible = eligible);
        }
        if self.session.position().is_some() {
            self.pending.wait(now);
            self.pending.node = true;
        }
    }

    fn warn_of_no_node(&self) {
        tracing::warn!(
            node = %self.session.node().name,
            "the cluster has no Node object of this name: its zone and its addresses are unknown, so node ports that \
             answer at its primary address answer at every local one meanwhile; is --node-name right?"
        );
    }

    fn committed(&mut self, committed: Committed, now: Now) {
        self.metrics.transactions.inc();
        self.metrics.queued(now.wall);
        if committed.full {
            tracing::info!(
                position = %committed.position, resources = self.session.state().len(),
                changed_services = committed.services.len(), "took a full snapshot in"
            );
        }
        self.pending.wait(now);
        self.pending.transactions = self.pending.transactions.saturating_add(1);
        self.pending.changes += Changes::of(&committed);
        self.metrics.changes(Changes::of(&committed), self.pending.changes);
        // Said by the pass at hand, or by the next chores where there is none for a while.
        self.ack_due = true;
        self.pending.services.extend_from_slice(&committed.services);
        self.pending.trigger = match (self.pending.trigger, committed.trigger) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.pending.committed.push(committed);
        self.status.update(|status| {
            status.pending_since.get_or_insert(now.monotonic);
        });
    }

    fn chores(&mut self, now: Now) {
        if let Some(why) = self.session.tick(now) {
            tracing::warn!(why, "giving the connection up");
            self.lost();
        }
        let addresses = self.new_addresses.as_mut().and_then(|new| new());
        if addresses.is_some_and(|addresses| self.view.set_interface_addresses(addresses))
            && self.session.position().is_some()
        {
            self.pending.wait(now);
            self.pending.node = true;
        }
        if self.heed_complaints(now) {
            self.mirror();
            self.ack_due = true;
        }
        let due = self.failures.due(now.monotonic);
        if !due.is_empty() {
            self.pending.wait(now);
            self.pending.retries = due;
        }
        if let (Some(cache), Some(position)) = (&mut self.cache, self.session.position())
            && self.programmed
            && self.pending.committed.is_empty()
        {
            cache.catch_up(position, self.session.node(), self.session.state());
        }
        if now.monotonic >= self.shrink_at {
            self.shrink_at = now.monotonic + SHRINK_EVERY;
            self.session.shrink();
        }
        if self.give_back_at.is_some_and(|at| now.monotonic >= at) {
            self.give_back_at = None;
            lockstep_kernel::memory::give_back();
        }
    }

    /// Sends an Ack that says what is known now.
    fn acknowledge(&mut self) {
        if self.report.applied.is_some() || !self.report.backend_error.is_empty() {
            self.report.failures = if self.failures.len() == 0 {
                Vec::new()
            } else {
                self.failures.report(self.session.state())
            };
        }
        self.ack_due = false;
        let Some(ack) = self.session.report(&self.report) else { return };
        if let Some(outbox) = &self.outbox {
            // Cumulative: a later one says the same and more.
            self.ack_due = outbox.send(ack).is_err();
        }
    }

    /// Sends what must not get lost.
    fn send(&mut self, request: v1::SyncRequest) {
        if let Some(outbox) = &self.outbox
            && outbox.send(request).is_err()
        {
            tracing::warn!("the control plane does not take requests, giving the connection up");
            self.lost();
        }
    }

    fn mirror(&self) {
        let seq = |position: Option<Position>| position.map_or(0, |position| position.seq);
        let failures = self.failures.len() + self.session.faults();
        self.status.update(|status| {
            status.applied_seq = seq(self.report.applied);
            status.verified_seq = seq(self.report.verified);
            status.failures = failures;
            status.resources = self.session.state().len();
        });
    }
}

impl Pending {
    fn wait(&mut self, now: Now) {
        self.any = true;
        self.since.get_or_insert(now);
    }
}
