//! The messages by themselves, and faults of the fake.

use std::net::IpAddr;

use super::fake::FakeDevice;
use super::{Device, message};
use crate::Errno;
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
        assert_eq!(message::read_address(&whole), Some((9, address)));
        // The address is there twice; half of it is enough.
        for end in 0..whole.payload.len() {
            let part = Message { payload: &whole.payload[..end], ..whole };
            assert!(message::read_address(&part).is_none_or(|read| read == (9, address)));
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
