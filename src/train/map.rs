//! A whole file as read-only memory.
//!
//! The fence round the one unsafe step of reading a cache: mapping a file, and looking at bytes of it as half floats.
//! Records are made under another name and renamed when whole, and are never written again, so a mapped one does not
//! change. What another program does to a record in spite of that is outside the contract, as for every memory map.

#![allow(unsafe_code)]

#[cfg(not(target_endian = "little"))]
compile_error!("volumes are mapped as little-endian f16; a big-endian host would need a copying cache");

use std::fs::File;
use std::io;

use half::f16;
use memmap2::Mmap;

/// A read-only map of a whole file.
#[derive(Debug)]
pub(super) struct MappedFile(Mmap);

impl MappedFile {
    /// Maps `file`, which must not be empty.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the file is opened for reading and is not written after its rename (module page).
        let map = unsafe { Mmap::map(file) }?;
        Ok(Self(map))
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// `len` half floats from byte `offset`.
    ///
    /// # Panics
    /// When they do not lie within the file or `offset` is odd.
    pub(super) fn halves(&self, offset: usize, len: usize) -> &[f16] {
        let bytes = &self.0[offset..offset + len * size_of::<f16>()];
        assert!(bytes.as_ptr().cast::<f16>().is_aligned(), "half floats at an odd offset");
        // SAFETY: the bytes lie within the map, live as long as `self`, are aligned (checked above), and every pattern of
        // 16 bits is an f16, which is `repr(transparent)` over u16.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<f16>(), len) }
    }
}
