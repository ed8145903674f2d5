//! The session: everything a node decides about the stream.
//!
//! ```text
//!            connected()            Welcome             Update .. commit
//!    Down ───────────────> Greeting ───────> Following ──────────────────> Committed
//!     ^                        │                 │  (staged, checked, then applied at once)
//!     └──── disconnected() ────┴─────────────────┘
//! ```
//!
//! What holds, whatever the server sends:
//! * The state changes only by a whole transaction whose digest came out as announced.
//! * Within an epoch the position never goes back, and no transaction mixes epochs.
//! * What cannot be decoded concerns its own resource: the version held before stays, the fault
//!   is reported, the rest of the transaction is applied.
//! * What went missing is asked for again; nothing is guessed.

mod fault;
mod replay;
#[cfg(test)]
mod tests;
mod transaction;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lockstep_model::{
    Digest, Feature, Interner, Key, NodeContext, Resource, Service, ServiceKey, State, Version,
};
use lockstep_wire::{convert, raw, v1};

use crate::{Position, Report};
use fault::{Fault, Faults, Missing};
pub(crate) use replay::Replay;
use transaction::Transaction;

/// The only protocol version there is.
const PROTOCOL: u32 = 1;
/// Without a Welcome the interval is unknown; this one is used for the greeting.
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(15);
/// The stream is dead after this many silent intervals.
const MISSED_HEARTBEATS: u32 = 3;
/// A server that says it is ahead for this many heartbeats in a row and sends nothing has lost
/// track of this stream.
const BEHIND_HEARTBEATS: u32 = 3;
/// A resource that arrives damaged is asked for again at once so many times; after that, with
/// every heartbeat. A server whose copy is the damaged one must not be asked as fast as it answers.
const HASTY_REFETCHES: u32 = 3;

/// Who the client is: what it says in every Hello.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Kubernetes name of the node.
    pub node_name: Arc<str>,
    /// Random per process, 1 to 64 bytes.
    pub instance_id: String,
    /// When the process started: of two that claim one node, the later one has the stream.
    pub started: SystemTime,
    /// Boot id of the machine; empty = unknown.
    pub boot_id: String,
    /// Version of the client program, for people.
    pub agent_version: String,
    /// How the kernel is programmed.
    pub backend: v1::Backend,
    /// What the operator decided for the node; `None` = not told.
    pub settings: Option<v1::NodeSettings>,
    /// What the backend can program, beside the session features.
    pub features: Vec<v1::Feature>,
    /// True = rules of an earlier process are in the kernel.
    pub kernel_adopted: bool,
}

/// What a client holds: kept on disk between two processes.
#[derive(Debug)]
pub struct Held {
    /// The resources.
    pub state: State,
    /// Where in history they are.
    pub position: Position,
    /// Facts about the node.
    pub node: NodeContext,
    /// The names that the resources share.
    pub names: Interner,
}

/// The time, read once per input by whoever has a clock.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For intervals.
    pub monotonic: Instant,
    /// For reports.
    pub wall: SystemTime,
}

/// What an input led to. Everything in it is for the caller to act upon.
#[derive(Debug, Default)]
pub struct Step {
    /// A transaction was applied to the state.
    pub committed: Option<Committed>,
    /// The node's own facts changed: see [`Session::node`].
    pub node_changed: bool,
    /// To be sent on the stream.
    pub send: Option<v1::SyncRequest>,
    /// The connection is of no use any more: why. The caller drops it and dials again.
    pub end: Option<String>,
}

/// One transaction, applied.
#[derive(Debug)]
pub struct Committed {
    /// What changed, resource by resource, each at most once.
    pub changes: Vec<Change>,
    /// The Services concerned, sorted, unique.
    pub services: Vec<ServiceKey>,
    /// Where in the server's history that is.
    pub position: Position,
    /// Digest of what is held now: that of `position`, unless something could not be taken in.
    pub held: Digest,
    /// Oldest cause, by the clock of whoever caused it.
    pub trigger: Option<SystemTime>,
    /// True = the transaction was a full snapshot.
    pub full: bool,
}

/// A change of one resource.
#[derive(Debug, Clone)]
pub enum Change {
    /// It is there now, with this version.
    Upsert(Version, Resource),
    /// It is gone.
    Remove(Key),
}

/// The state machine, see the [module](self).
pub struct Session {
    identity: Identity,
    state: State,
    position: Option<Position>,
    node: NodeContext,
    faults: Faults,
    interner: Interner,
    link: Link,
}

enum Link {
    Down,
    /// Hello is sent, Welcome is due.
    Greeting {
        heard: Instant,
    },
    Following(Following),
}

struct Following {
    heard: Instant,
    heartbeat: Duration,
    epoch: u64,
    /// True from the moment the server confirmed or brought the state on this connection.
    confirmed: bool,
    staged: Option<Transaction>,
    /// Everything was asked for again: what builds on a lost state is passed over until then.
    awaiting_full: bool,
    /// Heartbeats in a row, without an Update between them, that found this client waiting for
    /// one: behind the head, in the middle of a transaction, or with everything asked for.
    behind: u32,
    /// Everything was asked for because of damage that has no name; once per stream.
    mended: bool,
}

impl Session {
    /// A session that holds nothing, or what was kept of an earlier one.
    pub fn new(identity: Identity, held: Option<Held>) -> Self {
        let node = NodeContext::unknown(identity.node_name.clone());
        let mut session = Self {
            identity,
            state: State::default(),
            position: None,
            node,
            faults: Faults::default(),
            interner: Interner::default(),
            link: Link::Down,
        };
        if let Some(held) = held {
            let mut position = held.position;
            if position.digest != held.state.digest() {
                // Something was not held when this was kept. Without a history the server
                // sends everything, and with it what is missing.
                position = Position { digest: held.state.digest(), ..Position::default() };
            }
            session.state = held.state;
            session.interner = held.names;
            session.position = Some(position);
            session.node = held.node;
            session.hold_back();
        }
        session
    }

    /// Takes out what an earlier process could program and this one cannot.
    fn hold_back(&mut self) {
        let keys: Vec<ServiceKey> = self.state.service_keys().cloned().collect();
        for key in keys {
            let Some(service) = self.state.service(&key) else { continue };
            let Some(feature) = lacking(&self.identity, service) else { continue };
            let key = Key::Service(key);
            let version = self.state.get(&key).map(|(version, _)| version);
            self.state.remove(&key);
            let fault = Fault::unsupported(key, version, feature);
            tracing::warn!(node = %self.identity.node_name, "{}", fault.failure.message);
            self.faults.insert(fault);
            self.position = Some(Position { digest: self.state.digest(), ..Position::default() });
        }
    }

    /// The state as of the last commit.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Where that is in history; `None` = never complete so far.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// Facts about the node.
    pub fn node(&self) -> &NodeContext {
        &self.node
    }

    /// True where the server of the live connection has confirmed or brought the state.
    pub fn confirmed(&self) -> bool {
        matches!(&self.link, Link::Following(link) if link.confirmed)
    }

    /// Resources that could not be taken in.
    pub fn faults(&self) -> usize {
        self.faults.len()
    }

    /// Changes what the next Hello says of the backend.
    pub fn identity_mut(&mut self) -> &mut Identity {
        &mut self.identity
    }

    /// Forgets names that no resource uses any more. Costs a pass over all of them: for idle
    /// moments, every few minutes.
    pub fn shrink(&mut self) {
        self.interner.shrink();
    }

    /// A connection is up. Returns the Hello to send first.
    pub fn connected(&mut self, now: Now) -> v1::SyncRequest {
        self.link = Link::Greeting { heard: now.monotonic };
        let identity = &self.identity;
        let session_features = [v1::Feature::EndpointPatch, v1::Feature::Zstd];
        let mut features: Vec<i32> =
            identity.features.iter().chain(&session_features).map(|feature| *feature as i32).collect();
        features.sort_unstable();
        // The digest of what is really held: a resource that could not be taken in is missing
        // from it, so no server takes this client for complete.
        let digest = self.state.digest();
        let held = self.position.map(|position| Position { digest, ..position }.to_wire(self.state.len()));
        // Where all that is missing is known, the server can go on from the position; what is
        // missing is asked for when it does.
        let reached = self.position.filter(|it| it.digest != digest && self.faults.all_known());
        request(v1::sync_request::Kind::Hello(v1::Hello {
            node_name: identity.node_name.to_string(),
            instance_id: identity.instance_id.clone(),
            boot_id: identity.boot_id.clone(),
            agent_version: identity.agent_version.clone(),
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL,
            features,
            backend: Some(identity.backend.clone()),
            held,
            kernel_adopted: identity.kernel_adopted,
            position_digest: reached.map(|it| it.digest.to_bytes().to_vec().into()).unwrap_or_default(),
            started_at: Some(identity.started.into()),
            settings: identity.settings.clone(),
        }))
    }

    /// The connection is gone. A transaction that was not committed is forgotten.
    pub fn disconnected(&mut self) {
        self.link = Link::Down;
    }

    /// Checks for silence. `Some` = why the connection must be given up.
    pub fn tick(&self, now: Now) -> Option<String> {
        let (heard, heartbeat) = match &self.link {
            Link::Down => return None,
            Link::Greeting { heard } => (*heard, DEFAULT_HEARTBEAT),
            Link::Following(link) => (link.heard, link.heartbeat),
        };
        let limit = heartbeat.saturating_mul(MISSED_HEARTBEATS);
        (now.monotonic.saturating_duration_since(heard) > limit)
            .then(|| format!("no message for {} s", limit.as_secs()))
    }

    /// The Ack that says what the caller reports and what the session itself could not take
    /// in; `None` where there is no server to tell.
    pub fn report(&self, report: &Report) -> Option<v1::SyncRequest> {
        let Link::Following(link) = &self.link else { return None };
        let held = self.position.unwrap_or_default();
        // Until this server has confirmed the state, the position is not in its history.
        let received = if held.epoch == link.epoch {
            held
        } else {
            Position { epoch: link.epoch, seq: 0, digest: held.digest }
        };
        let ack = report.to_ack(received, self.state.len(), self.faults.iter());
        Some(request(v1::sync_request::Kind::Ack(ack)))
    }

    /// Takes a message of the server in.
    pub fn receive(&mut self, frame: raw::SyncResponse, now: Now) -> Step {
        match &mut self.link {
            Link::Down => return Step::default(),
            Link::Greeting { heard } => *heard = now.monotonic,
            Link::Following(link) => link.heard = now.monotonic,
        }
        // A kind this client does not know decodes to none: a sign of life, nothing more.
        let Some(kind) = frame.kind else { return Step::default() };
        match (kind, &self.link) {
            (raw::sync_response::Kind::Welcome(welcome), Link::Greeting { .. }) => self.welcome(welcome, now),
            (raw::sync_response::Kind::Welcome(_), _) => Step::end("a second Welcome on one stream"),
            // The stream ends by itself; how long to stay away is the transport's business.
            (raw::sync_response::Kind::Goodbye(_), _) => Step::default(),
            (_, Link::Greeting { .. }) => Step::end("a message before Welcome"),
            (raw::sync_response::Kind::Update(update), _) => self.update(update, now),
            (raw::sync_response::Kind::Heartbeat(heartbeat), _) => self.heartbeat(&heartbeat),
            (raw::sync_response::Kind::NodeContext(node), _) => {
                Step { node_changed: self.node_context(&node), ..Step::default() }
            }
        }
    }

    fn welcome(&mut self, welcome: v1::Welcome, now: Now) -> Step {
        if welcome.protocol != PROTOCOL {
            return Step::end(format!("protocol {} was not offered", welcome.protocol));
        }
        let Some(head) = welcome.head.as_ref().and_then(Position::from_wire).filter(|head| head.epoch != 0)
        else {
            return Step::end("Welcome without a usable head position");
        };
        let heartbeat = welcome.heartbeat_interval.and_then(|interval| interval.try_into().ok());
        let mut step = Step::default();
        if let Some(node) = &welcome.node_context {
            step.node_changed = self.node_context(node);
        }
        let mut link = Following {
            heard: now.monotonic,
            heartbeat: heartbeat
                .filter(|interval: &Duration| !interval.is_zero())
                .unwrap_or(DEFAULT_HEARTBEAT),
            epoch: head.epoch,
            confirmed: false,
            staged: None,
            awaiting_full: false,
            behind: 0,
            mended: false,
        };
        match welcome.resume_mode() {
            v1::ResumeMode::InSync if self.position.is_some() && head.digest == self.state.digest() => {
                self.faults.clear();
                self.position = Some(head);
                link.confirmed = true;
                step.committed = Some(Committed {
                    changes: Vec::new(),
                    services: Vec::new(),
                    position: head,
                    held: head.digest,
                    trigger: None,
                    full: false,
                });
            }
            v1::ResumeMode::InSync => {
                link.awaiting_full = true;
                step.send = Some(refetch_everything());
            }
            v1::ResumeMode::Full => link.awaiting_full = true,
            v1::ResumeMode::Delta | v1::ResumeMode::Unspecified => {
                // Another server may have what this client can read.
                step.send = link.ask(self.faults.refetch_all());
            }
        }
        self.link = Link::Following(link);
        step
    }

    fn node_context(&mut self, node: &v1::NodeContext) -> bool {
        match convert::node_context_from_wire(node) {
            Ok(node) if node.name != self.identity.node_name => {
                tracing::warn!(node = %self.identity.node_name, other = %node.name, "ignored facts about another node");
                false
            }
            Ok(node) if node == self.node => false,
            Ok(node) => {
                self.node = node;
                true
            }
            Err(error) => {
                tracing::warn!(node = %self.identity.node_name, %error, "ignored facts about this node that make no sense");
                false
            }
        }
    }

    fn heartbeat(&mut self, heartbeat: &v1::Heartbeat) -> Step {
        let Link::Following(link) = &mut self.link else { return Step::default() };
        let Some(head) = heartbeat.head.as_ref().and_then(Position::from_wire) else {
            return Step::default();
        };
        let held = self.position.unwrap_or_default();
        if head.epoch != link.epoch {
            return Step::end(format!("a head of {head} on a stream of epoch {:016x}", link.epoch));
        }
        let waiting = link.awaiting_full || link.staged.is_some();
        if !waiting && head.same_epoch(held) && head.seq == held.seq && head.digest != held.digest {
            tracing::warn!(node = %self.identity.node_name, position = %held, "the server's digest differs: fetching everything");
            link.awaiting_full = true;
            return Step { send: Some(refetch_everything()), ..Step::default() };
        }
        let behind = waiting || !head.same_epoch(held) || head.seq > held.seq;
        link.behind = if behind { link.behind + 1 } else { 0 };
        if link.behind >= BEHIND_HEARTBEATS {
            return Step::end(format!("the server is at {head}, sends nothing, and this node is at {held}"));
        }
        if !waiting && !link.mended && self.faults.lost_without_name() {
            (link.mended, link.awaiting_full) = (true, true);
            return Step { send: Some(refetch_everything()), ..Step::default() };
        }
        let send = if waiting { None } else { link.ask(self.faults.refetch(u32::MAX)) };
        Step { send, ..Step::default() }
    }

    fn update(&mut self, update: raw::Update, now: Now) -> Step {
        let Link::Following(link) = &mut self.link else { return Step::default() };
        let Some(to) = update.to.as_ref().and_then(Position::from_wire) else {
            return Step::end("an Update without a usable target position");
        };
        if to.epoch != link.epoch {
            return Step::end(format!("an Update to {to} on a stream of epoch {:016x}", link.epoch));
        }
        link.behind = 0;
        let mut transaction = match link.staged.take() {
            Some(staged) if staged.to == to => staged,
            other => {
                if let Some(cut) = other {
                    tracing::warn!(node = %self.identity.node_name, position = %cut.to, "forgot a transaction that was never committed");
                }
                match self.begin(&update, to) {
                    Begin::Take(transaction) => *transaction,
                    Begin::PassOver => return Step::default(),
                    Begin::Lost => return self.lost("an Update builds on a state this node does not hold"),
                }
            }
        };
        let commit = update.commit;
        let held = transaction::Held { state: &self.state, identity: Some(&self.identity), now: now.wall };
        if let Err(error) = transaction.stage(update, &held, &mut self.interner) {
            return Step::end(format!("an Update that cannot be read: {error}"));
        }
        if commit {
            return self.commit(transaction);
        }
        if let Link::Following(link) = &mut self.link {
            link.staged = Some(transaction);
        }
        Step::default()
    }

    /// Whether a transaction can be built on what is held.
    fn begin(&self, update: &raw::Update, to: Position) -> Begin {
        let Link::Following(link) = &self.link else { return Begin::PassOver };
        let held = self.position.unwrap_or_default();
        if self.position.is_some() && to.same_epoch(held) && to.seq < held.seq {
            return Begin::PassOver;
        }
        if update.full {
            return Begin::Take(Box::new(Transaction::new(to, true)));
        }
        if link.awaiting_full {
            return Begin::PassOver;
        }
        if let Some(from) = &update.from {
            if self.position.is_some() && to.same_epoch(held) && to.seq == held.seq {
                return Begin::PassOver;
            }
            let from = Position::from_wire(from);
            let matches = from.is_some_and(|from| {
                self.position.is_some()
                    && (from.digest == held.digest
                        || from.digest == self.state.digest()
                        || (from.same_epoch(held) && from.seq == held.seq && !self.faults.is_empty()))
            });
            if !matches {
                return Begin::Lost;
            }
        } else if self.position.is_none() {
            return Begin::Lost;
        }
        Begin::Take(Box::new(Transaction::new(to, false)))
    }

    fn commit(&mut self, transaction: Transaction) -> Step {
        let to = transaction.to;
        let outcome = match transaction.commit(&mut self.state, &mut self.faults) {
            Ok(outcome) => outcome,
            Err(digest) => {
                tracing::warn!(
                    node = %self.identity.node_name, position = %to, expected = %to.digest, got = %digest,
                    "a transaction does not add up and was not applied"
                );
                return self.lost("the digest differs");
            }
        };
        self.position = Some(to);
        let mut send = None;
        if let Link::Following(link) = &mut self.link {
            link.confirmed = true;
            link.awaiting_full &= !outcome.full;
            if outcome.refetch {
                send = link.ask(self.faults.refetch(HASTY_REFETCHES));
            }
        }
        if outcome.full {
            self.interner.shrink();
        }
        Step {
            send,
            committed: Some(Committed {
                changes: outcome.changes,
                services: outcome.services,
                position: to,
                held: self.state.digest(),
                trigger: outcome.trigger,
                full: outcome.full,
            }),
            ..Step::default()
        }
    }

    /// What is held cannot be continued from: everything is fetched again. If even a full
    /// snapshot does not add up, the connection is given up, so that backoff sets the pace.
    fn lost(&mut self, why: &str) -> Step {
        let Link::Following(link) = &mut self.link else { return Step::default() };
        link.staged = None;
        if std::mem::replace(&mut link.awaiting_full, true) {
            return Step::end(format!("after fetching everything: {why}"));
        }
        Step { send: Some(refetch_everything()), ..Step::default() }
    }
}

/// What a client lacks in order to program a Service.
fn lacking(identity: &Identity, service: &Service) -> Option<Feature> {
    let can = |feature: Feature| identity.features.iter().any(|it| *it as i64 == feature as i64);
    service.required_features().into_iter().find(|feature| !can(*feature))
}

enum Begin {
    Take(Box<Transaction>),
    /// It has been applied already, or something newer was asked for.
    PassOver,
    /// The state it builds on is not here.
    Lost,
}

impl Step {
    fn end(why: impl Into<String>) -> Self {
        Self { end: Some(why.into()), ..Self::default() }
    }
}

impl Now {
    /// Reads the clocks.
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

fn request(kind: v1::sync_request::Kind) -> v1::SyncRequest {
    v1::SyncRequest { kind: Some(kind) }
}

impl Following {
    /// The request for what is missing, if anything is.
    fn ask(&mut self, missing: Option<Missing<'_>>) -> Option<v1::SyncRequest> {
        Some(match missing? {
            Missing::Keys(keys) => refetch(keys.into_iter()),
            Missing::Everything => {
                self.awaiting_full = true;
                refetch_everything()
            }
        })
    }
}

fn refetch_everything() -> v1::SyncRequest {
    request(v1::sync_request::Kind::Refetch(v1::Refetch { refs: Vec::new(), everything: true }))
}

/// Asks for resources, in whichever version the server has by now.
fn refetch<'a>(keys: impl Iterator<Item = &'a Key>) -> v1::SyncRequest {
    let refs = keys.map(|key| convert::key_to_wire(key, None)).collect();
    request(v1::sync_request::Kind::Refetch(v1::Refetch { refs, everything: false }))
}
