//! Network namespaces: run code in one that is new, or in one that `ip netns` knows.
//!
//! A namespace belongs to a thread, so the code runs on a thread of its own and the caller's
//! thread never changes. A socket that is opened inside stays inside.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;

use crate::Errno;

/// Where `ip netns` keeps its namespaces.
const NAMED: &str = "/run/netns";

/// Entering a network namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A new namespace was refused; it takes CAP_SYS_ADMIN.
    #[error("new network namespace (needs root)")]
    New(#[source] Errno),
    /// The namespace is not there or cannot be opened.
    #[error("network namespace {name}")]
    Open {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Entering was refused.
    #[error("enter network namespace {name}")]
    Enter {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// No thread could be started.
    #[error("thread for a network namespace")]
    Thread(#[source] std::io::Error),
}

/// Runs `work` in a new network namespace that ends with it. A panic goes on in the caller.
pub fn run_in_new<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    on_thread(|| {
        // SAFETY: unshare(2) takes no pointers and CLONE_NEWNET concerns this thread only.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        if result < 0 { Err(Error::New(Errno::last())) } else { Ok(work()) }
    })
}

/// Runs `work` in the namespace that `ip netns add NAME` made. A panic goes on in the caller.
pub fn run_in<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let file = File::open(Path::new(NAMED).join(name))
        .map_err(|source| Error::Open { name: name.to_owned(), source })?;
    on_thread(|| {
        // SAFETY: setns(2) takes no pointers; `file` is open until after the call.
        let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        if result < 0 {
            return Err(Error::Enter { name: name.to_owned(), errno: Errno::last() });
        }
        Ok(work())
    })
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, work).map_err(Error::Thread)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
