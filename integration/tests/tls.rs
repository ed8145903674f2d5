//! TLS from the real control plane to the product's own client: who is let in, what people are
//! told where somebody is not, and what happens when certificates are renewed. Needs no root.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use lockstep_client::transport::Security;
use lockstep_integration::certificates::{Authority, Pair, Secret};
use lockstep_integration::control_plane::ControlPlane;
use lockstep_integration::follower::{Follower, Seen};
use lockstep_integration::leftovers::Directory;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tracing_subscriber::util::SubscriberInitExt;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// What certificates here are for.
const HOST: &str = "127.0.0.1";

/// A control plane with one Service that shows what is in `secret`; `mutual` = and wants its
/// clients to be of the same authority.
async fn control_plane(directory: &Path, secret: &Secret, mutual: bool) -> Result<(ControlPlane, String)> {
    let manifests = directory.join("manifests");
    fs::create_dir(&manifests)?;
    fs::write(manifests.join("web.yaml"), service("web", 1))?;
    let mut arguments = vec![format!("--source=files:{}", manifests.display())];
    arguments.extend(secret.server_flags(mutual));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut control_plane = ControlPlane::start(&arguments).await?;
    control_plane.ready().await?;
    let url = format!("https://{}", control_plane.grpc());
    Ok((control_plane, url))
}

fn service(name: &str, address: u8) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{type: ClusterIP, clusterIPs: [10.96.0.{address}], ports: [{{port: 80}}]}}\n"
    )
}

/// For the address that the control plane is reached at here.
fn issue(authority: &Authority, common: &str) -> Result<Pair> {
    authority.issue(common, &[HOST])
}

/// A directory with what a client of this authority trusts and shows.
fn client(directory: &Path, authority: &Authority, pair: Option<&Pair>) -> Result<(Secret, Security)> {
    let place = tempfile::Builder::new().prefix("client-").tempdir_in(directory)?.keep();
    let secret = Secret::new(place, authority, pair)?;
    let security = secret.client(pair.is_some());
    Ok((secret, security))
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

    /// Lines with this text.
    fn containing(&self, what: &str) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.0.lock().expect("no writer panics")).into_owned();
        text.lines().filter(|line| line.contains(what)).map(str::to_owned).collect()
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
    let mut lines = log.containing("control plane");
    ensure!(
        lines.len() == 1 && lines[0].contains("no connection to"),
        "one line for one trouble: {lines:#?}"
    );
    Ok(lines.remove(0))
}

/// In TLS 1.3 the server's reason can get lost behind the end of the connection; then it is said
/// what that may mean.
fn names(line: &str, reason: &str) -> bool {
    line.contains(reason) || line.contains("are the client certificate and its key right?")
}

#[tokio::test]
async fn a_server_certificate_is_enough_where_no_other_is_asked_for() -> Result<()> {
    let (directory, authority) = (Directory::new("lockstep-test-")?, Authority::new()?);
    let own =
        Secret::new(directory.path().join("own"), &authority, Some(&issue(&authority, "control-plane")?))?;
    let (_control_plane, url) = control_plane(directory.path(), &own, false).await?;
    let (_, security) = client(directory.path(), &authority, None)?;
    let mut node = Follower::start("node-1", &[url], &security)?;
    let seen = node.until("state over TLS", PATIENCE, |seen| seen.confirmed).await;
    assert!(seen.keys.contains("default/web"), "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn with_a_client_ca_a_node_speaks_for_itself_only() -> Result<()> {
    let (directory, authority) = (Directory::new("lockstep-test-")?, Authority::new()?);
    let directory = directory.path();
    let own = Secret::new(directory.join("own"), &authority, Some(&issue(&authority, "control-plane")?))?;
    let (control_plane, url) = control_plane(directory, &own, true).await?;
    let (_, identity) = client(directory, &authority, Some(&issue(&authority, "system:node:node-1")?))?;
    let mut node = Follower::start("node-1", &[url], &identity)?;
    node.until("state over mutual TLS", PATIENCE, |seen| seen.confirmed).await;

    let line = told(&control_plane, "node-2", &identity).await?;
    let says = "hello.node_name: \"node-2\" is not in the client certificate, which names";
    assert!(line.replace('\\', "").contains(says) && line.contains("node-1"), "{line}");

    let (_, nobody) = client(directory, &authority, None)?;
    let line = told(&control_plane, "node-1", &nobody).await?;
    assert!(names(&line, "CertificateRequired"), "{line}");

    let (_, stranger) = client(directory, &authority, Some(&issue(&Authority::new()?, "node-1")?))?;
    let line = told(&control_plane, "node-1", &stranger).await?;
    assert!(names(&line, "alert"), "{line}");
    let (_, late) = client(directory, &authority, Some(&authority.issue_expired("node-1", &[HOST])?))?;
    let line = told(&control_plane, "node-1", &late).await?;
    assert!(names(&line, "CertificateExpired"), "{line}");
    assert!(node.seen().lost.is_empty(), "the real node-1 was never in doubt");
    Ok(())
}

#[tokio::test]
async fn a_server_that_cannot_be_trusted_is_not_followed() -> Result<()> {
    let (directory, authority) = (Directory::new("lockstep-test-")?, Authority::new()?);
    let directory = directory.path();
    let late = authority.issue_expired("control-plane", &[HOST])?;
    let mut own = Secret::new(directory.join("own"), &authority, Some(&late))?;
    let (mut control_plane, _) = control_plane(directory, &own, false).await?;
    let (_, trusting) = client(directory, &authority, None)?;
    let line = told(&control_plane, "node-1", &trusting).await?;
    assert!(line.contains("certificate expired"), "{line}");

    own.replace(&authority, Some(&issue(&authority, "control-plane")?))?;
    control_plane.restart().await?;
    let (_, strange) = client(directory, &Authority::new()?, None)?;
    let line = told(&control_plane, "node-1", &strange).await?;
    assert!(line.contains("invalid peer certificate: "), "{line}");
    Ok(())
}

/// Waits until the control plane has said this so many times.
async fn says(control_plane: &ControlPlane, what: &str, times: usize) -> Result<()> {
    let count = || control_plane.log().matches(what).count();
    let said = async {
        while count() < times {
            tokio::time::sleep(POLL).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, said).await.is_ok();
    ensure!(in_time && count() == times, "{times} times {what:?} in\n{}", control_plane.log());
    Ok(())
}

const RENEWED: &str = "renewed certificates are in force";
const UNUSABLE: &str = "the certificates before stay in force";

#[tokio::test]
async fn renewed_certificates_are_taken_up_and_streams_go_on() -> Result<()> {
    let (directory, old, new) = (Directory::new("lockstep-test-")?, Authority::new()?, Authority::new()?);
    let directory = directory.path();
    let mut own = Secret::new(directory.join("own"), &old, Some(&issue(&old, "control-plane")?))?;
    let (control_plane, url) = control_plane(directory, &own, true).await?;
    let urls = [url];
    let (_, of_old) = client(directory, &old, Some(&issue(&old, "node-1")?))?;
    let mut first = Follower::start("node-1", &urls, &of_old)?;
    first.until("state with the old certificates", PATIENCE, |seen| seen.confirmed).await;

    own.replace(&new, Some(&issue(&new, "control-plane")?))?;
    says(&control_plane, RENEWED, 1).await?;
    let (_, of_new) = client(directory, &new, Some(&issue(&new, "node-2")?))?;
    let mut second = Follower::start("node-2", &urls, &of_new)?;
    second.until("state with the new certificates", PATIENCE, |seen| seen.confirmed).await;
    let line = told(&control_plane, "node-3", &of_old).await?;
    assert!(line.contains("invalid peer certificate: "), "the old authority is not in force: {line}");

    // The stream that was up before carries on.
    fs::write(directory.join("manifests/shop.yaml"), service("shop", 2))?;
    for node in [&mut first, &mut second] {
        let has_it = |seen: &Seen| seen.keys.contains("default/shop");
        let seen = node.until("a change after the renewal", PATIENCE, has_it).await;
        assert!(seen.lost.is_empty(), "{seen:?}");
    }
    Ok(())
}

#[tokio::test]
async fn unusable_certificates_leave_the_good_ones_in_force_and_are_said_once() -> Result<()> {
    let (directory, authority) = (Directory::new("lockstep-test-")?, Authority::new()?);
    let directory = directory.path();
    let good = issue(&authority, "control-plane")?;
    let mut own = Secret::new(directory.join("own"), &authority, Some(&good))?;
    let (control_plane, url) = control_plane(directory, &own, true).await?;
    let urls = [url];
    let half = Pair { certificate: good.certificate[..200].to_owned(), ..good.clone() };
    let other = Pair { key: issue(&authority, "control-plane")?.key, ..good.clone() };
    for (bad, so_far) in [(Some(&half), 1), (Some(&other), 2), (None, 3)] {
        own.replace(&authority, bad)?;
        says(&control_plane, UNUSABLE, so_far).await?;
        let node = format!("node-{so_far}");
        let (_, security) = client(directory, &authority, Some(&issue(&authority, &node)?))?;
        let mut node = Follower::start(&node, &urls, &security)?;
        node.until("state with the certificates before", PATIENCE, |seen| seen.confirmed).await;
    }
    let log = control_plane.log();
    for why in ["certificate chain cannot be read", "KeyMismatch", "tls.crt: No such file"] {
        assert!(log.contains(why), "{why:?} in\n{log}");
    }
    own.replace(&authority, Some(&good))?;
    says(&control_plane, "the certificate files are again what is in force", 1).await?;
    own.replace(&authority, Some(&issue(&authority, "control-plane")?))?;
    says(&control_plane, RENEWED, 1).await?;
    says(&control_plane, UNUSABLE, 3).await
}

#[tokio::test]
async fn a_client_uses_renewed_files_at_its_next_connection() -> Result<()> {
    let (directory, old, new) = (Directory::new("lockstep-test-")?, Authority::new()?, Authority::new()?);
    let directory = directory.path();
    let mut own = Secret::new(directory.join("own"), &old, Some(&issue(&old, "control-plane")?))?;
    let (mut control_plane, url) = control_plane(directory, &own, true).await?;
    let good = issue(&old, "node-1")?;
    let (mut secret, security) = client(directory, &old, Some(&good))?;
    let (log, _guard) = Log::collect();
    let mut node = Follower::start("node-1", &[url], &security)?;
    node.until("state with the old certificates", PATIENCE, |seen| seen.confirmed).await;

    // What cannot be used does not keep it from coming back.
    secret.replace(&old, Some(&Pair { key: issue(&old, "node-1")?.key, ..good }))?;
    control_plane.restart().await?;
    let back = |times: usize| move |seen: &Seen| seen.confirmed && seen.lost.len() >= times;
    node.until("state with the certificates before", PATIENCE, back(1)).await;
    let unusable = log.containing("the certificates before stay in use");
    assert!(unusable.len() == 1 && unusable[0].contains("KeyMismatch"), "{unusable:#?}");

    own.replace(&new, Some(&issue(&new, "control-plane")?))?;
    secret.replace(&new, Some(&issue(&new, "node-1")?))?;
    let lost = node.seen().lost.len();
    control_plane.restart().await?;
    node.until("state with the new certificates", PATIENCE, back(lost + 1)).await;
    assert_eq!(log.containing("renewed certificates are in use").len(), 1);
    Ok(())
}

#[tokio::test]
async fn lockstepctl_shows_a_certificate_and_says_what_is_wrong_with_it() -> Result<()> {
    let (directory, authority) = (Directory::new("lockstep-test-")?, Authority::new()?);
    let directory = directory.path();
    let own = Secret::new(directory.join("own"), &authority, Some(&issue(&authority, "control-plane")?))?;
    let (control_plane, url) = control_plane(directory, &own, true).await?;
    let (mut secret, _) = client(directory, &authority, Some(&issue(&authority, "operator")?))?;
    let run = |flags: Vec<String>| -> Result<(Option<i32>, String)> {
        let output = control_plane.ctl_at(&url, &["status"])?.args(flags).output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    assert_eq!(run(secret.client_flags(true))?, (Some(0), String::new()));
    let refused = |flags, why: &str| -> Result<()> {
        let (code, text) = run(flags)?;
        ensure!(
            code == Some(1) && text.contains(why) && text.lines().count() == 1,
            "{why:?}: {code:?} {text}"
        );
        Ok(())
    };
    refused(secret.client_flags(false), "ertificate")?;
    secret.replace(&Authority::new()?, Some(&issue(&authority, "operator")?))?;
    refused(secret.client_flags(true), "invalid peer certificate: ")?;
    // Every run reads the files.
    secret.replace(&authority, Some(&issue(&authority, "operator")?))?;
    assert_eq!(run(secret.client_flags(true))?, (Some(0), String::new()));
    Ok(())
}
