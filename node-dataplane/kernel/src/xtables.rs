//! The extent of a legacy xtables table: one system call, whatever its size.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// How much a table holds, and where its built-in chains are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Rules, with the kernel's own ends of chains.
    pub entries: u32,
    /// Bytes in the kernel's form.
    pub bytes: u32,
    /// Where each built-in chain begins, in bytes.
    pub begins: [u32; HOOKS],
    /// Where the policy of each built-in chain is, which is its end.
    pub ends: [u32; HOOKS],
}

/// `NF_INET_NUMHOOKS`.
const HOOKS: usize = 5;

/// `struct ipt_getinfo`; the IPv6 one is laid out alike.
#[repr(C)]
struct GetInfo {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; HOOKS],
    underflow: [u32; HOOKS],
    entries: u32,
    size: u32,
}

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`.
const GET_INFO: i32 = 64;

/// The extent of a table in the network namespace of the calling thread; `None` where the table
/// does not exist. Asking may load the table's module, as `iptables -t TABLE` does.
pub fn extent(v6: bool, table: &str) -> io::Result<Option<Extent>> {
    let (domain, level) = match v6 {
        false => (libc::AF_INET, libc::IPPROTO_IP),
        true => (libc::AF_INET6, libc::IPPROTO_IPV6),
    };
    // SAFETY: socket takes plain numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, new, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: GetInfo is made of integers only, for which all zeroes are a value.
    let mut info: GetInfo = unsafe { zeroed() };
    let name = table.as_bytes();
    let length = name.len().min(info.name.len() - 1);
    info.name[..length].copy_from_slice(&name[..length]);
    let mut size = libc::socklen_t::try_from(size_of::<GetInfo>()).unwrap_or_default();
    // SAFETY: `info` is valid for writes of `size` bytes, which is its own size; the kernel
    // reads the name from it and fills the rest.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, GET_INFO, (&raw mut info).cast(), &raw mut size)
    };
    if result == 0 {
        let GetInfo { entries, size: bytes, hook_entry: begins, underflow: ends, .. } = info;
        return Ok(Some(Extent { entries, bytes, begins, ends }));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOPROTOOPT) => Ok(None),
        _ => Err(error),
    }
}
