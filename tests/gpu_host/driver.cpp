// A stand-in for the NVIDIA driver on machines without a GPU: the functions that darnet::gpu looks up, on host memory,
// with the resampling kernels compiled for the processor.
//
// It is as late as a driver may be. Every stream is a thread of its own that does its work in order, after a pause of up
// to 0.3 ms (the same for the same seed); copies read and write when their turn comes and not when they are asked for;
// fresh memory holds NaN, freed memory too. A buffer changed too early, a wait that is missing or a length that is wrong
// therefore shows in the numbers or is an error. Copies are checked against the allocations.
//
// Not there: graphs, and every kernel but those of KERNELS. `simulated_fail(n)` breaks the device at the n-th launch from
// then on, until `simulated_repair`; `simulated_launches` counts.
#include "launch.h"

#include KERNELS

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

typedef int Result;
typedef unsigned long long Address;
enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
};

static const size_t TOTAL = (size_t)4 << 30;

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    unsigned long long recorded = 0, done = 0;
    std::chrono::steady_clock::time_point at;

    void finish(unsigned long long turn) {
        std::lock_guard<std::mutex> lock(mutex);
        done = std::max(done, turn);
        at = std::chrono::steady_clock::now();
        changed.notify_all();
    }
    void wait(unsigned long long turn) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return done >= turn; });
    }
    unsigned long long turn() {
        std::lock_guard<std::mutex> lock(mutex);
        return recorded;
    }
};

struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> work;
    unsigned long long given = 0, done = 0;
    bool closed = false;
    unsigned long long seed;
    std::thread thread;

    explicit Stream(unsigned long long seed) : seed(seed | 1), thread([this] { run(); }) {}

    void run() {
        for (;;) {
            std::function<void()> next;
            {
                std::unique_lock<std::mutex> lock(mutex);
                changed.wait(lock, [&] { return closed || !work.empty(); });
                if (work.empty()) return;
                next = std::move(work.front());
                work.pop_front();
            }
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            std::this_thread::sleep_for(std::chrono::microseconds((seed >> 40) % 300));
            next();
            std::lock_guard<std::mutex> lock(mutex);
            ++done;
            changed.notify_all();
        }
    }
    void give(std::function<void()> job) {
        std::lock_guard<std::mutex> lock(mutex);
        work.push_back(std::move(job));
        ++given;
        changed.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        unsigned long long turn = given;
        changed.wait(lock, [&] { return done >= turn; });
    }
    void close() {
        wait();
        {
            std::lock_guard<std::mutex> lock(mutex);
            closed = true;
            changed.notify_all();
        }
        thread.join();
    }
};

// Never destroyed: threads may outlive whoever forgot to end them.
struct World {
    std::mutex mutex;
    std::map<Stream*, bool> streams;
    std::map<Address, size_t> memory;
    size_t taken = 0;
    unsigned long long seed = 1;
    std::atomic<long long> fail_in{-1};
    std::atomic<bool> broken{false};
    std::atomic<unsigned long long> launches{0};
};
static World& world() {
    static World* one = new World;
    return *one;
}

static Stream* default_stream() {
    static Stream* one = new Stream(0x5EED);
    return one;
}
static Stream* stream_of(Stream* stream) { return stream ? stream : default_stream(); }

static void wait_for_all() {
    std::vector<Stream*> all;
    {
        std::lock_guard<std::mutex> lock(world().mutex);
        for (auto& one : world().streams) all.push_back(one.first);
    }
    all.push_back(default_stream());
    for (Stream* one : all) one->wait();
}

// Whether `bytes` from `at` on lie in one allocation.
static bool is_ours(Address at, size_t bytes) {
    std::lock_guard<std::mutex> lock(world().mutex);
    auto after = world().memory.upper_bound(at);
    if (after == world().memory.begin()) return false;
    auto found = std::prev(after);
    return at + bytes <= found->first + found->second;
}

#define LIVE                                   \
    if (world().broken.load()) return ILLEGAL_ADDRESS

extern "C" {
void simulated_fail(long long launches) { world().fail_in.store(launches); }
void simulated_repair() {
    world().fail_in.store(-1);
    world().broken.store(false);
}
unsigned long long simulated_launches() { return world().launches.load(); }

Result cuInit(unsigned) { return SUCCESS; }
Result cuDriverGetVersion(int* version) { return *version = 12000, SUCCESS; }
Result cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) {
    *device = 0;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}
Result cuDeviceGetName(char* name, int room, int) {
    std::string text = "simulated device";
    return std::strncpy(name, text.c_str(), room), SUCCESS;
}
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    // Multiprocessors, compute capability's major and minor number.
    *value = attribute == 16 ? 8 : attribute == 75 ? 8 : attribute == 76 ? 6 : 0;
    return SUCCESS;
}
Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL, SUCCESS; }
Result cuDevicePrimaryCtxRetain(void** context, int) {
    LIVE;
    return *context = &world(), SUCCESS;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void* context) { return context == &world() ? SUCCESS : INVALID_HANDLE; }
Result cuCtxSynchronize() {
    wait_for_all();
    LIVE;
    return SUCCESS;
}

Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> lock(world().mutex);
    *free = TOTAL - world().taken;
    *total = TOTAL;
    return SUCCESS;
}
Result cuMemAlloc_v2(Address* at, size_t bytes) {
    LIVE;
    std::lock_guard<std::mutex> lock(world().mutex);
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > TOTAL - world().taken) return OUT_OF_MEMORY;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    std::memset(memory, 0xFF, bytes);
    *at = (Address)memory;
    world().memory[*at] = bytes;
    world().taken += bytes;
    return SUCCESS;
}
Result cuMemFree_v2(Address at) {
    wait_for_all();
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().memory.find(at);
    if (found == world().memory.end()) return INVALID_VALUE;
    std::memset((void*)at, 0xFF, found->second);
    world().taken -= found->second;
    world().memory.erase(found);
    std::free((void*)at);
    return SUCCESS;
}
Result cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    LIVE;
    *at = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*at) return OUT_OF_MEMORY;
    std::memset(*at, 0xFF, bytes);
    return SUCCESS;
}
Result cuMemFreeHost(void* at) { return std::free(at), SUCCESS; }

Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
    LIVE;
    if (!is_ours(to, bytes)) return INVALID_VALUE;
    stream_of(stream)->give([=] { std::memcpy((void*)to, from, bytes); });
    return SUCCESS;
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
    LIVE;
    if (!is_ours(from, bytes)) return INVALID_VALUE;
    stream_of(stream)->give([=] { std::memcpy(to, (const void*)from, bytes); });
    return SUCCESS;
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
    LIVE;
    if (!is_ours(from, bytes) || !is_ours(to, bytes)) return INVALID_VALUE;
    stream_of(stream)->give([=] { std::memcpy((void*)to, (const void*)from, bytes); });
    return SUCCESS;
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream* stream) {
    LIVE;
    if (!is_ours(to, bytes)) return INVALID_VALUE;
    stream_of(stream)->give([=] { std::memset((void*)to, value, bytes); });
    return SUCCESS;
}
// The synchronous copies wait for the default stream alone, as the driver does where other streams do not block.
Result cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) {
    Result asked = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
    default_stream()->wait();
    return asked;
}
Result cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) {
    Result asked = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
    default_stream()->wait();
    return asked;
}

Result cuStreamCreate(Stream** stream, unsigned) {
    LIVE;
    std::lock_guard<std::mutex> lock(world().mutex);
    *stream = new Stream(world().seed += 0x9E3779B97F4A7C15ull);
    world().streams[*stream] = true;
    return SUCCESS;
}
Result cuStreamDestroy_v2(Stream* stream) {
    {
        std::lock_guard<std::mutex> lock(world().mutex);
        world().streams.erase(stream);
    }
    // Others may be waiting for it: the handle's memory stays.
    stream->close();
    return SUCCESS;
}
Result cuStreamSynchronize(Stream* stream) {
    stream_of(stream)->wait();
    LIVE;
    return SUCCESS;
}
Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    LIVE;
    unsigned long long turn = event->turn();
    stream_of(stream)->give([=] { event->wait(turn); });
    return SUCCESS;
}

Result cuEventCreate(Event** event, unsigned) {
    LIVE;
    return *event = new Event, SUCCESS;
}
// Work that waits for it may still be under way: its memory stays.
Result cuEventDestroy_v2(Event*) { return SUCCESS; }
Result cuEventRecord(Event* event, Stream* stream) {
    LIVE;
    unsigned long long turn;
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        turn = ++event->recorded;
    }
    stream_of(stream)->give([=] { event->finish(turn); });
    return SUCCESS;
}
Result cuEventQuery(Event* event) {
    LIVE;
    std::lock_guard<std::mutex> lock(event->mutex);
    return event->done >= event->recorded ? SUCCESS : NOT_READY;
}
Result cuEventSynchronize(Event* event) {
    event->wait(event->turn());
    LIVE;
    return SUCCESS;
}
Result cuEventElapsedTime(float* ms, Event* from, Event* to) {
    LIVE;
    *ms = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return SUCCESS;
}

Result cuModuleLoadData(void** module, const void* image) {
    LIVE;
    if (std::memcmp(image, "simulated", 9) != 0) return INVALID_VALUE;
    return *module = &world(), SUCCESS;
}
Result cuModuleUnload(void*) { return SUCCESS; }
static const char* const NAMES[] = {"in_plane_f32", "gather_f32", "texture_f32"};
Result cuModuleGetFunction(void** function, void*, const char* name) {
    LIVE;
    for (auto& one : NAMES) {
        if (std::strcmp(one, name) == 0) return *function = (void*)&one, SUCCESS;
    }
    return NOT_FOUND;
}
Result cuFuncSetAttribute(void*, int, int) { return SUCCESS; }
}

template <class T> static T argument(void** parameters, int at) {
    T value;
    std::memcpy(&value, parameters[at], sizeof value);
    return value;
}

extern "C" {
Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                      Stream* stream, void** p, void**) {
    LIVE;
    if (world().fail_in.load() >= 0 && world().fail_in.fetch_sub(1) == 0) {
        world().broken.store(true);
        return ILLEGAL_ADDRESS;
    }
    world().launches.fetch_add(1);
    Index grid = {gx, gy, gz}, block = {bx, by, bz};
    if (gx == 0 || gy == 0 || gz == 0 || gy > 65535 || gz > 65535 || bx * by * bz > 1024) return INVALID_VALUE;
    std::string name = *(const char* const*)function;
    std::function<void()> job;
    // Parameters are read now, as by the driver.
    if (name == "in_plane_f32") {
        auto hu = argument<const short*>(p, 0);
        auto plan = argument<const unsigned*>(p, 1);
        auto low = argument<float>(p, 2), inverse_width = argument<float>(p, 3);
        auto out = argument<float*>(p, 4);
        job = [=] { launch(grid, block, [&] { in_plane_f32(hu, plan, low, inverse_width, out); }); };
    } else if (name == "gather_f32") {
        auto slices = argument<const unsigned long long*>(p, 0);
        auto plan = argument<const unsigned*>(p, 1);
        auto area = argument<unsigned>(p, 2);
        auto out = argument<float*>(p, 3);
        job = [=] { launch(grid, block, [&] { gather_f32(slices, plan, area, out); }); };
    } else {
        auto input = argument<const float*>(p, 0);
        auto d = argument<unsigned>(p, 1), h = argument<unsigned>(p, 2), w = argument<unsigned>(p, 3);
        auto rows = argument<unsigned>(p, 4);
        auto levels = argument<float>(p, 5);
        auto clip = argument<int>(p, 6);
        auto sums = argument<unsigned long long*>(p, 7);
        job = [=] { launch(grid, block, [&] { texture_f32(input, d, h, w, rows, levels, clip, sums); }); };
    }
    stream_of(stream)->give(job);
    return SUCCESS;
}

Result cuStreamBeginCapture_v2(Stream*, int) { return NOT_SUPPORTED; }
Result cuStreamEndCapture(Stream*, void**) { return NOT_SUPPORTED; }
Result cuGraphInstantiateWithFlags(void**, void*, unsigned long long) { return NOT_SUPPORTED; }
Result cuGraphLaunch(void*, Stream*) { return NOT_SUPPORTED; }
Result cuGraphDestroy(void*) { return NOT_SUPPORTED; }
Result cuGraphExecDestroy(void*) { return NOT_SUPPORTED; }
Result cuTensorMapEncodeTiled() { return NOT_SUPPORTED; }
Result cuGetErrorName(Result error, const char** name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
        : error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
        : error == NOT_SUPPORTED   ? "CUDA_ERROR_NOT_SUPPORTED"
                                   : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
Result cuGetErrorString(Result error, const char** text) {
    *text = error == ILLEGAL_ADDRESS ? "the simulated device is broken" : "refused by the simulated device";
    return SUCCESS;
}
}
