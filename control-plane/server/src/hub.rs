//! The one shared thing: store, nodes and quarantine behind one lock, and who has to hear of
//! what.
//!
//! The lock is held for memory work only, never across an await and never while encoding.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lockstep_model::{Digest, Key, Kind, NodeContext};
use lockstep_store::{
    Changes, ConnectError, Convergence, Counts, Delta, Entry, NodeState, Nodes, Position, Quarantine, Resume,
    Store, StreamId,
};
use lockstep_wire::v1;
use tokio::sync::watch;
use tonic::Status;
use tracing::{info, warn};

use crate::convert;
use crate::counters::Counters;
use crate::frames::{self, BuildError, Built, Dialect, FrameCache, Heading, Step};
use crate::link::{End, Link, Refetch};

/// How many odd clients are remembered as logged already: more than a large cluster has nodes.
const LOGGED: usize = 16_384;

/// Most addresses in a line of the log.
const LOGGED_ADDRESSES: usize = 8;

/// A transaction with more changes than this is encoded off the async threads.
const BIG_DELTA: usize = 2_000;

/// What can be set.
#[derive(Debug, Clone)]
pub struct Config {
    /// The longest silence on a stream.
    pub heartbeat: Duration,
    /// How long a client may take to send its Hello.
    pub hello_timeout: Duration,
    /// Longest time that clients are told to stay away when the server goes; each gets a random
    /// part of it, so that they do not come back at once.
    pub reconnect_spread: Duration,
    /// Version of the program, for people.
    pub version: String,
    /// True = a stream's node name must be in its client certificate.
    pub node_name_from_certificate: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(15),
            hello_timeout: Duration::from_secs(10),
            reconnect_spread: Duration::from_secs(5),
            version: env!("CARGO_PKG_VERSION").into(),
            node_name_from_certificate: false,
        }
    }
}

/// What every part of the server shares.
#[derive(Debug)]
pub struct Hub {
    pub(crate) config: Config,
    pub(crate) server_id: String,
    pub(crate) counters: Counters,
    pub(crate) frames: FrameCache,
    shared: Mutex<Shared>,
    head: watch::Sender<u64>,
    activity: watch::Sender<u64>,
    serving: watch::Sender<bool>,
    closing: watch::Sender<bool>,
}

/// What is behind the lock.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) nodes: Nodes,
    pub(crate) quarantine: Quarantine,
    /// `None` = it serves.
    pub(crate) not_serving: Option<String>,
    pub(crate) source_fresh_at: Option<SystemTime>,
    links: HashMap<StreamId, Arc<Link>>,
    logged: BTreeSet<(&'static str, String)>,
}

/// A stream that was let in.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) stream: StreamId,
    pub(crate) node: Arc<str>,
    pub(crate) link: Arc<Link>,
    /// What the node holds; `None` = nothing that helps.
    pub(crate) cursor: Option<Position>,
    /// What it must not fall behind: it held this seq of this epoch.
    pub(crate) at_least: u64,
    pub(crate) resume: Resume,
    pub(crate) head: v1::Position,
    pub(crate) context: v1::NodeContext,
}

/// The state of everything in numbers, for metrics and probes.
#[derive(Debug, Clone)]
pub struct Overview {
    /// Newest state.
    pub head: Position,
    /// Services in it.
    pub services: u64,
    /// Endpoint sets in it.
    pub endpoint_sets: u64,
    /// ServiceCidrs in it.
    pub service_cidrs: u64,
    /// Live streams.
    pub streams: usize,
    /// Source objects in quarantine.
    pub quarantined: usize,
    /// Nodes against the head.
    pub counts: Counts,
    /// Nodes by state, every state named.
    pub states: Vec<(NodeState, u32)>,
    /// Newest transaction verified everywhere.
    pub convergence: Option<Convergence>,
    /// Last proof that the source is alive.
    pub source_fresh_at: Option<SystemTime>,
    /// Why nothing is served; `None` = it is.
    pub not_serving: Option<String>,
}

impl Hub {
    /// A hub with an empty state that serves nothing yet.
    pub fn new(config: Config) -> Self {
        let epoch = NonZeroU64::new(fastrand::u64(1..)).unwrap_or(NonZeroU64::MIN);
        let shared = Shared {
            store: Store::new(epoch, Instant::now()),
            nodes: Nodes::default(),
            quarantine: Quarantine::default(),
            not_serving: Some("the source has not been read yet".into()),
            source_fresh_at: None,
            links: HashMap::new(),
            logged: BTreeSet::new(),
        };
        Self {
            config,
            server_id: format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)),
            counters: Counters::default(),
            frames: FrameCache::default(),
            shared: Mutex::new(shared),
            head: watch::channel(0).0,
            activity: watch::channel(0).0,
            serving: watch::channel(false).0,
            closing: watch::channel(false).0,
        }
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Becomes true when every watch of the source has completed its first list.
    pub fn serving(&self) -> watch::Receiver<bool> {
        self.serving.subscribe()
    }

    /// The state of everything in numbers. Costs a walk over the nodes.
    pub fn overview(&self) -> Overview {
        let shared = self.lock();
        let head = shared.store.head();
        let all = [
            NodeState::InSync,
            NodeState::Behind,
            NodeState::Degraded,
            NodeState::Failed,
            NodeState::Disconnected,
            NodeState::NeverSeen,
        ];
        let mut states = all.map(|state| (state, 0));
        for (_, node) in shared.nodes.iter(None) {
            let now = node.state(head.seq);
            states.iter_mut().filter(|(state, _)| *state == now).for_each(|(_, count)| *count += 1);
        }
        Overview {
            head,
            services: shared.store.resource_count(Kind::Service),
            endpoint_sets: shared.store.resource_count(Kind::EndpointSet),
            service_cidrs: shared.store.resource_count(Kind::ServiceCidr),
            streams: shared.nodes.stream_count(),
            quarantined: shared.quarantine.len(),
            counts: shared.nodes.counts(head.seq),
            states: states.to_vec(),
            convergence: shared.nodes.convergence(),
            source_fresh_at: shared.source_fresh_at,
            not_serving: shared.not_serving.clone(),
        }
    }

    /// Publishes changes, if they change anything; `received` is when the oldest of them was
    /// taken in. When this returns, the frame that brings streams from the state before to the
    /// new one is made.
    pub(crate) fn publish(&self, changes: Changes, received: Instant) {
        let now = Instant::now();
        let step = {
            let mut shared = self.lock();
            let (old, told) = (shared.store.head(), shared.store.node_addresses().clone());
            let Some(seq) = shared.store.apply(changes, now) else { return };
            // Under the same lock: who sees the new head sees that there are other facts.
            shared.tell_node_addresses(&told);
            shared.nodes.published(old.seq, now);
            let delta = match shared.links.is_empty() {
                true => None,
                false => shared.store.delta(old.seq, true).map(|delta| (delta, shared.position(seq))),
            };
            (old, seq, delta)
        };
        self.counters.transactions.inc();
        let (from, to, delta) = step;
        if let Some((delta, to_position)) = delta {
            let heading = Heading { from: Some(convert::position(from)), to: to_position };
            if let Ok(built) = self.build_delta(heading, &delta, Dialect::USUAL) {
                // Nobody else can have filled it: no stream has heard of the new head.
                let _ = self.frames.step(Step { from, to, dialect: Dialect::USUAL }).set(built);
                self.counters.frame_ready.observe(received.elapsed());
            }
        }
        self.frames.trim(to, now);
        self.head.send_replace(to);
        self.touch();
    }

    fn build_delta(&self, heading: Heading, delta: &Delta, dialect: Dialect) -> Result<Built, BuildError> {
        let built = frames::delta(heading, delta, &[], dialect.zstd);
        self.count_built(built)
    }

    fn count_built(&self, built: Result<Built, BuildError>) -> Result<Built, BuildError> {
        match &built {
            Ok(built) => {
                self.counters.frames_built.inc();
                self.counters
                    .frames_built_bytes
                    .add(built.frames.iter().map(|frame| frame.bytes().len()).sum());
            }
            Err(error) => warn!(%error, "a transaction cannot be encoded"),
        }
        built
    }

    /// The state is complete: it is served from now on.
    pub(crate) fn start_serving(&self) {
        let mut shared = self.lock();
        if *self.closing.borrow() || shared.not_serving.take().is_none() {
            return;
        }
        shared.store.begin(Instant::now());
        let head = shared.store.head();
        drop(shared);
        self.head.send_replace(head.seq);
        info!(seq = head.seq, resources = head.resources, digest = %head.digest, "serving");
        self.serving.send_replace(true);
        self.touch();
    }

    /// The state is not complete yet, for this reason.
    pub(crate) fn not_serving(&self, reason: String) {
        let mut shared = self.lock();
        if let Some(known) = &mut shared.not_serving
            && *known != reason
            && !*self.closing.borrow()
        {
            known.clone_from(&reason);
            drop(shared);
            info!(%reason, "not serving yet");
        }
    }

    pub(crate) fn source_alive(&self) {
        self.lock().source_fresh_at = Some(SystemTime::now());
    }

    pub(crate) fn upsert_node(&self, context: NodeContext) {
        let mut shared = self.lock();
        let (name, after) = (context.name.clone(), context.addresses.clone());
        let before = shared.addresses_of(&name);
        if shared.nodes.upsert_object(context, Instant::now()) {
            shared.node_changed(&name, &before, &after);
            drop(shared);
            self.touch();
        }
    }

    pub(crate) fn remove_node(&self, name: &str) {
        let mut shared = self.lock();
        let before = shared.addresses_of(name);
        if shared.nodes.remove_object(name, Instant::now()) {
            shared.node_changed(name, &before, &[]);
            drop(shared);
            self.touch();
        }
    }

    /// Lets a stream in, or says why not.
    pub(crate) fn admit(&self, hello: v1::Hello, peer: String) -> Result<Admission, Status> {
        let held = hello.held.clone();
        let mut shared = self.lock();
        shared.check_serving()?;
        let (resume, cursor, at_least) = shared.resume(held.as_ref(), &hello.position_digest);
        let facts = convert::facts(hello, peer, resume).map_err(invalid)?;
        let connected = match shared.nodes.connect(facts.clone(), Instant::now()) {
            Ok(connected) => connected,
            Err(error) => {
                let ConnectError::Superseded { node, instance, .. } = &error;
                let first = shared.first_time("refused", format!("{node}/{instance}"));
                drop(shared);
                if first {
                    warn!(%error, "stream refused");
                }
                return Err(Status::already_exists(error.to_string()));
            }
        };
        let link = Arc::new(Link::default());
        shared.links.insert(connected.stream, link.clone());
        if let Some(old) = connected.superseded.and_then(|old| shared.links.remove(&old)) {
            let message = format!("superseded by instance {} at {}", facts.instance_id, facts.peer);
            old.end(goodbye(v1::GoodbyeReason::Superseded, Duration::ZERO, message));
            self.counters.streams_superseded.inc();
        }
        let name = &facts.node_name;
        let stranger = !connected.has_node_object && shared.first_time("stranger", name.to_string());
        let admission = Admission {
            stream: connected.stream,
            node: name.clone(),
            link,
            cursor,
            at_least,
            resume,
            context: shared.context(name),
            head: shared.position(shared.store.head().seq),
        };
        drop(shared);
        let superseded = connected.superseded.is_some();
        info!(node = %name, instance = facts.instance_id, peer = facts.peer, ?resume, superseded, "stream started");
        if stranger {
            warn!(node = %name, peer = facts.peer, "no Node object has this name; served all the same");
        }
        match resume {
            Resume::InSync => self.counters.resumed_in_sync.inc(),
            Resume::Delta => self.counters.resumed_delta.inc(),
            Resume::Full => self.counters.resumed_full.inc(),
        }
        self.touch();
        Ok(admission)
    }

    /// A stream is over.
    pub(crate) fn leave(&self, stream: StreamId, why: &str) {
        let mut shared = self.lock();
        shared.links.remove(&stream);
        let node = shared.nodes.disconnect(stream, Instant::now());
        drop(shared);
        // One that was superseded is over for its node already, and when the server goes, all are.
        if let Some(node) = node.filter(|_| !*self.closing.borrow()) {
            info!(%node, why, "stream ended");
        }
        self.touch();
    }

    /// What brings a client from `cursor` (`None` = whatever it holds) to the head; everything
    /// where that is not known.
    pub(crate) async fn transaction(
        self: &Arc<Self>,
        cursor: Option<Position>,
        at_least: u64,
        dialect: Dialect,
    ) -> Result<Built, BuildError> {
        let head = self.lock().store.head();
        if let Some(from) = cursor {
            let cell = self.frames.step(Step { from, to: head.seq, dialect });
            let build = || async {
                let (delta, to) = {
                    let shared = self.lock();
                    (shared.store.delta(from.seq, dialect.patches), shared.position(shared.store.head().seq))
                };
                let Some(delta) = delta else { return Err(None) };
                let heading = Heading { from: Some(convert::position(from)), to };
                let small = delta.upserts.len() + delta.patches.len() <= BIG_DELTA;
                let hub = self.clone();
                let build = move || hub.build_delta(heading, &delta, dialect);
                if small { build() } else { blocking(build).await }.map_err(Some)
            };
            match cell.get_or_try_init(build).await {
                Ok(built) => return Ok(built.clone()),
                Err(Some(error)) => return Err(error),
                Err(None) => {}
            }
        }
        self.full(at_least.max(cursor.map_or(0, |cursor| cursor.seq)), head.seq, dialect).await
    }

    /// A full snapshot, not older than `at_least`.
    async fn full(self: &Arc<Self>, at_least: u64, head: u64, dialect: Dialect) -> Result<Built, BuildError> {
        let build = || async {
            let hub = self.clone();
            blocking(move || {
                let (snapshot, to) = {
                    let shared = hub.lock();
                    (shared.store.snapshot(), shared.position(shared.store.head().seq))
                };
                let built = frames::snapshot(Heading { from: None, to }, &snapshot, dialect.zstd);
                hub.count_built(built)
            })
            .await
        };
        let cell = self.frames.snapshot(dialect, at_least, head, Instant::now());
        let built = cell.get_or_try_init(build).await?;
        if built.to.seq >= at_least {
            return Ok(built.clone());
        }
        // Rare: it was begun before `at_least` was published.
        build().await
    }

    /// What a client asked for again, together with what it has not seen yet: one transaction
    /// that leads to the head whatever the client held of these keys.
    pub(crate) async fn refetch(
        self: &Arc<Self>,
        cursor: Position,
        what: Refetch,
        dialect: Dialect,
    ) -> Result<Built, BuildError> {
        let head = self.lock().store.head().seq;
        let Refetch::Keys(keys) = what else { return self.full(cursor.seq, head, dialect).await };
        let Some((delta, again, to)) = self.lock().again(cursor.seq, &keys) else {
            return self.full(cursor.seq, head, dialect).await;
        };
        let built = frames::delta(Heading { from: None, to }, &delta, &again, dialect.zstd);
        self.count_built(built)
    }

    /// Ends every stream and refuses new ones.
    pub fn shut_down(&self) {
        self.closing.send_replace(true);
        let mut shared = self.lock();
        shared.not_serving = Some("the server is shutting down".into());
        let spread = self.config.reconnect_spread;
        for link in shared.links.values() {
            let away = spread.mul_f64(fastrand::f64());
            link.end(goodbye(v1::GoodbyeReason::Shutdown, away, "the server is shutting down".into()));
        }
        drop(shared);
        self.serving.send_replace(false);
        self.touch();
    }

    /// Notes that something which status calls show has changed.
    pub(crate) fn touch(&self) {
        self.activity.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(crate) fn head_changes(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    /// Becomes true when the server goes.
    pub(crate) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    pub(crate) fn activity(&self) -> watch::Receiver<u64> {
        self.activity.subscribe()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// A remembered position with how fresh the source was.
    pub(crate) fn position(&self, seq: u64) -> v1::Position {
        let head = self.store.head();
        let position = match seq == head.seq {
            true => head,
            false => self.store.position_at(seq).unwrap_or(Position {
                seq,
                digest: Digest::EMPTY,
                resources: 0,
                ..head
            }),
        };
        let revisions = self.store.revisions().map(|(resource, version)| v1::SourceRevision {
            resource: resource.into(),
            resource_version: version.into(),
        });
        v1::Position { source_revisions: revisions.collect(), ..convert::position(position) }
    }

    pub(crate) fn check_serving(&self) -> Result<(), Status> {
        match &self.not_serving {
            Some(reason) => Err(Status::unavailable(format!("not serving: {reason}"))),
            None => Ok(()),
        }
    }

    /// How a client that holds `held` is brought to the head.
    ///
    /// The digest counts, because it means the same on every server. A seq counts only where
    /// it is of this epoch and nothing remembered contradicts the digest that came with it.
    ///
    /// A client that could not take everything in holds another digest than that of the state it
    /// was brought to, which it names in `stated`. It is continued from there and never taken for
    /// complete: what it lacks it asks for, and what changes comes anyway.
    fn resume(&self, held: Option<&v1::Position>, stated: &[u8]) -> (Resume, Option<Position>, u64) {
        let head = self.store.head();
        let Some(held) = held else { return (Resume::Full, None, 0) };
        let ours = held.epoch == head.epoch && held.seq <= head.seq;
        let at_least = if ours { held.seq } else { 0 };
        let Some(digest) = Digest::from_bytes(&held.digest) else { return (Resume::Full, None, at_least) };
        if digest == head.digest {
            return (Resume::InSync, Some(head), head.seq);
        }
        let remembered = |digest| self.store.seq_of(digest).and_then(|seq| self.store.position_at(seq));
        let reached = Digest::from_bytes(stated).unwrap_or(digest);
        let by_seq = || {
            let claimed = Position { seq: held.seq, digest: reached, resources: 0, ..head };
            (ours && self.store.position_at(held.seq).is_none()).then_some(claimed)
        };
        let cursor = remembered(digest).or_else(|| remembered(reached)).or_else(by_seq);
        let cursor = cursor.filter(|cursor| self.store.reaches(cursor.seq));
        let resume = if cursor.is_some() { Resume::Delta } else { Resume::Full };
        (resume, cursor, at_least)
    }

    /// What changed after `from`, and these keys as they are now: one state, read at once, since
    /// content of a later state would not add up to the digest that is announced.
    fn again(&self, from: u64, keys: &BTreeSet<Key>) -> Option<(Delta, Vec<Entry>, v1::Position)> {
        let mut delta = self.store.delta(from, false)?;
        let mut again = Vec::new();
        for key in keys {
            let upserted = delta.upserts.binary_search_by(|entry| entry.key.cmp(key)).is_ok();
            match (self.store.get(key), delta.removals.binary_search(key)) {
                (Some(entry), _) if !upserted => again.push(entry),
                (None, Err(at)) => delta.removals.insert(at, key.clone()),
                _ => {}
            }
        }
        Some((delta, again, self.position(self.store.head().seq)))
    }

    /// The facts about a node, as it is told them.
    pub(crate) fn context(&self, name: &str) -> v1::NodeContext {
        let context = self.nodes.get(name).and_then(|node| node.context());
        convert::context(context, name, self.store.node_addresses())
    }

    fn addresses_of(&self, name: &str) -> Vec<IpAddr> {
        let context = self.nodes.get(name).and_then(|node| node.context());
        context.map_or_else(Vec::new, |context| context.addresses.clone())
    }

    /// The Node object of a name is another one than before, or gone.
    fn node_changed(&mut self, name: &str, before: &[IpAddr], after: &[IpAddr]) {
        let told = self.store.node_addresses().clone();
        self.store.change_node(before, after);
        if let Some(link) = self.nodes.stream_of(name).and_then(|stream| self.links.get(&stream)) {
            link.context();
        }
        self.tell_node_addresses(&told);
    }

    /// What Services name of nodes concerns every node.
    fn tell_node_addresses(&self, told: &Arc<[IpAddr]>) {
        let now = self.store.node_addresses();
        if Arc::ptr_eq(told, now) {
            return;
        }
        info!(addresses = ?&now[..now.len().min(LOGGED_ADDRESSES)], count = now.len(), "addresses of nodes that Services name");
        if now.len() > convert::MAX_NODE_ADDRESSES {
            let most = convert::MAX_NODE_ADDRESSES;
            warn!(most, count = now.len(), "nodes are not told all addresses of nodes that Services name");
        }
        self.links.values().for_each(|link| link.context());
    }

    /// True where this was not logged before, as far as that is remembered.
    pub(crate) fn first_time(&mut self, what: &'static str, who: String) -> bool {
        let who = (what, who);
        if self.logged.contains(&who) {
            return false;
        }
        if self.logged.len() >= LOGGED {
            self.logged.clear();
        }
        self.logged.insert(who)
    }
}

fn goodbye(reason: v1::GoodbyeReason, away: Duration, message: String) -> End {
    End::Goodbye(v1::Goodbye {
        reason: reason.into(),
        reconnect_after: Some(convert::duration(away)),
        message,
    })
}

pub(crate) fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

async fn blocking(
    build: impl FnOnce() -> Result<Built, BuildError> + Send + 'static,
) -> Result<Built, BuildError> {
    tokio::task::spawn_blocking(build).await.unwrap_or(Err(BuildError::Stopped))
}
