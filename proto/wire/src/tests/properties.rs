//! What holds for every object, and for every sequence of bytes.

use lockstep_model::{EndpointSet, Interner, Key, Kind, Service, Version, canonical};
use proptest::prelude::*;
use prost::Message;

use super::objects;
use crate::batch::{Transaction, Unpacker, UpdateWriter};
use crate::{
    ReceivedPatch, convert, decode_endpoint_set, decode_key, decode_resource, decode_service,
    decode_service_cidr, raw, v1,
};

/// What protobuf makes of the bytes and encodes again.
fn through_prost<M: Message + Default>(bytes: &[u8]) -> Vec<u8> {
    M::decode(bytes).unwrap().encode_to_vec()
}

/// What stock protobuf sees in bytes that decoded to `service` is the same Service. Unknown
/// fields are dropped by both; an unknown traffic distribution counts as none.
fn agrees_on_service(bytes: &[u8], service: &Service) -> Result<(), TestCaseError> {
    let mut typed = v1::Service::decode(bytes).unwrap();
    if v1::TrafficDistribution::try_from(typed.traffic_distribution).is_err() {
        typed.traffic_distribution = 0;
    }
    let canonical = canonical::service(service);
    prop_assert_eq!(typed.encode_to_vec(), canonical.clone());
    prop_assert_eq!(&decode_service(&canonical, &mut Interner::default()).unwrap(), service);
    Ok(())
}

fn agrees_on_set(bytes: &[u8], set: &EndpointSet) -> Result<(), TestCaseError> {
    let canonical = canonical::endpoint_set(set);
    prop_assert_eq!(through_prost::<v1::EndpointSet>(bytes), canonical.clone());
    prop_assert_eq!(&decode_endpoint_set(&canonical, &mut Interner::default()).unwrap(), set);
    Ok(())
}

/// Damage of the kinds that happen: a byte changed, bytes lost, bytes doubled, a piece put in.
#[derive(Debug, Clone)]
enum Damage {
    Change(prop::sample::Index, u8),
    Cut(prop::sample::Index, prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Double(prop::sample::Index, prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        3 => (index(), any::<u8>()).prop_map(|(at, byte)| Damage::Change(at, byte)),
        1 => (index(), index()).prop_map(|(a, b)| Damage::Cut(a, b)),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..6)).prop_map(|(at, new)| Damage::Insert(at, new)),
        1 => (index(), index()).prop_map(|(a, b)| Damage::Double(a, b)),
    ]
}

fn damaged(bytes: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for damage in damages {
        let range = |a: &prop::sample::Index, b: &prop::sample::Index| {
            let (a, b) = (a.index(bytes.len() + 1), b.index(bytes.len() + 1));
            a.min(b)..a.max(b)
        };
        match damage {
            Damage::Change(at, byte) if !bytes.is_empty() => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Damage::Change(..) => {}
            Damage::Cut(a, b) => drop(bytes.drain(range(a, b))),
            Damage::Insert(at, new) => {
                let at = at.index(bytes.len() + 1);
                bytes.splice(at..at, new.iter().copied());
            }
            Damage::Double(a, b) => {
                let range = range(a, b);
                let piece = bytes[range.clone()].to_vec();
                bytes.splice(range.end..range.end, piece);
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn services_are_the_same_in_every_form(service in objects::service()) {
        let bytes = canonical::service(&service);
        prop_assert_eq!(through_prost::<v1::Service>(&bytes), bytes.clone());
        let mut interner = Interner::default();
        prop_assert_eq!(&decode_service(&bytes, &mut interner).unwrap(), &service);
        let message = convert::service_to_wire(&service);
        prop_assert_eq!(&convert::service_from_wire(&message, &mut interner).unwrap(), &service);
        let (version, resource) = (Version::of(&bytes), service.clone().into());
        let message = convert::resource_to_wire(version, &resource);
        prop_assert_eq!(convert::resource_from_wire(&message, &mut interner), Ok(Some((version, resource))));
        prop_assert_eq!(decode_key(Kind::Service, &bytes), Some(Key::Service(service.key)));
    }

    #[test]
    fn endpoint_sets_are_the_same_in_every_form(set in objects::endpoint_set()) {
        let bytes = canonical::endpoint_set(&set);
        prop_assert_eq!(through_prost::<v1::EndpointSet>(&bytes), bytes.clone());
        let mut interner = Interner::default();
        prop_assert_eq!(&decode_endpoint_set(&bytes, &mut interner).unwrap(), &set);
        let message = convert::endpoint_set_to_wire(&set);
        prop_assert_eq!(&convert::endpoint_set_from_wire(&message, &mut interner).unwrap(), &set);
        let (version, resource) = (Version::of(&bytes), set.clone().into());
        let message = convert::resource_to_wire(version, &resource);
        prop_assert_eq!(convert::resource_from_wire(&message, &mut interner), Ok(Some((version, resource))));
        prop_assert_eq!(decode_key(Kind::EndpointSet, &bytes), Some(Key::EndpointSet(set.key)));
    }

    #[test]
    fn service_cidrs_are_the_same_in_every_form(cidr in objects::service_cidr()) {
        let bytes = canonical::service_cidr(&cidr);
        prop_assert_eq!(through_prost::<v1::ServiceCidr>(&bytes), bytes.clone());
        prop_assert_eq!(&decode_service_cidr(&bytes, &mut Interner::default()).unwrap(), &cidr);
        prop_assert_eq!(decode_key(Kind::ServiceCidr, &bytes), Some(Key::ServiceCidr(cidr.key.clone())));
        let message = convert::resource_to_wire(Version::of(&bytes), &cidr.into());
        prop_assert!(matches!(message.body, Some(v1::resource::Body::ServiceCidr(cidr)) if cidr.encode_to_vec() == bytes));
    }

    #[test]
    fn node_facts_are_the_same_in_both_forms(node in objects::node_context()) {
        let message = convert::node_context_to_wire(&node);
        prop_assert_eq!(message.encode_to_vec(), canonical::node_context(&node));
        prop_assert_eq!(convert::node_context_from_wire(&message).unwrap(), node);
    }

    #[test]
    fn a_patch_leads_to_the_new_version((old, new) in objects::endpoint_set_and_next()) {
        let (base, version) = (Version::of(&canonical::endpoint_set(&old)), Version::of(&canonical::endpoint_set(&new)));
        let patch = old.patch_to(&new).unwrap();
        let bytes = convert::patch_to_wire(&old.key, base, version, &patch).encode_to_vec();
        prop_assert_eq!(through_prost::<v1::EndpointPatch>(&bytes), bytes.clone(), "typed and raw form");

        let received = ReceivedPatch::read(&bytes).unwrap();
        let decoded = received.decode(&mut Interner::default()).unwrap();
        prop_assert_eq!(&decoded, &patch);
        let patched = old.patched(decoded);
        prop_assert_eq!(&Version::of(&canonical::endpoint_set(&patched)).0[..], received.version);
        prop_assert_eq!(patched, new);
    }

    #[test]
    fn a_damaged_service_is_refused_or_canonical(
        service in objects::service(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let bytes = damaged(&canonical::service(&service), &damages);
        if let Ok(service) = decode_service(&bytes, &mut Interner::default()) {
            agrees_on_service(&bytes, &service)?;
        }
        decode_key(Kind::Service, &bytes);
    }

    #[test]
    fn a_damaged_endpoint_set_is_refused_or_canonical(
        set in objects::endpoint_set(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let bytes = damaged(&canonical::endpoint_set(&set), &damages);
        if let Ok(set) = decode_endpoint_set(&bytes, &mut Interner::default()) {
            agrees_on_set(&bytes, &set)?;
        }
        decode_key(Kind::EndpointSet, &bytes);
    }

    #[test]
    fn a_damaged_service_cidr_is_refused_or_canonical(
        cidr in objects::service_cidr(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let bytes = damaged(&canonical::service_cidr(&cidr), &damages);
        if let Ok(cidr) = decode_service_cidr(&bytes, &mut Interner::default()) {
            let again = canonical::service_cidr(&cidr);
            // Fields of a later release are passed over, and only those.
            prop_assert!(again == bytes || again.len() < bytes.len());
            prop_assert_eq!(decode_key(Kind::ServiceCidr, &bytes), Some(Key::ServiceCidr(cidr.key)));
        }
    }

    #[test]
    fn a_damaged_frame_harms_nobody(
        service in objects::service(),
        (old, new) in objects::endpoint_set_and_next(),
        damages in prop::collection::vec(damage(), 1..4),
        zstd: bool,
    ) {
        let mut writer = UpdateWriter::new(Transaction::default(), zstd).unwrap();
        let body = canonical::service(&service);
        writer.upsert(Kind::Service, Version::of(&body), &body).unwrap();
        let (base, version) = (Version::of(&canonical::endpoint_set(&old)), Version::of(&canonical::endpoint_set(&new)));
        writer.patch(&old.key, base, version, &old.patch_to(&new).unwrap()).unwrap();
        let frames = writer.finish();
        let bytes = damaged(frames[0].bytes(), &damages);
        let Ok(response) = raw::SyncResponse::decode(&bytes[..]) else { return Ok(()) };
        let Some(raw::sync_response::Kind::Update(raw::Update { payload: Some(payload), .. })) = response.kind else {
            return Ok(());
        };
        let Ok(batch) = Unpacker::new().unwrap().unpack(payload) else { return Ok(()) };
        let mut interner = Interner::default();
        for resource in &batch.upserts {
            if let Ok((version, resource)) = decode_resource(resource, &mut interner) {
                // Whatever came through has the version it claims, so it is what was sent.
                prop_assert_eq!(version, Version::of(&body));
                prop_assert_eq!(resource, service.clone().into());
            }
        }
        for patch in &batch.patches {
            if let Ok(patch) = ReceivedPatch::read(patch).and_then(|patch| patch.decode(&mut interner)) {
                prop_assert!(patch.upserts.is_sorted_by(|a, b| a.address < b.address));
                prop_assert!(patch.removed.is_sorted_by(|a, b| a < b));
            }
        }
        for removal in &batch.removals {
            let _ = convert::key_from_wire(removal);
        }
    }

    #[test]
    fn random_bytes_harm_nobody(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut interner = Interner::default();
        if let Ok(service) = decode_service(&bytes, &mut interner) {
            agrees_on_service(&bytes, &service)?;
        }
        if let Ok(set) = decode_endpoint_set(&bytes, &mut interner) {
            agrees_on_set(&bytes, &set)?;
        }
        decode_key(Kind::Service, &bytes);
        decode_key(Kind::EndpointSet, &bytes);
        let data = bytes.clone().into();
        let compressed = v1::CompressedBatch { compression: 1, data, uncompressed_bytes: 4096 };
        let _ = Unpacker::new().unwrap().unpack(raw::update::Payload::Compressed(compressed));
        if let Ok(node) = v1::NodeContext::decode(&bytes[..]) {
            let _ = convert::node_context_from_wire(&node);
        }
    }
}
