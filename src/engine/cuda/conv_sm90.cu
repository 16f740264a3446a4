// Forward 3-D convolution for Hopper (sm_90a): implicit matrix product on warpgroup matrix units.
//
//   y[d, h, w, k] = act(bias[k] + sum over taps (kd, kh, kw) and channels c of
//                                  weight[k, kd, kh, kw, c] * x[S d + kd - P, S h + kh - P, S w + kw - P, c])
//
// x and y are NDHWC, f16, one image; sums are f32. Compiled once a layer, with these macros:
//
//   C_IN, C_OUT   channels, multiples of 64            KSIZE   3 (P = 1) or 1 (P = 0)         STRIDE  1 or 2
//   OD, OH, OW    output                                NH      rows of a tile; a tile is 8 voxels wide
//   PW            depth planes a warpgroup (1 or 2)     PD      warpgroups along depth (1 or 2)
//   MB            warpgroups along channels; PD * MB = 2
//   SPLIT         parts of the input channels; more than 1 writes f32 sums, which `finish_split` adds up
//   NP, NW        slots of the rings of planes and weights      SROWS   rows stored at a time, divides NH
//
// The matrix product has output channels as rows (64 a warpgroup) and voxels as columns (8 * NH), so that both operands
// come from shared memory in the order the matrix unit wants (128-byte swizzle, 64 channels a row) and a column group of
// 8 is one row of the tile.
//
// With `relu` the output is clipped at zero. Where `sums` is given, the sums of each tile over rows and columns, before
// clipping, go there: sums[(d * tiles of a plane + tile) * C_OUT + k].
//
// What limits a direct convolution of 64 channels is not arithmetic but the 27-fold reading of x from the second-level
// cache. So a plane of NH + 2 rows is loaded once for each kw (three copies, each aligned to the swizzle) and used for
// all kh, by an offset of whole rows, and for all kd, by taking another plane of the ring. At 64 channels and NH = 28 a
// pair of planes reads 4 * 30 * 8 * 3 voxels for 448 outputs: 6.4 times instead of 27.
//
// Roles: one thread loads (bulk tensor copies, completion on barriers); two warpgroups multiply. Blocks are persistent and
// take tiles in a fixed order. Sums over channels and taps are in one order, whatever the GPU does: the same bits each run.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) TensorMap { u64 opaque[16]; };

#define CHUNKS (C_IN / 64 / SPLIT)
#define N (8 * NH)
#define ACC (N / 2)
#define PLANES (PD * PW)
#define MROWS (64 * MB)
#define MTILES (C_OUT / MROWS)
#define TILES_W ((OW + 7) / 8)
#define TILES_H ((OH + NH - 1) / NH)
#define TILES_D ((OD + PLANES - 1) / PLANES)
#define VTILES (TILES_W * TILES_H * TILES_D)
#if KSIZE == 3 && STRIDE == 1
#define UNIT_ROWS (NH + 2)
#elif KSIZE == 3
#define UNIT_ROWS (NH + 1)
#else
#define UNIT_ROWS NH
#endif
#define UNIT_BYTES (UNIT_ROWS * 1024)
#define WEIGHT_BYTES (MROWS * 128)
#define STAGE_BYTES (SROWS * 1024)
#define TAPS (KSIZE * KSIZE * KSIZE)
#define WORK (VTILES * MTILES * SPLIT)

static_assert(PD * MB == 2, "two warpgroups multiply");
static_assert(NP >= 2 * PLANES && NP >= 3 && NW >= 2, "a ring that cannot stand still");
static_assert(NH % SROWS == 0 && SROWS % 2 == 0 && N <= 256, "rows of a tile");
static_assert(CHUNKS * SPLIT * 64 == C_IN && MTILES * MROWS == C_OUT, "whole groups of channels");

#define OFF_WEIGHTS (NP * UNIT_BYTES)
#define OFF_STAGE (OFF_WEIGHTS + NW * WEIGHT_BYTES)
#define OFF_BARS (OFF_STAGE + 2 * STAGE_BYTES)

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void bar_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void bar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void bar_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n}" ::"r"(bar), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void load_plane(u32 to, const TensorMap* map, u32 bar, int c, int w, int h, int d) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(c), "r"(w), "r"(h), "r"(d)
        : "memory");
}
__device__ __forceinline__ void load_weights(u32 to, const char* from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void store_rows(const TensorMap* map, u32 from, int c, int w, int h, int d) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(from),
        "r"(c), "r"(w), "r"(h), "r"(d)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void store_read_done() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// 128-byte swizzle, rows of 128 bytes, groups of 8 rows 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most one group is unfinished.
__device__ __forceinline__ void all_but_one() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// `multiply(float (&acc)[ACC], u64 a, u64 b, int add)`, one instruction of 64 x N x 16, and `settle(float (&acc)[ACC])`,
// which waits for all groups, are written here for this N.
@MULTIPLY@

__device__ __forceinline__ void named_barrier(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Where a piece of work lies.
struct Tile {
    int w, h, d;    // first output voxel
    int m;          // first output channel
    int chunk;      // first chunk of input channels
    int part;       // which part of them
    int in_plane;   // number of the tile in its planes
};

__device__ __forceinline__ Tile tile_of(int work) {
    Tile t;
    t.m = (work % MTILES) * MROWS;
    work /= MTILES;
    t.part = work % SPLIT;
    t.chunk = t.part * CHUNKS;
    int v = work / SPLIT;
    t.in_plane = v % (TILES_W * TILES_H);
    t.w = (v % TILES_W) * 8;
    v /= TILES_W;
    t.h = (v % TILES_H) * NH;
    t.d = (v / TILES_H) * PLANES;
    return t;
}

// The next slot of a ring, and the parity of the wait for it.
template <int SLOTS>
struct Ring {
    int slot = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) {
            slot = 0;
            phase ^= 1;
        }
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
conv(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, const char* __restrict__ weights,
     const float* __restrict__ bias, float* __restrict__ sums, float* __restrict__ parts, int relu) {
    extern __shared__ __align__(1024) char shared[];
    const u32 base = shared_address(shared);
    const u32 full_p = base + OFF_BARS, empty_p = full_p + 8 * NP;
    const u32 full_w = empty_p + 8 * NP, empty_w = full_w + 8 * NW;
    const int warpgroup = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        if (base & 1023) asm volatile("trap;");
        for (int i = 0; i < NP; i++) {
            bar_init(full_p + 8 * i, 1);
            bar_init(empty_p + 8 * i, 2);
        }
        for (int i = 0; i < NW; i++) {
            bar_init(full_w + 8 * i, 1);
            bar_init(empty_w + 8 * i, 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();

    if (warpgroup == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 256) {
            Ring<NP> p;
            Ring<NW> q;
            auto plane = [&](int c, int w, int h, int d) {
                bar_wait(empty_p + 8 * p.slot, p.phase ^ 1);
                bar_expect(full_p + 8 * p.slot, UNIT_BYTES);
                load_plane(base + p.slot * UNIT_BYTES, &x_map, full_p + 8 * p.slot, c, w, h, d);
                p.next();
            };
            for (int work = blockIdx.x; work < WORK; work += gridDim.x) {
                const Tile t = tile_of(work);
                const char* from =
                    weights + (u64)(t.m / MROWS) * (C_IN / 64) * TAPS * WEIGHT_BYTES + (u64)t.chunk * TAPS * WEIGHT_BYTES;
                auto weight = [&]() {
                    const u32 bar = full_w + 8 * q.slot, to = base + OFF_WEIGHTS + q.slot * WEIGHT_BYTES;
                    bar_wait(empty_w + 8 * q.slot, q.phase ^ 1);
                    bar_expect(bar, WEIGHT_BYTES);
                    load_weights(to, from, WEIGHT_BYTES, bar);
                    from += WEIGHT_BYTES;
                    q.next();
                };
                for (int chunk = t.chunk; chunk < t.chunk + CHUNKS; chunk++) {
                    const int c = chunk * 64;
#if KSIZE == 3 && STRIDE == 1
                    for (int kw = 0; kw < 3; kw++) {
                        for (int i = 0; i < PLANES - 1; i++) plane(c, t.w + kw - 1, t.h - 1, t.d - 1 + i);
                        for (int kd = 0; kd < 3; kd++) {
                            plane(c, t.w + kw - 1, t.h - 1, t.d - 1 + PLANES - 1 + kd);
                            for (int kh = 0; kh < 3; kh++) weight();
                        }
                    }
#elif KSIZE == 3
                    // Rows of one parity serve kh = 0 and, one further, kh = 2; those of the other kh = 1.
                    for (int kw = 0; kw < 3; kw++) {
                        for (int kd = 0; kd < 3; kd++) {
                            plane(c, 2 * t.w + kw - 1, 2 * t.h - 1, 2 * t.d + kd - 1);
                            weight();
                            weight();
                            plane(c, 2 * t.w + kw - 1, 2 * t.h, 2 * t.d + kd - 1);
                            weight();
                        }
                    }
#else
                    for (int i = 0; i < PLANES; i++) plane(c, STRIDE * t.w, STRIDE * t.h, STRIDE * (t.d + i));
                    weight();
#endif
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
        const int my_plane = (warpgroup % PD) * PW;      // first plane of this warpgroup within the tile
        const int my_rows = (warpgroup / PD) * 64;        // first channel within the tile
        const bool elected = thread == 0;
#if SPLIT == 1
        const u32 stage = base + OFF_STAGE + warpgroup * STAGE_BYTES;
#endif
        Ring<NP> p;
        Ring<NW> q;
        float acc[PW][ACC];

        auto release_weight = [&](int slot) {
            if (elected) bar_arrive(empty_w + 8 * slot);
        };
        auto release_plane = [&](int slot) {
            if (elected) bar_arrive(empty_p + 8 * slot);
        };
        // Slot and phase `by` places further in the ring of planes.
        auto slot_after = [&](int by) { return p.slot + by >= NP ? p.slot + by - NP : p.slot + by; };
        auto phase_after = [&](int by) { return p.slot + by >= NP ? p.phase ^ 1 : p.phase; };

        for (int work = blockIdx.x; work < WORK; work += gridDim.x) {
            const Tile t = tile_of(work);
            int add = 0;
            // Released when the matrix unit has passed them: a slot of weights, and planes just before the ring's position.
            int last_weight = -1, last_planes = 0;
            // One tap: planes `offset` places after the ring's position, from row `row` on.
            auto tap = [&](int offset, int row) {
                bar_wait(full_w + 8 * q.slot, q.phase);
                mma_fence();
                const u64 a = descriptor(base + OFF_WEIGHTS + q.slot * WEIGHT_BYTES + my_rows * 128);
#pragma unroll
                for (int j = 0; j < PW; j++) {
                    const u64 b = descriptor(base + slot_after(offset + j) * UNIT_BYTES + row * 1024);
#pragma unroll
                    for (int k = 0; k < 4; k++) multiply(acc[j], a + 2 * k, b + 2 * k, add | k);
                }
                mma_commit();
                add = 1;
            };
            // After a tap was given: the one before it is done.
            auto release_last = [&]() {
                if (last_weight >= 0) release_weight(last_weight);
                for (int i = last_planes; i > 0; i--) release_plane(p.slot >= i ? p.slot - i : p.slot - i + NP);
                last_planes = 0;
            };
            auto passed = [&]() {
                all_but_one();
                release_last();
                last_weight = q.slot;
                q.next();
            };
            auto leave_planes = [&](int count, int kept) {
                for (int i = 0; i < count; i++) p.next();
                last_planes = kept;
            };
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
#if KSIZE == 3 && STRIDE == 1
                for (int kw = 0; kw < 3; kw++) {
                    for (int kd = 0; kd < 3; kd++) {
                        // Planes 0 to kd + PLANES - 1 of this kw are waited for in order.
                        if (kd == 0) {
                            for (int i = 0; i < PLANES - 1; i++) bar_wait(full_p + 8 * slot_after(i), phase_after(i));
                        }
                        bar_wait(full_p + 8 * slot_after(kd + PLANES - 1), phase_after(kd + PLANES - 1));
                        for (int kh = 0; kh < 3; kh++) {
                            tap(my_plane + kd, kh);
                            passed();
                            // The taps of the plane before this kd are done now.
                            if (kh == 0 && kd > 0) release_plane(slot_after(kd - 1));
                        }
                    }
                    leave_planes(PLANES + 2, PLANES);
                }
#elif KSIZE == 3
                for (int kw = 0; kw < 3; kw++) {
                    for (int kd = 0; kd < 3; kd++) {
                        bar_wait(full_p + 8 * slot_after(0), phase_after(0));
                        tap(0, 0);
                        passed();
                        tap(0, 1);
                        passed();
                        bar_wait(full_p + 8 * slot_after(1), phase_after(1));
                        tap(1, 0);
                        passed();
                        release_plane(slot_after(0));
                        leave_planes(2, 1);
                    }
                }
#else
                for (int i = 0; i < PLANES; i++) bar_wait(full_p + 8 * slot_after(i), phase_after(i));
                tap(my_plane, 0);
                passed();
                leave_planes(PLANES, PLANES);
#endif
            }
#pragma unroll
            for (int j = 0; j < PW; j++) settle(acc[j]);
            release_last();

#if SPLIT == 1
            const float bias0 = bias[t.m + my_rows + 16 * warp + lane / 4];
            const float bias1 = bias[t.m + my_rows + 16 * warp + lane / 4 + 8];
#endif
            const int channel = t.m + my_rows + 16 * warp + lane / 4;   // and 8 further
            const int column = (lane % 4) * 2;                          // and 1 further
#pragma unroll
            for (int j = 0; j < PW; j++) {
                const int d = t.d + my_plane + j;
                const bool plane_there = d < OD;
#if SPLIT > 1
                if (plane_there) {
                    float* to = parts + (((u64)t.part * OD + d) * OH * OW) * C_OUT;
#pragma unroll
                    for (int row = 0; row < NH; row++) {
                        const int h = t.h + row;
                        if (h < OH) {
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                const int w = t.w + column + e;
                                if (w < OW) {
                                    float* voxel = to + ((u64)h * OW + w) * C_OUT + channel;
                                    voxel[0] = acc[j][4 * row + e];
                                    voxel[8] = acc[j][4 * row + 2 + e];
                                }
                            }
                        }
                    }
                }
#else
                float sum0 = 0.f, sum1 = 0.f;
#pragma unroll
                for (int round = 0; round < NH / SROWS; round++) {
                    if (elected) store_read_done();
                    named_barrier(1 + warpgroup);
#pragma unroll
                    for (int r = 0; r < SROWS; r += 2) {
                        const int row = round * SROWS + r;
                        u32 v[4];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float a0 = acc[j][4 * (row + i)] + bias0, a1 = acc[j][4 * (row + i) + 1] + bias0;
                            float b0 = acc[j][4 * (row + i) + 2] + bias1, b1 = acc[j][4 * (row + i) + 3] + bias1;
                            const bool row_there = t.h + row + i < OH;
                            if (row_there && t.w + column < OW) {
                                sum0 += a0;
                                sum1 += b0;
                            }
                            if (row_there && t.w + column + 1 < OW) {
                                sum0 += a1;
                                sum1 += b1;
                            }
                            if (relu) {
                                a0 = fmaxf(a0, 0.f);
                                a1 = fmaxf(a1, 0.f);
                                b0 = fmaxf(b0, 0.f);
                                b1 = fmaxf(b1, 0.f);
                            }
                            v[2 * i] = pack(a0, a1);
                            v[2 * i + 1] = pack(b0, b1);
                        }
                        // Four 8 x 8 matrices, transposed: (row, channels 0-7), (row, 8-15), (row + 1, 0-7), (row + 1, 8-15).
                        const int voxel = 8 * (r + lane / 16) + lane % 8;
                        const int group = 2 * warp + (lane / 8) % 2;
                        const u32 to = stage + voxel * 128 + ((group ^ (voxel & 7)) << 4);
                        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                                     "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                                     : "memory");
                    }
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                    named_barrier(1 + warpgroup);
                    if (elected && plane_there && t.h + round * SROWS < OH)
                        store_rows(&y_map, stage, t.m + my_rows, t.w, t.h + round * SROWS, d);
                }
                sum0 += __shfl_xor_sync(0xffffffffu, sum0, 1);
                sum1 += __shfl_xor_sync(0xffffffffu, sum1, 1);
                sum0 += __shfl_xor_sync(0xffffffffu, sum0, 2);
                sum1 += __shfl_xor_sync(0xffffffffu, sum1, 2);
                if (sums && plane_there && lane % 4 == 0) {
                    float* to = sums + ((u64)d * (TILES_W * TILES_H) + t.in_plane) * C_OUT + channel;
                    to[0] = sum0;
                    to[8] = sum1;
                }
#endif
            }
        }
        if (elected) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
