use super::*;
use crate::service::{FlowPolicy, Limits, Mode, Protocol, ProxyProtocol, Scheduler};

fn service(backends: &[(&str, u16, u32)]) -> Service {
    let backend = |(n, &(name, weight, max_connections)): (usize, &(&str, u16, u32))| Backend {
        name: name.into(),
        address: format!("10.78.0.{}:1080", n + 11).parse().unwrap(),
        weight,
        max_connections,
    };
    Service {
        name: "socks".into(),
        listen: "10.77.0.100:1080".parse().unwrap(),
        protocol: Protocol::Tcp,
        mode: Mode::Proxy,
        scheduler: Scheduler::RoundRobin,
        backends: backends.iter().enumerate().map(backend).collect(),
        check: None,
        limits: Limits {
            max_connections: 100,
            max_connections_per_source: 100,
            connect_timeout: Duration::from_secs(1),
            connect_retries: 1,
            idle_timeout: Duration::from_secs(60),
            half_close_timeout: Duration::from_secs(60),
            affinity: None,
        },
        flows: FlowPolicy::of(Protocol::Tcp),
        proxy_protocol: ProxyProtocol::Off,
    }
}

fn pool(backends: &[(&str, u16, u32)]) -> Pool {
    Pool::new(Arc::new(service(backends)))
}

fn client() -> IpAddr {
    "10.77.0.10".parse().unwrap()
}

fn name(place: Option<&Place>) -> Option<&str> {
    place.map(|place| place.member.backend.name.as_str())
}

#[test]
fn only_eligible_members_are_chosen() {
    let states = [
        (Health::Up, Admin::Enabled, true),
        (Health::Up, Admin::Drained, false),
        (Health::Up, Admin::Disabled, false),
        (Health::Down, Admin::Enabled, false),
        (Health::Down, Admin::Drained, false),
        (Health::Down, Admin::Disabled, false),
        (Health::Unknown, Admin::Enabled, true),
        (Health::Unknown, Admin::Drained, false),
        (Health::Unknown, Admin::Disabled, false),
    ];
    for (health, admin, eligible) in states {
        let pool = pool(&[("a", 1, 10)]);
        pool.members[0].set_health(health, "test");
        pool.members[0].set_admin(admin);
        assert_eq!(pool.pick(client(), &[]).is_some(), eligible, "{health} {admin:?}");
    }
}

#[test]
fn a_member_not_probed_yet_waits_for_those_that_are_up() {
    let pool = pool(&[("a", 1, 1), ("b", 1, 10)]);
    pool.members[1].set_health(Health::Unknown, "test");
    let first = pool.pick(client(), &[]);
    assert_eq!(name(first.as_ref()), Some("a"));
    // The one that is up is full.
    assert_eq!(name(pool.pick(client(), &[]).as_ref()), Some("b"));
}

#[test]
fn a_tried_member_is_not_tried_again() {
    let pool = pool(&[("a", 1, 10), ("b", 1, 10)]);
    let tried = [pool.members[0].clone()];
    for _ in 0..4 {
        assert_eq!(name(pool.pick(client(), &tried).as_ref()), Some("b"));
    }
    assert!(pool.pick(client(), &pool.members).is_none());
}

#[test]
fn places_are_given_back() {
    let pool = pool(&[("a", 1, 1)]);
    let place = pool.pick(client(), &[]);
    assert!(place.is_some() && pool.pick(client(), &[]).is_none());
    drop(place);
    assert!(pool.pick(client(), &[]).is_some());
    assert_eq!(pool.members[0].total.load(Ordering::Relaxed), 2);
}

#[test]
fn threads_never_pass_a_limit() {
    let pool = pool(&[("a", 3, 5), ("b", 1, 7)]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    let place = pool.pick(client(), &[]);
                    for member in &pool.members {
                        let now = member.connections.load(Ordering::Relaxed);
                        assert!(now <= member.backend.max_connections);
                    }
                    if draw().is_multiple_of(8) {
                        std::thread::yield_now();
                    }
                    drop(place);
                }
            });
        }
    });
    for member in &pool.members {
        assert_eq!(member.connections.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn admission_counts_against_service_and_source() {
    let mut service = service(&[("a", 1, 10)]);
    service.limits.max_connections = 3;
    service.limits.max_connections_per_source = 2;
    let pool = Pool::new(Arc::new(service));
    let (one, two) = (client(), "10.77.0.11".parse().unwrap());
    let first = pool.admit(one).unwrap();
    let _second = pool.admit(one).unwrap();
    assert_eq!(pool.admit(one).unwrap_err(), Refusal::Source);
    let _third = pool.admit(two).unwrap();
    assert_eq!(pool.admit(two).unwrap_err(), Refusal::Service);
    drop(first);
    pool.admit(one).unwrap();
    let counted = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(counted(&pool.counters.accepted), 4);
    assert_eq!(counted(&pool.counters.refused_service_limit), 1);
    assert_eq!(counted(&pool.counters.refused_source_limit), 1);
}

#[test]
fn a_renewed_pool_keeps_what_is_known_of_its_members() {
    let old = pool(&[("a", 1, 10), ("b", 1, 10)]);
    old.members[0].set_health(Health::Down, "refused");
    old.members[1].set_admin(Admin::Drained);
    let place = Place::take(&old.members[0]).unwrap();
    let _admission = old.admit(client()).unwrap();

    let new = Pool::renewed(&old, Arc::new(service(&[("a", 9, 1), ("b", 1, 10), ("c", 1, 1)])));
    // The old one may have to go on.
    assert_eq!(old.members[0].health(), Health::Down);
    // Without a check nothing says that it is down any more.
    new.stand_unchecked();
    assert_eq!(new.members[0].health(), Health::Up);
    let without = Pool::renewed(&new, Arc::new(service(&[("b", 1, 10)])));
    assert!(new.has(&old.members[0]) && !without.has(&old.members[0]));
    assert_eq!(new.members[1].admin(), Admin::Drained);
    assert_eq!(new.members[0].backend.weight, 9);
    assert_eq!(new.connections.load(Ordering::Relaxed), 1);
    // "a" has its one connection still, "b" is drained.
    assert_eq!(name(new.pick(client(), &[]).as_ref()), Some("c"));
    drop(place);
    assert_eq!(new.members[0].connections.load(Ordering::Relaxed), 0);
}

#[test]
fn changes_are_told_here_and_in_renewed_pools() {
    let old = pool(&[("a", 1, 10)]);
    let mut changes = old.changes();
    let new = Pool::renewed(&old, old.service.clone());
    new.members[0].set_health(Health::Up, "as before");
    assert!(!changes.has_changed().unwrap());
    new.members[0].set_health(Health::Down, "refused");
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    new.members[0].set_admin(Admin::Disabled);
    assert!(changes.has_changed().unwrap());
}
