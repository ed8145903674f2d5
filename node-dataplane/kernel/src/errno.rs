use std::fmt;

/// An errno of the kernel, classified by what a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// The object that was named does not exist.
    pub const NOENT: Errno = Errno(libc::ENOENT);
    /// What the object is in does not exist, such as a virtual server of IPVS.
    pub const SRCH: Errno = Errno(libc::ESRCH);
    /// The object exists already.
    pub const EXIST: Errno = Errno(libc::EEXIST);
    /// The set is full.
    pub const NFILE: Errno = Errno(libc::ENFILE);
    /// The object is still in use.
    pub const BUSY: Errno = Errno(libc::EBUSY);
    /// An attribute or a combination is not understood.
    pub const INVAL: Errno = Errno(libc::EINVAL);
    /// The kernel is out of memory.
    pub const NOMEM: Errno = Errno(libc::ENOMEM);

    /// The errno of the last failed system call of this thread.
    pub fn last() -> Self {
        Self(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    /// True where the same call may succeed when made again, without any other change.
    pub fn is_retryable(self) -> bool {
        matches!(self.0, libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::EBUSY | libc::ENOMEM)
    }

    /// True where memory or a limit ran out.
    pub fn is_resources(self) -> bool {
        matches!(self.0, libc::ENOMEM | libc::ENFILE | libc::EMFILE | libc::ENOSPC | libc::ENOBUFS)
    }

    /// True where the kernel does not know what was asked of it, as without the subsystem.
    pub fn is_unsupported(self) -> bool {
        matches!(self.0, libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
    }

    /// True where the caller's idea of what the kernel holds is wrong.
    pub fn is_state_mismatch(self) -> bool {
        matches!(self.0, libc::ENOENT | libc::EEXIST)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}
