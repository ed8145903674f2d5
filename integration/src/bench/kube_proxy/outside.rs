//! What a client sees: connections, and how long they took.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::guest::patient;
use crate::lab::{Family, Lab, Place};
use crate::traffic::{self, Outcome, POD_PORT, Transport};

/// A pod that is no endpoint, so that it never talks to itself.
pub(super) const CLIENT: Place = Place::Pod(1, super::objects::ENDPOINTS + 1);
/// How long one try may take: what is programmed answers within a millisecond.
const TRY: Duration = Duration::from_millis(30);
/// How long anything may take. The slowest here takes a minute.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two tries: a hundredth of the time so far, within these. So the time is right to a
/// hundredth, and a client that waits for long takes no CPU from whom it waits for.
const PAUSE: [Duration; 2] = [Duration::from_micros(200), Duration::from_millis(10)];

/// Waits until every one of these addresses was answered. Returns when the last was.
pub(super) fn until_all_answer(lab: &Lab, addresses: &[SocketAddr]) -> Result<Instant> {
    lab.inside(CLIENT, || {
        let mut last = Instant::now();
        for address in addresses {
            last = until(*address, |_| true)?;
        }
        Ok(last)
    })?
}

/// Waits until this pod answers at the address. Returns when it did.
pub(super) fn until_answered_by(lab: &Lab, address: SocketAddr, pod: Place) -> Result<Instant> {
    lab.inside(CLIENT, || until(address, |by| by == pod))?
}

fn until(address: SocketAddr, wanted: impl Fn(Place) -> bool) -> Result<Instant> {
    let start = Instant::now();
    loop {
        let outcome = traffic::connect_within(Transport::Tcp, address, TRY);
        let now = Instant::now();
        match outcome {
            Outcome::Answered { by, .. } if wanted(by) => return Ok(now),
            other => ensure!(
                now - start < patient(PATIENCE),
                "{address}: not as wanted within {} s: {other}",
                patient(PATIENCE).as_secs()
            ),
        }
        std::thread::sleep(((now - start) / 100).clamp(PAUSE[0], PAUSE[1]));
    }
}

/// Times in which connections to an address are established.
pub(super) fn connects(lab: &Lab, address: SocketAddr, count: usize) -> Result<Vec<Duration>> {
    lab.inside(CLIENT, || {
        (0..count)
            .map(|_| {
                let start = Instant::now();
                let stream = TcpStream::connect_timeout(&address, PATIENCE);
                let time = start.elapsed();
                stream.map(|_| time).with_context(|| format!("connect to {address}"))
            })
            .collect()
    })?
}

/// What every pod says to who asks it directly, for whoever reads a failure.
pub(super) fn pods(lab: &Lab) -> String {
    let ask = |pod: Place| {
        let address = SocketAddr::new(pod.address(Family::V4), POD_PORT);
        match traffic::probe(lab, CLIENT, Transport::Tcp, address) {
            Ok(outcome) => format!("{pod} {outcome}"),
            Err(error) => format!("{pod} {error:#}"),
        }
    };
    lab.pods().map(ask).collect::<Vec<_>>().join("; ")
}
