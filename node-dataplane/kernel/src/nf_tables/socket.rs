use super::{CommitError, Dumped, Netfilter};
use crate::Errno;
use crate::netlink::{Error, Message, Socket};

/// `NFNLGRP_NFTABLES`: all changes of nf_tables.
const CHANGES: libc::c_int = 7;

/// nf_tables of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    changes: Socket,
    listening: bool,
}

impl Kernel {
    /// Opens the two sockets; they live as long as this.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open(libc::NETLINK_NETFILTER)?;
        let changes = Socket::open(libc::NETLINK_NETFILTER)?;
        Ok(Self { socket, changes, listening: false })
    }

    fn answers(
        &mut self,
        requests: &[u8],
        count: usize,
        each: &mut dyn FnMut(Message<'_>),
    ) -> Result<(), Error> {
        self.socket.send(requests)?;
        let mut answers = 0;
        while answers < count {
            let Some(messages) = self.socket.receive(true)? else { continue };
            for message in messages {
                answers += 1;
                each(message);
            }
        }
        Ok(())
    }
}

impl Netfilter for Kernel {
    fn commit(&mut self, batch: &[u8]) -> Result<(), CommitError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.socket.send(batch)?;
        let mut refusals = Vec::new();
        let mut refused = false;
        loop {
            match self.socket.receive(false) {
                Ok(None) => break,
                Ok(Some(messages)) => {
                    let bad = messages.filter_map(|message| message.refusal()).filter(|r| r.errno.0 != 0);
                    refusals.extend(bad);
                }
                // The queue overflowed with error reports: there were errors.
                Err(Error::Call { errno: Errno(libc::ENOBUFS), .. }) => refused = true,
                Err(other) => return Err(other.into()),
            }
        }
        if refusals.is_empty() && !refused { Ok(()) } else { Err(CommitError::Refused(refusals)) }
    }

    fn dump(&mut self, request: &[u8], each: &mut dyn FnMut(Message<'_>)) -> Result<Dumped, Error> {
        self.socket.dump("dump", request, each)
    }

    fn ask(&mut self, requests: &[u8], count: usize, each: &mut dyn FnMut(Message<'_>)) -> Result<(), Error> {
        let answered = self.answers(requests, count, each);
        self.socket.renewed(answered)
    }

    fn listen(&mut self, on: bool) -> Result<(), Error> {
        if self.listening != on {
            self.changes.membership(CHANGES, on)?;
            self.listening = on;
        }
        Ok(())
    }

    fn heard(&mut self, each: &mut dyn FnMut(Message<'_>)) -> Result<bool, Error> {
        let mut complete = true;
        loop {
            match self.changes.receive(false) {
                Ok(None) => return Ok(complete),
                Ok(Some(messages)) => messages.for_each(&mut *each),
                Err(Error::Call { errno: Errno(libc::ENOBUFS), .. }) => complete = false,
                Err(other) => return Err(other),
            }
        }
    }
}
