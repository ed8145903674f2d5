//! What the operator decides of IPVS mode, and the kernel's settings that come of it.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use lockstep_kernel::ipvs::Timeouts;
use lockstep_kernel::sysctl::{Ensured, SysctlError, Tree};

/// Names of the kernel's schedulers: each is a module of its own.
pub const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "mh", "ovf", "fo", "twos"];

/// What the operator decides.
#[derive(Debug, Clone)]
pub struct Options {
    /// One of [`SCHEDULERS`].
    pub scheduler: Arc<str>,
    /// Virtual servers in these ranges are somebody else's, whatever else speaks for us.
    pub exclude: Vec<IpNet>,
    /// Answers to ARP come from the interface that has the address only, so others do not hear of
    /// addresses of Services.
    pub strict_arp: bool,
    /// Seconds after which idle connections are forgotten; 0 = as the kernel has it.
    pub timeouts: Timeouts,
    /// How long an endpoint that is no longer wanted may stay for its connections.
    pub drain: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scheduler: "rr".into(),
            exclude: Vec::new(),
            strict_arp: false,
            timeouts: Timeouts { tcp: 0, tcp_fin: 0, udp: 0 },
            drain: Duration::from_secs(3600),
        }
    }
}

/// What IPVS mode needs of the kernel's settings, for a kernel of this version.
///
/// `conn_reuse_mode` at 1 delays a client that uses a port again by a second where `conntrack` is on,
/// and with 0 an older kernel than 5.9 is without that delay but may use an endpoint of weight 0 again:
/// the lesser evil, which kube-proxy chose too. From 5.9 on 1, the kernel's own value, is right.
fn wanted(release: (u32, u32), strict_arp: bool) -> Vec<(&'static str, &'static str)> {
    let mut all = vec![
        ("net/ipv4/vs/conntrack", "1"),
        ("net/ipv4/vs/expire_nodest_conn", "1"),
        ("net/ipv4/vs/expire_quiescent_template", "1"),
        ("net/ipv4/ip_forward", "1"),
    ];
    if ((4, 1)..(5, 9)).contains(&release) {
        all.push(("net/ipv4/vs/conn_reuse_mode", "0"));
    }
    if strict_arp {
        all.extend([("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")]);
    }
    all
}

/// Writes those that have another value. An error names the first that cannot be as it has to be.
pub(crate) fn set(tree: &Tree, release: (u32, u32), strict_arp: bool) -> Result<(), SysctlError> {
    for (key, value) in wanted(release, strict_arp) {
        match tree.ensure(key, value)? {
            Ensured::Kept => {}
            Ensured::Written { before } => tracing::info!(key, value, before, "sysctl written"),
            Ensured::ReadOnly { stays } => {
                let source = std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem);
                let doing = format!("write {value} instead of {stays}");
                return Err(SysctlError { key: key.to_owned(), doing, source });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reuse_of_ports_depends_on_the_kernel() {
        let reuse = |release| {
            let all = wanted(release, false);
            all.into_iter().find(|(key, _)| key.ends_with("conn_reuse_mode")).map(|(_, value)| value)
        };
        assert_eq!(
            [(4, 0), (4, 1), (5, 8), (5, 9), (6, 1)].map(reuse),
            [None, Some("0"), Some("0"), None, None]
        );
        assert_eq!(wanted((6, 1), true).len(), wanted((6, 1), false).len() + 2);
    }

    #[test]
    fn a_setting_that_cannot_be_written_is_an_error_by_name() {
        let root = std::env::temp_dir().join(format!("lockstep-ipvs-{}", std::process::id()));
        let vs = root.join("net/ipv4/vs");
        std::fs::create_dir_all(&vs).unwrap();
        for key in ["conntrack", "expire_nodest_conn"] {
            std::fs::write(vs.join(key), "0\n").unwrap();
        }
        let error = set(&Tree::at(&root), (6, 1), false).unwrap_err();
        assert_eq!(error.key, "net/ipv4/vs/expire_quiescent_template");
        assert_eq!(std::fs::read_to_string(vs.join("conntrack")).unwrap(), "1");
        std::fs::remove_dir_all(&root).unwrap();
    }
}
