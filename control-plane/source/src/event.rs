//! What a source tells the rest of the control plane.

use std::time::SystemTime;

use lockstep_model::{InvalidField, Key, NodeContext, Resource};

/// One message of a source, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// These changed, together.
    Changes(Changes),
    /// What was sent so far is the whole state of the source: it may be served. Sent once,
    /// before or after further changes.
    Synced,
    /// The state is not complete yet, for this reason. Never after [`Event::Synced`].
    NotSynced(String),
    /// The source was heard of just now, whether or not anything changed.
    Alive,
}

/// Changes that belong together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// New and changed objects. May repeat what was sent before.
    pub upserts: Vec<Resource>,
    /// Objects that are gone.
    pub removals: Vec<Key>,
    /// Changed Nodes.
    pub nodes: Vec<NodeChange>,
    /// Objects that went into or came out of quarantine.
    pub quarantine: Vec<QuarantineChange>,
    /// Oldest cause, by the clock of whoever caused it.
    pub trigger: Option<SystemTime>,
    /// How far the watches have come: (resource, resourceVersion).
    pub revisions: Vec<(String, String)>,
}

/// A changed Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeChange {
    /// New or changed.
    Upsert(NodeContext),
    /// The Node of this name is gone.
    Remove(String),
}

/// What names an object in quarantine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Kubernetes kind, or `File`.
    pub kind: String,
    /// `namespace/name`, the name of what has no namespace, or a file's path under the source
    /// directory.
    pub name: String,
}

/// A change of the quarantine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QuarantineChange {
    /// The object could not be taken in.
    Add {
        /// Which.
        object: ObjectName,
        /// Why; an empty field path means the object as a whole.
        fault: InvalidField,
        /// True = its last good content is still served; false = nothing of it is.
        previous_in_force: bool,
    },
    /// The object is good again, or gone.
    Remove(ObjectName),
}
