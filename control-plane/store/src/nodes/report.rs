//! What nodes say about themselves, as plain values.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lockstep_model::{Digest, Key, Version};

/// How far a node has come with the transactions of one epoch. `None` = nothing of it yet;
/// verified <= applied <= received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Levels {
    /// Decoded and stored.
    pub received: Option<u64>,
    /// Kernel transaction committed.
    pub applied: Option<u64>,
    /// Read back from the kernel and equal.
    pub verified: Option<u64>,
}

/// One of the three [`Levels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Decoded and stored.
    Received,
    /// Kernel transaction committed.
    Applied,
    /// Read back from the kernel and equal.
    Verified,
}

impl Levels {
    /// Progress at one level.
    pub fn at(&self, level: Level) -> Option<u64> {
        match level {
            Level::Received => self.received,
            Level::Applied => self.applied,
            Level::Verified => self.verified,
        }
    }
}

/// Who a node says it is when its stream starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Kubernetes name of the node.
    pub node_name: Arc<str>,
    /// Random per process of the node.
    pub instance_id: String,
    /// When that process started, by its own clock; `None` = not stated.
    pub started: Option<SystemTime>,
    /// Version of the node's program, for people.
    pub agent_version: String,
    /// How it programs its kernel.
    pub backend: BackendFacts,
    /// What its operator decided for it; `None` = not stated.
    pub settings: Option<Box<NodeSettings>>,
    /// Address the stream comes from.
    pub peer: String,
    /// How the session starts.
    pub resume: Resume,
}

/// How a node programs its kernel. The numbers are those of the wire: the store only shows them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BackendFacts {
    /// Number of the kind.
    pub kind: i32,
    /// Flavour and version, for people.
    pub version: String,
    /// Numbers of the families.
    pub families: Vec<i32>,
}

/// What the operator decided for a node. Numbers and texts are those of the wire: the store only
/// shows them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeSettings {
    /// Number of the way in which pods are told from others.
    pub detect_local_mode: i32,
    /// Networks of pods.
    pub cluster_cidrs: Vec<String>,
    /// Interface of pods, or how its name begins.
    pub pod_interface: String,
    /// Number of the choice of addresses that answer on node ports.
    pub node_port_addresses: i32,
    /// Networks of these addresses.
    pub node_port_cidrs: Vec<String>,
    /// Everything that is sent to a cluster IP is masqueraded.
    pub masquerade_all: bool,
    /// The bit of the packet mark that means "masquerade".
    pub masquerade_mark: u32,
    /// Node ports answer at 127.0.0.1, too.
    pub loopback_node_ports: bool,
}

/// How a session starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resume {
    /// The node holds the head.
    InSync,
    /// The node gets what changed since.
    Delta,
    /// The node gets everything.
    Full,
}

/// A state report of a node; the latest one counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Epoch that the seqs belong to.
    pub epoch: u64,
    /// How far the node has come.
    pub levels: Levels,
    /// Digest of the state that is applied; `None` = not stated.
    pub digest: Option<Digest>,
    /// Summary.
    pub outcome: Outcome,
    /// Everything that is not in force, worst first. What is kept of it may be less.
    pub failures: Vec<Failure>,
    /// How many more there are than listed.
    pub failures_truncated: u32,
    /// Why the backend as a whole cannot program; empty = it can.
    pub backend_error: String,
    /// The last programming pass.
    pub pass: Option<Pass>,
    /// Foreign changes found and repaired since the node's program started.
    pub drift_repairs: u64,
}

/// Summary of a [`Report`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// Not stated.
    Unknown,
    /// Stored, not programmed yet.
    Received,
    /// In force.
    Applied,
    /// In force and read back.
    Verified,
    /// In force, minus failures.
    Partial,
    /// Not in force.
    Failed,
}

/// One resource that is not in force on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The resource; `None` = one whose key could not be read, or of an unknown kind.
    pub key: Option<Key>,
    /// Version that is not in force.
    pub version: Option<Version>,
    /// What is in force instead.
    pub in_force: InForce,
    /// Class of the fault.
    pub class: FailureClass,
    /// The fault, for people. Shared: a fault of one Service reads the same on every node.
    pub message: Arc<str>,
    /// True = the node tries again by itself.
    pub retrying: bool,
    /// Times tried.
    pub attempts: u32,
    /// When it began, by the node's clock.
    pub first_seen: Option<SystemTime>,
}

/// What is in force for a resource that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InForce {
    /// Not known.
    Unknown,
    /// Nothing of it.
    Nothing,
    /// The version before.
    Previous,
    /// All but the part the message names.
    Part,
}

/// Class of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureClass {
    /// Not stated.
    Unknown,
    /// The bytes could not be decoded.
    Decode,
    /// A field is out of its range.
    Invalid,
    /// Needs what the node's program or kernel lacks.
    Unsupported,
    /// Address and port are taken.
    Conflict,
    /// The kernel refused.
    Kernel,
    /// Out of memory or room.
    Resources,
}

/// One programming pass of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    /// Commit received -> programming started.
    pub queue: Option<Duration>,
    /// Programming started -> kernel transaction committed.
    pub program: Option<Duration>,
    /// Kernel transaction committed -> read back and compared.
    pub verify: Option<Duration>,
    /// Transactions merged in the pass.
    pub coalesced: u32,
    /// Kernel objects written.
    pub kernel_objects_changed: u32,
    /// True = the whole state was compared.
    pub full_sync: bool,
}
