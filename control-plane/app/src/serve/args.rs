use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Parser, ValueEnum};

use super::certificates::Files;

/// One control plane per cluster: reads Services, EndpointSlices, Nodes and ServiceCIDRs once
/// and streams versioned service state to the dataplane of every node.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "lockstep-control-plane",
    version,
    after_help = "Exit codes: 0 stopped by SIGTERM or SIGINT; 1 it could not start or go on, the last line of \
                  the log says why; 2 the command line is wrong.\n\
                  Every option can also be set by the environment variable named with it. LOCKSTEP_LOG sets \
                  what is logged (default: info; RUST_LOG's syntax)."
)]
pub(super) struct Args {
    /// Where the state comes from: `kubernetes`, or `files:DIR` for a directory of manifests
    #[arg(long, env = "LOCKSTEP_SOURCE", value_name = "kubernetes|files:DIR")]
    pub(super) source: SourceArg,

    /// Kubeconfig for `--source kubernetes` [default: $KUBECONFIG, ~/.kube/config or the pod's service account]
    #[arg(long, env = "LOCKSTEP_KUBECONFIG", value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,

    /// Address that nodes and lockstepctl connect to
    #[arg(long, env = "LOCKSTEP_LISTEN", value_name = "ADDR:PORT")]
    pub(super) listen: SocketAddr,

    /// Address for /healthz, /livez, /readyz and /metrics [default: not served]
    #[arg(long, env = "LOCKSTEP_HTTP", value_name = "ADDR:PORT")]
    pub(super) http: Option<SocketAddr>,

    #[command(flatten)]
    pub(super) tls: TlsArgs,

    /// Longest silence on a stream, in seconds; nodes give up after three
    #[arg(
        long = "heartbeat-interval",
        env = "LOCKSTEP_HEARTBEAT_INTERVAL",
        value_name = "SECONDS",
        default_value_t = 15,
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    heartbeat_seconds: u64,

    /// Format of the log on stderr
    #[arg(long, env = "LOCKSTEP_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
}

/// How connections are protected.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct TlsArgs {
    /// Serve plaintext: everybody who reaches the port sees and may claim everything
    #[arg(long, env = "LOCKSTEP_INSECURE", value_parser = BoolishValueParser::new())]
    pub(super) insecure: bool,

    /// Certificate chain of the server, PEM. This file and the two below may be renewed at any time:
    /// new connections use what is there, streams that are up go on
    #[arg(long, env = "LOCKSTEP_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(super) tls_cert: Option<PathBuf>,

    /// Private key of the server, PEM
    #[arg(long, env = "LOCKSTEP_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_key: Option<PathBuf>,

    /// Certificate authorities of clients, PEM: clients must have a certificate, and a node may
    /// only speak for a node that its certificate names (common name NAME or system:node:NAME,
    /// DNS name NAME, or a URI that ends in /node/NAME)
    #[arg(long, env = "LOCKSTEP_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub(super) client_ca: Option<PathBuf>,
}

/// Where the state comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SourceArg {
    Kubernetes,
    Files(PathBuf),
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people
    Text,
    /// One JSON object per line
    Json,
}

impl FromStr for SourceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("kubernetes", _) => Ok(SourceArg::Kubernetes),
            (_, Some(("files", ""))) => Err("files: needs a directory".into()),
            (_, Some(("files", directory))) => Ok(SourceArg::Files(directory.into())),
            _ => Err("is neither `kubernetes` nor `files:DIR`".into()),
        }
    }
}

impl fmt::Display for SourceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceArg::Kubernetes => f.write_str("kubernetes"),
            SourceArg::Files(directory) => write!(f, "files:{}", directory.display()),
        }
    }
}

impl Args {
    /// What the parser cannot see.
    pub(super) fn check(&self) -> Result<(), String> {
        match (&self.source, &self.kubeconfig) {
            (SourceArg::Files(_), Some(_)) => Err("--kubeconfig needs --source kubernetes".into()),
            _ => self.tls.check(),
        }
    }

    pub(super) fn heartbeat_interval(&self) -> Duration {
        Duration::from_secs(self.heartbeat_seconds)
    }
}

impl TlsArgs {
    /// By value: to the parser, LOCKSTEP_INSECURE=0 is the option all the same.
    fn check(&self) -> Result<(), String> {
        let files = self.tls_cert.is_some() || self.tls_key.is_some() || self.client_ca.is_some();
        match (self.insecure, files) {
            (true, true) => {
                Err("--insecure cannot be used with --tls-cert, --tls-key and --client-ca".into())
            }
            (false, false) => Err("one of --tls-cert FILE (with --tls-key) and --insecure is needed".into()),
            _ => Ok(()),
        }
    }

    /// Where the certificates are; `None` = plaintext.
    pub(super) fn files(&self) -> Option<Files> {
        Some(Files {
            certificate: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
            client_ca: self.client_ca.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        let words = std::iter::once("lockstep-control-plane").chain(line.split_whitespace());
        let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
        args.check().map(|()| args)
    }

    #[test]
    fn the_fixed_command_lines_are_taken() {
        let files =
            parse("--source files:/srv/m --listen 127.0.0.1:7443 --http 127.0.0.1:7080 --insecure").unwrap();
        assert_eq!(files.source, SourceArg::Files("/srv/m".into()));
        assert_eq!((files.listen.port(), files.http.unwrap().port()), (7443, 7080));
        let tls = "--tls-cert c.pem --tls-key k.pem --client-ca ca.pem";
        let kubernetes =
            parse(&format!("--source kubernetes --kubeconfig k --listen [::]:7443 {tls}")).unwrap();
        assert_eq!(kubernetes.source, SourceArg::Kubernetes);
        assert_eq!(kubernetes.tls.client_ca, Some("ca.pem".into()));
    }

    #[test]
    fn wrong_combinations_are_refused_by_name() {
        let refused = [
            ("--source kubernetes --listen [::]:1", "--insecure"),
            (
                "--source kubernetes --listen [::]:1 --insecure --tls-cert c --tls-key k",
                "cannot be used with",
            ),
            ("--source kubernetes --listen [::]:1 --tls-cert c", "--tls-key"),
            ("--source kubernetes --listen [::]:1 --insecure --client-ca c", "--tls-cert"),
            ("--source files: --listen [::]:1 --insecure", "files: needs a directory"),
            ("--source etcd --listen [::]:1 --insecure", "neither `kubernetes` nor `files:DIR`"),
            ("--source kubernetes --listen nowhere --insecure", "--listen"),
            (
                "--source files:d --kubeconfig k --listen [::]:1 --insecure",
                "--kubeconfig needs --source kubernetes",
            ),
            ("--source kubernetes --listen [::]:1 --insecure --heartbeat-interval 0", "--heartbeat-interval"),
            ("--listen [::]:1 --insecure", "--source"),
        ];
        for (line, says) in refused {
            let error = parse(line).expect_err(line);
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn the_command_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
