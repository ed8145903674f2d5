//! What a backend is: the contract between a [`ForwardingPlan`] and whatever puts it in force.
//!
//! A backend is state-driven. It knows what it wrote; the plan says what should be; the
//! difference is what it writes. A failed write loses nothing, because nothing was a delta.

use std::fmt;
use std::time::Duration;

use lockstep_model::{Family, Feature, ServiceKey};

use crate::{ForwardingPlan, NodePortAddresses};

/// Puts plans in force. All calls block; the agent makes them from one thread of its own.
pub trait Backend {
    /// What this backend is and can do on this machine.
    fn describe(&self) -> Description;

    /// True where the kernel has rules that `sync` would adopt, whatever they say. Writes nothing.
    fn standing(&mut self) -> Result<bool, BackendError>;

    /// Compares the whole kernel state with the plan and writes the difference: at start
    /// (which adopts what an earlier process left), after a failure and after drift.
    /// Writes nothing where nothing differs.
    fn sync(&mut self, plan: &ForwardingPlan) -> Result<Applied, BackendError>;

    /// Brings `changed` Services to what the plan says; a key the plan does not have is
    /// removed. The ServiceCIDRs of the plan are taken in with them, where the backend has a use
    /// for any. The caller guarantees that nothing else changed since the last `sync` or
    /// `apply`, the rest of [`NodePlan`](crate::NodePlan) included. Costs what `changed` and the
    /// ServiceCIDRs cost.
    ///
    /// All or nothing per Service: what fails for one Service is undone or left out for
    /// that Service alone and reported in [`Applied::failures`]. `Err` means that nothing
    /// was changed at all.
    fn apply(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey]) -> Result<Applied, BackendError>;

    /// Reads back what the last `sync` or `apply` wrote and compares, independently of the
    /// code that wrote it. An empty list means equal.
    fn verify(&mut self) -> Result<Vec<Drift>, BackendError>;

    /// In the place of `verify`: what the last `sync` or `apply` wrote is to be read back with
    /// what the next one writes, so that one `verify` covers both. False = it is not, and
    /// `verify` must be called now; the right answer where reading back costs little.
    fn read_back_later(&mut self) -> bool {
        false
    }

    /// False while nothing of a family that it programs could be written, though another's could: what
    /// `verify` reads is then not all that should be there, and rules of other modes are still needed.
    fn is_whole(&self) -> bool {
        true
    }

    /// True where something that was not this backend may have changed its kernel objects
    /// since the last call. Cheap: called several times a second. May err towards true.
    fn disturbed(&mut self) -> Result<bool, BackendError>;

    /// Compares a further part of the kernel state with what was written. Repeated calls walk
    /// everything. No new part is begun after `budget`; a part is what the kernel lists in one
    /// go, so a set of 100,000 elements takes as long as it takes, some 50 ms.
    fn audit(&mut self, budget: Duration) -> Result<Audit, BackendError>;

    /// Work that time brings: what is no longer wanted and stayed for its connections goes. Cheap:
    /// called several times a second, between writes.
    fn tend(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Removes everything of ours and nothing else. Returns how many objects that were.
    fn cleanup(&mut self) -> Result<usize, BackendError>;
}

/// What a backend is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Mode name as on the command line: `nftables`, `iptables`, `ipvs`.
    pub mode: &'static str,
    /// Flavour and version, for people: `legacy 1.8.9`.
    pub version: String,
    /// Families it programs.
    pub families: Vec<Family>,
    /// Features it can program, sorted.
    pub features: Vec<Feature>,
    /// Where node ports answer unless the operator says otherwise: where kube-proxy's do in this mode.
    pub node_port_addresses: NodePortAddresses,
    /// It knows one pool per address and port, whoever asks. Then those that externalTrafficPolicy
    /// Local sends to the endpoints of this node have everybody with them, pods and the node too.
    pub one_pool: bool,
    /// It makes addresses of Services the node's own. Then it must know which of them are other
    /// nodes', and leave these alone ([`NodePlan::node_addresses`](crate::NodePlan::node_addresses)).
    pub binds_addresses: bool,
    /// Whether it can let node ports answer at loopback addresses of IPv4; if not, why.
    pub localhost_node_ports: Result<(), String>,
}

/// What a write did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Kernel objects written: elements, rules, chains, sets. 0 = the kernel was equal.
    pub objects_changed: usize,
    /// Services that are not in force as planned, complete, also those from earlier calls
    /// that still are not.
    pub failures: Vec<ServiceFailure>,
}

/// A Service that is not in force as planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceFailure {
    /// The Service.
    pub service: ServiceKey,
    /// Class of the fault.
    pub kind: FailureKind,
    /// The fault, for people: object, cause.
    pub message: String,
    /// True = the version before is still in force, but for addresses and ports that the plan
    /// gives to others; false = nothing of it is.
    pub previous_in_force: bool,
}

/// Class of a [`ServiceFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Needs a feature that the backend lacks.
    Unsupported,
    /// The kernel refused.
    Kernel,
    /// Out of memory, or a set or table is full.
    Resources,
}

/// A difference between the kernel and what was written there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drift {
    /// The kernel object, in the kernel tools' words: `map ip lockstep endpoints`.
    pub object: String,
    /// What is wrong with it: `3 elements missing`.
    pub fault: String,
}

/// One step of an audit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit {
    /// What was found.
    pub drift: Vec<Drift>,
    /// True = this step ended a walk over everything.
    pub completed: bool,
}

/// The backend as a whole cannot do it. Boxed source: every backend has its own errors, and
/// the agent only shows them.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct BackendError {
    /// What was being done: `nftables: commit of 12 operations`.
    pub doing: String,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.fault)
    }
}
