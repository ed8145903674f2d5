//! Lets programs inside a place reach the API server, which they cannot reach themselves.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use lockstep_kernel::netns;
use serde_json::Value;

use crate::lab::{Family, Lab, Place};

/// Port of the relay in its place.
const PORT: u16 = 6443;

/// An open relay, closed with the value. Connections last until one of their ends is gone.
#[derive(Debug)]
pub struct Relay {
    kubeconfig: PathBuf,
    namespace: String,
    closed: Arc<AtomicBool>,
}

impl Relay {
    /// Listens in the fabric, where every node reaches it, and carries every connection to the
    /// API server of a kubeconfig. The bytes are TLS from end to end: nothing is looked at.
    pub fn open(lab: &Lab, server: &Path) -> Result<Self> {
        let listener = lab.inside(Place::Fabric, || TcpListener::bind(address()))??;
        let kubeconfig = lab.directory().join("kubeconfig");
        let (text, target) = through(server, address())?;
        fs::write(&kubeconfig, text)?;
        let closed = Arc::new(AtomicBool::new(false));
        let relay = Self { kubeconfig, namespace: lab.namespace(Place::Fabric), closed: closed.clone() };
        let accepting = move || accept(&listener, target, &closed);
        thread::Builder::new().name("relay".to_owned()).spawn(accepting)?;
        Ok(relay)
    }

    /// A kubeconfig for programs in the lab.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }
}

impl Drop for Relay {
    /// A thread that waits for connections would keep the namespace of its socket, and all links
    /// in it, until the process ends.
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the thread up. Where the lab is gone already, nobody connects any more.
        let _ = netns::run_in(&self.namespace, || TcpStream::connect(address()));
    }
}

fn address() -> SocketAddr {
    SocketAddr::new(Place::Fabric.address(Family::V4), PORT)
}

/// The kubeconfig with another address, and the one it had. The name that the certificate has stays.
fn through(kubeconfig: &Path, address: SocketAddr) -> Result<(String, SocketAddr)> {
    let text = fs::read_to_string(kubeconfig).with_context(|| kubeconfig.display().to_string())?;
    let mut config: Value = serde_json::from_str(&text).with_context(|| kubeconfig.display().to_string())?;
    let cluster = &mut config["clusters"][0]["cluster"];
    let server = cluster["server"].as_str().and_then(|url| url.strip_prefix("https://")?.parse().ok());
    let server = server.with_context(|| format!("{}: no server's address", kubeconfig.display()))?;
    cluster["server"] = format!("https://{address}").into();
    Ok((config.to_string(), server))
}

fn accept(listener: &TcpListener, target: SocketAddr, closed: &AtomicBool) {
    for client in listener.incoming() {
        let client = match client {
            Ok(client) => client,
            // This one was gone before its turn.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                // Asked again at once, it would say the same. With the socket gone, who connects is
                // refused and need not wait; nobody who reads this is no reason to go on.
                let _ = writeln!(io::stderr(), "the relay to the API server ends: accept: {error}");
                return;
            }
        };
        if closed.load(Ordering::Acquire) {
            return;
        }
        // A server that is away refuses here, and the client sees its connection end.
        let Ok(server) = TcpStream::connect(target) else { continue };
        let _ = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
        let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else { continue };
        thread::spawn(move || carry(client, server));
        thread::spawn(move || carry(server_too, client_too));
    }
}

/// Carries one direction to its end, then tells the other side.
fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    let done: io::Result<()> = (|| loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length])?;
    })();
    // After a fault the other direction has nothing to say either; both may be gone by now.
    let how = if done.is_ok() { Shutdown::Write } else { Shutdown::Both };
    let _ = to.shutdown(how);
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_relay_that_cannot_accept_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        // An accept(2) that fails at once, and every time.
        listener.set_nonblocking(true).unwrap();
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            accept(&listener, target, &AtomicBool::new(false));
            ended.send(())
        });
        end.recv_timeout(Duration::from_secs(20)).expect("it does not ask for ever");
    }
}
