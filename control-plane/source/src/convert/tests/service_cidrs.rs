//! ServiceCIDRs.

use serde_json::json;

use super::{cidr_with, faults, object};
use crate::convert::{Outcome, Skip};

#[test]
fn service_cidrs() {
    let cidrs = |changes| {
        let cidr = object(cidr_with(&changes));
        assert_eq!(&*cidr.key.0, "kubernetes");
        cidr.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(cidrs(json!({})), ["10.96.0.0/12"]);
    let both = json!({"spec": {"cidrs": ["fd00:96::/112", "10.96.0.1/12", "10.96.0.0/12"]}});
    assert_eq!(cidrs(both), ["10.96.0.0/12", "fd00:96::/112"], "canonical");
    assert_eq!(cidrs(json!({"spec": null})), [] as [&str; 0]);
    let on_its_way_out = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    assert_eq!(cidrs(on_its_way_out), ["10.96.0.0/12"]);
    let others = json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}});
    assert_eq!(cidr_with(&others), Ok(Outcome::Skip(Skip::OtherProxy)));
}

#[test]
fn what_is_wrong_with_service_cidrs() {
    faults(
        cidr_with,
        &[
            (
                json!({"metadata": {"name": "A b"}}),
                "metadata.name: \"A b\" is not a DNS subdomain (a-z, 0-9, -, ., at most 253)",
            ),
            (
                json!({"spec": {"cidrs": ["10.96.0.0/12", "10.96.0.0"]}}),
                "spec.cidrs[1]: \"10.96.0.0\" is not a CIDR",
            ),
            (
                json!({"spec": {"cidrs": ["10.96.0.0/33"]}}),
                "spec.cidrs[0]: \"10.96.0.0/33\" has a longer prefix than its family allows",
            ),
            (json!({"spec": {"cidrs": ["10.0.0.0/0"]}}), "spec.cidrs[0]: \"10.0.0.0/0\" is every address"),
            (json!({"spec": {"cidrs": ["::/0"]}}), "spec.cidrs[0]: \"::/0\" is every address"),
        ],
    );
}
