// What lies between two convolutions in training: batch normalisation, ReLU, attention, shortcut, and their gradients.
//
// Activations are N x D planes of `area` pixels of `channels` numbers, channels innermost. TYPE is 0 for f32 and 1 for
// bf16; sums and coefficients are f32. Nothing is included, so that the run-time compiler needs no headers. No atomics:
// sums go to a place of their own for every part of a plane and are added in one order, so that a step gives the same
// bits every time.
//
//   forward    per plane: sum x, sum x^2          (one read of x, for mean, variance and plane means at once)
//              y = relu(a x + b)                  (one read, one write)
//              y = relu(s (a x + b) + shortcut)   (two reads, one write)
//   backward   dz = (g1 + g2) where y > 0
//              per plane: sum dz, sum dz x        (reads only)
//              gx = a (s dz + gm / area) + q x + r (all of the gradient by x, the statistics' share included)
//
// A thread takes eight channels of every rows-th pixel of its part: 16 bytes of bf16 at a time, coefficients stay in
// registers. Channels are a multiple of 8 and at most 8 times the threads of a block.

#if TYPE == 1
typedef unsigned short T;
#else
typedef float T;
#endif

typedef long long i64;

struct V8 {
    float v[8];
};

#if TYPE == 1
struct alignas(16) Packed {
    unsigned int w[4];
};
__device__ __forceinline__ V8 load8(const T* p) {
    Packed raw = *reinterpret_cast<const Packed*>(p);
    V8 r;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.v[2 * i] = __uint_as_float(raw.w[i] << 16);
        r.v[2 * i + 1] = __uint_as_float(raw.w[i] & 0xffff0000u);
    }
    return r;
}
// To the nearest, ties to even; a NaN stays one.
__device__ __forceinline__ unsigned int half_of(float f) {
    unsigned int u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
__device__ __forceinline__ void store8(T* p, const V8& r) {
    Packed raw;
#pragma unroll
    for (int i = 0; i < 4; i++) raw.w[i] = half_of(r.v[2 * i]) | (half_of(r.v[2 * i + 1]) << 16);
    *reinterpret_cast<Packed*>(p) = raw;
}
#else
struct alignas(16) Packed {
    float w[4];
};
__device__ __forceinline__ V8 load8(const T* p) {
    V8 r;
    Packed low = reinterpret_cast<const Packed*>(p)[0], high = reinterpret_cast<const Packed*>(p)[1];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.v[i] = low.w[i];
        r.v[4 + i] = high.w[i];
    }
    return r;
}
__device__ __forceinline__ void store8(T* p, const V8& r) {
    Packed low, high;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        low.w[i] = r.v[i];
        high.w[i] = r.v[4 + i];
    }
    reinterpret_cast<Packed*>(p)[0] = low;
    reinterpret_cast<Packed*>(p)[1] = high;
}
#endif

// Eight numbers of an f32 array, or a constant where there is none.
__device__ __forceinline__ V8 numbers(const float* p, i64 at, float otherwise) {
    V8 r;
#pragma unroll
    for (int i = 0; i < 8; i++) r.v[i] = p ? p[at + i] : otherwise;
    return r;
}

// Where a thread works: grid (parts of a plane, planes), one block a part.
struct Place {
    int groups, rows, group, row, plane, from, to;
    i64 base;
    __device__ __forceinline__ Place(int area, int channels) {
        groups = channels / 8;
        rows = (int)blockDim.x / groups;
        group = (int)threadIdx.x % groups;
        row = (int)threadIdx.x / groups;
        plane = (int)blockIdx.y;
        from = (int)((i64)area * (int)blockIdx.x / (int)gridDim.x);
        to = (int)((i64)area * ((int)blockIdx.x + 1) / (int)gridDim.x);
        base = (i64)plane * area * channels + group * 8;
    }
    __device__ __forceinline__ bool idle() const { return row >= rows; }
};

// Adds the threads' sums of a block; out is [parts][K][planes][channels].
template <int K>
__device__ __forceinline__ void gather(const Place& at, V8 (&sum)[K], float* out, int channels) {
    __shared__ float shared[256 * 8];
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int i = 0; i < 8; i++) shared[threadIdx.x * 8 + i] = sum[k].v[i];
        __syncthreads();
        for (int c = threadIdx.x; c < channels; c += blockDim.x) {
            float s = 0.0f;
            for (int r = 0; r < at.rows; r++) s += shared[(r * at.groups + c / 8) * 8 + c % 8];
            out[(((i64)blockIdx.x * K + k) * gridDim.y + at.plane) * channels + c] = s;
        }
        __syncthreads();
    }
}

#define EACH_PIXEL(at) \
    if (!at.idle()) \
        for (int p = at.from + at.row; p < at.to; p += at.rows)
#define EACH8 _Pragma("unroll") for (int i = 0; i < 8; i++)

extern "C" __global__ void sums_forward(const T* x, float* out, int area, int channels) {
    Place at(area, channels);
    V8 sum[2] = {};
    EACH_PIXEL(at) {
        V8 v = load8(x + at.base + (i64)p * channels);
        EACH8 {
            sum[0].v[i] += v.v[i];
            sum[1].v[i] += v.v[i] * v.v[i];
        }
    }
    gather(at, sum, out, channels);
}

// y = relu(a x + b)
extern "C" __global__ void affine_relu(const T* x, const float* a, const float* b, T* y, int area, int channels) {
    Place at(area, channels);
    if (at.idle()) return;
    V8 ka = numbers(a, at.group * 8, 1.0f), kb = numbers(b, at.group * 8, 0.0f);
    EACH_PIXEL(at) {
        i64 place = at.base + (i64)p * channels;
        V8 v = load8(x + place);
        EACH8 v.v[i] = fmaxf(ka.v[i] * v.v[i] + kb.v[i], 0.0f);
        store8(y + place, v);
    }
}

// y = relu(s (a x + b) + sa shortcut + sb); s by plane, none is 1; sa and sb none: the shortcut as it is.
extern "C" __global__ void block_out(const T* x, const float* a, const float* b, const float* s, const T* shortcut,
                                     const float* sa, const float* sb, T* y, int area, int channels) {
    Place at(area, channels);
    if (at.idle()) return;
    V8 ka = numbers(a, at.group * 8, 1.0f), kb = numbers(b, at.group * 8, 0.0f);
    V8 ks = numbers(s, (i64)at.plane * channels + at.group * 8, 1.0f);
    V8 kc = numbers(sa, at.group * 8, 1.0f), kd = numbers(sb, at.group * 8, 0.0f);
    EACH_PIXEL(at) {
        i64 place = at.base + (i64)p * channels;
        V8 v = load8(x + place), w = load8(shortcut + place);
        EACH8 v.v[i] = fmaxf(ks.v[i] * (ka.v[i] * v.v[i] + kb.v[i]) + kc.v[i] * w.v[i] + kd.v[i], 0.0f);
        store8(y + place, v);
    }
}

__device__ __forceinline__ V8 gradient(const T* g1, const T* g2, i64 place) {
    V8 g = load8(g1 + place);
    if (g2) {
        V8 h = load8(g2 + place);
        EACH8 g.v[i] += h.v[i];
    }
    return g;
}

// Of y = relu(a x + b): sum dz, sum dz x.
extern "C" __global__ void sums_relu(const T* g1, const T* g2, const T* x, const float* a, const float* b, float* out,
                                     int area, int channels) {
    Place at(area, channels);
    V8 sum[2] = {};
    V8 ka = numbers(at.idle() ? 0 : a, at.group * 8, 1.0f), kb = numbers(at.idle() ? 0 : b, at.group * 8, 0.0f);
    EACH_PIXEL(at) {
        i64 place = at.base + (i64)p * channels;
        V8 g = gradient(g1, g2, place), v = load8(x + place);
        EACH8 {
            float dz = ka.v[i] * v.v[i] + kb.v[i] > 0.0f ? g.v[i] : 0.0f;
            sum[0].v[i] += dz;
            sum[1].v[i] += dz * v.v[i];
        }
    }
    gather(at, sum, out, channels);
}

// Of y = relu(a x + b): gx = a dz + q x + r.
extern "C" __global__ void grad_relu(const T* g1, const T* g2, const T* x, const float* a, const float* b, const float* q,
                                     const float* r, T* gx, int area, int channels) {
    Place at(area, channels);
    if (at.idle()) return;
    V8 ka = numbers(a, at.group * 8, 1.0f), kb = numbers(b, at.group * 8, 0.0f);
    V8 kq = numbers(q, at.group * 8, 0.0f), kr = numbers(r, at.group * 8, 0.0f);
    EACH_PIXEL(at) {
        i64 place = at.base + (i64)p * channels;
        V8 g = gradient(g1, g2, place), v = load8(x + place);
        EACH8 {
            float dz = ka.v[i] * v.v[i] + kb.v[i] > 0.0f ? g.v[i] : 0.0f;
            g.v[i] = ka.v[i] * dz + kq.v[i] * v.v[i] + kr.v[i];
        }
        store8(gx + place, g);
    }
}

// Of a block's output y: sum dz, sum dz x, sum dz shortcut (0 without one).
extern "C" __global__ void sums_block(const T* g1, const T* g2, const T* y, const T* x, const T* shortcut, float* out,
                                      int area, int channels) {
    Place at(area, channels);
    V8 sum[3] = {};
    EACH_PIXEL(at) {
        i64 place = at.base + (i64)p * channels;
        V8 g = gradient(g1, g2, place), o = load8(y + place), v = load8(x + place);
        V8 w = {};
        if (shortcut) w = load8(shortcut + place);
        EACH8 {
            float dz = o.v[i] > 0.0f ? g.v[i] : 0.0f;
            sum[0].v[i] += dz;
            sum[1].v[i] += dz * v.v[i];
            sum[2].v[i] += dz * w.v[i];
        }
    }
    gather(at, sum, out, channels);
}

// Of a block's output y: gx = a (s dz + gm / area) + q x + r, and the shortcut's gradient: dz, or sa dz + sq shortcut + sr.
extern "C" __global__ void grad_block(const T* g1, const T* g2, const T* y, const T* x, const float* a, const float* s,
                                      const float* gm, const float* q, const float* r, const T* shortcut, const float* sa,
                                      const float* sq, const float* sr, T* gx, T* gs, int area, int channels) {
    Place at(area, channels);
    if (at.idle()) return;
    i64 by_plane = (i64)at.plane * channels + at.group * 8;
    V8 ka = numbers(a, at.group * 8, 1.0f), ks = numbers(s, by_plane, 1.0f), km = numbers(gm, by_plane, 0.0f);
    V8 kq = numbers(q, at.group * 8, 0.0f), kr = numbers(r, at.group * 8, 0.0f);
    V8 kc = numbers(sa, at.group * 8, 1.0f), kd = numbers(sq, at.group * 8, 0.0f), ke = numbers(sr, at.group * 8, 0.0f);
    float share = 1.0f / (float)area;
    EACH8 {
        kr.v[i] += ka.v[i] * km.v[i] * share;
        ks.v[i] *= ka.v[i];
    }
    EACH_PIXEL(at) {
        i64 place = at.base + (i64)p * channels;
        V8 g = gradient(g1, g2, place), o = load8(y + place), v = load8(x + place);
        V8 w = {};
        if (shortcut) w = load8(shortcut + place);
        EACH8 {
            float dz = o.v[i] > 0.0f ? g.v[i] : 0.0f;
            v.v[i] = ks.v[i] * dz + kq.v[i] * v.v[i] + kr.v[i];
            w.v[i] = kc.v[i] * dz + kd.v[i] * w.v[i] + ke.v[i];
        }
        store8(gx + place, v);
        store8(gs + place, w);
    }
}

// The kernels below have 32 channels a block, 8 threads each.

__device__ __forceinline__ float of_eight(float v, float* shared) {
    int lane = threadIdx.x / 32, c = threadIdx.x % 32;
    shared[lane * 32 + c] = v;
    __syncthreads();
    float s = 0.0f;
    for (int l = 0; l < 8; l++) s += shared[l * 32 + c];
    __syncthreads();
    return s;
}

// From sums to a, b of a x + b, mean and 1 / deviation, the plane means of a x + b, and the running statistics.
extern "C" __global__ void bn_coefficients(const float* sums, int parts, int planes, int area, int channels,
                                           const float* gamma, const float* beta, float* running_mean, float* running_var,
                                           float momentum, float epsilon, float* a, float* b, float* mean, float* invstd,
                                           float* plane_x, float* plane_mean) {
    __shared__ float shared[256];
    int lane = threadIdx.x / 32, c = blockIdx.x * 32 + threadIdx.x % 32;
    bool real = c < channels;
    float s = 0.0f, s2 = 0.0f;
    if (real)
        for (int plane = lane; plane < planes; plane += 8) {
            float of_plane = 0.0f;
            for (int part = 0; part < parts; part++) {
                of_plane += sums[(((i64)part * 2 + 0) * planes + plane) * channels + c];
                s2 += sums[(((i64)part * 2 + 1) * planes + plane) * channels + c];
            }
            s += of_plane;
            plane_x[(i64)plane * channels + c] = of_plane;
        }
    s = of_eight(s, shared);
    s2 = of_eight(s2, shared);
    if (!real) return;
    float count = (float)planes * (float)area;
    float m = s / count, var = fmaxf(s2 / count - m * m, 0.0f), is = 1.0f / sqrtf(var + epsilon);
    float ka = gamma[c] * is, kb = beta[c] - m * ka;
    if (lane == 0) {
        a[c] = ka;
        b[c] = kb;
        mean[c] = m;
        invstd[c] = is;
        running_mean[c] += momentum * (m - running_mean[c]);
        running_var[c] += momentum * (var * count / fmaxf(count - 1.0f, 1.0f) - running_var[c]);
    }
    if (plane_mean)
        for (int plane = lane; plane < planes; plane += 8)
            plane_mean[(i64)plane * channels + c] = ka * plane_x[(i64)plane * channels + c] / (float)area + kb;
}

// The gradient by the scale of each plane: sum dz (a x + b).
extern "C" __global__ void gate_gradient(const float* sums, int parts, int planes, int channels, const float* a,
                                         const float* b, float* ds) {
    i64 n = (i64)planes * channels, i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float dz = 0.0f, dzx = 0.0f;
    for (int part = 0; part < parts; part++) {
        dz += sums[((i64)part * 3 + 0) * n + i];
        dzx += sums[((i64)part * 3 + 1) * n + i];
    }
    int c = (int)(i % channels);
    ds[i] = a[c] * dzx + b[c] * dz;
}

// From sums (K of them, number `which` holds sum dz x) to the gradients of gamma and beta and to q, r of
// gx = a (s dz + gm / area) + q x + r. s none: 1, gm none: 0.
extern "C" __global__ void bn_gradients(const float* sums, int parts, int k, int which, int planes, int area, int channels,
                                        const float* a, const float* mean, const float* invstd, const float* s,
                                        const float* gm, const float* plane_x, float* gamma_grad, float* beta_grad, float* q,
                                        float* r) {
    __shared__ float shared[256];
    int lane = threadIdx.x / 32, c = blockIdx.x * 32 + threadIdx.x % 32;
    bool real = c < channels;
    float dy = 0.0f, dyx = 0.0f;
    if (real)
        for (int plane = lane; plane < planes; plane += 8) {
            float dz = 0.0f, dzx = 0.0f;
            for (int part = 0; part < parts; part++) {
                dz += sums[(((i64)part * k + 0) * planes + plane) * channels + c];
                dzx += sums[(((i64)part * k + which) * planes + plane) * channels + c];
            }
            i64 at = (i64)plane * channels + c;
            float scale = s ? s[at] : 1.0f, through = gm ? gm[at] : 0.0f;
            dy += scale * dz + through;
            dyx += scale * dzx + through * plane_x[at] / (float)area;
        }
    dy = of_eight(dy, shared);
    dyx = of_eight(dyx, shared);
    if (!real || lane != 0) return;
    float count = (float)planes * (float)area;
    float gg = invstd[c] * (dyx - mean[c] * dy);
    gamma_grad[c] = gg;
    beta_grad[c] = dy;
    float kq = -a[c] * invstd[c] * gg / count;
    q[c] = kq;
    r[c] = -a[c] * dy / count - kq * mean[c];
}

// Adam (PyTorch's, without weight decay), one pass; not_beta is 1 - beta. step = learning rate / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t).
extern "C" __global__ void adam(float* p, const float* g, float* mean, float* square, i64 n, float not_beta1, float beta2,
                                float not_beta2, float epsilon, float step, float root) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        float grad = g[i];
        float m = mean[i] + not_beta1 * (grad - mean[i]);
        float v = beta2 * square[i] + not_beta2 * grad * grad;
        mean[i] = m;
        square[i] = v;
        p[i] -= step * m / (sqrtf(v) * root + epsilon);
    }
}
