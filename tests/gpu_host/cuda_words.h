// The words of CUDA C++ that the resampling kernels use, for a C++ compiler: the kernels run as plain functions, one
// thread after the other. Compile without contraction of multiplications and additions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__

struct Index {
    unsigned x, y, z;
};
// Streams of the simulated driver run kernels side by side.
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline void atomicAdd(unsigned long long* to, unsigned long long value) { __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
using std::fmaxf;
using std::fminf;
using std::min;
