//! The server in every pod of a lab: answers TCP and UDP with its name and the source address
//! it saw. Usage: `lockstep-pod NAME PORT`.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::thread;

use anyhow::{Context as _, Result};
use lockstep_integration::traffic::answer;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().context("usage: lockstep-pod NAME PORT")?;
    let port: u16 = arguments.next().context("usage: lockstep-pod NAME PORT")?.parse()?;
    // Both families on one socket.
    let tcp = TcpListener::bind(("::", port))?;
    let udp = UdpSocket::bind(("::", port))?;
    let tcp_name = name.clone();
    thread::spawn(move || {
        for stream in tcp.incoming() {
            // A client that is gone before its answer is no fault of the server.
            let _ = stream.and_then(|mut stream| {
                let peer = stream.peer_addr()?;
                stream.write_all(answer(&tcp_name, peer).as_bytes())
            });
        }
    });
    // Said once both can be reached.
    writeln!(std::io::stdout(), "ready")?;
    std::io::stdout().flush()?;
    let mut buffer = [0; 64];
    loop {
        // An ICMP error for an earlier answer arrives here, too.
        if let Ok((_, peer)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(answer(&name, peer).as_bytes(), peer);
        }
    }
}
