//! Refusals that a socket hears of as they come.

use std::os::fd::{AsFd, AsRawFd as _};

use crate::Errno;

/// Has a socket of one IP family report ICMP errors at once (`IP_RECVERR`, `IPV6_RECVERR`).
///
/// TCP and UDP do so anyway while they connect. SCTP keeps them to itself until it gives up, which
/// takes it minutes (net/sctp/input.c, `sctp_v4_err_handle`).
pub fn hear(socket: &impl AsFd, v6: bool) -> Result<(), Errno> {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) } else { (libc::IPPROTO_IP, libc::IP_RECVERR) };
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or_default();
    // SAFETY: the pointer and the length describe `on`, which outlives the call, as the socket does.
    let result =
        unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const on).cast(), length) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}
