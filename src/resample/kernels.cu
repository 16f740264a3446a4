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
//   texture_f32, one thread a column of a strip of rows of one plane:
//     q = floor(levels * v + 1/2); differences to the next one and two along D, H and W, as whole numbers
// Its sums are exact, so that their order does not matter: a warp adds its own up, then to the total of all.
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

__device__ static inline int level_of(float value, float levels) {
    return (int)__fadd_rn(__fmul_rn(levels, value), 0.5f);
}

// Adds the sum over a warp to `total`; all its threads call this.
__device__ static inline void add_to_total(unsigned sum, unsigned long long* total) {
#ifdef __CUDA_ARCH__
    for (int apart = 16; apart > 0; apart /= 2) {
        sum += __shfl_down_sync(0xffffffffu, sum, apart);
    }
    if (threadIdx.x % 32 != 0) {
        return;
    }
#endif
    atomicAdd(total, (unsigned long long)sum);
}

// `input`: depth x height x width; `sums`: along D, H and W each first differences, the same clipped, second
// differences, the same clipped. Threads: a multiple of 32 along x.
// Grid: x over columns, y over planes, z over strips of `rows` rows.
extern "C" __global__ void texture_f32(const float* input, unsigned depth, unsigned height, unsigned width, unsigned rows,
                                       float levels, int clip, unsigned long long* sums) {
    unsigned x = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned plane = blockIdx.y;
    unsigned y0 = blockIdx.z * rows;
    unsigned long long area = (unsigned long long)height * width;
    // A term is at most 4 * levels: sums of a strip fit 32 bits.
    unsigned found[12] = {0};
    for (unsigned y = y0; x < width && y < height && y < y0 + rows; ++y) {
        const float* here = input + plane * area + (unsigned long long)y * width + x;
        int a = level_of(*here, levels);
        unsigned long long steps[3] = {area, width, 1};
        unsigned left[3] = {depth - 1 - plane, height - 1 - y, width - 1 - x};
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int axis = 0; axis < 3; ++axis) {
            if (left[axis] < 1) {
                continue;
            }
            int b = level_of(here[steps[axis]], levels);
            int first = abs(b - a);
            found[4 * axis] += first;
            found[4 * axis + 1] += min(first, clip);
            if (left[axis] < 2) {
                continue;
            }
            int second = abs(a - 2 * b + level_of(here[2 * steps[axis]], levels));
            found[4 * axis + 2] += second;
            found[4 * axis + 3] += min(second, clip);
        }
    }
    for (int i = 0; i < 12; ++i) {
        add_to_total(found[i], sums + i);
    }
}
