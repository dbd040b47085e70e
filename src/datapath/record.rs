//! The generated types as the bytes of maps, and back.

use std::net::{IpAddr, Ipv6Addr};

use super::skeleton::types;

/// A type that is plain bytes: every bit pattern is a value of it, and it has no padding that the
/// C did not name.
///
/// # Safety
///
/// Both must be so.
pub unsafe trait Record: Copy + Default {
    /// Its bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: there is no padding, so all of its bytes are initialised.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// The value of these bytes; `None` if they are not as many.
    fn read(bytes: &[u8]) -> Option<Self> {
        // SAFETY: there are as many bytes as it has, and whatever they are is a value.
        (bytes.len() == size_of::<Self>())
            .then(|| unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

/// Says of each type that the sum of its fields is all of it.
macro_rules! records {
    ($($name:ident = $size:literal),* $(,)?) => {$(
        const _: () = assert!(size_of::<types::$name>() == $size);
        // SAFETY: integers and arrays of them only; types.h names all of its padding, so the size
        // that is asserted above is the sum of the fields.
        unsafe impl Record for types::$name {}
    )*};
}

records! {
    address = 16,
    service_key = 20,
    service = 64,
    backend = 60,
    affinity = 8,
    live = 16,
    source_key = 20,
    server_key = 20,
    flow_key = 20,
    flow = 24,
    reply_key = 24,
    reply = 40,
    half_reply = 44,
    traffic = 48,
    sweep = 11280,
    clock = 16,
    held_fragment = 8,
    leg = 12,
    way_key = 24,
    way = 20,
    neighbour_key = 20,
    neighbour = 12,
    repair = 12,
    event = 48,
}

// SAFETY: an integer.
unsafe impl Record for u32 {}
// SAFETY: an integer.
unsafe impl Record for u64 {}

impl From<IpAddr> for types::address {
    fn from(address: IpAddr) -> Self {
        let bits = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let word = |shift: u32| ((bits >> shift) as u32).to_be();
        Self { words: [word(96), word(64), word(32), word(0)] }
    }
}

impl From<types::address> for IpAddr {
    fn from(address: types::address) -> Self {
        let bits = address
            .words
            .iter()
            .fold(0_u128, |bits, word| bits << 32 | u128::from(u32::from_be(*word)));
        let v6 = Ipv6Addr::from_bits(bits);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_there_and_back() {
        for text in ["10.77.0.100", "fd77::100", "::1", "255.255.255.255"] {
            let address: IpAddr = text.parse().unwrap();
            let record = types::address::from(address);
            assert_eq!(IpAddr::from(types::address::read(record.bytes()).unwrap()), address);
        }
        let mapped = types::address::from(IpAddr::from([10, 77, 0, 100]));
        assert_eq!(mapped.bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 77, 0, 100]);
    }
}
