//! The messages by themselves, and faults of the fake.

use super::fake::FakeSets;
use super::{Declaration, Entry, Kind, Sets, is_full, message};
use crate::Errno;
use crate::netlink::recorded::{attributes, bytes, plain, written};
use crate::netlink::{Message, Messages};

fn entry(kind: Kind, v6: bool) -> Entry {
    let [a, b] =
        if v6 { ["fd00::1", "fd00::2"] } else { ["10.0.0.1", "10.0.0.2"] }.map(|it| it.parse().unwrap());
    match kind {
        Kind::HashIp => Entry::Ip(a),
        Kind::HashIpPort => Entry::IpPort(a, 6, 80),
        Kind::HashIpPortIp => Entry::IpPortIp(a, 17, 53, b),
        Kind::HashIpPortNet => {
            let net = if v6 { "2001:db8::/32" } else { "192.0.2.0/24" };
            Entry::IpPortNet(a, 132, 36_412, net.parse().unwrap())
        }
        Kind::BitmapPort => Entry::Port(30_080),
    }
}

const KINDS: [Kind; 5] =
    [Kind::HashIp, Kind::HashIpPort, Kind::HashIpPortIp, Kind::HashIpPortNet, Kind::BitmapPort];

#[test]
fn entries_are_read_as_the_kernel_writes_them_and_whatever_is_cut_short_is_none() {
    for (kind, v6) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let mut out = Vec::new();
        message::put_entries(&mut out, 7, true, "s", &[entry(kind, v6)], 1);
        let whole = Messages::of(&out).next().unwrap();
        assert_eq!(message::read_entries(&whole, kind), Some(vec![entry(kind, v6)]));
        for other in KINDS {
            let read = message::read_entries(&whole, other);
            assert!(read.is_none_or(|read| read.iter().all(|read| read.kind() == other)));
        }
        for end in 0..whole.payload.len() {
            let part = Message { payload: &whole.payload[..end], ..whole };
            assert!(message::read_entries(&part, kind).is_none_or(|read| read.is_empty()));
        }
    }
}

#[test]
fn an_entry_is_shown_as_ipset_writes_it() {
    let shown = KINDS.map(|kind| entry(kind, false).to_string());
    let expected = [
        "10.0.0.1",
        "10.0.0.1,tcp:80",
        "10.0.0.1,udp:53,10.0.0.2",
        "10.0.0.1,sctp:36412,192.0.2.0/24",
        "30080",
    ];
    assert_eq!(shown, expected);
}

#[test]
fn the_fake_refuses_what_it_is_told_to() {
    let mut fake = FakeSets::default();
    let set = Declaration { name: "s".to_owned(), kind: Kind::HashIp, v6: false, max_elements: 1 };
    fake.create(&set).unwrap();
    let [a, b] = ["10.0.0.1", "10.0.0.2"].map(|text| Entry::Ip(text.parse().unwrap()));
    fake.lock().refuse.insert(a, Errno::NOMEM);
    let error = fake.change("s", &[a, b], &[]).unwrap_err();
    assert_eq!((error.errno(), is_full(&error)), (Some(Errno::NOMEM), false));
    assert!(error.to_string().starts_with("netlink: add 10.0.0.1 to ipset s"), "{error}");
    fake.change("s", &[b], &[]).unwrap();
    fake.lock().refuse.clear();
    assert!(is_full(&fake.change("s", &[a], &[]).unwrap_err()));
    fake.lock().fail = Some((1, Errno::NOMEM));
    assert_eq!(fake.clone().headers().unwrap_err().errno(), Some(Errno::NOMEM));
    fake.lock().sets.get_mut("s").unwrap().references = 1;
    assert_eq!(fake.destroy("s").unwrap_err().errno(), Some(Errno::BUSY));
    let long = Declaration { name: "a".repeat(32), ..set };
    assert!(fake.create(&long).is_err());
}

/// What ipset 7.17 sends for the command; a set is made with this revision instead of the newest.
fn sent(digits: &str, revision: Option<u8>) -> Vec<u8> {
    let mut message = plain(bytes(digits));
    if let Some(revision) = revision {
        let at = message.windows(4).position(|part| part == [5, 0, 4, 0]).unwrap();
        message[at + 4] = revision;
    }
    message
}

fn declaration(name: &str, kind: Kind, v6: bool) -> Declaration {
    Declaration { name: name.to_owned(), kind, v6, max_elements: 70_000 }
}

#[test]
#[cfg(target_endian = "little")] // as the machine that it was recorded on
fn messages_about_sets_are_those_of_the_real_tool() {
    for (declaration, revision, recorded) in [
        (declaration("s", Kind::HashIpPort, false), 1, CREATE),
        (declaration("s6", Kind::HashIpPortNet, true), 1, CREATE_V6),
        (declaration("b", Kind::BitmapPort, true), 0, CREATE_BITMAP),
    ] {
        let ours = written(|out| message::put_create(out, 7, &declaration, 1));
        assert_eq!(ours, sent(recorded, Some(revision)));
    }
    assert_eq!(written(|out| message::put_list_headers(out, 7, 1)), sent(LIST_HEADERS, None));
    assert_eq!(written(|out| message::put_list_entries(out, 7, "s", 1)), sent(LIST, None));
    assert_eq!(written(|out| message::put_swap(out, 7, "s", "n", 1)), sent(SWAP, None));
    assert_eq!(written(|out| message::put_destroy(out, 7, "n", 1)), sent(DESTROY, None));
}

#[test]
#[cfg(target_endian = "little")]
fn messages_about_entries_are_those_of_the_real_tool() {
    let [a, b] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
    let two = [Entry::IpPort(a, 6, 80), Entry::IpPort(b, 17, 53)];
    assert_eq!(written(|out| message::put_entries(out, 7, true, "s", &two, 1)), sent(RESTORE, None));
    let add = written(|out| message::put_entries(out, 7, true, "s", &two, 1));
    let mut remove = written(|out| message::put_entries(out, 7, false, "s", &two, 1));
    assert_eq!(remove[4], sent(REMOVE, None)[4]);
    remove[4] = add[4];
    assert_eq!(remove, add);
    assert_eq!(written(|out| message::put_test(out, 7, "s", &two[0], 1)), sent(TEST, None));
    // The tool adds a single entry by itself, without a list.
    for (entry, recorded) in [
        (Entry::IpPortNet("fd00::1".parse().unwrap(), 132, 36_412, "2001:db8::/32".parse().unwrap()), ADD_V6),
        (Entry::Port(30_080), ADD_PORT),
    ] {
        let data = |message: &[u8]| attributes(message, 20).pop().unwrap().1;
        let ours = written(|out| message::put_test(out, 7, "s", &entry, 1));
        let line = [8, 0, 9, 0x40, 0, 0, 0, 0];
        assert_eq!([data(&ours), line.to_vec()].concat(), data(&sent(recorded, None)));
    }
}

/// `ipset create s hash:ip,port family inet hashsize 1024 maxelem 70000`
const CREATE: &str = "
        5c000000 02060506 3a3b096b 00000000 02000000 05000100 07000000 06000200
        73000000 11000300 68617368 3a69702c 706f7274 00000000 05000400 07000000
        05000500 02000000 14000780 08001240 00000400 08001340 00011170";
/// `ipset create s6 hash:ip,port,net family inet6 hashsize 1024 maxelem 70000`
const CREATE_V6: &str = "
        60000000 02060506 3a3b096b 00000000 02000000 05000100 07000000 07000200
        73360000 15000300 68617368 3a69702c 706f7274 2c6e6574 00000000 05000400
        08000000 05000500 0a000000 14000780 08001240 00000400 08001340 00011170";
/// `ipset create b bitmap:port range 0-65535`
const CREATE_BITMAP: &str = "
        58000000 02060506 3a3b096b 00000000 02000000 05000100 07000000 06000200
        62000000 10000300 6269746d 61703a70 6f727400 05000400 03000000 05000500
        00000000 14000780 06000440 00000000 06000540 ffff0000";
/// `ipset list -t`
const LIST_HEADERS: &str = "
        24000000 07060503 393b096b 00000000 02000000 05000100 07000000 08000640
        00000004";
/// `ipset list s`
const LIST: &str = "
        24000000 07060503 393b096b 00000000 02000000 05000100 07000000 06000200
        73000000";
/// `ipset swap s n`
const SWAP: &str = "
        2c000000 06060500 393b096b 00000000 02000000 05000100 07000000 06000200
        73000000 06000300 6e000000";
/// `ipset destroy n`
const DESTROY: &str = "
        24000000 03060502 393b096b 00000000 02000000 05000100 07000000 06000200
        6e000000";
/// `ipset -exist restore, of the entries 10.0.0.1,tcp:80 and 10.0.0.2,udp:53`
const RESTORE: &str = "
        80000000 09060500 3b3b096b 00000000 02000000 05000100 07000000 06000200
        73000000 08000940 00000001 54000880 28000780 0c000180 08000140 0a000001
        06000440 00500000 05000700 06000000 08000940 00000001 28000780 0c000180
        08000140 0a000002 06000440 00350000 05000700 11000000 08000940 00000002";
/// `ipset -exist del s 10.0.0.1,tcp:80`
const REMOVE: &str = "
        4c000000 0a060500 3a3b096b 00000000 02000000 05000100 07000000 06000200
        73000000 28000780 0c000180 08000140 0a000001 06000440 00500000 05000700
        06000000 08000940 00000000";
/// `ipset test s 10.0.0.1,tcp:80`
const TEST: &str = "
        44000000 0b060500 3a3b096b 00000000 02000000 05000100 07000000 06000200
        73000000 20000780 0c000180 08000140 0a000001 06000440 00500000 05000700
        06000000";
/// `ipset -exist add s6 fd00::1,sctp:36412,2001:db8::/32`
const ADD_V6: &str = "
        78000000 09060500 3a3b096b 00000000 02000000 05000100 07000000 07000200
        73360000 54000780 18000180 14000240 fd000000 00000000 00000000 00000001
        06000440 8e3c0000 05000700 84000000 18001480 14000240 20010db8 00000000
        00000000 00000000 05001500 20000000 08000940 00000000";
/// `ipset -exist add b 30080`
const ADD_PORT: &str = "
        38000000 09060500 3a3b096b 00000000 02000000 05000100 07000000 06000200
        62000000 14000780 06000440 75800000 08000940 00000000";
