//! Nodes.

use serde_json::json;

use super::{faults, node_with};

#[test]
fn nodes() {
    let node = node_with(&json!({
        "metadata": {"labels": {"topology.kubernetes.io/zone": "zone-a", "topology.kubernetes.io/region": "r_1"}},
        "spec": {"podCIDRs": ["10.244.1.7/24", "fd00:244::/64"]},
        "status": {"addresses": [
            {"type": "Hostname", "address": "node-1"}, {"type": "ExternalIP", "address": "198.51.100.7"},
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"},
            {"type": "ExternalIP", "address": "192.0.2.1"}, {"type": "InternalDNS", "address": "x"}]},
    }))
    .unwrap();
    assert_eq!((&*node.name, node.uid.as_deref()), ("node-1", Some("u-1")));
    assert_eq!((node.zone.as_deref(), node.region.as_deref()), (Some("zone-a"), Some("r_1")));
    let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["192.0.2.1", "2001:db8::1", "198.51.100.7"]);
    let cidrs: Vec<_> = node.pod_cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(cidrs, ["10.244.1.0/24", "fd00:244::/64"]);

    let bare = node_with(&json!({"spec": null, "status": null, "metadata": {"labels": null}})).unwrap();
    assert_eq!((bare.zone, bare.addresses.len(), bare.pod_cidrs.len()), (None, 0, 0));
    let old = node_with(&json!({"spec": {"podCIDRs": null, "podCIDR": "10.244.9.0/24"}})).unwrap();
    assert_eq!(old.pod_cidrs[0].to_string(), "10.244.9.0/24");
}

#[test]
fn nodes_that_are_being_removed() {
    let removed = |spec: &serde_json::Value| node_with(spec).unwrap().being_removed;
    assert!(!removed(&json!({})));
    assert!(!removed(
        &json!({"spec": {"taints": [{"key": "dedicated", "value": "x", "effect": "NoSchedule"}]}})
    ));
    assert!(removed(&json!({"spec": {"taints": [
        {"key": "dedicated", "effect": "NoExecute"},
        {"key": "ToBeDeletedByClusterAutoscaler", "value": "1795233600", "effect": "NoSchedule"}]}})));
    assert!(removed(&json!({"metadata": {"deletionTimestamp": "2026-11-21T04:00:00Z"}})));
    assert!(!removed(&json!({"spec": {"taints": null}})));
}

#[test]
fn faults_of_nodes() {
    let address = |text: &str| json!({"status": {"addresses": [{"type": "Hostname", "address": "x"}, {"type": "InternalIP", "address": text}]}});
    faults(
        node_with,
        &[
            (
                json!({"metadata": {"name": "Node"}}),
                r#"metadata.name: "Node" is not a DNS subdomain (a-z, 0-9, -, ., at most 253)"#,
            ),
            (
                json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "a b"}}}),
                r#"metadata.labels[topology.kubernetes.io/zone]: "a b" is not a label value (a-z, A-Z, 0-9, -, _, ., at most 63)"#,
            ),
            (address("node"), r#"status.addresses[1].address: "node" is not an IP address"#),
            (address("0.0.0.0"), r#"status.addresses[1].address: "0.0.0.0" is the unspecified address"#),
            (address("ff02::1"), r#"status.addresses[1].address: "ff02::1" is a multicast address"#),
            (
                json!({"spec": {"podCIDRs": ["10.244.0.0/24", "10.244.0.0"]}}),
                r#"spec.podCIDRs[1]: "10.244.0.0" is not a CIDR"#,
            ),
            (json!({"spec": {"podCIDRs": null, "podCIDR": "x"}}), r#"spec.podCIDR: "x" is not a CIDR"#),
        ],
    );
}
