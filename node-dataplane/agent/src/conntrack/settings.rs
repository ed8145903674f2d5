//! The kernel's settings for connection tracking, as kube-proxy makes them: once, at start, each
//! read before it is written. One that cannot be made is said in the log and is no reason not to
//! go on.

use std::time::Duration;

use clap::Args;
use clap::builder::BoolishValueParser;
use lockstep_kernel::conntrack::{Conntrack, Kernel};
use lockstep_kernel::cpus;
use lockstep_kernel::sysctl::{self, Ensured, SysctlError};

/// What the operator wants. Zero leaves a setting alone.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Settings {
    /// Flows to track at most, per processor; 0 = leave the limit alone. The limit is one of the
    /// whole machine.
    #[arg(
        long = "conntrack-max-per-core",
        env = "LOCKSTEP_CONNTRACK_MAX_PER_CORE",
        default_value_t = 32_768,
        value_name = "N"
    )]
    pub max_per_core: u32,
    /// The limit is at least this, however few processors there are; not used where the above is 0.
    #[arg(
        long = "conntrack-min",
        env = "LOCKSTEP_CONNTRACK_MIN",
        default_value_t = 131_072,
        value_name = "N"
    )]
    pub min: u32,
    /// How long an idle TCP connection is tracked; 0 = leave it alone.
    #[arg(long = "conntrack-tcp-timeout-established", env = "LOCKSTEP_CONNTRACK_TCP_TIMEOUT_ESTABLISHED",
        default_value = "24h", value_parser = seconds, value_name = "TIME")]
    pub tcp_established: Duration,
    /// How long a TCP connection that one side has closed is tracked; 0 = leave it alone.
    #[arg(long = "conntrack-tcp-timeout-close-wait", env = "LOCKSTEP_CONNTRACK_TCP_TIMEOUT_CLOSE_WAIT",
        default_value = "1h", value_parser = seconds, value_name = "TIME")]
    pub tcp_close_wait: Duration,
    /// Track TCP packets that are out of window instead of calling them invalid.
    #[arg(long = "conntrack-tcp-be-liberal", env = "LOCKSTEP_CONNTRACK_TCP_BE_LIBERAL",
        value_parser = BoolishValueParser::new())]
    pub tcp_be_liberal: bool,
    /// How long a UDP flow without an answer is tracked; 0 = leave it alone.
    #[arg(long = "conntrack-udp-timeout", env = "LOCKSTEP_CONNTRACK_UDP_TIMEOUT",
        default_value = "0s", value_parser = seconds, value_name = "TIME")]
    pub udp: Duration,
    /// How long a UDP flow with answers is tracked; 0 = leave it alone.
    #[arg(long = "conntrack-udp-timeout-stream", env = "LOCKSTEP_CONNTRACK_UDP_TIMEOUT_STREAM",
        default_value = "0s", value_parser = seconds, value_name = "TIME")]
    pub udp_stream: Duration,
}

/// The limit; its hash table has a quarter as many buckets at least.
const MAX: &str = "net/netfilter/nf_conntrack_max";

impl Settings {
    /// What is to be written under `/proc/sys` on a machine with so many processors.
    fn sysctls(&self, cpus: u32) -> Vec<(&'static str, u64)> {
        let max = match self.max_per_core {
            0 => 0,
            per_core => (u64::from(per_core) * u64::from(cpus)).max(self.min.into()),
        };
        let all = [
            (MAX, max),
            ("net/netfilter/nf_conntrack_tcp_timeout_established", self.tcp_established.as_secs()),
            ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", self.tcp_close_wait.as_secs()),
            ("net/netfilter/nf_conntrack_tcp_be_liberal", u64::from(self.tcp_be_liberal)),
            ("net/netfilter/nf_conntrack_udp_timeout", self.udp.as_secs()),
            ("net/netfilter/nf_conntrack_udp_timeout_stream", self.udp_stream.as_secs()),
        ];
        all.into_iter().filter(|(_, value)| *value != 0).collect()
    }

    /// Makes the settings.
    pub fn apply(&self) {
        let wanted = self.sysctls(cpus::online());
        if let Some((key, _)) = wanted.first()
            && matches!(sysctl::read(key), Ok(None))
        {
            // The settings come with the module, which comes with the first question. Whether it
            // came is seen in a moment.
            let _ = Kernel::open().and_then(|mut kernel| kernel.flows(false, 0, &mut |_| {}));
        }
        let mut faults = Vec::new();
        for (key, value) in wanted {
            let made = note(key, value, sysctl::ensure(key, &value.to_string()), &mut faults);
            if key == MAX && made {
                let buckets = value / 4;
                let raised = sysctl::raise_module_parameter("nf_conntrack", "hashsize", buckets);
                note("nf_conntrack hashsize", buckets, raised, &mut faults);
            }
        }
        if !faults.is_empty() {
            tracing::warn!(
                faults = faults.join("; "),
                "settings of connection tracking stay as they are; flags --conntrack-* say what is wanted, 0 leaves one alone"
            );
        }
    }
}

/// True where the setting is as it should be.
fn note(key: &str, value: u64, result: Result<Ensured, SysctlError>, faults: &mut Vec<String>) -> bool {
    match result {
        Ok(Ensured::Kept) => return true,
        Ok(Ensured::Written { before }) => {
            tracing::info!(setting = key, before, value, "set");
            return true;
        }
        Ok(Ensured::ReadOnly { stays }) => {
            faults.push(format!("{key}: read-only, {stays} instead of {value}"))
        }
        Err(error) => faults.push(error.to_string()),
    }
    false
}

/// `24h`, `1h30m`, `90s`, `0`: whole seconds, as the kernel takes them.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    const FORM: &str = "is not a time like 24h, 1h30m or 90s";
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0_u64);
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).ok_or(FORM)?;
        let unit = match rest.as_bytes()[digits] {
            b'h' => 3_600,
            b'm' => 60,
            b's' => 1,
            _ => return Err(FORM.to_owned()),
        };
        let number: u64 = rest[..digits].parse().map_err(|_| FORM.to_owned())?;
        total = number.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or("is too long")?;
        rest = &rest[digits + 1..];
    }
    // The kernel keeps it in an int.
    match i32::try_from(total) {
        Ok(_) if !text.is_empty() => Ok(Duration::from_secs(total)),
        Ok(_) => Err(FORM.to_owned()),
        Err(_) => Err("is too long".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn parse(arguments: &[&str]) -> Settings {
        Line::try_parse_from([&["test"], arguments].concat()).unwrap().settings
    }

    #[test]
    fn defaults_are_kube_proxys() {
        let of = |cpus| parse(&[]).sysctls(cpus);
        assert_eq!(
            of(8),
            [
                ("net/netfilter/nf_conntrack_max", 262_144),
                ("net/netfilter/nf_conntrack_tcp_timeout_established", 86_400),
                ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", 3_600),
            ]
        );
        assert_eq!(of(2)[0].1, 131_072, "never less than the minimum");
        assert_eq!(parse(&["--conntrack-min", "0"]).sysctls(2)[0].1, 65_536);
    }

    #[test]
    fn zero_leaves_alone() {
        let flags = [
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0s",
        ];
        assert_eq!(parse(&flags).sysctls(64), []);
        let flags = [
            "--conntrack-udp-timeout=40s",
            "--conntrack-udp-timeout-stream=2m1s",
            "--conntrack-tcp-be-liberal",
        ];
        let given: Vec<u64> = parse(&flags).sysctls(1).iter().skip(3).map(|(_, value)| *value).collect();
        assert_eq!(given, [1, 40, 121]);
    }

    #[test]
    fn times_are_read_as_kube_proxys_flags_are() {
        for (text, expected) in
            [("24h", 86_400), ("24h0m0s", 86_400), ("1h30m", 5_400), ("0", 0), ("90s", 90)]
        {
            assert_eq!(seconds(text), Ok(Duration::from_secs(expected)), "{text}");
        }
        for text in ["", "24", "h", "1d", "-1s", "1h30", "100ms", "999999999999h", "600000h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
