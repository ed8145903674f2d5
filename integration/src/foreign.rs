//! What other programs have in a node's kernel beside us, told from what is ours.

use anyhow::{Result, bail};

use crate::lab::Place;
use crate::product::{Mode, Product};

/// Rules of a node, without counters, as the kernel's own tools list them.
pub fn rules(product: &Product, node: u8) -> Result<String> {
    let place = Place::Node(node);
    let mut text = product.lab.tool(place, &["nft", "--stateless", "list", "ruleset"])?;
    for tool in ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"] {
        let saved = product.lab.tool(place, &[tool])?;
        text.extend(saved.lines().filter(|line| !line.starts_with('#')).map(without_counters));
    }
    Ok(text)
}

/// `:INPUT ACCEPT [5:300]` without what packets change.
fn without_counters(line: &str) -> String {
    format!("{}\n", line.split(" [").next().unwrap_or(line))
}

/// The same without anything that is Lockstep's while it runs.
pub fn rules_of_others(product: &Product, node: u8) -> Result<String> {
    let place = Place::Node(node);
    let mut text = String::new();
    for table in product.lab.tool(place, &["nft", "list", "tables"])?.lines() {
        let words: Vec<&str> = table.split(' ').collect();
        let [_, family, name] = words[..] else { bail!("a table called {table:?}") };
        // Tables of iptables-nft are read below, by the tool whose they are.
        let of_iptables = matches!(family, "ip" | "ip6") && matches!(name, "nat" | "filter" | "mangle");
        if name != "lockstep" && !of_iptables {
            text += &product.lab.tool(place, &["nft", "--stateless", "list", "table", family, name])?;
        }
    }
    for tool in ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"] {
        let saved = product.lab.tool(place, &[tool])?;
        let theirs = |line: &&str| {
            let ours = line.contains("KUBE-") && !FOREIGN_KUBE.iter().any(|chain| line.contains(chain));
            !line.starts_with('#') && !ours
        };
        text.extend(saved.lines().filter(theirs).map(without_counters));
    }
    Ok(text)
}

/// Chains of kube-proxy's prefix that are kubelet's.
const FOREIGN_KUBE: [&str; 2] = ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY"];

/// As firewalld has it: one table for both families, high priorities, sets, maps, counters.
const LIKE_FIREWALLD: &str = "
table inet firewalld {
    set trusted { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.7 } }
    chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; jump nat_PREROUTING_ZONES; }
    chain nat_PREROUTING_ZONES { iifname \"nowhere0\" goto nat_PRE_public; goto nat_PRE_public; }
    chain nat_PRE_public { return; }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state established,related accept
        ip saddr @trusted counter accept
        tcp dport 12345 counter drop comment \"theirs\"
    }
}
table ip services { chain services { tcp dport 12346 drop; }; }
";

/// As Docker, Calico and kubelet have it.
const LIKE_DOCKER_AND_CALICO: &str = "
*nat
:DOCKER - [0:0]
:cali-PREROUTING - [0:0]
:cali-POSTROUTING - [0:0]
-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING
-A DOCKER -p tcp -m tcp --dport 9999 -j REDIRECT --to-ports 9998
-A cali-PREROUTING -p udp -m udp --dport 9997 -j ACCEPT
COMMIT
*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:cali-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
-A KUBE-FIREWALL -m comment --comment \"block marked\" -m mark --mark 0x8000/0x8000 -j DROP
-A cali-FORWARD -p tcp -m tcp --dport 9996 -j DROP
COMMIT
";

/// kubelet's guard of the loopback, IPv4 alone. Node ports at 127.0.0.1 need the same.
const LIKE_KUBELET: &str = "KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
    -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";

/// Gives every node what other programs have in the kernel.
pub fn add(product: &Product) -> Result<()> {
    let files = product.lab.directory().to_path_buf();
    std::fs::write(files.join("foreign.nft"), LIKE_FIREWALLD)?;
    std::fs::write(files.join("foreign.iptables"), LIKE_DOCKER_AND_CALICO)?;
    for node in 1..=product.lab.nodes() {
        let place = Place::Node(node);
        product.lab.tool(place, &["nft", "-f", &files.join("foreign.nft").display().to_string()])?;
        for tool in ["iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"] {
            let restore = format!("{tool}-restore < {}", files.join("foreign.iptables").display());
            product.lab.tool(place, &["sh", "-c", &restore])?;
            if !tool.starts_with("ip6") {
                product.lab.tool(place, &["sh", "-c", &format!("{tool} -A {LIKE_KUBELET}")])?;
            }
        }
    }
    Ok(())
}

/// True where the kernel of node 1 has rules by which Lockstep in this mode takes new connections.
pub fn has_rules_of(product: &Product, mode: Mode) -> Result<bool> {
    let tools: [&[&str]; 2] = match mode {
        Mode::Nftables => [&["nft", "list", "tables"], &["nft", "list", "tables"]],
        Mode::IptablesLegacy => [&["iptables-legacy-save"], &["ip6tables-legacy-save"]],
        Mode::IptablesNft | Mode::Ipvs => [&["iptables-nft-save"], &["ip6tables-nft-save"]],
    };
    let mut found = false;
    for tool in tools {
        let text = product.lab.tool(Place::Node(1), tool)?;
        // Two modes have chains in one flavour, some of one name.
        let of_both = text.contains(":KUBE-IPVS-FILTER ");
        found |= text.lines().any(|line| match mode {
            Mode::Nftables => line.ends_with(" lockstep"),
            Mode::Ipvs => line.contains("KUBE-IPVS-OUT-FILTER"),
            _ if of_both => line.contains("KUBE-SVC-") || line.contains("KUBE-SEP-"),
            _ => line.contains("KUBE-") && !FOREIGN_KUBE.iter().any(|chain| line.contains(chain)),
        });
    }
    Ok(found)
}

/// Fails where the two differ, and says how. `when`: for people.
pub fn same(node: u8, when: &str, before: &str, after: &str) -> Result<()> {
    if before == after {
        return Ok(());
    }
    let gone = before.lines().filter(|line| !after.contains(line));
    let new = after.lines().filter(|line| !before.contains(line));
    let lines: Vec<String> =
        gone.map(|line| format!("- {line}")).chain(new.map(|line| format!("+ {line}"))).collect();
    bail!("node{node}, {when}: foreign rules changed (or their order):\n{}", lines.join("\n"))
}
