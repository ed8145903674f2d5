use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Parser, Subcommand, ValueEnum};
use lockstep_view::InterfaceName;
use lockstep_wire::v1;

/// Asks a Lockstep control plane what is programmed where: is this Service in force on every
/// node, and if not, where and why?
#[derive(Debug, Clone, Parser)]
#[command(
    name = "lockstepctl",
    version,
    after_help = "Exit codes: 0 done; 1 no connection, or the server refused; 2 the command line is wrong; 3 there \
                  is no such Service or node; 4 a wait timed out, the output names the nodes that are not done.\n\
                  Every option can also be set by the environment variable named with it; --behind, --failing, \
                  --node, --from, --interface and --count, which say what one call is about, have none.\n\n\
                  Examples:\n  \
                  lockstepctl --server http://127.0.0.1:7443 --insecure status\n  \
                  lockstepctl --server https://control-plane:7443 --ca ca.pem wait default/web --timeout 30s\n  \
                  lockstepctl explain --node node1 --from 10.244.1.5 tcp 10.96.0.10:80"
)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) connection: Connection,

    /// Format of the output; the names in json and yaml are stable, tables are for people
    #[arg(
        short,
        long,
        global = true,
        env = "LOCKSTEP_OUTPUT",
        value_name = "FORMAT",
        default_value = "table"
    )]
    pub(super) output: Format,

    #[command(subcommand)]
    pub(super) command: Command,
}

/// Where the server is and how to talk to it.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Connection {
    /// URL of the control plane
    #[arg(
        long,
        global = true,
        env = "LOCKSTEP_SERVER",
        value_name = "URL",
        default_value = "https://127.0.0.1:7443"
    )]
    pub(super) server: String,

    /// Talk plaintext
    #[arg(long, global = true, env = "LOCKSTEP_INSECURE", value_parser = BoolishValueParser::new())]
    pub(super) insecure: bool,

    /// Certificate authorities of the server, PEM
    #[arg(long, global = true, env = "LOCKSTEP_CA", value_name = "FILE")]
    pub(super) ca: Option<PathBuf>,

    /// Certificate chain of this client, PEM, where the server wants one
    #[arg(long, global = true, env = "LOCKSTEP_CERT", value_name = "FILE", requires = "key")]
    pub(super) cert: Option<PathBuf>,

    /// Private key of this client, PEM
    #[arg(long, global = true, env = "LOCKSTEP_KEY", value_name = "FILE", requires = "cert")]
    pub(super) key: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub(super) enum Command {
    /// The head, the nodes, who is behind and since when
    Status,
    /// Every Service with its endpoints and on how many nodes it is verified
    Services {
        /// Only this namespace
        #[arg(short, long, env = "LOCKSTEP_NAMESPACE")]
        namespace: Option<String>,
    },
    /// One Service with its endpoints, and the nodes on which it is not verified
    Service {
        /// Which, as NAMESPACE/NAME
        #[arg(value_name = "NS/NAME")]
        service: ServiceName,
    },
    /// Every node and how far it has come
    Nodes {
        /// Only nodes that have not verified the head
        #[arg(long)]
        behind: bool,
        /// Only nodes with failures
        #[arg(long)]
        failing: bool,
    },
    /// One node with its facts, its last report and its failures
    Node {
        /// Which
        name: String,
    },
    /// What is not in force on some nodes, and the source objects in quarantine
    Failures {
        /// Only this namespace
        #[arg(short, long, env = "LOCKSTEP_NAMESPACE")]
        namespace: Option<String>,
    },
    /// What a node does with a new connection, decision by decision, and whether that is in force.
    ///
    /// It is worked out here, from the state that the control plane has now and the settings that
    /// the node has told, by the same code as the node's. No packet is sent.
    ///
    /// Whatever becomes of the connection is an answer, exit code 0: also that no Service has the
    /// address, in which case the node leaves the packet alone. No such node is exit code 3.
    Explain(Question),
    /// Convergence, one line per change; ends with Ctrl-C
    Watch {
        /// Shortest time between two lines
        #[arg(
            long,
            env = "LOCKSTEP_INTERVAL",
            value_name = "TIME",
            default_value = "1s",
            value_parser = duration
        )]
        interval: Duration,
        /// End after so many lines
        #[arg(long, value_name = "LINES")]
        count: Option<u64>,
    },
    /// Waits until a Service (without one: the whole state) as it is now has come to every node.
    ///
    /// As it is now: its last change that the control plane has read. A Service that was deleted is
    /// waited for until it is gone everywhere; one that nobody has heard of is exit code 3 after two
    /// seconds, so a wait right after `kubectl apply` or `kubectl delete` does what it says.
    Wait {
        /// Which, as NAMESPACE/NAME; none = everything
        #[arg(value_name = "NS/NAME")]
        service: Option<ServiceName>,
        /// How far it must have come
        #[arg(long, env = "LOCKSTEP_LEVEL", default_value = "verified")]
        level: WaitLevel,
        /// How long to wait
        #[arg(
            long,
            env = "LOCKSTEP_TIMEOUT",
            value_name = "TIME",
            default_value = "30s",
            value_parser = duration
        )]
        timeout: Duration,
    },
}

/// Which connection to explain.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Question {
    /// The node that the packet comes to first, or starts on
    #[arg(long)]
    pub(super) node: String,
    /// Address of the client, as that node sees it
    #[arg(long, value_name = "ADDRESS")]
    pub(super) from: IpAddr,
    /// Interface of the node that the packet comes in by, where pods are told by it. Without it: by
    /// none of theirs
    #[arg(long, value_name = "NAME", value_parser = interface)]
    pub(super) interface: Option<InterfaceName>,
    /// Transport protocol
    #[arg(value_name = "PROTOCOL")]
    pub(super) protocol: Transport,
    /// Address and port that the client dials: 10.96.0.10:80, [fd00::10]:80
    #[arg(value_name = "ADDRESS:PORT")]
    pub(super) to: SocketAddr,
}

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

/// Format of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Aligned columns
    Table,
    /// One JSON document; one per line where there are several
    Json,
    /// One YAML document
    Yaml,
}

/// How far something must have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum WaitLevel {
    /// The node has it
    Received,
    /// The kernel has it
    Applied,
    /// It was read back from the kernel
    Verified,
}

/// `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServiceName {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl std::str::FromStr for ServiceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.into(), name: name.into() })
            }
            _ => Err("is not NAMESPACE/NAME".into()),
        }
    }
}

impl WaitLevel {
    pub(super) fn to_wire(self) -> v1::AckLevel {
        match self {
            WaitLevel::Received => v1::AckLevel::Received,
            WaitLevel::Applied => v1::AckLevel::Applied,
            WaitLevel::Verified => v1::AckLevel::Verified,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            WaitLevel::Received => "received",
            WaitLevel::Applied => "applied",
            WaitLevel::Verified => "verified",
        }
    }
}

fn interface(text: &str) -> Result<InterfaceName, String> {
    InterfaceName::new(text).map_err(|error| error.to_string())
}

/// `500ms`, `30s`, `5m`, `1h`; at most a day.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("is not a time like 500ms, 30s, 5m or 1h".into()),
    };
    let number: u64 = number.parse().map_err(|_| "is not a time like 500ms, 30s, 5m or 1h".to_owned())?;
    let total = number.checked_mul(millis).map(Duration::from_millis);
    total.filter(|total| *total <= Duration::from_secs(86_400)).ok_or_else(|| "is more than a day".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        let words = std::iter::once("lockstepctl").chain(line.split_whitespace());
        Args::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn options_without_an_environment_variable_are_named() {
        use clap::CommandFactory;
        let command = Args::command();
        let own = command.get_subcommands().chain([&command]).flat_map(clap::Command::get_arguments);
        let without: Vec<&str> =
            own.filter(|it| it.get_env().is_none()).filter_map(|it| it.get_long()).collect();
        let list = |quote: &str| {
            let names: Vec<String> = without.iter().map(|name| format!("{quote}--{name}{quote}")).collect();
            let (last, others) = names.split_last().unwrap();
            format!("{} and {last}", others.join(", "))
        };
        let help = command.get_after_help().unwrap().to_string();
        assert!(help.contains(&format!("; {}, which say", list(""))), "{without:?}\n{help}");
        let readme = include_str!("../../../../README.md");
        assert!(readme.contains(&format!("(but for {} of `lockstepctl`", list("`"))), "{without:?}");
    }

    #[test]
    fn options_go_before_or_after_the_command() {
        let before = parse("--server http://h:1 --insecure -o json wait a/b --timeout 5m").unwrap();
        let after = parse("wait a/b --timeout 5m --server http://h:1 --insecure -o json").unwrap();
        for args in [before, after] {
            assert_eq!((args.connection.server.as_str(), args.output), ("http://h:1", Format::Json));
            let Command::Wait { service, level, timeout } = args.command else { panic!("{args:?}") };
            assert_eq!(service.unwrap(), ServiceName { namespace: "a".into(), name: "b".into() });
            assert_eq!((level, timeout), (WaitLevel::Verified, Duration::from_secs(300)));
        }
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for line in [
            "service web",
            "service a/b/c",
            "wait --timeout 30",
            "wait --timeout 25h",
            "wait --level programmed",
            "--cert x status",
            "-o xml status",
            "explain --from 10.0.0.1 tcp 10.96.0.10:80",
            "explain --node n1 tcp 10.96.0.10:80",
            "explain --node n1 --from 10.0.0.1 tcp 10.96.0.10",
            "explain --node n1 --from 10.0.0.1 icmp 10.96.0.10:80",
            "explain --node n1 --from web tcp 10.96.0.10:80",
            "",
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        assert!(duration("s").is_err() && duration("-1s").is_err() && duration("").is_err());
    }
}
