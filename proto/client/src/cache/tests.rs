use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lockstep_model::{Key, NodeContext, State, Version};
use lockstep_wire::frame::Frame;
use lockstep_wire::{convert, v1};

use super::{Cache, CacheError, LOG, Restored, format};
use crate::Position;
use crate::session::{Change, Committed};
use crate::testing::{cidr_key, cluster, endpoints, service, service_cidr, service_key, set_key};

fn node() -> NodeContext {
    NodeContext {
        uid: Some("uid-1".into()),
        zone: Some("a".into()),
        node_addresses: vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()],
        ..NodeContext::unknown("node-a")
    }
}

fn position(seq: u64, state: &State) -> Position {
    Position { epoch: 7, seq, digest: state.digest() }
}

/// Applies changes and records them as a session would.
fn commit(cache: &mut Cache, state: &mut State, seq: u64, changes: Vec<Change>) {
    for change in &changes {
        match change {
            Change::Upsert(version, resource) => state.upsert(*version, resource.clone()),
            Change::Remove(key) => state.remove(key),
        };
    }
    let committed = Committed {
        changes,
        services: Vec::new(),
        position: position(seq, state),
        held: state.digest(),
        trigger: None,
        full: false,
    };
    cache.record(vec![committed], &node(), state);
}

fn upsert(resource: lockstep_model::Resource) -> Change {
    Change::Upsert(resource.version(), resource)
}

fn all(state: &State) -> Vec<Change> {
    state.resources().map(|(version, resource)| Change::Upsert(version, resource)).collect()
}

/// A directory with a snapshot and three transactions; the digests after each.
fn written(directory: &Path) -> Vec<Position> {
    let (mut cache, restored) = Cache::open(directory, "node-a").unwrap();
    assert!(restored.is_none());
    let mut state = State::default();
    let first = all(&cluster(3));
    commit(&mut cache, &mut state, 1, first);
    let mut positions = vec![position(1, &state)];
    let steps = [
        vec![upsert(endpoints(1, &[1, 9]))],
        vec![upsert(service(2, 5)), Change::Remove(Key::EndpointSet(set_key(0)))],
        vec![Change::Remove(Key::Service(service_key(1)))],
    ];
    for (step, seq) in steps.into_iter().zip(2..) {
        commit(&mut cache, &mut state, seq, step);
        positions.push(position(seq, &state));
    }
    positions
}

fn reopen(directory: &Path) -> Option<Restored> {
    Cache::open(directory, "node-a").unwrap().1
}

#[test]
fn what_was_recorded_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let positions = written(directory.path());
    let restored = reopen(directory.path()).unwrap();
    assert_eq!(restored.held.position, positions[3]);
    assert_eq!(restored.held.state.digest(), positions[3].digest);
    assert_eq!(restored.held.node, node());
    // And can be added to.
    let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut state = restored.unwrap().held.state;
    commit(&mut cache, &mut state, 5, vec![upsert(service(9, 9))]);
    drop(cache);
    assert_eq!(reopen(directory.path()).unwrap().held.position, position(5, &state));
}

/// A file without any ServiceCidr is one of the release before: it has the same form.
#[test]
fn what_belongs_to_no_service_is_kept_beside_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    written(directory.path());
    let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut state = restored.unwrap().held.state;
    let gone = Change::Remove(Key::ServiceCidr(cidr_key(2)));
    commit(&mut cache, &mut state, 5, vec![upsert(service_cidr(1, 1)), upsert(service_cidr(2, 1))]);
    commit(&mut cache, &mut state, 6, vec![upsert(service_cidr(1, 2)), gone]);
    drop(cache);
    let restored = reopen(directory.path()).unwrap().held;
    assert_eq!((restored.position, restored.state.digest()), (position(6, &state), state.digest()));
    let held: Vec<_> = restored.state.service_cidrs().map(|(version, _)| version).collect();
    assert_eq!(held, [service_cidr(1, 2).version()]);
}

/// A resource of a kind that only a newer release knows: this is what is read of one, because a field
/// whose number is not known is passed over.
fn unknown() -> v1::Resource {
    v1::Resource { version: vec![7; 16].into(), body: None }
}

fn wire(resource: &lockstep_model::Resource) -> v1::Resource {
    convert::resource_to_wire(resource.version(), resource)
}

/// A record with one transaction.
fn record(to: Position, full: bool, upserts: Vec<v1::Resource>) -> Vec<u8> {
    let batch = v1::ResourceBatch { upserts, ..Default::default() };
    let update = v1::Update {
        to: Some(to.to_wire(0)),
        full,
        commit: true,
        payload: Some(v1::update::Payload::Batch(batch)),
        ..Default::default()
    };
    let mut record = Vec::new();
    let kind = Some(v1::sync_response::Kind::Update(update));
    format::push_record(&mut record, &Frame::of(&v1::SyncResponse { kind }));
    record
}

#[test]
fn what_only_a_newer_release_knows_is_passed_over() {
    for full in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path());
        let path = directory.path().join(LOG);
        let (mut bytes, mut state) = if full {
            (format::header("node-a"), State::default())
        } else {
            (fs::read(&path).unwrap(), reopen(directory.path()).unwrap().held.state)
        };
        let mut newest = vec![unknown()];
        for resource in [service(5, 1), endpoints(5, &[1])] {
            newest.push(wire(&resource));
            state.upsert(resource.version(), resource);
        }
        // In the newer release's digest there is one more resource.
        let newer = |seq, state: &State| {
            let mut digest = state.digest();
            digest.add(&Key::ServiceCidr(cidr_key(77)), Version([7; 16]));
            Position { epoch: 7, seq, digest }
        };
        bytes.extend(record(newer(5, &state), full, newest));
        let after = service(6, 1);
        state.upsert(after.version(), after.clone());
        format::change_records(&mut bytes, &[upsert(after)], newer(6, &state), 0).unwrap();
        fs::write(&path, &bytes).unwrap();

        let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
        let restored = restored.unwrap();
        assert!(!restored.outdated);
        assert_eq!(restored.held.state.digest(), state.digest(), "full: {full}");
        let no_history = Position { digest: state.digest(), ..Position::default() };
        assert_eq!(restored.held.position, no_history, "the server must not take it for its own");

        commit(&mut cache, &mut state, 8, vec![upsert(service(8, 1))]);
        drop(cache);
        assert_eq!(reopen(directory.path()).unwrap().held.position, position(8, &state));
        let now = fs::read(&path).unwrap();
        assert!(!now.starts_with(&bytes), "it was added to, and is of no use to the newer release");
    }
}

#[test]
fn damage_is_not_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let positions = written(directory.path());
    let path = directory.path().join(LOG);
    let mut bytes = fs::read(&path).unwrap();
    let last = *positions.last().unwrap();
    let mut state = reopen(directory.path()).unwrap().held.state;
    state.upsert(service(5, 1).version(), service(5, 1));
    let damaged = v1::Resource { version: vec![1; 16].into(), ..wire(&service(5, 1)) };
    bytes.extend(record(position(5, &state), false, vec![unknown(), damaged]));
    fs::write(&path, &bytes).unwrap();
    assert_eq!(reopen(directory.path()).unwrap().held.position, last);
}

/// Cut anywhere, the file gives one of the states that were committed, or nothing.
#[test]
fn a_file_cut_anywhere_gives_a_committed_state_or_none() {
    let directory = tempfile::tempdir().unwrap();
    let positions = written(directory.path());
    let path = directory.path().join(LOG);
    let whole = fs::read(&path).unwrap();
    let mut seen = vec![0; positions.len() + 1];
    for length in 0..=whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        match format::load(&path, "node-a").unwrap() {
            None => seen[positions.len()] += 1,
            Some(loaded) => {
                let at = positions.iter().position(|position| *position == loaded.held.position).unwrap();
                assert_eq!(loaded.held.state.digest(), positions[at].digest);
                assert!(loaded.good_bytes <= length as u64);
                seen[at] += 1;
            }
        }
    }
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
    assert_eq!(seen[3], 1, "only the whole file has the last transaction");
}

/// No flipped bit is ever part of a state.
#[test]
fn a_flipped_bit_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let positions = written(directory.path());
    let path = directory.path().join(LOG);
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        if let Some(loaded) = format::load(&path, "node-a").unwrap() {
            assert!(positions[..3].contains(&loaded.held.position), "byte {at}");
            assert_eq!(loaded.held.state.digest(), loaded.held.position.digest);
        }
    }
}

#[test]
fn what_follows_a_damaged_tail_is_written_over_it() {
    let directory = tempfile::tempdir().unwrap();
    let positions = written(directory.path());
    let path = directory.path().join(LOG);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 3]).unwrap();
    let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut state = restored.unwrap().held.state;
    assert_eq!(state.digest(), positions[2].digest);
    commit(&mut cache, &mut state, 9, vec![upsert(service(8, 8))]);
    drop(cache);
    assert_eq!(reopen(directory.path()).unwrap().held.position, position(9, &state));
}

#[test]
fn the_cache_of_another_node_and_of_another_program_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    written(directory.path());
    assert!(Cache::open(directory.path(), "node-b").unwrap().1.is_none());
    fs::write(directory.path().join(LOG), b"something else entirely").unwrap();
    assert!(reopen(directory.path()).is_none());
}

#[test]
fn a_second_process_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (_cache, _) = Cache::open(directory.path(), "node-a").unwrap();
    assert!(matches!(Cache::open(directory.path(), "node-a"), Err(CacheError::InUse { .. })));
}

#[test]
fn an_incomplete_state_is_kept_without_a_place_in_history() {
    let directory = tempfile::tempdir().unwrap();
    let (mut cache, _) = Cache::open(directory.path(), "node-a").unwrap();
    let state = cluster(2);
    let committed = Committed {
        changes: all(&state),
        services: Vec::new(),
        position: position(4, &cluster(3)),
        held: state.digest(),
        trigger: None,
        full: true,
    };
    cache.record(vec![committed], &node(), &state);
    drop(cache);
    let held = reopen(directory.path()).unwrap().held;
    assert_eq!(held.position, Position { epoch: 0, seq: 0, digest: state.digest() });
}

/// The file stays in proportion to the state, however much happens.
#[test]
fn the_file_is_written_anew_when_it_has_grown() {
    let directory = tempfile::tempdir().unwrap();
    let mut state = State::default();
    let mut restored = None;
    for round in 0..6u64 {
        let (mut cache, _) = Cache::open(directory.path(), "node-a").unwrap();
        if round == 0 {
            commit(&mut cache, &mut state, 1, all(&cluster(50)));
        }
        // At most as many as the queue takes, so that none is merged away.
        for step in 0..40u8 {
            let hosts: Vec<u8> = (1..=250).filter(|host| *host != step).collect();
            commit(
                &mut cache,
                &mut state,
                2 + round * 40 + u64::from(step),
                vec![upsert(endpoints(step, &hosts))],
            );
        }
        drop(cache);
        restored = reopen(directory.path());
    }
    assert_eq!(restored.unwrap().held.state.digest(), state.digest());
    let bytes = fs::metadata(directory.path().join(LOG)).unwrap().len();
    assert!(bytes < 2 * 1024 * 1024, "{bytes} bytes");
}

const PATIENCE: Duration = Duration::from_secs(30);

/// What a process finds that starts now, while the writer of the one before still stands.
fn as_found(directory: &Path) -> Option<Restored> {
    let copy = tempfile::tempdir().unwrap();
    for name in [LOG, "held.outdated"] {
        if directory.join(name).exists() {
            // It may have got its other name just now.
            let _ = fs::copy(directory.join(name), copy.path().join(name));
        }
    }
    reopen(copy.path())
}

#[test]
fn what_is_settled_is_found_by_whoever_starts_after_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    written(directory.path());
    let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut state = restored.unwrap().held.state;
    for seq in 5..50 {
        commit(&mut cache, &mut state, seq, vec![upsert(service(9, u8::try_from(seq).unwrap()))]);
        assert!(cache.settled(PATIENCE));
        let found = as_found(directory.path()).unwrap();
        assert_eq!((found.held.position, found.outdated), (position(seq, &state), false));
    }
}

/// A rewrite that hangs in the disk: nobody waits, and what is on disk does not pass for new.
#[test]
fn while_the_writer_is_stuck_everything_is_settled_and_the_file_is_called_outdated() {
    let directory = tempfile::tempdir().unwrap();
    let old = *written(directory.path()).last().unwrap();
    let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut state = restored.unwrap().held.state;
    // Opening it for writing waits until somebody reads.
    let temporary = directory.path().join("held.new");
    assert!(Command::new("mkfifo").arg(&temporary).status().unwrap().success());
    commit(&mut cache, &mut state, 5, all(&cluster(40)));
    assert!(cache.settled(PATIENCE));
    commit(&mut cache, &mut state, 6, vec![upsert(service(9, 9))]);
    assert!(cache.settled(Duration::ZERO), "it cannot be mistaken, so nobody waits");
    let found = as_found(directory.path()).unwrap();
    assert_eq!((found.held.position, found.outdated), (old, true));
    // It goes on, and in the end the file has everything and its good name.
    let reader = File::options().read(true).write(true).open(&temporary).unwrap();
    fs::remove_file(&temporary).unwrap();
    drop(cache);
    drop(reader);
    let found = reopen(directory.path()).unwrap();
    assert_eq!((found.held.position, found.outdated), (position(6, &state), false));
}

#[test]
fn a_disk_that_is_full_keeps_the_old_file_and_is_tried_again_without_being_asked() {
    let directory = tempfile::tempdir().unwrap();
    let old = *written(directory.path()).last().unwrap();
    let retry = Duration::from_millis(20);
    let (mut cache, restored) = Cache::open_retrying(directory.path(), "node-a", retry).unwrap();
    let mut state = restored.unwrap().held.state;
    let temporary = directory.path().join("held.new");
    std::os::unix::fs::symlink("/dev/full", &temporary).unwrap();
    commit(&mut cache, &mut state, 5, all(&cluster(40)));
    assert!(cache.settled(PATIENCE));
    let found = as_found(directory.path()).unwrap();
    assert_eq!((found.held.position, found.outdated), (old, true), "the old state is better than none");
    fs::remove_file(&temporary).unwrap();
    let begun = Instant::now();
    while as_found(directory.path()).is_none_or(|found| found.outdated) {
        assert!(begun.elapsed() < PATIENCE, "it is not tried again");
        std::thread::sleep(retry);
    }
    assert_eq!(as_found(directory.path()).unwrap().held.position, position(5, &state));
    drop(cache);
}

#[test]
fn an_outdated_file_stays_outdated_until_something_is_handed_over() {
    let directory = tempfile::tempdir().unwrap();
    let last = *written(directory.path()).last().unwrap();
    fs::rename(directory.path().join(LOG), directory.path().join("held.outdated")).unwrap();
    assert!(reopen(directory.path()).unwrap().outdated);
    let (mut cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let restored = restored.unwrap();
    assert!(restored.outdated);
    // It turned out to be what the control plane has.
    cache.catch_up(last, &node(), &restored.held.state);
    drop(cache);
    let found = reopen(directory.path()).unwrap();
    assert_eq!((found.held.position, found.outdated), (last, false));
}
