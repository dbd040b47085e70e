use proptest::prelude::*;

use super::*;

const KEY: ClusterKey = ClusterKey::from_bytes([7; 32]);

fn identity(node: &str) -> Identity {
    Identity { cluster: "lab".into(), node: node.into(), boot: BootId([node.as_bytes()[0]; 16]) }
}

fn session(role: Role, node: &str, peer: &str, key: &ClusterKey) -> Session {
    Session::new(role, identity(node), vec![peer.into()], key.clone())
}

fn pair() -> (Session, Session) {
    (session(Role::Initiator, "a", "b", &KEY), session(Role::Responder, "b", "a", &KEY))
}

/// Carries what one has to send to the other, in pieces of so many bytes.
fn carry(from: &mut Session, to: &mut Session, piece: usize) -> Result<(), Refused> {
    let bytes = from.unsent().to_vec();
    from.sent(bytes.len());
    bytes.chunks(piece).try_for_each(|bytes| to.receive(bytes))
}

/// Until neither has anything to send; what each end came to.
fn talk(
    one: &mut Session,
    other: &mut Session,
    piece: usize,
) -> (Result<(), Refused>, Result<(), Refused>) {
    let mut ends = (Ok(()), Ok(()));
    for _ in 0..10 {
        if ends.1.is_ok() {
            ends.1 = carry(one, other, piece);
        }
        if ends.0.is_ok() {
            ends.0 = carry(other, one, piece);
        }
    }
    ends
}

fn established() -> (Session, Session) {
    let (mut a, mut b) = pair();
    assert_eq!(talk(&mut a, &mut b, 4096), (Ok(()), Ok(())));
    assert!(a.poll_event().is_some() && b.poll_event().is_some());
    (a, b)
}

fn messages(session: &mut Session) -> Vec<Vec<u8>> {
    let events = std::iter::from_fn(|| session.poll_event());
    let message = |event| match event {
        Event::Message(message) => message,
        Event::Established(peer) => panic!("{peer:?}"),
    };
    events.map(message).collect()
}

#[test]
fn two_nodes_with_one_key_meet_in_pieces_of_any_size() {
    for piece in [1, 2, 3, 7, 64, 4096] {
        let (mut a, mut b) = pair();
        assert_eq!(talk(&mut a, &mut b, piece), (Ok(()), Ok(())));
        let (of_a, of_b) = (a.poll_event().unwrap(), b.poll_event().unwrap());
        let peer = |node: &str| {
            let boot = BootId([node.as_bytes()[0]; 16]);
            Event::Established(Peer { node: node.into(), boot, version: 1 })
        };
        assert_eq!((of_a, of_b), (peer("b"), peer("a")));
        for length in [0, 1, 1000, LONGEST_FRAME] {
            a.send(&vec![1; length]);
            b.send(&vec![2; length]);
        }
        assert_eq!(talk(&mut a, &mut b, piece), (Ok(()), Ok(())));
        let lengths = |of: &mut Session| messages(of).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lengths(&mut a), [0, 1, 1000, LONGEST_FRAME]);
        assert_eq!(lengths(&mut b), [0, 1, 1000, LONGEST_FRAME]);
    }
}

#[test]
fn what_is_sent_shows_nothing_of_the_message() {
    let (mut a, _) = established();
    a.send(b"precious precious");
    let shown = a.unsent().windows(8).any(|window| window == b"precious");
    assert!(!shown);
}

#[test]
fn another_key_is_refused_on_both_sides() {
    let mut a = session(Role::Initiator, "a", "b", &KEY);
    let mut b = session(Role::Responder, "b", "a", &ClusterKey::from_bytes([8; 32]));
    let ends = talk(&mut a, &mut b, 4096);
    assert_eq!(ends, (Err(Refused::ByPeer(Refusal::Key)), Err(Refused::Key)));
    assert!(a.poll_event().is_none() && b.poll_event().is_none());
}

#[test]
fn another_cluster_name_or_version_is_refused_on_both_sides() {
    let (mut a, _) = pair();
    let mut elsewhere = identity("b");
    elsewhere.cluster = "office".into();
    let mut b = Session::new(Role::Responder, elsewhere, vec!["a".into()], KEY);
    let ends = talk(&mut a, &mut b, 4096);
    let (by_peer, cluster) = (Refused::ByPeer(Refusal::Cluster), Refused::Cluster("lab".into()));
    assert_eq!(ends, (Err(by_peer), Err(cluster)));

    let mut b = session(Role::Responder, "b", "a", &KEY);
    let newer = Hello { oldest: 7, newest: 9, cluster: "lab".into(), node: "a".into() }.encode();
    let mut bytes = Vec::new();
    put(&mut bytes, &newer);
    assert_eq!(b.receive(&bytes), Err(Refused::Version(7, 9)));
    let mut a = session(Role::Initiator, "a", "b", &KEY);
    assert_eq!(carry(&mut b, &mut a, 4096), Err(Refused::ByPeer(Refusal::Version)));
}

#[test]
fn only_the_configured_names_are_let_in() {
    let mut a = session(Role::Initiator, "a", "b", &KEY);
    let mut c = session(Role::Responder, "c", "a", &KEY);
    let (of_a, of_c) = talk(&mut a, &mut c, 4096);
    assert_eq!((of_a, of_c), (Err(Refused::Stranger("c".into())), Ok(())));
    assert!(c.poll_event().is_none());

    let mut a = session(Role::Initiator, "a", "b", &KEY);
    let mut twin = session(Role::Responder, "a", "b", &KEY);
    let (_, of_twin) = talk(&mut a, &mut twin, 4096);
    assert_eq!(of_twin, Err(Refused::SameName("a".into())));
}

#[test]
fn versions_meet_at_the_newest_that_both_speak() {
    let hello = |oldest, newest| Hello { oldest, newest, cluster: "c".into(), node: "n".into() };
    assert_eq!(hello(1, 2).version_with(&hello(2, 3)), Some(2));
    assert_eq!(hello(1, 3).version_with(&hello(1, 2)), Some(2));
    assert_eq!(hello(1, 1).version_with(&hello(2, 3)), None);
}

#[test]
fn nobody_can_change_a_hello_on_the_way() {
    let (mut a, mut b) = pair();
    let mut bytes = a.unsent().to_vec();
    a.sent(bytes.len());
    // "lab" and "a" stay, the newest version becomes another that b would accept as well.
    let newest = PREFIX + MAGIC.len() + 1;
    assert_eq!(bytes[newest], 1);
    bytes[newest] = 2;
    b.receive(&bytes).unwrap();
    let ends = talk(&mut a, &mut b, 4096);
    assert_eq!(ends.1, Err(Refused::Key));
    assert!(b.poll_event().is_none());
}

#[test]
fn a_recording_of_an_initiator_gets_nobody_in() {
    let (mut a, mut b) = pair();
    let mut recorded = Vec::new();
    for _ in 0..4 {
        recorded.extend_from_slice(a.unsent());
        let _ = carry(&mut a, &mut b, 4096);
        let _ = carry(&mut b, &mut a, 4096);
    }
    assert!(b.is_established());
    let mut other = session(Role::Responder, "b", "a", &KEY);
    assert_eq!(other.receive(&recorded), Err(Refused::Tampered));
    assert!(other.poll_event().is_none(), "a peer counted as present that is not");
}

#[test]
fn a_message_that_is_repeated_left_out_or_changed_ends_the_session() {
    let parts = |a: &mut Session| {
        let first = a.unsent().len();
        a.send(b"one");
        let second = a.unsent().len();
        a.send(b"two");
        let bytes = a.unsent().to_vec();
        (bytes[first..second].to_vec(), bytes[second..].to_vec())
    };
    let (mut a, mut b) = established();
    let (one, _) = parts(&mut a);
    b.receive(&one).unwrap();
    assert_eq!(b.receive(&one), Err(Refused::Tampered), "repeated");
    assert_eq!(b.receive(&one), Err(Refused::Tampered), "it is over");

    let (mut a, mut b) = established();
    let (_, two) = parts(&mut a);
    assert_eq!(b.receive(&two), Err(Refused::Tampered), "left out");
    assert!(messages(&mut b).is_empty());

    let (mut a, mut b) = established();
    let (mut one, _) = parts(&mut a);
    one[PREFIX] ^= 1;
    assert_eq!(b.receive(&one), Err(Refused::Tampered), "changed");
}

#[test]
fn what_is_not_baton_is_told_so() {
    let (mut a, mut b) = pair();
    assert_eq!(b.receive(b"GET / HTTP/1.1\r\n"), Err(Refused::NotBaton));
    assert_eq!(a.receive(b"SSH-2.0-OpenSSH_9.6\r\n"), Err(Refused::NotBaton));
    assert!(b.unsent().is_empty(), "a stranger is told nothing");
}

#[test]
fn a_stranger_makes_us_hold_little() {
    let (_, mut b) = pair();
    assert_eq!(b.receive(&[0x40, 0]), Err(Refused::NotBaton));
    let (_, mut b) = pair();
    let longest = u16::try_from(LONGEST_EARLY).unwrap().to_be_bytes();
    b.receive(&longest).unwrap();
    b.receive(&vec![0; LONGEST_EARLY - 1]).unwrap();
    assert!(b.received.len() <= PREFIX + LONGEST_EARLY);
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_waited_on(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (mut a, mut b) = pair();
        let _ = a.receive(&bytes);
        let _ = b.receive(&bytes);
        prop_assert!(a.poll_event().is_none() && b.poll_event().is_none());
    }

    #[test]
    fn any_bytes_behind_a_hello_are_refused_or_waited_on(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let (mut a, mut b) = pair();
        carry(&mut a, &mut b, 4096).unwrap();
        let _ = b.receive(&bytes);
        prop_assert!(b.poll_event().is_none());
    }

    #[test]
    fn any_bytes_end_an_established_session_or_are_waited_on(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let (_, mut b) = established();
        let _ = b.receive(&bytes);
        prop_assert!(b.poll_event().is_none());
    }
}
