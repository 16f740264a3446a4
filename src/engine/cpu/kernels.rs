//! The arithmetic of the cpu backend on slices.
//!
//! Activations are channels-last with a border of one zero voxel on all six sides ([`Padded`]): a 3x3x3 convolution
//! then has no edge cases, and for one row of taps the three taps times the input channels of an output voxel are one
//! contiguous run of `3 * c_in` floats. So a convolution is nine matrix products without an im2col buffer:
//!
//! ```text
//! for (kz, ky):                                   9 taps
//!     for each panel of 32 outputs:
//!         dst[voxel, co] += x[voxel .. voxel + 3, :] (3 c_in)  *  w[kz, ky] (3 c_in x c_out)
//! ```
//!
//! At stride 1 the rows of one block are one product: voxels of consecutive rows are `w + 2` apart, the two voxels
//! between rows are computed and dropped (2 / (w + 2): 1.8 % at 112, 12.5 % at 14). At stride 2 each row is a product.
//! The stem has one input channel, so its 147 taps are gathered into a patch matrix first (1/64 of its multiply-adds).
//!
//! Arithmetic: a block's `dst` is at most 64 Ki floats (256 KiB, half of a small L2) and is read and written nine times;
//! with `c_in` = 64 that is 192 multiply-adds for each load and store. The weights of one tap are at most
//! 3 * 512 * 512 floats (3 MiB) and stream from the next level once a block. The products run in the `gemm` crate, which
//! picks AVX-512, AVX2 with FMA, NEON or plain code at run time; [`PANEL`] says what was measured of them.
//!
//! No state, no logging. `gemm` itself allocates a few dozen bytes of bookkeeping a call, and packs the weights into a
//! thread-local slab the size of the L2 cache that it allocates once.
#![allow(unsafe_code)]

/// A channels-last volume with a border of one voxel: index `((z * (h + 2) + y) * (w + 2) + x) * c + channel`, the
/// voxel (0, 0, 0) lying at z = y = x = 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padded {
    /// Channels.
    pub c: usize,
    /// Planes, rows and columns without the border.
    pub dhw: [usize; 3],
}

impl Padded {
    /// Floats of a row, border included.
    pub fn row_len(&self) -> usize {
        (self.dhw[2] + 2) * self.c
    }

    /// Floats of a plane, border included.
    pub fn plane_len(&self) -> usize {
        (self.dhw[1] + 2) * self.row_len()
    }

    /// Floats in all.
    pub fn len(&self) -> usize {
        (self.dhw[0] + 2) * self.plane_len()
    }

    /// Whether there is no float.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets the border to zero.
    pub fn zero_border(&self, data: &mut [f32]) {
        let [d, h, w] = self.dhw;
        let (row, plane, c) = (self.row_len(), self.plane_len(), self.c);
        data[..plane].fill(0.0);
        data[(d + 1) * plane..(d + 2) * plane].fill(0.0);
        for z in 1..=d {
            let plane = &mut data[z * plane..(z + 1) * plane];
            plane[..row].fill(0.0);
            plane[(h + 1) * row..].fill(0.0);
            for y in 1..=h {
                let line = &mut plane[y * row..(y + 1) * row];
                line[..c].fill(0.0);
                line[(w + 1) * c..].fill(0.0);
            }
        }
    }
}

/// Outputs that one product computes at a time. The `gemm` crate keeps 48 x 8 sums in AVX-512 registers; products of at
/// most 48 outputs ran at 70 to 77 G multiply-adds a second on one core of an EPYC 9005, wider ones at 25 to 35.
pub const PANEL: usize = 32;

/// Where weight `(k, i)` of a `depth` x `m` matrix lies: panels of [`PANEL`] outputs (the last may be narrower), each
/// `[depth][outputs]`.
pub fn panel_index([depth, m]: [usize; 2], k: usize, i: usize) -> usize {
    let first = i / PANEL * PANEL;
    first * depth + k * PANEL.min(m - first) + i - first
}

/// `dst[j * m + i] = (accumulate ? dst[j * m + i] : 0) + sum over k of w(k, i) * x[j * x_stride + k]`
/// for `i < m`, `j < n`, `k < depth`; `w` in panels ([`panel_index`]), and rows of `x` may overlap.
///
/// # Panics
/// If a slice is shorter than that reaches.
pub fn gemm_f32([m, n, depth]: [usize; 3], dst: &mut [f32], accumulate: bool, w: &[f32], x: &[f32], x_stride: usize) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(dst.len() >= n * m, "gemm: dst is too short");
    assert!(w.len() >= depth * m, "gemm: weights are too short");
    assert!(x.len() >= (n - 1) * x_stride + depth, "gemm: input is too short");
    for first in (0..m).step_by(PANEL) {
        let outputs = PANEL.min(m - first);
        let panel = &w[first * depth..(first + outputs) * depth];
        // SAFETY: every element addressed below lies inside its slice: dst (outputs x n, strides 1 and m, from `first`)
        // ends at (n - 1) * m + first + outputs <= n * m, lhs (outputs x depth, strides 1 and outputs) at the end of
        // `panel`, rhs (depth x n, strides 1 and x_stride) at (n - 1) * x_stride + depth; the assertions above compare
        // those with the slices. `dst` is exclusively borrowed and overlaps neither operand. All are f32.
        unsafe {
            gemm::gemm(
                outputs,
                n,
                depth,
                dst[first..].as_mut_ptr(),
                m as isize,
                1,
                accumulate,
                panel.as_ptr(),
                outputs as isize,
                1,
                x.as_ptr(),
                x_stride as isize,
                1,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// One block of rows of a 3x3x3 convolution: `dst[voxel, co]`, voxels `pitch` apart from row to row, where `pitch` is
/// `w + 2` at stride 1 and the output's width at stride 2.
///
/// `weights` is `[9]` matrices `3 * c_in` x `c_out` in panels. `z`, `y` are the first output row's indices, `rows` their number.
pub fn conv3_rows(
    input: &[f32],
    shape: Padded,
    stride: usize,
    weights: &[f32],
    output: Padded,
    [z, y, rows]: [usize; 3],
    dst: &mut [f32],
) {
    let (c_out, out_w) = (output.c, output.dhw[2]);
    let depth = 3 * shape.c;
    let (row, plane) = (shape.row_len(), shape.plane_len());
    for (tap, w) in weights.chunks_exact(depth * c_out).enumerate() {
        let (kz, ky) = (tap / 3, tap % 3);
        let base = (stride * z + kz) * plane + (stride * y + ky) * row;
        if stride == 1 {
            let pitch = out_w + 2;
            let n = (rows - 1) * pitch + out_w;
            gemm_f32([c_out, n, depth], dst, tap > 0, w, &input[base..], shape.c);
        } else {
            for (r, dst) in dst.chunks_exact_mut(out_w * c_out).take(rows).enumerate() {
                let x = &input[base + r * stride * row..];
                gemm_f32([c_out, out_w, depth], dst, tap > 0, w, x, stride * shape.c);
            }
        }
    }
}

/// One block of rows of a 1x1x1 convolution of stride 2, the shortcut: `dst[voxel, co]`, rows `out_w` voxels apart.
pub fn shortcut_rows(
    input: &[f32],
    shape: Padded,
    weights: &[f32],
    output: Padded,
    [z, y, rows]: [usize; 3],
    dst: &mut [f32],
) {
    let (c_out, out_w) = (output.c, output.dhw[2]);
    let (row, plane) = (shape.row_len(), shape.plane_len());
    for (r, dst) in dst.chunks_exact_mut(out_w * c_out).take(rows).enumerate() {
        let at = (2 * z + 1) * plane + (2 * (y + r) + 1) * row + shape.c;
        gemm_f32([c_out, out_w, shape.c], dst, false, weights, &input[at..], 2 * shape.c);
    }
}

/// Taps of the stem: 3 x 7 x 7.
pub const STEM_TAPS: usize = 3 * 7 * 7;

/// The patches of a block of the stem's output rows, `[voxel][147]`, zeros outside the input.
///
/// `input` is D, H, W without a border; kernel (3, 7, 7), stride (1, 2, 2), padding (1, 3, 3).
pub fn stem_patches(input: &[f32], [d, h, w]: [usize; 3], [z, y, rows]: [usize; 3], out_w: usize, patches: &mut [f32]) {
    for r in 0..rows {
        for kz in 0..3 {
            for ky in 0..7 {
                let at = r * out_w * STEM_TAPS + (kz * 7 + ky) * 7;
                let (iz, iy) = (z + kz, 2 * (y + r) + ky);
                let inside = (1..=d).contains(&iz) && (3..h + 3).contains(&iy);
                let line = if inside {
                    let start = ((iz - 1) * h + iy - 3) * w;
                    &input[start..start + w]
                } else {
                    &[]
                };
                for x in 0..out_w {
                    let patch = &mut patches[at + x * STEM_TAPS..][..7];
                    // taps k cover the columns 2x + k - 3
                    let column = 2 * x;
                    if !inside {
                        patch.fill(0.0);
                    } else if column >= 3 && column + 4 <= w {
                        patch.copy_from_slice(&line[column - 3..column + 4]);
                    } else {
                        for (k, v) in patch.iter_mut().enumerate() {
                            let source = (column + k).checked_sub(3).and_then(|i| line.get(i));
                            *v = source.copied().unwrap_or(0.0);
                        }
                    }
                }
            }
        }
    }
}

/// The larger of both; what is not a number stays so, and is found in the logits. One instruction.
#[inline]
pub fn at_least(floor: f32, v: f32) -> f32 {
    if floor > v { floor } else { v }
}

/// Writes a block of computed rows to its place: adds the bias, applies ReLU if asked.
///
/// `src` is `[row][pitch][c]`, `out` rows with their border voxels. If `sums` is not empty, it receives each channel's
/// sum over the block.
pub fn finish_rows(
    src: &[f32],
    pitch: usize,
    bias: &[f32],
    relu: bool,
    out: &mut [f32],
    out_w: usize,
    sums: &mut [f64],
) {
    let c = bias.len();
    sums.fill(0.0);
    let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
    for (r, row) in out.chunks_exact_mut((out_w + 2) * c).enumerate() {
        let voxels = row[c..(out_w + 1) * c].chunks_exact_mut(c);
        for (voxel, src) in voxels.zip(src[r * pitch * c..].chunks_exact(c)) {
            for ((v, s), b) in voxel.iter_mut().zip(src).zip(bias) {
                *v = at_least(floor, s + b);
            }
            for (sum, v) in sums.iter_mut().zip(voxel.iter()) {
                *sum += f64::from(*v);
            }
        }
    }
}

/// `x = relu(x + scale * y)` on a block of rows with their border voxels; `sums` receives each channel's sum.
pub fn merge_identity(x: &mut [f32], y: &[f32], scale: &[f32], out_w: usize, sums: &mut [f64]) {
    let c = scale.len();
    sums.fill(0.0);
    let row_len = (out_w + 2) * c;
    for (x, y) in x.chunks_exact_mut(row_len).zip(y.chunks_exact(row_len)) {
        let voxels = x[c..(out_w + 1) * c].chunks_exact_mut(c);
        for (x, y) in voxels.zip(y[c..].chunks_exact(c)) {
            for ((v, y), s) in x.iter_mut().zip(y).zip(scale) {
                *v = at_least(0.0, *v + s * y);
            }
            for (sum, v) in sums.iter_mut().zip(x.iter()) {
                *sum += f64::from(*v);
            }
        }
    }
}

/// `y = relu(shortcut + bias + scale * y)` on a block of rows with their border voxels; `shortcut` is
/// `[row][out_w][c]`; `sums` receives each channel's sum.
pub fn merge_shortcut(y: &mut [f32], shortcut: &[f32], bias: &[f32], scale: &[f32], out_w: usize, sums: &mut [f64]) {
    let c = scale.len();
    sums.fill(0.0);
    let rows = y.chunks_exact_mut((out_w + 2) * c);
    for (y, shortcut) in rows.zip(shortcut.chunks_exact(out_w * c)) {
        let voxels = y[c..(out_w + 1) * c].chunks_exact_mut(c);
        for (y, shortcut) in voxels.zip(shortcut.chunks_exact(c)) {
            for (((v, t), b), s) in y.iter_mut().zip(shortcut).zip(bias).zip(scale) {
                *v = at_least(0.0, t + b + s * *v);
            }
            for (sum, v) in sums.iter_mut().zip(y.iter()) {
                *sum += f64::from(*v);
            }
        }
    }
}

/// `out[i] = bias[i] + sum over k of w[i][k] * x[k]`, summed in f64.
pub fn linear(w: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) {
    for ((row, b), out) in w.chunks_exact(x.len()).zip(bias).zip(out) {
        let dot: f64 = row.iter().zip(x).map(|(w, v)| f64::from(*w) * f64::from(*v)).sum();
        *out = (dot + f64::from(*b)) as f32;
    }
}

/// The vector instructions that the matrix products use here, best first found.
pub fn isa() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "avx2+fma";
        }
    }
    if cfg!(target_arch = "aarch64") {
        return "neon";
    }
    "scalar"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic::Stream;
    use proptest::prelude::*;

    fn padded(shape: Padded, seed: u64) -> Vec<f32> {
        let mut data = Stream::new(seed, "x").fill(shape.len(), 0.0, 1.0);
        shape.zero_border(&mut data);
        data
    }

    fn close(a: f32, b: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-4 * b.abs().max(1.0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn gemm_matches_its_definition(
            m in 1_usize..70, n in 1_usize..40, depth in 1_usize..50, stride in 1_usize..60, accumulate: bool,
        ) {
            let w = Stream::new(1, "w").fill(depth * m, 0.0, 1.0);
            let x = Stream::new(2, "x").fill((n - 1) * stride + depth, 0.0, 1.0);
            let before = Stream::new(3, "d").fill(n * m, 0.0, 1.0);
            let mut dst = before.clone();
            gemm_f32([m, n, depth], &mut dst, accumulate, &w, &x, stride);
            for j in 0..n {
                for i in 0..m {
                    let start = if accumulate { f64::from(before[j * m + i]) } else { 0.0 };
                    let expected: f64 = start + (0..depth)
                        .map(|k| f64::from(w[panel_index([depth, m], k, i)]) * f64::from(x[j * stride + k]))
                        .sum::<f64>();
                    prop_assert!(close(dst[j * m + i], expected));
                }
            }
        }

        #[test]
        fn a_block_of_convolution_rows_matches_its_definition(
            c_in in 1_usize..6, c_out in 1_usize..40, d in 1_usize..5, h in 1_usize..8, w in 1_usize..9,
            stride in 1_usize..3, pick in 0_usize..100,
        ) {
            let shape = Padded { c: c_in, dhw: [d, h, w] };
            let [od, oh, ow] = shape.dhw.map(|n| (n - 1) / stride + 1);
            let input = padded(shape, 5);
            let weights = Stream::new(6, "w").fill(27 * c_in * c_out, 0.0, 1.0);
            let (z, y) = (pick % od, pick % oh);
            let rows = oh - y;
            let pitch = if stride == 1 { ow + 2 } else { ow };
            let mut dst = vec![f32::NAN; rows * pitch * c_out];
            conv3_rows(&input, shape, stride, &weights, Padded { c: c_out, dhw: [od, oh, ow] }, [z, y, rows], &mut dst);
            for r in 0..rows {
                for x in 0..ow {
                    for co in 0..c_out {
                        let mut expected = 0.0;
                        for k in 0..27 {
                            let (kz, ky, kx) = (k / 9, k / 3 % 3, k % 3);
                            for ci in 0..c_in {
                                let at = (stride * z + kz) * shape.plane_len()
                                    + (stride * (y + r) + ky) * shape.row_len()
                                    + (stride * x + kx) * c_in + ci;
                                let depth = 3 * c_in;
                                let w = k / 3 * depth * c_out + panel_index([depth, c_out], kx * c_in + ci, co);
                                expected += f64::from(weights[w])
                                    * f64::from(input[at]);
                            }
                        }
                        prop_assert!(close(dst[(r * pitch + x) * c_out + co], expected));
                    }
                }
            }
        }

        #[test]
        fn stem_patches_match_their_definition(d in 1_usize..4, h in 1_usize..12, w in 1_usize..12) {
            let input = Stream::new(9, "i").fill(d * h * w, 0.5, 0.5);
            let [oh, ow] = [h, w].map(|n| (n - 1) / 2 + 1);
            for z in 0..d {
                let mut patches = vec![f32::NAN; oh * ow * STEM_TAPS];
                stem_patches(&input, [d, h, w], [z, 0, oh], ow, &mut patches);
                for (i, &got) in patches.iter().enumerate() {
                    let (voxel, tap) = (i / STEM_TAPS, i % STEM_TAPS);
                    let iz = (z + tap / 49).checked_sub(1);
                    let iy = (2 * (voxel / ow) + tap / 7 % 7).checked_sub(3);
                    let ix = (2 * (voxel % ow) + tap % 7).checked_sub(3);
                    let expected = match (iz, iy, ix) {
                        (Some(z), Some(y), Some(x)) if z < d && y < h && x < w => input[(z * h + y) * w + x],
                        _ => 0.0,
                    };
                    prop_assert_eq!(got, expected);
                }
            }
        }
    }

    #[test]
    fn the_border_alone_is_zeroed() {
        let shape = Padded { c: 2, dhw: [2, 3, 4] };
        let mut data = vec![1.0; shape.len()];
        shape.zero_border(&mut data);
        let inside = data.iter().filter(|v| **v == 1.0).count();
        assert_eq!(inside, 2 * 2 * 3 * 4);
        assert_eq!(data[shape.plane_len() + shape.row_len() + 2], 1.0);
    }

    #[test]
    #[should_panic(expected = "input is too short")]
    fn a_short_input_never_reaches_the_unchecked_code() {
        gemm_f32([2, 3, 4], &mut [0.0; 6], false, &[0.0; 8], &[0.0; 11], 4);
    }
}
