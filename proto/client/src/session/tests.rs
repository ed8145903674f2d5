mod property;
mod stubborn;

use std::time::Duration;

use lockstep_model::{Key, Resource, ServiceKey, State, Version};
use lockstep_wire::{raw, v1};
use prost::Message;

use super::{Session, Step};
use crate::report::{Failure, FailureReason, InForce, MAX_FAILURES, MAX_MESSAGE_BYTES, Report, Stats};
use crate::testing::*;
use crate::{Held, Position};

/// A session that follows `server` and holds its head.
fn following(server: &Server) -> Session {
    let mut session = session(None);
    connect(&mut session, server);
    assert_eq!(session.state().digest(), server.head().digest());
    session
}

fn connect(session: &mut Session, server: &Server) -> Vec<Step> {
    let hello = session.connected(at(0));
    let (mode, frames) = server.answer(&hello);
    let mut steps = vec![session.receive(server.welcome(mode), at(0))];
    steps.extend(frames.into_iter().map(|frame| session.receive(frame, at(0))));
    steps
}

fn refetches_everything(step: &Step) -> bool {
    matches!(&step.send, Some(v1::SyncRequest { kind: Some(v1::sync_request::Kind::Refetch(refetch)) }) if refetch.everything)
}

fn refetched_keys(step: &Step) -> Vec<String> {
    match &step.send {
        Some(v1::SyncRequest { kind: Some(v1::sync_request::Kind::Refetch(refetch)) }) => {
            assert!(!refetch.everything);
            refetch.refs.iter().map(|reference| reference.key.clone()).collect()
        }
        other => panic!("not a Refetch: {other:?}"),
    }
}

fn hello_of(request: v1::SyncRequest) -> v1::Hello {
    match request.kind {
        Some(v1::sync_request::Kind::Hello(hello)) => hello,
        other => panic!("not a Hello: {other:?}"),
    }
}

fn ack_of(session: &Session, report: &Report) -> v1::Ack {
    match session.report(report).unwrap().kind {
        Some(v1::sync_request::Kind::Ack(ack)) => ack,
        other => panic!("not an Ack: {other:?}"),
    }
}

fn assert_unchanged(session: &Session, state: &State, position: Position) {
    assert_eq!(session.state().digest(), state.digest());
    assert_eq!(session.position(), Some(position));
}

#[test]
fn a_first_snapshot_is_applied_whole_and_reported_by_service() {
    let server = Server::new(7, cluster(3));
    let mut session = session(None);
    assert!(hello_of(session.connected(at(0))).held.is_none());
    let step = session.receive(server.welcome(v1::ResumeMode::Full), at(0));
    assert!(step.node_changed && step.committed.is_none() && !session.confirmed());
    let mut frames = server.full();
    let committed = session.receive(frames.remove(0), at(0)).committed.unwrap();
    assert_eq!(committed.services, [service_key(0), service_key(1), service_key(2)]);
    assert_eq!(committed.changes.len(), 6);
    assert!(committed.full && session.confirmed());
    assert_eq!(committed.position, server.position(1));
}

#[test]
fn an_endpoint_patch_changes_one_service() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(endpoints(1, &[1, 3, 9]));
    let step = session.receive(server.delta(1, 2, true).remove(0), at(0));
    let committed = step.committed.unwrap();
    assert_eq!(committed.services, [service_key(1)]);
    assert!(!committed.full && step.send.is_none());
    assert_unchanged(&session, server.head(), server.position(2));
}

#[test]
fn nothing_changes_before_the_commit() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    let mut frame = server.delta(1, 2, false).remove(0);
    update_of(&mut frame).commit = false;
    let mut end = frame.clone();
    assert!(session.receive(frame, at(0)).committed.is_none());
    assert_unchanged(&session, &server.history[1], server.position(1));
    let end_update = update_of(&mut end);
    end_update.payload = None;
    end_update.commit = true;
    assert!(session.receive(end, at(0)).committed.is_some());
    assert_unchanged(&session, server.head(), server.position(2));
}

#[test]
fn a_cut_transaction_is_forgotten() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    let mut frame = server.delta(1, 2, false).remove(0);
    update_of(&mut frame).commit = false;
    session.receive(frame, at(0));
    session.disconnected();
    assert_unchanged(&session, &server.history[1], server.position(1));
    connect(&mut session, &server);
    assert_unchanged(&session, server.head(), server.position(2));
}

#[test]
fn resuming_in_sync_adopts_the_position_of_the_new_server() {
    let old = Server::new(7, cluster(3));
    let mut session = following(&old);
    session.disconnected();
    let mut new = Server::new(8, cluster(3));
    new.publish(|_| {});
    let steps = connect(&mut session, &new);
    let committed = steps[0].committed.as_ref().unwrap();
    assert!(committed.services.is_empty());
    assert_unchanged(&session, new.head(), new.position(2));
    assert!(session.confirmed());
}

#[test]
fn what_was_restored_resumes_where_it_stopped() {
    let mut server = Server::new(7, cluster(3));
    let before = following(&server);
    let held = Held {
        state: before.state().clone(),
        position: before.position().unwrap(),
        node: before.node().clone(),
        names: Default::default(),
    };
    server.remove(&Key::Service(service_key(2)));
    let mut session = session(Some(held));
    assert!(!session.confirmed());
    connect(&mut session, &server);
    assert_unchanged(&session, server.head(), server.position(2));
}

#[test]
fn duplicates_and_older_transactions_change_nothing() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    server.upsert(service(0, 2));
    for frame in server.delta(1, 2, false).into_iter().chain(server.delta(2, 3, false)) {
        session.receive(frame, at(0));
    }
    for (from, to) in [(1, 2), (2, 3), (1, 3)] {
        let step = session.receive(server.delta(from, to, false).remove(0), at(0));
        assert!(step.committed.is_none() && step.send.is_none() && step.end.is_none());
        assert_unchanged(&session, server.head(), server.position(3));
    }
}

#[test]
fn a_gap_is_noticed_and_everything_fetched_once() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    server.upsert(service(1, 1));
    server.upsert(service(2, 1));
    let step = session.receive(server.delta(2, 3, false).remove(0), at(0));
    assert!(refetches_everything(&step));
    assert_unchanged(&session, &server.history[1], server.position(1));
    // What is on its way builds on the lost state too: passed over without asking again.
    let step = session.receive(server.delta(3, 4, false).remove(0), at(0));
    assert!(step.send.is_none() && step.committed.is_none());
    let committed = session.receive(server.full().remove(0), at(0)).committed.unwrap();
    assert_eq!(committed.services, [service_key(0), service_key(1), service_key(2)]);
    assert_unchanged(&session, server.head(), server.position(4));
}

#[test]
fn a_transaction_that_does_not_add_up_is_not_applied() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.publish(|state| {
        for resource in [service(0, 1), service(1, 1)] {
            state.upsert(resource.version(), resource);
        }
        state.remove(&Key::EndpointSet(set_key(2)));
    });
    let mut frame = server.delta(1, 2, false).remove(0);
    batch_of(&mut frame).upserts.pop();
    let step = session.receive(frame, at(0));
    assert!(refetches_everything(&step) && step.committed.is_none());
    assert_unchanged(&session, &server.history[1], server.position(1));
    for key in [0, 1, 2] {
        assert!(session.state().service(&service_key(key)).is_some());
        assert_eq!(session.state().endpoint_sets(&service_key(key)).count(), 1);
    }
}

#[test]
fn a_snapshot_that_never_adds_up_ends_the_connection() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(service(9, 1));
    let damaged = || {
        let mut frame = server.full().remove(0);
        update_of(&mut frame).to = Some(server.position(1).to_wire(0));
        update_of(&mut frame).to.as_mut().unwrap().seq = 2;
        frame
    };
    assert!(refetches_everything(&session.receive(damaged(), at(0))));
    assert!(session.receive(damaged(), at(0)).end.is_some());
    assert_unchanged(&session, &server.history[1], server.position(1));
}

/// An unreadable new version keeps the old one in force, everything else is applied, and the
/// fault is named with the version that is not in force.
#[test]
fn one_unreadable_resource_is_isolated() {
    let server = Server::new(7, cluster(2));
    let mut session = following(&server);
    // A body that is no Service, sent with its right hash and counted in the server's digest.
    let bad = vec![10, 4, b's', b'h', b'o', b'p', 18, 6, b'c', b'a', b'r', b't', b'-', b'0', 0x18, 0x7f];
    let mut announced = server.clone();
    announced.upsert(service(1, 5));
    let mut frame = announced.delta(1, 2, false).remove(0);
    let bad_version = Version::of(&bad);
    batch_of(&mut frame).upserts.push(raw::Resource {
        version: bad_version.0.to_vec().into(),
        body: Some(raw::resource::Body::Service(bad.into())),
    });
    let mut digest = announced.head().digest();
    let key = Key::Service(service_key(0));
    digest.remove(&key, announced.head().get(&key).unwrap().0);
    digest.add(&key, bad_version);
    update_of(&mut frame).to = Some(Position { epoch: 7, seq: 2, digest }.to_wire(0));

    let step = session.receive(frame, at(3));
    assert_eq!(step.committed.unwrap().services, [service_key(1)]);
    assert!(step.send.is_none(), "a second copy would be as unreadable");
    assert_eq!(session.state().get(&key).unwrap().0, service(0, 0).version());
    let ack = ack_of(&session, &Report::default());
    assert_eq!((ack.received_seq, ack.failures.len()), (2, 1));
    let failure = &ack.failures[0];
    assert_eq!(failure.r#ref.as_ref().unwrap().key, "shop/cart-0");
    assert_eq!(failure.r#ref.as_ref().unwrap().version, bad_version.0.to_vec());
    assert_eq!(failure.in_force(), v1::InForce::Previous);
    assert_eq!(failure.reason(), v1::FailureReason::Invalid);

    // On the next connection the client admits that it is not complete, and asks again.
    session.disconnected();
    let hello = hello_of(session.connected(at(4)));
    assert_eq!(Position::from_wire(&hello.held.unwrap()).unwrap().digest, session.state().digest());
    let step = session.receive(server.welcome(v1::ResumeMode::Delta), at(4));
    assert_eq!(refetched_keys(&step), ["shop/cart-0"]);
}

fn damage_patch(frame: &mut raw::SyncResponse, damage: impl FnOnce(&mut raw::EndpointPatch)) {
    let bytes = &mut batch_of(frame).patches[0];
    let mut patch = raw::EndpointPatch::decode(bytes.clone()).unwrap();
    damage(&mut patch);
    *bytes = patch.encode_to_vec().into();
}

#[test]
fn a_fault_ends_when_the_resource_is_mended() {
    let mut server = Server::new(7, cluster(2));
    let mut session = following(&server);
    server.upsert(endpoints(0, &[4]));
    let mut frame = server.delta(1, 2, true).remove(0);
    damage_patch(&mut frame, |patch| patch.base_version = vec![0; 16].into());
    let step = session.receive(frame, at(0));
    assert_eq!(refetched_keys(&step), ["shop/cart-0/cart-0-x1"]);
    assert_eq!((session.faults(), session.position()), (1, Some(server.position(2))));
    // The stream goes on meanwhile.
    server.upsert(service(1, 1));
    assert!(session.receive(server.delta(2, 3, true).remove(0), at(0)).committed.is_some());
    let step = session.receive(server.refetched(&step.send.unwrap(), 3).remove(0), at(0));
    assert_eq!(step.committed.unwrap().services, [service_key(0)]);
    assert_eq!(session.faults(), 0);
    assert_unchanged(&session, server.head(), server.position(3));
}

#[test]
fn a_patch_with_another_result_is_fetched_again() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    server.upsert(endpoints(0, &[1, 2, 4]));
    let mut frame = server.delta(1, 2, true).remove(0);
    damage_patch(&mut frame, |patch| patch.removed_addresses.clear());
    let step = session.receive(frame, at(0));
    assert_eq!(refetched_keys(&step), ["shop/cart-0/cart-0-x1"]);
    assert_eq!(session.state().digest(), server.history[1].digest());
}

#[test]
fn a_damaged_body_is_fetched_again() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    let mut frame = server.delta(1, 2, false).remove(0);
    let body = body_of(&mut frame, 0);
    let mut damaged = body.to_vec();
    *damaged.last_mut().unwrap() ^= 1;
    *body = damaged.into();
    let step = session.receive(frame, at(0));
    assert_eq!(refetched_keys(&step), ["shop/cart-0"]);
    let step = session.receive(server.refetched(&step.send.unwrap(), 2).remove(0), at(0));
    assert_eq!(step.committed.unwrap().services, [service_key(0)]);
    assert_unchanged(&session, server.head(), server.position(2));
}

#[test]
fn messages_out_of_place_end_the_connection_and_unknown_ones_do_not() {
    let server = Server::new(7, cluster(1));
    let mut early = session(None);
    early.connected(at(0));
    assert!(early.receive(server.full().remove(0), at(0)).end.is_some());
    let mut session = following(&server);
    assert!(session.receive(raw::SyncResponse { kind: None }, at(0)).end.is_none());
    let mut other_epoch = Server::new(9, cluster(2)).full().remove(0);
    update_of(&mut other_epoch).commit = true;
    assert!(session.receive(other_epoch, at(0)).end.is_some());
    assert!(session.receive(server.welcome(v1::ResumeMode::InSync), at(0)).end.is_some());
    let goodbye = v1::Goodbye { message: "going away".to_owned(), ..Default::default() };
    let step = session.receive(decoded(v1::sync_response::Kind::Goodbye(goodbye)), at(0));
    assert!(step.end.is_none() && step.committed.is_none(), "the server ends the stream itself");
    assert_unchanged(&session, server.head(), server.position(1));
}

#[test]
fn silence_is_noticed_after_three_intervals() {
    let server = Server::new(7, cluster(1));
    let mut session = following(&server);
    assert!(session.tick(at(15)).is_none());
    assert!(session.tick(at(16)).is_some());
    session.receive(server.heartbeat(), at(16));
    assert!(session.tick(at(31)).is_none());
    session.disconnected();
    assert!(session.tick(at(99)).is_none());
}

#[test]
fn a_heartbeat_with_another_digest_fetches_everything() {
    let server = Server::new(7, cluster(2));
    let mut session = following(&server);
    let mut other = Server::new(7, cluster(1));
    assert!(refetches_everything(&session.receive(other.heartbeat(), at(0))));
    // A server that is ahead and sends nothing has lost this stream.
    let mut session = following(&server);
    other.upsert(service(9, 9));
    assert!(session.receive(other.heartbeat(), at(1)).end.is_none());
    assert!(session.receive(other.heartbeat(), at(2)).end.is_none());
    assert!(session.receive(other.heartbeat(), at(3)).end.is_some());
}

#[test]
fn an_ack_counts_only_in_the_epoch_of_the_server() {
    let old = Server::new(7, cluster(2));
    let mut session = following(&old);
    let report = Report { applied: session.position(), verified: session.position(), ..Default::default() };
    let ack = ack_of(&session, &report);
    assert_eq!((ack.received_seq, ack.applied_seq, ack.verified_seq), (1, 1, 1));
    assert_eq!(ack.outcome(), v1::Outcome::Verified);
    session.disconnected();
    assert!(session.report(&report).is_none());
    let new = Server::new(8, cluster(3));
    session.connected(at(0));
    session.receive(new.welcome(v1::ResumeMode::Full), at(0));
    let ack = ack_of(&session, &report);
    assert_eq!((ack.received_seq, ack.applied_seq, ack.outcome()), (0, 0, v1::Outcome::Received));
    assert_eq!(ack.position.unwrap().epoch, 8);
    session.receive(new.full().remove(0), at(0));
    let ack = ack_of(&session, &report);
    assert_eq!((ack.received_seq, ack.applied_seq, ack.outcome()), (1, 0, v1::Outcome::Received));
}

#[test]
fn an_ack_names_the_worst_failures_and_counts_the_rest() {
    let server = Server::new(7, cluster(1));
    let session = following(&server);
    let failure = |index: usize| Failure {
        key: Some(Key::Service(ServiceKey::new("shop", format!("cart-{index:04}")))),
        version: None,
        in_force: if index == 299 { InForce::Nothing } else { InForce::Previous },
        reason: FailureReason::Kernel,
        message: "ä".repeat(400),
        retrying: true,
        attempts: 2,
        first_seen: at(1).wall,
    };
    let report = Report {
        applied: session.position(),
        verified: session.position(),
        failures: (0..300).map(failure).collect(),
        stats: Some(Stats { queue: Duration::from_micros(3), coalesced: 1, ..Default::default() }),
        ..Default::default()
    };
    let ack = ack_of(&session, &report);
    assert_eq!((ack.failures.len(), ack.failures_truncated), (MAX_FAILURES, 44));
    assert_eq!(ack.failures[0].r#ref.as_ref().unwrap().key, "shop/cart-0299");
    assert!(ack.failures.iter().all(|failure| failure.message.len() <= MAX_MESSAGE_BYTES));
    assert_eq!(ack.outcome(), v1::Outcome::Partial);
    let broken = Report { backend_error: "no netlink".to_owned(), ..report };
    assert_eq!(ack_of(&session, &broken).outcome(), v1::Outcome::Failed);
}

#[test]
fn an_empty_cluster_is_a_complete_state() {
    let server = Server::new(7, State::default());
    let mut session = session(None);
    let steps = connect(&mut session, &server);
    assert!(steps[1].committed.as_ref().unwrap().full);
    assert_eq!(session.position(), Some(server.position(1)));
}

#[test]
fn a_repeated_snapshot_reports_only_the_difference() {
    let mut server = Server::new(7, cluster(3));
    let mut session = following(&server);
    server.upsert(endpoints(1, &[7]));
    server.remove(&Key::Service(service_key(2)));
    let committed = session.receive(server.full().remove(0), at(0)).committed.unwrap();
    let changed: Vec<Key> = committed.changes.iter().map(super::Change::key).collect();
    assert_eq!(changed, [Key::Service(service_key(2)), Key::EndpointSet(set_key(1))]);
    let held = session.state().get(&Key::EndpointSet(set_key(1)));
    assert!(matches!(held, Some((_, Resource::EndpointSet(set))) if set.endpoints.len() == 1));
}

/// It changes no Service, and a kind that is not known here takes nothing away with it.
#[test]
fn what_belongs_to_no_service_is_taken_in_and_removed() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    server.upsert(service_cidr(1, 1));
    let committed = session.receive(server.delta(1, 2, true).remove(0), at(3)).committed.unwrap();
    assert_eq!((committed.services.len(), committed.changes.len()), (0, 1));
    assert_eq!(session.state().service_cidrs().count(), 1);

    server.remove(&Key::ServiceCidr(cidr_key(1)));
    let mut frame = server.delta(2, 3, true).remove(0);
    let unknown = v1::ResourceRef { kind: 99, key: "a/b".into(), ..Default::default() };
    batch_of(&mut frame).removals.push(unknown);
    let committed = session.receive(frame, at(4)).committed.unwrap();
    assert_eq!((committed.services.len(), committed.changes.len()), (0, 1));
    assert_eq!(session.state().service_cidrs().count(), 0);
    assert_eq!(ack_of(&session, &Report::default()).failures, []);
}
