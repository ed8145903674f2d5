//! From what the source says to transactions.
//!
//! Pacing sits here, in front of the store, and nowhere behind it. Transactions are made at a
//! pace that nodes can follow, so every stream that keeps up asks for the same steps and shares
//! their frames; pacing each stream by itself would give each its own steps to encode.
//!
//! * Idle: a change is published at once.
//! * Busy: changes are collected for a window that grows from 5 ms to 100 ms for as long as
//!   they keep coming, and falls back when they stop. So a rollout of thousands of endpoints
//!   is a few dozen transactions, and a Service that is created together with its
//!   EndpointSlices is two at most.
//! * Before the source is complete nothing is published: the first transaction is the whole state.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lockstep_model::{InvalidField, NodeContext};
use lockstep_store::Changes;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::Hub;

const SHORTEST: Duration = Duration::from_millis(5);
/// Most inputs that are taken before what is due is published.
const AT_ONCE: usize = 4_096;
const LONGEST: Duration = Duration::from_millis(100);

/// What the owner of the source has to say.
#[derive(Debug)]
pub enum Input {
    /// These changed, together.
    Changes {
        /// Resources.
        changes: Changes,
        /// Nodes.
        nodes: Vec<NodeInput>,
        /// Objects that went into or came out of quarantine.
        quarantine: Vec<QuarantineInput>,
    },
    /// What was said so far is the whole state: serve it.
    Synced,
    /// The state is not complete yet, for this reason.
    NotSynced(String),
    /// The source is alive.
    Alive,
}

/// A changed Node object.
#[derive(Debug)]
pub enum NodeInput {
    /// New or changed.
    Upsert(NodeContext),
    /// The Node of this name is gone.
    Remove(String),
}

/// A change of the quarantine.
#[derive(Debug)]
pub enum QuarantineInput {
    /// The object could not be taken in.
    Add {
        /// Kubernetes kind, or `File`.
        kind: String,
        /// `namespace/name`, a Node's name, or a path.
        name: String,
        /// Why.
        fault: InvalidField,
        /// True = its last good content is still served.
        previous_in_force: bool,
    },
    /// The object is good again, or gone.
    Remove {
        /// As it was added.
        kind: String,
        /// As it was added.
        name: String,
    },
}

/// Takes inputs until their sender is gone.
pub async fn run(hub: Arc<Hub>, mut inputs: mpsc::Receiver<Input>) {
    let mut pending = Pending::default();
    let mut pacer = Pacer::default();
    while let Some(input) = inputs.recv().await {
        pending.take(&hub, input);
        for _ in 0..AT_ONCE {
            match inputs.try_recv() {
                Ok(more) => pending.take(&hub, more),
                Err(_) => break,
            }
        }
        let due = tokio::time::sleep_until(pacer.due(Instant::now()).into());
        tokio::pin!(due);
        while pending.is_publishable() {
            tokio::select! {
                // When it is due, it is published, however much more there is to take.
                biased;
                () = &mut due => {
                    pending.publish(&hub);
                    pacer.published(Instant::now());
                }
                more = inputs.recv() => match more {
                    Some(more) => pending.take(&hub, more),
                    None => pending.publish(&hub),
                },
            }
        }
    }
}

/// Changes that wait to be published.
#[derive(Debug, Default)]
struct Pending {
    changes: Changes,
    since: Option<Instant>,
    synced: bool,
}

impl Pending {
    fn take(&mut self, hub: &Hub, input: Input) {
        match input {
            Input::Changes { changes, nodes, quarantine } => {
                hub.source_alive();
                nodes.into_iter().for_each(|node| match node {
                    NodeInput::Upsert(context) => hub.upsert_node(context),
                    NodeInput::Remove(name) => hub.remove_node(&name),
                });
                quarantine.into_iter().for_each(|change| take_quarantine(hub, change));
                if !changes.is_empty() {
                    self.since.get_or_insert_with(Instant::now);
                }
                self.changes.merge(changes);
                if self.changes.is_empty() {
                    // Nothing waits, so the head is as new as the watches are: said at once, or a
                    // quiet cluster would look as old as its last change. Publishes nothing.
                    self.publish(hub);
                }
            }
            Input::Synced => {
                self.synced = true;
                self.publish(hub);
                hub.source_alive();
                hub.start_serving();
            }
            Input::NotSynced(reason) => hub.not_serving(reason),
            Input::Alive => hub.source_alive(),
        }
    }

    fn is_publishable(&self) -> bool {
        self.synced && self.since.is_some()
    }

    fn publish(&mut self, hub: &Hub) {
        let received = self.since.take().unwrap_or_else(Instant::now);
        hub.publish(std::mem::take(&mut self.changes), received);
    }
}

pub(crate) fn take_quarantine(hub: &Hub, change: QuarantineInput) {
    match change {
        QuarantineInput::Add { kind, name, fault, previous_in_force } => {
            let (text, now) = (fault.to_string(), SystemTime::now());
            if hub.lock().quarantine.add(kind.clone(), name.clone(), fault, previous_in_force, now) {
                warn!(kind, name, fault = text, previous_in_force, "object is in quarantine");
            }
        }
        QuarantineInput::Remove { kind, name } => {
            if hub.lock().quarantine.remove(&kind, &name) {
                info!(kind, name, "object is out of quarantine");
            }
        }
    }
    hub.touch();
}

/// Decides when the next transaction may be published.
#[derive(Debug)]
struct Pacer {
    window: Duration,
    last: Option<Instant>,
}

impl Default for Pacer {
    fn default() -> Self {
        Self { window: SHORTEST, last: None }
    }
}

impl Pacer {
    fn due(&self, now: Instant) -> Instant {
        self.last.map_or(now, |last| (last + self.window).max(now))
    }

    fn published(&mut self, now: Instant) {
        // One that came within two windows of the last had to wait, or nearly: it goes on.
        let busy = self.last.is_some_and(|last| now.saturating_duration_since(last) < self.window * 2);
        self.window = if busy { (self.window * 2).min(LONGEST) } else { SHORTEST };
        self.last = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_cluster_says_how_fresh_it_is_and_a_busy_one_does_not_run_ahead() {
        let hub = Hub::new(crate::Config::default());
        let mut pending = Pending::default();
        pending.take(&hub, Input::Synced);
        let mut say = |version: &str, variant: Option<u8>| {
            let mut changes = Changes::default();
            changes.revision("services", version);
            if let Some(variant) = variant {
                changes.upsert(crate::testing::service("web", variant));
            }
            pending.take(&hub, Input::Changes { changes, nodes: vec![], quarantine: vec![] });
            let shared = hub.lock();
            let head = shared.position(shared.store.head().seq);
            let revisions: Vec<_> = head.source_revisions.into_iter().map(|it| it.resource_version).collect();
            (head.seq, revisions.join(" "), pending.is_publishable())
        };
        assert_eq!(say("10", None), (1, "10".to_owned(), false), "no transaction, and known");
        assert_eq!(say("11", Some(1)), (1, "10".to_owned(), true));
        assert_eq!(say("12", None), (1, "10".to_owned(), true), "the head does not have what is in 11");
        pending.publish(&hub);
        let shared = hub.lock();
        let head = shared.position(shared.store.head().seq);
        assert_eq!((head.seq, head.source_revisions[0].resource_version.as_str()), (2, "12"));
    }

    #[test]
    fn idle_is_at_once_and_churn_widens_the_window() {
        let mut pacer = Pacer::default();
        let mut now = Instant::now();
        assert_eq!(pacer.due(now), now, "the first one");
        let mut waits = Vec::new();
        for _ in 0..7 {
            pacer.published(now);
            let due = pacer.due(now);
            waits.push((due - now).as_millis());
            now = due;
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 100, 100]);
        now += LONGEST * 3;
        assert_eq!(pacer.due(now), now, "idle again");
        pacer.published(now);
        assert_eq!(pacer.due(now) - now, SHORTEST);
    }
}
