//! Transactions through the writer and back.

use bytes::Bytes;
use lockstep_model::{
    Conditions, Endpoint, EndpointPatch, EndpointSetKey, Interner, Key, Kind, Resource, ServiceKey, Version,
    canonical,
};
use prost::Message;

use crate::batch::{
    MAX_MESSAGE_BYTES, MAX_RESOURCE_BYTES, MAX_UNCOMPRESSED_BYTES, SnapshotWriter, Transaction, UnpackError,
    Unpacker, UpdateWriter,
};
use crate::frame::Frame;
use crate::{ReceivedPatch, convert, decode_resource, raw, v1};

fn updates(frames: &[Frame]) -> Vec<raw::Update> {
    let update = |frame: &Frame| match raw::SyncResponse::decode(frame.bytes().clone()).unwrap().kind {
        Some(raw::sync_response::Kind::Update(update)) => update,
        other => panic!("{other:?}"),
    };
    frames.iter().map(update).collect()
}

fn set_key() -> EndpointSetKey {
    EndpointSetKey::new(ServiceKey::new("default", "web"), "web-1")
}

fn head() -> Transaction {
    let position = |seq| v1::Position { epoch: 9, seq, digest: vec![7; 32].into(), ..Default::default() };
    let trigger_time = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5 });
    Transaction { from: Some(position(1)), to: position(2), full: false, trigger_time }
}

/// Bytes that do not compress.
fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    (0..length).map(next).collect()
}

#[test]
fn everything_a_transaction_says_arrives() {
    let version = |number| Version([number; 16]);
    let gone = Key::Service(ServiceKey::new("default", "old"));
    let endpoint = Endpoint {
        address: "10.0.0.1".parse().unwrap(),
        node_name: Some("node-a".into()),
        zone: None,
        conditions: Conditions::READY,
        hints: None,
    };
    let patch = EndpointPatch { upserts: vec![endpoint], removed: vec!["10.0.0.2".parse().unwrap()] };
    let mut writer = UpdateWriter::new(head(), true).unwrap();
    writer.upsert(Kind::Service, version(1), b"body").unwrap();
    writer.remove(&gone);
    writer.patch(&set_key(), version(2), version(3), &patch).unwrap();
    let frames = writer.finish();

    let [update] = &updates(&frames)[..] else { panic!("{} messages", frames.len()) };
    assert_eq!((update.from.clone(), update.to.clone().unwrap()), (head().from, head().to));
    assert_eq!((update.full, update.commit, update.trigger_time), (false, true, head().trigger_time));
    let batch = Unpacker::new().unwrap().unpack(update.payload.clone().unwrap()).unwrap();
    let upsert = convert::raw_resource(Kind::Service, version(1), Bytes::from_static(b"body"));
    assert_eq!(batch.upserts, [upsert]);
    assert_eq!(batch.removals, [convert::key_to_wire(&gone, None)]);
    let [received] = &batch.patches[..] else { panic!("{} patches", batch.patches.len()) };
    let received = ReceivedPatch::read(received).unwrap();
    assert_eq!(
        (received.key, received.base_version, received.version),
        ("default/web/web-1", &[2; 16][..], &[3; 16][..])
    );
    assert_eq!(received.decode(&mut Interner::default()).unwrap(), patch);

    let stock = v1::SyncResponse::decode(frames[0].bytes().clone()).unwrap_err();
    assert!(
        stock.to_string().contains("Resource.body"),
        "the body is no Service, which only the typed form minds: {stock}"
    );
}

#[test]
fn large_transactions_are_split_and_only_the_last_message_commits() {
    for zstd in [false, true] {
        let mut writer = UpdateWriter::new(head(), zstd).unwrap();
        let bodies: Vec<_> = (0..40).map(|seed| noise(100_000, seed)).collect();
        for body in &bodies {
            writer.upsert(Kind::EndpointSet, Version::of(body), body).unwrap();
        }
        let frames = writer.finish();
        assert!(frames.iter().all(|frame| frame.bytes().len() <= MAX_MESSAGE_BYTES));
        assert_eq!(frames.len(), 4, "filled as far as they go");
        let updates = updates(&frames);
        let commits: Vec<_> = updates.iter().map(|update| update.commit).collect();
        assert_eq!(commits, [false, false, false, true]);
        assert!(updates.iter().all(|update| update.to == updates[0].to && update.from == updates[0].from));
        let mut unpacker = Unpacker::new().unwrap();
        let received: Vec<_> = updates
            .into_iter()
            .flat_map(|update| unpacker.unpack(update.payload.unwrap()).unwrap().upserts)
            .collect();
        assert_eq!(received.len(), bodies.len());
        for (resource, body) in received.iter().zip(&bodies) {
            assert_eq!(resource.body, Some(raw::resource::Body::EndpointSet(body.clone().into())));
        }
    }
}

#[test]
fn the_largest_resource_fits_and_a_larger_one_is_refused() {
    let largest = noise(MAX_RESOURCE_BYTES, 1);
    let mut writer = UpdateWriter::new(head(), true).unwrap();
    writer.upsert(Kind::Service, Version::of(&largest), &largest).unwrap();
    let larger = vec![0; MAX_RESOURCE_BYTES + 1];
    let refused = writer.upsert(Kind::Service, Version::of(&larger), &larger).unwrap_err();
    assert_eq!(refused.bytes, larger.len());
    let frames = writer.finish();
    assert_eq!(frames.len(), 1, "what was refused left nothing behind");
    assert!(frames[0].bytes().len() <= MAX_MESSAGE_BYTES);
}

#[test]
fn only_what_pays_is_compressed() {
    let compressed = |body: &[u8], zstd| {
        let mut writer = UpdateWriter::new(head(), zstd).unwrap();
        writer.upsert(Kind::Service, Version::of(body), body).unwrap();
        match updates(&writer.finish()).remove(0).payload.unwrap() {
            raw::update::Payload::Compressed(batch) => Some((batch.data.len(), batch.uncompressed_bytes)),
            raw::update::Payload::Batch(_) => None,
        }
    };
    let (small, large) = compressed(&[b'x'; 5_000], true).unwrap();
    assert!(small < 100 && large > 5_000, "{small} of {large}");
    assert_eq!(compressed(&[b'x'; 5_000], false), None, "not asked for");
    assert_eq!(compressed(&[b'x'; 900], true), None, "too small to matter");
    assert_eq!(compressed(&noise(5_000, 1), true), None, "does not shrink");
}

#[test]
fn a_transaction_without_changes_still_commits() {
    let updates = updates(&UpdateWriter::new(head(), true).unwrap().finish());
    assert_eq!(updates.len(), 1);
    assert!(updates[0].commit && updates[0].payload.is_none());
}

#[test]
fn snapshots_carry_their_position_in_every_message() {
    let position = head().to;
    let mut writer = SnapshotWriter::new(position.clone());
    let bodies: Vec<_> = (0..20).map(|seed| noise(100_000, seed)).collect();
    for body in &bodies {
        writer.upsert(Kind::Service, Version::of(body), body).unwrap();
    }
    let frames = writer.finish();
    let decode = |frame: &Frame| raw::FetchSnapshotResponse::decode(frame.bytes().clone()).unwrap();
    let responses: Vec<_> = frames.iter().map(decode).collect();
    assert!(frames.len() == 2 && frames.iter().all(|frame| frame.bytes().len() <= MAX_MESSAGE_BYTES));
    assert!(responses.iter().all(|response| response.position.as_ref() == Some(&position)));
    let total: usize = responses.iter().map(|response| response.batch.as_ref().unwrap().upserts.len()).sum();
    assert_eq!(total, bodies.len());

    let empty = SnapshotWriter::new(position.clone()).finish();
    assert_eq!(decode(&empty[0]), raw::FetchSnapshotResponse { position: Some(position), batch: None });
}

fn unpack(data: Vec<u8>, uncompressed_bytes: usize) -> Result<raw::ResourceBatch, UnpackError> {
    let uncompressed_bytes = u32::try_from(uncompressed_bytes).unwrap();
    let compressed = v1::CompressedBatch { compression: 1, data: data.into(), uncompressed_bytes };
    Unpacker::new().unwrap().unpack(raw::update::Payload::Compressed(compressed))
}

#[test]
fn a_compression_bomb_stays_small() {
    let bomb = zstd::bulk::compress(&vec![0; 64 * 1024 * 1024], 19).unwrap();
    assert!(bomb.len() < 10_000);
    let error = unpack(bomb.clone(), MAX_UNCOMPRESSED_BYTES).unwrap_err();
    assert!(matches!(error, UnpackError::Decompress(_)), "{error}");
    let error = unpack(bomb, 64 * 1024 * 1024).unwrap_err();
    assert!(matches!(error, UnpackError::TooLarge(_)), "{error}");
}

#[test]
fn compressed_batches_are_as_large_as_they_say() {
    let batch = raw::ResourceBatch::default().encode_to_vec();
    let data = zstd::bulk::compress(&batch, 1).unwrap();
    assert_eq!(unpack(data.clone(), batch.len()).unwrap(), raw::ResourceBatch::default());
    let error = unpack(data, 10).unwrap_err();
    assert!(matches!(error, UnpackError::WrongSize { stated: 10, actual: 0 }), "{error}");
    assert!(matches!(unpack(b"noise".to_vec(), 10), Err(UnpackError::Decompress(_))));
    let other = v1::CompressedBatch { compression: 9, ..Default::default() };
    let error = Unpacker::new().unwrap().unpack(raw::update::Payload::Compressed(other)).unwrap_err();
    assert_eq!(error.to_string(), "compression: 9 is not a value this release knows");
}

#[test]
fn a_resource_is_what_its_version_says() {
    let body = canonical::endpoint_set(&lockstep_model::EndpointSet {
        key: set_key(),
        family: lockstep_model::Family::V4,
        ports: Vec::new(),
        endpoints: Vec::new(),
    });
    let mut interner = Interner::default();
    let mut resource = convert::raw_resource(Kind::EndpointSet, Version::of(&body), body.into());
    let (_, decoded) = decode_resource(&resource, &mut interner).unwrap();
    assert!(matches!(decoded, Resource::EndpointSet(set) if set.key == set_key()));

    resource.version = vec![1; 16].into();
    let error = decode_resource(&resource, &mut interner).unwrap_err().to_string();
    assert!(error.starts_with("version: 01010101010101010101010101010101 is not the hash"), "{error}");
    resource.body = None;
    let error = decode_resource(&resource, &mut interner).unwrap_err().to_string();
    assert_eq!(error, "body: is of no known kind");
}

#[test]
fn patches_are_as_strict_as_sets() {
    let endpoint = |address: &str| -> Bytes {
        v1::Endpoint { address: address.into(), ready: true, ..Default::default() }.encode_to_vec().into()
    };
    let error = |upserts: &[&str], removed: &[&str]| {
        let patch = raw::EndpointPatch {
            upserts: upserts.iter().map(|address| endpoint(address)).collect(),
            removed_addresses: removed.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let bytes = patch.encode_to_vec();
        let received = ReceivedPatch::read(&bytes).unwrap();
        received.decode(&mut Interner::default()).unwrap_err().to_string()
    };
    assert_eq!(
        error(&["10.0.0.1", "10.0.0.1"], &[]),
        "upserts[1].address: \"10.0.0.1\" is not in order, or twice"
    );
    assert_eq!(error(&[""], &[]), "upserts[0].address: \"\" is missing");
    assert_eq!(
        error(&[], &["10.0.0.2", "10.0.0.1"]),
        "removed_addresses[1]: \"10.0.0.1\" is not in order, or twice"
    );
    assert_eq!(error(&["10.0.0.1"], &["10.0.0.1"]), "removed_addresses[0]: \"10.0.0.1\" is in upserts too");
    assert_eq!(error(&[], &["x"]), "removed_addresses[0]: \"x\" is not an IP address");
}

#[test]
fn what_names_resources_is_checked() {
    let reference = |kind, key: &str, version: &[u8]| v1::ResourceRef {
        kind,
        key: key.into(),
        version: Bytes::copy_from_slice(version),
    };
    let error = |message| convert::key_from_wire(&message).unwrap_err().to_string();
    assert_eq!(error(reference(7, "a/b", &[])), "kind: \"7\" is not a kind this release knows");
    assert_eq!(error(reference(1, "a/b/c", &[])), "key: \"a/b/c\" is not namespace/name");
    assert_eq!(error(reference(2, "a/b", &[])), "key: \"a/b\" is not namespace/service/slice");
    assert_eq!(error(reference(1, "a//b", &[])), "key: \"\" is empty");
    assert_eq!(error(reference(1, "a/b", &[1])), "version: \"1 bytes\" is not 16 bytes");
    let (key, version) = convert::key_from_wire(&reference(1, "a/b", &[1; 16])).unwrap();
    assert_eq!((key.to_string(), version), ("a/b".to_owned(), Some(Version([1; 16]))));
    let position = v1::Position { digest: vec![0; 31].into(), ..Default::default() };
    assert_eq!(
        convert::digest_from_wire(&position).unwrap_err().to_string(),
        "digest: \"31 bytes\" is not 32 bytes"
    );
}

#[test]
fn facts_about_a_node_are_checked() {
    let node = || v1::NodeContext { name: "node-a".into(), uid: "u".into(), ..Default::default() };
    let error = |node| convert::node_context_from_wire(&node).unwrap_err().to_string();
    let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(error(v1::NodeContext { name: String::new(), ..node() }), "name: \"\" is empty");
    let facts = v1::NodeContext { uid: String::new(), zone: "z".into(), ..node() };
    assert_eq!(error(facts), "uid: \"\" is missing, though there are facts about the node");
    let facts = v1::NodeContext { addresses: texts(&["10.0.0.1", "host"]), ..node() };
    assert_eq!(error(facts), "addresses[1]: \"host\" is not an IP address");
    let facts = v1::NodeContext { addresses: texts(&["10.0.0.1", "10.0.0.1"]), ..node() };
    assert_eq!(error(facts), "addresses[1]: \"10.0.0.1\" is there twice");
    let facts = v1::NodeContext { pod_cidrs: texts(&["10.0.0.1/24"]), ..node() };
    assert_eq!(error(facts), "pod_cidrs[0]: \"10.0.0.1/24\" has host bits set");
    let facts = v1::NodeContext { node_addresses: texts(&["10.0.0.2", "10.0.0.1"]), ..node() };
    assert_eq!(error(facts), "node_addresses[1]: \"10.0.0.1\" is not in order, or is there twice");
    // What the cluster says of other nodes is not of the Node object.
    let facts =
        v1::NodeContext { uid: String::new(), node_addresses: texts(&["10.0.0.1", "fd00::1"]), ..node() };
    assert_eq!(convert::node_context_from_wire(&facts).unwrap().node_addresses.len(), 2);
}

#[test]
fn an_error_shows_only_the_start_of_a_long_value() {
    let long = "1".repeat(100_000);
    let set = v1::EndpointSet {
        namespace: "default".into(),
        service: "web".into(),
        slice: "web-1".into(),
        family: 1,
        endpoints: vec![v1::Endpoint { address: long.clone(), ..Default::default() }],
        ..Default::default()
    };
    let error = convert::endpoint_set_from_wire(&set, &mut Interner::default()).unwrap_err().to_string();
    assert!(error.starts_with("endpoints[0].address: \"1111") && error.len() < 200, "{error}");
    let error = convert::key_from_text(Kind::Service, &format!("{long}/a/b")).unwrap_err().to_string();
    assert!(error.len() < 200, "{error}");
    let node =
        v1::NodeContext { name: "n".into(), uid: "u".into(), addresses: vec![long], ..Default::default() };
    let error = convert::node_context_from_wire(&node).unwrap_err().to_string();
    assert!(error.len() < 200, "{error}");
}

#[test]
fn a_typed_resource_that_cannot_be_read_is_named() {
    let mut interner = Interner::default();
    let version = vec![7; 16];
    let mut read = |version: &[u8], body: Option<v1::resource::Body>| {
        let message = v1::Resource { version: version.to_vec().into(), body };
        convert::resource_from_wire(&message, &mut interner).map_err(|error| error.to_string())
    };
    assert_eq!(read(&version, None), Ok(None), "of a kind that is not known");
    let cidr = v1::ServiceCidr { name: "pods".into(), cidrs: vec!["10.0.0.0/99".into()] };
    let error = read(&version, Some(v1::resource::Body::ServiceCidr(cidr))).unwrap_err();
    assert!(error.starts_with("ServiceCIDR pods: cidrs[0]: "), "{error}");
    let set = v1::EndpointSet {
        namespace: "a".into(),
        service: "b".into(),
        slice: "c".into(),
        family: v1::AddressFamily::Ipv4.into(),
        ..Default::default()
    };
    let error = read(&[7], Some(v1::resource::Body::EndpointSet(set))).unwrap_err();
    assert!(error.starts_with("EndpointSet a/b/c: version: "), "{error}");
    let service = v1::Service { namespace: "a".into(), name: "b".into(), r#type: 99, ..Default::default() };
    let error = read(&version, Some(v1::resource::Body::Service(service))).unwrap_err();
    assert!(error.starts_with("Service a/b: "), "{error}");
}
