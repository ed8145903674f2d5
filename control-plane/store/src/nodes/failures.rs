//! What nodes fail at: known in full for convergence, listed as far as there is room.

use lockstep_model::{Interner, ServiceKey};

use super::report::{Failure, FailureClass, Report};

/// Most failures listed of one report.
pub(super) const LISTED: usize = 256;

/// How many failures are listed over all nodes before a node's list is cut to
/// [`LISTED_WHEN_MANY`]. Bounds memory when everything fails everywhere.
pub(super) const LISTED_IN_ALL: usize = 100_000;

/// How many failures of one node are listed when there are too many.
pub(super) const LISTED_WHEN_MANY: usize = 16;

/// How many Services are remembered of what one node reports beyond its list. No client of
/// ours says as much; of one that does, any Service may fail.
const UNLISTED: usize = 4_096;

/// What a node fails at beyond its list.
#[derive(Debug, Default)]
pub(super) struct Unlisted {
    /// Services of the failures that were reported and are not listed, sorted, unique: a cut
    /// list must not be taken for a short one. Two shared names each, which costs little.
    services: Box<[ServiceKey]>,
    /// Some are not known to be of one Service: the node did not say which, or could not.
    anybodys: bool,
}

impl Unlisted {
    /// Cuts the list of a report to `limit`, and keeps what must not be forgotten of the rest.
    pub(super) fn cut(report: &mut Report, limit: usize, names: &mut Interner) -> Self {
        let mut unlisted = Self { services: Box::default(), anybodys: report.failures_truncated > 0 };
        if report.failures.len() <= limit {
            return unlisted;
        }
        let cut = report.failures.split_off(limit);
        let count = u32::try_from(cut.len()).unwrap_or(u32::MAX);
        report.failures_truncated = report.failures_truncated.saturating_add(count);
        unlisted.anybodys |= cut.iter().any(Failure::is_anybodys);
        let services = cut.iter().filter_map(|failure| failure.key.as_ref()?.service());
        let mut services: Vec<ServiceKey> = services
            .map(|key| ServiceKey { namespace: names.intern(&key.namespace), name: names.intern(&key.name) })
            .collect();
        services.sort_unstable();
        services.dedup();
        unlisted.anybodys |= services.len() > UNLISTED;
        services.truncate(UNLISTED);
        unlisted.services = services.into();
        unlisted
    }

    pub(super) fn may_concern(&self, service: &ServiceKey) -> bool {
        self.anybodys || self.services.binary_search(service).is_ok()
    }

    pub(super) fn services(&self) -> &[ServiceKey] {
        &self.services
    }
}

impl Failure {
    /// True where this is a failure of the Service or its endpoint sets, or may be.
    pub fn may_concern(&self, service: &ServiceKey) -> bool {
        match &self.key {
            Some(key) => key.service() == Some(service),
            None => self.is_anybodys(),
        }
    }

    /// Without a key it may be of any Service; but a resource of a kind that the node does not
    /// know is no Service and no endpoint set.
    fn is_anybodys(&self) -> bool {
        self.key.is_none() && self.class != FailureClass::Unsupported
    }
}
