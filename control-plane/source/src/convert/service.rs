//! Services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use lockstep_model::{
    Family, InvalidField, LoadBalancerIngress, Port, Service, ServiceKey, ServicePort, ServiceType,
    TrafficDistribution, TrafficPolicy, canonical,
};

use super::field::{self, Use, at, invalid};
use super::{Conversion, HEADLESS_LABEL, Outcome, PROXY_NAME_LABEL, Skip, within_size};

/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY_SECONDS: i32 = 10_800;
const MAX_AFFINITY_SECONDS: i32 = 86_400;

/// A Kubernetes Service as the model has it. A missing namespace is `default`.
pub fn service(object: &core::Service) -> Conversion<Service> {
    let empty = core::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    if let Some(skip) = skip(object, spec) {
        return Ok(Outcome::Skip(skip));
    }
    let key = key(object)?;
    let service_type = service_type(spec)?;
    let cluster_ips = match cluster_ips(spec)? {
        Some(cluster_ips) => cluster_ips,
        None => return Ok(Outcome::Skip(Skip::NoClusterIp)),
    };
    let external_ips = external_ips(spec)?;
    let external_traffic_policy = external_traffic_policy(spec, service_type, !external_ips.is_empty())?;
    let mut service = Service {
        key,
        service_type,
        cluster_ips,
        external_ips,
        load_balancer_ingress: load_balancer_ingress(object)?,
        ports: ports(spec, service_type)?,
        internal_traffic_policy: traffic_policy(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
        )?,
        external_traffic_policy,
        traffic_distribution: traffic_distribution(spec.traffic_distribution.as_deref()),
        client_ip_affinity_seconds: affinity(spec)?,
        load_balancer_source_ranges: source_ranges(spec)?,
        health_check_node_port: health_check_node_port(spec, service_type, external_traffic_policy)?,
        publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or(false),
    };
    service.canonicalise();
    within_size(&canonical::service(&service))?;
    Ok(Outcome::Object(service))
}

fn skip(object: &core::Service, spec: &core::ServiceSpec) -> Option<Skip> {
    let labelled = |label| object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label));
    let first_ip = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty());
    let first_ip = first_ip.or(spec.cluster_ips.as_ref().and_then(|ips| ips.first()).map(String::as_str));
    if labelled(PROXY_NAME_LABEL) {
        Some(Skip::OtherProxy)
    } else if spec.type_.as_deref() == Some("ExternalName") {
        Some(Skip::ExternalName)
    } else if labelled(HEADLESS_LABEL) || first_ip == Some("None") {
        Some(Skip::Headless)
    } else {
        None
    }
}

fn key(object: &core::Service) -> Result<ServiceKey, InvalidField> {
    let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let namespace = at(field::label(namespace), namespace, || "metadata.namespace".into())?;
    let name = at(field::label(name), name, || "metadata.name".into())?;
    Ok(ServiceKey::new(namespace, name))
}

fn service_type(spec: &core::ServiceSpec) -> Result<ServiceType, InvalidField> {
    match spec.type_.as_deref() {
        None | Some("ClusterIP") => Ok(ServiceType::ClusterIp),
        Some("NodePort") => Ok(ServiceType::NodePort),
        Some("LoadBalancer") => Ok(ServiceType::LoadBalancer),
        Some(other) => {
            Err(invalid("spec.type", other, "is not ClusterIP, NodePort, LoadBalancer or ExternalName"))
        }
    }
}

/// `None` where there is none. `spec.clusterIP` counts where `spec.clusterIPs` is empty, and
/// has to be the first of them where it is not.
fn cluster_ips(spec: &core::ServiceSpec) -> Result<Option<Vec<IpAddr>>, InvalidField> {
    let single = spec.cluster_ip.as_deref().filter(|text| !text.is_empty());
    let all = spec.cluster_ips.as_deref().unwrap_or_default();
    let Some(first) = all.first() else {
        let Some(text) = single else { return Ok(None) };
        let address = at(field::usable_address(text, Use::Routable), text, || "spec.clusterIP".into())?;
        return Ok(Some(vec![address]));
    };
    if let Some(single) = single
        && single != first
    {
        return Err(invalid(
            "spec.clusterIP",
            single,
            format!("is not the first of spec.clusterIPs ({first})"),
        ));
    }
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(all.len());
    for (index, text) in all.iter().enumerate() {
        let path = || format!("spec.clusterIPs[{index}]");
        let address = at(field::usable_address(text, Use::Routable), text, path)?;
        if addresses.iter().any(|other| Family::of(*other) == Family::of(address)) {
            return Err(invalid(path(), text, "is the second address of its family"));
        }
        addresses.push(address);
    }
    Ok(Some(addresses))
}

fn external_ips(spec: &core::ServiceSpec) -> Result<Vec<IpAddr>, InvalidField> {
    let texts = spec.external_ips.iter().flatten().enumerate();
    texts
        .map(|(index, text)| {
            at(field::usable_address(text, Use::Routable), text, || format!("spec.externalIPs[{index}]"))
        })
        .collect()
}

/// Entries with a host name only are for DNS, not for nodes.
fn load_balancer_ingress(object: &core::Service) -> Result<Vec<LoadBalancerIngress>, InvalidField> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let mut result: Vec<LoadBalancerIngress> = Vec::new();
    for (index, ingress) in
        status.and_then(|status| status.ingress.as_ref()).into_iter().flatten().enumerate()
    {
        let path = |field| format!("status.loadBalancer.ingress[{index}].{field}");
        let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        let ip = at(field::usable_address(text, Use::Ingress), text, || path("ip"))?;
        let proxy_mode = match ingress.ip_mode.as_deref() {
            None | Some("VIP") => false,
            Some("Proxy") => true,
            Some(other) => return Err(invalid(path("ipMode"), other, "is not VIP or Proxy")),
        };
        if result.iter().any(|other| other.ip == ip && other.proxy_mode != proxy_mode) {
            return Err(invalid(path("ipMode"), text, "is listed with two modes"));
        }
        result.push(LoadBalancerIngress { ip, proxy_mode });
    }
    Ok(result)
}

fn ports(spec: &core::ServiceSpec, service_type: ServiceType) -> Result<Vec<ServicePort>, InvalidField> {
    let given = spec.ports.as_deref().unwrap_or_default();
    if given.is_empty() {
        return Err(invalid("spec.ports", "", "is empty: a Service that is not headless has a port"));
    }
    let mut seen = Seen::default();
    given.iter().enumerate().map(|(index, port)| seen.port(index, port, service_type)).collect()
}

/// What ports of one Service have to have for themselves.
#[derive(Default)]
struct Seen {
    names: BTreeSet<String>,
    ports: BTreeMap<(lockstep_model::Protocol, Port), usize>,
    node_ports: BTreeMap<(lockstep_model::Protocol, Port), usize>,
}

impl Seen {
    fn port(
        &mut self,
        index: usize,
        given: &core::ServicePort,
        service_type: ServiceType,
    ) -> Result<ServicePort, InvalidField> {
        let path = |field: &str| format!("spec.ports[{index}].{field}");
        let name = given.name.as_deref().unwrap_or_default();
        if !name.is_empty() {
            at(field::label(name), name, || path("name"))?;
        }
        if !self.names.insert(name.to_owned()) {
            return Err(invalid(path("name"), name, "is the name of another port too"));
        }
        let protocol = given.protocol.as_deref();
        let protocol = at(field::protocol(protocol), protocol.unwrap_or_default(), || path("protocol"))?;
        let port = at(field::port(given.port), given.port, || path("port"))?;
        if let Some(other) = self.ports.insert((protocol, port), index) {
            let reason = format!("is the {protocol} port of spec.ports[{other}] too");
            return Err(invalid(path("port"), port, reason));
        }
        let number = given.node_port.unwrap_or_default();
        let node_port = at(field::optional_port(given.node_port), number, || path("nodePort"))?;
        if let Some(node_port) = node_port {
            if service_type == ServiceType::ClusterIp {
                return Err(invalid(path("nodePort"), node_port, "is not for a Service of type ClusterIP"));
            }
            if let Some(other) = self.node_ports.insert((protocol, node_port), index) {
                let reason = format!("is the {protocol} node port of spec.ports[{other}] too");
                return Err(invalid(path("nodePort"), node_port, reason));
            }
        }
        let app_protocol = given.app_protocol.as_deref().filter(|text| !text.is_empty());
        if let Some(text) = app_protocol
            && !(text.len() <= 317 && text.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(invalid(path("appProtocol"), text, "is not a qualified name"));
        }
        Ok(ServicePort {
            protocol,
            port,
            name: name.into(),
            node_port,
            app_protocol: app_protocol.map(Into::into),
        })
    }
}

fn traffic_policy(path: &str, text: Option<&str>) -> Result<TrafficPolicy, InvalidField> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(invalid(path, other, "is not Cluster or Local")),
    }
}

/// Local says nothing where there is no way in from outside.
fn external_traffic_policy(
    spec: &core::ServiceSpec,
    service_type: ServiceType,
    has_external_ips: bool,
) -> Result<TrafficPolicy, InvalidField> {
    let policy = traffic_policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref())?;
    let external = service_type != ServiceType::ClusterIp || has_external_ips;
    Ok(if external { policy } else { TrafficPolicy::Cluster })
}

/// For display, so that a value of a later Kubernetes is no fault.
fn traffic_distribution(text: Option<&str>) -> Option<TrafficDistribution> {
    match text? {
        "PreferClose" | "PreferSameZone" => Some(TrafficDistribution::PreferSameZone),
        "PreferSameNode" => Some(TrafficDistribution::PreferSameNode),
        _ => None,
    }
}

fn affinity(spec: &core::ServiceSpec) -> Result<Option<u32>, InvalidField> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => return Err(invalid("spec.sessionAffinity", other, "is not None or ClientIP")),
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(DEFAULT_AFFINITY_SECONDS);
    match u32::try_from(seconds) {
        Ok(good) if (1..=MAX_AFFINITY_SECONDS).contains(&seconds) => Ok(Some(good)),
        _ => Err(invalid(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            seconds,
            format!("is not between 1 and {MAX_AFFINITY_SECONDS}"),
        )),
    }
}

fn source_ranges(spec: &core::ServiceSpec) -> Result<Vec<IpNet>, InvalidField> {
    let texts = spec.load_balancer_source_ranges.iter().flatten().enumerate();
    texts
        .map(|(index, text)| {
            at(field::cidr(text), text, || format!("spec.loadBalancerSourceRanges[{index}]"))
        })
        .collect()
}

/// Checked always, kept only where nodes answer on it.
fn health_check_node_port(
    spec: &core::ServiceSpec,
    service_type: ServiceType,
    policy: TrafficPolicy,
) -> Result<Option<Port>, InvalidField> {
    let number = spec.health_check_node_port;
    let port =
        at(field::optional_port(number), number.unwrap_or_default(), || "spec.healthCheckNodePort".into())?;
    let answered = service_type == ServiceType::LoadBalancer && policy == TrafficPolicy::Local;
    Ok(port.filter(|_| answered))
}
