//! The dummy device and its addresses.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use lockstep_kernel::dummy::fake::FakeDevice;
use lockstep_kernel::dummy::{Device, Kernel};
use lockstep_kernel::{Errno, netns, route};

use super::{DEVICE, address, run};

/// Runs in a new namespace with a device that is not there yet.
fn device(work: impl FnOnce(&mut Kernel) + Send) {
    netns::run_in_new(|| work(&mut Kernel::open(DEVICE).unwrap())).expect("these tests need root");
}

#[test]
fn the_device_is_made_once_and_has_the_addresses_that_it_is_given() {
    let work = |device: &mut dyn Device| {
        assert_eq!(device.addresses().unwrap(), None);
        assert!(!device.remove().unwrap());
        let error = device.change(&[address(false, 1)], &[]).unwrap_err();
        assert_eq!(error.errno(), Some(Errno(libc::ENODEV)), "{error}");
        assert!(device.ensure().unwrap() && !device.ensure().unwrap());
        assert_eq!(device.addresses().unwrap(), Some(Vec::new()));
        let both = |n| [address(false, n), address(true, n)];
        let mut all: Vec<_> = (1..=1_500).flat_map(both).collect();
        all.sort_unstable();
        let begin = Instant::now();
        assert_eq!(device.change(&all, &[]).unwrap(), []);
        println!("3,000 addresses added: {:?}", begin.elapsed());
        assert_eq!(device.change(&all, &[]).unwrap(), [], "there already");
        assert_eq!(device.addresses().unwrap().unwrap(), all);
        assert_eq!(device.others().unwrap(), [] as [IpAddr; 0]);
        let (gone, stay) = all.split_at(100);
        assert_eq!(device.change(&[], gone).unwrap(), []);
        assert_eq!(device.change(&[], gone).unwrap(), [], "gone already");
        assert_eq!(device.addresses().unwrap().unwrap(), stay);
        assert_eq!(device.change(&gone[..1], stay).unwrap(), []);
        assert_eq!(device.addresses().unwrap().unwrap(), gone[..1]);
        assert!(device.changed().unwrap() && !device.changed().unwrap());
        assert!(device.remove().unwrap());
        assert_eq!(device.addresses().unwrap(), None);
        assert!(device.changed().unwrap());
    };
    device(|kernel| work(kernel));
    work(&mut FakeDevice::default());
}

#[test]
fn addresses_are_the_nodes_at_once_though_the_device_is_down() {
    device(|device| {
        device.ensure().unwrap();
        let addresses = [address(false, 1), address(true, 1)];
        device.change(&addresses, &[]).unwrap();
        let shown = run("ip", "addr show kube-ipvs0");
        assert!(shown.contains("<BROADCAST,NOARP>") && shown.contains("state DOWN"), "{shown}");
        assert!(!shown.contains("tentative"), "{shown}");
        let mut routes = route::Kernel::open().unwrap();
        assert!(addresses.iter().all(|address| routes.is_local(*address).unwrap()));
        device.change(&[], &addresses).unwrap();
        assert!(!addresses.iter().any(|address| routes.is_local(*address).unwrap()));
        let bad: IpAddr = "ff02::1".parse().unwrap();
        let refused = device.change(&[addresses[0], bad, addresses[1]], &[]).unwrap();
        assert_eq!(refused.iter().map(|(address, _)| *address).collect::<Vec<_>>(), [bad]);
        assert_eq!(device.addresses().unwrap().unwrap(), addresses);
    });
}

#[test]
fn other_interfaces_have_the_other_addresses() {
    device(|device| {
        device.ensure().unwrap();
        run("ip", "link set lo up");
        run("ip", "link add eth0 type dummy");
        run("ip", "addr add 192.0.2.7/24 dev eth0");
        run("ip", "addr add 2001:db8::7/64 dev eth0 nodad");
        run("ip", "addr add fe80::7/64 dev eth0 nodad");
        let (mine, theirs) = (address(false, 1), "192.0.2.7".parse().unwrap());
        device.change(&[mine, theirs], &[]).unwrap();
        assert_eq!(device.addresses().unwrap().unwrap(), [mine, theirs]);
        let others: Vec<_> = device.others().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(others, ["127.0.0.1", "192.0.2.7", "::1", "2001:db8::7"]);
        // Link-local ones of ours are seen, those that come of the interface being up are not.
        let local: IpAddr = "fe80::8".parse().unwrap();
        device.change(&[local], &[]).unwrap();
        run("ip", "addr add fe80::9/64 dev kube-ipvs0 nodad");
        assert_eq!(device.addresses().unwrap().unwrap(), [mine, theirs, local]);
        device.change(&[], &[local]).unwrap();
        // What somebody else bound with another prefix goes as well.
        run("ip", "addr add 198.51.100.1/24 dev kube-ipvs0");
        assert_eq!(device.change(&[], &["198.51.100.1".parse().unwrap()]).unwrap(), []);
        assert_eq!(device.addresses().unwrap().unwrap(), [mine, theirs]);
    });
}

#[test]
fn the_device_takes_addresses_of_ipv6_where_interfaces_are_made_without() {
    device(|device| {
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        assert!(device.ensure().unwrap());
        assert_eq!(device.change(&[address(true, 1)], &[]).unwrap(), []);
        // Turned off again, which takes the addresses.
        std::fs::write("/proc/sys/net/ipv6/conf/kube-ipvs0/disable_ipv6", "1").unwrap();
        let refused = device.change(&[address(true, 1)], &[]).unwrap();
        assert_eq!(refused, [(address(true, 1), Errno(libc::EACCES))]);
        assert!(!device.ensure().unwrap());
        assert_eq!(device.change(&[address(true, 1)], &[]).unwrap(), []);
    });
}

#[test]
fn an_interface_that_is_no_dummy_is_left_alone() {
    device(|device| {
        run("ip", "link add kube-ipvs0 type veth peer name other");
        let errors = [
            device.ensure().unwrap_err(),
            device.addresses().unwrap_err(),
            device.change(&[address(false, 1)], &[]).unwrap_err(),
            device.remove().unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.errno(), Some(Errno::EXIST));
            assert!(error.to_string().ends_with("is there and is no dummy device"), "{error}");
        }
        assert!(run("ip", "-o link show kube-ipvs0").contains("kube-ipvs0@"));
    });
}

#[test]
fn changes_of_links_and_addresses_are_heard_whoever_makes_them() {
    device(|device| {
        assert!(!device.changed().unwrap());
        for line in [
            "link add eth0 type dummy",
            "addr add 192.0.2.7/24 dev eth0",
            "addr add 2001:db8::7/64 dev eth0 nodad",
            "addr del 192.0.2.7/24 dev eth0",
            "link del eth0",
        ] {
            run("ip", line);
            // Of an address of IPv6 the kernel tells when it comes to it.
            let begin = Instant::now();
            while !device.changed().unwrap() {
                assert!(begin.elapsed() < Duration::from_secs(20), "{line}");
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(!device.changed().unwrap());
        }
        device.ensure().unwrap();
        assert!(device.changed().unwrap());
    });
}
