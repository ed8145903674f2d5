//! Connections as they come, with or without TLS.

use std::io;
use std::time::Duration;

use futures_util::{Stream, StreamExt, future, stream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use crate::Acceptor;

/// How long nothing is accepted after an error. Most are about one connection; but without file
/// descriptors every attempt fails at once, and only time helps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A peer that has not finished its handshake by then is not one of ours.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections without TLS. Goes on whatever happens, and says so once per trouble.
pub(crate) fn plain(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> + Send {
    accepted(listener).map(Ok)
}

/// Connections whose handshake is done, each with the acceptor that was the latest when it came.
pub(crate) fn protected(
    listener: TcpListener,
    acceptors: watch::Receiver<Acceptor>,
) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> + Send {
    let start = move |connection| {
        let acceptor = acceptors.borrow().clone();
        // In tasks of their own: after a restart, thousands of nodes come at once.
        tokio::spawn(handshake(acceptor, connection))
    };
    // One that fails is over; the listener is not.
    accepted(listener)
        .map(start)
        .buffer_unordered(usize::MAX)
        .filter_map(|done| future::ready(done.ok().flatten().map(Ok)))
}

/// `None` where the peer cannot be talked to. Said to whoever looks for it only: anybody who
/// reaches the port could fill the log.
async fn handshake(acceptor: Acceptor, connection: TcpStream) -> Option<TlsStream<TcpStream>> {
    let peer = connection.peer_addr().map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string());
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(connection)).await {
        Ok(Ok(connection)) => return Some(connection),
        Ok(Err(error)) => debug!(peer, %error, "a TLS handshake failed"),
        Err(_) => debug!(peer, "a TLS handshake took too long"),
    }
    None
}

fn accepted(listener: TcpListener) -> impl Stream<Item = TcpStream> + Send {
    stream::unfold((listener, false), |(listener, mut troubled)| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    // A connection that is gone already says so itself when it is read.
                    let _ = connection.set_nodelay(true);
                    return Some((connection, (listener, false)));
                }
                Err(error) => {
                    if !std::mem::replace(&mut troubled, true) {
                        warn!(%error, "a connection could not be accepted, trying on");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}
