//! Metrics of cutting: kube-proxy's names, and failures.

use std::time::Duration;

use lockstep_kernel::netlink;
use lockstep_model::Family as IpFamily;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Every metric of cutting. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Metrics {
    deleted: Family<Label, Counter>,
    duration: Family<Label, Histogram>,
    failures: Family<Label, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    ip_family: &'static str,
}

impl Metrics {
    /// Metrics in a registry.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            deleted: Family::default(),
            // 0.1 ms to 13 s.
            duration: Family::new_with_constructor(|| {
                Histogram::new((0..18).map(|power| 0.000_1 * f64::from(1 << power)))
            }),
            failures: Family::default(),
        };
        let kube = registry.sub_registry_with_prefix("kubeproxy");
        let text = "UDP flows cut because they may not go on";
        kube.register("conntrack_reconciler_deleted_entries", text, metrics.deleted.clone());
        let text = "Time to list the flows of a family and cut those";
        kube.register_with_unit(
            "conntrack_reconciler_sync_duration",
            text,
            Unit::Seconds,
            metrics.duration.clone(),
        );
        let own = registry.sub_registry_with_prefix("lockstep");
        let text = "Times that stale UDP flows could not be listed or cut";
        own.register("conntrack_failures", text, metrics.failures.clone());
        metrics
    }

    pub(super) fn swept(&self, family: IpFamily, took: Duration, result: &Result<usize, netlink::Error>) {
        let ip_family = match family {
            IpFamily::V4 => "IPv4",
            IpFamily::V6 => "IPv6",
        };
        let label = Label { ip_family };
        match result {
            Ok(cut) => {
                self.deleted.get_or_create(&label).inc_by(*cut as u64);
                self.duration.get_or_create(&label).observe(took.as_secs_f64());
            }
            Err(_) => {
                self.failures.get_or_create(&label).inc();
            }
        }
    }
}
