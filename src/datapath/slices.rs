//! All entries of a map, many with one system call (BPF_MAP_LOOKUP_BATCH).
//!
//! libbpf-rs has an iterator for it that takes a batch which is not full for the last one. But the
//! kernel gives whole buckets only, so that nearly every batch lacks a few: it would stop after the
//! first.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, AsRawFd as _};

use libbpf_rs::{Error, ErrorKind, MapCore as _, MapHandle, Result, libbpf_sys};

use super::record::Record;

/// The walk through a map.
#[derive(Debug)]
pub struct Slices<'map, K, V> {
    map: &'map MapHandle,
    /// Where the kernel goes on; `None` before the first slice.
    place: Option<Vec<u8>>,
    keys: Vec<u8>,
    values: Vec<u8>,
    /// Entries in `keys` and `values`, and those that were given out.
    count: usize,
    given: usize,
    ended: bool,
    types: PhantomData<fn() -> (K, V)>,
}

impl<'map, K: Record, V: Record> Slices<'map, K, V> {
    /// Reads the first slice, of `size` entries at most.
    pub(super) fn start(map: &'map MapHandle, size: u32) -> Result<Self> {
        let mut slices = Self {
            map,
            place: None,
            keys: vec![0; size as usize * size_of::<K>()],
            values: vec![0; size as usize * size_of::<V>()],
            count: 0,
            given: 0,
            ended: false,
            types: PhantomData,
        };
        slices.read()?;
        Ok(slices)
    }

    /// Reads the next slice. A bucket that has more than there is room for makes room.
    fn read(&mut self) -> Result<()> {
        loop {
            match self.read_once() {
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    self.keys.resize(self.keys.len() * 2, 0);
                    self.values.resize(self.values.len() * 2, 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map_err(Error::from),
            }
        }
    }

    fn read_once(&mut self) -> io::Result<()> {
        // The kernel's place is a bucket's number or a key.
        let mut next = vec![0_u8; size_of::<K>().max(size_of::<u32>())];
        let place = self.place.as_mut().map_or(std::ptr::null_mut(), |place| place.as_mut_ptr());
        let mut count = (self.keys.len() / size_of::<K>()) as u32;
        let opts = libbpf_sys::bpf_map_batch_opts {
            sz: size_of::<libbpf_sys::bpf_map_batch_opts>() as _,
            ..Default::default()
        };
        // SAFETY: keys and values have room for `count` of theirs (the sizes of K and V are the
        // map's, which `Table` has seen to), both places for a key and for a bucket's number.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                self.map.as_fd().as_raw_fd(),
                place.cast(),
                next.as_mut_ptr().cast(),
                self.keys.as_mut_ptr().cast(),
                self.values.as_mut_ptr().cast(),
                &raw mut count,
                &raw const opts,
            )
        };
        match -result {
            0 => {}
            // That was the last; there may be entries with it.
            libc::ENOENT => self.ended = true,
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        self.place = Some(next);
        (self.count, self.given) = (count as usize, 0);
        Ok(())
    }
}

impl<K: Record, V: Record> Iterator for Slices<'_, K, V> {
    type Item = (K, V);

    fn next(&mut self) -> Option<Self::Item> {
        while self.given == self.count {
            if self.ended {
                return None;
            }
            if let Err(error) = self.read() {
                self.ended = true;
                if error.kind() != ErrorKind::NotFound {
                    tracing::warn!(%error, map = ?self.map.name(), "not all of a map was read");
                }
                return None;
            }
        }
        let at = self.given;
        self.given += 1;
        let key = K::read(&self.keys[at * size_of::<K>()..][..size_of::<K>()])?;
        let value = V::read(&self.values[at * size_of::<V>()..][..size_of::<V>()])?;
        Some((key, value))
    }
}
