//! Connection tracking: UDP flows that may not go on are cut after the pass that made them
//! stale, and the settings that kube-proxy makes at start.
//!
//! ```text
//! reconcile thread ──committed: plans of the Services──> waiting ──> thread `conntrack`:
//!                  <──complaints─────────────────────────────────── list, judge, cut
//! ```
//!
//! What waits is one plan per Service, so any number of passes costs one listing per family.
//! Listings never overlap, and the thread rests after each for several times as long as it took.

mod metrics;
pub mod settings;
mod sweep;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lockstep_kernel::netlink;
use lockstep_model::ServiceKey;
use lockstep_view::{ForwardingPlan, NodePlan, ServicePlan, stale};

pub use metrics::Metrics;
pub use sweep::kernel;

use crate::follow_up::{Complaint, ComplaintKind, FollowUp};

/// After a listing, rest for so many times as long as it took, but not for longer than this:
/// at most a fifth of one processor is spent however fast endpoints change.
const REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_secs(10);
/// After a failure: first, and at most.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Services whose flows are to be looked at, by the plan that is in force.
#[derive(Debug)]
pub struct Work {
    node: NodePlan,
    services: Vec<Arc<ServicePlan>>,
}

/// Looks at the flows of the Services and cuts what is stale.
pub type Sweep = Box<dyn FnMut(&Work) -> Result<(), netlink::Error> + Send>;

/// Cuts stale UDP flows, on a thread of its own that ends after this.
#[derive(Debug)]
pub struct Cutter(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    node: Option<NodePlan>,
    /// `None` = the Service is gone, or has nothing to cut: what an earlier plan said is void.
    services: BTreeMap<ServiceKey, Option<Arc<ServicePlan>>>,
    /// Another complete list of complaints than the one that was taken last.
    complaints: Option<Vec<Complaint>>,
    complaining: bool,
    /// A sweep is on its way; where it fails, its Services wait again.
    sweeping: bool,
    /// The whole plan has come since it began: it says what waits.
    replaced: bool,
    ending: bool,
}

impl Cutter {
    /// Starts the thread. The network namespace is that of the caller.
    pub fn start(sweep: Sweep) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let inside = shared.clone();
        std::thread::Builder::new().name("conntrack".to_owned()).spawn(move || inside.run(sweep))?;
        Ok(Self(shared))
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        // Not waited for: a listing may take its time, and cutting half of it harms nobody.
        self.0.lock().ending = true;
        self.0.woken.notify_one();
    }
}

impl FollowUp for Cutter {
    fn committed(
        &mut self,
        plan: &ForwardingPlan,
        changed: Option<&[ServiceKey]>,
        failed: &dyn Fn(&ServiceKey) -> bool,
    ) {
        let mut waiting = self.0.lock();
        let waits = match changed {
            None => {
                let all =
                    plan.services.iter().filter(|(key, service)| stale::concerns(service) && !failed(key));
                waiting.services = all.map(|(key, service)| (key.clone(), Some(service.clone()))).collect();
                waiting.replaced = true;
                !waiting.services.is_empty()
            }
            Some(changed) => {
                let mut waits = false;
                for key in changed.iter().filter(|key| !failed(key)) {
                    let service = plan.services.get(key).filter(|service| stale::concerns(service));
                    if service.is_some() || waiting.sweeping || !waiting.services.is_empty() {
                        waits |= service.is_some();
                        waiting.services.insert(key.clone(), service.cloned());
                    }
                }
                if waits {
                    let others = stale::entangled(plan, changed).filter(|it| !failed(&it.key));
                    waiting.services.extend(others.map(|it| (it.key.clone(), Some(it.clone()))));
                }
                waits
            }
        };
        if waits {
            waiting.node = Some(plan.node.clone());
            self.0.woken.notify_one();
        }
    }

    fn complaints(&mut self) -> Option<Vec<Complaint>> {
        self.0.lock().complaints.take()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while it is held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut sweep: Sweep) {
        let mut failures = 0_u32;
        while let Some(work) = self.next() {
            let started = Instant::now();
            let result = sweep(&work);
            let pause = match result {
                Ok(()) => {
                    if failures > 0 {
                        tracing::info!("stale UDP flows can be cut again");
                    }
                    failures = 0;
                    self.done();
                    started.elapsed().saturating_mul(REST).min(LONGEST_REST)
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::error!(%error, services = work.services.len(), "stale UDP flows cannot be cut; the rules are in force");
                    }
                    failures = failures.saturating_add(1);
                    self.failed(work, &error);
                    FIRST_RETRY.saturating_mul(2_u32.saturating_pow(failures - 1)).min(LAST_RETRY)
                }
            };
            // Ends early only with the agent: this is what bounds the work.
            drop(self.woken.wait_timeout_while(self.lock(), pause, |waiting| !waiting.ending));
        }
    }

    /// What waits, as soon as anything does. `None` = the agent ends.
    fn next(&self) -> Option<Work> {
        let mut waiting = self.lock();
        loop {
            if waiting.ending {
                return None;
            }
            let services: Vec<_> = std::mem::take(&mut waiting.services).into_values().flatten().collect();
            if let Some(node) = waiting.node.clone().filter(|_| !services.is_empty()) {
                (waiting.sweeping, waiting.replaced) = (true, false);
                return Some(Work { node, services });
            }
            if std::mem::take(&mut waiting.complaining) {
                // Whatever failed has gone away since.
                waiting.complaints = Some(Vec::new());
            }
            waiting = self.woken.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self) {
        let mut waiting = self.lock();
        waiting.sweeping = false;
        if std::mem::take(&mut waiting.complaining) {
            waiting.complaints = Some(Vec::new());
        }
    }

    /// Everything is looked at again, by a newer plan where there is one by then.
    fn failed(&self, work: Work, error: &netlink::Error) {
        let mut waiting = self.lock();
        waiting.sweeping = false;
        if !waiting.replaced {
            for service in work.services {
                waiting.services.entry(service.key.clone()).or_insert(Some(service));
            }
        }
        let cause = match error.errno() {
            Some(errno) => format!("{error}: {errno}"),
            None => error.to_string(),
        };
        let complaints = waiting.services.iter().filter(|(_, service)| service.is_some());
        let complaints = complaints.map(|(key, _)| Complaint {
            service: key.clone(),
            kind: ComplaintKind::Kernel,
            message: format!("UDP flows of {key} to endpoints that are gone could not be cut: {cause}"),
        });
        let complaints = complaints.collect();
        waiting.complaints = Some(complaints);
        waiting.complaining = true;
    }
}
