//! What the machine can do at most: the figures that a layer's speed is held against.
//!
//! Input: the kernels of an instruction set, a number of threads. Output: [`Roof`]. Every figure is the best of several
//! short rounds, because others may use the machine. Deliberately absent: the parts of a cache hierarchy that the
//! convolutions do not live in.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use serde::Serialize;

use super::arena::Floats;
use super::dispatch::Kernels;
use super::matrix::{INDEPENDENT, Product};
use super::pool::Pool;
use super::simd::LANES;
use crate::engine::EngineError;

/// Rounds of each measurement.
const ROUNDS: usize = 7;
/// Floats a thread reads from the third-level cache: 6 MiB, beyond any second level, two of them within 32 MiB.
const CACHE_FLOATS: usize = (6 << 20) / 4;
/// Floats a thread reads from memory: 192 MiB.
const MEMORY_FLOATS: usize = (192 << 20) / 4;

/// Measured limits, all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Roof {
    /// Threads that worked.
    pub threads: usize,
    /// Vector multiply-adds in registers, two operations each.
    pub fma_gflops: f64,
    /// The matrix kernel with all operands in the first-level cache.
    pub kernel_gflops: f64,
    /// Reading 6 MiB a thread over and over.
    pub cache_gb_s: f64,
    /// Reading 192 MiB a thread.
    pub memory_gb_s: f64,
}

/// Measures the limits of `threads` threads.
///
/// # Errors
/// No memory, no threads.
pub fn measure(kernels: &Kernels, threads: usize) -> Result<Roof, EngineError> {
    let pool =
        Pool::new(threads, || {}).map_err(|error| EngineError::ThreadPool { threads, reason: error.to_string() })?;
    let mut memory = Floats::zeroed(threads * MEMORY_FLOATS)?;
    memory.fill(1.0);
    let memory = &memory[..];
    // `work` does `amount` on each thread; the best round counts
    let best = |amount: f64, work: &(dyn Fn(usize) + Sync)| {
        let mut rate = 0.0_f64;
        for _ in 0..ROUNDS {
            let started = Instant::now();
            pool.run(threads, &|item, _| work(item));
            rate = rate.max(amount * threads as f64 / started.elapsed().as_secs_f64() / 1e9);
        }
        rate
    };
    let rounds = 4_000_000 / INDEPENDENT;
    let fma_gflops = best((2 * rounds * INDEPENDENT * LANES) as f64, &|_| {
        // SAFETY: `kernels` exist only where the processor has their instructions.
        black_box(unsafe { (kernels.multiply_adds)(rounds) });
    });
    // two groups of tiles and one panel, 64 input channels
    let (tiles, blocks, vectors, times) = (2 * kernels.rows, 4, kernels.panel, 2_000);
    let c_in = blocks * LANES;
    let kernel_gflops = best((2 * tiles * c_in * vectors * LANES * times) as f64, &|_| {
        let (v, u) = (vec![0.5; tiles * c_in], vec![0.5; c_in * vectors * LANES]);
        let mut m = vec![0.0; tiles * vectors * LANES];
        let (v, u, m) = (v.as_ptr(), u.as_ptr(), m.as_mut_ptr());
        let product =
            Product { tiles, size: kernels.rows, blocks, vectors, v, u, m, ahead: u, lines: 0, next: u, next_lines: 0 };
        for _ in 0..times {
            // SAFETY: as above, and the operands have the lengths that the product says.
            unsafe { (kernels.product)(black_box(&product)) };
        }
    });
    let cache_gb_s = best((CACHE_FLOATS * 4 * 8) as f64, &|item| {
        for _ in 0..8 {
            // SAFETY: as above.
            black_box(unsafe { (kernels.read)(&memory[item * MEMORY_FLOATS..][..CACHE_FLOATS]) });
        }
    });
    let memory_gb_s = best((MEMORY_FLOATS * 4) as f64, &|item| {
        // SAFETY: as above.
        black_box(unsafe { (kernels.read)(&memory[item * MEMORY_FLOATS..][..MEMORY_FLOATS]) });
    });
    Ok(Roof { threads, fma_gflops, kernel_gflops, cache_gb_s, memory_gb_s })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::dispatch::Isa;

    #[test]
    fn every_limit_is_positive() {
        let roof = measure(&Kernels::of(Isa::best()).unwrap(), 1).unwrap();
        for figure in [roof.fma_gflops, roof.kernel_gflops, roof.cache_gb_s, roof.memory_gb_s] {
            assert!(figure.is_finite() && figure > 0.0, "{roof:?}");
        }
    }
}
