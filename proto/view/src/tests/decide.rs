//! The verdict matrix, every cell.

use lockstep_model::TrafficPolicy::{Cluster, Local};

use crate::Action::{Drop, Forward, Reject};
use crate::decide::{Situation, Verdicts, external, internal};
use crate::{Action, Pool};

const CLUSTER: Action = Forward { pool: Pool::Cluster, masquerade: false };
const CLUSTER_MASQ: Action = Forward { pool: Pool::Cluster, masquerade: true };
const LOCAL: Action = Forward { pool: Pool::Local, masquerade: false };
const LOCAL_MASQ: Action = Forward { pool: Pool::Local, masquerade: true };

fn at(any_usable: bool, any_local: bool, tells_pods: bool, masquerade_all: bool) -> Situation {
    Situation { any_usable, any_local, tells_pods, masquerade_all, one_pool: false }
}

fn are(from_pod: Action, from_node: Action, from_elsewhere: Action) -> Verdicts {
    Verdicts { from_pod, from_node, from_elsewhere }
}

#[test]
fn nothing_usable_anywhere_is_refused_whatever_the_policy() {
    for policy in [Cluster, Local] {
        for (pods, all) in [(false, false), (false, true), (true, false), (true, true)] {
            let situation = at(false, false, pods, all);
            assert_eq!(internal(policy, situation), are(Reject, Reject, Reject));
            assert_eq!(external(policy, situation), are(Reject, Reject, Reject));
        }
    }
}

#[test]
fn internal_policy_chooses_the_pool_and_the_source_the_masquerade() {
    for (policy, any_local, tells_pods, all, expected) in [
        (Cluster, false, true, false, are(CLUSTER, CLUSTER_MASQ, CLUSTER_MASQ)),
        (Cluster, true, true, false, are(CLUSTER, CLUSTER_MASQ, CLUSTER_MASQ)),
        (Cluster, true, true, true, are(CLUSTER_MASQ, CLUSTER_MASQ, CLUSTER_MASQ)),
        (Cluster, true, false, false, are(CLUSTER, CLUSTER, CLUSTER)),
        (Cluster, true, false, true, are(CLUSTER_MASQ, CLUSTER_MASQ, CLUSTER_MASQ)),
        (Local, true, true, false, are(LOCAL, LOCAL_MASQ, LOCAL_MASQ)),
        (Local, true, true, true, are(LOCAL_MASQ, LOCAL_MASQ, LOCAL_MASQ)),
        (Local, true, false, false, are(LOCAL, LOCAL, LOCAL)),
        (Local, true, false, true, are(LOCAL_MASQ, LOCAL_MASQ, LOCAL_MASQ)),
        (Local, false, true, false, are(Drop, Drop, Drop)),
        (Local, false, false, true, are(Drop, Drop, Drop)),
    ] {
        let situation = at(true, any_local, tells_pods, all);
        assert_eq!(internal(policy, situation), expected, "{policy:?} {situation:?}");
    }
}

#[test]
fn external_policy_cluster_always_masquerades_pods_included() {
    for (any_local, pods, all) in
        [(false, false, false), (true, true, false), (true, false, true), (false, true, true)]
    {
        let verdicts = external(Cluster, at(true, any_local, pods, all));
        assert_eq!(verdicts, are(CLUSTER_MASQ, CLUSTER_MASQ, CLUSTER_MASQ));
    }
}

#[test]
fn external_policy_local_short_circuits_pods_and_the_node() {
    for all in [false, true] {
        for (any_local, tells_pods, expected) in [
            (true, true, are(CLUSTER, CLUSTER_MASQ, LOCAL)),
            (false, true, are(CLUSTER, CLUSTER_MASQ, Drop)),
            // Pods that cannot be told get what everybody else gets.
            (true, false, are(LOCAL, CLUSTER_MASQ, LOCAL)),
            (false, false, are(Drop, CLUSTER_MASQ, Drop)),
        ] {
            let situation = at(true, any_local, tells_pods, all);
            assert_eq!(external(Local, situation), expected, "{situation:?}");
        }
    }
}

#[test]
fn with_one_pool_the_local_one_is_everybodys_where_there_is_one() {
    for (any_local, tells_pods, expected) in [
        (true, true, are(LOCAL, LOCAL_MASQ, LOCAL)),
        (true, false, are(LOCAL, LOCAL_MASQ, LOCAL)),
        (false, true, are(CLUSTER, CLUSTER_MASQ, Drop)),
        (false, false, are(Drop, CLUSTER_MASQ, Drop)),
    ] {
        let situation = Situation { one_pool: true, ..at(true, any_local, tells_pods, false) };
        assert_eq!(external(Local, situation), expected);
        assert_eq!(external(Cluster, situation), external(Cluster, at(true, any_local, tells_pods, false)));
        assert_eq!(internal(Local, situation), internal(Local, at(true, any_local, tells_pods, false)));
    }
}
