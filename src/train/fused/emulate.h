// Lets a C++ compiler take kernels.cu, for the test of its numbers where there is no GPU: a thread a CUDA thread, one block
// after the other. host_launch has the signature of cuLaunchKernel; a function is a trampoline that unpacks arguments.

#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static

struct Dim {
    unsigned x = 1, y = 1;
};
static thread_local Dim threadIdx, blockIdx;
static Dim blockDim, gridDim;
static std::barrier<>* together = nullptr;

static void __syncthreads() { together->arrive_and_wait(); }
static float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}

extern "C" int host_launch(void (*function)(void**), unsigned gx, unsigned gy, unsigned, unsigned bx, unsigned, unsigned,
                           unsigned, void*, void** args, void**) {
    gridDim = {gx, gy};
    blockDim = {bx, 1};
    for (unsigned y = 0; y < gy; y++)
        for (unsigned x = 0; x < gx; x++) {
            std::barrier<> barrier(bx);
            together = &barrier;
            std::vector<std::thread> threads;
            for (unsigned t = 0; t < bx; t++)
                threads.emplace_back([=, &barrier] {
                    threadIdx.x = t;
                    blockIdx = {x, y};
                    function(args);
                    barrier.arrive_and_drop();
                });
            for (auto& thread : threads) thread.join();
        }
    return 0;
}
