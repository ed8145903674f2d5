//! The sysctl without which the kernel takes packets from and to loopback addresses on no interface
//! but `lo`, and so has no answers from pods for a client at 127.0.0.1.

use lockstep_kernel::sysctl::{Ensured, Tree};
use lockstep_view::backend::Drift;

const KEY: &str = "net/ipv4/conf/all/route_localnet";
const ON: &str = "1";

pub(crate) struct RouteLocalnet {
    sysctls: Tree,
    /// Why it is not on, although it should be.
    fault: Option<String>,
}

impl RouteLocalnet {
    pub(crate) fn new(sysctls: Tree) -> Self {
        Self { sysctls, fault: None }
    }

    /// Whether it could be turned on. Writes nothing.
    pub(crate) fn is_possible(&self) -> Result<(), String> {
        self.sysctls.try_out(KEY, ON).map_err(|error| error.to_string())
    }

    /// Turns it on. Only for whoever knows that the guard is in force. True where it was off. It is
    /// never turned off: others may count on it by then.
    pub(crate) fn turn_on(&mut self) -> bool {
        let fault = match self.sysctls.ensure(KEY, ON) {
            Ok(Ensured::Kept) => None,
            Ok(Ensured::Written { before }) => {
                tracing::info!(setting = KEY, before, value = ON, "set: node ports answer at 127.0.0.1");
                self.fault = None;
                return true;
            }
            Ok(Ensured::ReadOnly { stays }) => {
                Some(format!("sysctl {KEY}: read-only, {stays} instead of {ON}"))
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(fault) = fault.as_ref().filter(|_| self.fault != fault) {
            tracing::error!(fault, "node ports do not answer at 127.0.0.1; everything else is in force");
        }
        self.fault = fault;
        false
    }

    /// Why it is not on, as far as it was tried.
    pub(crate) fn fault(&self) -> Option<String> {
        self.fault.as_ref().map(|fault| format!("its node ports do not answer at 127.0.0.1: {fault}"))
    }

    /// What somebody else did to it. A fault is known already, and is no drift.
    pub(crate) fn drift(&self) -> Option<Drift> {
        let fault = match self.sysctls.read(KEY) {
            _ if self.fault.is_some() => return None,
            Ok(Some(value)) if value == ON => return None,
            Ok(value) => format!("{} instead of {ON}", value.as_deref().unwrap_or("missing")),
            Err(error) => error.to_string(),
        };
        Some(Drift { object: format!("sysctl {KEY}"), fault })
    }
}
