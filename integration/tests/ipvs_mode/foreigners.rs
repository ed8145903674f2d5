//! What is not ours, or has our name and is not what we make.

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{product, roll_manifest};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};

use crate::{FIRST, NODE, backend_error, only_answer, product_with, virtual_servers};

/// By firewall mark; at an address that is no Service's; at the node's own address, at a port that is a
/// node port of another protocol; in an excluded range, whose address is on the interface of ours. And a
/// set that a rule refers to.
const THEIRS: &str = "set -e
ip link add kube-ipvs0 type dummy
ip addr add 198.51.100.7/32 dev kube-ipvs0
ipvsadm -A -f 7 -s wrr -p 60
ipvsadm -a -f 7 -r 10.244.1.1:8080 -m -w 3
ipvsadm -A -t 203.0.113.9:443 -s wlc
ipvsadm -a -t 203.0.113.9:443 -r 10.244.1.2:8080 -m -w 0
ipvsadm -A -u 10.200.0.11:30080 -s rr
ipvsadm -a -u 10.200.0.11:30080 -r 10.244.1.2:8080 -m
ipvsadm -A -t 198.51.100.7:80 -s rr
ipvsadm -a -t 198.51.100.7:80 -r 10.244.1.1:9090 -m
ipset create theirs hash:ip
ipset add theirs 192.0.2.1
ipset create theirs6 hash:net family inet6
iptables-nft -A INPUT -m set --match-set theirs src -j DROP
";

/// What an earlier process of ours, or a kube-proxy, would have left: it goes.
const LEFT_BEHIND: &str = "set -e
ip addr add 198.51.101.8/32 dev kube-ipvs0
ipvsadm -A -t 198.51.101.8:80 -s rr
ipvsadm -a -t 198.51.101.8:80 -r 10.244.1.1:9090 -m
";

const EXCLUDED: &str = "--ipvs-exclude-cidrs=198.51.100.0/24";

/// The lines that are about these addresses, or a mark.
fn theirs(servers: &str) -> String {
    let marks = ["-f 7 ", " 203.0.113.9:443 ", " 10.200.0.11:30080 ", " 198.51.100.7:80 "];
    let about = |line: &&str| marks.iter().any(|mark| line.contains(mark)) && !line.contains("-t 10.200.");
    servers.lines().filter(about).flat_map(|line| [line, "\n"]).collect()
}

fn sets(product: &Product, only_theirs: bool) -> Result<String> {
    let all = product.lab.tool(NODE, &["ipset", "save"])?;
    let wanted = all.lines().filter(|line| !only_theirs || line.contains(" theirs"));
    Ok(wanted.flat_map(|line| [line, "\n"]).collect())
}

#[test]
fn what_is_not_ours_is_as_before_during_a_run_and_after_cleanup() -> Result<()> {
    let mut product = product(&[Mode::Ipvs])?;
    product.set_agent_flags(&[EXCLUDED, "--cluster-cidr=10.244.0.0/16,fd00:244::/32"]);
    product.lab.tool(NODE, &["sh", "-c", THEIRS])?;
    let (before, sets_before) = (virtual_servers(&product)?, sets(&product, false)?);
    ensure!(theirs(&before) == before && before.lines().count() == 8, "not all of theirs:\n{before}");
    product.lab.tool(NODE, &["sh", "-c", LEFT_BEHIND])?;

    product.start()?;
    let during = virtual_servers(&product)?;
    ensure!(theirs(&during) == before, "changed at the start:\n{before}\n{during}");
    ensure!(during.contains("-t 10.200.0.11:30080 "), "no node port of ours beside theirs:\n{during}");
    ensure!(!during.contains("198.51.101.8"), "what was left behind is still there:\n{during}");
    product.change(|product| product.write_manifest("roll.yaml", &roll_manifest(&[FIRST])))?;
    only_answer(&product, Place::Outside, lockstep_integration::fixture::roll(), &[FIRST])?;
    product.change(|product| product.remove_manifest("roll.yaml"))?;
    ensure!(theirs(&virtual_servers(&product)?) == before, "changed by changes of ours");
    ensure!(sets(&product, true)? == sets_before, "their sets changed");

    product.agent(1)?.terminate()?;
    product.cleanup_with(1, &[EXCLUDED])?;
    let after = virtual_servers(&product)?;
    ensure!(after == before, "after cleanup:\n{before}\n{after}");
    ensure!(sets(&product, false)? == sets_before, "sets after cleanup:\n{}", sets(&product, false)?);
    let links = product.lab.tool(NODE, &["ip", "-oneline", "link"])?;
    ensure!(!links.contains("kube-ipvs0"), "the interface is left:\n{links}");
    for tool in ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"] {
        let rules = product.lab.tool(NODE, &[tool])?;
        ensure!(!rules.contains("KUBE-"), "{tool}: chains are left:\n{rules}");
    }
    let rules = product.lab.tool(NODE, &["iptables-nft-save"])?;
    ensure!(rules.contains("--match-set theirs src -j DROP"), "their rule is gone:\n{rules}");
    Ok(())
}

#[test]
fn a_set_of_our_name_and_another_type_is_named_until_it_is_gone() -> Result<()> {
    let mut product = product_with(&[])?;
    product.lab.tool(NODE, &["ipset", "create", "KUBE-CLUSTER-IP", "hash:ip"])?;
    product.start_control_plane()?;
    product.start_agent(1)?;
    let error = wait_until("the set is named", PATIENCE, || {
        Ok(Some(backend_error(&product)?).filter(|error| error.contains("KUBE-CLUSTER-IP")))
    })
    .with_context(|| product.logs())?;
    ensure!(error.contains("hash:ip"), "its type is not named: {error}");
    product.lab.tool(NODE, &["ipset", "destroy", "KUBE-CLUSTER-IP"])?;
    product.wait_verified(0)?;
    only_answer(&product, Place::Outside, lockstep_integration::fixture::roll(), &[FIRST, crate::SECOND])
}

#[test]
fn a_set_without_room_gets_more() -> Result<()> {
    let mut product = product(&[Mode::Ipvs])?;
    let create = ["ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port", "maxelem", "1"];
    product.lab.tool(NODE, &create)?;
    product.start()?;
    let list = product.lab.tool(NODE, &["ipset", "list", "-t", "KUBE-CLUSTER-IP"])?;
    ensure!(list.contains("Number of entries: 3") && list.contains("maxelem 65536"), "{list}");
    let web = lockstep_integration::fixture::web(Family::V4);
    only_answer(&product, Place::Pod(1, 2), web, &[FIRST])
}
