//! Command line and environment: read, checked, and turned into what the agent needs, before
//! anything is opened or touched.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use lockstep_backend_ipvs::Options;
use lockstep_client::transport::{ConfigError, Files, Security, Servers};
use lockstep_view::{DetectLocal, NodePortAddresses};
use tracing_subscriber::EnvFilter;

use crate::conntrack::settings::Settings;

mod ipvs;
mod pods;

pub use ipvs::IpvsFlags;
pub use pods::{DetectLocalMode, PodFlags};

/// The configuration cannot be used.
pub const EXIT_CONFIG: u8 = 2;
/// This node or its kernel cannot do what is asked: no mode works, another agent uses the state
/// directory.
pub const EXIT_UNUSABLE: u8 = 3;
/// The agent itself failed.
pub const EXIT_FAILED: u8 = 1;

const AFTER_HELP: &str = "\
Environment:
  LOCKSTEP_LOG  which log lines are written: off, error, warn, info (default), debug, trace, also per
                module: info,lockstep_client=debug

Exit codes:
  0  ended by SIGTERM or SIGINT (rules stay in force), or cleanup done
  1  the agent failed, or cleanup could not remove everything
  2  a flag or a file it names cannot be used; nothing was touched
  3  this node cannot do it: no mode works, or another agent has the state directory
  130  ended at once by a second signal";

/// Programs Kubernetes Services on this node, as a Lockstep control plane tells it.
#[derive(Debug, Parser)]
#[command(name = "lockstep-node", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// A chore instead of the agent.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The agent's flags.
    #[command(flatten)]
    pub run: RunArguments,
}

/// Chores.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Removes everything from the kernel that Lockstep put there, and nothing else.
    Cleanup(CleanupArguments),
}

/// Flags of `cleanup`.
#[derive(Debug, Args)]
pub struct CleanupArguments {
    /// What to remove: only the rules of this mode. Without it: of every mode.
    #[arg(long, env = "LOCKSTEP_MODE")]
    pub mode: Option<Mode>,
    /// As the agent's.
    #[command(flatten)]
    pub ipvs: CleanupIpvs,
    /// How logs are written.
    #[arg(long, env = "LOCKSTEP_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// What `cleanup` has to know of IPVS mode.
#[derive(Debug, Args)]
pub struct CleanupIpvs {
    /// Virtual servers in these ranges are somebody else's and stay as they are.
    #[arg(
        long = "ipvs-exclude-cidrs",
        env = "LOCKSTEP_IPVS_EXCLUDE_CIDRS",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    pub exclude_cidrs: Vec<IpNet>,
}

/// Flags of the agent.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Control planes: https://host:port, or http://host:port with --insecure.
    #[arg(long, env = "LOCKSTEP_CONTROL_PLANE", value_delimiter = ',', value_name = "URL")]
    pub control_plane: Vec<String>,
    /// Kubernetes name of this node.
    #[arg(long, env = "LOCKSTEP_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// How the kernel is programmed. auto: nftables where a real transaction works, else iptables.
    /// ipvs is never chosen by itself.
    #[arg(long, env = "LOCKSTEP_MODE", default_value = "auto")]
    pub mode: Mode,
    /// Which iptables. auto: the one that already holds rules on this host.
    #[arg(long, env = "LOCKSTEP_IPTABLES_FLAVOUR", default_value = "auto")]
    pub iptables_flavour: IptablesFlavour,
    /// Which packets are pods'.
    #[command(flatten)]
    pub pods: PodFlags,
    /// Where node ports answer: at the node's addresses inside these CIDRs, or `primary`: at the
    /// first address of its Node object. Default: every local address in iptables and IPVS mode,
    /// primary in nftables mode.
    #[arg(
        long,
        env = "LOCKSTEP_NODEPORT_ADDRESSES",
        value_delimiter = ',',
        value_name = "CIDR[,CIDR]|primary"
    )]
    pub nodeport_addresses: Vec<String>,
    /// In iptables mode, node ports answer the node itself at 127.0.0.1 too, where --nodeport-addresses
    /// does not leave it out; sets the sysctl net.ipv4.conf.all.route_localnet.
    #[arg(
        long,
        env = "LOCKSTEP_IPTABLES_LOCALHOST_NODEPORTS",
        default_value_t = true,
        default_missing_value = "true",
        num_args = 0..=1,
        require_equals = true,
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new(),
        value_name = "BOOL"
    )]
    pub iptables_localhost_nodeports: bool,
    /// Settings of IPVS mode.
    #[command(flatten)]
    pub ipvs: IpvsFlags,
    /// Masquerades everything that is sent to a cluster IP.
    #[arg(long, env = "LOCKSTEP_MASQUERADE_ALL", value_parser = BoolishValueParser::new())]
    pub masquerade_all: bool,
    /// The bit of the packet mark, 0 to 31, that means "masquerade", in every mode.
    #[arg(
        long,
        env = "LOCKSTEP_IPTABLES_MASQUERADE_BIT",
        default_value_t = 14,
        value_parser = clap::value_parser!(u8).range(0..=31),
        value_name = "BIT"
    )]
    pub iptables_masquerade_bit: u8,
    /// Directory for what must survive a restart: the last known state.
    #[arg(long, env = "LOCKSTEP_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where /healthz and /livez are served.
    #[arg(long, env = "LOCKSTEP_HEALTHZ", default_value = "0.0.0.0:10256", value_name = "ADDR:PORT")]
    pub healthz: SocketAddr,
    /// Where /metrics and /proxyMode are served.
    #[arg(long, env = "LOCKSTEP_METRICS", default_value = "127.0.0.1:10249", value_name = "ADDR:PORT")]
    pub metrics: SocketAddr,
    /// Settings of connection tracking.
    #[command(flatten)]
    pub conntrack: Settings,
    /// Allows plaintext connections to the control plane.
    #[arg(long, env = "LOCKSTEP_INSECURE", value_parser = BoolishValueParser::new())]
    pub insecure: bool,
    /// Certificate authority of the control plane (PEM). This file and the two below are read anew
    /// for every connection.
    #[arg(long, env = "LOCKSTEP_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Client certificate (PEM).
    #[arg(long, env = "LOCKSTEP_CERT", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Key of the client certificate (PEM).
    #[arg(long, env = "LOCKSTEP_KEY", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// How logs are written.
    #[arg(long, env = "LOCKSTEP_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// How the kernel is programmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Whichever works, nftables first.
    Auto,
    /// A table of nf_tables per family.
    Nftables,
    /// iptables chains of kube-proxy's shape.
    Iptables,
    /// IPVS, ipsets and the interface kube-ipvs0.
    Ipvs,
}

/// Which iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IptablesFlavour {
    /// The one that already holds rules.
    Auto,
    /// iptables-legacy.
    Legacy,
    /// iptables-nft.
    Nft,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Checked configuration of the agent.
#[derive(Debug, Clone)]
pub struct Config {
    /// Kubernetes name of this node.
    pub node_name: String,
    /// Control planes and how they are trusted.
    pub servers: Servers,
    /// As on the command line.
    pub mode: Mode,
    /// As on the command line.
    pub iptables_flavour: IptablesFlavour,
    /// Settings of IPVS mode.
    pub ipvs: Options,
    /// How pods are told from others.
    pub detect_local: DetectLocal,
    /// Where node ports answer; `None` = where the backend's mode has them.
    pub nodeport_addresses: Option<NodePortAddresses>,
    /// As on the command line.
    pub localhost_nodeports: bool,
    /// As on the command line.
    pub masquerade_all: bool,
    /// As on the command line.
    pub masquerade_bit: u8,
    /// For the cache.
    pub state_dir: PathBuf,
    /// Health server.
    pub healthz: SocketAddr,
    /// Metrics server.
    pub metrics: SocketAddr,
    /// Settings of connection tracking.
    pub conntrack: Settings,
}

impl RunArguments {
    /// Checks everything that can be checked without touching the system.
    pub fn check(&self) -> anyhow::Result<Config> {
        let node_name =
            self.node_name.clone().context("--node-name is needed: the node's name in Kubernetes")?;
        if node_name.is_empty() || node_name.len() > 253 {
            bail!("--node-name {node_name:?}: a node's name has 1 to 253 bytes");
        }
        if self.control_plane.is_empty() {
            bail!("--control-plane is needed: https://host:port of one or more control planes");
        }
        let state_dir =
            self.state_dir.clone().context("--state-dir is needed: a directory that survives restarts")?;
        Ok(Config {
            node_name,
            servers: self.servers()?,
            mode: self.mode,
            iptables_flavour: self.iptables_flavour,
            ipvs: self.ipvs.options(),
            detect_local: self.pods.check()?,
            nodeport_addresses: self.nodeport_addresses()?,
            localhost_nodeports: self.iptables_localhost_nodeports,
            masquerade_all: self.masquerade_all,
            masquerade_bit: self.iptables_masquerade_bit,
            state_dir,
            healthz: self.healthz,
            metrics: self.metrics,
            conntrack: self.conntrack.clone(),
        })
    }

    fn nodeport_addresses(&self) -> anyhow::Result<Option<NodePortAddresses>> {
        const PRIMARY: &str = "primary";
        match &self.nodeport_addresses[..] {
            [] => Ok(None),
            [only] if only == PRIMARY => Ok(Some(NodePortAddresses::Primary)),
            all if all.iter().any(|one| one == PRIMARY) => {
                bail!("--nodeport-addresses {}: primary stands alone, without CIDRs", all.join(","))
            }
            all => {
                let cidr = |text: &String| match text.parse::<IpNet>() {
                    Ok(cidr) => Ok(cidr.trunc()),
                    Err(_) => bail!("--nodeport-addresses {text:?}: neither a CIDR nor primary"),
                };
                let cidrs = all.iter().map(cidr).collect::<anyhow::Result<_>>()?;
                Ok(Some(NodePortAddresses::Cidrs(cidrs)))
            }
        }
    }

    fn security(&self) -> anyhow::Result<Security> {
        if self.insecure {
            if self.ca.is_some() || self.cert.is_some() || self.key.is_some() {
                bail!("--insecure cannot be used with --ca, --cert and --key");
            }
            return Ok(Security::Plaintext);
        }
        let ca = self.ca.clone().context("one of --ca FILE and --insecure is needed")?;
        Ok(Security::Tls(Files { ca, identity: self.cert.clone().zip(self.key.clone()) }))
    }

    fn servers(&self) -> anyhow::Result<Servers> {
        let security = self.security()?;
        for url in &self.control_plane {
            match (&security, url.split_once("://")) {
                (Security::Tls(_), Some(("http", _))) => {
                    bail!(
                        "--control-plane {url}: http:// is plaintext, which needs --insecure instead of --ca"
                    )
                }
                (Security::Plaintext, Some(("https", _))) => {
                    bail!(
                        "--control-plane {url}: https:// is TLS, which needs --ca FILE instead of --insecure"
                    )
                }
                _ => {}
            }
        }
        Servers::new(&self.control_plane, &security).map_err(|error| {
            let flags = match error {
                ConfigError::Empty | ConfigError::Url { .. } => "--control-plane",
                ConfigError::Credentials(_) => "--ca, --cert, --key",
            };
            anyhow::Error::new(error).context(flags)
        })
    }
}

impl LogFormat {
    /// Sends the log to standard error. `LOCKSTEP_LOG` filters; without it: info and worse.
    pub fn install(self) {
        let asked = std::env::var("LOCKSTEP_LOG").unwrap_or_default();
        let parsed =
            if asked.trim().is_empty() { Ok(EnvFilter::new("info")) } else { EnvFilter::try_new(&asked) };
        let fault = parsed.as_ref().err().map(ToString::to_string);
        let filter = parsed.unwrap_or_else(|_| EnvFilter::new("info"));
        let colours = std::io::stderr().is_terminal();
        let log =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
        match self {
            LogFormat::Text => log.init(),
            LogFormat::Json => log.json().init(),
        }
        if let Some(fault) = fault {
            tracing::warn!(
                LOCKSTEP_LOG = asked,
                fault,
                "the log filter cannot be read, logging info and worse"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: [&str; 8] = [
        "lockstep-node",
        "--node-name=node-a",
        "--state-dir=/tmp/x",
        "--control-plane=http://a:1,http://b:2",
        "--insecure",
        "--cluster-cidr=10.244.0.0/16,fd00::/48",
        "--mode=nftables",
        "--log-format=json",
    ];

    fn check(arguments: &[&str]) -> Result<Config, String> {
        let parsed = Arguments::try_parse_from(arguments).map_err(|error| error.to_string())?;
        parsed.run.check().map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_fixed_command_line_is_understood() {
        let config = check(&GOOD).unwrap();
        assert!(matches!(config.detect_local, DetectLocal::ClusterCidrs(cidrs) if cidrs.len() == 2));
        assert_eq!(config.healthz, "0.0.0.0:10256".parse().unwrap());
        assert_eq!(config.metrics, "127.0.0.1:10249".parse().unwrap());
        assert_eq!(config.mode, Mode::Nftables);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let without = |flag: &str| {
            let rest: Vec<&str> = GOOD.into_iter().filter(|argument| !argument.starts_with(flag)).collect();
            check(&rest).unwrap_err()
        };
        assert!(without("--node-name").contains("--node-name"));
        assert!(without("--state-dir").contains("--state-dir"));
        assert!(without("--control-plane").contains("--control-plane"));
        assert!(without("--insecure").contains("--ca"));
        let with = |argument: &'static str| check(&[&GOOD[..], &[argument]].concat()).unwrap_err();
        assert!(with("--cluster-cidr=10.244.0.1/16").contains("10.244.0.0/16"));
        let says = with("--control-plane=https://c:3");
        assert!(says.contains("https://c:3") && says.contains("--ca"), "{says}");
        assert!(with("--ca=/nonexistent").contains("--insecure"));
        let mut magic = GOOD;
        magic[6] = "--mode=magic";
        assert!(check(&magic).unwrap_err().contains("magic"));
        assert!(with("--healthz=here").contains("healthz"));
    }

    #[test]
    fn node_ports_at_localhost_are_on_unless_they_are_turned_off() {
        for (arguments, on) in [
            (&[][..], true),
            (&["--iptables-localhost-nodeports"], true),
            (&["--iptables-localhost-nodeports=true"], true),
            (&["--iptables-localhost-nodeports=false"], false),
        ] {
            assert_eq!(check(&[&GOOD[..], arguments].concat()).unwrap().localhost_nodeports, on);
        }
        assert!(check(&[&GOOD[..], &["--iptables-localhost-nodeports=2"]].concat()).is_err());
    }

    #[test]
    fn node_port_addresses_are_cidrs_or_primary() {
        let with = |argument: &'static str| check(&[&GOOD[..], &[argument]].concat());
        let of = |argument| with(argument).unwrap().nodeport_addresses;
        assert_eq!(check(&GOOD).unwrap().nodeport_addresses, None);
        assert_eq!(of("--nodeport-addresses=primary"), Some(NodePortAddresses::Primary));
        let cidrs = ["10.0.0.0/8", "fd00::/64"].map(|cidr| cidr.parse().unwrap()).to_vec();
        assert_eq!(
            of("--nodeport-addresses=10.1.2.3/8,fd00::/64"),
            Some(NodePortAddresses::Cidrs(cidrs)),
            "host bits mean nothing, as for kube-proxy"
        );
        for (value, says) in [
            ("--nodeport-addresses=10.0.0.1", "10.0.0.1"),
            ("--nodeport-addresses=primary,10.0.0.0/8", "primary stands alone"),
            ("--nodeport-addresses=", "neither a CIDR nor primary"),
            ("--iptables-masquerade-bit=32", "--iptables-masquerade-bit"),
        ] {
            let error = with(value).unwrap_err();
            assert!(error.contains(says), "{value}: {error}");
        }
        let config =
            check(&[&GOOD[..], &["--masquerade-all", "--iptables-masquerade-bit=3"]].concat()).unwrap();
        assert_eq!((config.masquerade_all, config.masquerade_bit), (true, 3));
        assert_eq!(check(&GOOD).unwrap().masquerade_bit, 14);
    }

    #[test]
    fn a_missing_certificate_file_is_named() {
        let mut arguments = GOOD;
        (arguments[3], arguments[4]) = ("--control-plane=https://a:1", "--ca=/nonexistent/ca.pem");
        assert!(check(&arguments).unwrap_err().contains("/nonexistent/ca.pem"));
    }

    #[test]
    fn a_plaintext_url_with_an_authority_is_told_what_it_needs() {
        let mut arguments = GOOD;
        arguments[4] = "--ca=/nonexistent/ca.pem";
        let says = check(&arguments).unwrap_err();
        assert!(says.contains("http://a:1: ") && says.contains("--insecure"), "{says}");
    }

    #[test]
    fn an_authority_without_a_certificate_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "not a certificate").unwrap();
        let flag = format!("--ca={}", file.path().display());
        let mut arguments =
            ["lockstep-node", "--node-name=a", "--state-dir=/x", "--control-plane=https://a:1"].to_vec();
        arguments.push(&flag);
        assert!(check(&arguments).unwrap_err().contains("no PEM certificate"));
    }

    #[test]
    fn cleanup_takes_a_mode() {
        let parsed = Arguments::try_parse_from(["lockstep-node", "cleanup", "--mode", "iptables"]).unwrap();
        assert!(matches!(
            parsed.command,
            Some(Command::Cleanup(CleanupArguments { mode: Some(Mode::Iptables), .. }))
        ));
    }
}
