//! A state from what was kept of a stream.

use std::time::SystemTime;

use lockstep_model::{Interner, State};
use lockstep_wire::raw;

use super::fault::Faults;
use super::transaction::{Held, Transaction};
use crate::Position;

/// Rebuilds a state from updates that build on each other, outside any stream: for what was
/// kept of one. Accepts only what adds up, but for resources of a kind that a newer release wrote
/// and this one does not have: they are passed over, as on a stream.
#[derive(Default)]
pub(crate) struct Replay {
    state: State,
    /// Of unknown kinds only: without key and version they are missing from the digest, so that of
    /// what is held is no longer the announced one.
    passed_over: Faults,
    staged: Option<Transaction>,
}

impl Replay {
    /// Takes an update in; returns the position where it commits. What is held there has another
    /// digest where something was passed over.
    pub(crate) fn update(
        &mut self,
        update: raw::Update,
        interner: &mut Interner,
    ) -> Result<Option<Position>, String> {
        let to = update.to.as_ref().and_then(Position::from_wire).ok_or("an update without position")?;
        let mut transaction = match self.staged.take() {
            Some(staged) if staged.to == to => staged,
            Some(_) => return Err("a transaction was not committed".to_owned()),
            None => Transaction::new(to, update.full),
        };
        let commit = update.commit;
        let held = Held { state: &self.state, identity: None, now: SystemTime::UNIX_EPOCH };
        transaction.stage(update, &held, interner).map_err(|error| error.to_string())?;
        if !commit {
            self.staged = Some(transaction);
            return Ok(None);
        }
        if let Some(why) = transaction.damage() {
            // Damage that a fault would explain away is damage all the same.
            return Err(why.to_owned());
        }
        transaction
            .commit(&mut self.state, &mut self.passed_over)
            .map_err(|digest| format!("a transaction adds up to {digest}, not to {}", to.digest))?;
        Ok(Some(to))
    }

    /// The state after the last commit.
    pub(crate) fn into_state(self) -> State {
        self.state
    }
}
