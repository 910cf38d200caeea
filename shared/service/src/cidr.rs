//! Address ranges that agent-supplied URLs may point to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A private or loopback range, like `10.0.0.0/8` or `fd00::/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    base: IpAddr,
    bits: u8,
}

/// Why a range is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// Not `address/bits`.
    #[error("{0:?} is not like 10.0.0.0/8")]
    Malformed(String),
    /// Bits are set behind the mask.
    #[error("{given} has bits beyond its mask, {meant} is meant")]
    HostBits {
        /// As given.
        given: String,
        /// The range it lies in.
        meant: Cidr,
    },
    /// Public, link-local or otherwise not private.
    #[error(
        "{0} is neither private (10/8, 172.16/12, 192.168/16, 100.64/10, fc00::/7) nor loopback (127/8, ::1)"
    )]
    NotPrivate(Cidr),
}

/// RFC 1918, RFC 4193, RFC 6598 (overlay networks and clusters use it) and loopback. Link-local holds the metadata services of clouds and is never allowed.
const ALLOWED: [(IpAddr, u8); 7] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    (IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
];

impl Cidr {
    /// True if the address lies in the range. A v4 address in v6 clothes lies in no v4 range.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.base.is_ipv4() == address.is_ipv4() && mask(address, self.bits) == self.base
    }

    fn is_allowed(&self) -> bool {
        ALLOWED.iter().any(|&(base, bits)| self.bits >= bits && Self { base, bits }.contains(self.base))
    }
}

fn mask(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let keep = u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & keep))
        }
        IpAddr::V6(v6) => {
            let keep = u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & keep))
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.bits)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || CidrError::Malformed(text.to_owned());
        let (address, bits) = text.split_once('/').ok_or_else(malformed)?;
        let address: IpAddr = address.parse().map_err(|_| malformed())?;
        let bits: u8 = bits.parse().map_err(|_| malformed())?;
        if bits > if address.is_ipv4() { 32 } else { 128 } {
            return Err(malformed());
        }
        let cidr = Self { base: mask(address, bits), bits };
        if cidr.base != address {
            return Err(CidrError::HostBits { given: text.to_owned(), meant: cidr });
        }
        if cidr.is_allowed() { Ok(cidr) } else { Err(CidrError::NotPrivate(cidr)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_and_loopback_ranges_are_taken() {
        for good in [
            "100.64.0.0/10",
            "10.0.0.0/8",
            "10.1.0.0/16",
            "172.16.0.0/12",
            "192.168.7.0/24",
            "127.0.0.1/32",
            "::1/128",
            "fd00::/8",
        ] {
            assert_eq!(good.parse::<Cidr>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "0.0.0.0/0",
            "8.8.8.0/24",
            "10.0.0.0/7",
            "100.0.0.0/8",
            "169.254.0.0/16",
            "fe80::/10",
            "::/0",
            "::ffff:10.0.0.0/104",
        ] {
            assert!(matches!(bad.parse::<Cidr>(), Err(CidrError::NotPrivate(_))), "{bad}");
        }
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0/8", "a/8", "10.0.0.0/-1"] {
            assert!(matches!(bad.parse::<Cidr>(), Err(CidrError::Malformed(_))), "{bad}");
        }
        assert!(matches!("10.0.0.7/8".parse::<Cidr>(), Err(CidrError::HostBits { .. })));
    }

    #[test]
    fn families_are_not_mixed() {
        let range: Cidr = "10.0.0.0/8".parse().unwrap();
        assert!(range.contains("10.255.0.1".parse().unwrap()));
        assert!(!range.contains("11.0.0.1".parse().unwrap()));
        assert!(!range.contains("::ffff:10.0.0.1".parse().unwrap()));
    }
}
