//! Where a URL may lead. An agent names the URL and we make the request: without a guard it could have us ask the
//! cloud's metadata service, or anything else that only we can reach.
//!
//! Checked is the address that is really connected to, after every resolution, and there are no redirects.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rollcall_service::Cidr;

/// Why an address is not connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing ever has a good reason to be probed there.
    #[error("{0} is {1}: never allowed")]
    Never(IpAddr, &'static str),
    /// Private or loopback, and not in `ROLLCALL_ALLOW_CIDRS`.
    #[error("{0} is private or loopback and not in ROLLCALL_ALLOW_CIDRS")]
    Private(IpAddr),
}

/// Who named the URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// An agent.
    Agent,
    /// The operator, in the agents file: private addresses are meant.
    Operator,
}

/// The rules.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    allowed: Vec<Cidr>,
}

impl Guard {
    /// Private ranges are allowed to agents only within `allowed`.
    #[must_use]
    pub fn new(allowed: Vec<Cidr>) -> Self {
        Self { allowed }
    }

    /// Whether this address may be connected to.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, address: IpAddr, trust: Trust) -> Result<(), Refusal> {
        if let Some(what) = never(address) {
            return Err(Refusal::Never(address, what));
        }
        let allowed = trust == Trust::Operator || self.allowed.iter().any(|range| range.contains(address));
        if is_private(address) && !allowed {
            return Err(Refusal::Private(address));
        }
        Ok(())
    }
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_private() || v4.is_loopback() || is_shared(v4),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local(),
    }
}

/// 100.64.0.0/10, which carriers, overlay networks and clusters share: as private as 10.0.0.0/8 to whoever uses it.
const fn is_shared(v4: Ipv4Addr) -> bool {
    let [a, b, ..] = v4.octets();
    a == 100 && b & 0b1100_0000 == 64
}

/// What makes an address one that is never connected to.
fn never(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(v4) => never_v4(v4),
        IpAddr::V6(v6) => never_v6(v6),
    }
}

fn never_v4(v4: Ipv4Addr) -> Option<&'static str> {
    let [a, b, c, _] = v4.octets();
    // Metadata services that do not live on a link-local address: Azure, Alibaba.
    if v4 == Ipv4Addr::new(168, 63, 129, 16) || v4 == Ipv4Addr::new(100, 100, 100, 200) {
        return Some("a metadata service");
    }
    match (a, b, c) {
        (0, ..) => Some("unspecified"),
        (169, 254, _) => Some("link-local (metadata services live there)"),
        (192, 0, 0) | (198, 18..=19, _) => Some("reserved"),
        (192, 0, 2) | (198, 51, 100) | (203, 0, 113) => Some("for documentation"),
        (192, 88, 99) => Some("a 6to4 relay"),
        (224..=239, ..) => Some("multicast"),
        (240..=255, ..) => Some("reserved"),
        _ => None,
    }
}

/// Metadata services with an address that is private by its form, fc00::/7: whoever allows that range does not mean them.
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x0254), // Google
    Ipv6Addr::new(0xfd00, 0x0042, 0, 0, 0, 0, 0, 0x0042), // Scaleway
    Ipv6Addr::new(0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1), // Akamai (Linode)
];

fn never_v6(v6: Ipv6Addr) -> Option<&'static str> {
    let s = v6.segments();
    if v6.is_loopback() {
        return None;
    }
    if METADATA_V6.contains(&v6) {
        return Some("a metadata service");
    }
    match s {
        // Amazon keeps all of it for such services: instance metadata (::254), credentials of pods (::23), others.
        [0xfd00, 0x0ec2, ..] => Some("a metadata service"),
        // 169.254.169.254 at the end: Oracle's, and any other one behind a NAT64 of whatever prefix.
        [.., 0xa9fe, 0xa9fe] => Some("a metadata service"),
        // The address below decides nothing: whoever means a v4 address can write one.
        [0, 0, 0, 0, 0, 0xffff, ..] => Some("v4-mapped"),
        [0, 0, 0, 0, 0xffff, 0, ..] => Some("v4-translated"),
        [0, 0, 0, 0, 0, 0, ..] => Some("unspecified or v4-compatible"),
        [0x64, 0xff9b, ..] => Some("NAT64"),
        [0x2002, ..] => Some("6to4"),
        [0x2001, 0, ..] => Some("Teredo"),
        [_, _, _, _, 0 | 0x200, 0x5efe, ..] => Some("ISATAP"),
        [0x2001, 0xdb8, ..] => Some("for documentation"),
        [first, ..] if first & 0xffc0 == 0xfe80 => Some("link-local"),
        [first, ..] if first & 0xffc0 == 0xfec0 => Some("site-local"),
        [first, ..] if first & 0xff00 == 0xff00 => Some("multicast"),
        [0x100, 0, 0, 0, ..] => Some("discard-only"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(guard: &Guard, address: &str, trust: Trust) -> Result<(), Refusal> {
        guard.check(address.parse().unwrap(), trust)
    }

    #[test]
    fn some_addresses_are_never_connected_to_whoever_names_them() {
        let guard = Guard::new(vec!["10.0.0.0/8".parse().unwrap(), "fc00::/7".parse().unwrap()]);
        for address in [
            "169.254.169.254",
            "169.254.170.2",
            "169.254.0.0",
            "169.254.255.255",
            "0.0.0.0",
            "0.1.2.3",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "192.88.99.1",
            "224.0.0.1",
            "255.255.255.255",
            "fe80::1",
            "fe80::a9fe:a9fe",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "::",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd00:ec2:1::1",
            "fd20:ce::254",
            "fd00:c1::a9fe:a9fe",
            "fd00:42::42",
            "fd00:a9fe:a9fe::1",
            "fd12:64::a9fe:a9fe",
            "2606:4700:64::a9fe:a9fe",
            "fd12::5efe:a00:1",
            "fd12::200:5efe:a00:1",
            "::ffff:169.254.169.254",
            "::ffff:10.0.0.1",
            "::ffff:8.8.8.8",
            "::169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b:1:a9fe:a9:fe00::",
            "64:ff9b::a83f:8110",
            "::ffff:100.100.100.200",
            "::168.63.129.16",
            "2002:6464:64c8::",
            "2001:0:5ef5:79fb::5601:5601",
            "64:ff9b::808:808",
            "2002:a9fe:a9fe::1",
            "2001:0:a9fe:a9fe::1",
            "::ffff:0:a9fe:a9fe",
        ] {
            for trust in [Trust::Agent, Trust::Operator] {
                let refused = check(&guard, address, trust);
                assert!(matches!(refused, Err(Refusal::Never(..))), "{address} {trust:?}: {refused:?}");
            }
        }
    }

    #[test]
    fn private_addresses_are_for_operators_and_for_what_operators_allow() {
        let guard = ["10.1.0.0/16", "100.96.0.0/12", "::1/128"].map(|range| range.parse().unwrap());
        let guard = Guard::new(guard.to_vec());
        for address in [
            "127.0.0.1",
            "10.2.0.1",
            "172.16.3.4",
            "192.168.1.1",
            "100.64.0.0",
            "100.127.255.255",
            "fd12::1",
            "fd20:ce::1",
        ] {
            assert!(matches!(check(&guard, address, Trust::Agent), Err(Refusal::Private(_))), "{address}");
            assert_eq!(check(&guard, address, Trust::Operator), Ok(()), "{address}");
        }
        for address in [
            "10.1.2.3",
            "::1",
            "93.184.216.34",
            "2606:4700::1111",
            "100.100.1.1",
            "100.63.0.1",
            "100.128.0.1",
        ] {
            assert_eq!(check(&guard, address, Trust::Agent), Ok(()), "{address}");
        }
    }
}
