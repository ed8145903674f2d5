//! A random cluster: every field that a decision depends on, in combinations nobody thought of.

use std::net::IpAddr;

use fastrand::Rng;
use serde_json::{Value, json};

use crate::lab::{Family, Lab, Place};
use crate::traffic::{OTHER_POD_PORT, POD_PORT, Transport};

/// Services of a cluster.
const SERVICES: u16 = 10;
/// First node port that is given away. The API server chooses none of the lowest 86 by itself, as it does for
/// health checks.
const NODE_PORTS: u16 = 30_000;

/// A cluster.
#[derive(Debug)]
pub struct Objects {
    /// All of it.
    pub manifests: String,
    /// Every address and port that leads to a Service, or would where things were otherwise.
    pub doors: Vec<Door>,
}

/// An address and port that somebody may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Door {
    /// Address; `None` = any node's.
    pub address: Option<IpAddr>,
    /// Family.
    pub family: Family,
    /// Port there.
    pub port: u16,
    /// Transport.
    pub transport: Transport,
}

/// The cluster of a seed, in the network of `lab`.
pub fn generate(rng: &mut Rng, lab: &Lab) -> Objects {
    let mut objects = Objects { manifests: String::new(), doors: Vec::new() };
    for number in 1..=SERVICES {
        service(rng, lab, number, &mut objects);
    }
    for family in [Family::V4, Family::V6] {
        // In the ServiceCIDR, and no Service's.
        let address = Some(cluster_ip(family, SERVICES + 1));
        objects.doors.push(Door { address, family, port: 80, transport: Transport::Tcp });
    }
    objects.doors.sort_unstable();
    objects
}

fn service(rng: &mut Rng, lab: &Lab, number: u16, objects: &mut Objects) {
    let families = pick(rng, &[&[Family::V4][..], &[Family::V6], &[Family::V4, Family::V6]]);
    let kind = pick(rng, &["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]);
    let name = format!("random-{number}");
    let cluster_ips: Vec<IpAddr> = families.iter().map(|family| cluster_ip(*family, number)).collect();
    let ports = ports(rng, number, kind != "ClusterIP");
    let external_ips = addresses(rng, families, 1, number);
    let mut spec = json!({
        "type": kind,
        "clusterIP": cluster_ips[0],
        "clusterIPs": cluster_ips,
        "ipFamilies": families.iter().map(Family::to_string).collect::<Vec<_>>(),
        "ipFamilyPolicy": if families.len() == 2 { "RequireDualStack" } else { "SingleStack" },
        "externalIPs": external_ips,
        "internalTrafficPolicy": pick(rng, &["Cluster", "Cluster", "Local"]),
        "ports": ports.iter().map(Port::to_json).collect::<Vec<_>>(),
    });
    let mut doors: Vec<IpAddr> = cluster_ips;
    doors.extend(&external_ips);
    if kind != "ClusterIP" || !external_ips.is_empty() {
        spec["externalTrafficPolicy"] = (pick(rng, &["Cluster", "Local"])).into();
    }
    if rng.u8(..6) == 0 {
        spec["sessionAffinity"] = "ClientIP".into();
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 600}});
    }
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
    });
    if kind == "LoadBalancer" {
        let ranges = source_ranges(rng);
        if !ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = ranges.into();
        }
        let ingress = addresses(rng, families, 100, number);
        doors.extend(&ingress);
        let ingress: Vec<Value> = ingress
            .iter()
            .map(|ip| json!({"ip": ip, "ipMode": pick(rng, &["VIP", "VIP", "VIP", "Proxy"])}))
            .collect();
        object["status"] = json!({"loadBalancer": {"ingress": ingress}});
    }
    object["spec"] = spec;
    objects.add(&object);
    for port in &ports {
        let door =
            |address, family, number| Door { address, family, port: number, transport: port.transport };
        objects.doors.extend(doors.iter().map(|ip| door(Some(*ip), family_of(*ip), port.port)));
        // One that the Service does not have, now and then.
        if rng.u8(..4) == 0 {
            objects.doors.push(door(Some(doors[0]), family_of(doors[0]), 82));
        }
        if let Some(node_port) = port.node_port {
            objects.doors.extend([Family::V4, Family::V6].map(|family| door(None, family, node_port)));
        }
    }
    for family in families {
        slices(rng, lab, &name, *family, &ports, objects);
    }
}

struct Port {
    name: String,
    port: u16,
    target: u16,
    transport: Transport,
    node_port: Option<u16>,
}

impl Port {
    fn to_json(&self) -> Value {
        let mut port = json!({
            "name": self.name, "port": self.port, "targetPort": self.target, "protocol": protocol(self.transport),
        });
        if let Some(node_port) = self.node_port {
            port["nodePort"] = node_port.into();
        }
        port
    }
}

fn ports(rng: &mut Rng, number: u16, node_ports: bool) -> Vec<Port> {
    let transports: &[Transport] = match rng.u8(..5) {
        0 => &[Transport::Udp],
        // One number, two protocols.
        1 => &[Transport::Tcp, Transport::Udp],
        2 => &[Transport::Tcp, Transport::Tcp],
        _ => &[Transport::Tcp],
    };
    let one = |(index, transport): (usize, &Transport)| {
        let other = index == 1 && transports[0] == *transport;
        Port {
            name: format!("p{index}"),
            port: if other { 81 } else { 80 },
            target: if other { OTHER_POD_PORT } else { POD_PORT },
            transport: *transport,
            node_port: node_ports.then_some(NODE_PORTS + 2 * number + u16::from(other)),
        }
    };
    transports.iter().enumerate().map(one).collect()
}

/// One or two slices: some endpoints in the one, some in the other, some in both.
fn slices(rng: &mut Rng, lab: &Lab, service: &str, family: Family, ports: &[Port], objects: &mut Objects) {
    // Now and then everything is on the way out, or there is nothing at all.
    let character = rng.u8(..8);
    let hints = rng.u8(..6);
    let mut lists = [Vec::new(), Vec::new()];
    for pod in lab.pods() {
        if character == 0 || rng.bool() {
            continue;
        }
        let endpoint = endpoint(rng, pod, family, character, hints);
        match rng.u8(..8) {
            0 => lists.iter_mut().for_each(|list| list.push(endpoint.clone())),
            1..4 => lists[1].push(endpoint),
            _ => lists[0].push(endpoint),
        }
    }
    for (index, endpoints) in lists.into_iter().enumerate() {
        if endpoints.is_empty() && index > 0 {
            continue;
        }
        // A slice may lack a port, as while a Deployment that gets a new one is rolled.
        let has = |port: &&Port| index == 0 || port.name == "p0" || service.len().is_multiple_of(2);
        let ports: Vec<Value> = ports
            .iter()
            .filter(has)
            .map(|port| json!({"name": port.name, "port": port.target, "protocol": protocol(port.transport)}))
            .collect();
        let name = format!("{service}-{}-{index}", family.to_string().to_lowercase());
        objects.add(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name, "namespace": "default", "uid": format!("uid-{name}"),
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": family.to_string(),
            "ports": ports,
            "endpoints": endpoints,
        }));
    }
}

fn endpoint(rng: &mut Rng, pod: Place, family: Family, character: u8, hints: u8) -> Value {
    let Place::Pod(node, _) = pod else { return Value::Null };
    let condition = match character {
        1 => 7 + rng.u8(..3),
        _ => rng.u8(..10),
    };
    let conditions = match condition {
        // Shutting down and still serving; no more serving; not ready yet.
        7 => json!({"ready": false, "serving": true, "terminating": true}),
        8 => json!({"ready": false, "serving": false, "terminating": true}),
        9 => json!({"ready": false, "serving": false, "terminating": false}),
        _ => json!({"ready": true, "serving": true, "terminating": false}),
    };
    let mut endpoint = json!({"addresses": [pod.address(family)], "conditions": conditions});
    // One in twelve does not say where it is.
    if rng.u8(..12) > 0 {
        endpoint["nodeName"] = format!("node{node}").into();
    }
    let zone = json!([{"name": format!("zone{node}")}]);
    let other_zone = json!([{"name": format!("zone{}", 1 + node % 3)}]);
    endpoint["hints"] = match hints {
        0 => json!({ "forZones": zone }),
        1 => json!({"forZones": zone, "forNodes": [{"name": format!("node{node}")}]}),
        // One that has none turns the hints of all off.
        2 if rng.u8(..4) > 0 => json!({ "forZones": other_zone }),
        _ => return endpoint,
    };
    endpoint
}

fn source_ranges(rng: &mut Rng) -> Vec<&'static str> {
    const RANGES: [&str; 8] = [
        "10.244.1.0/24",
        "10.200.0.0/24",
        "10.200.0.100/32",
        "fd00:244:1::/48",
        "fd00:200::/64",
        "fd00:200::100/128",
        "0.0.0.0/0",
        "::/0",
    ];
    if rng.bool() {
        return Vec::new();
    }
    let mut ranges: Vec<&str> = (0..1 + rng.u8(..2)).map(|_| pick(rng, &RANGES)).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

fn cluster_ip(family: Family, number: u16) -> IpAddr {
    match family {
        Family::V4 => [10, 96, 1, number.to_le_bytes()[0]].into(),
        Family::V6 => [0xfd00, 0x96, 0, 0, 0, 0, 0, 0x100 + number].into(),
    }
}

/// None to two addresses that a client outside reaches through some node.
fn addresses(rng: &mut Rng, families: &[Family], base: u16, number: u16) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for family in families {
        if rng.bool() {
            continue;
        }
        let last = base + number;
        let via = rng.u8(..3);
        addresses.push(match family {
            Family::V4 => {
                let [a, b, c] = [[192, 0, 2], [198, 51, 100], [203, 0, 113]][usize::from(via)];
                IpAddr::from([a, b, c, last.to_le_bytes()[0]])
            }
            Family::V6 => IpAddr::from([0x2001, 0xdb8, u16::from(via) + 1, 0, 0, 0, 0, last]),
        });
    }
    addresses
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())]
}

fn protocol(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    }
}

/// Family of an address.
pub(crate) fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

impl Objects {
    /// JSON is YAML.
    fn add(&mut self, object: &Value) {
        self.manifests.push_str("---\n");
        self.manifests.push_str(&object.to_string());
        self.manifests.push('\n');
    }
}
