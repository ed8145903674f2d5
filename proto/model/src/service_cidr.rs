use ipnet::IpNet;

use crate::ServiceCidrKey;

/// The ranges of one Kubernetes ServiceCIDR: cluster IPs are allocated from them and from
/// nowhere else. Those of all objects together are the cluster's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Name of the object.
    pub key: ServiceCidrKey,
    /// `spec.cidrs`, host bits zero, sorted, no duplicates.
    pub cidrs: Vec<IpNet>,
}

impl ServiceCidr {
    /// Brings the list into canonical order and form.
    pub fn canonicalise(&mut self) {
        self.cidrs.iter_mut().for_each(|cidr| *cidr = cidr.trunc());
        self.cidrs.sort_unstable();
        self.cidrs.dedup();
    }
}
