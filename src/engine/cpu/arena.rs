//! Memory of the backend: large zeroed buffers, activations with borders, and all that one session uses.
//!
//! An activation of C channels is `[C / 16][D][H][W][16]` with a border of zeros around each block: one voxel before,
//! at least one behind each axis, more where the last tile of a convolution reads beyond. Channels are padded to a
//! multiple of sixteen; the padding stays zero through the network because its weights are zero.
//!
//! At full size a session has three activations of the widest stage, 4 blocks x 66 x 114 x 114 x 16 x 4 B = 220 MB each,
//! the transforms' scratch ([`super::plan::SHARED_COLUMN_BYTES`] and its neighbours) and a copy of the input,
//! 66 x 230 x 230 x 4 B = 14 MB.
//! Nothing is allocated after it opens.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut, MmapOptions};

use super::pool::Pool;
use super::simd::LANES;
use crate::engine::EngineError;

/// Floats of a buffer that asks for huge pages: below 2 MiB there is none to gain.
const HUGE_FROM: usize = (2 << 20) / 4;

/// Zeroed floats at a page boundary, in huge pages where the system gives them.
pub struct Floats {
    map: Option<MmapMut>,
    len: usize,
}

impl Floats {
    /// `len` zeros.
    ///
    /// # Errors
    /// No memory.
    pub fn zeroed(len: usize) -> Result<Self, EngineError> {
        if len == 0 {
            return Ok(Self { map: None, len });
        }
        let bytes = len * size_of::<f32>();
        let map = MmapOptions::new()
            .len(bytes)
            .map_anon()
            .map_err(|error| EngineError::Memory { bytes, reason: error.to_string() })?;
        if len >= HUGE_FROM {
            // Only speed is lost where the system has no huge pages.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(Self { map: Some(map), len })
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<f32>()
    }

    /// Touches every page, so that no run has to.
    pub fn touch(&mut self) {
        for page in self.chunks_mut(4096 / size_of::<f32>()) {
            page[0] = 0.0;
        }
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &self.map {
            // SAFETY: the map holds `len` f32 (its length in bytes is four times that), is aligned to a page, and any
            // bits are an f32. The borrow is that of the map.
            Some(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), self.len) },
            None => &[],
        }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.map {
            // SAFETY: as above; the borrow is exclusive.
            Some(map) => unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), self.len) },
            None => &mut [],
        }
    }
}

/// Shape of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Channels, without padding.
    pub c: usize,
    /// Voxels, without border.
    pub dhw: [usize; 3],
    /// Border behind each axis; before each it is 1.
    pub after: [usize; 3],
}

impl Shape {
    /// A shape with the smallest border.
    pub const fn new(c: usize, dhw: [usize; 3]) -> Self {
        Self { c, dhw, after: [1; 3] }
    }
    /// Blocks of sixteen channels.
    pub const fn blocks(&self) -> usize {
        self.c.div_ceil(LANES)
    }
    /// Channels with padding.
    pub const fn padded_c(&self) -> usize {
        self.blocks() * LANES
    }
    /// Voxels along each axis with the border.
    pub const fn bordered(&self) -> [usize; 3] {
        let ([d, h, w], [ad, ah, aw]) = (self.dhw, self.after);
        [1 + d + ad, 1 + h + ah, 1 + w + aw]
    }
    /// Floats of a row with its border.
    pub const fn row(&self) -> usize {
        self.bordered()[2] * LANES
    }
    /// Floats of a plane with its border.
    pub const fn plane(&self) -> usize {
        self.bordered()[1] * self.row()
    }
    /// Floats of a block of channels with its border.
    pub const fn block(&self) -> usize {
        self.bordered()[0] * self.plane()
    }
    /// Floats of all.
    pub const fn len(&self) -> usize {
        self.blocks() * self.block()
    }
    /// Whether it has no voxel.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Where a voxel's sixteen channels of a block lie; indices count from the first voxel that is not border.
    pub const fn at(&self, block: usize, [z, y, x]: [usize; 3]) -> usize {
        block * self.block() + (z + 1) * self.plane() + (y + 1) * self.row() + (x + 1) * LANES
    }
}

/// A place that several threads write to, each its own part.
#[derive(Clone, Copy)]
pub(super) struct Place(pub(super) *mut f32);

// SAFETY: a `Place` is only used in this backend's files, which give each item of work a part of its own.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// # Safety
    /// `index` lies within the place.
    pub(super) unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }
}

/// Does `work` with each part of `values`, `len` elements long (the last may be shorter), on the pool's threads.
///
/// # Panics
/// When `len` is 0, or with the panic of `work`.
pub(super) fn share(values: &mut [f32], len: usize, pool: &Pool, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let total = values.len();
    let place = Place(values.as_mut_ptr());
    pool.run(total.div_ceil(len), &|item, _| {
        let begin = item * len;
        // SAFETY: `begin < total` for every item, the parts do not overlap, each item is done once, and `values` is
        // exclusively borrowed until `run` returns.
        let part = unsafe { std::slice::from_raw_parts_mut(place.at(begin), len.min(total - begin)) };
        work(item, part);
    });
}

/// An activation. It remembers which shape's border is zero in it.
pub struct Tensor {
    data: Floats,
    shape: Option<Shape>,
}

impl Tensor {
    /// Room for `len` floats.
    ///
    /// # Errors
    /// No memory.
    pub fn new(len: usize) -> Result<Self, EngineError> {
        let mut data = Floats::zeroed(len)?;
        data.touch();
        Ok(Self { data, shape: None })
    }

    /// Takes `shape`: its border is zero afterwards, its inside what it was. The pool's threads share the planes.
    ///
    /// # Panics
    /// If the shape is too large.
    pub fn reshape(&mut self, shape: Shape, pool: &Pool) {
        if self.shape == Some(shape) {
            return;
        }
        let [bd, bh, _] = shape.bordered();
        let [d, h, w] = shape.dhw;
        let (row, plane) = (shape.row(), shape.plane());
        let data = Place(self.data[..shape.len()].as_mut_ptr());
        pool.run(shape.blocks() * bd, &|item, _| {
            // SAFETY: `blocks * bd` planes make up the slice of `shape.len()` floats above, each item has its own, and
            // the slice is exclusively borrowed until `run` returns.
            let data = unsafe { std::slice::from_raw_parts_mut(data.at(item * plane), plane) };
            if !(1..=d).contains(&(item % bd)) {
                data.fill(0.0);
                return;
            }
            data[..row].fill(0.0);
            data[(h + 1) * row..bh * row].fill(0.0);
            for line in data[row..(h + 1) * row].chunks_exact_mut(row) {
                line[..LANES].fill(0.0);
                line[(w + 1) * LANES..].fill(0.0);
            }
        });
        self.shape = Some(shape);
    }

    /// The data, in `shape`.
    ///
    /// # Panics
    /// If it has another shape.
    pub fn data(&self, shape: Shape) -> &[f32] {
        assert_eq!(self.shape, Some(shape), "an activation keeps its shape");
        &self.data[..shape.len()]
    }

    /// As [`Tensor::data`], to be changed inside the border.
    ///
    /// # Panics
    /// If it has another shape.
    pub fn data_mut(&mut self, shape: Shape) -> &mut [f32] {
        assert_eq!(self.shape, Some(shape), "an activation keeps its shape");
        &mut self.data[..shape.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_border_alone_is_zeroed() {
        let shape = Shape { c: 17, dhw: [2, 3, 4], after: [1, 2, 3] };
        assert_eq!(shape.bordered(), [4, 6, 8]);
        let mut tensor = Tensor::new(shape.len() + 5).unwrap();
        tensor.data.fill(1.0);
        tensor.reshape(shape, &Pool::new(3, || {}).unwrap());
        let inside = tensor.data(shape).iter().filter(|v| **v == 1.0).count();
        assert_eq!(inside, 2 * LANES * 2 * 3 * 4);
        assert_eq!(tensor.data(shape)[shape.at(1, [0, 0, 0])], 1.0);
        assert_eq!(tensor.data(shape)[shape.at(1, [1, 2, 3]) + LANES], 0.0);
    }

    #[test]
    fn buffers_are_zero_and_aligned() {
        for len in [0, 1, 15, 5000, HUGE_FROM + 1] {
            let floats = Floats::zeroed(len).unwrap();
            assert_eq!(floats.len(), len);
            assert!(floats.iter().all(|v| *v == 0.0));
            assert!(len == 0 || floats.as_ptr().addr().is_multiple_of(64));
        }
    }

    #[test]
    #[should_panic(expected = "keeps its shape")]
    fn a_tensor_is_not_read_in_another_shape() {
        let mut tensor = Tensor::new(10_000).unwrap();
        tensor.reshape(Shape::new(3, [2, 2, 2]), &Pool::new(1, || {}).unwrap());
        let _ = tensor.data(Shape::new(3, [2, 2, 3]));
    }
}
