// Resampling on the GPU: HU to one in-plane plane, and planes to the network's input.
//
//   in_plane_f32, one thread an output pixel:
//     out = 0
//     for each tap c along stored columns, ascending:
//       s = 0
//       for each tap r along stored rows, ascending:  s = s + w_r * window(hu[r, c])
//       out = out + w_c * s
//   gather_f32, one thread a pixel of one plane of the input:
//     out = 0
//     for each slice with weight in the plane, ascending:  out = out + w * slice[pixel]
//
// These are the sums of resample/cpu.rs in the same order, with separate multiplications and additions (no fused
// multiply-add), so the results are the same to the bit on both sides. The two passes of the separable filter are nested
// here instead of made one after the other: at 512 to 224 pixels a thread reads 14 values, nearly all from the
// first-level cache, and no intermediate image exists; a plane of 224 x 224 takes 0.7 million multiplications.
//
// Tables are words of 32 bits, packed by resample/cuda.rs. Included in the program as text and compiled at run time. A
// test compiles the same text as C++ for the processor.

// One axis: words 0 outputs, 1 stored pixel of an output's step (+1 or -1, as a signed number), then for each output its
// first stored pixel, then outputs + 1 bounds of its weights, then all weights.
__device__ static inline float weight_at(const unsigned* words, unsigned at) {
    return __uint_as_float(words[at]);
}

__device__ static inline float windowed(short hu, float low, float inverse_width) {
    float scaled = __fmul_rn(__fsub_rn((float)hu, low), inverse_width);
    return fminf(fmaxf(scaled, 0.0f), 1.0f);
}

// `plan`: words 0 length of the rows' table, 1 step in `out` of an output along stored rows, 2 the same along stored
// columns, 3 stored columns of the slice; then the rows' table, then the columns' table.
// Grid: x over outputs along stored columns, y over outputs along stored rows; neighbours in x read neighbours in memory.
extern "C" __global__ void in_plane_f32(const short* hu, const unsigned* plan, float low, float inverse_width,
                                        float* out) {
    const unsigned* rows = plan + 4;
    const unsigned* columns = rows + plan[0];
    unsigned x = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned y = blockIdx.y * blockDim.y + threadIdx.y;
    unsigned n_rows = rows[0], n_columns = columns[0];
    if (x >= n_columns || y >= n_rows) {
        return;
    }
    int row_step = (int)rows[1], column_step = (int)columns[1];
    int row0 = (int)rows[2 + y], column0 = (int)columns[2 + x];
    const unsigned* row_bounds = rows + 2 + n_rows;
    const unsigned* column_bounds = columns + 2 + n_columns;
    const unsigned* row_weights = row_bounds + n_rows + 1;
    const unsigned* column_weights = column_bounds + n_columns + 1;
    unsigned row_begin = row_bounds[y], row_taps = row_bounds[y + 1] - row_begin;
    unsigned column_begin = column_bounds[x], column_taps = column_bounds[x + 1] - column_begin;
    int pitch = (int)plan[3];
    float sum = 0.0f;
    for (unsigned c = 0; c < column_taps; ++c) {
        const short* at = hu + (long long)row0 * pitch + (column0 + column_step * (int)c);
        float along_rows = 0.0f;
        for (unsigned r = 0; r < row_taps; ++r) {
            float value = windowed(*at, low, inverse_width);
            along_rows = __fadd_rn(along_rows, __fmul_rn(weight_at(row_weights, row_begin + r), value));
            at += (long long)row_step * pitch;
        }
        sum = __fadd_rn(sum, __fmul_rn(weight_at(column_weights, column_begin + c), along_rows));
    }
    out[y * plan[1] + x * plan[2]] = sum;
}

// `plan`: words 0 planes, 1 slices with weight in all planes together; then planes + 1 bounds, then for each of those
// slices its index in `slices`, then its weight.
// Grid: x over pixels of a plane, y over planes.
extern "C" __global__ void gather_f32(const unsigned long long* slices, const unsigned* plan, unsigned area, float* out) {
    unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned plane = blockIdx.y;
    if (pixel >= area) {
        return;
    }
    const unsigned* bounds = plan + 2;
    const unsigned* indices = bounds + plan[0] + 1;
    const unsigned* weights = indices + plan[1];
    float sum = 0.0f;
    for (unsigned k = bounds[plane]; k < bounds[plane + 1]; ++k) {
        const float* slice = (const float*)slices[indices[k]];
        sum = __fadd_rn(sum, __fmul_rn(weight_at(weights, k), slice[pixel]));
    }
    out[(unsigned long long)plane * area + pixel] = sum;
}
