//! Servers that keep a client waiting or send the same nonsense again, and what cannot be
//! programmed here.

use std::time::Duration;

use lockstep_model::{Key, Resource};
use lockstep_wire::{raw, v1};

use super::{ack_of, connect, following, hello_of, refetched_keys, refetches_everything};
use crate::report::{FailureReason, InForce, Report};
use crate::session::HASTY_REFETCHES;
use crate::session::fault::Fault;
use crate::testing::*;
use crate::{Held, Session};

fn with_affinity(index: u8) -> Resource {
    let Resource::Service(service) = service(index, 0) else { panic!("not a Service") };
    let mut service = (*service).clone();
    service.client_ip_affinity_seconds = Some(60);
    service.into()
}

#[test]
fn a_service_that_needs_a_missing_feature_stays_as_it_was() {
    let mut server = Server::new(7, cluster(2));
    let mut session = following(&server);
    server.upsert(with_affinity(0));
    server.upsert(with_affinity(5));
    let frame = server.delta(1, 3, false).remove(0);
    let step = session.receive(frame, at(0));
    assert!(step.send.is_none(), "another copy would not help");
    assert!(step.committed.unwrap().services.is_empty());
    let kept = session.state().service(&service_key(0)).unwrap();
    assert_eq!(kept.client_ip_affinity_seconds, None);
    let ack = ack_of(&session, &Report::default());
    let of = |failure: &v1::ResourceFailure| (failure.r#ref.clone().unwrap().key, failure.in_force());
    assert_eq!(
        ack.failures.iter().map(of).collect::<Vec<_>>(),
        [("shop/cart-5".to_owned(), v1::InForce::Nothing), ("shop/cart-0".to_owned(), v1::InForce::Previous)]
    );
    assert!(ack.failures.iter().all(|it| it.reason() == v1::FailureReason::Unsupported && !it.retrying));
    assert!(ack.failures[0].message.contains("SessionAffinity"), "{}", ack.failures[0].message);
    // Its endpoints go on, and the failure ends with its cause.
    server.upsert(endpoints(0, &[7]));
    let frame = server.delta(3, 4, true).remove(0);
    assert_eq!(session.receive(frame, at(0)).committed.unwrap().services, [service_key(0)]);
    server.upsert(service(0, 0));
    server.remove(&Key::Service(service_key(5)));
    let frame = server.delta(4, 6, false).remove(0);
    assert!(session.receive(frame, at(0)).committed.is_some());
    assert_eq!((session.faults(), session.state().digest()), (0, server.head().digest()));
}

#[test]
fn what_an_earlier_process_could_program_is_held_back_too() {
    let mut state = cluster(1);
    let resource = with_affinity(3);
    state.upsert(resource.version(), resource);
    let server = Server::new(7, state.clone());
    let position = server.position(1);
    let node = lockstep_model::NodeContext::unknown("node-a");
    let held = Held { state, position, node, names: lockstep_model::Interner::default() };
    let mut session = session(Some(held));
    assert!(session.state().service(&service_key(3)).is_none());
    let failure = session.faults.iter().next().unwrap();
    assert_eq!((failure.reason, failure.in_force), (FailureReason::Unsupported, InForce::Nothing));
    // No server takes it for complete, and a snapshot says the same again.
    let said = hello_of(session.connected(at(0))).held.unwrap();
    assert!(said.epoch == 0 && said.digest != position.digest.to_bytes()[..]);
    connect(&mut session, &server);
    assert_eq!((session.faults(), session.position()), (1, Some(position)));
}

#[test]
fn what_is_missing_by_name_costs_no_snapshot_at_a_reconnect() {
    let mut server = Server::new(7, cluster(2));
    let mut session = following(&server);
    server.upsert(with_affinity(5));
    session.receive(server.delta(1, 2, false).remove(0), at(0));
    assert_eq!(session.faults(), 1);
    session.disconnected();
    server.upsert(service(1, 9));
    let hello = session.connected(at(1));
    let said = hello_of(hello.clone());
    assert_eq!(said.position_digest[..], server.position(2).digest.to_bytes());
    assert_ne!(said.held.unwrap().digest, said.position_digest, "nobody takes it for complete");
    let (mode, frames) = server.answer(&hello);
    assert_eq!(mode, v1::ResumeMode::Delta);
    let step = session.receive(server.welcome(mode), at(1));
    assert_eq!(refetched_keys(&step), ["shop/cart-5"], "another release may have it in another form");
    let answer = server.refetched(&step.send.unwrap(), 3).remove(0);
    for frame in frames {
        assert_eq!(session.receive(frame, at(1)).committed.unwrap().services, [service_key(1)]);
    }
    assert!(session.receive(answer, at(1)).committed.is_some());
    assert_eq!((session.faults(), session.position()), (1, Some(server.position(3))));
    assert!(session.confirmed());
    // Mended meanwhile: the difference alone makes it whole.
    session.disconnected();
    server.upsert(service(5, 0));
    connect(&mut session, &server);
    assert_eq!((session.faults(), session.state().digest()), (0, server.head().digest()));
    assert!(hello_of(session.connected(at(2))).position_digest.is_empty(), "nothing is missing");
}

#[test]
fn what_is_missing_without_a_name_needs_a_snapshot_at_a_reconnect() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    let mut frame = server.delta(1, 2, false).remove(0);
    batch_of(&mut frame).upserts[0].body = None;
    session.receive(frame, at(0));
    assert_eq!(session.faults(), 1);
    session.disconnected();
    let hello = session.connected(at(1));
    assert!(hello_of(hello.clone()).position_digest.is_empty());
    assert_eq!(server.answer(&hello).0, v1::ResumeMode::Full);
}

#[test]
fn more_than_one_request_can_name_is_asked_for_as_everything() {
    let server = Server::new(7, cluster(1));
    let mut session = following(&server);
    let fault = |index: u32| {
        let key = lockstep_model::ServiceKey::new("n".repeat(63), format!("{index:063}"));
        Fault::unsupported(Key::Service(key), None, lockstep_model::Feature::Sctp)
    };
    for index in 0..1_000 {
        session.faults.insert(fault(index));
    }
    let welcome = |session: &mut Session| {
        session.disconnected();
        session.connected(at(1));
        session.receive(server.welcome(v1::ResumeMode::Delta), at(1))
    };
    assert_eq!(refetched_keys(&welcome(&mut session)).len(), 1_000);
    for index in 1_000..20_000 {
        session.faults.insert(fault(index));
    }
    let step = welcome(&mut session);
    assert!(refetches_everything(&step));
    // The answer is waited for, and ends what was wrong.
    assert!(session.receive(server.full().remove(0), at(1)).committed.unwrap().full);
    assert_eq!(session.faults(), 0);
}

/// Damages a body in a way its hash shows and its key survives.
fn damage(mut frame: raw::SyncResponse) -> raw::SyncResponse {
    let body = body_of(&mut frame, 0);
    let mut damaged = body.to_vec();
    *damaged.last_mut().unwrap() ^= 1;
    *body = damaged.into();
    frame
}

#[test]
fn a_body_that_is_always_damaged_is_asked_for_at_the_pace_of_heartbeats() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    server.upsert(service(0, 1));
    let mut step = session.receive(damage(server.delta(1, 2, false).remove(0)), at(0));
    let mut asked = 0;
    while let Some(request) = step.send {
        asked += 1;
        assert!(asked <= HASTY_REFETCHES, "client and server keep each other busy");
        step = session.receive(damage(server.refetched(&request, 2).remove(0)), at(0));
    }
    assert_eq!(asked, HASTY_REFETCHES);
    let step = session.receive(server.heartbeat(), at(5));
    assert_eq!(refetched_keys(&step), ["shop/cart-0"]);
    let answer = server.refetched(&step.send.unwrap(), 2).remove(0);
    assert!(session.receive(answer, at(5)).committed.is_some());
    assert_eq!(session.faults(), 0);
    assert!(session.receive(server.heartbeat(), at(10)).send.is_none());
}

#[test]
fn damage_without_a_name_is_mended_by_a_snapshot_and_does_not_pile_up() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    for variant in 1..100 {
        server.upsert(service(0, variant));
        let seq = server.seq();
        let mut frame = server.delta(seq - 1, seq, false).remove(0);
        *body_of(&mut frame, 0) = vec![variant; 3].into();
        session.receive(frame, at(0));
    }
    assert!(session.faults() <= 16, "{} faults", session.faults());
    let step = session.receive(server.heartbeat(), at(5));
    assert!(refetches_everything(&step));
    session.receive(server.full().remove(0), at(5));
    assert_eq!((session.faults(), session.state().digest()), (0, server.head().digest()));
    assert!(session.receive(server.heartbeat(), at(10)).send.is_none());
}

fn waits_no_longer(session: &mut Session, server: &Server) -> bool {
    (0..4).any(|beat| session.receive(server.heartbeat(), at(5 * beat)).end.is_some())
}

#[test]
fn a_snapshot_that_was_asked_for_and_never_comes_ends_the_connection() {
    let mut server = Server::new(7, cluster(1));
    let mut session = following(&server);
    let mut other = Server::new(7, cluster(2));
    assert!(refetches_everything(&session.receive(other.heartbeat(), at(0))));
    assert!(waits_no_longer(&mut session, &other));
    // The same for a transaction that never ends.
    let mut session = following(&server);
    server.upsert(service(0, 1));
    let mut frame = server.delta(1, 2, false).remove(0);
    update_of(&mut frame).commit = false;
    session.receive(frame, at(0));
    assert!(waits_no_longer(&mut session, &server));
    other.epoch = 8;
    let mut session = following(&server);
    assert!(session.receive(other.heartbeat(), at(0)).end.is_some(), "a head of another epoch");
}

#[test]
fn an_absurd_heartbeat_interval_is_survived() {
    let server = Server::new(7, cluster(1));
    let mut session = session(None);
    session.connected(at(0));
    let mut welcome = server.welcome(v1::ResumeMode::Full);
    let Some(raw::sync_response::Kind::Welcome(inside)) = &mut welcome.kind else { panic!("no Welcome") };
    inside.heartbeat_interval = Duration::from_secs(i64::MAX.unsigned_abs()).try_into().ok();
    assert!(inside.heartbeat_interval.is_some());
    session.receive(welcome, at(0));
    assert!(session.tick(at(1_000)).is_none());
}
