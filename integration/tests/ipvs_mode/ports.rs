//! Clients that use a few source ports again and again while endpoints come and go. IPVS remembers a
//! connection for a while after its end, and one that begins anew from the same port must neither go
//! to an endpoint that is gone nor wait until its first packet is sent a second time.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lockstep_integration::fixture::{roll, roll_manifest, started};
use lockstep_integration::guest::patient;
use lockstep_integration::lab::Place;
use lockstep_integration::load::syns_sent_again;
use lockstep_integration::product::{Mode, PATIENCE, wait_until};
use socket2::{Domain, SockRef, Socket, Type};

/// Source ports of one client.
const PORTS: [u16; 4] = [20_001, 20_002, 20_003, 20_004];
/// How much longer than in nftables mode a connection may take.
const LONGER: Duration = Duration::from_millis(500);
/// What a connection takes at least whose first packet was lost.
const SYN_AGAIN: Duration = Duration::from_secs(1);
/// Between two tries to use a port that the client's own kernel is not done with.
const OWN_KERNEL: Duration = Duration::from_millis(1);
/// Connections that each client makes between two changes.
const BETWEEN: usize = 16;

/// What became of the connections of one client.
#[derive(Debug, Default)]
struct Seen {
    made: usize,
    slowest: Duration,
    faults: Vec<String>,
    syns_sent_again: u64,
}

impl Seen {
    fn add(&mut self, other: Seen) {
        self.made += other.made;
        self.slowest = self.slowest.max(other.slowest);
        self.faults.extend(other.faults);
        self.syns_sent_again += other.syns_sent_again;
    }
}

/// One after the other, without a pause, by each of the ways in which a connection can end.
fn client(stop: &AtomicBool, made: &AtomicUsize) -> Result<Seen> {
    let (mut seen, again) = (Seen::default(), syns_sent_again()?);
    while !stop.load(Ordering::Relaxed) {
        let (port, ending) = (PORTS[seen.made % PORTS.len()], Ending::ALL[seen.made % Ending::ALL.len()]);
        let mut begun = Instant::now();
        if let Err(error) = connect(port, ending, &mut begun) {
            seen.faults.push(format!("port {port}, {ending:?}, after {:.1?}: {error}", begun.elapsed()));
        }
        seen.slowest = seen.slowest.max(begun.elapsed());
        seen.made += 1;
        made.fetch_add(1, Ordering::Relaxed);
    }
    seen.syns_sent_again = syns_sent_again()? - again;
    Ok(seen)
}

/// How a connection ends.
#[derive(Debug, Clone, Copy)]
enum Ending {
    /// The server says that it is done, then the client does.
    Fin,
    /// The server says that it is done, the client hangs up.
    FinThenReset,
    /// The client hangs up before anything was said.
    Reset,
}

impl Ending {
    /// As many as are not a divisor of the ports: each port sees every order of two.
    const ALL: [Ending; 3] = [Ending::Fin, Ending::FinThenReset, Ending::Reset];
}

/// Connects from this port. The client's own kernel refuses that, and sends nothing, until the last packet
/// of the connection before has come, which on a slow machine it may not have: then again.
fn dial(port: u16, begun: &mut Instant) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    let first = Instant::now();
    loop {
        *begun = Instant::now();
        match socket.connect_timeout(&roll().into(), patient(PATIENCE)) {
            Err(error)
                if error.kind() == ErrorKind::AddrNotAvailable && first.elapsed() < patient(PATIENCE) =>
            {
                thread::sleep(OWN_KERNEL);
            }
            connected => return connected.map(|()| socket.into()),
        }
    }
}

fn connect(port: u16, ending: Ending, begun: &mut Instant) -> std::io::Result<()> {
    let mut stream = dial(port, begun)?;
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    if !matches!(ending, Ending::Reset) {
        stream.write_all(b"?")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if answer.is_empty() {
            return Err(std::io::Error::other("no answer"));
        }
    }
    if !matches!(ending, Ending::Fin) {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

#[test]
fn a_port_that_is_used_again_waits_for_nothing_while_endpoints_roll() -> Result<()> {
    let product = started(&[Mode::Nftables, Mode::Ipvs])?;
    let pods = [Place::Pod(1, 2), Place::Pod(2, 2)];
    product.change(|product| product.write_manifest("roll.yaml", &roll_manifest(&pods)))?;
    let stop = AtomicBool::new(false);
    let clients = [Place::Pod(1, 1), Place::Node(1), Place::Pod(2, 1), Place::Node(2)];
    let made = clients.map(|_| AtomicUsize::new(0));
    let (lab, stop) = (&product.lab, &stop);
    let run = move |place, made| lab.inside(place, || client(stop, made))?;
    let (rolled, seen) = thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .zip(&made)
            .map(|(place, made)| scope.spawn(move || run(place, made)))
            .collect();
        let roll = || -> Result<()> {
            for round in 0..6 {
                let now = [&pods[..1], &pods[1..], &pods[..]][round % 3];
                product.change(|product| product.write_manifest("roll.yaml", &roll_manifest(now)))?;
                let goal: Vec<usize> =
                    made.iter().map(|made| made.load(Ordering::Relaxed) + BETWEEN).collect();
                wait_until("the clients go on", PATIENCE, || {
                    let mut all = made.iter().zip(&goal);
                    Ok(all.all(|(made, goal)| made.load(Ordering::Relaxed) >= *goal).then_some(()))
                })?;
            }
            Ok(())
        };
        let rolled = roll();
        stop.store(true, Ordering::Relaxed);
        let ended = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        (rolled, ended.collect::<Result<Vec<Seen>>>())
    });
    rolled?;
    let (mut nftables, mut ipvs) = (Seen::default(), Seen::default());
    for (place, seen) in clients.into_iter().zip(seen?) {
        println!(
            "{place}: {} connections from {} ports, slowest {:.1?}, {} SYNs sent again",
            seen.made,
            PORTS.len(),
            seen.slowest,
            seen.syns_sent_again
        );
        match place {
            Place::Pod(1, _) | Place::Node(1) => nftables.add(seen),
            _ => ipvs.add(seen),
        }
    }
    let faults = [&nftables.faults[..], &ipvs.faults].concat();
    ensure!(faults.is_empty(), "{} connections failed: {:?}", faults.len(), &faults[..faults.len().min(10)]);
    ensure!(
        ipvs.slowest <= nftables.slowest + patient(LONGER),
        "{:?} in IPVS mode, {:?} in nftables mode",
        ipvs.slowest,
        nftables.slowest
    );
    // Other programs of the client's namespace are in the count too.
    ensure!(
        ipvs.slowest < SYN_AGAIN || ipvs.syns_sent_again <= nftables.syns_sent_again,
        "SYNs were lost: {} in IPVS mode, {} in nftables mode",
        ipvs.syns_sent_again,
        nftables.syns_sent_again
    );
    Ok(())
}
