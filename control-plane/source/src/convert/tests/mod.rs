//! Every rule of the conversion, as a table: one change to an object that is right, and what
//! comes of it.

mod endpoint_slices;
mod nodes;
mod service_cidrs;
mod services;

use lockstep_model::{EndpointSet, Interner, InvalidField, NodeContext, Service, ServiceCidr};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Conversion, Node, Outcome, endpoint_slice, node, service, service_cidr};

/// `changes` merged into `object`: null takes away, an array replaces.
fn merged(object: &Value, changes: &Value) -> Value {
    let (Value::Object(object), Value::Object(changes)) = (object, changes) else { return changes.clone() };
    let mut merge = object.clone();
    for (field, change) in changes {
        match change {
            Value::Null => merge.remove(field),
            change => {
                let old = merge.get(field).cloned().unwrap_or_else(|| json!({}));
                merge.insert(field.clone(), merged(&old, change))
            }
        };
    }
    Value::Object(merge)
}

fn typed<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn a_service() -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": "web"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.0.0.1",
            "clusterIPs": ["10.0.0.1", "fd00::1"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30080},
                      {"name": "dns", "protocol": "UDP", "port": 53}],
        },
    })
}

fn a_slice() -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": "web-abc", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": [{"addresses": ["10.1.0.1"]}],
    })
}

fn a_node() -> Value {
    json!({
        "metadata": {"name": "node-1", "uid": "u-1", "labels": {}},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

fn service_with(changes: &Value) -> Conversion<Service> {
    service(&typed(merged(&a_service(), changes)))
}

fn slice_with(changes: &Value) -> Conversion<EndpointSet> {
    endpoint_slice(&typed(merged(&a_slice(), changes)), &mut Interner::default())
}

fn node_with(changes: &Value) -> Result<NodeContext, InvalidField> {
    node(&typed::<Node>(merged(&a_node(), changes)), &mut Interner::default())
}

fn cidr_with(changes: &Value) -> Conversion<ServiceCidr> {
    let cidr = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}});
    service_cidr(&typed(merged(&cidr, changes)))
}

fn object<T: std::fmt::Debug>(conversion: Conversion<T>) -> T {
    match conversion {
        Ok(Outcome::Object(object)) => object,
        other => panic!("expected an object, got {other:?}"),
    }
}

fn good_service(changes: Value) -> Service {
    object(service_with(&changes))
}

fn good_slice(changes: Value) -> EndpointSet {
    object(slice_with(&changes))
}

/// Each row: a change, and the fault it is to be, as text.
fn faults<T: std::fmt::Debug>(with: impl Fn(&Value) -> Result<T, InvalidField>, rows: &[(Value, &str)]) {
    for (changes, expected) in rows {
        match with(changes) {
            Err(fault) => assert_eq!(fault.to_string(), *expected, "{changes}"),
            Ok(taken) => panic!("{changes}: expected {expected}, got {taken:?}"),
        }
    }
}
