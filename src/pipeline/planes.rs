//! A fixed pool of in-plane resampled slices.
//!
//! Every buffer is made at start-up (the kernel backs it with memory on first use only) and goes back by itself when
//! its last holder drops it. An empty pool is no error: the caller resamples that slice again when it is needed.
//!
//! Where the network runs on a device that takes its input there, slices are resampled on it ([`crate::resample::cuda`])
//! and a [`SlicePlane`] is a handle of the device's pool.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::resample::cuda::DevicePlane;

/// One in-plane resampled slice, `H x W` f32, shared read-only; returns to its pool on drop.
#[derive(Debug)]
pub struct Plane {
    values: Option<Box<[f32]>>,
    home: Sender<Box<[f32]>>,
}

impl Plane {
    /// The samples, row-major H, W.
    pub fn values(&self) -> &[f32] {
        self.values.as_deref().unwrap_or(&[])
    }

    /// The samples for the one writer, before the plane is shared.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.values.as_deref_mut().unwrap_or(&mut [])
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        if let Some(values) = self.values.take() {
            // The pool's capacity is the number of buffers ever made, so this never blocks; a closed pool just frees.
            let _ = self.home.try_send(values);
        }
    }
}

/// The pool. Cloning shares it.
#[derive(Clone, Debug)]
pub struct PlanePool {
    free: Receiver<Box<[f32]>>,
    home: Sender<Box<[f32]>>,
}

impl PlanePool {
    /// `count` buffers of `len` samples: `count * len * 4` bytes of address space.
    pub fn new(count: usize, len: usize) -> Self {
        let (home, free) = bounded(count.max(1));
        for _ in 0..count {
            let _ = home.try_send(vec![0.0f32; len].into_boxed_slice());
        }
        Self { free, home }
    }

    /// A buffer, or `None` when all are in use.
    pub fn take(&self) -> Option<Plane> {
        self.free.try_recv().ok().map(|values| Plane { values: Some(values), home: self.home.clone() })
    }

    /// Buffers not in use.
    pub fn available(&self) -> usize {
        self.free.len()
    }
}

/// A finished plane, shared.
pub type SharedPlane = Arc<Plane>;

/// An in-plane resampled slice, wherever it lies. Both kinds have the same bits.
#[derive(Clone, Debug)]
pub enum SlicePlane {
    /// In memory.
    Host(SharedPlane),
    /// On the device that the network runs on.
    Device(DevicePlane),
}

impl SlicePlane {
    /// The plane, if it lies in memory.
    pub fn host(&self) -> Option<&SharedPlane> {
        match self {
            Self::Host(plane) => Some(plane),
            Self::Device(_) => None,
        }
    }

    /// The plane, if it lies on a device.
    pub fn device(&self) -> Option<&DevicePlane> {
        match self {
            Self::Device(plane) => Some(plane),
            Self::Host(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plane_returns_to_its_pool_when_its_last_holder_drops_it() {
        let pool = PlanePool::new(2, 4);
        let a = Arc::new(pool.take().unwrap());
        let b = pool.take().unwrap();
        assert!(pool.take().is_none());
        let also_a = Arc::clone(&a);
        drop(a);
        assert_eq!(pool.available(), 0);
        drop(also_a);
        drop(b);
        assert_eq!(pool.available(), 2);
    }
}
