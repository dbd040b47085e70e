//! The maps, typed: what is written into them and read from them, and nothing about why.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libbpf_rs::{ErrorExt as _, MapCore as _, MapFlags, MapHandle, MapMut, MapType};

use super::bpffs;
use super::mapped::Mapped;
use super::record::Record;
use super::skeleton::types;
use super::slices::Slices;
use crate::maglev::SLOTS;

/// Backends that a schedule has room for: as in bounds.h.
const SERVICE_BACKENDS: usize = 1024;

/// A map of keys and values of these types. Each call is one system call.
#[derive(Debug)]
pub struct Table<K, V> {
    map: MapHandle,
    /// Counted up after each change, where the kernel keeps what it found a moment ago.
    changes: Option<Arc<Mapped<u32>>>,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Record, V: Record> Table<K, V> {
    /// The map as such a table; its sizes must be those of the types.
    pub(super) fn new(map: &MapMut<'_>) -> libbpf_rs::Result<Self> {
        let map = MapHandle::try_from(map)?;
        debug_assert_eq!(map.key_size() as usize, size_of::<K>(), "{:?}", map.name());
        debug_assert_eq!(map.value_size() as usize, size_of::<V>(), "{:?}", map.name());
        Ok(Self { map, changes: None, types: PhantomData })
    }

    /// The same of a table of which the kernel keeps what it found.
    fn kept(map: &MapMut<'_>, changes: &Arc<Mapped<u32>>) -> libbpf_rs::Result<Self> {
        Ok(Self { changes: Some(Arc::clone(changes)), ..Self::new(map)? })
    }

    /// The same of a map that is pinned, to be read.
    pub(super) fn pinned(path: &Path) -> libbpf_rs::Result<Self> {
        let map = MapHandle::from_pinned_path(path)?;
        if (map.key_size() as usize, map.value_size() as usize) != (size_of::<K>(), size_of::<V>())
        {
            let wrong = format!("{} holds other records than expected", path.display());
            return Err(std::io::Error::other(wrong).into());
        }
        Ok(Self { map, changes: None, types: PhantomData })
    }

    /// What a key has. Not for maps that have a value for each CPU.
    pub fn find(&self, key: &K) -> libbpf_rs::Result<Option<V>> {
        if self.map.map_type().is_percpu() {
            return Err(std::io::Error::other("a map of a value for each CPU").into());
        }
        let mut value = V::default();
        // SAFETY: the sizes of K and V are the map's, which `Table` has seen to, and whatever the
        // kernel writes is a V.
        let result = unsafe {
            libbpf_rs::libbpf_sys::bpf_map_lookup_elem(
                self.map.as_fd().as_raw_fd(),
                key.bytes().as_ptr().cast(),
                (&raw mut value).cast(),
            )
        };
        match result {
            0 => Ok(Some(value)),
            error if error == -libc::ENOENT => Ok(None),
            error => Err(std::io::Error::from_raw_os_error(-error).into()),
        }
    }

    /// Gives each key its value, all in one system call.
    pub(super) fn set_many(&self, keys: &[K], values: &[V]) -> libbpf_rs::Result<()> {
        assert_eq!(keys.len(), values.len(), "every key has a value");
        if keys.is_empty() {
            return Ok(());
        }
        let mut count = keys.len() as u32;
        let opts = libbpf_rs::libbpf_sys::bpf_map_batch_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_batch_opts>() as _,
            ..Default::default()
        };
        // SAFETY: there are as many of both, of the map's sizes.
        let result = unsafe {
            libbpf_rs::libbpf_sys::bpf_map_update_batch(
                self.map.as_fd().as_raw_fd(),
                keys.as_ptr().cast(),
                values.as_ptr().cast(),
                &raw mut count,
                &raw const opts,
            )
        };
        self.count_change();
        match result {
            0 => Ok(()),
            error => Err(std::io::Error::from_raw_os_error(-error).into()),
        }
    }

    /// Gives a key a value, whether it had one or not.
    pub fn set(&self, key: &K, value: &V) -> libbpf_rs::Result<()> {
        let done = self.map.update(key.bytes(), value.bytes(), MapFlags::ANY);
        self.count_change();
        done
    }

    fn count_change(&self) {
        if let Some(changes) = &self.changes {
            // What was found before is looked for again.
            changes.changes().fetch_add(1, Ordering::Release);
        }
    }

    /// Removes a key; that it is not there is no error.
    pub fn remove(&self, key: &K) -> libbpf_rs::Result<()> {
        let done = self.map.delete(key.bytes());
        self.count_change();
        match done {
            Err(error) if error.kind() == libbpf_rs::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// What a key has on each CPU, of a map that is kept per CPU.
    pub fn find_per_cpu(&self, key: &K) -> libbpf_rs::Result<Vec<V>> {
        let values = self.map.lookup_percpu(key.bytes(), MapFlags::ANY)?.unwrap_or_default();
        Ok(values.iter().filter_map(|value| V::read(&value[..size_of::<V>()])).collect())
    }

    /// Every entry, about `slice` of them with each system call. What comes or goes meanwhile may
    /// or may not be among them.
    pub fn slices(&self, slice: u32) -> libbpf_rs::Result<Slices<'_, K, V>> {
        Slices::start(&self.map, slice)
    }

    /// Some entries from a place of the table on, `most` of them at most, which must be more than
    /// any bucket holds, and the place where to go on; `None`: they were the last. What stays
    /// throughout is seen exactly once.
    pub(super) fn batch(&self, from: Option<Cursor>, most: u32) -> libbpf_rs::Result<Batch<K, V>> {
        let opts = libbpf_rs::libbpf_sys::bpf_map_batch_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_batch_opts>() as _,
            ..Default::default()
        };
        let mut keys = vec![0_u8; size_of::<K>() * most as usize];
        let mut values = vec![0_u8; size_of::<V>() * most as usize];
        let (mut count, mut next) = (most, 0_u32);
        let mut place = from.map(|Cursor(place)| place);
        let place = place.as_mut().map_or(std::ptr::null_mut(), |place| &raw mut *place);
        // SAFETY: room for `count` keys and values of the sizes that `new` has asserted, and four
        // bytes for a place, which is what a hash map's is.
        let result = unsafe {
            libbpf_rs::libbpf_sys::bpf_map_lookup_batch(
                self.map.as_fd().as_raw_fd(),
                place.cast(),
                (&raw mut next).cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &raw mut count,
                &raw const opts,
            )
        };
        let last = match result {
            0 => false,
            error if error == -libc::ENOENT => true,
            error => return Err(std::io::Error::from_raw_os_error(-error).into()),
        };
        let keys = keys.chunks_exact(size_of::<K>()).filter_map(K::read);
        let values = values.chunks_exact(size_of::<V>()).filter_map(V::read);
        let entries = keys.zip(values).take(count as usize).collect();
        Ok((entries, (!last).then_some(Cursor(next))))
    }

    /// How many entries there are: a walk of all.
    pub fn count(&self) -> libbpf_rs::Result<u32> {
        Ok(self.slices(4096)?.count() as u32)
    }

    /// Bytes of kernel memory, as the kernel reckons them; `None` where it does not tell.
    pub fn memory(&self) -> libbpf_rs::Result<Option<u64>> {
        Ok(self.map.query_fdinfo()?.memlock)
    }

    /// Every entry, one at a time; for maps that are not read in slices.
    pub(super) fn each(&self) -> libbpf_rs::Result<Vec<(K, V)>> {
        let keys = self.map.keys().filter_map(|key| K::read(&key));
        let entry = |key: K| self.find(&key).map(|value| value.map(|value| (key, value)));
        keys.filter_map(|key| entry(key).transpose()).collect()
    }

    /// Removes every entry.
    pub(super) fn clear(&self) -> libbpf_rs::Result<()> {
        let keys: Vec<_> = self.map.keys().collect();
        keys.iter().filter_map(|key| K::read(key)).try_for_each(|key| self.remove(&key))
    }

    /// Most entries.
    pub fn capacity(&self) -> u32 {
        self.map.max_entries()
    }
}

/// A map of the datapath that serves the network namespace which this file stands for, to be read.
pub fn pinned<K: Record, V: Record>(
    namespace: &Path,
    name: &str,
) -> Result<Table<K, V>, super::load::Error> {
    let doing = || format!("open the map {name}");
    let folder = bpffs::of(namespace).map_err(super::load::Error::io(doing()))?;
    let path = folder.join(format!("layout-{}", bpffs::LAYOUT)).join(name);
    Table::pinned(&path).map_err(super::load::Error::bpf(doing()))
}

impl<K, V> AsFd for Table<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

/// Entries of a table, and the place where to go on.
pub(super) type Batch<K, V> = (Vec<(K, V)>, Option<Cursor>);

/// A place in the walk of a table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor(u32);

/// Every map that userspace writes or reads.
#[derive(Debug)]
pub struct Maps {
    /// VIP, port and protocol → id.
    pub services: Table<types::service_key, u32>,
    /// By id.
    pub service_table: Table<u32, types::service>,
    /// By id.
    pub backend_table: Table<u32, types::backend>,
    /// Address, port and protocol → number.
    pub servers: Table<types::server_key, u32>,
    /// Addresses of ours → bits of `address_use`.
    pub addresses: Table<types::address, u32>,
    /// Service id → schedule.
    pub schedules: Schedules,
    /// Established flows.
    pub flows: Table<types::flow_key, types::flow>,
    /// Their other direction.
    pub replies: Table<types::reply_key, types::reply>,
    /// Half-open flows.
    pub half_flows: Table<types::flow_key, types::flow>,
    /// Their other direction.
    pub half_replies: Table<types::reply_key, types::half_reply>,
    /// `flow_count` → count, per CPU.
    pub flow_counts: Table<u32, u64>,
    /// Drop reason → count, per CPU.
    pub drops: Table<u32, u64>,
    /// Service id → traffic, per CPU.
    pub service_traffic: Table<u32, types::traffic>,
    /// Backend id → traffic, per CPU.
    pub backend_traffic: Table<u32, types::traffic>,
    /// Service id → how many flows it has, and whose turn it is.
    pub service_live: Table<u32, types::live>,
    /// Backend id → how many flows it has.
    pub backend_live: Table<u32, types::live>,
    /// Source and service → how many flows it has.
    pub sources: Table<types::source_key, u32>,
    /// Client and service → the backend that it keeps to.
    pub affinities: Table<types::flow_key, types::affinity>,
    /// The same of flows that are half-open.
    pub half_affinities: Table<types::flow_key, types::affinity>,
    /// Element 0: what the collector is to look at.
    pub sweep: Table<u32, types::sweep>,
    /// Interfaces that have an older version's filter too.
    pub draining: Table<u32, u32>,
    /// Interface → what XDP frames that go out of it need.
    pub legs: Table<u32, types::leg>,
    /// Routes for XDP, by the longest prefix.
    pub ways: Table<types::way_key, types::way>,
    /// Neighbours for XDP.
    pub neighbours: Table<types::neighbour_key, types::neighbour>,
}

impl Maps {
    pub(super) fn of(maps: &super::skeleton::DatapathMaps<'_>) -> libbpf_rs::Result<Self> {
        let changes = Arc::new(Mapped::map(maps.data_changes.as_fd())?);
        Ok(Self {
            services: Table::kept(&maps.services, &changes)?,
            service_table: Table::new(&maps.service_table)?,
            backend_table: Table::new(&maps.backend_table)?,
            servers: Table::kept(&maps.servers, &changes)?,
            addresses: Table::new(&maps.addresses)?,
            schedules: Schedules(MapHandle::try_from(&maps.schedules)?),
            flows: Table::new(&maps.flows)?,
            replies: Table::new(&maps.replies)?,
            half_flows: Table::new(&maps.half_flows)?,
            half_replies: Table::new(&maps.half_replies)?,
            flow_counts: Table::new(&maps.flow_counts)?,
            drops: Table::new(&maps.drops)?,
            service_traffic: Table::new(&maps.service_traffic)?,
            backend_traffic: Table::new(&maps.backend_traffic)?,
            service_live: Table::new(&maps.service_live)?,
            backend_live: Table::new(&maps.backend_live)?,
            sources: Table::new(&maps.sources)?,
            affinities: Table::new(&maps.affinities)?,
            half_affinities: Table::new(&maps.half_affinities)?,
            sweep: Table::new(&maps.sweep)?,
            draining: Table::new(&maps.draining)?,
            legs: Table::kept(&maps.legs, &changes)?,
            ways: Table::kept(&maps.ways, &changes)?,
            neighbours: Table::kept(&maps.neighbours, &changes)?,
        })
    }
}

/// The schedules of all services: a map of maps.
#[derive(Debug)]
pub struct Schedules(MapHandle);

impl Schedules {
    /// Gives a service a new schedule in one step. A packet sees the old one or the new one, never
    /// a mixture. There may be fewer slots than [`SLOTS`]: these are a round of turns.
    ///
    /// # Panics
    /// If there are more than [`SLOTS`] slots, or more than `SERVICE_BACKENDS` backends in them.
    pub fn set(&self, service: u32, slots: &[u16]) -> libbpf_rs::Result<()> {
        assert!(slots.len() <= SLOTS, "a schedule has its slots");
        let mut backends: Vec<u16> = slots.iter().copied().filter(|id| *id != 0).collect();
        backends.sort_unstable();
        backends.dedup();
        assert!(backends.len() <= SERVICE_BACKENDS, "a service has that many backends");
        // `struct schedule` in bpf/select.h: two counts, the backends, the slots, padding.
        let mut bytes = Vec::with_capacity(8 + 2 * (SERVICE_BACKENDS + SLOTS + 1));
        bytes.extend_from_slice((slots.len() as u32).bytes());
        bytes.extend_from_slice((backends.len() as u32).bytes());
        for (ids, room) in [(backends.as_slice(), SERVICE_BACKENDS), (slots, SLOTS + 1)] {
            bytes.extend(ids.iter().flat_map(|id| id.to_ne_bytes()));
            bytes.resize(bytes.len() + 2 * (room - ids.len()), 0);
        }
        let opts = libbpf_rs::libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
            ..Default::default()
        };
        let size = bytes.len() as u32;
        let inner = MapHandle::create(MapType::Array, Some("schedule"), 4, size, 1, &opts)?;
        inner.update(0_u32.bytes(), &bytes, MapFlags::ANY)?;
        let fd = inner.as_fd().as_raw_fd() as u32;
        // The map of maps holds it from here on; our descriptor is no longer needed.
        self.0.update(service.bytes(), fd.bytes(), MapFlags::ANY)
    }

    /// Takes a service's schedule away: it has no backend from then on.
    pub fn remove(&self, service: u32) -> libbpf_rs::Result<()> {
        match self.0.delete(service.bytes()) {
            Err(error) if error.kind() == libbpf_rs::ErrorKind::NotFound => Ok(()),
            other => other.context("take a schedule away"),
        }
    }
}
