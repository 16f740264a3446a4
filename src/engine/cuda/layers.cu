// What is not a 3 x 3 x 3 convolution: the stem, the attentions, the sum at a block's end, the pooled vector; and a plain
// convolution to hold the fast ones against. Activations are NDHWC f16, one image; sums are f32.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

__device__ __forceinline__ float low_half(u32 v) {
    float f;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(f) : "r"(v));
    return f;
}
__device__ __forceinline__ float high_half(u32 v) {
    float f;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(v));
    return f;
}
__device__ __forceinline__ float half_value(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ u16 half_bits(float f) {
    u16 v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
}
__device__ __forceinline__ u32 pack(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return half_bits(low) | (u32)half_bits(high) << 16;
#endif
}

#ifdef STEM
// The stem: 3 x 7 x 7, stride (1, 2, 2), padding (1, 3, 3), one input channel, batch normalisation folded, ReLU.
//
// Voxels are the rows of the matrix product, output channels its columns, the kernel's rows (kd, kh) with seven taps each,
// padded to eight, its inner axis: 21 rows and one of zeros make eleven steps of 16. A pair of taps of one row is then a
// pair of neighbours of the input, so operands are read from the input patch as it lies in shared memory.
//
// Macros: C output channels (a multiple of 8), ID, IH, IW input, OH, OW output, ROWS output rows a block.
// Columns are ordered so that a thread ends with C / 4 neighbouring channels of a voxel.
#define PITCH ((2 * OW + 6 + 3) / 4 * 4)
#define PATCH_ROWS (2 * ROWS + 5)
#define COLUMN_TILES (C / 8)
#define ROW_TILES ((OW + 15) / 16)
#define GROUP 2

extern "C" __global__ void __launch_bounds__(224, 2)
stem(const float* __restrict__ x, const uint2* __restrict__ weights, const float* __restrict__ bias, u16* __restrict__ y) {
    extern __shared__ __align__(16) u16 patch[];
    uint2* packed = (uint2*)(patch + 3 * PATCH_ROWS * PITCH);
    const int d = blockIdx.y, h0 = blockIdx.x * ROWS;
    for (int i = threadIdx.x; i < 11 * COLUMN_TILES * 32; i += blockDim.x) packed[i] = weights[i];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    // A row a warp; all loads of a row are under way before the first is used.
    for (int row = warp; row < 3 * PATCH_ROWS; row += warps) {
        const int id = d + row / PATCH_ROWS - 1, ih = 2 * h0 + row % PATCH_ROWS - 3;
        const bool row_inside = id >= 0 && id < ID && ih >= 0 && ih < IH;
        const float* from = x + ((u64)(row_inside ? id : 0) * IH + (row_inside ? ih : 0)) * IW - 3;
        float v[(PITCH + 31) / 32];
#pragma unroll
        for (int i = 0; i < (PITCH + 31) / 32; i++) {
            const int column = i * 32 + lane;
            v[i] = row_inside && column >= 3 && column < IW + 3 ? from[column] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < (PITCH + 31) / 32; i++) {
            const int column = i * 32 + lane;
            if (column < PITCH) patch[row * PITCH + column] = half_bits(v[i]);
        }
    }
    __syncthreads();
    const int tiles = ROWS * ROW_TILES;
    float offset[COLUMN_TILES][2];
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++) {
        offset[j][0] = bias[(lane % 4) * (C / 4) + 2 * j];
        offset[j][1] = bias[(lane % 4) * (C / 4) + 2 * j + 1];
    }
    for (int first = warp * GROUP; first < tiles; first += warps * GROUP) {
        float acc[GROUP][COLUMN_TILES][4] = {};
        int at[GROUP][2];
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const int tile = min(first + g, tiles - 1);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int w = min((tile % ROW_TILES) * 16 + lane / 4 + 8 * half, OW - 1);
                at[g][half] = 2 * (tile / ROW_TILES) * PITCH + 2 * w + 2 * (lane % 4);
            }
        }
#pragma unroll
        for (int s = 0; s < 11; s++) {
            const int r0 = 2 * s, r1 = 2 * s + 1 < 21 ? 2 * s + 1 : 0;
            const int o0 = ((r0 / 7) * PATCH_ROWS + r0 % 7) * PITCH, o1 = ((r1 / 7) * PATCH_ROWS + r1 % 7) * PITCH;
            uint2 b[COLUMN_TILES];
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j++) b[j] = packed[(s * COLUMN_TILES + j) * 32 + lane];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const u32 a0 = *(const u32*)(patch + at[g][0] + o0), a1 = *(const u32*)(patch + at[g][1] + o0);
                const u32 a2 = *(const u32*)(patch + at[g][0] + o1), a3 = *(const u32*)(patch + at[g][1] + o1);
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; j++) {
                    float* c = acc[g][j];
#if __CUDA_ARCH__ >= 800
                    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
                        " {%0, %1, %2, %3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[j].x), "r"(b[j].y));
#else
                    // Turing has the same product in two steps of 8: the operands of the longer one are those of both.
                    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
                        " {%0, %1, %2, %3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a0), "r"(a1), "r"(b[j].x));
                    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
                        " {%0, %1, %2, %3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a2), "r"(a3), "r"(b[j].y));
#endif
                }
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const int tile = first + g;
            if (tile >= tiles) continue;
            const int h = h0 + tile / ROW_TILES;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int w = (tile % ROW_TILES) * 16 + lane / 4 + 8 * half;
                if (h >= OH || w >= OW) continue;
                u32 v[COLUMN_TILES];
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; j++)
                    v[j] = pack(fmaxf(acc[g][j][2 * half] + offset[j][0], 0.f),
                                fmaxf(acc[g][j][2 * half + 1] + offset[j][1], 0.f));
                u32* to = (u32*)(y + (((u64)d * OH + h) * OW + w) * C + (lane % 4) * (C / 4));
                if (COLUMN_TILES % 4 == 0) {
#pragma unroll
                    for (int j = 0; j + 3 < COLUMN_TILES; j += 4)
                        *(uint4*)(to + j) = make_uint4(v[j], v[j + 1], v[j + 2], v[j + 3]);
                } else {
#pragma unroll
                    for (int j = 0; j < COLUMN_TILES; j++) to[j] = v[j];
                }
            }
        }
    }
}
#endif

#ifdef BLOCK
// Macros: C channels, D, H, W of the block's output, HIDDEN_D and HIDDEN_C of its attentions.
#define AREA (H * W)
#define GROUPS (C / 8)

// Sums over rows and columns of `y`, in `parts` parts a plane: sums[(d * parts + part) * C + c]. One block a part and plane.
extern "C" __global__ void __launch_bounds__(256)
plane_sums(const u16* __restrict__ y, float* __restrict__ sums) {
    const int d = blockIdx.y, part = blockIdx.x, parts = gridDim.x;
    const int from = (int)((u64)AREA * part / parts), to = (int)((u64)AREA * (part + 1) / parts);
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0.f;
        for (int i = from; i < to; i++) sum += half_value(y[((u64)d * AREA + i) * C + c]);
        sums[((u64)d * parts + part) * C + c] = sum;
    }
}

// The attentions of a block, from the sums of its second convolution. Channel attention needs no second pass over the
// volume: its mean over D, H, W is the mean over d of what depth attention makes of the means over H, W.
//
//   m[d, c] = sum over parts / (H W)
//   depth first:    da = sigmoid(W2 relu(W1 m + b1) + b2);  z[c] = mean_d da[d, c] m[d, c];  ca = CA(z)
//   channel first:  z[c] = mean_d m[d, c];  ca = CA(z);  da = sigmoid(W2 relu(W1 (ca m) + b1) + b2)
//   scale[d, c] = da[d, c] ca[c];  CA(z) = sigmoid(V2 relu(V1 z + c1) + c2)
//
// Four kernels, of which a block uses those it needs: `means` and `hidden` with a block of threads a plane, `depth` and
// `channel`. W1 is kept as D x HIDDEN_D x C, so that each plane adds its own part of the hidden layer, and W2 as
// HIDDEN_D x D x C. V1 is HIDDEN_C x C, V2 transposed: HIDDEN_C x C.
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

// m of one plane; then, where `w1` is given, the plane's part of the hidden layer: partial[d, j] = sum_c W1[d, j, c] m[d, c],
// with `ca` (if given) on m. With `sums` null m is there already.
extern "C" __global__ void __launch_bounds__(512)
means(const float* __restrict__ sums, int parts, float* m, const float* __restrict__ ca, const float* __restrict__ w1,
      float* __restrict__ partial) {
    __shared__ float run[512], mine[C];
    const int d = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (sums) {
        // Up to 512 channels side by side; with fewer, several runs of parts a channel.
        for (int c0 = 0; c0 < C; c0 += 512) {
            const int side = C - c0 < 512 ? C - c0 : 512, runs = 512 / side;
            const int c = threadIdx.x % side, r = threadIdx.x / side;
            float sum = 0.f;
            if (r < runs) {
#pragma unroll 8
                for (int part = r; part < parts; part += runs) sum += sums[((u64)d * parts + part) * C + c0 + c];
            }
            run[threadIdx.x] = sum;
            __syncthreads();
            if (threadIdx.x < side) {
                for (int i = 1; i < runs; i++) sum += run[i * side + c];
                const float mean = sum / (float)AREA;
                m[d * C + c0 + c] = mean;
                mine[c0 + c] = mean;
            }
            __syncthreads();
        }
    } else {
        for (int c = threadIdx.x; c < C; c += blockDim.x) mine[c] = m[d * C + c];
        __syncthreads();
    }
    if (!w1) return;
    if (ca) {
        for (int c = threadIdx.x; c < C; c += blockDim.x) mine[c] *= ca[c];
        __syncthreads();
    }
#pragma unroll 4
    for (int j = warp; j < HIDDEN_D; j += 16) {
        float sum = 0.f;
#pragma unroll
        for (int c = lane; c < C; c += 32) sum += w1[((u64)d * HIDDEN_D + j) * C + c] * mine[c];
        sum = warp_sum(sum);
        if (lane == 0) partial[d * HIDDEN_D + j] = sum;
    }
}

// da[d, c] = sigmoid(b2 + sum_j W2[j, d, c] hidden[j]), times ca[c] where given; 256 of them a block of threads.
extern "C" __global__ void __launch_bounds__(256)
depth(const float* __restrict__ partial, const float* __restrict__ b1, const float* __restrict__ w2,
      const float* __restrict__ b2, const float* __restrict__ ca, float* __restrict__ da) {
    __shared__ float hidden[HIDDEN_D];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int j = warp; j < HIDDEN_D; j += 8) {
        float sum = 0.f;
        for (int d = lane; d < D; d += 32) sum += partial[d * HIDDEN_D + j];
        sum = warp_sum(sum);
        if (lane == 0) hidden[j] = fmaxf(sum + b1[j], 0.f);
    }
    __syncthreads();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= C * D) return;
    float sum = b2[i];
#pragma unroll 16
    for (int j = 0; j < HIDDEN_D; j++) sum += w2[(u64)j * (C * D) + i] * hidden[j];
    da[i] = sigmoid(sum) * (ca ? ca[i % C] : 1.f);
}

// Channel attention. Every block of threads computes all of it (C * C / 8 multiply-adds are fewer than another launch
// costs) and writes its share: `scale` = da ca, or ca alone where `scale` is null. Without `v1` ca is 1; without `da` da is.
extern "C" __global__ void __launch_bounds__(512)
channel(const float* __restrict__ m, const float* __restrict__ da, const float* __restrict__ v1,
        const float* __restrict__ c1, const float* __restrict__ v2, const float* __restrict__ c2, float* __restrict__ ca_out,
        float* __restrict__ scale) {
    __shared__ float run[512], z[C], hidden[HIDDEN_C], ca[C];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int c = threadIdx.x; c < C; c += blockDim.x) ca[c] = 1.f;
    if (v1) {
        for (int c0 = 0; c0 < C; c0 += 512) {
            const int side = C - c0 < 512 ? C - c0 : 512, runs = 512 / side;
            const int c = threadIdx.x % side, r = threadIdx.x / side;
            float sum = 0.f;
            if (r < runs) {
#pragma unroll 8
                for (int d = r; d < D; d += runs) sum += m[d * C + c0 + c] * (da ? da[d * C + c0 + c] : 1.f);
            }
            run[threadIdx.x] = sum;
            __syncthreads();
            if (threadIdx.x < side) {
                for (int i = 1; i < runs; i++) sum += run[i * side + c];
                z[c0 + c] = sum / (float)D;
            }
            __syncthreads();
        }
        for (int k = warp; k < HIDDEN_C; k += 16) {
            float sum = 0.f;
#pragma unroll 8
            for (int c = lane; c < C; c += 32) sum += v1[k * C + c] * z[c];
            sum = warp_sum(sum);
            if (lane == 0) hidden[k] = fmaxf(sum + c1[k], 0.f);
        }
        __syncthreads();
        for (int c = threadIdx.x; c < C; c += blockDim.x) {
            float sum = c2[c];
#pragma unroll 8
            for (int k = 0; k < HIDDEN_C; k++) sum += v2[k * C + c] * hidden[k];
            ca[c] = sigmoid(sum);
        }
    }
    __syncthreads();
    if (!scale) {
        if (blockIdx.x == 0)
            for (int c = threadIdx.x; c < C; c += blockDim.x) ca_out[c] = ca[c];
        return;
    }
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < C * D; i += gridDim.x * blockDim.x)
        scale[i] = (da ? da[i] : 1.f) * ca[i % C];
}

// out = relu(scale[d, c] y + shortcut), eight channels a thread. Planes are taken from the last to the first: the
// convolution that made y ended with the last ones, which the second-level cache still has, and the next one begins with
// the first ones.
extern "C" __global__ void __launch_bounds__(256)
merge(const uint4* __restrict__ y, const float4* __restrict__ scale, const uint4* __restrict__ shortcut, uint4* out) {
    const u32 d = D - 1 - blockIdx.y;
    const u64 plane = (u64)d * AREA * GROUPS;
    const u32 count = AREA * GROUPS;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const u32 g = i % GROUPS;
        const uint4 v = y[plane + i], s = shortcut[plane + i];
        const float4 a = scale[(d * GROUPS + g) * 2], b = scale[(d * GROUPS + g) * 2 + 1];
        uint4 r;
        r.x = pack(fmaxf(low_half(v.x) * a.x + low_half(s.x), 0.f), fmaxf(high_half(v.x) * a.y + high_half(s.x), 0.f));
        r.y = pack(fmaxf(low_half(v.y) * a.z + low_half(s.y), 0.f), fmaxf(high_half(v.y) * a.w + high_half(s.y), 0.f));
        r.z = pack(fmaxf(low_half(v.z) * b.x + low_half(s.z), 0.f), fmaxf(high_half(v.z) * b.y + high_half(s.z), 0.f));
        r.w = pack(fmaxf(low_half(v.w) * b.z + low_half(s.w), 0.f), fmaxf(high_half(v.w) * b.w + high_half(s.w), 0.f));
        out[plane + i] = r;
    }
}

// The last block's merge: the same sum, in f32, written as C, D, H, W for the activation map. 32 channels and 32 voxels a
// block of 32 x 8 threads.
extern "C" __global__ void __launch_bounds__(256)
merge_last(const u16* __restrict__ y, const float* __restrict__ scale, const u16* __restrict__ shortcut,
           float* __restrict__ map) {
    __shared__ float tile[32][33];
    const int voxels = D * AREA, v0 = blockIdx.x * 32, c0 = blockIdx.y * 32;
    for (int r = threadIdx.y; r < 32; r += 8) {
        const int v = v0 + r, c = c0 + threadIdx.x;
        float value = 0.f;
        if (v < voxels && c < C) {
            const u64 at = (u64)v * C + c;
            value = fmaxf(half_value(y[at]) * scale[(v / AREA) * C + c] + half_value(shortcut[at]), 0.f);
        }
        tile[r][threadIdx.x] = value;
    }
    __syncthreads();
    for (int r = threadIdx.y; r < 32; r += 8) {
        const int c = c0 + r, v = v0 + threadIdx.x;
        if (v < voxels && c < C) map[(u64)c * voxels + v] = tile[threadIdx.x][r];
    }
}

// Means of the map over all voxels, one warp a channel.
extern "C" __global__ void __launch_bounds__(128)
pool(const float* __restrict__ map, float* __restrict__ pooled) {
    const int c = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, voxels = D * AREA;
    if (c >= C) return;
    float sum = 0.f;
    for (int v = lane; v < voxels; v += 32) sum += map[(u64)c * voxels + v];
    for (int i = 16; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (lane == 0) pooled[c] = sum / (float)voxels;
}

// Adds up the parts of a convolution whose input channels were divided, in order, with bias and, where `relu`, clipping.
// parts[part][voxel][channel]; also the sums over a plane's rows and columns, as plane_sums makes them, where asked for.
// Block: 64 channels x 4 voxels at a time; grid: C / 64, runs of a plane, D.
extern "C" __global__ void __launch_bounds__(256)
finish_split(const float* __restrict__ parts, int split, const float* __restrict__ bias, u16* __restrict__ y, int relu,
             float* __restrict__ sums) {
    __shared__ float shared[4][64];
    const int c = blockIdx.x * 64 + threadIdx.x % 64, r = threadIdx.x / 64, d = blockIdx.z;
    const int from = (int)((u64)AREA * blockIdx.y / gridDim.y), to = (int)((u64)AREA * (blockIdx.y + 1) / gridDim.y);
    const float offset = bias[c];
    float sum = 0.f;
    for (int i = from + r; i < to; i += 4) {
        const u64 at = ((u64)d * AREA + i) * C + c;
        float v = offset;
        for (int part = 0; part < split; part++) v += parts[(u64)part * D * AREA * C + at];
        sum += v;
        y[at] = half_bits(relu ? fmaxf(v, 0.f) : v);
    }
    if (sums) {
        shared[r][threadIdx.x % 64] = sum;
        __syncthreads();
        if (r == 0)
            sums[((u64)d * gridDim.y + blockIdx.y) * C + c] =
                shared[0][threadIdx.x] + shared[1][threadIdx.x] + shared[2][threadIdx.x] + shared[3][threadIdx.x];
    }
}
#endif

#ifdef PLAIN
// A convolution as it is defined, one thread an output; x and weights (K, taps in kd kh kw order, C) f16, sums f32. Only
// planes first_d, first_d + step_d, … of the output are written, one after the other, as f32: what a faster one is held to.
extern "C" __global__ void __launch_bounds__(256)
plain(const u16* __restrict__ x, const u16* __restrict__ weights, const float* __restrict__ bias, float* __restrict__ y,
      int c_in, int c_out, int id, int ih, int iw, int oh, int ow, int kernel, int stride, int relu, int first_d,
      int step_d) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x, v = blockIdx.y, w = v % ow, h = v / ow;
    const int d = first_d + blockIdx.z * step_d, padding = kernel / 2;
    if (k >= c_out) return;
    float sum = bias[k];
    for (int kd = 0; kd < kernel; kd++)
        for (int kh = 0; kh < kernel; kh++)
            for (int kw = 0; kw < kernel; kw++) {
                const int zd = d * stride + kd - padding, zh = h * stride + kh - padding, zw = w * stride + kw - padding;
                if (zd < 0 || zd >= id || zh < 0 || zh >= ih || zw < 0 || zw >= iw) continue;
                const u16* a = x + (((u64)zd * ih + zh) * iw + zw) * c_in;
                const u16* b = weights + ((u64)k * kernel * kernel * kernel + (kd * kernel + kh) * kernel + kw) * c_in;
                for (int c = 0; c < c_in; c++) sum += half_value(a[c]) * half_value(b[c]);
            }
    y[((u64)blockIdx.z * oh * ow + v) * c_out + k] = relu ? fmaxf(sum, 0.f) : sum;
}
#endif
