//! ServiceCIDRs.

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use lockstep_model::{InvalidField, ServiceCidr, ServiceCidrKey, canonical};

use super::field::{self, Reason, at};
use super::{Conversion, HEADLESS_LABEL, Outcome, PROXY_NAME_LABEL, Skip, within_size};

/// A Kubernetes ServiceCIDR as the model has it. One that is being deleted counts until it is
/// gone, as it does for the API server: addresses in it may be in use.
pub fn service_cidr(object: &ServiceCIDR) -> Conversion<ServiceCidr> {
    let labelled = |label| object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label));
    if labelled(PROXY_NAME_LABEL) {
        return Ok(Outcome::Skip(Skip::OtherProxy));
    }
    if labelled(HEADLESS_LABEL) {
        return Ok(Outcome::Skip(Skip::Headless));
    }
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let name = at(field::subdomain(name), name, || "metadata.name".into())?;
    let cidrs = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let cidrs = cidrs
        .iter()
        .enumerate()
        .map(|(index, text)| at(range(text), text, || format!("spec.cidrs[{index}]")));
    let cidrs = cidrs.collect::<Result<Vec<IpNet>, InvalidField>>()?;
    let mut cidr = ServiceCidr { key: ServiceCidrKey(name.into()), cidrs };
    cidr.canonicalise();
    within_size(&canonical::service_cidr(&cidr))?;
    Ok(Outcome::Object(cidr))
}

/// Packets to what is in a range and no Service's are dropped, so it cannot be everything.
fn range(text: &str) -> Result<IpNet, Reason> {
    match field::cidr(text)? {
        range if range.prefix_len() == 0 => Err("is every address".into()),
        range => Ok(range),
    }
}
