//! The messages by themselves, and faults of the fake.

use std::net::IpAddr;

use super::fake::FakeIpvs;
use super::{Connections, Ipvs, Key, PERSISTENT, RealServer, Request, Timeouts, VirtualServer, message};
use crate::Errno;
use crate::netlink::recorded::{attributes, bytes, plain, written};
use crate::netlink::{Message, Messages};

/// Number of the family in the messages that were recorded.
const FAMILY: u16 = 0x20;

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

#[test]
#[cfg(target_endian = "little")] // as the machine that it was recorded on
fn messages_are_those_of_the_real_tool() {
    let (four, six) = (server("10.96.0.1", u32::MAX), server("fd00:96::1", 128));
    let sent = |digits| plain(bytes(digits));
    let ours = |request: &Request| written(|out| message::put(out, FAMILY, request, 1));
    assert_eq!(ours(&Request::Add(six.clone())), sent(ADD_V6));
    assert_eq!(ours(&Request::Set(four.clone())), sent(SET));
    let timeouts = Timeouts { tcp: 5, tcp_fin: 6, udp: 7 };
    assert_eq!(written(|out| message::put_timeouts(out, FAMILY, timeouts, 1)), sent(TIMEOUTS));

    // Where a server is only named, the tool says more about it, which the kernel does not read.
    for (request, recorded) in [
        (Request::Remove(four.key), REMOVE),
        (Request::AddReal(four.key, real("10.244.0.1")), ADD_REAL),
        (Request::AddReal(six.key, real("fd00:f4::1")), ADD_REAL_V6),
        (Request::SetReal(four.key, real("10.244.0.1")), SET_REAL),
        (Request::RemoveReal(four.key, ip("10.244.0.1"), 8080), REMOVE_REAL),
    ] {
        let (ours, sent) = (ours(&request), sent(recorded));
        assert_eq!(ours[4..20], sent[4..20], "{request:?}");
        let (ours, sent) = (attributes(&ours, 20), attributes(&sent, 20));
        assert_eq!(ours.len(), sent.len());
        for ((kind, ours), (same, sent)) in ours.iter().zip(&sent) {
            assert_eq!(kind, same);
            let (ours, sent) = (attributes(ours, 0), attributes(sent, 0));
            for attribute in &ours {
                assert!(sent.contains(attribute), "{request:?}: {attribute:?} of {kind}");
            }
            // Of a real server that is added, the rest says that there is no tunnel and no limit.
            if *kind == 2 && matches!(request, Request::AddReal(..) | Request::SetReal(..)) {
                let rest = sent.iter().filter(|attribute| !ours.contains(attribute));
                assert!(rest.flat_map(|(_, value)| value).all(|byte| *byte == 0));
            }
        }
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

/// `ipvsadm -A -t [fd00:96::1]:80 -s rr -p 360`, of ipvsadm 1.31.
const ADD_V6: &str = "
        68000000 20000500 413b096b 6d00405c 01010000 54000180 06000100 0a000000
        06000200 06000000 14000300 fd000096 00000000 00000000 00000001 06000400
        00500000 07000600 72720000 0c000700 01000000 ffffffff 08000800 68010000
        08000900 80000000";
/// `ipvsadm -E -t 10.96.0.1:80 -s rr -p 360`, of ipvsadm 1.31.
const SET: &str = "
        68000000 20000500 443b096b 7700c05b 02010000 54000180 06000100 02000000
        06000200 06000000 14000300 0a600001 00000000 00000000 00000000 06000400
        00500000 07000600 72720000 0c000700 01000000 ffffffff 08000800 68010000
        08000900 ffffffff";
/// `ipvsadm -D -t 10.96.0.1:80`, of ipvsadm 1.31.
const REMOVE: &str = "
        68000000 20000500 4a3b096b a9008052 03010000 54000180 06000100 02000000
        06000200 06000000 14000300 0a600001 00000000 00000000 00000000 06000400
        00500000 05000600 00000000 0c000700 00000000 ffffffff 08000800 00000000
        08000900 ffffffff";
/// `ipvsadm -a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 1`, of ipvsadm 1.31.
const ADD_REAL: &str = "
        c8000000 20000500 453b096b 8100005c 05010000 54000180 06000100 02000000
        06000200 06000000 14000300 0a600001 00000000 00000000 00000000 06000400
        00500000 05000600 00000000 0c000700 00000000 ffffffff 08000800 00000000
        08000900 ffffffff 60000280 06000b00 02000000 14000100 0af40001 00000000
        00000000 00000000 06000200 1f900000 08000300 00000000 08000400 01000000
        05000d00 00000000 06000e00 00000000 06000f00 00000000 08000500 00000000
        08000600 00000000";
/// `ipvsadm -a -t [fd00:96::1]:80 -r [fd00:f4::1]:8080 -m -w 1`, of ipvsadm 1.31.
const ADD_REAL_V6: &str = "
        c8000000 20000500 463b096b 8b00805b 05010000 54000180 06000100 0a000000
        06000200 06000000 14000300 fd000096 00000000 00000000 00000001 06000400
        00500000 05000600 00000000 0c000700 00000000 ffffffff 08000800 00000000
        08000900 80000000 60000280 06000b00 0a000000 14000100 fd0000f4 00000000
        00000000 00000001 06000200 1f900000 08000300 00000000 08000400 01000000
        05000d00 00000000 06000e00 00000000 06000f00 00000000 08000500 00000000
        08000600 00000000";
/// `ipvsadm -e -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 1`, of ipvsadm 1.31.
const SET_REAL: &str = "
        c8000000 20000500 483b096b 9500c052 06010000 54000180 06000100 02000000
        06000200 06000000 14000300 0a600001 00000000 00000000 00000000 06000400
        00500000 05000600 00000000 0c000700 00000000 ffffffff 08000800 00000000
        08000900 ffffffff 60000280 06000b00 02000000 14000100 0af40001 00000000
        00000000 00000000 06000200 1f900000 08000300 00000000 08000400 01000000
        05000d00 00000000 06000e00 00000000 06000f00 00000000 08000500 00000000
        08000600 00000000";
/// `ipvsadm -d -t 10.96.0.1:80 -r 10.244.0.1:8080`, of ipvsadm 1.31.
const REMOVE_REAL: &str = "
        c8000000 20000500 493b096b 9f000053 07010000 54000180 06000100 02000000
        06000200 06000000 14000300 0a600001 00000000 00000000 00000000 06000400
        00500000 05000600 00000000 0c000700 00000000 ffffffff 08000800 00000000
        08000900 ffffffff 60000280 06000b00 02000000 14000100 0af40001 00000000
        00000000 00000000 06000200 1f900000 08000300 03000000 08000400 01000000
        05000d00 00000000 06000e00 00000000 06000f00 00000000 08000500 00000000
        08000600 00000000";
/// `ipvsadm --set 5 6 7`, of ipvsadm 1.31.
const TIMEOUTS: &str = "
        2c000000 20000500 4b3b096b b300c051 0c010000 08000400 05000000 08000500
        06000000 08000600 07000000";
