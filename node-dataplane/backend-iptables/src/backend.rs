//! The [`Backend`]: both families side by side.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_kernel::exec::Run;
use lockstep_kernel::sysctl::Tree;
use lockstep_model::{Family, Feature, ServiceKey};
use lockstep_view::backend::{
    Applied, Audit, Backend, BackendError, Description, Drift, FailureKind, ServiceFailure,
};
use lockstep_view::{Action, ForwardingPlan, NodePortAddresses, ServicePlan, Surface};
use lockstep_xtables::{Flavour, Snapshot, Table, Tool, ToolError, Watch, remove_from};

use crate::check;
use crate::choose;
use crate::family::FamilyState;
use crate::fixed;
use crate::localnet::RouteLocalnet;
use crate::names::{self, ChainName, Shared};
use crate::read_back::read_back;

/// kube-proxy's chains, written through `iptables-restore`.
pub struct Iptables {
    flavour: Flavour,
    version: String,
    families: Vec<FamilyState>,
    watch: Watch,
    localnet: RouteLocalnet,
    /// Families of this walk that are not audited yet.
    unaudited: Vec<Family>,
    /// Time that audits may still take.
    credit: Duration,
    /// What the last audit of a family took.
    cost: Duration,
}

const LIBERAL: &str = "net/netfilter/nf_conntrack_tcp_be_liberal";

impl Iptables {
    /// Opens a flavour. IPv6 is left out where its tool does not work, and that is logged.
    pub fn open(run: Arc<dyn Run>, flavour: Flavour) -> Result<Self, ToolError> {
        Self::open_on(run, flavour, Tree::kernel())
    }

    pub(crate) fn open_on(run: Arc<dyn Run>, flavour: Flavour, sysctls: Tree) -> Result<Self, ToolError> {
        let liberal = matches!(sysctls.read(LIBERAL), Ok(Some(value)) if value != "0");
        let mut families = Vec::new();
        let mut version = String::new();
        for family in Family::ALL {
            let tool = Tool::new(Arc::clone(&run), flavour, family);
            match (choose::abilities(&tool), family) {
                (Ok(abilities), _) => {
                    if version.is_empty() {
                        version = tool.version()?;
                    }
                    let features = [
                        (Feature::Sctp, abilities.sctp),
                        (Feature::SessionAffinity, abilities.recent),
                        (Feature::LbProxyMode, true),
                        (Feature::SourceRanges, true),
                    ];
                    let features = features.into_iter().filter_map(|(feature, can)| can.then_some(feature));
                    families.push(FamilyState::new(tool, abilities, features.collect(), liberal));
                }
                // A lock that is held says nothing about what works.
                (Err(error), family) if family == Family::V4 || matches!(error, ToolError::Locked { .. }) => {
                    return Err(error);
                }
                (Err(error), _) => tracing::warn!(%error, "IPv4 only: ip6tables does not work"),
            }
        }
        let watch = Watch::new(flavour, &names::TABLES, concerns_us);
        let localnet = RouteLocalnet::new(sysctls);
        let (unaudited, credit, cost) = (Vec::new(), Duration::ZERO, Duration::ZERO);
        Ok(Self { flavour, version, families, watch, localnet, unaudited, credit, cost })
    }

    /// The flavour in use.
    pub fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Lets every family write, at the same time, unless one would wait for the lock of the other, which
    /// the tools of a flavour share; results in the families' order.
    fn write<T: Send>(&mut self, work: impl Fn(&mut FamilyState) -> T + Sync) -> Vec<(Family, T)> {
        match self.flavour {
            Flavour::Legacy => {
                self.families.iter_mut().map(|state| (state.tool.family, work(state))).collect()
            }
            Flavour::Nft => self.each(work),
        }
    }

    /// Lets every family work at the same time; results in the families' order.
    fn each<T: Send>(&mut self, work: impl Fn(&mut FamilyState) -> T + Sync) -> Vec<(Family, T)> {
        let work = &work;
        std::thread::scope(|scope| {
            let running: Vec<_> = self
                .families
                .iter_mut()
                .map(|state| (state.tool.family, scope.spawn(move || work(state))))
                .collect();
            running
                .into_iter()
                .map(|(family, thread)| match thread.join() {
                    Ok(result) => (family, result),
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        })
    }

    /// One answer of the families' answers: an error only where none could do what it had to.
    fn applied(
        &mut self,
        doing: &str,
        plan: &ForwardingPlan,
        results: Vec<(Family, Result<usize, ToolError>)>,
    ) -> Result<Applied, BackendError> {
        let mut failures: BTreeMap<ServiceKey, ServiceFailure> = BTreeMap::new();
        for state in &self.families {
            for (key, left) in &state.left_out {
                failures.entry(key.clone()).or_insert_with(|| ServiceFailure {
                    service: key.clone(),
                    kind: left.kind,
                    message: left.message.clone(),
                    previous_in_force: left.previous_in_force,
                });
            }
        }
        let objects_changed = results.iter().filter_map(|(_, result)| result.as_ref().ok()).sum();
        let none = results.iter().all(|(_, result)| result.is_err());
        for (family, result) in results {
            let Err(error) = result else { continue };
            let doing = format!("iptables {} {family:?}: {doing}", self.flavour);
            if none {
                return Err(BackendError { doing, source: Box::new(error) });
            }
            // The other family is as it should be.
            let Some(state) = self.families.iter().find(|state| state.tool.family == family) else {
                continue;
            };
            for key in state.behind(plan) {
                failures.entry(key.clone()).or_insert_with(|| ServiceFailure {
                    service: key.clone(),
                    kind: FailureKind::Kernel,
                    message: format!("{doing}: {error}"),
                    previous_in_force: state.in_force.contains_key(key),
                });
            }
        }
        let mut objects_changed = objects_changed;
        if self.has_localhost() {
            let fault = self.localnet.fault();
            // One more that is not as it should be. `verify` writes it, which knows that the guard
            // is in force: what was written a while ago says nothing about now.
            objects_changed += usize::from(fault.is_none() && self.localnet.is_off());
            if let Some(fault) = fault {
                let concerned = plan.services.iter().filter(|(_, service)| forwards_node_ports(service));
                for (key, _) in concerned {
                    failures.entry(key.clone()).or_insert_with(|| ServiceFailure {
                        service: key.clone(),
                        kind: FailureKind::Kernel,
                        message: fault.clone(),
                        previous_in_force: true,
                    });
                }
            }
        }
        Ok(Applied { objects_changed, failures: failures.into_values().collect() })
    }

    /// True where node ports are to answer at loopback addresses, by rules that were written.
    fn has_localhost(&self) -> bool {
        self.families.iter().any(|state| state.terms.as_ref().is_some_and(|terms| terms.localhost))
    }

    fn failed(&self, family: Family, doing: &str, error: ToolError) -> BackendError {
        let doing = format!("iptables {} {family:?}: {doing}", self.flavour);
        BackendError { doing, source: Box::new(error) }
    }
}

/// True for the chains that we write to: also kubelet's, whose guard is ours too, and the built-in ones
/// that lead to ours.
fn concerns_us(_: Table, chain: &str) -> bool {
    chain.starts_with("KUBE-") || fixed::jumps().iter().any(|jumps| jumps.chain == chain)
}

/// True where a node port of the Service leads somewhere in IPv4.
fn forwards_node_ports(service: &ServicePlan) -> bool {
    let ports = service.ports.iter().filter(|port| port.family == Family::V4);
    let mut node_ports = ports.flat_map(|port| &port.frontends).filter(|at| at.surface == Surface::NodePort);
    node_ports.any(|at| matches!(at.from_node, Action::Forward { .. }))
}

impl Backend for Iptables {
    fn describe(&self) -> Description {
        let can = |feature: &Feature| self.families.iter().all(|state| state.features.contains(feature));
        let features = [Feature::Sctp, Feature::SessionAffinity, Feature::LbProxyMode, Feature::SourceRanges];
        Description {
            mode: "iptables",
            version: format!("{} {}", self.flavour, self.version),
            families: self.families.iter().map(|state| state.tool.family).collect(),
            features: features.into_iter().filter(can).collect(),
            node_port_addresses: NodePortAddresses::AllLocal,
            one_pool: false,
            binds_addresses: false,
            localhost_node_ports: match self.families.iter().any(|state| state.abilities.guard) {
                true => self.localnet.is_possible(),
                false => Err("the rule that guards the loopback is refused".to_owned()),
            },
        }
    }

    fn standing(&mut self) -> Result<bool, BackendError> {
        let mut found = false;
        for (family, saved) in self.each(|state| state.tool.save()) {
            let saved = saved.map_err(|error| self.failed(family, "look for our chains", error))?;
            found |= Snapshot::parse(&saved).chains(Table::Nat).contains_key(Shared::Services.chain());
        }
        Ok(found)
    }

    fn sync(&mut self, plan: &ForwardingPlan) -> Result<Applied, BackendError> {
        let results = self.write(|state| state.sync(plan));
        // Where nothing was written, nobody reads back: what others do meanwhile is still to be seen.
        if results.iter().any(|(_, result)| !matches!(result, Ok(0))) {
            self.watch.settle();
        }
        self.applied("sync", plan, results)
    }

    fn apply(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey]) -> Result<Applied, BackendError> {
        let foreign = self.watch.look();
        let results = self.write(|state| state.apply(plan, changed));
        let commits = self.families.iter().map(|state| state.commits).sum();
        if self.watch.settle_beside(commits) || foreign {
            self.watch.suspect();
        }
        self.applied("apply", plan, results)
    }

    fn verify(&mut self) -> Result<Vec<Drift>, BackendError> {
        let gone: Vec<Family> = self
            .families
            .iter()
            .filter(|state| {
                let chains = state.touched.iter().flat_map(|touched| &touched.gone);
                self.watch.lacks(state.tool.family, Table::Nat, chains.map(ChainName::as_str))
            })
            .map(|state| state.tool.family)
            .collect();
        let results = self.each(|state| read_back(state, gone.contains(&state.tool.family)));
        let (mut drift, mut guarded) = (Vec::new(), false);
        for (family, result) in results {
            let found = result.map_err(|error| self.failed(family, "read back", error))?;
            guarded |= family == Family::V4 && found.is_empty();
            drift.extend(found);
        }
        if self.has_localhost() && guarded {
            drift.extend(self.localnet.turn_on());
        }
        if drift.iter().any(check::is_of_guard) {
            // The loopback may be open: not to wait until it is time to try again.
            self.watch.suspect();
        }
        self.families.iter_mut().for_each(|state| state.unread = false);
        Ok(drift)
    }

    fn read_back_later(&mut self) -> bool {
        self.families.iter_mut().for_each(|state| state.unread = true);
        true
    }

    fn is_whole(&self) -> bool {
        self.families.iter().all(|state| state.terms.is_some())
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        Ok(self.watch.look())
    }

    fn audit(&mut self, budget: Duration) -> Result<Audit, BackendError> {
        // One family is read at once, whatever it costs; then the calls that follow pay for it.
        self.credit += budget;
        if self.credit < self.cost {
            return Ok(Audit::default());
        }
        if self.unaudited.is_empty() {
            self.unaudited = self.families.iter().map(|state| state.tool.family).rev().collect();
        }
        let Some(family) = self.unaudited.pop() else { return Ok(Audit::default()) };
        let started = Instant::now();
        let mut drift = Vec::new();
        if let Some(state) = self.families.iter().find(|state| state.tool.family == family) {
            let saved = state.tool.save().map_err(|error| self.failed(family, "audit", error))?;
            drift = check::compare(state, &Snapshot::parse(&saved), None, &Shared::ALL);
            if state.terms.as_ref().is_some_and(|terms| terms.localhost) {
                drift.extend(self.localnet.drift());
            }
        }
        self.credit = Duration::ZERO;
        self.cost = started.elapsed();
        Ok(Audit { drift, completed: self.unaudited.is_empty() })
    }

    fn cleanup(&mut self) -> Result<usize, BackendError> {
        let mut objects = 0;
        for (family, result) in self.each(|state| {
            state.terms = None;
            state.in_force.clear();
            remove_from(&state.tool, &names::is_ours)
        }) {
            objects += result.map_err(|error| self.failed(family, "cleanup", error))?;
        }
        self.watch.settle();
        Ok(objects)
    }
}
