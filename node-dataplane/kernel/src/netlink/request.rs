//! Requests by the hundred, single questions, and lists.

use super::{Dumped, Error, HEADER, Message, Refusal, Socket};
use crate::Errno;

/// Requests go out in datagrams of about this many bytes.
const DATAGRAM: usize = 60 << 10;
/// And of so many requests: the refusals of all fit the receive queue, even one that may not be
/// larger than the system's default maximum (twice 212,992 bytes, at 768 for each).
const REQUESTS: usize = 500;
/// A list that other changes interrupt is begun again so many times.
const DUMPS: u32 = 3;

/// Appends one message: a header, and what `body` appends.
pub fn put_message(
    out: &mut Vec<u8>,
    kind: u16,
    flags: libc::c_int,
    seq: u32,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    let flags = u16::try_from(flags).unwrap_or_default();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&seq.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    debug_assert_eq!(out.len() - start, HEADER);
    body(out);
    let length = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

/// For fakes: so many calls fail with this error, then none.
pub(crate) fn fail_on_purpose(fail: &mut Option<(usize, Errno)>) -> Result<(), Error> {
    match fail {
        Some((left, errno)) if *left > 0 => {
            *left -= 1;
            Err(Error::Call { call: "send", errno: *errno })
        }
        _ => Ok(()),
    }
}

impl Refusal {
    /// The refusal as an error of the request that `what` names.
    pub(crate) fn of(self, what: impl Into<String>) -> Error {
        Error::Refused { request: what.into(), message: self.message, errno: self.errno }
    }
}

impl Socket {
    /// Makes requests, in order, that the kernel answers only where it refuses them. Returns those
    /// with their indices; the others are done. An error leaves open which ones are.
    pub(crate) fn request_all<T>(
        &mut self,
        seq: &mut u32,
        requests: &[T],
        put: impl Fn(&mut Vec<u8>, &T, u32),
    ) -> Result<Vec<(usize, Refusal)>, Error> {
        let (mut refused, mut bytes, mut begin) = (Vec::new(), Vec::new(), 0);
        for (index, request) in requests.iter().enumerate() {
            *seq = seq.wrapping_add(1);
            put(&mut bytes, request, *seq);
            let count = index + 1 - begin;
            if bytes.len() < DATAGRAM && count < REQUESTS && index + 1 < requests.len() {
                continue;
            }
            self.send(&bytes)?;
            let last = *seq;
            self.refusals(&mut |message| {
                let Some(refusal) = message.refusal().filter(|refusal| refusal.errno.0 != 0) else { return };
                let back = usize::try_from(last.wrapping_sub(refusal.seq)).unwrap_or(usize::MAX);
                if back < count {
                    refused.push((index - back, refusal));
                }
            })?;
            bytes.clear();
            begin = index + 1;
        }
        Ok(refused)
    }

    /// Hands on what the kernel has said already. It has said everything about what was sent.
    pub(crate) fn refusals(&mut self, each: &mut dyn FnMut(&Message<'_>)) -> Result<(), Error> {
        let mut lost = Ok(());
        loop {
            match self.receive(false) {
                Ok(None) => return lost,
                Ok(Some(messages)) => messages.for_each(|message| each(&message)),
                // What was lost is not known; what waits must still not be taken for later answers.
                Err(error @ Error::Call { errno: Errno(libc::ENOBUFS), .. }) => lost = Err(error),
                Err(other) => return Err(other),
            }
        }
    }

    /// Sends one request that has an answer, and reads that. `what` names it in errors.
    pub(crate) fn ask<T>(
        &mut self,
        what: &str,
        seq: u32,
        request: &[u8],
        read: impl FnOnce(&Message<'_>) -> T,
    ) -> Result<T, Error> {
        self.send(request)?;
        loop {
            let Some(mut messages) = self.receive(true)? else { continue };
            if let Some(message) = messages.find(|message| message.seq == seq) {
                return match message.refusal() {
                    None => Ok(read(&message)),
                    Some(refusal) => Err(refusal.of(what)),
                };
            }
        }
    }

    /// What `read` finds in the answers to a dump, which is made again where other changes
    /// interrupt it. `what` names it in errors.
    pub(crate) fn list<T>(
        &mut self,
        what: &str,
        seq: &mut u32,
        put: impl Fn(&mut Vec<u8>, u32),
        mut read: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMPS {
            *seq = seq.wrapping_add(1);
            let (mut request, mut found) = (Vec::new(), Vec::new());
            put(&mut request, *seq);
            match self.dump(what, &request, &mut |message| found.extend(read(&message)))? {
                Dumped::Whole => return Ok(found),
                Dumped::Interrupted => {}
            }
        }
        Err(Error::Interrupted { request: what.to_owned(), times: DUMPS })
    }
}
