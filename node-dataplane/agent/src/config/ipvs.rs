//! IPVS mode: kube-proxy's flags, and one of our own.

use std::time::Duration;

use clap::Args;
use clap::builder::{BoolishValueParser, PossibleValuesParser};
use ipnet::IpNet;
use lockstep_backend_ipvs::{Options, SCHEDULERS};
use lockstep_kernel::ipvs::Timeouts;

use crate::conntrack::settings::seconds;

/// Flags of IPVS mode.
#[derive(Debug, Clone, Args)]
pub struct IpvsFlags {
    /// IPVS mode: how an endpoint is chosen, by the name of the kernel's scheduler.
    #[arg(long = "ipvs-scheduler", env = "LOCKSTEP_IPVS_SCHEDULER", default_value = "rr",
        value_parser = PossibleValuesParser::new(SCHEDULERS), value_name = "NAME")]
    pub scheduler: String,
    /// IPVS mode: virtual servers in these ranges are somebody else's and stay as they are.
    #[arg(
        long = "ipvs-exclude-cidrs",
        env = "LOCKSTEP_IPVS_EXCLUDE_CIDRS",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    pub exclude_cidrs: Vec<IpNet>,
    /// IPVS mode: sets net.ipv4.conf.all.arp_ignore and arp_announce, so that the node answers ARP only
    /// for addresses of the interface that is asked, and not for those of Services.
    #[arg(long = "ipvs-strict-arp", env = "LOCKSTEP_IPVS_STRICT_ARP",
        value_parser = BoolishValueParser::new())]
    pub strict_arp: bool,
    /// IPVS mode: how long an idle TCP connection is kept; 0 = as the kernel has it.
    #[arg(long = "ipvs-tcp-timeout", env = "LOCKSTEP_IPVS_TCP_TIMEOUT",
        default_value = "0s", value_parser = seconds, value_name = "TIME")]
    pub tcp_timeout: Duration,
    /// IPVS mode: how long a TCP connection is kept after a FIN; 0 = as the kernel has it.
    #[arg(long = "ipvs-tcpfin-timeout", env = "LOCKSTEP_IPVS_TCPFIN_TIMEOUT",
        default_value = "0s", value_parser = seconds, value_name = "TIME")]
    pub tcpfin_timeout: Duration,
    /// IPVS mode: how long an idle UDP flow is kept; 0 = as the kernel has it.
    #[arg(long = "ipvs-udp-timeout", env = "LOCKSTEP_IPVS_UDP_TIMEOUT",
        default_value = "0s", value_parser = seconds, value_name = "TIME")]
    pub udp_timeout: Duration,
    /// IPVS mode, and on leaving it: how long connections to an endpoint or Service that is gone may go
    /// on before they are cut.
    #[arg(long = "ipvs-drain-timeout", env = "LOCKSTEP_IPVS_DRAIN_TIMEOUT",
        default_value = "1h", value_parser = seconds, value_name = "TIME")]
    pub drain_timeout: Duration,
}

impl IpvsFlags {
    /// As the backend takes them.
    pub fn options(&self) -> Options {
        let whole = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        Options {
            scheduler: self.scheduler.as_str().into(),
            exclude: self.exclude_cidrs.clone(),
            strict_arp: self.strict_arp,
            timeouts: Timeouts {
                tcp: whole(self.tcp_timeout),
                tcp_fin: whole(self.tcpfin_timeout),
                udp: whole(self.udp_timeout),
            },
            drain: self.drain_timeout,
        }
    }
}
