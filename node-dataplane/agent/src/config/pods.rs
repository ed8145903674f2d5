//! Which packets are pods': kube-proxy's flags and their values, spelled as it spells them.

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use ipnet::IpNet;
use lockstep_view::{DetectLocal, InterfaceName};

/// Flags that say how pods are told from others.
#[derive(Debug, Clone, Args)]
pub struct PodFlags {
    /// How packets of pods are told from others. Where they can be, others are masqueraded at cluster IPs.
    #[arg(long, env = "LOCKSTEP_DETECT_LOCAL_MODE", default_value = "ClusterCIDR", value_name = "MODE")]
    pub detect_local_mode: DetectLocalMode,
    /// ClusterCIDR: address ranges of the cluster's pods. Without one of a family, its pods are not told.
    #[arg(long, env = "LOCKSTEP_CLUSTER_CIDR", value_delimiter = ',', value_name = "CIDR")]
    pub cluster_cidr: Vec<IpNet>,
    /// BridgeInterface: the bridge that packets of pods come in by.
    #[arg(long, env = "LOCKSTEP_POD_BRIDGE_INTERFACE", value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// InterfaceNamePrefix: how the names of the interfaces begin that packets of pods come in by.
    #[arg(long, env = "LOCKSTEP_POD_INTERFACE_NAME_PREFIX", value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
}

/// How packets of pods are told from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DetectLocalMode {
    /// By source addresses inside --cluster-cidr.
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// By source addresses inside the podCIDRs of this node's Node object, also when they change.
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// By the interface --pod-bridge-interface.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// By interfaces whose names begin with --pod-interface-name-prefix.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

const CIDR: &str = "--cluster-cidr";
const BRIDGE: &str = "--pod-bridge-interface";
const PREFIX: &str = "--pod-interface-name-prefix";

impl PodFlags {
    /// Checks them against each other.
    pub fn check(&self) -> anyhow::Result<DetectLocal> {
        let mode = self.detect_local_mode;
        let mine = match mode {
            DetectLocalMode::ClusterCidr => CIDR,
            DetectLocalMode::NodeCidr => "",
            DetectLocalMode::BridgeInterface => BRIDGE,
            DetectLocalMode::InterfaceNamePrefix => PREFIX,
        };
        let given = [
            (CIDR, !self.cluster_cidr.is_empty(), "ClusterCIDR"),
            (BRIDGE, self.pod_bridge_interface.is_some(), "BridgeInterface"),
            (PREFIX, self.pod_interface_name_prefix.is_some(), "InterfaceNamePrefix"),
        ];
        if let Some((flag, _, of)) = given.into_iter().find(|(flag, given, _)| *given && *flag != mine) {
            bail!("{flag} is for --detect-local-mode {of}, and the mode is {}", mode.name());
        }
        let needed = || format!("--detect-local-mode {} needs {mine}", mode.name());
        match mode {
            DetectLocalMode::ClusterCidr => {
                if let Some(cidr) = self.cluster_cidr.iter().find(|cidr| cidr.trunc() != **cidr) {
                    bail!("{CIDR} {cidr}: the host bits are not zero, did you mean {}?", cidr.trunc());
                }
                Ok(DetectLocal::ClusterCidrs(self.cluster_cidr.clone()))
            }
            DetectLocalMode::NodeCidr => Ok(DetectLocal::NodeCidrs),
            DetectLocalMode::BridgeInterface => {
                let name = self.pod_bridge_interface.as_deref().with_context(needed)?;
                let name = InterfaceName::new(name).with_context(|| format!("{BRIDGE} {name:?}"))?;
                Ok(DetectLocal::BridgeInterface(name))
            }
            DetectLocalMode::InterfaceNamePrefix => {
                let name = self.pod_interface_name_prefix.as_deref().with_context(needed)?;
                let name = InterfaceName::prefix(name).with_context(|| format!("{PREFIX} {name:?}"))?;
                Ok(DetectLocal::InterfaceNamePrefix(name))
            }
        }
    }
}

impl DetectLocalMode {
    /// As on the command line.
    fn name(self) -> &'static str {
        match self {
            DetectLocalMode::ClusterCidr => "ClusterCIDR",
            DetectLocalMode::NodeCidr => "NodeCIDR",
            DetectLocalMode::BridgeInterface => "BridgeInterface",
            DetectLocalMode::InterfaceNamePrefix => "InterfaceNamePrefix",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        pods: PodFlags,
    }

    fn check(arguments: &[&str]) -> Result<DetectLocal, String> {
        let line =
            Line::try_parse_from([&["test"], arguments].concat()).map_err(|error| error.to_string())?;
        line.pods.check().map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn each_mode_takes_its_own_flag() {
        let name = |text| InterfaceName::new(text).unwrap();
        let cidr = || vec!["10.244.0.0/16".parse().unwrap()];
        for (arguments, expected) in [
            (&[][..], DetectLocal::ClusterCidrs(Vec::new())),
            (&["--cluster-cidr=10.244.0.0/16"], DetectLocal::ClusterCidrs(cidr())),
            (
                &["--detect-local-mode=ClusterCIDR", "--cluster-cidr=10.244.0.0/16"],
                DetectLocal::ClusterCidrs(cidr()),
            ),
            (&["--detect-local-mode=NodeCIDR"], DetectLocal::NodeCidrs),
            (
                &["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=br0"],
                DetectLocal::BridgeInterface(name("br0")),
            ),
            (
                &["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cali"],
                DetectLocal::InterfaceNamePrefix(name("cali")),
            ),
        ] {
            assert_eq!(check(arguments), Ok(expected), "{arguments:?}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_named() {
        let by_bridge = "--detect-local-mode=BridgeInterface";
        let by_prefix = "--detect-local-mode=InterfaceNamePrefix";
        let of_node = "--detect-local-mode=NodeCIDR";
        for (arguments, says) in [
            (&[by_bridge][..], "--detect-local-mode BridgeInterface needs --pod-bridge-interface"),
            (&[by_prefix], "--detect-local-mode InterfaceNamePrefix needs --pod-interface-name-prefix"),
            (&[by_bridge, "--pod-bridge-interface="], "--pod-bridge-interface \"\": it is empty"),
            (&[by_bridge, "--pod-bridge-interface=sixteen-letters-"], "16 bytes"),
            (
                &[by_bridge, "--pod-bridge-interface=br/0"],
                "--pod-bridge-interface \"br/0\": '/' cannot be in it",
            ),
            (&[by_prefix, "--pod-interface-name-prefix="], "--pod-interface-name-prefix \"\": it is empty"),
            (&[by_prefix, "--pod-interface-name-prefix=cali+"], "'+' cannot be in it"),
            (&[by_prefix, "--pod-interface-name-prefix=fifteen-letters"], "a prefix has 14 at most"),
            (
                &[of_node, "--cluster-cidr=10.244.0.0/16"],
                "--cluster-cidr is for --detect-local-mode ClusterCIDR, and the mode is NodeCIDR",
            ),
            (
                &["--pod-bridge-interface=br0"],
                "--pod-bridge-interface is for --detect-local-mode BridgeInterface, and the mode is ClusterCIDR",
            ),
            (&[by_bridge, "--pod-interface-name-prefix=cali"], "--pod-interface-name-prefix is for"),
            (
                &["--detect-local-mode=clustercidr"],
                "ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix",
            ),
            (&["--cluster-cidr=10.244.0.1/16"], "did you mean 10.244.0.0/16?"),
        ] {
            let error = check(arguments).unwrap_err();
            assert!(error.contains(says), "{arguments:?}: {error}");
        }
    }
}
