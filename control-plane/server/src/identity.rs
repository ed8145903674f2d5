//! Which node a client certificate speaks for.
//!
//! A node's name is taken from, in this order: the subject's common name, either as it is or
//! as kubelets have it (`system:node:NAME`); DNS names; and URIs whose path ends in
//! `/node/NAME`, as SPIFFE identities do. A certificate may name several nodes; a stream must
//! be for one of them. So the certificates that a cluster's nodes have already will do.

use tonic::transport::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Names in the first certificate, which is the client's own; none where it cannot be read.
pub(crate) fn node_names(certificates: &[CertificateDer<'_>]) -> Vec<String> {
    let Some(own) = certificates.first() else { return Vec::new() };
    let Ok((_, certificate)) = X509Certificate::from_der(own.as_ref()) else { return Vec::new() };
    let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let mut names: Vec<String> =
        common.map(|name| name.strip_prefix("system:node:").unwrap_or(name).to_owned()).collect();
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        names.extend(alternative.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::URI(uri) => {
                let (_, node) = uri.rsplit_once("/node/")?;
                (!node.contains('/')).then(|| node.to_owned())
            }
            _ => None,
        }));
    }
    names.retain(|name| !name.is_empty());
    names
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn names(common: &str, alternative: Vec<SanType>) -> Vec<String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common);
        params.subject_alt_names = alternative;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        node_names(&[CertificateDer::from(certificate.der().to_vec())])
    }

    #[test]
    fn a_node_is_named_by_common_name_dns_or_uri() {
        assert_eq!(names("n1", vec![]), ["n1"]);
        assert_eq!(names("system:node:n1", vec![]), ["n1"]);
        let uri = |text: &str| SanType::URI(text.try_into().unwrap());
        let alternative = vec![
            SanType::DnsName("n2".try_into().unwrap()),
            uri("spiffe://cluster.local/node/n3"),
            uri("spiffe://cluster.local/node/n4/more"),
            uri("spiffe://cluster.local/ns/default"),
        ];
        assert_eq!(names("proxy", alternative), ["proxy", "n2", "n3"]);
    }

    #[test]
    fn what_is_no_certificate_names_nobody() {
        assert!(node_names(&[]).is_empty());
        assert!(node_names(&[CertificateDer::from(vec![1, 2, 3])]).is_empty());
    }
}
