//! Virtual servers, sets and the dummy device of a kernel that has them all: the guest's. Needs
//! root, `modprobe`, and the programs `ip`, `ipset`, `ipvsadm` and `iptables-legacy`.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;

mod device;
/// The sets of this kernel, by the same tests as those of the host.
#[path = "../ipset.rs"]
mod ipset;
mod servers;

const DEVICE: &str = "kube-ipvs0";

fn run(program: &str, line: &str) -> String {
    let output = Command::new(program).args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn address(v6: bool, n: u32) -> IpAddr {
    match v6 {
        false => Ipv4Addr::from(0x0a60_0000 + n).into(),
        true => Ipv6Addr::from((0xfd00_0096 << 96) + u128::from(n)).into(),
    }
}
