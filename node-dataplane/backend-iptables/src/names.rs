//! Chain names: made, and recognised as ours.
//!
//! Names are kube-proxy's, so a host can go from one to the other and back, and the tools that
//! people have for reading its rules keep working. Length: 9 of prefix + 16 of hash = 25, under
//! the kernel's limit of 28.

use std::fmt;

use data_encoding::BASE32;
use lockstep_model::Protocol;
use lockstep_view::Target;
use lockstep_xtables::Table;
use sha2::{Digest, Sha256};

/// The tables that we write to. Chains of others' are never ours, whatever their names.
pub(crate) const TABLES: [Table; 2] = [Table::Filter, Table::Nat];

/// The chains that hold lines of many Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Shared {
    /// nat: by destination address. Its last lines lead to the node ports.
    Services,
    /// nat: by node port.
    NodePorts,
    /// filter: refusals at cluster IPs.
    Refused,
    /// filter: refusals at every other address.
    RefusedExternal,
    /// filter: health-check node ports.
    HealthChecks,
    /// filter: sources that a load balancer's address is closed to.
    Firewall,
}

impl Shared {
    pub(crate) const ALL: [Shared; 6] = [
        Shared::Services,
        Shared::NodePorts,
        Shared::Refused,
        Shared::RefusedExternal,
        Shared::HealthChecks,
        Shared::Firewall,
    ];

    pub(crate) fn table(self) -> Table {
        match self {
            Shared::Services | Shared::NodePorts => Table::Nat,
            _ => Table::Filter,
        }
    }

    pub(crate) fn chain(self) -> &'static str {
        match self {
            Shared::Services | Shared::Refused => "KUBE-SERVICES",
            Shared::NodePorts | Shared::HealthChecks => "KUBE-NODEPORTS",
            Shared::RefusedExternal => "KUBE-EXTERNAL-SERVICES",
            Shared::Firewall => "KUBE-PROXY-FIREWALL",
        }
    }
}

pub(crate) const MARK_MASQ: &str = "KUBE-MARK-MASQ";
pub(crate) const POSTROUTING: &str = "KUBE-POSTROUTING";
pub(crate) const FORWARD: &str = "KUBE-FORWARD";
/// kube-proxy's flush detector. We make none; one that is left goes with `cleanup`.
pub(crate) const CANARY: &str = "KUBE-PROXY-CANARY";

/// Prefixes of chains that belong to one Service port or endpoint, in nat. The last is what
/// older kube-proxies called `KUBE-EXT-`.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-XLB-"];

const HASH: usize = 16;
/// The longest prefix and a hash.
const LONGEST: usize = 9 + HASH;

/// What a chain is named by behind its prefix.
pub(crate) type HashText = [u8; HASH];

/// Name of a chain of one Service port or endpoint. A value and not a `String`, because every
/// endpoint has one and they are made, sorted and looked up by the hundred thousand.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChainName {
    text: [u8; LONGEST],
    length: u8,
}

impl ChainName {
    /// `prefix` is one of those above.
    pub(crate) fn new(prefix: &'static str, hash: HashText) -> Self {
        let mut text = [0; LONGEST];
        let (before, after) = text.split_at_mut(prefix.len());
        before.copy_from_slice(prefix.as_bytes());
        after[..HASH].copy_from_slice(&hash);
        Self { text, length: u8::try_from(prefix.len() + HASH).unwrap_or_default() }
    }

    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.text[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// First 16 characters of the base32 of the SHA-256 of the parts.
pub(crate) fn hash(parts: &[&str]) -> HashText {
    let mut sha = Sha256::new();
    for part in parts {
        sha.update(part.as_bytes());
    }
    let mut text = [0; HASH];
    // Five bits are a character.
    BASE32.encode_mut(&sha.finalize()[..HASH * 5 / 8], &mut text);
    text
}

/// Hash of a Service port; `text` is `namespace/name:port`.
pub(crate) fn port_hash(text: &str, protocol: Protocol) -> HashText {
    hash(&[text, protocol.name()])
}

/// Name of an endpoint's chain.
pub(crate) fn endpoint_chain(text: &str, protocol: Protocol, socket: &str) -> ChainName {
    ChainName::new("KUBE-SEP-", hash(&[text, protocol.name(), socket]))
}

/// `10.0.0.1:80`, `[fd00::1]:80`.
pub(crate) fn socket(target: Target) -> String {
    std::net::SocketAddr::new(target.address, target.port.get()).to_string()
}

/// True for every chain that is ours, also one that a kube-proxy left.
pub(crate) fn is_ours(table: Table, chain: &str) -> bool {
    TABLES.contains(&table)
        && (is_fixed_chain(table, chain) || is_service_chain(table, chain) || chain == CANARY)
}

/// True for the chains of single Services.
pub(crate) fn is_service_chain(table: Table, chain: &str) -> bool {
    let is_hash =
        |rest: &str| rest.len() == HASH && rest.bytes().all(|byte| matches!(byte, b'A'..=b'Z' | b'2'..=b'7'));
    table == Table::Nat && PREFIXES.iter().any(|prefix| chain.strip_prefix(prefix).is_some_and(is_hash))
}

/// True for the chains that are there whatever Services there are.
pub(crate) fn is_fixed_chain(table: Table, chain: &str) -> bool {
    is_shared_chain(table, chain)
        || match table {
            Table::Nat => chain == MARK_MASQ || chain == POSTROUTING,
            Table::Filter => chain == FORWARD,
            Table::Mangle => false,
        }
}

/// True for the chains that hold lines of many Services.
pub(crate) fn is_shared_chain(table: Table, chain: &str) -> bool {
    Shared::ALL.iter().any(|shared| shared.table() == table && shared.chain() == chain)
}

/// How far above the endpoints a chain of nat is: it leads to chains of lower levels only.
pub(crate) fn level(chain: &str) -> usize {
    const UPWARDS: [&[&str]; 4] =
        [&["KUBE-SEP-"], &["KUBE-SVC-", "KUBE-SVL-"], &["KUBE-EXT-", "KUBE-XLB-"], &["KUBE-FW-"]];
    if chain == Shared::Services.chain() {
        return UPWARDS.len() + 2;
    }
    if chain == Shared::NodePorts.chain() {
        return UPWARDS.len() + 1;
    }
    let at = UPWARDS.iter().position(|prefixes| prefixes.iter().any(|prefix| chain.starts_with(prefix)));
    at.map_or(0, |level| level + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_kube_proxys() {
        for (text, expected) in [
            ("default/nginx-basic:httptcp", "WWRFY3PZ7W3FGMQW"),
            ("ns1/svc1:p80tcp", "XPGD46QRK7WJZT7O"),
            ("ns2/svc2:p80tcp", "GNZBNJ2PO5MGZ6GT"),
            ("ns2/svc2:p8080tcp", "2VJB64SDSIJUP5T6"),
            ("ns3/svc3:p80tcp", "X27LE4BHSL4DOUIK"),
            ("ns4/svc4:p80tcp", "4SW47YFZTEDKD3PK"),
            ("ns5/svc5:p80tcp", "NUKIZ6OKUXPJNT4C"),
            ("ns1/svc1:p80tcp10.180.0.1:80", "SXIVWICOYRO3J4NJ"),
            ("ns2/svc2:p80tcp10.180.0.2:80", "RS4RBKLTHTF2IUXJ"),
            ("ns3/svc3:p80tcp10.180.0.3:80", "OYPFS5VJICHGATKP"),
            ("ns4/svc4:p80tcp10.180.0.4:80", "UKSFD7AGPMPPLUHC"),
            ("ns4/svc4:p80tcp10.180.0.5:80", "C6EBXVWJJZMIWKLZ"),
            ("ns5/svc5:p80tcp10.180.0.3:80", "I77PXRDZVX7PMWMN"),
        ] {
            assert_eq!(hash(&[text]), expected.as_bytes(), "{text}");
        }
    }

    #[test]
    fn parts_are_joined_without_separator() {
        assert_eq!(port_hash("default/nginx-basic:http", Protocol::Tcp), *b"WWRFY3PZ7W3FGMQW");
        let target = Target { address: [10, 180, 0, 1].into(), port: lockstep_model::Port::new(80).unwrap() };
        let chain = endpoint_chain("ns1/svc1:p80", Protocol::Tcp, &socket(target));
        assert_eq!(chain.as_str(), "KUBE-SEP-SXIVWICOYRO3J4NJ");
    }

    #[test]
    fn names_sort_as_their_text_does() {
        let hash = port_hash("ns1/svc1:p80", Protocol::Tcp);
        let mut names = PREFIXES.map(|prefix| ChainName::new(prefix, hash));
        names.sort_unstable();
        assert!(names.is_sorted_by_key(ChainName::to_string), "{names:?}");
        assert_eq!(names[1].as_str(), "KUBE-FW-XPGD46QRK7WJZT7O");
    }

    #[test]
    fn only_our_chains_are_ours() {
        for (table, chain, service, fixed) in [
            (Table::Nat, "KUBE-SVC-WWRFY3PZ7W3FGMQW", true, false),
            (Table::Filter, "KUBE-SVC-WWRFY3PZ7W3FGMQW", false, false),
            (Table::Nat, "KUBE-SVC-WWRFY3PZ7W3FGMQ1", false, false),
            (Table::Nat, "KUBE-SVC-", false, false),
            (Table::Nat, "KUBE-KUBELET-CANARY", false, false),
            (Table::Filter, "KUBE-FIREWALL", false, false),
            (Table::Nat, "KUBE-SERVICES", false, true),
            (Table::Filter, "KUBE-FORWARD", false, true),
            (Table::Nat, "KUBE-FORWARD", false, false),
            (Table::Nat, "INPUT", false, false),
            (Table::Mangle, "KUBE-SERVICES", false, false),
            (Table::Mangle, "KUBE-PROXY-CANARY", false, false),
        ] {
            assert_eq!(is_service_chain(table, chain), service, "{chain}");
            assert_eq!(is_fixed_chain(table, chain), fixed, "{chain}");
            assert_eq!(is_ours(table, chain), service || fixed, "{chain}");
        }
        assert!(is_ours(Table::Nat, CANARY));
    }
}
