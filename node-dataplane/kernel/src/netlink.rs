//! A long-lived netlink socket.
//!
//! One `sendmsg` carries any number of messages. The kernel works on them before `sendmsg`
//! returns, so whatever it has to say is in the receive buffer by then: errors are drained
//! without blocking and nothing needs to ask for acknowledgements. The socket lives as long
//! as its owner, because closing one waits for the kernel's deferred clean-up (13 ms).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::Errno;

pub mod attr;
#[cfg(test)]
pub(crate) mod recorded;
mod request;

pub(crate) use request::fail_on_purpose;
pub use request::put_message;

/// Length of a netlink message header.
pub const HEADER: usize = 16;
/// Room for one datagram of the kernel; its dumps fill at most 32 KiB per datagram.
const RECEIVE_BUFFER: usize = 64 << 10;
/// Receive queue: error reports of a refused batch, replies to element gets.
const RECEIVE_QUEUE: libc::c_int = 4 << 20;
/// Send limit asked for at first; grows with the largest batch.
const SEND_LIMIT: usize = 1 << 20;

/// What went wrong on a netlink socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on the socket failed.
    #[error("netlink: {call}")]
    Call {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        errno: Errno,
    },
    /// The kernel refused a request.
    #[error("netlink: {request}: {}", message.as_deref().unwrap_or("refused"))]
    Refused {
        /// The request, in the kernel's words.
        request: String,
        /// The kernel's explanation, where it gave one.
        message: Option<String>,
        /// The error.
        #[source]
        errno: Errno,
    },
    /// The kernel sent what cannot be a message.
    #[error("netlink: malformed message: {what}")]
    Malformed {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A dump was interrupted by changes more often than is worth repeating.
    #[error("netlink: {request}: interrupted by other changes {times} times")]
    Interrupted {
        /// The request.
        request: String,
        /// How often it was tried.
        times: u32,
    },
}

impl Error {
    /// The errno, where the fault has one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Call { errno, .. } | Error::Refused { errno, .. } => Some(*errno),
            Error::Malformed { .. } | Error::Interrupted { .. } => None,
        }
    }

    /// True where the same request may succeed when made again.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Interrupted { .. } => true,
            Error::Malformed { .. } => false,
            other => other.errno().is_some_and(Errno::is_retryable),
        }
    }
}

/// One message from the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// What an error message of the kernel says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Sequence number of the message that it is about.
    pub seq: u32,
    /// The error; `Errno(0)` is an acknowledgement.
    pub errno: Errno,
    /// The kernel's explanation.
    pub message: Option<String>,
}

/// How a dump ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dumped {
    /// Everything was seen.
    Whole,
    /// The objects changed meanwhile; what was seen is not one state.
    Interrupted,
}

/// A netlink socket of one protocol, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    protocol: libc::c_int,
    send_limit: usize,
    buffer: Box<[u8]>,
}

impl Socket {
    /// Opens a socket of a netlink protocol (`NETLINK_NETFILTER`).
    pub fn open(protocol: libc::c_int) -> Result<Self, Error> {
        // SAFETY: socket(2) takes no pointers.
        let raw = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if raw < 0 {
            return Err(Error::Call { call: "socket", errno: Errno::last() });
        }
        // SAFETY: `raw` was just opened and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let buffer = vec![0; RECEIVE_BUFFER].into_boxed_slice();
        let mut socket = Self { fd, protocol, send_limit: 0, buffer };
        socket.bind()?;
        // Errors carry the kernel's text and not a copy of the refused message.
        socket.option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)?;
        socket.option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        socket.force_limit(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_QUEUE)?;
        socket.allow_send(SEND_LIMIT)?;
        Ok(socket)
    }

    fn bind(&self) -> Result<(), Error> {
        // SAFETY: sockaddr_nl is plain data; all zero means "the kernel picks the address".
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or_default();
        let length = socket_length::<libc::sockaddr_nl>();
        // SAFETY: the pointer and the length describe `address`, which outlives the call.
        let result = unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), length) };
        if result < 0 { Err(Error::Call { call: "bind", errno: Errno::last() }) } else { Ok(()) }
    }

    fn option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> Result<(), Error> {
        let length = socket_length::<libc::c_int>();
        // SAFETY: the pointer and the length describe `value`, which outlives the call.
        let result =
            unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, (&raw const value).cast(), length) };
        if result < 0 { Err(Error::Call { call: "setsockopt", errno: Errno::last() }) } else { Ok(()) }
    }

    /// Sets a buffer limit past the system's maximum, or up to it where that is not allowed.
    fn force_limit(&self, force: libc::c_int, plain: libc::c_int, bytes: libc::c_int) -> Result<(), Error> {
        self.option(libc::SOL_SOCKET, force, bytes).or_else(|_| self.option(libc::SOL_SOCKET, plain, bytes))
    }

    fn allow_send(&mut self, bytes: usize) -> Result<(), Error> {
        if bytes <= self.send_limit {
            return Ok(());
        }
        // The kernel doubles the value for its own overhead.
        let limit = libc::c_int::try_from(bytes.next_power_of_two()).unwrap_or(libc::c_int::MAX / 2);
        self.force_limit(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, limit)?;
        self.send_limit = bytes.next_power_of_two();
        Ok(())
    }

    /// Sends messages, all in one datagram. The kernel has worked on them when it returns.
    pub fn send(&mut self, messages: &[u8]) -> Result<(), Error> {
        self.allow_send(messages.len())?;
        loop {
            // SAFETY: the pointer and the length describe `messages`, which outlives the call.
            let sent =
                unsafe { libc::send(self.fd.as_raw_fd(), messages.as_ptr().cast(), messages.len(), 0) };
            if sent >= 0 {
                return Ok(());
            }
            let errno = Errno::last();
            if errno.0 != libc::EINTR {
                return Err(Error::Call { call: "send", errno });
            }
        }
    }

    /// Receives one datagram. `None` where nothing waits and `wait` is false.
    pub fn receive(&mut self, wait: bool) -> Result<Option<Messages<'_>>, Error> {
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        let length = loop {
            // SAFETY: the pointer and the length describe `buffer`, which outlives the call.
            let received = unsafe {
                libc::recv(self.fd.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len(), flags)
            };
            if let Ok(length) = usize::try_from(received) {
                break length;
            }
            match Errno::last() {
                Errno(libc::EINTR) => {}
                Errno(libc::EAGAIN) if !wait => return Ok(None),
                errno => return Err(Error::Call { call: "recv", errno }),
            }
        };
        Ok(Some(Messages { rest: &self.buffer[..length] }))
    }

    /// Sends one dump request and hands on the answers. `what` names it in errors.
    pub fn dump(
        &mut self,
        what: &str,
        request: &[u8],
        each: &mut dyn FnMut(Message<'_>),
    ) -> Result<Dumped, Error> {
        let dumped = self.dump_once(what, request, each);
        self.renewed(dumped)
    }

    /// Opens it anew, without any group, where a call failed: what is left of the answers must not be taken for
    /// answers to the next request.
    pub(crate) fn renewed<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if matches!(result, Err(Error::Call { .. })) {
            *self = Self::open(self.protocol)?;
        }
        result
    }

    fn dump_once(
        &mut self,
        what: &str,
        request: &[u8],
        each: &mut dyn FnMut(Message<'_>),
    ) -> Result<Dumped, Error> {
        self.send(request)?;
        let mut dumped = Dumped::Whole;
        loop {
            let Some(messages) = self.receive(true)? else { continue };
            for message in messages {
                if i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0 {
                    dumped = Dumped::Interrupted;
                }
                match message.refusal() {
                    None => each(message),
                    Some(end) if end.errno.0 == 0 => return Ok(dumped),
                    Some(end) if end.errno.0 == libc::EINTR => return Ok(Dumped::Interrupted),
                    Some(end) => {
                        let request = what.to_owned();
                        return Err(Error::Refused { request, message: end.message, errno: end.errno });
                    }
                }
            }
        }
    }

    /// Joins or leaves a multicast group.
    pub fn membership(&self, group: libc::c_int, join: bool) -> Result<(), Error> {
        let name = if join { libc::NETLINK_ADD_MEMBERSHIP } else { libc::NETLINK_DROP_MEMBERSHIP };
        self.option(libc::SOL_NETLINK, name, group)
    }
}

/// The messages of one datagram.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    /// The messages in `bytes`, one after the other.
    pub fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header = self.rest.get(..HEADER)?;
        let length = usize::try_from(attr::u32_ne(header)).ok()?;
        let payload = self.rest.get(HEADER..length)?;
        self.rest = self.rest.get(attr::aligned(length)..).unwrap_or_default();
        Some(Message {
            kind: attr::u16_ne(&header[4..]),
            flags: attr::u16_ne(&header[6..]),
            seq: attr::u32_ne(&header[8..]),
            payload,
        })
    }
}

impl Message<'_> {
    /// Reads an error or end-of-dump message; `None` where it is neither.
    pub fn refusal(&self) -> Option<Refusal> {
        // With NETLINK_CAP_ACK an error is: errno, the header it is about, attributes.
        let attributes = match i32::from(self.kind) {
            libc::NLMSG_ERROR => 4 + HEADER,
            libc::NLMSG_DONE => 4,
            _ => return None,
        };
        let code = self.payload.get(..4).map_or(0, |bytes| attr::u32_ne(bytes).cast_signed());
        let seq = if i32::from(self.kind) == libc::NLMSG_ERROR {
            self.payload.get(12..16).map_or(self.seq, attr::u32_ne)
        } else {
            self.seq
        };
        let has_text = i32::from(self.flags) & libc::NLM_F_ACK_TLVS != 0;
        let message = has_text
            .then(|| attr::Attributes::of(self.payload.get(attributes..).unwrap_or_default()))
            .and_then(|mut all| all.find(|attribute| attribute.kind == NLMSGERR_ATTR_MSG))
            .map(|attribute| attribute.text().to_owned());
        Some(Refusal { seq, errno: Errno(code.wrapping_neg()), message })
    }
}

fn socket_length<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

/// Attribute of an error message: the kernel's explanation.
const NLMSGERR_ATTR_MSG: u16 = 1;

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::other(error)
    }
}
