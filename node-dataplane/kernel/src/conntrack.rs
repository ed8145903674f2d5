//! Flows the kernel tracks, over netlink: listing those of one protocol, and ending some.
//!
//! The kernel sends the flows of one family and protocol only, where it can (Linux 5.8); an
//! older one passes over the filter and sends the family's, so every answer is looked at again.
//! A flow is ended by its tuple and its id: one that took its place meanwhile is left alone.

pub mod fake;
mod message;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use crate::Errno;
use crate::netlink::{self, Dumped, Socket};

/// A listing that other changes interrupt is begun again so many times.
const DUMPS: u32 = 3;
/// Flows ended with one system call.
const BATCH: usize = 1_000;

/// A flow that the kernel tracks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Number of the transport protocol: 6 = TCP, 17 = UDP.
    pub protocol: u8,
    /// Who began it.
    pub source: SocketAddr,
    /// Where to, before any translation.
    pub destination: SocketAddr,
    /// Where answers come from: `destination`, or what it was translated to.
    pub answers_from: SocketAddr,
    /// Conntrack zone; 0 = none.
    pub zone: u16,
    /// The kernel's number for this very entry.
    pub id: u32,
}

/// Connection tracking of one network namespace.
///
/// Implemented by [`Kernel`] and by [`fake::FakeConntrack`].
pub trait Conntrack {
    /// Hands on every flow of a family and protocol. Costs what the table of the family holds.
    fn flows(&mut self, v6: bool, protocol: u8, each: &mut dyn FnMut(&Flow)) -> Result<(), netlink::Error>;

    /// Ends flows; those that are gone already do not count. Returns how many it ended. Where
    /// one cannot be ended, the others are all the same.
    fn end(&mut self, flows: &[Flow]) -> Result<usize, netlink::Error>;
}

/// Connection tracking of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    seq: u32,
    /// The kernel takes a filter, as far as is known.
    filters: bool,
    passed_over: usize,
}

impl Kernel {
    /// Opens a socket; it lives as long as this.
    pub fn open() -> Result<Self, netlink::Error> {
        let socket = Socket::open(libc::NETLINK_NETFILTER)?;
        Ok(Self { socket, seq: 0, filters: true, passed_over: 0 })
    }

    /// Answers to the last listing that were not about what was asked for: 0 where the kernel
    /// filters.
    pub fn passed_over(&self) -> usize {
        self.passed_over
    }

    fn dump(
        &mut self,
        v6: bool,
        protocol: u8,
        each: &mut dyn FnMut(&Flow),
    ) -> Result<Dumped, netlink::Error> {
        self.seq = self.seq.wrapping_add(1);
        let mut request = Vec::new();
        message::put_dump(&mut request, v6, self.filters.then_some(protocol), self.seq);
        let (seq, mut passed_over) = (self.seq, 0);
        let dumped = self.socket.dump("conntrack dump", &request, &mut |answer| {
            match message::read_flow(&answer) {
                // What an earlier, broken-off dump left in the queue is not part of this one.
                Some(flow) if answer.seq == seq && flow.protocol == protocol => each(&flow),
                _ => passed_over += 1,
            }
        });
        self.passed_over = passed_over;
        dumped
    }
}

impl Conntrack for Kernel {
    fn flows(&mut self, v6: bool, protocol: u8, each: &mut dyn FnMut(&Flow)) -> Result<(), netlink::Error> {
        for _ in 0..DUMPS {
            match self.dump(v6, protocol, each) {
                Ok(Dumped::Whole) => return Ok(()),
                Ok(Dumped::Interrupted) => {}
                Err(error) if self.filters && refuses_filter(&error) => self.filters = false,
                Err(error) => return Err(error),
            }
        }
        Err(netlink::Error::Interrupted { request: "conntrack dump".to_owned(), times: DUMPS })
    }

    fn end(&mut self, flows: &[Flow]) -> Result<usize, netlink::Error> {
        let (mut ended, mut refused) = (0, None);
        for batch in flows.chunks(BATCH) {
            let mut requests = Vec::new();
            for flow in batch {
                self.seq = self.seq.wrapping_add(1);
                message::put_delete(&mut requests, flow, self.seq);
            }
            self.socket.send(&requests)?;
            let mut not_ended = 0;
            while let Some(answers) = self.socket.receive(false)? {
                for refusal in answers.filter_map(|answer| answer.refusal()) {
                    match refusal.errno {
                        Errno(0) => {}
                        Errno::NOENT => not_ended += 1,
                        errno => {
                            not_ended += 1;
                            let request = "conntrack delete".to_owned();
                            let message = refusal.message;
                            refused.get_or_insert(netlink::Error::Refused { request, message, errno });
                        }
                    }
                }
            }
            ended += batch.len().saturating_sub(not_ended);
        }
        refused.map_or(Ok(ended), Err)
    }
}

/// True where a kernel may have refused the filter and not the dump.
fn refuses_filter(error: &netlink::Error) -> bool {
    matches!(error.errno(), Some(Errno(libc::EINVAL | libc::EOPNOTSUPP)))
}
