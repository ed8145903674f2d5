//! The tables in nft's syntax, for people and for review goldens. Loads with `nft -f`, but for
//! IPv6 affinity: nft 1.0.6 can list those rules and not load them.

use std::fmt::Write as _;
use std::net::IpAddr;

use lockstep_kernel::nf_tables::Chain;
use lockstep_model::Family;

use crate::layout::{self, ChainLayout};
use crate::names::TABLE;
use crate::rules::{kernel_family, key_text};
use crate::sets::{Data, Datum, Field, Key, Ranges, SetId};
use crate::state::State;

/// Both tables.
pub(crate) fn render(state: &State) -> String {
    let mut out = String::new();
    let Some(node) = &state.node else { return out };
    let mut elements = Vec::new();
    state.each_element(&mut |family, set, key, datum| elements.push((family, set, *key, datum)));
    elements.sort_unstable_by_key(|(family, set, key, _)| (*family, *set, *key));
    for family in Family::ALL {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "table {} {TABLE} {{", kernel_family(family).word());
        for set in SetId::ALL {
            let of_set = elements.iter().filter(|element| (element.0, element.1) == (family, set));
            let of_set: Vec<String> =
                of_set.map(|(_, _, key, datum)| element_text(family, set, key, *datum)).collect();
            set_text(&mut out, family, set, state.size(family, set), &of_set);
        }
        for chain in layout::fixed(family, node) {
            chain_text(&mut out, family, &chain);
        }
        for (_, chain) in state.chains.iter().filter(|(of, _)| *of == family) {
            chain_text(&mut out, family, &layout::shared(family, node, *chain));
        }
        out.push_str("}\n");
    }
    out
}

fn set_text(out: &mut String, family: Family, set: SetId, size: u32, elements: &[String]) {
    let kind = if set.is_map() { "map" } else { "set" };
    let key = if let Data::Fields(data) = set.data() {
        format!("typeof {} : {}", key_text(set.key(), family, 2), key_text(data, family, 0))
    } else {
        let types: Vec<&str> = set.key().iter().map(|field| type_name(*field, family)).collect();
        format!("type {}{}", types.join(" . "), if set.is_map() { " : verdict" } else { "" })
    };
    let _ = writeln!(out, "\t{kind} {} {{\n\t\t{key}\n\t\tsize {size}", set.name());
    if set.ranges() != Ranges::None {
        out.push_str("\t\tflags interval\n");
    }
    if set.is_learned() {
        out.push_str("\t\tflags dynamic,timeout\n");
    }
    if !elements.is_empty() {
        let _ = writeln!(out, "\t\telements = {{ {} }}", elements.join(",\n\t\t\t     "));
    }
    out.push_str("\t}\n");
}

fn chain_text(out: &mut String, family: Family, layout: &ChainLayout) {
    let Chain { name, hook } = &layout.chain;
    let _ = writeln!(out, "\tchain {name} {{");
    if let Some(hook) = hook {
        let (kind, point) = (hook.kind.word(), hook.point.word());
        let _ = writeln!(out, "\t\ttype {kind} hook {point} priority {}; policy accept;", hook.priority);
    }
    for rule in &layout.rules {
        out.push_str("\t\t");
        for (position, clause) in rule.iter().enumerate() {
            if position > 0 {
                out.push(' ');
            }
            clause.text(family, out);
        }
        out.push('\n');
    }
    out.push_str("\t}\n");
}

fn type_name(field: Field, family: Family) -> &'static str {
    match field {
        Field::Saddr | Field::Daddr => match family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        },
        Field::L4Proto => "inet_proto",
        Field::Dport => "inet_service",
        Field::Index => "integer",
        Field::Serial => "classid",
    }
}

fn element_text(family: Family, set: SetId, key: &Key, datum: Datum) -> String {
    let mut parts = Vec::new();
    let mut rest = key.bytes();
    for field in set.key() {
        let (now, later) = rest.split_at(field.length(family) as usize);
        parts.push(field_text(*field, now));
        rest = later;
    }
    if let (Datum::UpTo(last), Some(first)) = (datum, parts.last_mut()) {
        let _ = write!(first, "-{last}");
    }
    let key = parts.join(" . ");
    match datum {
        Datum::Present | Datum::UpTo(_) => key,
        Datum::Target(target) => format!("{key} : {} . {}", target.address, target.port),
        Datum::Serial(serial) => format!("{key} : {}", serial_text(serial)),
        Datum::Goto(chain) => format!("{key} : goto {}", chain.name()),
        Datum::Drop | Datum::Foreign => format!("{key} : drop"),
    }
}

fn field_text(field: Field, bytes: &[u8]) -> String {
    match (field, bytes) {
        (Field::Saddr | Field::Daddr, bytes) => match (bytes.first_chunk::<16>(), bytes.first_chunk::<4>()) {
            (Some(octets), _) => IpAddr::from(*octets).to_string(),
            (None, Some(octets)) => IpAddr::from(*octets).to_string(),
            (None, None) => String::new(),
        },
        (Field::L4Proto, [6, ..]) => "tcp".to_owned(),
        (Field::L4Proto, [17, ..]) => "udp".to_owned(),
        (Field::L4Proto, [132, ..]) => "sctp".to_owned(),
        (Field::Dport, [a, b, ..]) => u16::from_be_bytes([*a, *b]).to_string(),
        (Field::Index, [a, b, c, d]) => u32::from_ne_bytes([*a, *b, *c, *d]).to_string(),
        (Field::Serial, [a, b, c, d]) => serial_text(u32::from_ne_bytes([*a, *b, *c, *d])),
        _ => "?".to_owned(),
    }
}

/// A priority as nft writes it: major and minor number.
fn serial_text(serial: u32) -> String {
    format!("{:x}:{:x}", serial >> 16, serial & 0xffff)
}
