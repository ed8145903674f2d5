//! Every node, its stream, and how far it has come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_model::{Digest, Interner, NodeContext, ServiceKey};

use crate::Store;

mod failures;
mod report;
mod tally;
#[cfg(test)]
mod tests;

use failures::Unlisted;
pub use report::{
    BackendFacts, Facts, Failure, FailureClass, InForce, Level, Levels, NodeSettings, Outcome, Pass, Report,
    Resume,
};
use tally::{Share, Tally};

/// How many instances that lost their stream to another one are remembered per node.
const OUSTED: usize = 64;

/// Tells streams apart; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u64);

/// Every node that has a Node object or a live stream: the nodes that are expected to
/// program the state.
#[derive(Debug, Default)]
pub struct Nodes {
    nodes: BTreeMap<Arc<str>, Node>,
    streams: HashMap<StreamId, Arc<str>>,
    next_stream: u64,
    tally: Tally,
    failures: usize,
    /// Messages, and names of Services that fail.
    names: Interner,
    converged: Option<(u64, Duration)>,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    context: Option<NodeContext>,
    stream: Option<StreamId>,
    session: Option<Streaming>,
    ousted: VecDeque<String>,
    superseded: u32,
    levels: Levels,
    report: Option<Report>,
    unlisted: Unlisted,
    last_seen: Option<Instant>,
    /// Since when it has not been verified at the head; for a node that was verified at a
    /// head and is still there, the tally knows.
    behind_since: Option<Instant>,
}

/// The newest session of a node, live or not.
#[derive(Debug, Clone)]
pub struct Streaming {
    /// From its Hello.
    pub facts: Facts,
    /// Newest transaction sent.
    pub sent: Option<u64>,
    /// When it started.
    pub since: Instant,
}

/// State of a node, worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeState {
    /// Verified at the head, nothing failing.
    InSync,
    /// Connected, not verified at the head yet.
    Behind,
    /// Verified at the head, minus failures.
    Degraded,
    /// The backend as a whole cannot program.
    Failed,
    /// Seen before, no stream now.
    Disconnected,
    /// A Node object without a stream since the server started.
    NeverSeen,
}

/// A stream that was let in.
#[derive(Debug, PartialEq, Eq)]
pub struct Connected {
    /// The stream.
    pub stream: StreamId,
    /// The stream of the same node that it ends.
    pub superseded: Option<StreamId>,
    /// True where the source has a Node object of this name.
    pub has_node_object: bool,
}

/// Why a stream was not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Two programs run under one node name; the one started last has the stream.
    #[error(
        "node {node}: instance {instance:?} is older than instance {successor:?} at {peer}, which is connected; \
         two agents with one node name?"
    )]
    Superseded {
        /// The node.
        node: Arc<str>,
        /// Who was refused.
        instance: String,
        /// Who has the stream.
        successor: String,
        /// Where that one is.
        peer: String,
    },
}

/// Why a report was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// The stream is not the live one of its node (any more).
    #[error("the stream has ended")]
    NotLive,
    /// The report is about another server process.
    #[error("position.epoch: {epoch:016x} is not the epoch of this server, {ours:016x}")]
    OtherEpoch {
        /// Stated.
        epoch: u64,
        /// Ours.
        ours: u64,
    },
    /// The report is about what has not been published.
    #[error("received_seq: {seq} is newer than the head, {head}")]
    Future {
        /// Stated.
        seq: u64,
        /// Newest published.
        head: u64,
    },
    /// The node says that it has applied a transaction, and names another state.
    #[error("position.digest: {digest} is not the digest of seq {seq}, {ours}")]
    OtherDigest {
        /// Stated.
        seq: u64,
        /// Stated.
        digest: Digest,
        /// Ours.
        ours: Digest,
    },
    /// The levels contradict each other.
    #[error("verified_seq <= applied_seq <= received_seq does not hold")]
    Unordered,
}

impl AckError {
    /// True where the report may be right and only late: it is dropped, the stream goes on.
    pub fn is_stale(self) -> bool {
        matches!(self, AckError::NotLive | AckError::OtherEpoch { .. })
    }
}

/// How many nodes have come how far with the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Nodes expected; the other counts are of these.
    pub expected: u32,
    /// Have received the head.
    pub received: u32,
    /// Have applied the head.
    pub applied: u32,
    /// Have verified the head.
    pub verified: u32,
    /// Report failures, or a backend that cannot program.
    pub degraded: u32,
    /// Have no stream.
    pub disconnected: u32,
}

/// The newest transaction that every expected node has verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Convergence {
    /// Its seq.
    pub seq: u64,
    /// Its publication -> its last verified report.
    pub took: Duration,
}

/// How far a wait has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Nodes expected.
    pub expected: u32,
    /// Of these, nodes that are done.
    pub done: u32,
    /// Some of the others, by name.
    pub laggards: Vec<Arc<str>>,
}

impl Node {
    fn new(now: Instant) -> Self {
        Self {
            context: None,
            stream: None,
            session: None,
            ousted: VecDeque::new(),
            superseded: 0,
            levels: Levels::default(),
            report: None,
            unlisted: Unlisted::default(),
            last_seen: None,
            behind_since: Some(now),
        }
    }

    /// Facts from the Node object, if the source has one.
    pub fn context(&self) -> Option<&NodeContext> {
        self.context.as_ref()
    }

    /// True where a stream is live.
    pub fn connected(&self) -> bool {
        self.stream.is_some()
    }

    /// The newest session, live or not.
    pub fn session(&self) -> Option<&Streaming> {
        self.session.as_ref()
    }

    /// How often a stream was ended by another instance.
    pub fn superseded(&self) -> u32 {
        self.superseded
    }

    /// How far it has come.
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// Its last report.
    pub fn report(&self) -> Option<&Report> {
        self.report.as_ref()
    }

    /// When its last message came.
    pub fn last_seen(&self) -> Option<Instant> {
        self.last_seen
    }

    /// What it reports as not in force, as far as it is listed.
    pub fn failures(&self) -> &[Failure] {
        self.report.as_ref().map_or(&[], |report| &report.failures)
    }

    /// Why its backend as a whole cannot program; empty = it can, as far as is known.
    pub fn backend_error(&self) -> &str {
        self.report.as_ref().map_or("", |report| &report.backend_error)
    }

    /// The Services that it reports failures of, listed or not, each at least once.
    pub fn failing_services(&self) -> impl Iterator<Item = &ServiceKey> {
        let listed = self.failures().iter().filter_map(|failure| failure.key.as_ref()?.service());
        listed.chain(self.unlisted.services())
    }

    /// True where it reports a failure of the Service or one of its endpoint sets, or one that
    /// may be: it has no key, or the node has not listed it.
    pub fn may_fail(&self, service: &ServiceKey) -> bool {
        self.failures().iter().any(|failure| failure.may_concern(service))
            || self.unlisted.may_concern(service)
    }

    /// True where it reports failures, or a backend that cannot program.
    pub fn degraded(&self) -> bool {
        self.report.as_ref().is_some_and(|report| {
            !report.failures.is_empty() || report.failures_truncated > 0 || !report.backend_error.is_empty()
        })
    }

    fn share(&self) -> Share {
        Share { levels: self.levels, degraded: self.degraded(), disconnected: !self.connected() }
    }

    /// State of the node against `head`.
    pub fn state(&self, head: u64) -> NodeState {
        match self.session {
            None => NodeState::NeverSeen,
            Some(_) if !self.connected() => NodeState::Disconnected,
            Some(_) if !self.backend_error().is_empty() => NodeState::Failed,
            Some(_) if self.levels.verified != Some(head) => NodeState::Behind,
            Some(_) if self.degraded() => NodeState::Degraded,
            Some(_) => NodeState::InSync,
        }
    }
}

impl Nodes {
    /// Takes in a Node object. True where its facts are new.
    pub fn upsert_object(&mut self, context: NodeContext, now: Instant) -> bool {
        let name = context.name.clone();
        if self.nodes.get(&name).is_some_and(|node| node.context.as_ref() == Some(&context)) {
            return false;
        }
        self.change(&name, now, |node| node.context = Some(context));
        true
    }

    /// Forgets a Node object. True where there was one.
    pub fn remove_object(&mut self, name: &str, now: Instant) -> bool {
        if self.nodes.get(name).is_none_or(|node| node.context.is_none()) {
            return false;
        }
        self.change(&Arc::from(name), now, |node| node.context = None);
        true
    }

    /// Lets a stream in. The newest process of a node name has the stream: it ends the stream
    /// of an older one, and that one is refused for as long as its successor is connected.
    pub fn connect(&mut self, facts: Facts, now: Instant) -> Result<Connected, ConnectError> {
        let name = facts.node_name.clone();
        if let Some(node) = self.nodes.get(&name)
            && let (Some(_), Some(live)) = (node.stream, &node.session)
            && node.is_older(&facts, &live.facts)
        {
            return Err(ConnectError::Superseded {
                node: name,
                instance: facts.instance_id,
                successor: live.facts.instance_id.clone(),
                peer: live.facts.peer.clone(),
            });
        }
        self.next_stream += 1;
        let stream = StreamId(self.next_stream);
        let (superseded, has_node_object) = self.change(&name, now, |node| {
            let superseded = node.stream.replace(stream);
            let before = node.session.replace(Streaming { facts, sent: None, since: now });
            node.succeed(before, superseded.is_some(), now);
            node.last_seen = Some(now);
            (superseded, node.context.is_some())
        });
        if let Some(superseded) = superseded {
            self.streams.remove(&superseded);
        }
        self.streams.insert(stream, name);
        Ok(Connected { stream, superseded, has_node_object })
    }

    /// Ends a stream. A node without a Node object is not expected any more. Returns the node
    /// whose live stream it was.
    pub fn disconnect(&mut self, stream: StreamId, now: Instant) -> Option<Arc<str>> {
        let name = self.streams.remove(&stream)?;
        self.change(&name, now, |node| node.stream = None);
        Some(name)
    }

    /// Notes that a transaction was sent.
    pub fn sent(&mut self, stream: StreamId, seq: u64) {
        if let Some(name) = self.streams.get(&stream)
            && let Some(session) = self.nodes.get_mut(name).and_then(|node| node.session.as_mut())
        {
            session.sent = Some(seq);
        }
    }

    /// Notes a sign of life.
    pub fn heard(&mut self, stream: StreamId, now: Instant) {
        if let Some(name) = self.streams.get(&stream)
            && let Some(node) = self.nodes.get_mut(name)
        {
            node.last_seen = Some(now);
        }
    }

    /// Takes a report of the node that the stream belongs to.
    pub fn ack(
        &mut self,
        stream: StreamId,
        mut report: Report,
        store: &Store,
        now: Instant,
    ) -> Result<(), AckError> {
        let head = store.head();
        let name = self.streams.get(&stream).cloned().ok_or(AckError::NotLive)?;
        self.heard(stream, now);
        let levels = report.levels;
        if report.epoch != head.epoch {
            return Err(AckError::OtherEpoch { epoch: report.epoch, ours: head.epoch });
        }
        if !(levels.verified <= levels.applied && levels.applied <= levels.received) {
            return Err(AckError::Unordered);
        }
        if let Some(seq) = levels.received.filter(|seq| *seq > head.seq) {
            return Err(AckError::Future { seq, head: head.seq });
        }
        if let (Some(seq), Some(digest)) = (levels.applied, report.digest)
            && let Some(published) = store.position_at(seq).filter(|published| published.digest != digest)
        {
            return Err(AckError::OtherDigest { seq, digest, ours: published.digest });
        }
        let unlisted = self.take_failures(&mut report);
        self.change(&name, now, |node| {
            node.levels = levels;
            node.report = Some(report);
            node.unlisted = unlisted;
            node.behind_since = match levels.verified == Some(head.seq) {
                true => None,
                false => node.behind_since.or(Some(now)),
            };
        });
        self.note_convergence(store, now);
        Ok(())
    }

    /// The state at `old_head` is not the newest any more. Costs the same for any number of
    /// nodes.
    pub fn published(&mut self, old_head: u64, now: Instant) {
        self.tally.superseded(old_head, now);
    }

    /// One node.
    pub fn get(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The live stream of a node.
    pub fn stream_of(&self, name: &str) -> Option<StreamId> {
        self.nodes.get(name)?.stream
    }

    /// Expected nodes by name, after `after`.
    pub fn iter(&self, after: Option<&str>) -> impl Iterator<Item = (&Arc<str>, &Node)> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.nodes.range::<str, _>((start, Bound::Unbounded))
    }

    /// Live streams.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// Counts against `head`.
    pub fn counts(&self, head: u64) -> Counts {
        let (received, applied, verified) = self.tally.at(head);
        Counts {
            expected: self.tally.expected,
            received,
            applied,
            verified,
            degraded: self.tally.degraded,
            disconnected: self.tally.disconnected,
        }
    }

    /// The newest transaction that was verified everywhere; `None` = none yet.
    pub fn convergence(&self) -> Option<Convergence> {
        self.converged.map(|(seq, took)| Convergence { seq, took })
    }

    /// Time since the node was last verified at `head`; `None` where it is now.
    pub fn behind_for(&self, node: &Node, head: u64, now: Instant) -> Option<Duration> {
        if node.levels.verified == Some(head) {
            return None;
        }
        let since = node.behind_since.or_else(|| self.tally.superseded_at(node.levels.verified));
        Some(since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since)))
    }

    /// Nodes that are behind `head`, longest first.
    pub fn laggards(&self, head: u64, now: Instant, limit: usize) -> Vec<Arc<str>> {
        let mut behind: Vec<(Duration, &Arc<str>)> = self
            .nodes
            .iter()
            .filter_map(|(name, node)| Some((self.behind_for(node, head, now)?, name)))
            .collect();
        behind.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        behind.into_iter().take(limit).map(|(_, name)| name.clone()).collect()
    }

    /// How many expected nodes have reached `seq` at `level` and do not report `service`
    /// (`None` = anything) as failed, nor anything that may be it. Names at most `limit` of the
    /// others. A node without a stream is one of them, whatever it reported last: nobody knows
    /// what its kernel has now.
    pub fn progress(&self, seq: u64, level: Level, service: Option<&ServiceKey>, limit: usize) -> Progress {
        let mut progress = Progress { expected: self.tally.expected, done: 0, laggards: Vec::new() };
        for (name, node) in &self.nodes {
            let fails = match service {
                Some(service) => node.may_fail(service),
                None => level != Level::Received && node.degraded(),
            };
            if node.connected() && node.levels.at(level) >= Some(seq) && !fails {
                progress.done += 1;
            } else if progress.laggards.len() < limit {
                progress.laggards.push(name.clone());
            }
        }
        progress
    }

    /// Changes one node, keeps the counts right, and forgets a node that is not expected.
    fn change<T>(&mut self, name: &Arc<str>, now: Instant, change: impl FnOnce(&mut Node) -> T) -> T {
        let mut node = match self.nodes.remove(name) {
            Some(node) => {
                let superseded_at = self.tally.superseded_at(node.levels.verified);
                self.tally.take(node.share());
                self.failures -= node.failures().len();
                Node { behind_since: node.behind_since.or(superseded_at), ..node }
            }
            None => Node::new(now),
        };
        let result = change(&mut node);
        if node.context.is_some() || node.connected() {
            self.tally.add(node.share());
            self.failures += node.failures().len();
            self.nodes.insert(name.clone(), node);
        }
        result
    }

    fn note_convergence(&mut self, store: &Store, now: Instant) {
        let Some(seq) = self.tally.verified_everywhere() else { return };
        if self.converged.is_none_or(|(known, _)| seq > known)
            && let Some(at) = store.published_at(seq)
        {
            self.converged = Some((seq, now.saturating_duration_since(at)));
        }
    }

    /// One broken Service fails with one message on thousands of nodes: it is kept once.
    fn take_failures(&mut self, report: &mut Report) -> Unlisted {
        let many = self.failures > failures::LISTED_IN_ALL;
        let limit = if many { failures::LISTED_WHEN_MANY } else { failures::LISTED };
        let unlisted = Unlisted::cut(report, limit, &mut self.names);
        for failure in &mut report.failures {
            failure.message = self.names.intern(&failure.message);
        }
        if report.failures.is_empty() && self.failures == 0 {
            self.names.shrink();
        }
        unlisted
    }
}

impl Node {
    /// True where the newcomer is of an older process than the live one. By what both say of
    /// their start: whoever connects first, after a restart of this process or ever, decides
    /// nothing. Where they do not say, one that lost its stream to another is the older.
    fn is_older(&self, newcomer: &Facts, live: &Facts) -> bool {
        if newcomer.instance_id == live.instance_id {
            return false;
        }
        match (newcomer.started, live.started) {
            (Some(newcomer), Some(live)) if newcomer != live => newcomer < live,
            _ => self.ousted.contains(&newcomer.instance_id),
        }
    }

    /// Draws the line between two sessions. What another process reported says nothing about
    /// what this one has in its kernel.
    fn succeed(&mut self, before: Option<Streaming>, ended: bool, now: Instant) {
        let (Some(before), Some(session)) = (before, &self.session) else { return };
        if before.facts.instance_id == session.facts.instance_id {
            return;
        }
        self.levels = Levels::default();
        self.behind_since.get_or_insert(now);
        self.report = None;
        self.unlisted = Unlisted::default();
        if ended {
            self.superseded += 1;
            if self.ousted.len() == OUSTED {
                self.ousted.pop_front();
            }
            self.ousted.push_back(before.facts.instance_id);
        }
    }
}
