// One C interface over TensorRT 10, TensorRT 11 and TensorRT for RTX, opened at run time.
//
// Input: paths of libraries, an ONNX model, a plan, device pointers, a CUDA stream. Output: status codes (see
// `Status`, mirrored in library.rs) and a message. Nothing of NVIDIA's is linked and none of its headers is used:
// layout.h has what is called. No exception leaves (TensorRT's methods throw none), and a null pointer or one below the
// first page, which factories return without a usable driver, is a status.
//
// Libraries stay open for the life of the process, and so do the loggers: TensorRT keeps the first one for good.
#include "layout.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <new>

using namespace darnet_trt;

namespace {

enum Status : int32_t {
    OK = 0,
    ABSENT = 1,
    SYMBOL = 2,
    VERSION = 3,
    DRIVER = 4,
    NO_BUILDER = 5,
    PARSE = 6,
    BUILD = 7,
    PLAN = 8,
    CONTEXT = 9,
    ADDRESS = 10,
    ENQUEUE = 11,
    MEMORY = 12,
};

using LogCallback = void (*)(void* user, int32_t severity, char const* text);
// kind: 0 phase begins (value: its steps), 1 a step is done, 2 phase ends. Zero stops the build.
using ProgressCallback = int32_t (*)(void* user, int32_t kind, char const* phase, char const* parent, int32_t value);

class PlainSink final : public PlainLogger {
public:
    LogCallback callback = nullptr;
    void* user = nullptr;
    void log(int32_t severity, char const* text) noexcept override
    {
        callback(user, severity, text);
    }
};

class VersionedSink final : public VersionedLogger {
public:
    LogCallback callback = nullptr;
    void* user = nullptr;
    void log(int32_t severity, char const* text) noexcept override
    {
        callback(user, severity, text);
    }
};

class Monitor final : public ProgressMonitor {
public:
    ProgressCallback callback = nullptr;
    void* user = nullptr;
    void phase_start(char const* phase, char const* parent, int32_t steps) noexcept override
    {
        callback(user, 0, phase, parent, steps);
    }
    bool step_complete(char const* phase, int32_t step) noexcept override
    {
        return callback(user, 1, phase, nullptr, step) != 0;
    }
    void phase_finish(char const* phase) noexcept override
    {
        callback(user, 2, phase, nullptr, 0);
    }
};

// No object lies in the first page: a small number is how TensorRT says that there is no driver.
constexpr uintptr_t PAGE = 4096;

bool usable(void const* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) >= PAGE;
}

// A method by its place: a virtual call with the object first, as the C++ ABI does it.
template <typename Result, typename... Arguments>
Result call(void* object, int place, Arguments... arguments)
{
    void** table = *static_cast<void***>(object);
    auto method = reinterpret_cast<Result (*)(void*, Arguments...)>(table[place]);
    return method(object, arguments...);
}

void* impl(void* object)
{
    void* found = nullptr;
    std::memcpy(&found, static_cast<char*>(object) + OBJECT_IMPL_OFFSET, sizeof found);
    return found;
}

void release(void* object)
{
    if (usable(object)) {
        call<void>(object, OBJECT_DELETE);
    }
}

// Releases at the end of its block.
struct Owned {
    void* object;
    int place;
    explicit Owned(void* given, int delete_place = OBJECT_DELETE) : object(given), place(delete_place) {}
    Owned(Owned const&) = delete;
    Owned& operator=(Owned const&) = delete;
    ~Owned()
    {
        if (usable(object)) {
            call<void>(object, place);
        }
    }
    bool ok() const
    {
        return usable(object);
    }
};

void say(char* message, size_t room, char const* text)
{
    if (room > 0) {
        std::snprintf(message, room, "%s", text == nullptr ? "unknown" : text);
    }
}

using Factory = void* (*)(void* logger, int32_t version);
using ParserFactory = void* (*)(void* network, void* logger, int32_t version);
using Number = int32_t (*)();

} // namespace

extern "C" {

struct darnet_trt_library {
    Layout const* layout;
    Factory create_runtime;
    Factory create_builder;
    ParserFactory create_parser;
    int32_t version;
    int32_t parser_version;
    int32_t parts[4];
    void* logger;
    PlainSink plain;
    VersionedSink versioned;
};

struct darnet_trt_tensor {
    char const* name;
    int32_t mode;
    int32_t type;
    int32_t rank;
    int64_t size[MAX_DIMS];
};

struct darnet_trt_build_options {
    // Scratch the chosen kernels may take, bytes; 0 leaves the library's default.
    uint64_t workspace_bytes;
    // A timing cache of an earlier build; `cache_bytes` 0 begins an empty one.
    void const* cache;
    size_t cache_bytes;
    int32_t keep_cache;
    ProgressCallback progress;
    void* user;
};

struct darnet_trt_built {
    // IHostMemory objects, to be given to darnet_trt_release; `cache` may be null.
    void* plan;
    void const* plan_data;
    size_t plan_bytes;
    void* cache;
    void const* cache_data;
    size_t cache_bytes;
    int32_t layers;
};

// Opens `path`, and `parser_path` where it is not null. `version_parts` gets major, minor, patch, build.
int32_t darnet_trt_open(char const* path, char const* parser_path, LogCallback log, void* user,
    darnet_trt_library** out, int32_t* version_parts, char* message, size_t room)
{
    *out = nullptr;
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        say(message, room, dlerror());
        return ABSENT;
    }
    auto symbol = [](void* from, char const* name) { return dlsym(from, name); };
    auto create_runtime = reinterpret_cast<Factory>(symbol(handle, "createInferRuntime_INTERNAL"));
    auto version = reinterpret_cast<Number>(symbol(handle, "getInferLibVersion"));
    Number part[4] = {
        reinterpret_cast<Number>(symbol(handle, "getInferLibMajorVersion")),
        reinterpret_cast<Number>(symbol(handle, "getInferLibMinorVersion")),
        reinterpret_cast<Number>(symbol(handle, "getInferLibPatchVersion")),
        reinterpret_cast<Number>(symbol(handle, "getInferLibBuildVersion")),
    };
    if (create_runtime == nullptr || version == nullptr || part[0] == nullptr || part[1] == nullptr) {
        say(message, room, "no createInferRuntime_INTERNAL, getInferLibVersion, getInferLibMajorVersion or "
                           "getInferLibMinorVersion");
        return SYMBOL;
    }
    for (int i = 0; i < 4; ++i) {
        version_parts[i] = part[i] == nullptr ? 0 : part[i]();
    }
    Layout const* layout = layout_of(version_parts[0], version_parts[1]);
    if (layout == nullptr) {
        say(message, room, "this version's interface is not known");
        return VERSION;
    }
    auto* library = new (std::nothrow) darnet_trt_library{};
    if (library == nullptr) {
        say(message, room, "no memory");
        return MEMORY;
    }
    library->layout = layout;
    library->create_runtime = create_runtime;
    library->create_builder = reinterpret_cast<Factory>(symbol(handle, "createInferBuilder_INTERNAL"));
    library->version = version();
    std::memcpy(library->parts, version_parts, sizeof library->parts);
    library->plain.callback = log;
    library->plain.user = user;
    library->versioned.callback = log;
    library->versioned.user = user;
    library->logger = layout->logger_is_versioned ? static_cast<void*>(static_cast<VersionedLogger*>(&library->versioned))
                                                  : static_cast<void*>(static_cast<PlainLogger*>(&library->plain));
    if (parser_path != nullptr) {
        void* parser = dlopen(parser_path, RTLD_NOW | RTLD_LOCAL);
        if (parser != nullptr) {
            library->create_parser = reinterpret_cast<ParserFactory>(symbol(parser, "createNvOnnxParser_INTERNAL"));
            auto parser_version = reinterpret_cast<Number>(symbol(parser, "getNvOnnxParserVersion"));
            library->parser_version = parser_version == nullptr ? library->version : parser_version();
        } else {
            say(message, room, dlerror());
        }
    }
    *out = library;
    return OK;
}

// Whether plans can be built: a builder and a parser are there.
int32_t darnet_trt_can_build(darnet_trt_library const* library)
{
    return library->create_builder != nullptr && library->create_parser != nullptr ? 1 : 0;
}

char const* darnet_trt_layout(darnet_trt_library const* library)
{
    return library->layout->name;
}

void darnet_trt_release(void* object)
{
    release(object);
}

// Builds a plan from the bytes of a strongly typed ONNX model.
int32_t darnet_trt_build(darnet_trt_library* library, void const* onnx, size_t onnx_bytes,
    darnet_trt_build_options const* options, darnet_trt_built* out, char* message, size_t room)
{
    std::memset(out, 0, sizeof *out);
    Layout const& at = *library->layout;
    if (library->create_builder == nullptr || library->create_parser == nullptr) {
        say(message, room, library->create_builder == nullptr ? "this library is a runtime alone, without a builder"
                                                              : "its ONNX parser was not found beside it");
        return NO_BUILDER;
    }
    Owned builder(library->create_builder(library->logger, library->version));
    if (!builder.ok()) {
        say(message, room, "no builder was made: is there a usable driver and GPU?");
        return DRIVER;
    }
    void* const builder_impl = impl(builder.object);
    Owned network(call<void*>(builder_impl, at.builder_create_network, uint32_t{1} << at.strongly_typed_bit));
    Owned config(call<void*>(builder_impl, at.builder_create_config));
    if (!network.ok() || !config.ok()) {
        say(message, room, "no network or no builder configuration was made");
        return BUILD;
    }
    Owned parser(library->create_parser(network.object, library->logger, library->parser_version), at.parser_delete);
    if (!parser.ok()) {
        say(message, room, "no ONNX parser was made");
        return NO_BUILDER;
    }
    // The parser keeps pointers into the model: both live until the plan is built.
    if (!call<bool>(parser.object, at.parser_parse, onnx, onnx_bytes, static_cast<char const*>(nullptr))) {
        int const errors = call<int>(parser.object, at.parser_error_count);
        void* error = errors > 0 ? call<void*>(parser.object, at.parser_error, 0) : nullptr;
        if (usable(error)) {
            int const node = call<int>(error, at.parser_error_node);
            char const* text = call<char const*>(error, at.parser_error_text);
            std::snprintf(message, room, "node %d: %s", node, text == nullptr ? "unknown" : text);
        } else {
            say(message, room, "the model was not understood");
        }
        return PARSE;
    }
    void* const network_impl = impl(network.object);
    out->layers = call<int32_t>(network_impl, at.network_layer_count);

    void* const config_impl = impl(config.object);
    if (options->workspace_bytes != 0) {
        call<void>(config_impl, at.config_set_pool_limit, POOL_WORKSPACE, static_cast<size_t>(options->workspace_bytes));
    }
    // A cache of another GPU or version is refused by the library; an empty one then takes its place.
    Owned earlier(options->keep_cache != 0
            ? call<void*>(config_impl, at.config_create_cache, options->cache, options->cache_bytes)
            : nullptr);
    bool caching = earlier.ok() && call<bool>(config_impl, at.config_set_cache, earlier.object, false);
    Owned empty(options->keep_cache != 0 && !caching && options->cache_bytes != 0
            ? call<void*>(config_impl, at.config_create_cache, static_cast<void const*>(nullptr), size_t{0})
            : nullptr);
    caching = caching || (empty.ok() && call<bool>(config_impl, at.config_set_cache, empty.object, false));
    Monitor monitor;
    monitor.callback = options->progress;
    monitor.user = options->user;
    if (options->progress != nullptr) {
        call<void>(config_impl, at.config_set_monitor, static_cast<void*>(static_cast<ProgressMonitor*>(&monitor)));
    }
    void* plan = call<void*>(builder_impl, at.builder_build, network.object, config.object);
    if (!usable(plan)) {
        say(message, room, "the builder made no plan");
        return BUILD;
    }
    out->plan = plan;
    out->plan_data = call<void*>(impl(plan), at.host_memory_data);
    out->plan_bytes = call<size_t>(impl(plan), at.host_memory_size);
    if (caching) {
        void* used = call<void*>(config_impl, at.config_get_cache);
        void* bytes = usable(used) ? call<void*>(impl(used), at.cache_serialize) : nullptr;
        if (usable(bytes)) {
            out->cache = bytes;
            out->cache_data = call<void*>(impl(bytes), at.host_memory_data);
            out->cache_bytes = call<size_t>(impl(bytes), at.host_memory_size);
        }
    }
    return OK;
}

int32_t darnet_trt_runtime(darnet_trt_library* library, void** out, char* message, size_t room)
{
    *out = nullptr;
    void* runtime = library->create_runtime(library->logger, library->version);
    if (!usable(runtime)) {
        if (room > 0) {
            std::snprintf(message, room, "the runtime's factory returned %#zx, which is no object",
                static_cast<size_t>(reinterpret_cast<uintptr_t>(runtime)));
        }
        return DRIVER;
    }
    *out = runtime;
    return OK;
}

int32_t darnet_trt_engine(
    darnet_trt_library const* library, void* runtime, void const* plan, size_t bytes, void** out, char* message, size_t room)
{
    *out = call<void*>(impl(runtime), library->layout->runtime_deserialize, plan, bytes);
    if (!usable(*out)) {
        *out = nullptr;
        say(message, room, "the plan was not accepted");
        return PLAN;
    }
    return OK;
}

int32_t darnet_trt_tensor_count(darnet_trt_library const* library, void* engine)
{
    return call<int32_t>(impl(engine), library->layout->engine_tensor_count);
}

int32_t darnet_trt_tensor(darnet_trt_library const* library, void* engine, int32_t index, darnet_trt_tensor* out)
{
    Layout const& at = *library->layout;
    void* const engine_impl = impl(engine);
    std::memset(out, 0, sizeof *out);
    out->name = call<char const*>(engine_impl, at.engine_tensor_name, index);
    if (!usable(out->name)) {
        out->name = nullptr;
        return PLAN;
    }
    out->mode = call<int32_t>(engine_impl, at.engine_tensor_mode, out->name);
    out->type = call<int32_t>(engine_impl, at.engine_tensor_type, out->name);
    Dims const dims = call<Dims>(engine_impl, at.engine_tensor_shape, out->name);
    if (dims.rank < 0 || dims.rank > MAX_DIMS) {
        return PLAN;
    }
    out->rank = dims.rank;
    std::memcpy(out->size, dims.size, sizeof out->size);
    return OK;
}

int32_t darnet_trt_context(darnet_trt_library const* library, void* engine, void** out, char* message, size_t room)
{
    *out = call<void*>(impl(engine), library->layout->engine_create_context, CONTEXT_STATIC);
    if (!usable(*out)) {
        *out = nullptr;
        say(message, room, "no execution context was made: is there room on the GPU?");
        return CONTEXT;
    }
    return OK;
}

int32_t darnet_trt_set_address(darnet_trt_library const* library, void* context, char const* tensor, void* address)
{
    return call<bool>(impl(context), library->layout->context_set_address, tensor, address) ? OK : ADDRESS;
}

int32_t darnet_trt_enqueue(darnet_trt_library const* library, void* context, void* stream)
{
    return call<bool>(impl(context), library->layout->context_enqueue, stream) ? OK : ENQUEUE;
}

} // extern "C"
