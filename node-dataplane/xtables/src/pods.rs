//! How a rule asks whether a packet is a pod's.

use std::net::IpAddr;

use lockstep_model::Family;
use lockstep_view::PodSources;

/// What a rule can ask a packet for, to know that it is a pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodMatch {
    /// A range of source addresses.
    Source(String),
    /// The interface it came in by, with `+` behind the beginning of a name.
    Interface(String),
}

impl PodMatch {
    /// What the packets of pods have in one family, each by itself. Empty = no pod can be told.
    pub fn all(family: Family, pods: Option<&PodSources>) -> Vec<Self> {
        match pods {
            Some(PodSources::Cidrs(cidrs)) => cidrs
                .iter()
                .filter(|cidr| Family::of(cidr.addr()) == family)
                .map(|cidr| PodMatch::Source(cidr.trunc().to_string()))
                .collect(),
            Some(PodSources::Interface(name)) => vec![PodMatch::Interface(name.to_string())],
            Some(PodSources::InterfacePrefix(prefix)) => vec![PodMatch::Interface(format!("{prefix}+"))],
            None => Vec::new(),
        }
    }

    /// What goes before `-p`, in the tools' order, with a match of the destination among it. That is
    /// empty, or has a space behind it, as what is returned has.
    pub fn and(&self, destination: &str) -> String {
        match self {
            PodMatch::Source(range) => format!("-s {range} {destination}"),
            PodMatch::Interface(name) => format!("{destination}-i {name} "),
        }
    }

    /// The same for everybody else.
    pub fn not(&self, destination: &str) -> String {
        match self {
            PodMatch::Source(range) => format!("! -s {range} {destination}"),
            PodMatch::Interface(name) => format!("{destination}! -i {name} "),
        }
    }

    /// True where every packet has it. The tools cannot write the contrary, and print no such match.
    pub fn is_everybody(&self) -> bool {
        matches!(self, PodMatch::Source(range) if range.ends_with("/0"))
    }
}

/// An address as the tools write a host: `10.0.0.1/32`.
pub fn host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(_) => format!("{ip}/32"),
        IpAddr::V6(_) => format!("{ip}/128"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_has_the_ranges_of_its_own() {
        let cidrs = ["10.244.0.0/16", "fd00:244::/64"].map(|cidr| cidr.parse().unwrap());
        let pods = PodSources::Cidrs(cidrs.into());
        let [v4, v6] = [Family::V4, Family::V6].map(|family| PodMatch::all(family, Some(&pods)));
        assert_eq!(v4, [PodMatch::Source("10.244.0.0/16".to_owned())]);
        assert_eq!(v6, [PodMatch::Source("fd00:244::/64".to_owned())]);
        assert_eq!(v4[0].and("-d 10.0.0.1/32 "), "-s 10.244.0.0/16 -d 10.0.0.1/32 ");
        assert_eq!(v6[0].not(""), "! -s fd00:244::/64 ");
        assert_eq!(PodMatch::all(Family::V4, None), []);
    }

    #[test]
    fn an_interface_comes_behind_the_destination() {
        let veth = PodMatch::Interface("veth+".to_owned());
        assert_eq!(veth.and("-d 10.0.0.1/32 "), "-d 10.0.0.1/32 -i veth+ ");
        assert_eq!(veth.not("-d 10.0.0.1/32 "), "-d 10.0.0.1/32 ! -i veth+ ");
        assert!(!veth.is_everybody() && PodMatch::Source("::/0".to_owned()).is_everybody());
    }
}
