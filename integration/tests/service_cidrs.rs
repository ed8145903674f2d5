//! ServiceCIDRs from a manifest to the packets. Node 1 is in nftables mode, which drops what is in
//! one and no Service's; node 2 is in iptables mode, which leaves it alone. Needs root.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use lockstep_integration::lab::{Family, Lab, Place};
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::traffic::{Outcome, POD_PORT, Transport, probe};

const FAMILIES: [(Family, &str); 2] = [(Family::V4, "10.96.0.99"), (Family::V6, "fd00:96::99")];

/// Makes pod 2 of a node answer at addresses that are nobody's cluster IPs.
fn answer(lab: &Lab, node: u8) -> Result<()> {
    for (family, address) in FAMILIES {
        let pod = Place::Pod(node, 2);
        lab.tool(pod, &["ip", "address", "add", address, "dev", "lo"])?;
        let via = pod.address(family).to_string();
        lab.tool(Place::Node(node), &["ip", "route", "add", address, "via", &via])?;
    }
    Ok(())
}

/// Fails unless pod 1 of each node gets through, or does not.
fn expect(product: &Product, passes: [bool; 2]) -> Result<()> {
    for (node, passes) in (1..).zip(passes) {
        for (_, address) in FAMILIES {
            let to = (address.parse::<IpAddr>()?, POD_PORT).into();
            let outcome = probe(&product.lab, Place::Pod(node, 1), Transport::Tcp, to)?;
            let as_expected = match &outcome {
                Outcome::Answered { by, .. } => passes && *by == Place::Pod(node, 2),
                other => !passes && *other == Outcome::Timeout,
            };
            ensure!(as_expected, "node{node} to {to}: {outcome}\n{}", product.logs());
        }
    }
    Ok(())
}

#[test]
fn what_is_in_a_service_cidr_and_no_services_is_dropped_while_the_service_cidr_is_there() -> Result<()> {
    let mut product = Product::new(Lab::new(2, 2)?, &[Mode::Nftables, Mode::IptablesNft])?;
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.start()?;
    answer(&product.lab, 1)?;
    answer(&product.lab, 2)?;
    expect(&product, [true, true])?;

    let cidr = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
                spec: {cidrs: [10.96.0.0/16, 'fd00:96::/112']}\n";
    product.change(|product| product.write_manifest("cidr.yaml", cidr))?;
    expect(&product, [false, true])?;
    ensure!(product.server_info()?.service_cidrs == 1, "{:?}", product.server_info()?);
    // A restarted agent adopts it.
    product.agent(1)?.kill()?;
    product.start_agent(1)?;
    product.wait_verified(0)?;
    expect(&product, [false, true])?;

    product.change(|product| product.remove_manifest("cidr.yaml"))?;
    expect(&product, [true, true])
}
