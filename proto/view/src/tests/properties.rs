//! Random histories: the plan equals the oracle's, a fresh view's, and says what changed.

use std::collections::BTreeSet;

use lockstep_model::{Key, ServiceKey, State};
use proptest::prelude::*;

use super::cluster::{Cluster, Draw, ip};
use super::oracle::Oracle;
use crate::{ForwardingPlan, NodePlan, NodePortScope, PodSources, View};

/// Sorted pairs of an old and a new plan, as the set of keys in which they differ.
fn differences<T: PartialEq>(
    old: &std::collections::BTreeMap<ServiceKey, T>,
    new: &std::collections::BTreeMap<ServiceKey, T>,
) -> Vec<ServiceKey> {
    let keys: BTreeSet<&ServiceKey> = old.keys().chain(new.keys()).collect();
    keys.into_iter().filter(|key| old.get(key) != new.get(key)).cloned().collect()
}

/// One random change of the state; returns the Service concerned, if it is of one.
fn change(draw: &mut Draw, state: &mut State) -> Option<ServiceKey> {
    let resource = match draw.0.u8(..12) {
        0 => {
            let key = draw.key();
            state.remove(&Key::Service(key.clone()));
            return Some(key);
        }
        1 => {
            let key = draw.set_key();
            state.remove(&Key::EndpointSet(key.clone()));
            return Some(key.service);
        }
        10 => {
            state.remove(&Key::ServiceCidr(draw.cidr_key()));
            return None;
        }
        11 => draw.cidr().into(),
        2..6 => draw.service().into(),
        _ => lockstep_model::Resource::from(draw.set()),
    };
    let key = resource.key().service().cloned();
    state.upsert(resource.version(), resource);
    key
}

/// Which packets are pods', in the oracle's words.
fn pods(plan: &ForwardingPlan) -> Option<String> {
    Some(match plan.node.pods.as_ref()? {
        PodSources::Cidrs(ranges) => ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        PodSources::Interface(name) => format!("in by {name}"),
        PodSources::InterfacePrefix(prefix) => format!("in by {prefix}..."),
    })
}

/// Loopback addresses that node ports answer at, in the oracle's words.
fn localhost(plan: &ForwardingPlan) -> Vec<String> {
    let listed = |scope: &NodePortScope| match scope {
        NodePortScope::AllLocal => Vec::new(),
        NodePortScope::Addresses(list) => {
            list.iter().filter(|ip| ip.is_loopback()).map(ToString::to_string).collect()
        }
    };
    assert_eq!(listed(&plan.node.node_ports_v6), [""; 0], "never in IPv6");
    match &plan.node.node_ports_v4 {
        NodePortScope::AllLocal if plan.node.localhost_node_ports => vec!["all".to_owned()],
        scope => listed(scope),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_history_gives_the_plan_that_the_state_alone_gives(seed: u64, batches in prop::collection::vec(1u8..4, 1..12)) {
        let mut draw = Draw(fastrand::Rng::with_seed(seed));
        let config = draw.config();
        let mut cluster = Cluster::new(config.clone());
        let mut node = super::cluster::node();
        let interfaces = ["127.0.0.1", "127.1.0.1", "192.168.0.2", "::1"].map(ip).to_vec();
        cluster.view.set_interface_addresses(interfaces.clone());
        cluster.view.update(&cluster.state, &[]);
        for changes in batches {
            let node_before = cluster.view.plan().node.clone();
            let mut keys: Vec<ServiceKey> =
                (0..changes).filter_map(|_| change(&mut draw, &mut cluster.state)).collect();
            if draw.0.u8(..4) == 0 {
                node = draw.node();
                cluster.view.set_node(node.clone());
            }
            draw.0.shuffle(&mut keys);
            let before = cluster.plans();
            let changed = cluster.view.update(&cluster.state, &keys);
            let after = cluster.plans();
            prop_assert_eq!(&changed.services, &differences(&before, &after));

            let oracle = Oracle::new(&config, &node, &cluster.state);
            prop_assert_eq!(pods(cluster.view.plan()), oracle.pods());
            prop_assert_eq!(localhost(cluster.view.plan()), oracle.localhost(&interfaces));
            let node_after = &cluster.view.plan().node;
            prop_assert_eq!(changed.service_cidrs, node_after.service_cidrs != node_before.service_cidrs);
            let rest_of = |node: &NodePlan| NodePlan { service_cidrs: Vec::new(), ..node.clone() };
            prop_assert_eq!(changed.node, rest_of(node_after) != rest_of(&node_before));
            prop_assert_eq!(&cluster.view.plan().node.service_cidrs, &oracle.service_cidrs());
            let oracle = oracle.plans();
            for key in differences(&after, &oracle) {
                prop_assert_eq!(after.get(&key), oracle.get(&key), "{}", key);
            }

            let mut fresh = View::new(config.clone());
            fresh.set_node(node.clone());
            fresh.set_interface_addresses(interfaces.clone());
            let all: Vec<ServiceKey> = cluster.state.service_keys().cloned().collect();
            fresh.update(&cluster.state, &all);
            prop_assert_eq!(fresh.plan(), cluster.view.plan());
        }
    }

    #[test]
    fn the_order_of_named_services_has_no_say(seed: u64) {
        let mut draw = Draw(fastrand::Rng::with_seed(seed));
        let config = draw.config();
        let (mut one, mut other) = (Cluster::new(config.clone()), Cluster::new(config));
        let mut keys: Vec<_> = (0..12).filter_map(|_| change(&mut draw, &mut one.state)).collect();
        let first = one.view.update(&one.state, &keys);
        draw.0.shuffle(&mut keys);
        for key in &keys {
            other.view.update(&one.state, std::slice::from_ref(key));
        }
        // Whatever belongs to no Service is not among them.
        other.view.update(&one.state, &[]);
        prop_assert_eq!(one.view.plan(), other.view.plan());
        prop_assert!(first.services.is_sorted());
        prop_assert!(one.view.update(&one.state, &keys).is_empty());
    }
}
