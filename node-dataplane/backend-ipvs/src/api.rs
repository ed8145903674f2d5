//! The [`Backend`].

use std::time::{Duration, Instant};

use lockstep_model::ServiceKey;
use lockstep_view::backend::{Applied, Audit, Backend, BackendError, Description, Drift, ServiceFailure};
use lockstep_view::{ForwardingPlan, NodePortAddresses};

use crate::backend::{Fault, Ipvs};
use crate::cleanup;

fn failed<F: Into<Fault>>(doing: &str) -> impl FnOnce(F) -> BackendError {
    let doing = format!("IPVS: {doing}");
    move |fault| BackendError { doing, source: Box::new(fault.into()) }
}

impl Ipvs {
    fn applied(&self, objects_changed: usize) -> Applied {
        let failures = self.left_out.iter().map(|(key, left)| ServiceFailure {
            service: key.clone(),
            kind: left.kind,
            message: left.message.clone(),
            previous_in_force: left.previous_in_force,
        });
        Applied { objects_changed, failures: failures.collect() }
    }
}

impl Backend for Ipvs {
    fn describe(&self) -> Description {
        Description {
            mode: "ipvs",
            version: self.version.clone(),
            families: self.families(),
            features: self.features.clone(),
            node_port_addresses: NodePortAddresses::AllLocal,
            one_pool: true,
            binds_addresses: true,
            localhost_node_ports: Err("IPVS translates nothing that is for a loopback address".to_owned()),
        }
    }

    fn standing(&mut self) -> Result<bool, BackendError> {
        if self.tables.device.addresses().map_err(failed("look for our interface"))?.is_none() {
            return Ok(false);
        }
        for chains in &self.chains {
            if chains.standing().map_err(failed("look for our chains"))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn sync(&mut self, plan: &ForwardingPlan) -> Result<Applied, BackendError> {
        let objects = self.compare(plan).map_err(failed("compare everything"))?;
        Ok(self.applied(objects))
    }

    fn apply(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey]) -> Result<Applied, BackendError> {
        let objects = self.change(plan, changed).map_err(failed("write changes"))?;
        Ok(self.applied(objects))
    }

    fn verify(&mut self) -> Result<Vec<Drift>, BackendError> {
        self.read_back().map_err(failed("read back"))
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        self.signs().map_err(failed("look for changes by others"))
    }

    fn audit(&mut self, budget: Duration) -> Result<Audit, BackendError> {
        self.walk_on(budget).map_err(failed("audit"))
    }

    fn tend(&mut self) -> Result<(), BackendError> {
        self.drain(Instant::now()).map_err(failed("remove what has drained"))
    }

    fn cleanup(&mut self) -> Result<usize, BackendError> {
        (self.terms, self.touched) = (None, None);
        self.in_force.clear();
        self.owners.clear();
        self.left_out.clear();
        self.chains.iter_mut().for_each(crate::chains::Chains::forget);
        cleanup::remove_all(&mut self.tables, &self.chains, &self.options.exclude).map_err(failed("cleanup"))
    }
}
