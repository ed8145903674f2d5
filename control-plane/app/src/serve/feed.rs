//! From the source's words to the server's: the server knows no source, the source no server.

use lockstep_server::{Input, NodeInput, QuarantineInput};
use lockstep_source::{Changes, Event, NodeChange, QuarantineChange};
use tokio::sync::mpsc;

/// Passes events on until either end is gone.
pub(super) async fn run(mut events: mpsc::Receiver<Event>, inputs: mpsc::Sender<Input>) {
    while let Some(event) = events.recv().await {
        let input = match event {
            Event::Changes(changes) => self::changes(changes),
            Event::Synced => Input::Synced,
            Event::NotSynced(reason) => Input::NotSynced(reason),
            Event::Alive => Input::Alive,
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

fn changes(from: Changes) -> Input {
    let mut changes = lockstep_store::Changes::default();
    // An object that moved is removed under its old key before it is put under its new one.
    from.removals.into_iter().for_each(|key| changes.remove(key));
    from.upserts.into_iter().for_each(|resource| changes.upsert(resource));
    if let Some(at) = from.trigger {
        changes.triggered(at);
    }
    from.revisions.into_iter().for_each(|(resource, version)| changes.revision(resource, version));
    let nodes = from.nodes.into_iter().map(|node| match node {
        NodeChange::Upsert(context) => NodeInput::Upsert(context),
        NodeChange::Remove(name) => NodeInput::Remove(name),
    });
    let quarantine = from.quarantine.into_iter().map(|change| match change {
        QuarantineChange::Add { object, fault, previous_in_force } => {
            QuarantineInput::Add { kind: object.kind, name: object.name, fault, previous_in_force }
        }
        QuarantineChange::Remove(object) => QuarantineInput::Remove { kind: object.kind, name: object.name },
    });
    Input::Changes { changes, nodes: nodes.collect(), quarantine: quarantine.collect() }
}
