//! The sysctl without which the kernel takes packets from and to loopback addresses on no interface
//! but `lo`, and so has no answers from pods for a client at 127.0.0.1.

use lockstep_kernel::sysctl::{Ensured, Tree};
use lockstep_view::backend::Drift;

const KEY: &str = "net/ipv4/conf/all/route_localnet";
const ON: &str = "1";

pub(crate) struct RouteLocalnet {
    sysctls: Tree,
    /// What the last write met that looked possible.
    refused: Option<String>,
    /// Why it cannot be on, as told last.
    told: Option<String>,
}

impl RouteLocalnet {
    pub(crate) fn new(sysctls: Tree) -> Self {
        Self { sysctls, refused: None, told: None }
    }

    /// Whether it could be turned on. Writes nothing.
    pub(crate) fn is_possible(&self) -> Result<(), String> {
        self.sysctls.try_out(KEY, ON).map_err(|error| error.to_string())
    }

    /// True where it is off, so that whoever finds the guard in force has to turn it on.
    pub(crate) fn is_off(&self) -> bool {
        !matches!(self.sysctls.read(KEY), Ok(Some(value)) if value == ON)
    }

    /// Turns it on. Only for whoever has read back just now that the guard is in force. What is
    /// returned keeps it off and was not told before. It is never turned off, not while the guard is
    /// gone either: others may count on it by then, and the guard is put back at once.
    pub(crate) fn turn_on(&mut self) -> Option<Drift> {
        let known = self.told.is_some();
        // Nothing is written where that is hopeless: as soon as it is not, nothing speaks against it.
        if self.is_possible().is_ok() {
            self.refused = match self.sysctls.ensure(KEY, ON) {
                Ok(Ensured::Kept) => None,
                Ok(Ensured::Written { before }) => {
                    tracing::info!(setting = KEY, before, value = ON, "set: node ports answer at 127.0.0.1");
                    None
                }
                Ok(Ensured::ReadOnly { stays }) => {
                    Some(format!("sysctl {KEY}: read-only, {stays} instead of {ON}"))
                }
                Err(error) => Some(error.to_string()),
            };
        }
        self.fault().filter(|_| !known)?;
        Some(Drift { object: format!("sysctl {KEY}"), fault: self.told.clone()? })
    }

    /// Why it cannot be on.
    pub(crate) fn fault(&mut self) -> Option<String> {
        let fault = self.refused.clone().or_else(|| self.is_possible().err());
        if let Some(fault) = fault.as_ref().filter(|_| self.told != fault) {
            tracing::error!(fault, "node ports do not answer at 127.0.0.1; everything else is in force");
        }
        self.told.clone_from(&fault);
        fault.map(|fault| format!("its node ports do not answer at 127.0.0.1: {fault}"))
    }

    /// What somebody else did to it. A fault is told already, and is no drift.
    pub(crate) fn drift(&self) -> Option<Drift> {
        let fault = match self.sysctls.read(KEY) {
            _ if self.told.is_some() => return None,
            Ok(Some(value)) if value == ON => return None,
            Ok(value) => format!("{} instead of {ON}", value.as_deref().unwrap_or("missing")),
            Err(error) => error.to_string(),
        };
        Some(Drift { object: format!("sysctl {KEY}"), fault })
    }
}
