//! EndpointSlices.

use lockstep_model::{Conditions, Protocol};
use serde_json::{Value, json};

use super::{faults, good_slice, merged, slice_with};
use crate::convert::{MAX_ENDPOINTS, Outcome, Skip};

#[test]
fn a_slice_as_it_is() {
    let set = good_slice(json!({"endpoints": [
        {"addresses": ["10.1.0.9", "10.1.0.10"], "nodeName": "node-1", "zone": "zone-a",
         "conditions": {"ready": false, "serving": true, "terminating": true},
         "hints": {"forZones": [{"name": "zone-b"}, {"name": "zone-a"}, {"name": "zone-b"}],
                   "forNodes": [{"name": "node-2"}]}},
        {"addresses": ["10.1.0.2"]},
    ]}));
    assert_eq!(set.key.to_string(), "shop/web/web-abc");
    assert_eq!((&*set.ports[0].name, set.ports[0].port.get()), ("http", 8080));
    let addresses: Vec<_> = set.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(addresses, ["10.1.0.2", "10.1.0.9"], "only the first address of each");
    assert_eq!((set.endpoints[0].conditions, &set.endpoints[0].hints), (Conditions::READY, &None));
    let last = &set.endpoints[1];
    assert_eq!((last.node_name.as_deref(), last.zone.as_deref()), (Some("node-1"), Some("zone-a")));
    assert_eq!(last.conditions, Conditions { ready: false, serving: true, terminating: true });
    let hints = last.hints.as_ref().unwrap();
    assert_eq!(hints.zones.iter().map(|zone| &**zone).collect::<Vec<_>>(), ["zone-a", "zone-b"]);
    assert_eq!(hints.nodes.iter().map(|node| &**node).collect::<Vec<_>>(), ["node-2"]);
}

#[test]
fn defaults_of_slices() {
    let conditions = |conditions: Value| {
        let set = good_slice(json!({"endpoints": [{"addresses": ["10.1.0.1"], "conditions": conditions}]}));
        let it = set.endpoints[0].conditions;
        (it.ready, it.serving, it.terminating)
    };
    assert_eq!(conditions(json!({})), (true, true, false));
    assert_eq!(conditions(json!({"ready": false})), (false, true, false), "serving has a default of its own");
    assert_eq!(conditions(json!({"terminating": true})), (true, true, true));
    assert_eq!(conditions(json!({"serving": false})), (true, false, false));

    let set = good_slice(json!({
        "metadata": {"namespace": null},
        "ports": [{"port": 1}, {"name": "any"}],
        "endpoints": [{"addresses": ["10.1.0.1"], "nodeName": "", "zone": "",
                       "hints": {"forZones": [], "forNodes": null}}],
    }));
    assert_eq!(set.key.to_string(), "default/web/web-abc");
    let ports: Vec<_> = set.ports.iter().map(|port| (&*port.name, port.protocol)).collect();
    assert_eq!(ports, [("", Protocol::Tcp)], "a port without a number is passed over");
    let endpoint = &set.endpoints[0];
    assert_eq!((&endpoint.node_name, &endpoint.zone, &endpoint.hints), (&None, &None, &None));
    let empty = good_slice(json!({"ports": null, "endpoints": null}));
    assert!(empty.ports.is_empty() && empty.endpoints.is_empty());
}

#[test]
fn slices_for_others() {
    let rows = [
        (json!({"metadata": {"labels": {"kubernetes.io/service-name": null}}}), Skip::NoService),
        (json!({"metadata": {"labels": {"kubernetes.io/service-name": ""}}}), Skip::NoService),
        (json!({"metadata": {"labels": null}}), Skip::NoService),
        (
            json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}}),
            Skip::OtherProxy,
        ),
        (json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}), Skip::Headless),
        (json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.com"]}]}), Skip::Fqdn),
    ];
    for (changes, skip) in rows {
        assert_eq!(slice_with(&changes), Ok(Outcome::Skip(skip)), "{changes}");
    }
}

#[test]
fn faults_of_slices() {
    let address = |text: &str| json!({"endpoints": [{"addresses": ["10.1.0.1"]}, {"addresses": [text]}]});
    let endpoint =
        |fields: Value| json!({"endpoints": [merged(&json!({"addresses": ["10.1.0.1"]}), &fields)]});
    let many: Vec<_> = (0..=MAX_ENDPOINTS)
        .map(|n| json!({"addresses": [format!("10.1.{}.{}", n / 250, n % 250 + 1)]}))
        .collect();
    faults(
        slice_with,
        &[
            (
                json!({"metadata": {"name": "a_b"}}),
                r#"metadata.name: "a_b" is not a DNS subdomain (a-z, 0-9, -, ., at most 253)"#,
            ),
            (
                json!({"metadata": {"namespace": "Shop"}}),
                r#"metadata.namespace: "Shop" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (
                json!({"metadata": {"labels": {"kubernetes.io/service-name": "a.b"}}}),
                r#"metadata.labels[kubernetes.io/service-name]: "a.b" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (json!({"addressType": "IPv5"}), r#"addressType: "IPv5" is not IPv4, IPv6 or FQDN"#),
            (
                json!({"addressType": "IPv6"}),
                r#"endpoints[0].addresses[0]: "10.1.0.1" is not of the slice's addressType"#,
            ),
            (address("fd00::1"), r#"endpoints[1].addresses[0]: "fd00::1" is not of the slice's addressType"#),
            (address("10.1.0"), r#"endpoints[1].addresses[0]: "10.1.0" is not an IP address"#),
            (address("127.0.0.1"), r#"endpoints[1].addresses[0]: "127.0.0.1" is a loopback address"#),
            (
                address("169.254.169.254"),
                r#"endpoints[1].addresses[0]: "169.254.169.254" is a link-local address"#,
            ),
            (address("224.0.0.5"), r#"endpoints[1].addresses[0]: "224.0.0.5" is a multicast address"#),
            (address("0.0.0.0"), r#"endpoints[1].addresses[0]: "0.0.0.0" is the unspecified address"#),
            (json!({"endpoints": [{"addresses": []}]}), r#"endpoints[0].addresses: "" has no address"#),
            (json!({"endpoints": many}), r#"endpoints: "1001 endpoints" is more than 1000"#),
            (
                endpoint(json!({"nodeName": "node_1"})),
                r#"endpoints[0].nodeName: "node_1" is not a DNS subdomain (a-z, 0-9, -, ., at most 253)"#,
            ),
            (
                endpoint(json!({"zone": "-a"})),
                r#"endpoints[0].zone: "-a" is not a label value (a-z, A-Z, 0-9, -, _, ., at most 63)"#,
            ),
            (
                endpoint(json!({"hints": {"forZones": [{"name": "a"}, {"name": ""}]}})),
                r#"endpoints[0].hints.forZones[1].name: "" is not a label value (a-z, A-Z, 0-9, -, _, ., at most 63)"#,
            ),
            (
                endpoint(json!({"hints": {"forNodes": [{"name": "N"}]}})),
                r#"endpoints[0].hints.forNodes[0].name: "N" is not a DNS subdomain (a-z, 0-9, -, ., at most 253)"#,
            ),
            (json!({"ports": [{"port": 0}]}), r#"ports[0].port: "0" is not a port number (1-65535)"#),
            (
                json!({"ports": [{"port": 1}, {"name": "x", "port": 70000}]}),
                r#"ports[1].port: "70000" is not a port number (1-65535)"#,
            ),
            (json!({"ports": [{"port": -80}]}), r#"ports[0].port: "-80" is not a port number (1-65535)"#),
            (
                json!({"ports": [{"name": "x", "port": 1}, {"name": "x", "port": 2}]}),
                r#"ports[1].name: "x" is the name of the TCP port ports[0] too"#,
            ),
            (
                json!({"ports": [{"name": "X", "port": 1}]}),
                r#"ports[0].name: "X" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (
                json!({"ports": [{"port": 1, "protocol": "ICMP"}]}),
                r#"ports[0].protocol: "ICMP" is not TCP, UDP or SCTP"#,
            ),
        ],
    );
}

#[test]
fn a_thousand_endpoints_are_fine_and_an_object_too_large_for_a_message_is_not() {
    let endpoints = |zones: usize| -> Vec<_> {
        let zones: Vec<_> = (0..zones).map(|zone| json!({"name": format!("zone-{zone:0>58}")})).collect();
        (0..MAX_ENDPOINTS)
            .map(|n| json!({"addresses": [format!("10.1.{}.{}", n / 250, n % 250 + 1)], "hints": {"forZones": zones}}))
            .collect()
    };
    assert_eq!(good_slice(json!({"endpoints": endpoints(2)})).endpoints.len(), MAX_ENDPOINTS);
    let fault = slice_with(&json!({"endpoints": endpoints(8)})).unwrap_err();
    assert!(fault.field.is_empty(), "the object as a whole");
    assert_eq!(fault.reason, "is more than the 524288 bytes that one object may have");
}

#[test]
fn a_dying_pod_gives_its_address_to_a_new_one() {
    let set = good_slice(json!({"endpoints": [
        {"addresses": ["10.1.0.1"], "nodeName": "old", "conditions": {"ready": false, "terminating": true}},
        {"addresses": ["10.1.0.1"], "nodeName": "new"},
    ]}));
    assert_eq!(set.endpoints.len(), 1);
    assert_eq!(set.endpoints[0].node_name.as_deref(), Some("new"));
}
