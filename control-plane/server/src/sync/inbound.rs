//! The node's half of a stream.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use lockstep_store::StreamId;
use lockstep_wire::{convert as wire, v1};
use tonic::{Status, Streaming};
use tracing::debug;

use crate::Hub;
use crate::convert;
use crate::hub::invalid;
use crate::link::{End, Link, Refetch};

/// Takes what the node says until it says no more. A node that closes its half only listens
/// from then on; one that breaks the contract loses the stream.
pub(super) async fn run(
    hub: Arc<Hub>,
    stream: StreamId,
    link: Arc<Link>,
    mut inbound: Streaming<v1::SyncRequest>,
) {
    loop {
        let taken = match inbound.message().await {
            Ok(Some(request)) => take(&hub, stream, &link, request),
            Ok(None) => return,
            Err(status) => Err(status),
        };
        if let Err(status) = taken {
            link.end(End::Failed(status));
            return;
        }
    }
}

fn take(hub: &Hub, stream: StreamId, link: &Link, request: v1::SyncRequest) -> Result<(), Status> {
    use v1::sync_request::Kind;
    match request.kind {
        Some(Kind::Ack(ack)) => take_ack(hub, stream, ack),
        Some(Kind::Refetch(refetch)) => {
            hub.lock().nodes.heard(stream, Instant::now());
            hub.counters.refetches.inc();
            take_refetch(link, refetch)
        }
        Some(Kind::Hello(_)) => Err(invalid("hello: was sent already")),
        // A kind of a later protocol: nothing to understand, nothing to break.
        None => Ok(()),
    }
}

fn take_ack(hub: &Hub, stream: StreamId, ack: v1::Ack) -> Result<(), Status> {
    let report = convert::report(ack).map_err(invalid)?;
    let result = {
        let mut shared = hub.lock();
        let shared = &mut *shared;
        shared.nodes.ack(stream, report, &shared.store, Instant::now())
    };
    match result {
        Ok(()) => {
            hub.counters.acks.inc();
            hub.touch();
            Ok(())
        }
        Err(error) => {
            hub.counters.acks_refused.inc();
            debug!(%error, "ack not taken");
            if error.is_stale() { Ok(()) } else { Err(invalid(format!("ack: {error}"))) }
        }
    }
}

fn take_refetch(link: &Link, refetch: v1::Refetch) -> Result<(), Status> {
    if refetch.everything {
        link.refetch(Refetch::Everything);
        return Ok(());
    }
    let mut keys = BTreeSet::new();
    for (index, named) in refetch.refs.iter().enumerate() {
        let (key, _) =
            wire::key_from_wire(named).map_err(|fault| invalid(format!("refetch.refs[{index}].{fault}")))?;
        keys.insert(key);
    }
    if !keys.is_empty() {
        link.refetch(Refetch::Keys(keys));
    }
    Ok(())
}
