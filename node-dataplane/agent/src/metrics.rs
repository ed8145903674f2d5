//! Metrics: kube-proxy's names where the meaning is the same, `lockstep_*` for the rest.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lockstep_client::session::Committed;
use lockstep_model::{Family as IpFamily, Kind};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::status::Snapshot;

/// Every metric of the agent. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Metrics {
    families: Vec<FamilyLabel>,
    /// `kubeproxy_sync_proxy_rules_duration_seconds`.
    sync: Family<FamilyLabel, Histogram>,
    sync_full: Family<FamilyLabel, Histogram>,
    sync_partial: Family<FamilyLabel, Histogram>,
    network_programming: Family<FamilyLabel, Histogram>,
    last_sync: Family<FamilyLabel, Gauge<f64, std::sync::atomic::AtomicU64>>,
    last_queued: Family<FamilyLabel, Gauge<f64, std::sync::atomic::AtomicU64>>,
    service_changes: Counter,
    service_changes_pending: Gauge,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    phases: Family<PhaseLabel, Histogram>,
    /// Passes the backend refused.
    pub backend_errors: Counter,
    /// Foreign changes found and repaired.
    pub drift_repairs: Counter,
    /// Kernel objects written.
    pub objects_changed: Counter,
    /// Kernel objects that other modes had left and that were removed.
    pub other_modes_removed: Counter,
    /// Transactions taken in.
    pub transactions: Counter,
    /// Connections that ended.
    pub disconnects: Counter,
    applied_seq: Gauge,
    verified_seq: Gauge,
    connected: Gauge,
    stale: Gauge,
    stale_seconds: Gauge<f64, std::sync::atomic::AtomicU64>,
    failures: Gauge,
    resources: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabel {
    ip_family: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

/// How many changes, as kube-proxy counts them: objects, whichever way they changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Of Services.
    pub services: u64,
    /// Of EndpointSlices.
    pub endpoints: u64,
}

impl Changes {
    /// Those of a transaction.
    pub fn of(committed: &Committed) -> Self {
        let services = committed.changes.iter().filter(|change| change.key().kind() == Kind::Service).count();
        let endpoints = committed.changes.len() - services;
        Self { services: services as u64, endpoints: endpoints as u64 }
    }
}

impl std::ops::AddAssign for Changes {
    fn add_assign(&mut self, more: Self) {
        self.services += more.services;
        self.endpoints += more.endpoints;
    }
}

/// Part of a programming pass.
#[derive(Debug, Clone, Copy)]
pub enum Phase {
    /// Waiting, from the commit to the start of the pass.
    Queue,
    /// Deciding: state to plan.
    View,
    /// Programming: plan to kernel.
    Apply,
    /// Reading back.
    Verify,
}

/// kube-proxy's buckets: 1 ms to 16 s. Ours start lower, because a change takes microseconds.
fn sync_histogram() -> Histogram {
    Histogram::new((0..22).map(|power| 0.000_008 * f64::from(1 << power)))
}

/// kube-proxy's buckets for the time from a change to its programming.
fn network_histogram() -> Histogram {
    let quarters = [0.25, 0.5];
    let seconds = (1..60).map(f64::from);
    let minutes = (60..120).step_by(5).map(f64::from);
    let rest = (120..=300).step_by(30).map(f64::from);
    Histogram::new(quarters.into_iter().chain(seconds).chain(minutes).chain(rest))
}

impl Metrics {
    /// Metrics for an agent that programs `families`, and the registry they are in.
    pub fn new(families: &[IpFamily]) -> (Self, Registry) {
        let label = |family: &IpFamily| FamilyLabel {
            ip_family: match family {
                IpFamily::V4 => "IPv4",
                IpFamily::V6 => "IPv6",
            },
        };
        let metrics = Self {
            families: families.iter().map(label).collect(),
            sync: Family::new_with_constructor(sync_histogram),
            sync_full: Family::new_with_constructor(sync_histogram),
            sync_partial: Family::new_with_constructor(sync_histogram),
            network_programming: Family::new_with_constructor(network_histogram),
            last_sync: Family::default(),
            last_queued: Family::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            phases: Family::new_with_constructor(sync_histogram),
            backend_errors: Counter::default(),
            drift_repairs: Counter::default(),
            objects_changed: Counter::default(),
            other_modes_removed: Counter::default(),
            transactions: Counter::default(),
            disconnects: Counter::default(),
            applied_seq: Gauge::default(),
            verified_seq: Gauge::default(),
            connected: Gauge::default(),
            stale: Gauge::default(),
            stale_seconds: Gauge::default(),
            failures: Gauge::default(),
            resources: Gauge::default(),
        };
        let mut registry = Registry::default();
        metrics.register_kube_proxy(&mut registry);
        metrics.register_own(&mut registry);
        (metrics, registry)
    }

    fn register_kube_proxy(&self, registry: &mut Registry) {
        let kube = registry.sub_registry_with_prefix("kubeproxy");
        let sync = "Time a programming pass took";
        kube.register_with_unit("sync_proxy_rules_duration", sync, Unit::Seconds, self.sync.clone());
        let full = "Time a pass over the whole state took";
        kube.register_with_unit(
            "sync_full_proxy_rules_duration",
            full,
            Unit::Seconds,
            self.sync_full.clone(),
        );
        let partial = "Time a pass over what changed took";
        kube.register_with_unit(
            "sync_partial_proxy_rules_duration",
            partial,
            Unit::Seconds,
            self.sync_partial.clone(),
        );
        let network = "Time from the change of an endpoint to its programming";
        kube.register_with_unit(
            "network_programming_duration",
            network,
            Unit::Seconds,
            self.network_programming.clone(),
        );
        let last = "When rules were last in sync";
        kube.register_with_unit(
            "sync_proxy_rules_last_timestamp",
            last,
            Unit::Seconds,
            self.last_sync.clone(),
        );
        let queued = "When a change last arrived";
        kube.register_with_unit(
            "sync_proxy_rules_last_queued_timestamp",
            queued,
            Unit::Seconds,
            self.last_queued.clone(),
        );
        let text = "Changes of Services";
        kube.register("sync_proxy_rules_service_changes", text, self.service_changes.clone());
        let text = "Changes of Services that are not programmed yet";
        kube.register("sync_proxy_rules_service_changes_pending", text, self.service_changes_pending.clone());
        let text = "Changes of EndpointSlices";
        kube.register("sync_proxy_rules_endpoint_changes", text, self.endpoint_changes.clone());
        let text = "Changes of EndpointSlices that are not programmed yet";
        kube.register(
            "sync_proxy_rules_endpoint_changes_pending",
            text,
            self.endpoint_changes_pending.clone(),
        );
    }

    fn register_own(&self, registry: &mut Registry) {
        let own = registry.sub_registry_with_prefix("lockstep");
        own.register_with_unit("pass", "Time of each phase of a pass", Unit::Seconds, self.phases.clone());
        own.register("backend_errors", "Passes the backend refused as a whole", self.backend_errors.clone());
        own.register("drift_repairs", "Foreign changes found and repaired", self.drift_repairs.clone());
        own.register("kernel_objects_changed", "Kernel objects written", self.objects_changed.clone());
        let others = "Kernel objects of other modes that were removed";
        own.register("other_modes_removed", others, self.other_modes_removed.clone());
        own.register("transactions", "Transactions taken in", self.transactions.clone());
        own.register("disconnects", "Connections to a control plane that ended", self.disconnects.clone());
        own.register("applied_seq", "Transaction in force", self.applied_seq.clone());
        own.register("verified_seq", "Transaction in force and read back", self.verified_seq.clone());
        own.register("connected", "1 = a control plane is connected", self.connected.clone());
        own.register("stale", "1 = no control plane has confirmed the state yet", self.stale.clone());
        let stale = "Time since a control plane last confirmed the state";
        own.register_with_unit("stale", stale, Unit::Seconds, self.stale_seconds.clone());
        own.register("failures", "Resources that are not in force", self.failures.clone());
        own.register("resources", "Services and endpoint sets held", self.resources.clone());
    }

    /// One phase of a pass.
    pub fn phase(&self, phase: Phase, took: Duration) {
        let phase = match phase {
            Phase::Queue => "queue",
            Phase::View => "view",
            Phase::Apply => "apply",
            Phase::Verify => "verify",
        };
        self.phases.get_or_create(&PhaseLabel { phase }).observe(took.as_secs_f64());
    }

    /// A change arrived.
    pub fn queued(&self, at: SystemTime) {
        for family in &self.families {
            self.last_queued.get_or_create(family).set(seconds(at));
        }
    }

    /// Changes that arrived, and all that are not programmed yet.
    pub fn changes(&self, new: Changes, pending: Changes) {
        self.service_changes.inc_by(new.services);
        self.endpoint_changes.inc_by(new.endpoints);
        self.service_changes_pending.set(i64::try_from(pending.services).unwrap_or(i64::MAX));
        self.endpoint_changes_pending.set(i64::try_from(pending.endpoints).unwrap_or(i64::MAX));
    }

    /// A pass is done and in force. `trigger` is what it goes back to.
    pub fn programmed(&self, took: Duration, full: bool, trigger: Option<SystemTime>, at: SystemTime) {
        for family in &self.families {
            let kind = if full { &self.sync_full } else { &self.sync_partial };
            self.sync.get_or_create(family).observe(took.as_secs_f64());
            kind.get_or_create(family).observe(took.as_secs_f64());
            self.last_sync.get_or_create(family).set(seconds(at));
            if let Some(latency) = trigger.and_then(|trigger| at.duration_since(trigger).ok()) {
                self.network_programming.get_or_create(family).observe(latency.as_secs_f64());
            }
        }
    }

    /// Brings what mirrors the status up to date; before each scrape.
    pub fn mirror(&self, status: &Snapshot, now: SystemTime) {
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.applied_seq.set(gauge(status.applied_seq));
        self.verified_seq.set(gauge(status.verified_seq));
        self.connected.set(i64::from(status.connected));
        self.stale.set(i64::from(status.stale));
        self.stale_seconds.set(status.stale_for(now).as_secs_f64());
        self.failures.set(gauge(status.failures as u64));
        self.resources.set(gauge(status.resources));
    }
}

fn seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
