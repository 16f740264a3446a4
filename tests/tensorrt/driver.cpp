// A CUDA driver without a GPU, for tests of how the driver is called: what is not modelled here is not there.
//
// Memory of the "GPU" is the host's under addresses that the host cannot follow. Work put on a stream is done when the
// stream is waited for, never before. What a test can ask for, by environment:
//
//     STAND_IN_FAIL=cuMemAlloc_v2       the call fails, each time
//     STAND_IN_FAIL=cuMemAlloc_v2:3     the third call fails
//
// A wrong order (memory that is freed twice or never, a wait that is missing) ends the process with a message.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr uintptr_t TAG = uintptr_t{1} << 62;
constexpr int OUT_OF_MEMORY = 2;
constexpr int INVALID = 1;

[[noreturn]] void wrong(char const* what)
{
    std::fprintf(stderr, "stand-in driver: %s\n", what);
    std::_Exit(99);
}

int failing(char const* name)
{
    static std::map<std::string, int> calls;
    char const* wanted = std::getenv("STAND_IN_FAIL");
    int const count = ++calls[name];
    if (wanted == nullptr) {
        return 0;
    }
    char const* colon = std::strchr(wanted, ':');
    std::string const which = colon == nullptr ? wanted : std::string(wanted, colon);
    if (which != name) {
        return 0;
    }
    return colon == nullptr || std::atoi(colon + 1) == count ? OUT_OF_MEMORY : 0;
}

#define MAY_FAIL                                                                                                      \
    if (int const error = failing(__func__)) {                                                                        \
        return error;                                                                                                 \
    }

using Work = std::vector<std::function<void()>>;

struct Stream {
    Work queued;
    Work recorded;
    bool recording = false;
};

std::map<uintptr_t, size_t> device_memory;
std::map<void*, size_t> host_memory;
int streams = 0;
int graphs = 0;
int contexts = 0;
bool bound = false;

void put(Stream* stream, std::function<void()> work)
{
    (stream->recording ? stream->recorded : stream->queued).push_back(std::move(work));
}

} // namespace

extern "C" {

// For the stand-in library: the host's view of memory of the "GPU", and its own work on a stream.
void* stand_in_host_view(void const* device)
{
    auto const address = reinterpret_cast<uintptr_t>(device) & ~TAG;
    if (device_memory.count(address) == 0) {
        wrong("a tensor's address is no memory of the GPU");
    }
    return reinterpret_cast<void*>(address);
}

size_t stand_in_size(void const* device)
{
    return device_memory[reinterpret_cast<uintptr_t>(device) & ~TAG];
}

void stand_in_put(void* stream, void (*work)(void*), void* argument)
{
    if (!bound) {
        wrong("enqueued without a current context");
    }
    put(static_cast<Stream*>(stream), [=] { work(argument); });
}

int cuInit(unsigned) { MAY_FAIL return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? 0 : INVALID; }
int cuDeviceGetName(char* name, int room, int) { std::snprintf(name, room, "Stand-in GPU"); return 0; }
int cuDeviceGetAttribute(int* value, int which, int)
{
    // Major and minor compute capability are 75 and 76.
    *value = which == 75 ? 8 : which == 76 ? 9 : -1;
    return 0;
}
int cuGetErrorName(int error, char const** name)
{
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}
int cuGetErrorString(int error, char const** text) { return cuGetErrorName(error, text); }
int cuDevicePrimaryCtxRetain(void** context, int) { MAY_FAIL ++contexts; *context = &contexts; return 0; }
int cuDevicePrimaryCtxRelease_v2(int)
{
    if (--contexts == 0 && (!device_memory.empty() || !host_memory.empty() || streams != 0 || graphs != 0)) {
        wrong("the context was released before what lives in it");
    }
    return 0;
}
int cuCtxSetCurrent(void* context) { bound = context != nullptr; return 0; }
int cuMemAlloc_v2(uintptr_t* address, size_t bytes)
{
    MAY_FAIL
    auto const real = reinterpret_cast<uintptr_t>(std::malloc(bytes));
    device_memory[real] = bytes;
    *address = real | TAG;
    return 0;
}
int cuMemFree_v2(uintptr_t address)
{
    if (device_memory.erase(address & ~TAG) != 1) {
        wrong("freed what is not allocated");
    }
    std::free(reinterpret_cast<void*>(address & ~TAG));
    return 0;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned)
{
    MAY_FAIL
    *memory = std::malloc(bytes);
    std::memset(*memory, 0xAB, bytes);
    host_memory[*memory] = bytes;
    return 0;
}
int cuMemFreeHost(void* memory)
{
    if (host_memory.erase(memory) != 1) {
        wrong("unlocked what is not locked");
    }
    std::free(memory);
    return 0;
}
int cuStreamCreate(void** stream, unsigned) { MAY_FAIL ++streams; *stream = new Stream; return 0; }
int cuStreamDestroy_v2(void* stream)
{
    if (!static_cast<Stream*>(stream)->queued.empty()) {
        wrong("a stream was destroyed with work on it");
    }
    --streams;
    delete static_cast<Stream*>(stream);
    return 0;
}
int cuStreamSynchronize(void* stream)
{
    MAY_FAIL
    Work work;
    work.swap(static_cast<Stream*>(stream)->queued);
    for (auto const& step : work) {
        step();
    }
    return 0;
}
int cuMemcpyHtoD_v2(uintptr_t to, void const* from, size_t bytes)
{
    MAY_FAIL
    std::memcpy(stand_in_host_view(reinterpret_cast<void*>(to)), from, bytes);
    return 0;
}
int cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t bytes)
{
    MAY_FAIL
    std::memcpy(to, stand_in_host_view(reinterpret_cast<void*>(from)), bytes);
    return 0;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, void const* from, size_t bytes, void* stream)
{
    MAY_FAIL
    put(static_cast<Stream*>(stream), [=] {
        std::memcpy(stand_in_host_view(reinterpret_cast<void*>(to)), from, bytes);
    });
    return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, void* stream)
{
    MAY_FAIL
    put(static_cast<Stream*>(stream), [=] {
        std::memcpy(to, stand_in_host_view(reinterpret_cast<void*>(from)), bytes);
    });
    return 0;
}
int cuStreamBeginCapture_v2(void* stream, int)
{
    MAY_FAIL
    static_cast<Stream*>(stream)->recording = true;
    return 0;
}
int cuStreamEndCapture(void* stream, void** graph)
{
    auto* const s = static_cast<Stream*>(stream);
    s->recording = false;
    *graph = new Work(std::move(s->recorded));
    s->recorded.clear();
    ++graphs;
    return 0;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long)
{
    MAY_FAIL
    *executable = new Work(*static_cast<Work*>(graph));
    ++graphs;
    return 0;
}
int cuGraphDestroy(void* graph) { --graphs; delete static_cast<Work*>(graph); return 0; }
int cuGraphExecDestroy(void* graph) { --graphs; delete static_cast<Work*>(graph); return 0; }
int cuGraphLaunch(void* graph, void* stream)
{
    MAY_FAIL
    std::fprintf(stderr, "stand-in driver: graph launched\n");
    for (auto const& step : *static_cast<Work*>(graph)) {
        static_cast<Stream*>(stream)->queued.push_back(step);
    }
    return 0;
}

// Looked up at the start and called by no test here.
#define ABSENT(name)                                                                                                  \
    int name() { wrong(#name " was called"); }
ABSENT(cuDeviceTotalMem_v2)
ABSENT(cuCtxSynchronize)
ABSENT(cuMemGetInfo_v2)
ABSENT(cuMemcpyDtoDAsync_v2)
ABSENT(cuMemsetD8Async)
ABSENT(cuStreamWaitEvent)
ABSENT(cuEventCreate)
ABSENT(cuEventDestroy_v2)
ABSENT(cuEventRecord)
ABSENT(cuEventQuery)
ABSENT(cuEventSynchronize)
ABSENT(cuEventElapsedTime)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleUnload)
ABSENT(cuModuleGetFunction)
ABSENT(cuFuncSetAttribute)
ABSENT(cuLaunchKernel)
ABSENT(cuTensorMapEncodeTiled)

} // extern "C"
