//! The volume of a series: decoded slices in a preallocated, memory-mapped file.
//!
//! Input: HU slices as stored, rows by columns, row-major, written in place by the decoder. Output: the same slices as
//! borrowed memory, for any number of readers. Layout and state diagram: `docs/formats.md`. The volume is a cache of
//! the journal: it is not synced, and what is wrong in it is dropped on opening and decoded again.
//!
//! Invariants:
//! - every mapped byte has a block of the file behind it (`fallocate`, or zeros written), so that a full disk is
//!   [`VolumeError::NoSpace`] and not SIGBUS;
//! - a slot has one writer, who won it by compare-and-swap; it is read only after `published` was loaded with acquire
//!   ordering, and never written again while the file is open;
//! - a chunk of slots, once mapped, stays where it is until the file is closed, so references stay valid as it grows;
//! - one process has the file open (an exclusive lock), once.
//!
//! Claiming, publishing and reading take no lock. Growing, once every 64 slots, is done by one writer; others that need
//! the same chunk wait for it.
//!
//! Deliberately absent: order and geometry of slices (slots are in order of arrival), sync, shrinking.
//!
//! What the lock cannot keep out (another program that writes or cuts the file in spite of it) is outside the
//! contract, as for every memory map; the data folder belongs to this program alone.

#![allow(unsafe_code)]

#[cfg(not(target_endian = "little"))]
compile_error!("slots are mapped as little-endian i16; a big-endian host would need a copying store");

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::volume::journal::{no_space, random_id, try_lock};
use crate::volume::layout::volume::*;
use crate::volume::layout::{Field, round_up};

/// What went wrong with a volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The disk or the quota is full; nothing was claimed.
    #[error("volume {operation}: no space left on the disk or in the quota")]
    NoSpace {
        /// What was tried.
        operation: &'static str,
    },
    /// Every slot is used.
    #[error("volume claim: all {max_slots} slots are used")]
    Full {
        /// Slots of the file.
        max_slots: u32,
    },
    /// The operating system refused.
    #[error("volume {operation}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A size out of bounds.
    #[error("volume create: {what}: expected 1 to {max}, got {got}")]
    Bounds {
        /// Which size.
        what: &'static str,
        /// Its bound.
        max: u32,
        /// Its value.
        got: u32,
    },
    /// The file does not start as a volume does.
    #[error("volume open: not a volume (other magic)")]
    NotAVolume,
    /// The file has a layout this program does not know.
    #[error("volume open: expected version {VERSION}, got {found}; delete it and it is rebuilt from the journal")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The header or the table is not whole; the volume must be made anew from the journal.
    #[error("volume open: {what}; delete it and it is rebuilt from the journal")]
    Damaged {
        /// What does not hold.
        what: &'static str,
    },
    /// A slot's bytes do not match its checksums.
    #[error("volume verify: slot {index}: {what}")]
    DamagedSlot {
        /// Number of the slot.
        index: u32,
        /// What does not hold.
        what: &'static str,
    },
    /// Another handle has the file.
    #[error("volume open: in use by another handle")]
    Locked,
}

impl VolumeError {
    /// Whether the cause is a full disk or quota.
    pub fn is_no_space(&self) -> bool {
        matches!(self, VolumeError::NoSpace { .. })
    }

    fn io(operation: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        if no_space(&source) { VolumeError::NoSpace { operation } } else { VolumeError::Io { operation, source } }
    }
}

/// What is known of a slot besides its pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotMeta {
    /// ImagePositionPatient, millimetres.
    pub position_mm: [f64; 3],
    /// Where the data set's record starts in the journal.
    pub journal_offset: u64,
}

/// Sizes and places, all derived from the first three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    rows: u32,
    columns: u32,
    max_slots: u32,
    chunk_slots: u32,
    slot_stride: u64,
    data_offset: u64,
}

impl Shape {
    fn new(rows: u32, columns: u32, max_slots: u32) -> Result<Self, VolumeError> {
        for (what, got, max) in
            [("rows", rows, MAX_SIDE), ("columns", columns, MAX_SIDE), ("slots", max_slots, MAX_SLOTS)]
        {
            if got == 0 || got > max {
                return Err(VolumeError::Bounds { what, max, got });
            }
        }
        // At most 4096 x 4096 x 2 = 32 MiB a slot and 65536 slots: 2 TiB, far below u64; a chunk is at most 32 MiB.
        let page = PAGE as u64;
        let up = |value| round_up(value, page).unwrap_or(u64::MAX);
        let slot_stride = up(u64::from(rows) * u64::from(columns) * 2);
        let chunk_slots = (CHUNK_LEN / slot_stride).clamp(1, u64::from(MAX_CHUNK_SLOTS)) as u32;
        let data_offset = up(page + ENTRY_LEN as u64 * u64::from(max_slots));
        Ok(Self { rows, columns, max_slots, chunk_slots, slot_stride, data_offset })
    }

    /// Pixels of a slot.
    fn pixels(&self) -> usize {
        self.rows as usize * self.columns as usize
    }

    fn chunks(&self) -> u32 {
        self.max_slots.div_ceil(self.chunk_slots)
    }

    /// First byte and length of a chunk; the last one may be shorter.
    fn chunk(&self, chunk: u32) -> (u64, u64) {
        let first = chunk * self.chunk_slots;
        let slots = self.chunk_slots.min(self.max_slots - first);
        (self.data_offset + u64::from(first) * self.slot_stride, u64::from(slots) * self.slot_stride)
    }

    fn encode(&self, volume_id: u64) -> [u8; HEADER_LEN] {
        let mut header = [0u8; HEADER_LEN];
        H_MAGIC.put(&mut header, &MAGIC);
        H_VERSION.put_uint(&mut header, u64::from(VERSION));
        H_PAGE.put_uint(&mut header, PAGE as u64);
        H_ROWS.put_uint(&mut header, u64::from(self.rows));
        H_COLUMNS.put_uint(&mut header, u64::from(self.columns));
        H_MAX_SLOTS.put_uint(&mut header, u64::from(self.max_slots));
        H_CHUNK_SLOTS.put_uint(&mut header, u64::from(self.chunk_slots));
        H_SLOT_STRIDE.put_uint(&mut header, self.slot_stride);
        H_TABLE_OFFSET.put_uint(&mut header, PAGE as u64);
        H_DATA_OFFSET.put_uint(&mut header, self.data_offset);
        H_VOLUME_ID.put_uint(&mut header, volume_id);
        let checksum = crc32fast::hash(&header[..H_CHECKSUM.offset]);
        H_CHECKSUM.put_uint(&mut header, u64::from(checksum));
        header
    }

    fn decode(header: &[u8; HEADER_LEN]) -> Result<(Self, u64), VolumeError> {
        if H_MAGIC.of(header) != MAGIC {
            return Err(VolumeError::NotAVolume);
        }
        let found = H_VERSION.get_uint(header) as u32;
        if found != VERSION {
            return Err(VolumeError::Version { found });
        }
        let damaged = VolumeError::Damaged { what: "header checksum does not match" };
        if H_CHECKSUM.get_uint(header) != u64::from(crc32fast::hash(&header[..H_CHECKSUM.offset])) {
            return Err(damaged);
        }
        let volume_id = H_VOLUME_ID.get_uint(header);
        let side = |field: Field| field.get_uint(header) as u32;
        let shape = Self::new(side(H_ROWS), side(H_COLUMNS), side(H_MAX_SLOTS))?;
        if shape.encode(volume_id) != *header {
            return Err(VolumeError::Damaged { what: "header fields contradict one another" });
        }
        Ok((shape, volume_id))
    }
}

/// Checksum and content of an entry without its state.
fn encode_entry(volume_id: u64, index: u32, pixel_crc32: u32, meta: &SlotMeta) -> [u8; ENTRY_LEN] {
    let mut entry = [0u8; ENTRY_LEN];
    E_PIXEL_CHECKSUM.put_uint(&mut entry, u64::from(pixel_crc32));
    E_INDEX.put_uint(&mut entry, u64::from(index));
    for (field, value) in [E_POSITION_X, E_POSITION_Y, E_POSITION_Z].into_iter().zip(meta.position_mm) {
        field.put(&mut entry, &value.to_le_bytes());
    }
    E_JOURNAL_OFFSET.put_uint(&mut entry, meta.journal_offset);
    let checksum = entry_checksum(volume_id, &entry);
    E_CHECKSUM.put_uint(&mut entry, u64::from(checksum));
    entry
}

fn entry_checksum(volume_id: u64, entry: &[u8; ENTRY_LEN]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&volume_id.to_le_bytes());
    hasher.update(&entry[E_PIXEL_CHECKSUM.offset..E_CHECKSUM.offset]);
    hasher.finalize()
}

fn decode_meta(entry: &[u8; ENTRY_LEN]) -> SlotMeta {
    let position_mm = [E_POSITION_X, E_POSITION_Y, E_POSITION_Z].map(|f| f64::from_bits(f.get_uint(entry)));
    SlotMeta { position_mm, journal_offset: E_JOURNAL_OFFSET.get_uint(entry) }
}

/// The bytes of pixels, as they lie in the file.
fn bytes_of(pixels: &[i16]) -> &[u8] {
    // SAFETY: any i16 is two initialised bytes, u8 has no alignment, and the length in bytes is that of the slice,
    // which fits isize because the slice exists.
    unsafe { std::slice::from_raw_parts(pixels.as_ptr().cast(), size_of_val(pixels)) }
}

/// A volume file, mapped. Used as `Arc<VolumeFile>` from any thread.
pub struct VolumeFile {
    shape: Shape,
    volume_id: u64,
    /// Header page and slot table.
    table: MmapRaw,
    /// Slots, a chunk each; set once and then never moved.
    chunks: Box<[OnceLock<MmapRaw>]>,
    /// No slot before this one is free.
    first_free: AtomicU32,
    published: AtomicU32,
    /// Whether a writer is adding a chunk.
    growing: AtomicBool,
    /// Slots that `open` gave back.
    dropped: u32,
    file: File,
}

impl VolumeFile {
    /// Makes a volume; the header and the slot table are preallocated, slots are as they are claimed.
    ///
    /// # Errors
    /// `Bounds`, `NoSpace`, `Io` (also when the file exists). A file that could not be finished is removed.
    pub fn create(path: &Path, rows: u32, columns: u32, max_slots: u32) -> Result<Arc<Self>, VolumeError> {
        let shape = Shape::new(rows, columns, max_slots)?;
        let volume_id = random_id().map_err(|e| VolumeError::io("create", e))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| VolumeError::io("create", e))?;
        let build = || {
            lock(&file)?;
            allocate(&file, 0, shape.data_offset, "create")?;
            file.write_all_at(&shape.encode(volume_id), 0).map_err(|e| VolumeError::io("create", e))?;
            map(&file, 0, shape.data_offset)
        };
        match build() {
            Ok(table) => Ok(Arc::new(Self::new(file, shape, volume_id, table))),
            Err(error) => {
                // It was made by this call and nobody else knows it.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    fn new(file: File, shape: Shape, volume_id: u64, table: MmapRaw) -> Self {
        let chunks = (0..shape.chunks()).map(|_| OnceLock::new()).collect();
        Self {
            shape,
            volume_id,
            table,
            chunks,
            first_free: AtomicU32::new(0),
            published: AtomicU32::new(0),
            growing: AtomicBool::new(false),
            dropped: 0,
            file,
        }
    }

    /// Opens a volume and verifies it: published slots whose entry and pixels match their checksums stay, all others
    /// become free. Reads every published slot once.
    ///
    /// # Errors
    /// `Io`, `Locked`, `NotAVolume`, `Version`, `Damaged` (make it anew from the journal), `NoSpace` (the file has
    /// holes that the disk cannot fill).
    pub fn open(path: &Path) -> Result<Arc<Self>, VolumeError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| VolumeError::io("open", e))?;
        lock(&file)?;
        let len = file.metadata().map_err(|e| VolumeError::io("open", e))?.len();
        let mut header = [0u8; HEADER_LEN];
        match file.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(VolumeError::NotAVolume),
            Err(e) => return Err(VolumeError::io("open", e)),
        }
        let (shape, volume_id) = Shape::decode(&header)?;
        if len < shape.data_offset {
            return Err(VolumeError::Damaged { what: "the file ends before its slot table does" });
        }
        allocate(&file, 0, shape.data_offset, "open")?;
        let table = map(&file, 0, shape.data_offset)?;
        let mut volume = Self::new(file, shape, volume_id, table);
        let mut first_free = shape.max_slots;
        for index in 0..shape.max_slots {
            let state = volume.state(index).load(Ordering::Acquire);
            let (start, _) = shape.chunk(index / shape.chunk_slots);
            let end = start + u64::from(index % shape.chunk_slots + 1) * shape.slot_stride;
            let whole = state == STATE_PUBLISHED && end <= len;
            if whole {
                volume.chunk(index / shape.chunk_slots)?;
            }
            if whole && volume.verify(index).is_ok() {
                *volume.published.get_mut() += 1;
                continue;
            }
            if state != STATE_FREE {
                volume.state(index).store(STATE_FREE, Ordering::Release);
                volume.dropped += 1;
            }
            first_free = first_free.min(index);
        }
        *volume.first_free.get_mut() = first_free;
        Ok(Arc::new(volume))
    }

    /// Takes a slot to write. Grows the file when needed; no lock is taken.
    ///
    /// # Errors
    /// `Full`, `NoSpace`, `Io`: nothing is claimed.
    pub fn claim(self: &Arc<Self>) -> Result<SlotWriter, VolumeError> {
        let mut index = self.first_free.load(Ordering::Relaxed);
        while index < self.shape.max_slots {
            let state = self.state(index);
            if state.load(Ordering::Relaxed) == STATE_FREE {
                self.chunk(index / self.shape.chunk_slots)?;
                // Acquire is not needed for the pixels: a free slot's are never read.
                if state.compare_exchange(STATE_FREE, STATE_CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    self.first_free.fetch_max(index + 1, Ordering::Relaxed);
                    return Ok(SlotWriter { volume: Arc::clone(self), index, published: false });
                }
            }
            index += 1;
        }
        Err(VolumeError::Full { max_slots: self.shape.max_slots })
    }

    /// The pixels of a published slot: rows x columns HU as stored, row-major. `None` for any other slot.
    pub fn slot(&self, index: u32) -> Option<&[i16]> {
        self.is_published(index).then(|| {
            let pixels = self.pixels(index);
            // SAFETY: `pixels` points into a mapping that lives as long as `self` and covers the whole slot, aligned to
            // a page; any bytes are i16. The slot is published (loaded with acquire), so its writer's stores are
            // visible and nothing writes to it again: `SlotWriter::publish` gave up the only mutable access, and a
            // published slot is not claimed again while the file is open.
            unsafe { std::slice::from_raw_parts(pixels, self.shape.pixels()) }
        })
    }

    /// What was published with a slot. `None` unless it is published.
    pub fn meta(&self, index: u32) -> Option<SlotMeta> {
        self.is_published(index).then(|| decode_meta(&self.read_entry(index)))
    }

    /// Number of published slots.
    pub fn published(&self) -> u32 {
        self.published.load(Ordering::Acquire)
    }

    /// Slots of the file, used or not. Published ones are found among `0..max_slots()`.
    pub fn max_slots(&self) -> u32 {
        self.shape.max_slots
    }

    /// Slots that [`open`](Self::open) gave back because they were not published or did not match their checksums.
    pub fn dropped(&self) -> u32 {
        self.dropped
    }

    /// Rows of every slice.
    pub fn rows(&self) -> u32 {
        self.shape.rows
    }

    /// Columns of every slice.
    pub fn columns(&self) -> u32 {
        self.shape.columns
    }

    /// Compares a published slot with its checksums.
    ///
    /// # Errors
    /// `DamagedSlot`, also when the slot is not published.
    pub fn verify(&self, index: u32) -> Result<(), VolumeError> {
        let damaged = |what| VolumeError::DamagedSlot { index, what };
        let pixels = self.slot(index).ok_or_else(|| damaged("not published"))?;
        let entry = self.read_entry(index);
        if E_CHECKSUM.get_uint(&entry) != u64::from(entry_checksum(self.volume_id, &entry)) {
            return Err(damaged("entry checksum does not match"));
        }
        if E_INDEX.get_uint(&entry) != u64::from(index) {
            return Err(damaged("entry of another slot"));
        }
        if E_PIXEL_CHECKSUM.get_uint(&entry) != u64::from(crc32fast::hash(bytes_of(pixels))) {
            return Err(damaged("pixel checksum does not match"));
        }
        Ok(())
    }

    fn is_published(&self, index: u32) -> bool {
        index < self.shape.max_slots && self.state(index).load(Ordering::Acquire) == STATE_PUBLISHED
    }

    /// First byte of a table entry.
    fn entry(&self, index: u32) -> *mut u8 {
        assert!(index < self.shape.max_slots, "slot {index} of {}", self.shape.max_slots);
        // SAFETY: the table mapping has `data_offset` bytes, which cover PAGE + ENTRY_LEN * max_slots.
        unsafe { self.table.as_mut_ptr().add(PAGE + index as usize * ENTRY_LEN) }
    }

    fn state(&self, index: u32) -> &AtomicU32 {
        let state = self.entry(index).cast::<u32>();
        debug_assert_eq!(E_STATE.offset, 0);
        // SAFETY: the entry is mapped for as long as `self` lives and aligned to 64 bytes (the mapping to a page); the
        // state is only ever reached through this function, so all its accesses are atomic.
        unsafe { AtomicU32::from_ptr(state) }
    }

    /// A copy of an entry, its state zeroed. Only for published slots, whose entry no longer changes.
    fn read_entry(&self, index: u32) -> [u8; ENTRY_LEN] {
        let mut entry = [0u8; ENTRY_LEN];
        let rest = E_STATE.end();
        // SAFETY: both ranges are ENTRY_LEN - 4 bytes and do not overlap; the state is left out, and the rest was
        // written before the slot was published (the callers loaded that with acquire) and is not written again.
        unsafe {
            std::ptr::copy_nonoverlapping(self.entry(index).add(rest), entry.as_mut_ptr().add(rest), ENTRY_LEN - rest);
        }
        entry
    }

    /// First pixel of a slot whose chunk is mapped.
    fn pixels(&self, index: u32) -> *mut i16 {
        let chunk = self.chunks[(index / self.shape.chunk_slots) as usize].get();
        let chunk = chunk.expect("a claimed or published slot has its chunk mapped");
        let offset = (index % self.shape.chunk_slots) as usize * self.shape.slot_stride as usize;
        assert!(offset + self.shape.pixels() * 2 <= chunk.len(), "a slot must lie in its chunk");
        // SAFETY: within the chunk's mapping, as just asserted.
        unsafe { chunk.as_mut_ptr().add(offset).cast() }
    }

    /// Makes sure that a chunk is allocated and mapped. One writer does it at a time: where `fallocate` is missing, bytes
    /// are written for it, which must not meet pixels of a writer that was faster.
    fn chunk(&self, chunk: u32) -> Result<(), VolumeError> {
        let cell = &self.chunks[chunk as usize];
        while cell.get().is_none() {
            if self.growing.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
                std::thread::yield_now();
                continue;
            }
            let grown = if cell.get().is_none() { self.grow(chunk, cell) } else { Ok(()) };
            self.growing.store(false, Ordering::Release);
            return grown;
        }
        Ok(())
    }

    fn grow(&self, chunk: u32, cell: &OnceLock<MmapRaw>) -> Result<(), VolumeError> {
        let (offset, len) = self.shape.chunk(chunk);
        allocate(&self.file, offset, len, "claim")?;
        // Only the one that grows sets it, so it is not set yet.
        let _ = cell.set(map(&self.file, offset, len)?);
        Ok(())
    }
}

impl fmt::Debug for VolumeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeFile").field("shape", &self.shape).field("published", &self.published()).finish()
    }
}

/// The one writer of a claimed slot. Dropped without [`publish`](Self::publish), the slot is abandoned until the file
/// is opened again.
#[derive(Debug)]
pub struct SlotWriter {
    volume: Arc<VolumeFile>,
    index: u32,
    published: bool,
}

impl SlotWriter {
    /// The slot's pixels, rows x columns, row-major. What they hold before is unspecified.
    pub fn pixels_mut(&mut self) -> &mut [i16] {
        let pixels = self.volume.pixels(self.index);
        // SAFETY: `pixels` points into a mapping that lives as long as `self.volume` and covers the whole slot, aligned
        // to a page; any bytes are i16. The slot is claimed: this writer, which is not Clone and is borrowed mutably
        // here, won it by compare-and-swap, and readers do not touch a slot that is not published.
        unsafe { std::slice::from_raw_parts_mut(pixels, self.volume.shape.pixels()) }
    }

    /// Number of the slot.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Writes checksum and entry, then lets readers see the slot. Returns its number.
    pub fn publish(mut self, meta: &SlotMeta) -> u32 {
        let pixel_crc32 = crc32fast::hash(bytes_of(self.pixels_mut()));
        let entry = encode_entry(self.volume.volume_id, self.index, pixel_crc32, meta);
        let rest = E_STATE.end();
        // SAFETY: the entry is mapped, the ranges do not overlap and are ENTRY_LEN - 4 bytes; the slot is claimed by
        // this writer, so nobody reads or writes the rest of its entry.
        unsafe {
            std::ptr::copy_nonoverlapping(
                entry.as_ptr().add(rest),
                self.volume.entry(self.index).add(rest),
                ENTRY_LEN - rest,
            );
        }
        self.published = true;
        self.volume.state(self.index).store(STATE_PUBLISHED, Ordering::Release);
        self.volume.published.fetch_add(1, Ordering::AcqRel);
        self.index
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        if !self.published {
            self.volume.state(self.index).store(STATE_ABANDONED, Ordering::Release);
        }
    }
}

fn lock(file: &File) -> Result<(), VolumeError> {
    match try_lock(file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(VolumeError::Locked),
        Err(e) => Err(VolumeError::io("lock", e)),
    }
}

/// Maps bytes of the file that are allocated.
fn map(file: &File, offset: u64, len: u64) -> Result<MmapRaw, VolumeError> {
    let len = usize::try_from(len).map_err(|e| VolumeError::io("map", io::Error::other(e)))?;
    MmapOptions::new().offset(offset).len(len).map_raw(file).map_err(|e| VolumeError::io("map", e))
}

/// Puts blocks behind `len` bytes at `offset`; bytes that are there stay.
fn allocate(file: &File, offset: u64, len: u64, operation: &'static str) -> Result<(), VolumeError> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), offset, len) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                return touch(file, offset, len).map_err(|e| VolumeError::io(operation, e));
            }
            Err(error) => return Err(VolumeError::io(operation, error)),
        }
    }
}

/// For file systems without `fallocate`: writes a byte a page, as it is or zero. Only for bytes that no one has mapped.
fn touch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let end = offset + len;
    let pages = (offset..end).step_by(PAGE).chain([end - 1]);
    for at in pages {
        let mut byte = [0u8];
        // Nothing is read beyond the end: the byte stays zero.
        let _ = file.read_at(&mut byte, at)?;
        file.write_all_at(&byte, at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(writer: &mut SlotWriter, value: i16) {
        for (i, p) in writer.pixels_mut().iter_mut().enumerate() {
            *p = value.wrapping_add(i as i16);
        }
    }

    fn filled(slot: &[i16], value: i16) -> bool {
        slot.iter().enumerate().all(|(i, &p)| p == value.wrapping_add(i as i16))
    }

    fn meta(k: u32) -> SlotMeta {
        SlotMeta { position_mm: [1.5, -2.5, f64::from(k)], journal_offset: u64::from(k) * 1000 }
    }

    fn publish(volume: &Arc<VolumeFile>, value: i16) -> u32 {
        let mut writer = volume.claim().expect("claim");
        fill(&mut writer, value);
        let index = writer.index();
        writer.publish(&meta(index))
    }

    #[test]
    fn handles_go_between_threads() {
        fn sendable<T: Send>() {}
        fn shareable<T: Send + Sync>() {}
        sendable::<SlotWriter>();
        shareable::<VolumeFile>();
        shareable::<crate::volume::journal::JournalReader>();
        sendable::<crate::volume::journal::JournalWriter>();
    }

    #[test]
    fn a_slot_is_seen_when_published_and_not_before() {
        let dir = tempfile::tempdir().expect("tempdir");
        let volume = VolumeFile::create(&dir.path().join("v"), 7, 5, 3).expect("create");
        let mut writer = volume.claim().expect("claim");
        fill(&mut writer, 40);
        assert_eq!((writer.index(), volume.slot(0), volume.meta(0), volume.published()), (0, None, None, 0));
        assert!(volume.verify(0).is_err());
        assert_eq!(writer.publish(&meta(0)), 0);
        assert!(filled(volume.slot(0).expect("published"), 40));
        assert_eq!(
            (volume.slot(0).map(<[i16]>::len), volume.meta(0), volume.published()),
            (Some(35), Some(meta(0)), 1)
        );
        volume.verify(0).expect("whole");
        assert_eq!((volume.rows(), volume.columns(), volume.max_slots()), (7, 5, 3));
        drop(volume.claim().expect("claim"));
        assert_eq!((volume.slot(1), volume.slot(2), volume.slot(3), volume.slot(u32::MAX)), (None, None, None, None));
        publish(&volume, 2);
        assert!(matches!(volume.claim(), Err(VolumeError::Full { max_slots: 3 })));
    }

    #[test]
    fn references_stay_valid_while_the_file_grows() {
        let dir = tempfile::tempdir().expect("tempdir");
        let volume = VolumeFile::create(&dir.path().join("v"), 16, 16, 300).expect("create");
        assert_eq!(volume.shape.chunk_slots, 64);
        publish(&volume, 0);
        let first = volume.slot(0).expect("published");
        for k in 1..300 {
            publish(&volume, k as i16);
        }
        assert!(filled(first, 0));
        assert!((0..300).all(|k| filled(volume.slot(k).expect("published"), k as i16)));
        assert_eq!(volume.published(), 300);
    }

    #[test]
    fn many_writers_and_readers_never_see_a_torn_slot() {
        const SLOTS: u32 = 257;
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("v");
        let volume = VolumeFile::create(&path, 33, 31, SLOTS).expect("create");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        match volume.claim() {
                            Ok(mut writer) => {
                                let index = writer.index();
                                fill(&mut writer, index as i16 * 7);
                                if index % 10 != 9 {
                                    writer.publish(&meta(index));
                                }
                            }
                            Err(VolumeError::Full { .. }) => break,
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    while volume.published() < SLOTS - SLOTS / 10 {
                        for index in 0..SLOTS {
                            if let Some(slot) = volume.slot(index) {
                                assert!(filled(slot, index as i16 * 7));
                                assert_eq!(volume.meta(index), Some(meta(index)));
                            }
                        }
                    }
                });
            }
        });
        drop(volume);
        let volume = VolumeFile::open(&path).expect("open");
        assert_eq!((volume.published(), volume.dropped()), (SLOTS - SLOTS / 10, SLOTS / 10));
    }

    #[test]
    fn opening_keeps_whole_slots_and_gives_the_others_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("v");
        let volume = VolumeFile::create(&path, 64, 64, 100).expect("create");
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::Locked)));
        assert!(matches!(VolumeFile::create(&path, 64, 64, 100), Err(VolumeError::Io { .. })), "never overwritten");
        for k in 0..6 {
            publish(&volume, k);
        }
        let mut left = volume.claim().expect("claim");
        fill(&mut left, 6);
        // As after kill -9: the writer's destructor never ran.
        volume.state(6).store(STATE_CLAIMED, Ordering::Release);
        std::mem::forget(left);
        let shape = volume.shape;
        // The forgotten writer holds the mapping; its lock must go for this test.
        volume.file.unlock().expect("unlock");
        drop(volume);

        let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        let flip = |at: u64| {
            let mut byte = [0u8];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 1], at).expect("write");
        };
        flip(shape.data_offset + shape.slot_stride + 8000); // a pixel of slot 1
        flip(PAGE as u64 + 3 * ENTRY_LEN as u64 + E_POSITION_Y.offset as u64); // the entry of slot 3
        drop(file);
        let volume = VolumeFile::open(&path).expect("open");
        assert_eq!((volume.published(), volume.dropped()), (4, 3));
        for k in [0, 2, 4, 5] {
            assert!(filled(volume.slot(k).expect("kept"), k as i16));
            assert_eq!(volume.meta(k), Some(meta(k)));
        }
        assert_eq!((volume.slot(1), volume.slot(3), volume.slot(6)), (None, None, None));
        assert_eq!(
            [publish(&volume, 11), publish(&volume, 13), publish(&volume, 16), publish(&volume, 17)],
            [1, 3, 6, 7]
        );
        assert!(filled(volume.slot(2).expect("untouched"), 2));
    }

    #[test]
    fn a_file_cut_short_loses_the_slots_beyond_and_nothing_else() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("v");
        let volume = VolumeFile::create(&path, 64, 64, 200).expect("create");
        for k in 0..150 {
            publish(&volume, k);
        }
        let shape = volume.shape;
        drop(volume);
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(shape.data_offset + 70 * shape.slot_stride + 100).expect("cut");
        drop(file);
        let volume = VolumeFile::open(&path).expect("open");
        assert_eq!((volume.published(), volume.dropped()), (70, 80));
        assert_eq!(publish(&volume, 1), 70);
        drop(volume);
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(shape.data_offset - 1).expect("cut");
        drop(file);
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::Damaged { .. })));
    }

    #[test]
    fn sizes_out_of_bounds_and_other_files_are_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("v");
        for (rows, columns, slots) in
            [(0, 1, 1), (1, 4097, 1), (1, 1, 0), (1, 1, MAX_SLOTS + 1), (u32::MAX, u32::MAX, 1)]
        {
            assert!(matches!(VolumeFile::create(&path, rows, columns, slots), Err(VolumeError::Bounds { .. })));
            assert!(!path.exists());
        }
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::Io { .. })));
        std::fs::write(&path, b"short").expect("write");
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::NotAVolume)));
        std::fs::write(&path, [7; 9000]).expect("write");
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::NotAVolume)));
        std::fs::remove_file(&path).expect("remove");
        drop(VolumeFile::create(&path, 8, 8, 8).expect("create"));
        let mut bytes = std::fs::read(&path).expect("read");
        bytes[H_VERSION.offset] = 9;
        std::fs::write(&path, &bytes).expect("write");
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::Version { found: 9 })));
        bytes[H_VERSION.offset] = 1;
        bytes[H_ROWS.offset] = 9;
        std::fs::write(&path, &bytes).expect("write");
        assert!(matches!(VolumeFile::open(&path), Err(VolumeError::Damaged { .. })));
    }

    #[test]
    fn slices_larger_than_a_chunk_get_one_each() {
        let shape = Shape::new(4096, 4096, 3).expect("shape");
        assert_eq!((shape.chunk_slots, shape.slot_stride, shape.chunks()), (1, 32 << 20, 3));
        let shape = Shape::new(512, 512, 600).expect("shape");
        assert_eq!((shape.chunk_slots, shape.slot_stride, shape.chunks()), (64, 512 << 10, 10));
        assert_eq!(shape.chunk(9), (shape.data_offset + 576 * (512 << 10), 24 * (512 << 10)));
    }

    #[test]
    fn touching_keeps_what_is_there_and_fills_the_rest() {
        let file = tempfile::tempfile().expect("tempfile");
        file.write_all_at(&[5; 6000], 0).expect("write");
        touch(&file, 0, 20_000).expect("touch");
        let mut bytes = vec![1; 20_000];
        file.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(file.metadata().expect("stat").len(), 20_000);
        assert!(bytes[..6000].iter().all(|&b| b == 5) && bytes[6000..].iter().all(|&b| b == 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn a_mutated_file_never_panics_and_never_shows_a_wrong_slot(
            flips in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..10), cut in any::<u32>(), header: bool) {
            let dir = tempfile::tempdir()?;
            let path = dir.path().join("v");
            let volume = VolumeFile::create(&path, 9, 11, 6).expect("create");
            for k in 0..5 {
                publish(&volume, k);
            }
            drop(volume);
            let mut bytes = std::fs::read(&path)?;
            for (at, with) in flips {
                let at = at as usize % if header { 4500 } else { bytes.len() };
                bytes[at] ^= with;
            }
            if cut % 3 == 0 {
                bytes.truncate(cut as usize % bytes.len());
            }
            std::fs::write(&path, &bytes)?;
            if let Ok(volume) = VolumeFile::open(&path) {
                for k in 0..6 {
                    if let Some(slot) = volume.slot(k) {
                        prop_assert!(filled(slot, k as i16));
                        prop_assert_eq!(volume.meta(k), Some(meta(k)));
                    }
                }
            }
        }
    }
}
