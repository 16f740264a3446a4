//! The model's tensors as the GPU wants them: batch normalisation folded, f16, in the order kernels read them.
//!
//! Pure: no device. Invariants: folding is done in f64 and rounded once; the order is drawn at each function.
//!
//! Deliberately absent: which kernel takes which order; `conv` decides.

use half::f16;

use crate::model::Model;
use crate::model::architecture::BN_EPSILON;

/// A convolution's folded weights, `c_out` x taps (kd, kh, kw) x `c_in`, and one bias an output channel.
#[derive(Clone, Debug)]
pub(super) struct Folded {
    pub c_in: usize,
    pub c_out: usize,
    /// Taps along depth, rows and columns.
    pub kernel_dhw: [usize; 3],
    pub weights: Vec<f16>,
    pub bias: Vec<f32>,
}

/// Folds `bn` into `conv`: `w' = w g / sqrt(var + eps)`, `b' = beta - mean g / sqrt(var + eps)`.
pub(super) fn fold(model: &Model, conv: &str, bn: &str) -> Folded {
    let tensor = model.weights.tensor(&format!("{conv}.weight"));
    let &[c_out, c_in, kd, kh, kw] = tensor.shape.as_slice() else {
        panic!("a convolution's kernel has five axes");
    };
    let part = |suffix: &str| model.weights.get(&format!("{bn}.{suffix}"));
    let (gamma, beta, mean, var) = (part("weight"), part("bias"), part("running_mean"), part("running_var"));
    let taps = kd * kh * kw;
    let mut weights = Vec::with_capacity(c_out * taps * c_in);
    let mut bias = Vec::with_capacity(c_out);
    for k in 0..c_out {
        let scale = f64::from(gamma[k]) / (f64::from(var[k]) + f64::from(BN_EPSILON)).sqrt();
        bias.push((f64::from(beta[k]) - f64::from(mean[k]) * scale) as f32);
        for tap in 0..taps {
            for c in 0..c_in {
                let w = f64::from(tensor.data[(k * c_in + c) * taps + tap]) * scale;
                weights.push(f16::from_f64(w));
            }
        }
    }
    Folded { c_in, c_out, kernel_dhw: [kd, kh, kw], weights, bias }
}

/// Order of the row taps in `conv_sm90.cu`: with stride 2 the rows of one parity serve kh = 0 and 2.
const fn row_taps(stride: usize) -> [usize; 3] {
    if stride == 2 { [0, 2, 1] } else { [0, 1, 2] }
}

/// For `conv_sm90.cu`: groups of `rows` output channels, then groups of 64 input channels, then taps in the order kw, kd,
/// kh, then `rows` rows of 64 channels with the 16-byte pieces of row r at place `piece ^ (r % 8)`.
pub(super) fn swizzled(folded: &Folded, rows: usize, stride: usize) -> Vec<f16> {
    let (c_in, c_out) = (folded.c_in, folded.c_out);
    let [kd, kh, kw] = folded.kernel_dhw;
    assert!(kd == kh && kh == kw && (kd == 1 || kd == 3), "cubic kernels of one or three taps");
    assert!(c_in.is_multiple_of(64) && c_out.is_multiple_of(rows), "whole groups of channels");
    let taps = kd * kh * kw;
    let mut out = vec![f16::ZERO; folded.weights.len()];
    let mut at = 0;
    for group in 0..c_out / rows {
        for chunk in 0..c_in / 64 {
            for w in 0..kw {
                for d in 0..kd {
                    for i in 0..kh {
                        let h = if kh == 3 { row_taps(stride)[i] } else { i };
                        let tap = (d * kh + h) * kw + w;
                        for r in 0..rows {
                            let from = ((group * rows + r) * taps + tap) * c_in + chunk * 64;
                            for piece in 0..8 {
                                let to = at + r * 64 + (piece ^ (r % 8)) * 8;
                                out[to..to + 8]
                                    .copy_from_slice(&folded.weights[from + piece * 8..from + piece * 8 + 8]);
                            }
                        }
                        at += rows * 64;
                    }
                }
            }
        }
    }
    out
}

/// For `stem` of `layers.cu`: eleven steps of two kernel rows with eight taps each, tiles of eight output channels, the
/// two registers of each of 32 lanes. Column n of tile j is channel `(n / 2) * (C / 4) + 2 j + n % 2`.
pub(super) fn stem_fragments(folded: &Folded) -> Vec<f16> {
    let c = folded.c_out;
    assert!(folded.c_in == 1 && folded.kernel_dhw == [3, 7, 7] && c.is_multiple_of(8), "the stem's kernel");
    let value = |channel: usize, row: usize, tap: usize| {
        if row < 21 && tap < 7 { folded.weights[channel * 147 + row * 7 + tap] } else { f16::ZERO }
    };
    let mut out = Vec::with_capacity(11 * (c / 8) * 32 * 4);
    for step in 0..11 {
        for tile in 0..c / 8 {
            for lane in 0..32 {
                let n = lane / 4;
                let channel = (n / 2) * (c / 4) + 2 * tile + n % 2;
                let tap = 2 * (lane % 4);
                for row in [2 * step, 2 * step + 1] {
                    out.push(value(channel, row, tap));
                    out.push(value(channel, row, tap + 1));
                }
            }
        }
    }
    out
}

/// Depth attention's first matrix, `hidden` x (C, D), as D x `hidden` x C.
pub(super) fn by_plane(matrix: &[f32], hidden: usize, channels: usize, depth: usize) -> Vec<f32> {
    assert_eq!(matrix.len(), hidden * channels * depth, "matrix length");
    let mut out = Vec::with_capacity(matrix.len());
    for d in 0..depth {
        for j in 0..hidden {
            out.extend((0..channels).map(|c| matrix[(j * channels + c) * depth + d]));
        }
    }
    out
}

/// Depth attention's second matrix, (C, D) x `hidden`, as `hidden` x D x C; its bias is the matrix of one column.
pub(super) fn by_hidden(matrix: &[f32], hidden: usize, channels: usize, depth: usize) -> Vec<f32> {
    assert_eq!(matrix.len(), hidden * channels * depth, "matrix length");
    let mut out = Vec::with_capacity(matrix.len());
    for j in 0..hidden {
        for d in 0..depth {
            out.extend((0..channels).map(|c| matrix[(c * depth + d) * hidden + j]));
        }
    }
    out
}

/// A row-major `rows` x `columns` matrix, transposed.
pub(super) fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    assert_eq!(matrix.len(), rows * columns, "matrix length");
    let mut out = Vec::with_capacity(matrix.len());
    for c in 0..columns {
        out.extend((0..rows).map(|r| matrix[r * columns + c]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(c_in: usize, c_out: usize, kernel_dhw: [usize; 3]) -> Folded {
        let len = c_in * c_out * kernel_dhw.iter().product::<usize>();
        let weights = (0..len).map(|i| f16::from_bits((i % 31_000) as u16)).collect();
        Folded { c_in, c_out, kernel_dhw, weights, bias: vec![0.0; c_out] }
    }

    #[test]
    fn folding_is_batch_normalisation_after_the_convolution() {
        let model = Model::embedded().unwrap();
        let folded = fold(&model, "layer1.0.conv1", "layer1.0.bn1");
        let get = |name: &str| model.weights.get(name);
        let tensor = model.weights.tensor("layer1.0.conv1.weight");
        let (k, c, tap) = (3, 2, 14);
        let scale = get("layer1.0.bn1.weight")[k] / (get("layer1.0.bn1.running_var")[k] + BN_EPSILON).sqrt();
        let want = tensor.data[(k * folded.c_in + c) * 27 + tap] * scale;
        let got = folded.weights[(k * 27 + tap) * folded.c_in + c].to_f32();
        assert!((got - want).abs() <= want.abs() / 1024.0 + 1e-7, "{got} {want}");
        let shift = get("layer1.0.bn1.bias")[k] - get("layer1.0.bn1.running_mean")[k] * scale;
        assert!((folded.bias[k] - shift).abs() < 1e-5);
    }

    #[test]
    fn swizzled_weights_are_a_permutation_and_undo_to_their_places() {
        for (rows, stride) in [(64, 1), (128, 2)] {
            let folded = numbered(128, 128, [3; 3]);
            let out = swizzled(&folded, rows, stride);
            // Output channel 70, chunk 1, kw 2, kd 1, kh 2, input channel 64 + 13.
            let (k, chunk, kw, kd, kh, c) = (70, 1, 2, 1, 2, 13);
            let place = (0..3).position(|i| row_taps(stride)[i] == kh).unwrap();
            let block = (((k / rows * 2 + chunk) * 3 + kw) * 3 + kd) * 3 + place;
            let r = k % rows;
            let at = block * rows * 64 + r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8;
            let want = folded.weights[(k * 27 + (kd * 3 + kh) * 3 + kw) * 128 + chunk * 64 + c];
            assert_eq!(out[at], want);
            let mut before: Vec<u16> = folded.weights.iter().map(|w| w.to_bits()).collect();
            let mut after: Vec<u16> = out.iter().map(|w| w.to_bits()).collect();
            before.sort_unstable();
            after.sort_unstable();
            assert_eq!(before, after);
        }
    }

    #[test]
    fn stem_fragments_hold_every_weight_once_and_zeros_elsewhere() {
        let folded = Folded { weights: vec![f16::ONE; 147 * 16], ..numbered(1, 16, [3, 7, 7]) };
        let out = stem_fragments(&folded);
        assert_eq!(out.len(), 11 * 2 * 32 * 4);
        assert_eq!(out.iter().filter(|w| **w == f16::ONE).count(), 147 * 16);
        let folded = numbered(1, 16, [3, 7, 7]);
        let out = stem_fragments(&folded);
        // Step 4 has rows 8 and 9; lane 13 is column 3 and taps 2, 3; tile 1: channel (3 / 2) * 4 + 2 + 1.
        let at = ((4 * 2 + 1) * 32 + 13) * 4;
        assert_eq!(out[at], folded.weights[7 * 147 + 8 * 7 + 2]);
        assert_eq!(out[at + 3], folded.weights[7 * 147 + 9 * 7 + 3]);
    }

    #[test]
    fn attention_matrices_keep_their_values_at_their_places() {
        let (hidden, channels, depth) = (2, 3, 4);
        let matrix: Vec<f32> = (0..hidden * channels * depth).map(|i| i as f32).collect();
        let (j, c, d) = (1, 2, 3);
        let first = by_plane(&matrix, hidden, channels, depth);
        assert_eq!(first[(d * hidden + j) * channels + c], matrix[(j * channels + c) * depth + d]);
        let second = by_hidden(&matrix, hidden, channels, depth);
        assert_eq!(second[(j * depth + d) * channels + c], matrix[(c * depth + d) * hidden + j]);
    }

    #[test]
    fn transposition_swaps_axes() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
