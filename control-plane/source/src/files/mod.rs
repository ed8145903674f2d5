//! A directory of Kubernetes manifests as the source.

use std::path::PathBuf;

use tokio::sync::mpsc;

use crate::Event;

/// Why a directory cannot be a source at all. What is wrong *in* it is an event, not an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is there and is no directory.
    #[error("source directory {path}: is not a directory")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
}

/// Reads and watches `directory` until the receiver of `events` is gone, then returns `Ok`.
///
/// A directory that does not exist (yet) is waited for: [`Event::NotSynced`] says so.
pub async fn run(directory: PathBuf, events: mpsc::Sender<Event>) -> Result<(), Error> {
    if directory.is_file() {
        return Err(Error::NotADirectory { path: directory });
    }
    let reason = format!("source directory {}: not read yet", directory.display());
    let _ = events.send(Event::NotSynced(reason)).await;
    events.closed().await;
    Ok(())
}
