//! The messages by themselves, and faults of the fake.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::fake::FakeIpvs;
use super::{Connections, Ipvs, Key, PERSISTENT, RealServer, Request, Timeouts, VirtualServer, message};
use crate::Errno;
use crate::netlink::attr::Attributes;
use crate::netlink::{Message, Messages};

/// Number of the family in the messages that were recorded.
const FAMILY: u16 = 0x1d;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(address: &str) -> Key {
    Key { protocol: 6, address: ip(address), port: 80 }
}

fn server(address: &str, netmask: u32) -> VirtualServer {
    VirtualServer { key: key(address), scheduler: "rr".into(), flags: PERSISTENT, timeout: 360, netmask }
}

fn real(address: &str) -> RealServer {
    RealServer { address: ip(address), port: 8080, weight: 1, forwarding: 0 }
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<_> = hex.chars().filter(char::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(&String::from_iter(pair), 16).unwrap()).collect()
}

/// Type, command and version, and the attributes of every nest, whatever their order and the flag
/// of nests, which the kernel does not look at.
type Meaning = (u16, Vec<u8>, BTreeMap<u16, BTreeMap<u16, Vec<u8>>>);

fn meaning(message: &Message<'_>) -> Meaning {
    let nests = Attributes::of(&message.payload[4..]).map(|nest| {
        let inside = nest.nested().map(|attribute| (attribute.kind, attribute.value.to_vec()));
        (nest.kind, inside.collect())
    });
    (message.kind, message.payload[..2].to_vec(), nests.collect())
}

fn written(put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    out
}

#[test]
fn a_message_is_laid_out_as_the_kernel_reads_it() {
    let out =
        written(|out| message::put(out, 0x1d, &Request::AddReal(key("10.96.0.1"), real("10.244.0.1")), 7));
    let expected = "
        8c000000 1d00 0100 07000000 00000000   05 01 0000
        3000 0180
            0600 0100 0200 0000   0600 0200 0600 0000
            1400 0300 0a600001 00000000 00000000 00000000   0600 0400 0050 0000
        4800 0280
            0600 0b00 0200 0000   1400 0100 0af40001 00000000 00000000 00000000   0600 0200 1f90 0000
            0800 0300 00000000   0800 0400 01000000   0800 0500 00000000   0800 0600 00000000";
    if cfg!(target_endian = "little") {
        assert_eq!(out, bytes(expected));
    }
}

#[test]
fn what_is_cut_short_is_nothing_and_no_panic() {
    let request = Request::Add(server("10.96.0.1", u32::MAX));
    let out = written(|out| message::put(out, 0x1d, &request, 7));
    let whole = Messages::of(&out).next().unwrap();
    let Request::Add(server) = request else { unreachable!() };
    // A request to add is what the kernel lists.
    assert_eq!(message::read_server(&whole, &mut Vec::new()), Some(server));
    for end in 0..whole.payload.len() {
        let part = Message { payload: &whole.payload[..end], ..whole };
        assert_eq!(message::read_server(&part, &mut Vec::new()), None);
        assert_eq!(message::read_real(&part), None);
    }
}

#[test]
fn the_fake_refuses_what_it_is_told_to_and_keeps_connections() {
    let mut fake = FakeIpvs::default();
    let (good, bad) = (server("10.96.0.1", u32::MAX), server("10.96.0.2", u32::MAX));
    fake.lock().refuse.insert(bad.key, Errno::NOMEM);
    let requests = [
        Request::Add(bad.clone()),
        Request::Add(good.clone()),
        Request::AddReal(good.key, real("10.244.0.1")),
    ];
    let refused = fake.commit(&requests).unwrap();
    assert_eq!(refused, [super::Refused { index: 0, errno: Errno::NOMEM }]);
    assert_eq!(fake.virtual_servers().unwrap(), std::slice::from_ref(&good));
    let many = Connections { active: 3, inactive: 2, persistent: 1 };
    fake.lock().connections.insert((good.key, ip("10.244.0.1"), 8080), many);
    assert_eq!(fake.real_servers(good.key).unwrap(), [(real("10.244.0.1"), many)]);
    let asked = {
        let inside = fake.lock();
        (inside.requests, inside.lists)
    };
    assert_eq!(asked, (3, 2));
    fake.lock().fail = Some((1, Errno::NOMEM));
    assert_eq!(fake.clone().count().unwrap_err().errno(), Some(Errno::NOMEM));
    assert_eq!(fake.count().unwrap(), 1);
    fake.set_timeouts(Timeouts { tcp: 5, ..Timeouts::default() }).unwrap();
    fake.set_timeouts(Timeouts { udp: 6, ..Timeouts::default() }).unwrap();
    assert_eq!(fake.timeouts().unwrap(), Timeouts { tcp: 5, tcp_fin: 0, udp: 6 });
}
