//! A backend on a kernel in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lockstep_model::{Family, Feature, ServiceKey};
use lockstep_view::backend::{Applied, Audit, BackendError, Description, Drift, FailureKind, ServiceFailure};
use lockstep_view::{Backend, ForwardingPlan, NodePortAddresses, ServicePlan};

use crate::mode::Remains;
use crate::reconcile::RemoveOthers;

/// What a kernel holds, and how it will misbehave.
#[derive(Debug, Default)]
pub(super) struct Inside {
    pub(super) services: BTreeMap<ServiceKey, Arc<ServicePlan>>,
    /// What the backend believes it holds.
    written: BTreeMap<ServiceKey, Arc<ServicePlan>>,
    failures: BTreeMap<ServiceKey, ServiceFailure>,
    pub(super) calls: Vec<String>,
    /// So many writes fail as a whole.
    pub(super) fail_next: u32,
    /// Writes of these Services fail.
    pub(super) refuse: BTreeSet<ServiceKey>,
    /// Somebody else may have changed something.
    pub(super) disturbed: bool,
    /// So many read-backs see something else.
    pub(super) misread: u32,
    /// A family could not be written.
    pub(super) in_part: bool,
    /// Objects that another mode has left.
    pub(super) others: usize,
    /// So many times they cannot be removed.
    pub(super) keep_others: u32,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Kernel(Arc<Mutex<Inside>>);

pub(super) struct FakeBackend(pub(super) Kernel);

impl Kernel {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }

    pub(super) fn remove_others(&self) -> RemoveOthers {
        let kernel = self.clone();
        Box::new(move || {
            let mut kernel = kernel.lock();
            if kernel.others == 0 {
                return vec![(Remains::Nftables, Ok(0))];
            }
            kernel.calls.push("remove others".to_owned());
            if kernel.keep_others > 0 {
                kernel.keep_others -= 1;
                return vec![(Remains::Nftables, Err(anyhow::anyhow!("locked on purpose")))];
            }
            vec![(Remains::Nftables, Ok(std::mem::take(&mut kernel.others)))]
        })
    }
}

impl Inside {
    /// Somebody else removes the rules of a Service.
    pub(super) fn disturb(&mut self, key: &ServiceKey) {
        self.services.remove(key).expect("it is programmed");
        self.disturbed = true;
    }

    fn write(&mut self, plan: &ForwardingPlan, keys: &[ServiceKey]) -> Result<Applied, BackendError> {
        if self.fail_next > 0 {
            self.fail_next -= 1;
            return Err(BackendError {
                doing: "fake: commit".to_owned(),
                source: "broken on purpose".into(),
            });
        }
        let mut objects_changed = 0;
        for key in keys {
            let wanted = plan.services.get(key);
            if self.services.get(key) == wanted {
                self.failures.remove(key);
                continue;
            }
            if self.refuse.contains(key) {
                let previous_in_force = self.services.contains_key(key);
                let failure = ServiceFailure {
                    service: key.clone(),
                    kind: FailureKind::Kernel,
                    message: "refused on purpose".to_owned(),
                    previous_in_force,
                };
                self.failures.insert(key.clone(), failure);
                continue;
            }
            self.failures.remove(key);
            objects_changed += 1;
            match wanted {
                Some(service) => self.services.insert(key.clone(), service.clone()),
                None => self.services.remove(key),
            };
        }
        self.written = self.services.clone();
        Ok(Applied { objects_changed, failures: self.failures.values().cloned().collect() })
    }

    fn drift(&self) -> Vec<Drift> {
        if self.services == self.written {
            return Vec::new();
        }
        vec![Drift { object: "fake".to_owned(), fault: "something is missing".to_owned() }]
    }
}

impl Backend for FakeBackend {
    fn describe(&self) -> Description {
        Description {
            mode: "fake",
            version: String::new(),
            families: Family::ALL.to_vec(),
            features: vec![Feature::Sctp],
            node_port_addresses: NodePortAddresses::AllLocal,
            one_pool: false,
            binds_addresses: false,
            localhost_node_ports: Ok(()),
        }
    }

    fn standing(&mut self) -> Result<bool, BackendError> {
        Ok(!self.0.lock().services.is_empty())
    }

    fn sync(&mut self, plan: &ForwardingPlan) -> Result<Applied, BackendError> {
        let mut kernel = self.0.lock();
        kernel.calls.push("sync".to_owned());
        let keys: BTreeSet<_> = kernel.services.keys().chain(plan.services.keys()).cloned().collect();
        kernel.write(plan, &keys.into_iter().collect::<Vec<_>>())
    }

    fn apply(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey]) -> Result<Applied, BackendError> {
        let mut kernel = self.0.lock();
        let keys: Vec<_> = changed.iter().map(ServiceKey::to_string).collect();
        kernel.calls.push(format!("apply {}", keys.join(" ")));
        kernel.write(plan, changed)
    }

    fn verify(&mut self) -> Result<Vec<Drift>, BackendError> {
        let mut kernel = self.0.lock();
        kernel.calls.push("verify".to_owned());
        if kernel.misread > 0 {
            kernel.misread -= 1;
            return Ok(vec![Drift { object: "fake".to_owned(), fault: "misread on purpose".to_owned() }]);
        }
        Ok(kernel.drift())
    }

    fn is_whole(&self) -> bool {
        !self.0.lock().in_part
    }

    fn read_back_later(&mut self) -> bool {
        self.0.lock().calls.push("read back later".to_owned());
        true
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        Ok(std::mem::take(&mut self.0.lock().disturbed))
    }

    fn audit(&mut self, _: Duration) -> Result<Audit, BackendError> {
        Ok(Audit { drift: self.0.lock().drift(), completed: true })
    }

    fn cleanup(&mut self) -> Result<usize, BackendError> {
        let mut kernel = self.0.lock();
        kernel.calls.push("cleanup".to_owned());
        Ok(std::mem::take(&mut kernel.services).len())
    }
}
