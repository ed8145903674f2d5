//! The messages by themselves, and faults of the fake.

use std::net::IpAddr;

use super::fake::FakeDevice;
use super::{Device, Listed, message};
use crate::Errno;
use crate::netlink::recorded::{bytes, plain, written};
use crate::netlink::{Message, Messages};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn an_address_is_read_as_the_kernel_writes_it_and_whatever_is_cut_short_is_none() {
    for address in [ip("10.96.0.1"), ip("fd00:96::1")] {
        let mut out = Vec::new();
        message::put_address(&mut out, 9, address, true, 7);
        let whole = Messages::of(&out).next().unwrap();
        let listed = Listed { index: 9, prefix: if address.is_ipv4() { 32 } else { 128 }, address };
        assert_eq!(message::read_address(&whole), Some(listed));
        // The address is there twice; half of it is enough.
        for end in 0..whole.payload.len() {
            let part = Message { payload: &whole.payload[..end], ..whole };
            assert!(message::read_address(&part).is_none_or(|read| read == listed));
        }
    }
}

#[test]
fn an_interface_is_a_dummy_by_what_it_says_it_is() {
    let mut out = Vec::new();
    message::put_new_link(&mut out, "kube-ipvs0", 1);
    let link = Messages::of(&out).next().unwrap();
    assert!(message::read_link(&link).unwrap().dummy);
    for end in 0..link.payload.len() {
        let part = Message { payload: &link.payload[..end], ..link };
        assert!(message::read_link(&part).is_none_or(|found| !found.dummy), "{end}");
    }
}

#[test]
fn the_fake_refuses_what_it_is_told_to() {
    let mut fake = FakeDevice::default();
    fake.ensure().unwrap();
    fake.lock().refuse.insert(ip("10.96.0.2"), Errno::NOMEM);
    let refused = fake.change(&[ip("10.96.0.2"), ip("10.96.0.1")], &[]).unwrap();
    assert_eq!(refused, [(ip("10.96.0.2"), Errno::NOMEM)]);
    assert_eq!(fake.addresses().unwrap().unwrap(), [ip("10.96.0.1")]);
    fake.lock().others = vec![ip("192.0.2.2"), ip("192.0.2.1"), ip("192.0.2.2")];
    assert_eq!(fake.others().unwrap(), [ip("192.0.2.1"), ip("192.0.2.2")]);
    fake.lock().fail = Some((1, Errno::NOMEM));
    assert_eq!(fake.clone().remove().unwrap_err().errno(), Some(Errno::NOMEM));
    fake.lock().taken = true;
    assert_eq!(fake.addresses().unwrap_err().errno(), Some(Errno::EXIST));
}

#[test]
#[cfg(target_endian = "little")] // as the machine that it was recorded on
fn messages_are_those_of_the_real_tool() {
    let sent = |digits| plain(bytes(digits));
    // Ours says of an attribute that it holds attributes, which the kernel does not ask for.
    let mut recorded = sent(LINK);
    recorded[51] |= 0x80;
    assert_eq!(written(|out| message::put_new_link(out, "kube-ipvs0", 1)), recorded);
    for (address, recorded) in [("10.96.0.1", ADD), ("fd00:96::1", ADD_V6)] {
        assert_eq!(written(|out| message::put_address(out, 1, ip(address), true, 1)), sent(recorded));
    }
    // Ours removes the address whatever its prefix length is.
    let mut recorded = sent(REMOVE);
    recorded.truncate(recorded.len() - 8);
    recorded[0] -= 8;
    assert_eq!(written(|out| message::put_address(out, 1, ip("10.96.0.1"), false, 1)), recorded);
}

/// `ip link add kube-ipvs0 type dummy` of iproute2 6.1.
const LINK: &str = "
        40000000 10000506 393b096b 00000000 00000000 00000000 00000000 00000000
        0f000300 6b756265 2d697076 73300000 10001200 09000100 64756d6d 79000000";
/// `ip addr add 10.96.0.1/32 dev lo` of iproute2 6.1.
const ADD: &str = "
        28000000 14000506 393b096b 00000000 02200000 01000000 08000200 0a600001
        08000100 0a600001";
/// `ip addr add fd00:96::1/128 dev lo nodad` of iproute2 6.1.
const ADD_V6: &str = "
        40000000 14000506 393b096b 00000000 0a800200 01000000 14000200 fd000096
        00000000 00000000 00000001 14000100 fd000096 00000000 00000000 00000001";
/// `ip addr del 10.96.0.1/32 dev lo` of iproute2 6.1.
const REMOVE: &str = "
        28000000 15000500 393b096b 00000000 02200000 01000000 08000200 0a600001
        08000100 0a600001";
