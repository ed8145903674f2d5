//! The messages by themselves.

use std::net::SocketAddr;

use super::fake::FakeConntrack;
use super::message::{put_delete, put_dump, put_new, read_flow};
use super::{Conntrack, Flow};
use crate::netlink::Messages;

const UDP: u8 = 17;

fn flow(source: &str, destination: &str, answers_from: &str) -> Flow {
    let [source, destination, answers_from] =
        [source, destination, answers_from].map(|text| text.parse::<SocketAddr>().unwrap());
    Flow { protocol: UDP, source, destination, answers_from, zone: 0, id: 7 }
}

#[test]
fn a_flow_is_read_as_the_kernel_writes_it() {
    for flow in [
        flow("10.0.0.1:4000", "172.30.0.1:53", "10.1.0.1:5353"),
        Flow { zone: 9, ..flow("[fd00::1]:4000", "[fd00:30::1]:53", "[fd00:1::1]:5353") },
    ] {
        let mut bytes = Vec::new();
        put_new(&mut bytes, &flow, 3);
        let messages: Vec<_> = Messages::of(&bytes).collect();
        assert_eq!(messages.len(), 1);
        assert_eq!(read_flow(&messages[0]), Some(flow));
        // Whatever is cut short is no flow, and no panic.
        for end in 0..messages[0].payload.len() {
            let part = crate::netlink::Message { payload: &messages[0].payload[..end], ..messages[0] };
            let read = read_flow(&part);
            assert!(read.is_none(), "{end} bytes: {read:?}");
        }
    }
    let mut bytes = Vec::new();
    put_delete(&mut bytes, &flow("10.0.0.1:1", "10.0.0.2:2", "10.0.0.2:2"), 1);
    assert_eq!(Messages::of(&bytes).filter_map(|message| read_flow(&message)).count(), 0);
}

#[test]
fn a_dump_without_a_filter_is_a_header_and_the_family() {
    let mut bytes = Vec::new();
    put_dump(&mut bytes, true, None, 5);
    assert_eq!(bytes.len(), 20);
    assert_eq!(bytes[16], 10);
}

#[test]
fn the_fake_ends_what_was_listed_and_not_what_took_its_place() {
    let mut fake = FakeConntrack::default();
    let one = flow("10.0.0.1:4000", "172.30.0.1:53", "10.1.0.1:5353");
    let tcp = Flow { protocol: 6, ..one };
    fake.lock().flows = vec![one, tcp];
    let mut seen = Vec::new();
    fake.flows(false, UDP, &mut |flow| seen.push(*flow)).unwrap();
    assert_eq!(seen, [one]);
    let successor = Flow { id: 8, ..one };
    fake.lock().flows = vec![successor, tcp];
    assert_eq!(fake.end(&seen).unwrap(), 0);
    assert_eq!(fake.lock().flows, [successor, tcp]);
}
