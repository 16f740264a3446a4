//! Precomputed noise: periodic tiles that are sampled, never recomputed, so that a voxel costs a few reads.
//!
//! - [`Tile3`]: smooth isotropic noise of unit variance, for texture and ragged edges.
//! - [`SeptaTile`]: edges of a jittered Voronoi tessellation, the septal network of crazy paving.
//! - [`SliceNoise`]: image noise with the band-pass spectrum of a reconstruction kernel (zero at zero frequency), made
//!   afresh for each slice from two tiles with coprime periods at seeded shifts.

use super::math::{exp, hash_all, mix64};
use rayon::prelude::*;

/// Cells along each axis of a [`Tile3`]; a power of two so that wrapping is a mask.
const TILE: usize = 64;
/// Added before truncation so that indices are positive: a multiple of `TILE` beyond any coordinate used.
const OFFSET: f32 = 8192.0;

/// Bell-shaped, variance 1: the sum of the four 16-bit parts of a hash (each of variance 65536²/12).
fn bell(hash: u64) -> f32 {
    let sum = (hash & 0xffff) + (hash >> 16 & 0xffff) + (hash >> 32 & 0xffff) + (hash >> 48);
    (sum as f32 - 131_070.0) / 37_837.0
}

/// Normalised Gaussian taps out to three deviations.
fn gaussian(sigma: f64) -> Vec<f32> {
    if sigma < 0.05 {
        return vec![1.0];
    }
    let radius = (3.0 * sigma) as i64 + 1;
    let taps: Vec<f64> = (-radius..=radius).map(|i| exp(-0.5 * (i as f64 / sigma) * (i as f64 / sigma))).collect();
    let sum: f64 = taps.iter().sum();
    taps.iter().map(|t| (t / sum) as f32).collect()
}

/// Convolves periodic lines of `n` samples, `stride` apart, in place.
fn filter_axis(data: &mut [f32], starts: impl Iterator<Item = usize>, stride: usize, n: usize, taps: &[f32]) {
    let radius = taps.len() / 2;
    // The line with `radius` samples of its continuation at both ends.
    let mut line = vec![0.0f32; n + 2 * radius];
    let first = n - radius % n;
    for start in starts {
        let mut from = first % n;
        for v in line.iter_mut() {
            *v = data[start + from * stride];
            from += 1;
            if from == n {
                from = 0;
            }
        }
        for (i, window) in line.windows(taps.len()).enumerate() {
            data[start + i * stride] = window.iter().zip(taps).map(|(v, t)| v * t).sum();
        }
    }
}

fn normalise(data: &mut [f32]) {
    let n = data.len() as f64;
    let mean = data.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = data.iter().map(|&v| (f64::from(v) - mean) * (f64::from(v) - mean)).sum::<f64>() / n;
    let gain = 1.0 / variance.sqrt().max(1e-12);
    for v in data.iter_mut() {
        *v = ((f64::from(*v) - mean) * gain) as f32;
    }
}

/// Smooth periodic noise, 64 cells along each axis, correlation length about 1.3 cells, unit variance.
pub(super) struct Tile3 {
    data: Vec<f32>,
}

impl Tile3 {
    pub(super) fn new(seed: u64) -> Self {
        let mut data: Vec<f32> = (0..TILE * TILE * TILE).map(|i| bell(mix64(seed ^ mix64(i as u64)))).collect();
        let taps = gaussian(1.3);
        filter_axis(&mut data, (0..TILE * TILE).map(|i| i * TILE), 1, TILE, &taps);
        filter_axis(&mut data, (0..TILE * TILE).map(|i| i / TILE * TILE * TILE + i % TILE), TILE, TILE, &taps);
        filter_axis(&mut data, 0..TILE * TILE, TILE * TILE, TILE, &taps);
        normalise(&mut data);
        Self { data }
    }

    /// Trilinear sample at a point given in cells, |coordinate| < 8192.
    #[inline]
    pub(super) fn at(&self, x: f32, y: f32, z: f32) -> f32 {
        const M: usize = TILE - 1;
        let (x, y, z) = (x + OFFSET, y + OFFSET, z + OFFSET);
        let (ix, iy, iz) = (x as u32 as usize, y as u32 as usize, z as u32 as usize);
        let (fx, fy, fz) = (x - ix as f32, y - iy as f32, z - iz as f32);
        let (x0, x1) = (ix & M, (ix + 1) & M);
        let (y0, y1) = ((iy & M) * TILE, ((iy + 1) & M) * TILE);
        let (z0, z1) = ((iz & M) * TILE * TILE, ((iz + 1) & M) * TILE * TILE);
        let d = &self.data;
        let row = |zy: usize| {
            let a = d[zy + x0];
            a + (d[zy + x1] - a) * fx
        };
        let a = row(z0 + y0);
        let b = row(z0 + y1);
        let c = row(z1 + y0);
        let e = row(z1 + y1);
        let low = a + (b - a) * fy;
        let high = c + (e - c) * fy;
        low + (high - low) * fz
    }
}

/// Polygon edges: 1 on the wall between two Voronoi cells, 0 inside a cell. Period 48 mm, cells about 6.9 mm (a
/// secondary lobule is 5 to 25 mm).
pub(super) struct SeptaTile {
    data: Vec<f32>,
}

impl SeptaTile {
    const N: usize = 64;
    const CELLS: usize = 7;
    /// Tile samples per millimetre.
    pub(super) const PER_MM: f32 = Self::N as f32 / 48.0;

    pub(super) fn new(seed: u64) -> Self {
        let cells = Self::CELLS as i64;
        let pitch = Self::N as f64 / cells as f64;
        let mut points = Vec::with_capacity(Self::CELLS.pow(3));
        for c in 0..cells * cells * cells {
            let cell = [c % cells, c / cells % cells, c / cells / cells];
            let jitter = |axis: u64| {
                let h = hash_all(&[seed, c as u64, axis]);
                0.1 + 0.8 * (h >> 11) as f64 / (1u64 << 53) as f64
            };
            points.push([0, 1, 2].map(|a| (cell[a] as f64 + jitter(a as u64)) * pitch));
        }
        // Width of a wall: 1.1 mm across, in tile samples of the difference of the two nearest distances.
        let wall = 1.1 * f64::from(Self::PER_MM);
        let n = Self::N;
        let data = (0..n * n * n)
            .into_par_iter()
            .map(|i| {
                let p = [(i % n) as f64, (i / n % n) as f64, (i / n / n) as f64];
                let home = p.map(|v| (v / pitch) as i64);
                let (mut first, mut second) = (f64::MAX, f64::MAX);
                for dz in -1..=1 {
                    for dy in -1..=1 {
                        for dx in -1..=1 {
                            let c = [home[0] + dx, home[1] + dy, home[2] + dz];
                            let w = c.map(|v| v.rem_euclid(cells));
                            let q = points[(w[0] + cells * (w[1] + cells * w[2])) as usize];
                            let mut d = 0.0;
                            for a in 0..3 {
                                let e = q[a] + (c[a] - w[a]) as f64 * pitch - p[a];
                                d += e * e;
                            }
                            if d < first {
                                second = first;
                                first = d;
                            } else if d < second {
                                second = d;
                            }
                        }
                    }
                }
                (1.0 - (second.sqrt() - first.sqrt()) / wall).clamp(0.0, 1.0) as f32
            })
            .collect();
        Self { data }
    }

    /// Nearest sample at a point given in tile samples.
    #[inline]
    pub(super) fn at(&self, x: f32, y: f32, z: f32) -> f32 {
        const M: usize = SeptaTile::N - 1;
        let ix = (x + OFFSET + 0.5) as u32 as usize & M;
        let iy = (y + OFFSET + 0.5) as u32 as usize & M;
        let iz = (z + OFFSET + 0.5) as u32 as usize & M;
        self.data[(iz * Self::N + iy) * Self::N + ix]
    }
}

/// Periodic image noise of unit variance: white noise through the difference of two Gaussians.
struct Tile2 {
    n: usize,
    data: Vec<f32>,
}

impl Tile2 {
    /// `n` is the period in pixels; the band lies between the two deviations (x, y), in pixels.
    fn new(seed: u64, n: usize, low: [f64; 2], high: [f64; 2]) -> Self {
        let white: Vec<f32> = (0..n * n).map(|i| bell(mix64(seed ^ mix64(i as u64 + 1)))).collect();
        let blur = |sigma: [f64; 2]| {
            let mut data = white.clone();
            filter_axis(&mut data, (0..n).map(|r| r * n), 1, n, &gaussian(sigma[0]));
            filter_axis(&mut data, 0..n, n, n, &gaussian(sigma[1]));
            data
        };
        let (fine, coarse) = (blur(low), blur(high));
        let mut data: Vec<f32> = fine.iter().zip(&coarse).map(|(a, b)| a - b).collect();
        normalise(&mut data);
        Self { n, data }
    }

    /// Adds `gain` times the row at `(row + shift.1, 0 + shift.0)` to `out`.
    fn add_row(&self, row: usize, shift: (usize, usize), gain: f32, out: &mut [f32]) {
        let start = (row + shift.1) % self.n * self.n;
        let line = &self.data[start..start + self.n];
        let mut c = shift.0 % self.n;
        for o in out.iter_mut() {
            *o += gain * line[c];
            c += 1;
            if c == self.n {
                c = 0;
            }
        }
    }
}

/// Image noise of a series.
pub(super) struct SliceNoise {
    seed: u64,
    tiles: [Tile2; 2],
    streaks: Tile2,
}

impl SliceNoise {
    /// Periods; coprime, so that their sum repeats only after 257 * 241 pixels.
    const PERIODS: [usize; 2] = [257, 241];
    /// Share of a slice's noise that its neighbour has too (overlapping reconstruction).
    const NEIGHBOUR: f32 = 0.4;

    /// `low_mm` and `high_mm` bound the noise band of the reconstruction kernel.
    pub(super) fn new(seed: u64, pixel_spacing_mm: f64, low_mm: f64, high_mm: f64) -> Self {
        let low = [low_mm / pixel_spacing_mm; 2];
        let high = [(high_mm / pixel_spacing_mm).max(low[0] + 0.5); 2];
        let (tiles, streaks) = rayon::join(
            || [0, 1].map(|i| Tile2::new(hash_all(&[seed, i as u64]), Self::PERIODS[i], low, high)),
            || Tile2::new(hash_all(&[seed, 7]), 251, [10.0 / pixel_spacing_mm, low[1]], [25.0 / pixel_spacing_mm, 3.0]),
        );
        Self { seed, tiles, streaks }
    }

    /// Writes the noise of one row, unit variance, into `out`; horizontal streaks into `streak`.
    pub(super) fn row(&self, slice: usize, row: usize, out: &mut [f32], streak: &mut [f32]) {
        out.fill(0.0);
        streak.fill(0.0);
        let total = (2.0 * (1.0 + Self::NEIGHBOUR * Self::NEIGHBOUR)).sqrt();
        for (part, gain) in [(slice, 1.0 / total), (slice + 1, Self::NEIGHBOUR / total)] {
            for (i, tile) in self.tiles.iter().enumerate() {
                let h = hash_all(&[self.seed, part as u64, 11 + i as u64]);
                let shift = ((h & 0xffff) as usize, (h >> 16 & 0xffff) as usize);
                tile.add_row(row, shift, gain, out);
            }
        }
        let h = hash_all(&[self.seed, slice as u64, 99]);
        self.streaks.add_row(row, ((h & 0xffff) as usize, (h >> 16 & 0xffff) as usize), 1.0, streak);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slice_noise_has_unit_variance_and_differs_between_slices() {
        let noise = SliceNoise::new(5, 0.7, 0.5, 2.0);
        let (mut a, mut b, mut s) = (vec![0.0; 400], vec![0.0; 400], vec![0.0; 400]);
        let (mut square, mut product, mut n) = (0.0f64, 0.0f64, 0.0f64);
        for row in 0..200 {
            noise.row(3, row, &mut a, &mut s);
            noise.row(9, row, &mut b, &mut s);
            for (x, y) in a.iter().zip(&b) {
                square += f64::from(x * x);
                product += f64::from(x * y);
                n += 1.0;
            }
        }
        assert!((square / n - 1.0).abs() < 0.1, "variance {}", square / n);
        assert!((product / n).abs() < 0.1, "correlation {}", product / n);
    }

    #[test]
    fn smooth_noise_is_periodic() {
        let tile = Tile3::new(1);
        let d = tile.at(3.3, 4.4, 5.5) - tile.at(3.3 + 64.0, 4.4 - 64.0, 5.5);
        assert!(d.abs() < 1e-2);
    }
}
