//! What nodes tell each other of settings and views. Each frame is one message of the peer channel.
//!
//! A node tells everything when the channel comes up, and after that what changes; between that,
//! and after it, it says where it stands ([`Frame::Told`]). Who has come to something else by what
//! it was told asks for all of it again.

use wincode::{SchemaRead, SchemaWrite};

use super::{Setting, View};
use crate::channel::wire;

/// Settings in one frame, so that it is not longer than a frame may be.
pub const SETTINGS: usize = 192;
/// Views in one frame.
pub const VIEWS: usize = 512;

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Frame {
    /// What operators have set, here or elsewhere.
    Settings(Vec<Setting>),
    /// What the sender sees and selects by.
    Views {
        /// Whether what it said before is void.
        anew: bool,
        /// Some of its backends.
        views: Vec<View>,
    },
    /// The sender has told everything that there is.
    Told(Standing),
    /// The sender has not come to that: it wants to be told all of it again.
    Again,
}

/// Where a node stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Standing {
    /// The sum of its settings.
    pub settings: u64,
    /// The sum of its views.
    pub views: u64,
    /// Whether it would take the VIPs if nobody had them.
    pub stands_by: bool,
}

/// The same number for the same value on every node (FNV-1a of its bytes on the wire, mixed).
pub(super) fn hash<T: wincode::SchemaWrite<wire::Wire, Src = T>>(value: &T) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    crate::sync::flow::mix(wire::encode(value).iter().fold(0xcbf2_9ce4_8422_2325, fnv))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::channel::message::Message;
    use crate::channel::wire::{LONGEST_FRAME, decode, encode};
    use crate::state::settings::Version;
    use crate::state::{Admin, Health, Target, Value};

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
            any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
        ]
    }

    prop_compose! {
        fn target()(
            vip in address(), port: u16, protocol: u8, backend in address(), backend_port: u16,
        ) -> Target {
            Target { vip, port, protocol, backend, backend_port }
        }
    }

    fn health() -> impl Strategy<Value = Health> {
        prop_oneof![Just(Health::Unknown), Just(Health::Up), Just(Health::Down)]
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            prop_oneof![Just(Admin::Enabled), Just(Admin::Drained), Just(Admin::Disabled)]
                .prop_map(Value::Admin),
            any::<Option<u16>>().prop_map(Value::Weight),
        ]
    }

    prop_compose! {
        fn setting()(target in target(), value in value(), count: u64, node in "[a-z]{0,70}")
            -> Setting
        {
            Setting { target, value, version: Version { count, node } }
        }
    }

    prop_compose! {
        fn view()(target in target(), sees in health(), selects in health()) -> View {
            View { target, sees, selects }
        }
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let some = |of| prop::collection::vec(of, 0..20);
        prop_oneof![
            prop::collection::vec(setting(), 0..20).prop_map(Frame::Settings),
            (any::<bool>(), some(view())).prop_map(|(anew, views)| Frame::Views { anew, views }),
            (any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(settings, views, stands_by)| {
                Frame::Told(Standing { settings, views, stands_by })
            }),
            Just(Frame::Again),
        ]
    }

    proptest! {
        #[test]
        fn frames_are_written_as_bincode_writes_them(frame in frame()) {
            let bytes = encode(&frame);
            let theirs = bincode::encode_to_vec(&frame, bincode::config::standard()).unwrap();
            prop_assert_eq!(&bytes, &theirs);
            prop_assert_eq!(decode::<Frame>(&bytes).unwrap(), frame);
            for length in 0..bytes.len() {
                prop_assert!(decode::<Frame>(&bytes[..length]).is_err());
            }
            prop_assert!(decode::<Frame>(&[bytes, vec![0]].concat()).is_err());
        }

        #[test]
        fn any_bytes_are_a_frame_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(frame) = decode::<Frame>(&bytes) {
                prop_assert_eq!(decode::<Frame>(&encode(&frame)).unwrap(), frame);
            }
        }

        #[test]
        fn nearly_a_frame_is_a_frame_or_refused(
            frame in frame(),
            at in any::<prop::sample::Index>(),
            byte: u8,
        ) {
            let mut bytes = encode(&frame);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode::<Frame>(&bytes);
        }
    }

    #[test]
    fn the_longest_frames_fit() {
        let v6: IpAddr = Ipv6Addr::from_bits(u128::MAX).into();
        let most = u16::MAX;
        let target = Target { vip: v6, port: most, protocol: 255, backend: v6, backend_port: most };
        let version = Version { count: u64::MAX, node: "x".repeat(64) };
        let setting = Setting { target, value: Value::Weight(Some(most)), version };
        let view = View { target, sees: Health::Down, selects: Health::Down };
        for frame in [
            Frame::Settings(vec![setting; SETTINGS]),
            Frame::Views { anew: true, views: vec![view; VIEWS] },
        ] {
            let bytes = encode(&Message::State(frame.clone()));
            assert!(bytes.len() <= LONGEST_FRAME, "{}", bytes.len());
            assert!(decode::<Message>(&bytes).is_ok());
        }
    }
}
