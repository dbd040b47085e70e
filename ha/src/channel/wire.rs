//! How everything on the peer channel is written: as bincode 2 does by default (little endian,
//! integers as short as they are), by wincode. A decoder takes all of its bytes or refuses them,
//! and never reserves more memory than a frame may be long.

use wincode::config::{self, Configuration};
use wincode::int_encoding::{LittleEndian, VarInt};
use wincode::len::BincodeLen;
use wincode::{SchemaReadOwned, SchemaWrite};

/// The longest frame, in bytes: one message of the channel.
pub const LONGEST_FRAME: usize = 32 << 10;

/// The settings of wincode that make it write what bincode 2 writes.
pub type Wire = Configuration<true, LONGEST_FRAME, BincodeLen, LittleEndian, VarInt, u32>;

const WIRE: Wire = Configuration::default()
    .with_varint_encoding()
    .with_preallocation_size_limit::<LONGEST_FRAME>();

/// These bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it can't be read")]
pub struct Malformed;

/// A value as it goes over the wire.
///
/// # Panics
///
/// If a value of this type can't be written, which none of the channel's is.
pub fn encode<T: SchemaWrite<Wire, Src = T> + ?Sized>(value: &T) -> Vec<u8> {
    config::serialize(value, WIRE).expect("everything on the channel can be written")
}

/// A value from all of these bytes.
///
/// # Errors
///
/// [`Malformed`] if they are too few, too many, or none of this type.
pub fn decode<T>(bytes: &[u8]) -> Result<T, Malformed>
where
    T: SchemaReadOwned<Wire> + for<'de> wincode::SchemaRead<'de, Wire, Dst = T>,
{
    if bytes.len() > LONGEST_FRAME {
        return Err(Malformed);
    }
    config::deserialize_exact(bytes, WIRE).map_err(|_| Malformed)
}
