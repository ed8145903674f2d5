//! ForwardingPlan -> nf_tables, with no object per Service.
//!
//! ```text
//!           sync: dump, compare ──┐
//! plan ──>  apply: diff ──────────┴─> Stage ──> one transaction ──> State (what is in force)
//!           verify, audit: dump or get ──> compare with State
//! ```
//!
//! One table per family. Services are elements of shared maps: `frontends` says which chain
//! an address leads to, `endpoints` holds the endpoints by address and index. The chains
//! are shared by all Services with the same number of endpoints (see `names`). So an
//! endpoint that is replaced is one element per address, whatever the number of Services.
//!
//! It knows no traffic policy, no readiness and no topology; the plan has decided all that.
//! A fresh process recognises our tables by name, and adopts the indices and serial numbers
//! that it finds.
//!
//! Session affinity is kept by the packets themselves. A map of clients, which is the one
//! thing here that we do not write, has the serial number of the endpoint that a client was
//! given at an address; an endpoint that leaves takes its number away, and with it its
//! clients (see `layout`).
#![forbid(unsafe_code)]

mod adopt;
mod change;
mod contents;
mod elements;
mod fingerprint;
mod keep;
mod layout;
mod names;
mod node;
mod observe;
mod probe;
mod program;
mod rules;
mod sets;
mod skeleton;
mod stage;
mod state;
mod text;
mod userdata;
mod verify;

use std::collections::BTreeMap;
use std::hash::RandomState;
use std::time::Duration;

use lockstep_kernel::netlink;
use lockstep_kernel::nf_tables::{self, Batch, Kernel, Netfilter};
use lockstep_model::{Family, ServiceKey};
use lockstep_view::backend::{Applied, Audit, BackendError, Description, Drift, FailureKind, ServiceFailure};
use lockstep_view::{Backend, ForwardingPlan, NodePortAddresses};

use crate::names::{PROBE_TABLE, TABLE};
use crate::rules::kernel_family;
use crate::stage::Stage;
use crate::state::State;

/// The nftables backend, on the kernel or on a fake of it.
#[derive(Debug)]
pub struct Nftables<N = Kernel> {
    netfilter: N,
    state: State,
    stage: Stage,
    batch: Batch,
    /// Services that are not in force as planned.
    failures: BTreeMap<ServiceKey, ServiceFailure>,
    /// Number of the last transaction, as far as only ours happened; `None` = not known.
    generation: Option<u32>,
    /// Chains could not be deleted yet.
    reap_again: bool,
    /// Refusals for what is there already are a Service's own fault.
    blame: bool,
    /// Where the audit goes on.
    audited: usize,
    /// What fingerprints are made with.
    secret: RandomState,
}

/// Why the backend could not be opened or a table not be programmed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed, or a dump did.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// A transaction was refused.
    #[error(transparent)]
    Commit(#[from] nf_tables::CommitError),
    /// The kernel lacks something.
    #[error("this kernel refuses {what} (nftables mode needs Linux 5.13 with nf_tables, nf_nat and nft_fib)")]
    Lacks {
        /// What it refuses.
        what: String,
        /// How.
        #[source]
        source: nf_tables::CommitError,
    },
    /// Other changes to our tables came between again and again.
    #[error("the tables changed {times} times while they were compared")]
    Unstable {
        /// How often it was tried.
        times: u32,
    },
}

impl Nftables<Kernel> {
    /// The backend of the network namespace of this thread. Writes nothing.
    pub fn open() -> Result<Self, Error> {
        Ok(Self::new(Kernel::open()?))
    }
}

impl<N: Netfilter> Nftables<N> {
    /// The backend on some nf_tables. Writes nothing.
    pub fn new(netfilter: N) -> Self {
        Self {
            netfilter,
            state: State::default(),
            stage: Stage::new(),
            batch: Batch::new(),
            failures: BTreeMap::new(),
            generation: None,
            reap_again: false,
            blame: false,
            audited: 0,
            secret: RandomState::new(),
        }
    }

    /// Tries everything the backend writes in a real transaction, in a table that is made
    /// and deleted in it, so that nothing is left behind.
    pub fn probe(&mut self) -> Result<(), Error> {
        probe::probe(&mut self.netfilter, PROBE_TABLE)
    }

    /// The tables as they are in force, in nft's syntax, sorted: for reviews and debugging.
    pub fn render(&self) -> String {
        text::render(&self.state)
    }

    /// The kernel below, for tests that disturb it.
    pub fn netfilter_mut(&mut self) -> &mut N {
        &mut self.netfilter
    }

    fn outcome(&mut self, doing: &str, result: Result<usize, Error>) -> Result<Applied, BackendError> {
        match result {
            Ok(objects_changed) => {
                Ok(Applied { objects_changed, failures: self.failures.values().cloned().collect() })
            }
            Err(error) => {
                // Nothing was written, so there is nothing to read back.
                self.stage.begin(false);
                Err(backend_error(doing, error))
            }
        }
    }

    fn fail(&mut self, service: &ServiceKey, kind: FailureKind, message: String) {
        let previous_in_force = self.state.services.contains_key(service);
        let failure = ServiceFailure { service: service.clone(), kind, message, previous_in_force };
        self.failures.insert(service.clone(), failure);
    }
}

fn backend_error(doing: &str, source: impl Into<Error>) -> BackendError {
    BackendError { doing: format!("nftables: {doing}"), source: Box::new(source.into()) }
}

impl<N: Netfilter> Backend for Nftables<N> {
    fn describe(&self) -> Description {
        Description {
            mode: "nftables",
            version: format!("netlink, Linux {}", lockstep_kernel::release()),
            families: Family::ALL.to_vec(),
            features: contents::FEATURES.to_vec(),
            node_port_addresses: NodePortAddresses::Primary,
            one_pool: false,
            binds_addresses: false,
            localhost_node_ports: Err("nftables mode has none, as kube-proxy's has none".to_owned()),
        }
    }

    fn standing(&mut self) -> Result<bool, BackendError> {
        let mut found = false;
        for family in Family::ALL {
            found |= nf_tables::table_exists(&mut self.netfilter, kernel_family(family), TABLE)
                .map_err(|error| backend_error("look for our tables", error))?;
        }
        Ok(found)
    }

    fn sync(&mut self, plan: &ForwardingPlan) -> Result<Applied, BackendError> {
        let result = self.sync_all(plan);
        self.outcome("sync", result)
    }

    fn apply(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey]) -> Result<Applied, BackendError> {
        let result = self.apply_changed(plan, changed);
        self.outcome("apply", result)
    }

    fn verify(&mut self) -> Result<Vec<Drift>, BackendError> {
        self.read_back().map_err(|error| backend_error("read back", error))
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        self.was_disturbed().map_err(|error| backend_error("listen for changes", error))
    }

    fn audit(&mut self, budget: Duration) -> Result<Audit, BackendError> {
        self.audit_part(budget).map_err(|error| backend_error("audit", error))
    }

    fn cleanup(&mut self) -> Result<usize, BackendError> {
        let mut objects = 0;
        self.batch.clear();
        for family in Family::ALL {
            let found = observe::count(&mut self.netfilter, family)
                .map_err(|error| backend_error("list our tables", error))?;
            if let Some(found) = found {
                objects += found;
                self.batch.delete_table(kernel_family(family), TABLE);
            }
        }
        self.netfilter
            .commit(self.batch.finish())
            .map_err(|error| backend_error("delete our tables", error))?;
        (self.state, self.generation) = (State::default(), None);
        self.failures.clear();
        Ok(objects)
    }
}
