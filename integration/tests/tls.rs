//! TLS from the real control plane to the product's own client: who is let in, and what people
//! are told where somebody is not. Needs no root.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use lockstep_client::transport::Security;
use lockstep_integration::control_plane::ControlPlane;
use lockstep_integration::follower::Follower;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tracing_subscriber::util::SubscriberInitExt;

const PATIENCE: Duration = Duration::from_secs(60);
const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n\
                       spec: {type: ClusterIP, clusterIPs: [10.96.0.1], ports: [{port: 80}]}\n";

/// A certificate authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Certificate and key, PEM.
type Pair = (Vec<u8>, Vec<u8>);

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    fn issue(&self, common: &str, expired: bool) -> Result<Pair> {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, common);
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.issuer)?.pem().into_bytes(), key.serialize_pem().into_bytes()))
    }

    /// What a client trusts and shows.
    fn client(&self, identity: Option<Pair>) -> Security {
        Security::Tls { ca: self.pem.clone().into_bytes(), identity }
    }
}

/// A control plane with one Service and this certificate; with a `client_ca` it wants one too.
async fn control_plane(
    directory: &TempDir,
    own: Pair,
    client_ca: Option<&Authority>,
) -> Result<(ControlPlane, String)> {
    let path = |name: &str| directory.path().join(name).display().to_string();
    fs::create_dir(directory.path().join("manifests"))?;
    fs::write(directory.path().join("manifests/web.yaml"), SERVICE)?;
    fs::write(path("cert"), own.0)?;
    fs::write(path("key"), own.1)?;
    let source = format!("files:{}", path("manifests"));
    let (certificate, key, ca) = (path("cert"), path("key"), path("client-ca"));
    let mut arguments = vec!["--source", &source, "--tls-cert", &certificate, "--tls-key", &key];
    if let Some(authority) = client_ca {
        fs::write(Path::new(&ca), &authority.pem)?;
        arguments.extend(["--client-ca", &ca]);
    }
    let mut control_plane = ControlPlane::start(&arguments).await?;
    control_plane.ready().await?;
    let url = format!("https://{}", control_plane.grpc());
    Ok((control_plane, url))
}

/// What this thread logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Collects until the guard is dropped.
    fn collect() -> (Self, impl Drop) {
        let log = Self::default();
        let out = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || out.clone()).finish();
        (log, subscriber.set_default())
    }

    /// Lines that speak of the control plane.
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.0.lock().expect("no writer panics")).into_owned();
        text.lines().filter(|line| line.contains("control plane")).map(str::to_owned).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no writer panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Passes connections on to the control plane and counts them.
async fn counted(control_plane: &ControlPlane) -> Result<(String, watch::Receiver<usize>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("https://{}", listener.local_addr()?);
    let (count, counted) = watch::channel(0);
    let target = control_plane.grpc();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            count.send_modify(|count| *count += 1);
            tokio::spawn(async move {
                if let Ok(mut far) = TcpStream::connect(target).await {
                    // Its end is the end of the connection, whichever way it came.
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    });
    Ok((url, counted))
}

/// Follows through a counting proxy until it was tried several times, and returns what was logged:
/// one line, however often it was tried.
async fn told(control_plane: &ControlPlane, node: &str, security: &Security) -> Result<String> {
    let (log, _guard) = Log::collect();
    let (url, mut tries) = counted(control_plane).await?;
    let follower = Follower::start(node, &[url], security)?;
    tokio::time::timeout(PATIENCE, tries.wait_for(|count| *count >= 4)).await??;
    let seen = follower.seen();
    assert!(!seen.confirmed && seen.keys.is_empty(), "nothing was served: {seen:?}");
    let lines = log.lines();
    let troubles: Vec<&String> = lines.iter().filter(|line| line.contains("no connection to")).collect();
    assert_eq!(troubles.len(), 1, "one line for one trouble: {lines:#?}");
    Ok(troubles[0].clone())
}

#[tokio::test]
async fn a_server_certificate_is_enough_where_no_other_is_asked_for() -> Result<()> {
    let (directory, authority) = (tempfile::tempdir()?, Authority::new()?);
    let (_control_plane, url) =
        control_plane(&directory, authority.issue("control-plane", false)?, None).await?;
    let mut node = Follower::start("node-1", &[url], &authority.client(None))?;
    let seen = node.until("state over TLS", PATIENCE, |seen| seen.confirmed).await;
    assert!(seen.keys.contains("default/web"), "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn with_a_client_ca_a_node_speaks_for_itself_only() -> Result<()> {
    let (directory, authority) = (tempfile::tempdir()?, Authority::new()?);
    let own = authority.issue("control-plane", false)?;
    let (control_plane, url) = control_plane(&directory, own, Some(&authority)).await?;
    let identity = authority.client(Some(authority.issue("system:node:node-1", false)?));
    let mut node = Follower::start("node-1", &[url], &identity)?;
    node.until("state over mutual TLS", PATIENCE, |seen| seen.confirmed).await;

    let line = told(&control_plane, "node-2", &identity).await?;
    let says = "hello.node_name: \"node-2\" is not in the client certificate, which names";
    assert!(line.replace('\\', "").contains(says) && line.contains("node-1"), "{line}");

    let line = told(&control_plane, "node-1", &authority.client(None)).await?;
    assert!(line.contains("CertificateRequired"), "{line}");

    let stranger = Authority::new()?.issue("node-1", false)?;
    let line = told(&control_plane, "node-1", &authority.client(Some(stranger))).await?;
    assert!(line.contains("alert"), "{line}");
    let late = authority.issue("node-1", true)?;
    let line = told(&control_plane, "node-1", &authority.client(Some(late))).await?;
    assert!(line.contains("CertificateExpired"), "{line}");
    assert!(node.seen().lost.is_empty(), "the real node-1 was never in doubt");
    Ok(())
}

#[tokio::test]
async fn a_server_that_cannot_be_trusted_is_not_followed() -> Result<()> {
    let (directory, authority) = (tempfile::tempdir()?, Authority::new()?);
    let (late, _) = control_plane(&directory, authority.issue("control-plane", true)?, None).await?;
    let line = told(&late, "node-1", &authority.client(None)).await?;
    assert!(line.contains("certificate expired"), "{line}");

    let directory = tempfile::tempdir()?;
    let (good, _) = control_plane(&directory, authority.issue("control-plane", false)?, None).await?;
    let line = told(&good, "node-1", &Authority::new()?.client(None)).await?;
    assert!(line.contains("invalid peer certificate: "), "{line}");
    Ok(())
}
