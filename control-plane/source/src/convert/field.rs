//! Single values of Kubernetes fields, each with the reason why a text is none.

use std::borrow::Cow;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use lockstep_model::{InvalidField, Port, Protocol};

/// What is wrong with a value, as the end of a sentence.
pub(super) type Reason = Cow<'static, str>;

/// Longest value that an error repeats.
const MAX_SHOWN: usize = 128;

/// An error about `value` at `path`.
pub(super) fn invalid(
    path: impl Into<String>,
    value: impl Display,
    reason: impl Into<String>,
) -> InvalidField {
    let mut value = value.to_string();
    if let Some((cut, _)) = value.char_indices().nth(MAX_SHOWN) {
        value.truncate(cut);
        value.push('…');
    }
    InvalidField { field: path.into(), value, reason: reason.into() }
}

/// Names field and value of a fault. The path is only built where there is one.
pub(super) fn at<T>(
    result: Result<T, Reason>,
    value: impl Display,
    path: impl FnOnce() -> String,
) -> Result<T, InvalidField> {
    result.map_err(|reason| invalid(path(), value, reason))
}

/// An IP address. Leading zeros of IPv4 are decimal, as Kubernetes has always read them, and
/// an IPv4 address in IPv6 form is the IPv4 address.
pub(super) fn address(text: &str) -> Result<IpAddr, Reason> {
    plain_address(text).map(|address| address.to_canonical()).ok_or("is not an IP address".into())
}

fn plain_address(text: &str) -> Option<IpAddr> {
    if text.contains(':') { text.parse().ok().map(IpAddr::V6) } else { ipv4(text).map(IpAddr::V4) }
}

fn ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = decimal(parts.next()?)?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// Digits only (`u8::from_str` would take a sign), leading zeros allowed.
fn decimal(text: &str) -> Option<u8> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = text.trim_start_matches('0');
    if digits.is_empty() { Some(0) } else { digits.parse().ok() }
}

/// A CIDR, read as leniently as [`address`], blanks around it dropped, host bits masked.
pub(super) fn cidr(text: &str) -> Result<IpNet, Reason> {
    const NOT_A_CIDR: Reason = Cow::Borrowed("is not a CIDR");
    let (address, length) = text.trim().split_once('/').ok_or(NOT_A_CIDR)?;
    let plain = plain_address(address).ok_or(NOT_A_CIDR)?;
    let length = decimal(length).ok_or(NOT_A_CIDR)?;
    let canonical = plain.to_canonical();
    let length = if canonical.is_ipv4() && plain.is_ipv6() {
        length.checked_sub(96).ok_or("spans IPv4 and IPv6")?
    } else {
        length
    };
    IpNet::new(canonical, length)
        .map(|net| net.trunc())
        .map_err(|_| "has a longer prefix than its family allows".into())
}

/// What an address is to be used for decides which special ones it may be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// A cluster IP, external IP or endpoint.
    Routable,
    /// A load balancer's, which the API server lets be link-local.
    Ingress,
    /// A node's own, which may also be loopback on a cluster of one.
    Node,
}

/// An address that packets can be sent to.
pub(super) fn usable_address(text: &str, purpose: Use) -> Result<IpAddr, Reason> {
    let address = address(text)?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let reason = if address.is_unspecified() {
        "is the unspecified address"
    } else if address.is_multicast() {
        "is a multicast address"
    } else if address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        "is the broadcast address"
    } else if address.is_loopback() && purpose != Use::Node {
        "is a loopback address"
    } else if link_local && purpose == Use::Routable {
        "is a link-local address"
    } else {
        return Ok(address);
    };
    Err(reason.into())
}

/// A port number.
pub(super) fn port(number: i32) -> Result<Port, Reason> {
    u16::try_from(number).ok().and_then(Port::new).ok_or("is not a port number (1-65535)".into())
}

/// A port number where 0, like no number, means none.
pub(super) fn optional_port(number: Option<i32>) -> Result<Option<Port>, Reason> {
    number.filter(|number| *number != 0).map(port).transpose()
}

/// A transport protocol; none = TCP.
pub(super) fn protocol(text: Option<&str>) -> Result<Protocol, Reason> {
    match text {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(_) => Err("is not TCP, UDP or SCTP".into()),
    }
}

/// An RFC 1123 label: the form of namespaces, Services and ports. Names end up in keys and
/// rule comments, so that nothing else may pass.
pub(super) fn label(text: &str) -> Result<&str, Reason> {
    if is_label(text) { Ok(text) } else { Err("is not a DNS label (a-z, 0-9, -, at most 63)".into()) }
}

fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.len() <= 63
        && !text.is_empty()
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// An RFC 1123 subdomain: the form of EndpointSlice and Node names. Its labels may be longer
/// than 63, as Kubernetes allows them to be.
pub(super) fn subdomain(text: &str) -> Result<&str, Reason> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    if text.len() <= 253 && text.split('.').all(part) {
        Ok(text)
    } else {
        Err("is not a DNS subdomain (a-z, 0-9, -, ., at most 253)".into())
    }
}

/// The value of a Kubernetes label that is not empty: the form of zones and regions.
pub(super) fn label_value(text: &str) -> Result<&str, Reason> {
    let end = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let bytes = text.as_bytes();
    let good = text.len() <= 63
        && end(bytes.first().copied())
        && end(bytes.last().copied())
        && text.bytes().all(inner);
    if good { Ok(text) } else { Err("is not a label value (a-z, A-Z, 0-9, -, _, ., at most 63)".into()) }
}
