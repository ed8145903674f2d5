//! The server in every pod and on every node of a lab: answers TCP, UDP and HTTP with its name
//! and the source address it saw; a TCP client that says "stay" is answered once a line until it
//! leaves. Usage: `lockstep-pod NAME PORT... [--sctp]`; with the flag, SCTP is answered as TCP is.
#![forbid(unsafe_code)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lockstep_integration::guest::patient;
use lockstep_integration::traffic::{STAY, answer, listen_sctp};

fn main() -> Result<()> {
    let (flags, words): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let sctp = flags.iter().any(|flag| flag == "--sctp");
    let mut words = words.into_iter();
    let name = words.next().context("usage: lockstep-pod NAME PORT... [--sctp]")?;
    let mut servers = Vec::new();
    for port in words {
        let port: u16 = port.parse().with_context(|| port.clone())?;
        // Both families on one socket.
        let tcp = TcpListener::bind(("::", port))?;
        let udp = UdpSocket::bind(("::", port))?;
        let mut listeners = vec![tcp];
        if sctp {
            listeners.push(listen_sctp(port)?);
        }
        for listener in listeners {
            let name = name.clone();
            servers.push(thread::spawn(move || answer_streams(&name, &listener)));
        }
        let udp_name = name.clone();
        servers.push(thread::spawn(move || answer_udp(&udp_name, &udp)));
    }
    // Said once all can be reached.
    writeln!(std::io::stdout(), "ready")?;
    std::io::stdout().flush()?;
    for server in servers {
        server.join().map_err(|_| anyhow::anyhow!("{name}: a server panicked"))?;
    }
    Ok(())
}

fn answer_streams(name: &str, socket: &TcpListener) {
    for stream in socket.incoming().flatten() {
        let name = name.to_owned();
        // A client that is gone before its answer is no fault of the server.
        thread::spawn(move || serve(&name, stream).ok());
    }
}

fn answer_udp(name: &str, socket: &UdpSocket) {
    let mut buffer = [0; 64];
    loop {
        // An ICMP error for an earlier answer arrives here, too.
        if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(answer(name, peer).as_bytes(), peer);
        }
    }
}

/// `?BYTES` in a line means that so many follow; returns how many, and those that are here.
fn load(request: &[u8]) -> Option<(usize, &[u8])> {
    let end = request.iter().position(|byte| *byte == b'\n')?;
    let bytes: usize = std::str::from_utf8(request[..end].strip_prefix(b"?")?).ok()?.parse().ok()?;
    let begin = &request[end + 1..];
    (bytes >= begin.len()).then_some((bytes, begin))
}

fn serve(name: &str, mut stream: TcpStream) -> std::io::Result<()> {
    let text = answer(name, stream.peer_addr()?);
    // Who says nothing is answered all the same; who says something may be slow, where much runs.
    stream.set_read_timeout(Some(patient(Duration::from_secs(1))))?;
    let mut request = [0; 4096];
    let length = stream.read(&mut request).unwrap_or(0);
    if request[..length].starts_with(STAY) {
        stream.write_all(text.as_bytes())?;
        stream.set_read_timeout(None)?;
        let mut lines = BufReader::new(stream.try_clone()?);
        while lines.read_line(&mut String::new())? > 0 {
            stream.write_all(text.as_bytes())?;
        }
        return Ok(());
    }
    if let Some((bytes, begin)) = load(&request[..length]) {
        // All of it is taken before any of it goes back: two sides that only write wait forever.
        let mut load = begin.to_vec();
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        (&stream).take((bytes - begin.len()) as u64).read_to_end(&mut load)?;
        stream.write_all(text.as_bytes())?;
        return stream.write_all(&load);
    }
    if request[..length].starts_with(b"GET ") {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n";
        write!(stream, "{head}Content-Length: {}\r\n\r\n", text.len())?;
    }
    stream.write_all(text.as_bytes())
}
