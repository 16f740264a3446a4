//! The convolutions' weights as the kernels read them: packed once, kept in a file beside the model, mapped next time.
//!
//! ```text
//! offset  bytes  field
//!      0      8  "DARNETCW"
//!      8      4  version, u32 little endian
//!     12      4  CRC-32 of the values
//!     16      8  number of values, u64 little endian
//!     24     32  key: SHA-256 over the weights' SHA-256, the kernels' version, the instruction set's panel widths, each
//!                convolution's method and how its weights are kept
//!     56   4040  zero
//!   4096      4  each value, f32 little endian
//! ```
//!
//! The file is a copy that can be made again: any fault in it (length, key, checksum) means that it is made anew, and a
//! folder that cannot be written means that the weights stay in memory. It is written beside and renamed, so that no
//! reader sees half of it. A mapped file's pages belong to the page cache: they are shared by all processes that use the
//! model and are not part of the anonymous resident set.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::arena::Floats;
use super::dispatch::Kernels;
use super::plan::{Method, Plan, pack_channel};
use super::pool::Pool;
use super::winograd::Kept;
use crate::engine::EngineError;
use crate::model::Model;

const MAGIC: &[u8; 8] = b"DARNETCW";
/// Version of the layout above.
const VERSION: u32 = 1;
/// Counts changes of transforms and packing: what an earlier version wrote is not read.
const KERNEL_VERSION: u32 = 2;
const HEADER: usize = 4096;
/// Weights of fewer bytes are packed at each start: that takes less than 50 ms.
const SMALLEST_BYTES: usize = 8 << 20;

/// Packed weights.
pub enum Packed {
    /// In memory of our own.
    Owned(Floats),
    /// In a file.
    Mapped(Mmap, usize),
}

impl Deref for Packed {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Self::Owned(floats) => floats,
            // SAFETY: the map was checked to hold HEADER bytes and `len` f32 behind them, at a multiple of four; any bits
            // are an f32. That nobody changes the file while it is mapped is what every user of a mapped file relies
            // on: this program only ever replaces it by rename.
            Self::Mapped(map, len) => unsafe {
                std::slice::from_raw_parts(map.as_ptr().add(HEADER).cast::<f32>(), *len)
            },
        }
    }
}

impl Packed {
    /// Bytes in memory of our own.
    pub fn owned_bytes(&self) -> usize {
        match self {
            Self::Owned(floats) => floats.bytes(),
            Self::Mapped(..) => 0,
        }
    }

    /// Bytes of the mapped file.
    pub fn mapped_bytes(&self) -> usize {
        match self {
            Self::Owned(_) => 0,
            Self::Mapped(map, _) => map.len(),
        }
    }

    /// The weights of `plan`: mapped from beside the model if they are there, else packed and, with `keep`, written.
    ///
    /// # Errors
    /// No memory.
    pub fn load(model: &Model, plan: &Plan, kernels: &Kernels, pool: &Pool, keep: bool) -> Result<Self, EngineError> {
        let path = match &model.dir {
            Some(dir) if keep && plan.weights_len * 4 >= SMALLEST_BYTES => Some(path(dir, kernels)),
            _ => None,
        };
        let key = key(model, plan, kernels);
        if let Some(path) = &path
            && let Some(mapped) = map(path, &key, plan.weights_len)
        {
            return Ok(mapped);
        }
        let packed = pack(model, plan, kernels, pool)?;
        if let Some(path) = &path
            && write(path, &key, &packed).is_ok()
            && let Some(mapped) = map(path, &key, plan.weights_len)
        {
            return Ok(mapped);
        }
        Ok(Self::Owned(packed))
    }
}

/// Where the file of a model's folder lies.
pub fn path(dir: &Path, kernels: &Kernels) -> PathBuf {
    dir.join(format!("cpu-{}.packed", kernels.isa))
}

fn key(model: &Model, plan: &Plan, kernels: &Kernels) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(model.sha256.as_bytes());
    hash.update(KERNEL_VERSION.to_le_bytes());
    for vectors in [kernels.vectors, kernels.panel] {
        hash.update((vectors as u64).to_le_bytes());
    }
    for conv in plan.convolutions() {
        hash.update(conv.name.as_bytes());
        hash.update([0]);
        hash.update(conv.method.as_str().as_bytes());
        hash.update([match conv.method {
            Method::Direct => 0,
            Method::Winograd(_, Kept::Whole) => 1,
            Method::Winograd(_, Kept::Rows) => 2,
            Method::Winograd(_, Kept::Planes) => 3,
            Method::Depth => 4,
        }]);
    }
    hash.finalize().into()
}

/// The values as bytes, as they are in memory.
fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: f32 has no padding, and a byte needs no alignment; the length is that of the same memory.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn map(path: &Path, key: &[u8; 32], len: usize) -> Option<Packed> {
    if cfg!(target_endian = "big") {
        return None;
    }
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.len() != (HEADER + len * 4) as u64 {
        return None;
    }
    // SAFETY: the file is only ever replaced by rename (see the module's page).
    let map = unsafe { memmap2::MmapOptions::new().populate().map(&file) }.ok()?;
    let header = map.get(..56)?;
    let field = |from: usize| header[from..from + 4].try_into().map(u32::from_le_bytes).ok();
    if &header[..8] != MAGIC || field(8)? != VERSION || header[16..24] != (len as u64).to_le_bytes() {
        return None;
    }
    if &header[24..56] != key || field(12)? != crc32fast::hash(&map[HEADER..]) {
        return None;
    }
    Some(Packed::Mapped(map, len))
}

fn write(path: &Path, key: &[u8; 32], values: &[f32]) -> io::Result<()> {
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let mut header = vec![0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&crc32fast::hash(bytes_of(values)).to_le_bytes());
    header[16..24].copy_from_slice(&(values.len() as u64).to_le_bytes());
    header[24..56].copy_from_slice(key);
    let written = (|| {
        let mut file = File::create(&beside)?;
        file.write_all(&header)?;
        file.write_all(bytes_of(values))?;
        // What a power failure leaves half written has a wrong checksum and is made anew.
        std::fs::rename(&beside, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

#[derive(Clone, Copy)]
struct Place(*mut f32, usize);

// SAFETY: used in `pack` alone, where each item writes the places of its own input channel.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn write(self, index: usize, value: f32) {
        assert!(index < self.1, "packed weights: index out of range");
        // SAFETY: inside the buffer; no other item writes this index (`panel_index` is one to one).
        unsafe { self.0.add(index).write(value) };
    }
}

/// Packs the weights of every convolution.
///
/// # Errors
/// No memory.
pub fn pack(model: &Model, plan: &Plan, kernels: &Kernels, pool: &Pool) -> Result<Floats, EngineError> {
    let mut packed = Floats::zeroed(plan.weights_len)?;
    for conv in plan.convolutions() {
        let weights = model.weights.get(&format!("{}.weight", conv.name));
        let part = &mut packed[conv.weights_at..conv.weights_at + conv.weights_len];
        let place = Place(part.as_mut_ptr(), part.len());
        pool.run(conv.input.c, &|ci, _| {
            pack_channel(conv, kernels, weights, ci, |index, value| place.write(index, value));
        });
    }
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::dispatch::Isa;
    use crate::model::Architecture;

    #[test]
    fn a_file_is_read_back_and_any_fault_makes_it_anew() {
        let architecture = Architecture { base_width: 32, input_dhw: [8, 32, 32], ..Architecture::full() };
        let mut model = Model::synthetic("t", &architecture, 1).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.dir = Some(dir.path().to_path_buf());
        let kernels = Kernels::of(Isa::best()).unwrap();
        let plan = Plan::new(&model);
        assert!(plan.weights_len * 4 >= SMALLEST_BYTES);
        let pool = Pool::new(2, || {}).unwrap();
        let load = || Packed::load(&model, &plan, &kernels, &pool, true).unwrap();
        let expected = pack(&model, &plan, &kernels, &pool).unwrap();
        let same = |packed: &Packed| bytes_of(packed) == bytes_of(&expected);
        let file = path(dir.path(), &kernels);
        let first = load();
        assert!(same(&first) && matches!(first, Packed::Mapped(..)));
        let written = std::fs::read(&file).unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
        let before = inode(&file);
        assert!(same(&load()));
        assert_eq!(inode(&file), before, "a good file is used as it is");
        for fault in ["cut", "flipped", "key", "version"] {
            let mut bytes = written.clone();
            match fault {
                "cut" => bytes.truncate(bytes.len() - 4),
                "flipped" => bytes[HEADER + 1000] ^= 1,
                "key" => bytes[30] ^= 1,
                _ => bytes[8] ^= 1,
            }
            std::fs::remove_file(&file).unwrap();
            std::fs::write(&file, &bytes).unwrap();
            assert!(same(&load()), "{fault}");
            assert_eq!(std::fs::read(&file).unwrap(), written, "{fault}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_keeps_the_weights_in_memory() {
        let architecture = Architecture { base_width: 32, input_dhw: [8, 32, 32], ..Architecture::full() };
        let mut model = Model::synthetic("t", &architecture, 1).unwrap();
        model.dir = Some(PathBuf::from("/dev/null/nothing"));
        let kernels = Kernels::of(Isa::Scalar).unwrap();
        let plan = Plan::new(&model);
        let pool = Pool::new(1, || {}).unwrap();
        let packed = Packed::load(&model, &plan, &kernels, &pool, true).unwrap();
        assert!(matches!(packed, Packed::Owned(_)));
        assert_eq!(packed.owned_bytes(), plan.weights_len * 4);
    }
}
