// A TensorRT runtime without a GPU, for tests of how the library is called: its virtual tables are filled at the places
// where NVIDIA's headers (the include path decides which) have the methods, and every other place ends the process.
//
// A plan is text, a tensor a line: NAME MODE TYPE SIZE..., with the numbers of TensorIOMode and DataType. A run gives
//
//     logits[k] = volume[k] + k      pooled[k] = volume[k]      feature_map[k] = volume[k mod voxels]      scores[k] = -1
//
// Objects that are destroyed before what was made from them end the process, too.
#include <NvInfer.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;
using namespace nvinfer1::apiv;

// From driver.cpp, which a process that runs plans has preloaded; one that only asks for the version has not.
extern "C" __attribute__((weak)) void* stand_in_host_view(void const* device);
extern "C" __attribute__((weak)) size_t stand_in_size(void const* device);
extern "C" __attribute__((weak)) void stand_in_put(void* stream, void (*work)(void*), void* argument);

namespace {

[[noreturn]] void wrong(char const* what)
{
    std::fprintf(stderr, "stand-in library: %s\n", what);
    std::_Exit(98);
}

void unexpected()
{
    wrong("a method was called that no test expects");
}

template <typename Method>
long place(Method method)
{
    long value = 0;
    std::memcpy(&value, &method, sizeof value);
    return (value - 1) / static_cast<long>(sizeof(void*));
}

struct Table {
    void* method[128];
    Table()
    {
        for (auto& m : method) {
            m = reinterpret_cast<void*>(&unexpected);
        }
    }
    template <typename Function>
    void set(long at, Function function)
    {
        method[at] = reinterpret_cast<void*>(function);
    }
};

// An implementation: a table, then what it needs.
struct Implementation {
    void** table;
};
// A public object: a table with the destructor alone, and its implementation.
struct Object {
    void** table;
    Implementation* implementation;
};

struct Tensor {
    std::string name;
    int32_t mode;
    int32_t type;
    Dims dims;
};

int engines = 0;
int executions = 0;
ILogger* logger = nullptr;

struct EngineImplementation : Implementation {
    std::vector<Tensor> tensors;
    Tensor const* find(char const* name) const
    {
        for (auto const& t : tensors) {
            if (t.name == name) {
                return &t;
            }
        }
        wrong("a tensor was asked for that the engine does not have");
    }
};

struct ExecutionImplementation : Implementation {
    std::map<std::string, void*> addresses;
};

void** table_of_destructor(void (*destroy)(Object*))
{
    auto* table = new Table;
    table->set(1, destroy);
    return table->method;
}

void destroy_execution(Object* object)
{
    --executions;
    delete static_cast<ExecutionImplementation*>(object->implementation);
    delete object;
}

void destroy_engine(Object* object)
{
    if (executions != 0) {
        wrong("the engine was destroyed before its execution contexts");
    }
    --engines;
    delete static_cast<EngineImplementation*>(object->implementation);
    delete object;
}

void destroy_runtime(Object* object)
{
    if (engines != 0) {
        wrong("the runtime was destroyed before its engine");
    }
    std::fprintf(stderr, "stand-in library: all destroyed\n");
    delete object->implementation;
    delete object;
}

float* values(ExecutionImplementation* self, char const* name)
{
    return static_cast<float*>(stand_in_host_view(self->addresses[name]));
}

size_t count(ExecutionImplementation* self, char const* name)
{
    return stand_in_size(self->addresses[name]) / sizeof(float);
}

void work(void* argument)
{
    auto* self = static_cast<ExecutionImplementation*>(argument);
    float const* volume = values(self, "volume");
    size_t const voxels = count(self, "volume");
    auto fill = [&](char const* name, auto value) {
        float* out = values(self, name);
        for (size_t k = 0; k < count(self, name); ++k) {
            out[k] = value(k);
        }
    };
    fill("logits", [&](size_t k) { return volume[k] + static_cast<float>(k); });
    fill("pooled", [&](size_t k) { return volume[k]; });
    fill("feature_map", [&](size_t k) { return volume[k % voxels]; });
    fill("scores", [&](size_t) { return -1.0F; });
}

bool set_address(void* object, char const* name, void* address)
{
    static_cast<ExecutionImplementation*>(object)->addresses[name] = address;
    return true;
}

bool enqueue(void* object, cudaStream_t stream)
{
    auto* self = static_cast<ExecutionImplementation*>(object);
    if (self->addresses.size() != 5) {
        wrong("enqueued before every tensor had its address");
    }
    if (std::getenv("STAND_IN_REFUSE_RUN") != nullptr) {
        logger->log(ILogger::Severity::kERROR, "stand-in: the run is refused");
        return false;
    }
    stand_in_put(stream, work, self);
    return true;
}

void* create_context(void*, int32_t strategy)
{
    if (strategy != static_cast<int32_t>(ExecutionContextAllocationStrategy::kSTATIC)) {
        wrong("another allocation strategy");
    }
    auto* table = new Table;
    table->set(place(&VExecutionContext::setTensorAddress), set_address);
    table->set(place(&VExecutionContext::enqueueV3), enqueue);
    auto* implementation = new ExecutionImplementation;
    implementation->table = table->method;
    ++executions;
    return new Object{table_of_destructor(destroy_execution), implementation};
}

int32_t tensor_count(void* self)
{
    return static_cast<int32_t>(static_cast<EngineImplementation*>(self)->tensors.size());
}
char const* tensor_name(void* self, int32_t index)
{
    return static_cast<EngineImplementation*>(self)->tensors.at(index).name.c_str();
}
int32_t tensor_mode(void* self, char const* name)
{
    return static_cast<EngineImplementation*>(self)->find(name)->mode;
}
int32_t tensor_type(void* self, char const* name)
{
    return static_cast<EngineImplementation*>(self)->find(name)->type;
}
Dims tensor_shape(void* self, char const* name)
{
    return static_cast<EngineImplementation*>(self)->find(name)->dims;
}

void* deserialize(void*, void const* plan, size_t bytes)
{
    auto* implementation = new EngineImplementation;
    std::istringstream lines(std::string(static_cast<char const*>(plan), bytes));
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        Tensor tensor{};
        if (!(words >> tensor.name >> tensor.mode >> tensor.type)) {
            logger->log(ILogger::Severity::kERROR, "stand-in: this is no plan");
            delete implementation;
            return nullptr;
        }
        while (tensor.dims.nbDims < Dims::MAX_DIMS && words >> tensor.dims.d[tensor.dims.nbDims]) {
            ++tensor.dims.nbDims;
        }
        implementation->tensors.push_back(tensor);
    }
    auto* table = new Table;
    table->set(place(&VCudaEngine::getNbIOTensors), tensor_count);
    table->set(place(&VCudaEngine::getIOTensorName), tensor_name);
    table->set(place(&VCudaEngine::getTensorIOMode), tensor_mode);
    table->set(place(&VCudaEngine::getTensorDataType), tensor_type);
    table->set(place(&VCudaEngine::getTensorShape), tensor_shape);
    table->set(place(&VCudaEngine::createExecutionContext), create_context);
    implementation->table = table->method;
    ++engines;
    return new Object{table_of_destructor(destroy_engine), implementation};
}

} // namespace

extern "C" {

int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
int32_t getInferLibBuildVersion() noexcept { return 1; }

void* createInferRuntime_INTERNAL(void* given, int32_t version) noexcept
{
    if (version != NV_TENSORRT_VERSION) {
        wrong("asked for another version");
    }
    logger = static_cast<ILogger*>(given);
    logger->log(ILogger::Severity::kWARNING, "stand-in: the logger is heard");
    auto* table = new Table;
    using Deserialize = ICudaEngine* (VRuntime::*)(void const*, std::size_t);
    table->set(place(static_cast<Deserialize>(&VRuntime::deserializeCudaEngine)), deserialize);
    return new Object{table_of_destructor(destroy_runtime), new Implementation{table->method}};
}

} // extern "C"
