//! From what a node says of its operator's decisions to the configuration of a view.

use ipnet::IpNet;
use lockstep_model::{Family, NodeContext};
use lockstep_view::{DetectLocal, InterfaceName, InvalidInterface, NodePortAddresses, ViewConfig};
use lockstep_wire::v1;

use crate::ctl::Failure;

/// The configuration of a node, and how far it is known.
#[derive(Debug, Clone)]
pub(super) struct Told {
    /// What to plan with.
    pub(super) config: ViewConfig,
    /// False = the node does not say, and usual settings are assumed.
    pub(super) known: bool,
    /// Name of the way in which pods are told from others.
    pub(super) detect_local_mode: &'static str,
    /// What a reader must know about it.
    pub(super) notes: Vec<String>,
}

impl Told {
    /// Reads what the node said in its last Hello. Fails where it was set in a way that this
    /// release does not know: an explanation by other settings would be wrong.
    pub(super) fn read(
        node: &v1::NodeStatus,
        context: &NodeContext,
        settings: Option<&v1::NodeSettings>,
    ) -> Result<Self, Failure> {
        let backend = node.backend.clone().unwrap_or_default();
        let mut config = ViewConfig::new(context.name.clone());
        let families = backend.families().filter_map(|family| match family {
            v1::AddressFamily::Ipv4 => Some(Family::V4),
            v1::AddressFamily::Ipv6 => Some(Family::V6),
            v1::AddressFamily::Unspecified => None,
        });
        let families: Vec<Family> = families.collect();
        if !families.is_empty() {
            config.families = families;
        }
        config.one_pool = backend.kind() == v1::BackendKind::Ipvs;
        config.binds_addresses = config.one_pool;
        let Some(settings) = settings else {
            if backend.kind() == v1::BackendKind::Nftables {
                config.node_port_addresses = NodePortAddresses::Primary;
            }
            let notes = vec![format!(
                "node {} does not say how it is configured: assumed are no way to tell pods from others, and \
                 node ports {}",
                context.name,
                node_ports(&config)
            )];
            return Ok(Self { config, known: false, detect_local_mode: "Unknown", notes });
        };
        let unknown = |field: &str, value: &str| {
            anyhow::anyhow!(
                "node {}: settings.{field}: {value} cannot be explained by this release",
                context.name
            )
        };
        let networks = |field: &str, texts: &[String]| {
            // What a node says is quoted: it must not be able to drive a terminal.
            let network = |text: &String| text.parse().map_err(|_| unknown(field, &format!("{text:?}")));
            texts.iter().map(network).collect::<Result<Vec<IpNet>, _>>()
        };
        let name = &settings.pod_interface;
        let interface = |read: fn(&str) -> Result<InterfaceName, InvalidInterface>| {
            read(name).map_err(|_| unknown("pod_interface", &format!("{name:?}")))
        };
        let mode = settings.detect_local_mode();
        config.detect_local = match mode {
            v1::DetectLocalMode::ClusterCidr => {
                DetectLocal::ClusterCidrs(networks("cluster_cidrs", &settings.cluster_cidrs)?)
            }
            v1::DetectLocalMode::NodeCidr => DetectLocal::NodeCidrs,
            v1::DetectLocalMode::BridgeInterface => {
                DetectLocal::BridgeInterface(interface(InterfaceName::new)?)
            }
            v1::DetectLocalMode::InterfaceNamePrefix => {
                DetectLocal::InterfaceNamePrefix(interface(InterfaceName::prefix)?)
            }
            v1::DetectLocalMode::Unspecified => {
                let number = settings.detect_local_mode.to_string();
                return Err(unknown("detect_local_mode", &number).into());
            }
        };
        config.node_port_addresses = match settings.node_port_addresses() {
            v1::NodePortAddresses::AllLocal => NodePortAddresses::AllLocal,
            v1::NodePortAddresses::Primary => NodePortAddresses::Primary,
            v1::NodePortAddresses::Cidrs => {
                NodePortAddresses::Cidrs(networks("node_port_cidrs", &settings.node_port_cidrs)?)
            }
            v1::NodePortAddresses::Unspecified => {
                let number = settings.node_port_addresses.to_string();
                return Err(unknown("node_port_addresses", &number).into());
            }
        };
        config.masquerade_all = settings.masquerade_all;
        config.masquerade_bit = u8::try_from(settings.masquerade_mark.trailing_zeros() % 32).unwrap_or(0);
        config.localhost_node_ports = settings.loopback_node_ports;
        let detect_local_mode = match mode {
            v1::DetectLocalMode::Unspecified => "Unknown",
            v1::DetectLocalMode::ClusterCidr => "ClusterCIDR",
            v1::DetectLocalMode::NodeCidr => "NodeCIDR",
            v1::DetectLocalMode::BridgeInterface => "BridgeInterface",
            v1::DetectLocalMode::InterfaceNamePrefix => "InterfaceNamePrefix",
        };
        Ok(Self { config, known: true, detect_local_mode, notes: Vec::new() })
    }
}

/// Where node ports answer, for people.
pub(super) fn node_ports(config: &ViewConfig) -> String {
    match &config.node_port_addresses {
        NodePortAddresses::AllLocal => "at every local address".into(),
        NodePortAddresses::Primary => "at the primary addresses".into(),
        NodePortAddresses::Cidrs(cidrs) => {
            let cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
            format!("at the local addresses in {}", cidrs.join(", "))
        }
    }
}
