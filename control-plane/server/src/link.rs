use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use lockstep_model::Key;
use lockstep_wire::v1;
use tokio::sync::Notify;
use tonic::Status;

/// More keys than this are asked for as everything.
const REFETCH_KEYS: usize = 4_096;

/// What the rest of the server has to say to one session. Not a queue: a later word of a kind
/// replaces the one before, so it is small whatever the session does.
#[derive(Debug, Default)]
pub(crate) struct Link {
    mail: Mutex<Mail>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct Mail {
    end: Option<End>,
    context: bool,
    refetch: Option<Refetch>,
}

/// Why a session ends.
#[derive(Debug, Clone)]
pub(crate) enum End {
    /// The server says so, with a last message.
    Goodbye(v1::Goodbye),
    /// The node's half is broken or breaks the contract.
    Failed(Status),
}

impl End {
    /// For people.
    pub(crate) fn why(&self) -> &str {
        match self {
            End::Goodbye(goodbye) => &goodbye.message,
            End::Failed(status) => status.message(),
        }
    }
}

/// What a node asks for again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refetch {
    Everything,
    Keys(BTreeSet<Key>),
}

/// What a session finds.
#[derive(Debug)]
pub(crate) enum Note {
    End(End),
    /// The facts about the node are others.
    Context,
    Refetch(Refetch),
}

impl Link {
    /// The first reason to end counts.
    pub(crate) fn end(&self, end: End) {
        self.put(|mail| {
            mail.end.get_or_insert(end);
        });
    }

    pub(crate) fn context(&self) {
        self.put(|mail| mail.context = true);
    }

    pub(crate) fn refetch(&self, more: Refetch) {
        self.put(|mail| {
            mail.refetch = Some(match (mail.refetch.take(), more) {
                (None, Refetch::Keys(keys)) if keys.len() <= REFETCH_KEYS => Refetch::Keys(keys),
                (Some(Refetch::Keys(mut keys)), Refetch::Keys(more)) => {
                    keys.extend(more);
                    match keys.len() <= REFETCH_KEYS {
                        true => Refetch::Keys(keys),
                        false => Refetch::Everything,
                    }
                }
                _ => Refetch::Everything,
            });
        });
    }

    /// The end, if it has come. Asked for between any two messages.
    pub(crate) fn take_end(&self) -> Option<End> {
        self.lock().end.take()
    }

    /// True where the facts about the node are others. Asked for before a transaction is begun.
    pub(crate) fn take_context(&self) -> bool {
        std::mem::take(&mut self.lock().context)
    }

    /// The next note. Asked for between transactions.
    pub(crate) fn take(&self) -> Option<Note> {
        let mut mail = self.lock();
        let end = mail.end.take().map(Note::End);
        let end = end.or_else(|| std::mem::take(&mut mail.context).then_some(Note::Context));
        end.or_else(|| mail.refetch.take().map(Note::Refetch))
    }

    /// Waits for a note that was not there at the last `take`.
    pub(crate) async fn changed(&self) {
        self.notify.notified().await;
    }

    fn put(&self, write: impl FnOnce(&mut Mail)) {
        write(&mut self.lock());
        self.notify.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
