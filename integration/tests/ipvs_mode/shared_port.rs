//! One client, one source port, and at the same time connections to two Services that have an endpoint
//! in common. The kernel gives a port to several connections as long as they go to different addresses.
//! Where translation is conntrack's, the endpoint sees two ports. IPVS keeps the client's, so it finds
//! the newer of the two connections for whatever the endpoint answers: a limit of the kernel that no
//! rule lifts, and `docs/parity.md` states. This shows that it is so, and no more than that.

use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use lockstep_integration::fixture::{roll, roll_manifest, started};
use lockstep_integration::guest::patient;
use lockstep_integration::lab::Place;
use lockstep_integration::product::Mode;
use lockstep_integration::traffic::STAY;
use socket2::{Domain, Socket, Type};

/// Source port of all connections here.
const PORT: u16 = 20_001;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Address and port of the Service that has the endpoints of `roll`.
fn twin() -> SocketAddr {
    ([10, 96, 0, 21], 80).into()
}

fn dial(to: SocketAddr) -> std::io::Result<BufReader<TcpStream>> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into())?;
    socket.connect_timeout(&to.into(), patient(PATIENCE))?;
    socket.set_read_timeout(Some(patient(PATIENCE)))?;
    Ok(BufReader::new(socket.into()))
}

/// True where what is said is answered.
fn is_answered(stream: &mut BufReader<TcpStream>, words: &[u8]) -> std::io::Result<bool> {
    stream.get_mut().write_all(words)?;
    match stream.read_line(&mut String::new()) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
        read => Ok(read? > 0),
    }
}

/// What becomes of two connections, the older one first, once both are there.
fn two() -> std::io::Result<(bool, bool)> {
    let mut older = dial(roll())?;
    if !is_answered(&mut older, STAY)? {
        return Err(std::io::Error::other("a connection alone has no answer"));
    }
    let mut newer = dial(twin())?;
    let newer = is_answered(&mut newer, STAY)? && is_answered(&mut newer, b"?\n")?;
    Ok((is_answered(&mut older, b"?\n")?, newer))
}

#[test]
fn of_two_connections_from_one_port_to_one_endpoint_ipvs_serves_the_newer() -> Result<()> {
    let product = started(&[Mode::Nftables, Mode::Ipvs])?;
    let twins = roll_manifest(&[Place::Pod(1, 2)]).replace("roll", "twin");
    let twins = twins.replace(&roll().ip().to_string(), &twin().ip().to_string());
    product.change(|product| product.write_manifest("twin.yaml", &twins))?;
    let cases = [
        (Place::Pod(1, 1), true, "nftables mode, a pod"),
        (Place::Node(1), true, "nftables mode, the node itself"),
        (Place::Pod(2, 1), false, "IPVS mode, a pod"),
        // It dials from the address that it dials, which is its own.
        (Place::Node(2), true, "IPVS mode, the node itself"),
    ];
    for (client, older_goes_on, what) in cases {
        let (older, newer) = product.lab.inside(client, two)??;
        println!("{what}: the older connection goes on: {older}, the newer: {newer}");
        ensure!(newer, "{what}: the newer connection has no answer\n{}", product.logs());
        ensure!(older == older_goes_on, "{what}: the older connection goes on: {older}");
    }
    Ok(())
}
