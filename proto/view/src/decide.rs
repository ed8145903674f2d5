//! Verdicts: what happens to a new connection, by the address it is for and where it comes from.

use lockstep_model::TrafficPolicy;

use crate::{Action, Pool};

/// What a verdict depends on, for one Service port in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// An endpoint is usable on some node; then the cluster pool is not empty.
    pub any_usable: bool,
    /// The local pool is not empty.
    pub any_local: bool,
    /// Pods can be told from other sources.
    pub tells_pods: bool,
    /// Masquerade everything that is sent to a cluster IP.
    pub masquerade_all: bool,
    /// All sources of a frontend are sent to the same pool.
    pub one_pool: bool,
}

/// Actions for the three classes of sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdicts {
    /// From pods. Where pods cannot be told, what holds for others.
    pub from_pod: Action,
    /// From the node itself.
    pub from_node: Action,
    /// From elsewhere.
    pub from_elsewhere: Action,
}

/// Verdicts on a cluster IP. The internal policy chooses the pool; the masquerade is for
/// sources whose replies would not come back through this node.
pub fn internal(policy: TrafficPolicy, it: Situation) -> Verdicts {
    if !it.any_usable {
        return Verdicts::all(Action::Reject);
    }
    let pool = match policy {
        TrafficPolicy::Cluster => Pool::Cluster,
        TrafficPolicy::Local if it.any_local => Pool::Local,
        TrafficPolicy::Local => return Verdicts::all(Action::Drop),
    };
    let others = Action::Forward { pool, masquerade: it.masquerade_all || it.tells_pods };
    let from_pod = Action::Forward { pool, masquerade: it.masquerade_all };
    Verdicts {
        from_pod: if it.tells_pods { from_pod } else { others },
        from_node: others,
        from_elsewhere: others,
    }
}

/// Verdicts on every other address. Policy Cluster hides the client always, pods included.
/// Policy Local keeps it, and sends traffic that starts on a node or in a pod to the whole
/// cluster, as if it had gone out to the load balancer and come back; with one pool only, that is
/// so where no endpoint is local.
pub fn external(policy: TrafficPolicy, it: Situation) -> Verdicts {
    if !it.any_usable {
        return Verdicts::all(Action::Reject);
    }
    match policy {
        TrafficPolicy::Cluster => Verdicts::all(Action::Forward { pool: Pool::Cluster, masquerade: true }),
        TrafficPolicy::Local => {
            let from_elsewhere = if it.any_local {
                Action::Forward { pool: Pool::Local, masquerade: false }
            } else {
                Action::Drop
            };
            let pool = if it.one_pool && it.any_local { Pool::Local } else { Pool::Cluster };
            let inside = |masquerade| Action::Forward { pool, masquerade };
            let from_pod = if it.tells_pods { inside(false) } else { from_elsewhere };
            Verdicts { from_pod, from_node: inside(true), from_elsewhere }
        }
    }
}

impl Verdicts {
    fn all(action: Action) -> Self {
        Self { from_pod: action, from_node: action, from_elsewhere: action }
    }

    /// True where a class of sources is sent to the pool.
    pub fn uses(&self, pool: Pool) -> bool {
        [self.from_pod, self.from_node, self.from_elsewhere]
            .iter()
            .any(|action| matches!(action, Action::Forward { pool: used, .. } if *used == pool))
    }
}
