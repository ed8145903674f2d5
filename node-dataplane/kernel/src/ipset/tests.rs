//! The messages by themselves, and faults of the fake.

use super::fake::FakeSets;
use super::{Declaration, Entry, Kind, Sets, is_full, message};
use crate::Errno;
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
