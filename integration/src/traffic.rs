//! Connections: servers in pods that say who they are and whom they saw, and clients that say
//! what became of a connection.

use std::fmt;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_kernel::refusals;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::guest::patient;
use crate::lab::{Lab, Place};

/// Port on which every pod answers, TCP and UDP.
pub const POD_PORT: u16 = 8080;
/// Port on which every pod answers just so.
pub const OTHER_POD_PORT: u16 = 9090;

/// How long an answer of a kernel may take, after which there is none. A machine under load delays an answer,
/// it does not lose it.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long a program may take that has been reached: it answers, or something is wrong.
const AT_MOST: Duration = Duration::from_secs(10);

/// Transport of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub enum Transport {
    /// TCP.
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP.
    #[serde(rename = "UDP")]
    Udp,
    /// SCTP, which pods answer in the guest only.
    #[serde(rename = "SCTP")]
    Sctp,
}

/// What became of one connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It was answered.
    Answered {
        /// The pod.
        by: Place,
        /// Source address the pod saw.
        source: IpAddr,
    },
    /// It was refused: a reset or an ICMP error.
    Refused,
    /// Nothing came back.
    Timeout,
    /// The kernel of the client would not send it, or the answer made no sense.
    Broken(String),
}

/// Who chooses the source port of a connection.
#[derive(Debug, Clone, Copy)]
enum SourcePort<'a> {
    /// The kernel, which gives one to several connections where they go to different addresses. IPVS
    /// then cannot tell the answers of an endpoint apart, see `docs/parity.md`.
    Any,
    /// The network does: each connection of anybody there has another one, until there are no more. Nor does
    /// one then meet what a kernel remembers of an earlier one.
    Unshared(&'a Lab),
}

/// Ports that a network gives: below those of node ports and of the kernel's choice.
const UNSHARED: Range<u16> = 10_000..30_000;

/// One connection from `from`.
pub fn probe(lab: &Lab, from: Place, transport: Transport, to: SocketAddr) -> Result<Outcome> {
    probe_within(lab, from, transport, to, PATIENCE)
}

/// One connection from `from` that is to be answered, and carries so many bytes there and back; TCP alone
/// carries any.
pub fn probe_with(
    lab: &Lab,
    from: Place,
    transport: Transport,
    to: SocketAddr,
    bytes: usize,
) -> Result<Outcome> {
    match transport {
        Transport::Tcp => {
            lab.inside(from, || outcome(carry(SourcePort::Unshared(lab), to, patient(PATIENCE), bytes)))
        }
        Transport::Udp => probe_within(lab, from, transport, to, AT_MOST),
        Transport::Sctp => probe(lab, from, transport, to),
    }
}

/// One connection from `from`, given up after `patience`, which is longer where the machine is slow.
pub fn probe_within(
    lab: &Lab,
    from: Place,
    transport: Transport,
    to: SocketAddr,
    patience: Duration,
) -> Result<Outcome> {
    lab.inside(from, || connect_from(SourcePort::Unshared(lab), transport, to, patience))
}

/// One connection from the namespace of the caller.
pub(crate) fn connect(transport: Transport, to: SocketAddr) -> Outcome {
    connect_within(transport, to, PATIENCE)
}

/// The same, given up after `patience`, which is longer where the machine is slow.
pub(crate) fn connect_within(transport: Transport, to: SocketAddr, patience: Duration) -> Outcome {
    connect_from(SourcePort::Any, transport, to, patience)
}

fn connect_from(port: SourcePort<'_>, transport: Transport, to: SocketAddr, patience: Duration) -> Outcome {
    let patience = patient(patience);
    let answer = match transport {
        Transport::Tcp => connect_tcp(port, to, patience).and_then(ask),
        Transport::Sctp => connect_sctp(port, to, patience).and_then(ask),
        Transport::Udp => ask_udp(port, to, patience),
    };
    outcome(answer)
}

fn outcome(answer: std::io::Result<String>) -> Outcome {
    match answer {
        Ok(text) => read_answer(&text).unwrap_or_else(|| Outcome::Broken(format!("answer {text:?}"))),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Outcome::Refused,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Timeout,
            _ => Outcome::Broken(error.to_string()),
        },
    }
}

/// A socket that has its source port, where that is ours to choose.
fn socket(
    port: SourcePort<'_>,
    to: SocketAddr,
    kind: Type,
    protocol: Option<Protocol>,
) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind, protocol)?;
    if let SourcePort::Unshared(lab) = port {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let next = || {
            let turn =
                lab.source_ports.fetch_add(1, Ordering::Relaxed) % u32::from(UNSHARED.end - UNSHARED.start);
            UNSHARED.start + u16::try_from(turn).unwrap_or_default()
        };
        let mut bound = Err(ErrorKind::AddrInUse.into());
        for _ in UNSHARED {
            bound = socket.bind(&SocketAddr::new(any, next()).into());
            // What else runs in the namespace has ports, too.
            if !bound.as_ref().is_err_and(|error| error.kind() == ErrorKind::AddrInUse) {
                break;
            }
        }
        bound?;
    }
    Ok(socket)
}

fn connect_tcp(port: SourcePort<'_>, to: SocketAddr, patience: Duration) -> std::io::Result<TcpStream> {
    connected(socket(port, to, Type::STREAM, None)?, to, patience)
}

fn connected(socket: Socket, to: SocketAddr, patience: Duration) -> std::io::Result<TcpStream> {
    socket.connect_timeout(&to.into(), patience)?;
    socket.set_read_timeout(Some(patient(AT_MOST)))?;
    socket.set_write_timeout(Some(patient(AT_MOST)))?;
    Ok(socket.into())
}

/// SCTP has streams of messages in both directions, and an end: as long as a message is short, a
/// TCP stream of this process behaves the same.
fn connect_sctp(port: SourcePort<'_>, to: SocketAddr, patience: Duration) -> std::io::Result<TcpStream> {
    let socket = socket(port, to, Type::STREAM, Some(sctp()))?;
    refusals::hear(&socket, to.is_ipv6()).map_err(std::io::Error::other)?;
    connected(socket, to, patience)
}

/// Its number, which the system's constants have on some machines only.
fn sctp() -> Protocol {
    Protocol::from(132)
}

/// Listens at an SCTP port of both families.
pub fn listen_sctp(port: u16) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(sctp()))?;
    socket.bind(&SockAddr::from(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))))?;
    socket.listen(128)?;
    Ok(socket.into())
}

fn ask(mut stream: TcpStream) -> std::io::Result<String> {
    stream.write_all(b"?")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The question says how many bytes follow it; the answer is followed by the same.
fn carry(port: SourcePort<'_>, to: SocketAddr, patience: Duration, bytes: usize) -> std::io::Result<String> {
    if bytes == 0 {
        return ask(connect_tcp(port, to, patience)?);
    }
    // Before the connection: the server does not wait long for a question.
    let load: Vec<u8> = (0..bytes).map(|position| position.to_le_bytes()[1]).collect();
    let mut stream = connect_tcp(port, to, patience)?;
    stream.write_all(format!("?{bytes}\n").as_bytes())?;
    stream.write_all(&load)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = answer.strip_suffix(load.as_slice()).map(String::from_utf8_lossy);
    Ok(text.map_or_else(|| format!("{} other bytes for {bytes}", answer.len()), |text| text.into_owned()))
}

fn ask_udp(port: SourcePort<'_>, to: SocketAddr, patience: Duration) -> std::io::Result<String> {
    let socket = UdpSocket::from(socket(port, to, Type::DGRAM, None)?);
    socket.connect(to)?;
    socket.set_read_timeout(Some(patience))?;
    match socket.send(b"?") {
        // The node's own rules did not let it out. Whether they refused or dropped it shows in
        // what comes back.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        sent => drop(sent?),
    }
    let mut buffer = [0; 128];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// What a client says that wants to go on talking.
pub const STAY: &[u8] = b"stay\n";

/// A TCP connection that stays open.
#[derive(Debug)]
pub struct Conversation {
    stream: BufReader<TcpStream>,
    /// Who answered first; nobody else can, later.
    pub with: Place,
}

impl Conversation {
    /// Connects from `from`, and is answered once.
    pub fn begin(lab: &Lab, from: Place, to: SocketAddr) -> Result<Self> {
        let stream = lab.inside(from, || connect_tcp(SourcePort::Unshared(lab), to, patient(PATIENCE)))?;
        let stream = stream.with_context(|| format!("{from} -> {to}"))?;
        let mut this = Self { stream: BufReader::new(stream), with: from };
        this.with = this.exchange(STAY)?;
        Ok(this)
    }

    /// Says something and is answered, by whoever is at the other end.
    pub fn go_on(&mut self) -> Result<()> {
        let by = self.exchange(b"?\n")?;
        ensure!(by == self.with, "answered by {by}, after {}", self.with);
        Ok(())
    }

    /// Ends it with a reset, after which nobody waits for late packets.
    pub fn reset(self) -> Result<()> {
        SockRef::from(self.stream.get_ref()).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }

    fn exchange(&mut self, words: &[u8]) -> Result<Place> {
        self.stream.get_mut().write_all(words)?;
        let mut line = String::new();
        self.stream.read_line(&mut line).context("an open connection")?;
        match read_answer(&line) {
            Some(Outcome::Answered { by, .. }) => Ok(by),
            _ => bail!("an open connection: answer {line:?}"),
        }
    }
}

/// What a server says: its name and the address it saw.
pub fn answer(name: &str, peer: SocketAddr) -> String {
    format!("{name} {}\n", peer.ip().to_canonical())
}

fn read_answer(text: &str) -> Option<Outcome> {
    let (by, source) = text.trim().split_once(' ')?;
    Some(Outcome::Answered { by: by.parse().ok()?, source: source.parse().ok()? })
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Answered { by, source } => write!(f, "answered by {by}, which saw {source}"),
            Outcome::Refused => f.write_str("refused"),
            Outcome::Timeout => f.write_str("no answer"),
            Outcome::Broken(what) => write!(f, "broken: {what}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_reads_what_a_server_says() {
        let peer: SocketAddr = "[::ffff:10.200.0.100]:4711".parse().unwrap();
        let expected = Outcome::Answered { by: Place::Pod(1, 2), source: [10, 200, 0, 100].into() };
        assert_eq!(read_answer(&answer("n1p2", peer)), Some(expected));
        assert_eq!(read_answer("garbage"), None);
    }
}
