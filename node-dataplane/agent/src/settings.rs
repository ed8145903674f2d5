//! What the agent says in Hello of the operator's decisions, so that others can tell what the
//! node is meant to do.

use lockstep_view::{DetectLocal, NodePortAddresses, ViewConfig};
use lockstep_wire::v1;

/// The message of a configuration.
pub(crate) fn to_wire(config: &ViewConfig) -> v1::NodeSettings {
    let mut settings = v1::NodeSettings {
        masquerade_all: config.masquerade_all,
        masquerade_mark: 1 << (config.masquerade_bit % 32),
        loopback_node_ports: config.localhost_node_ports,
        ..Default::default()
    };
    let mode = match &config.detect_local {
        DetectLocal::ClusterCidrs(cidrs) => {
            settings.cluster_cidrs = cidrs.iter().map(ToString::to_string).collect();
            v1::DetectLocalMode::ClusterCidr
        }
        DetectLocal::NodeCidrs => v1::DetectLocalMode::NodeCidr,
        DetectLocal::BridgeInterface(name) => {
            settings.pod_interface = name.to_string();
            v1::DetectLocalMode::BridgeInterface
        }
        DetectLocal::InterfaceNamePrefix(prefix) => {
            settings.pod_interface = prefix.to_string();
            v1::DetectLocalMode::InterfaceNamePrefix
        }
    };
    settings.detect_local_mode = mode.into();
    let addresses = match &config.node_port_addresses {
        NodePortAddresses::AllLocal => v1::NodePortAddresses::AllLocal,
        NodePortAddresses::Primary => v1::NodePortAddresses::Primary,
        NodePortAddresses::Cidrs(cidrs) => {
            settings.node_port_cidrs = cidrs.iter().map(ToString::to_string).collect();
            v1::NodePortAddresses::Cidrs
        }
    };
    settings.node_port_addresses = addresses.into();
    settings
}

#[cfg(test)]
mod tests {
    use lockstep_view::InterfaceName;

    use super::*;

    #[test]
    fn every_decision_is_told() {
        let config = ViewConfig {
            detect_local: DetectLocal::ClusterCidrs(vec![
                "10.244.0.0/16".parse().unwrap(),
                "fd00:244::/32".parse().unwrap(),
            ]),
            localhost_node_ports: true,
            node_port_addresses: NodePortAddresses::Cidrs(vec!["192.0.2.0/24".parse().unwrap()]),
            masquerade_all: true,
            masquerade_bit: 15,
            ..ViewConfig::new("n1")
        };
        let told = to_wire(&config);
        assert_eq!(
            told,
            v1::NodeSettings {
                detect_local_mode: v1::DetectLocalMode::ClusterCidr.into(),
                cluster_cidrs: vec!["10.244.0.0/16".into(), "fd00:244::/32".into()],
                pod_interface: String::new(),
                node_port_addresses: v1::NodePortAddresses::Cidrs.into(),
                node_port_cidrs: vec!["192.0.2.0/24".into()],
                masquerade_all: true,
                masquerade_mark: 0x8000,
                loopback_node_ports: true,
            }
        );
        for (addresses, number) in [
            (NodePortAddresses::AllLocal, v1::NodePortAddresses::AllLocal),
            (NodePortAddresses::Primary, v1::NodePortAddresses::Primary),
        ] {
            let told = to_wire(&ViewConfig { node_port_addresses: addresses, ..ViewConfig::new("n1") });
            assert_eq!((told.node_port_addresses(), told.node_port_cidrs.len()), (number, 0));
            assert_eq!(told.masquerade_mark, 0x4000);
        }
        let name = |text| InterfaceName::new(text).unwrap();
        for (detect_local, mode, interface) in [
            (DetectLocal::NodeCidrs, v1::DetectLocalMode::NodeCidr, ""),
            (DetectLocal::BridgeInterface(name("cni0")), v1::DetectLocalMode::BridgeInterface, "cni0"),
            (
                DetectLocal::InterfaceNamePrefix(name("cali")),
                v1::DetectLocalMode::InterfaceNamePrefix,
                "cali",
            ),
        ] {
            let told = to_wire(&ViewConfig { detect_local, ..ViewConfig::new("n1") });
            assert_eq!((told.detect_local_mode(), told.pod_interface.as_str()), (mode, interface));
            assert_eq!(told.cluster_cidrs.len(), 0);
        }
    }
}
