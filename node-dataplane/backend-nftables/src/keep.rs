//! What a Service that is left out keeps of the version before: all but the places that the plan
//! gives to somebody else, who must not be left out for it.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use lockstep_model::{Family, Port, Protocol};
use lockstep_view::ServicePlan;
use rustc_hash::FxHashSet;

/// What only one Service can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    /// The ports of a cluster IP that no Service has.
    RestOf(IpAddr),
    /// A port of an address, or of the node where there is none.
    At(Family, Option<IpAddr>, Protocol, Port),
}

/// The places of some Services.
#[derive(Debug, Default)]
pub(crate) struct Places(FxHashSet<Place>);

impl Places {
    /// The places of these Services.
    pub(crate) fn of<'a>(services: impl IntoIterator<Item = &'a Arc<ServicePlan>>) -> Self {
        Self(services.into_iter().flat_map(|service| places(service)).collect())
    }

    /// The plan without these places; `None` where nothing of it is left.
    pub(crate) fn leave<'a>(&self, kept: &'a Arc<ServicePlan>) -> Option<Cow<'a, Arc<ServicePlan>>> {
        if !places(kept).any(|place| self.0.contains(&place)) {
            return Some(Cow::Borrowed(kept));
        }
        let mut rest = (**kept).clone();
        rest.cluster_ips.retain(|address| !self.0.contains(&Place::RestOf(*address)));
        for port in &mut rest.ports {
            let (family, protocol) = (port.family, port.protocol);
            port.frontends.retain(|frontend| {
                !self.0.contains(&Place::At(family, frontend.surface.address(), protocol, frontend.port))
            });
        }
        rest.ports.retain(|port| !port.frontends.is_empty());
        let is_left = !(rest.ports.is_empty() && rest.cluster_ips.is_empty());
        is_left.then(|| Cow::Owned(Arc::new(rest)))
    }
}

fn places(service: &ServicePlan) -> impl Iterator<Item = Place> + '_ {
    let frontends = service.ports.iter().flat_map(|port| {
        let at = |surface: lockstep_view::Surface, number| {
            Place::At(port.family, surface.address(), port.protocol, number)
        };
        port.frontends.iter().map(move |frontend| at(frontend.surface, frontend.port))
    });
    service.cluster_ips.iter().copied().map(Place::RestOf).chain(frontends)
}
