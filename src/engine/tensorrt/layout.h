// What the shim knows of TensorRT's binary interface, in place of NVIDIA's headers.
//
// TensorRT's classes are thin: an object holds a pointer to its virtual table and, behind it, one to its implementation,
// and each method calls a virtual one of the implementation. A call therefore needs the number of a place in a virtual
// table and nothing else. These numbers differ between releases; three sets cover what there is:
//
//     TensorRT 10, TensorRT for RTX 1.3 and 1.4, TensorRT 11 and TensorRT for RTX 1.5 to 1.7
//
// Within TensorRT 10 and within 11 methods are only ever added behind the others. TensorRT for RTX renumbered between
// 1.4 and 1.5, so that of it only versions that were compared are opened. tests/tensorrt/layout.cpp compares every
// number, signature, size and enumerator here with NVIDIA's own headers of 10.16, 11.0, 11.4 and RTX 1.3 to 1.7.
//
// Virtual tables as in the Itanium C++ ABI (Linux): a virtual destructor takes two places, the second frees the object.
#ifndef DARNET_TENSORRT_LAYOUT_H
#define DARNET_TENSORRT_LAYOUT_H

#include <cstddef>
#include <cstdint>

namespace darnet_trt {

// Places in the virtual tables.
struct Layout {
    char const* name;
    // implementation of IHostMemory
    int host_memory_data;
    int host_memory_size;
    // of IRuntime
    int runtime_deserialize;
    // of ICudaEngine
    int engine_create_context;
    int engine_tensor_shape;
    int engine_tensor_type;
    int engine_tensor_mode;
    int engine_tensor_count;
    int engine_tensor_name;
    // of IExecutionContext
    int context_set_address;
    int context_enqueue;
    // of IBuilder
    int builder_create_config;
    int builder_create_network;
    int builder_build;
    // of IBuilderConfig
    int config_create_cache;
    int config_set_cache;
    int config_get_cache;
    int config_set_pool_limit;
    int config_set_monitor;
    // of ITimingCache
    int cache_serialize;
    // of INetworkDefinition
    int network_layer_count;
    int network_input_count;
    int network_output_count;
    // nvonnxparser::IParser and IParserError, which have no implementation apart
    int parser_parse;
    int parser_error_count;
    int parser_error;
    int parser_delete;
    int parser_error_text;
    int parser_error_node;
    // NetworkDefinitionCreationFlag::kSTRONGLY_TYPED
    int strongly_typed_bit;
    // whether ILogger begins with the two methods of IVersionedInterface
    bool logger_is_versioned;
};

constexpr Layout TENSORRT_10{
    "TensorRT 10", 2, 3, 3, 5, 19, 20, 23, 30, 31, 24, 37, 7, 8, 14, 40, 41, 42, 43, 56, 2, 12, 14, 16, 0, 5, 6, 9, 1, 5,
    1, false,
};
constexpr Layout RTX_1_3{
    "TensorRT for RTX 1.3 and 1.4", 2, 3, 3, 5, 17, 18, 21, 28, 29, 24, 37, 7, 8, 14, 29, 30, 31, 32, 45, 2, 12, 14, 16, 0, 5, 6,
    9, 1, 5, 1, false,
};
constexpr Layout TENSORRT_11{
    "TensorRT 11 and for RTX from 1.5", 2, 3, 3, 5, 15, 16, 19, 26, 27, 23, 36, 5, 6, 11, 29, 30, 31, 32, 45, 2, 12, 14, 16, 0, 3, 4, 7, 1, 5,
    0, true,
};

// The layout of a library, or none. RTX counts from 1, the others from 10 on.
constexpr Layout const* layout_of(int32_t major, int32_t minor)
{
    if (major == 10) {
        return &TENSORRT_10;
    }
    if (major == 11) {
        return &TENSORRT_11;
    }
    if (major == 1 && (minor == 3 || minor == 4)) {
        return &RTX_1_3;
    }
    if (major == 1 && minor >= 5 && minor <= 7) {
        return &TENSORRT_11;
    }
    return nullptr;
}

// Every TensorRT object here: virtual destructor in places 0 and 1, implementation behind the table's pointer.
constexpr int OBJECT_DELETE = 1;
constexpr std::size_t OBJECT_IMPL_OFFSET = sizeof(void*);

// Enumerators, the same in all of them.
constexpr int32_t TYPE_FLOAT = 0;
constexpr int32_t MODE_INPUT = 1;
constexpr int32_t MODE_OUTPUT = 2;
constexpr int32_t POOL_WORKSPACE = 0;
constexpr int32_t CONTEXT_STATIC = 0;

constexpr int32_t MAX_DIMS = 8;
// nvinfer1::Dims64
struct Dims {
    int32_t rank;
    int64_t size[MAX_DIMS];
};

// nvinfer1::InterfaceInfo
struct InterfaceInfo {
    char const* kind;
    int32_t major;
    int32_t minor;
};

// nvinfer1::IVersionedInterface
class Versioned {
public:
    virtual int32_t language() const noexcept
    {
        return 0;
    }
    virtual InterfaceInfo info() const noexcept = 0;
    virtual ~Versioned() noexcept = default;
};

// nvinfer1::ILogger up to TensorRT 10
class PlainLogger {
public:
    virtual void log(int32_t severity, char const* text) noexcept = 0;
    virtual ~PlainLogger() = default;
};

// nvinfer1::ILogger of TensorRT 11
class VersionedLogger : public Versioned {
public:
    InterfaceInfo info() const noexcept override
    {
        return {"ILogger", 1, 0};
    }
    virtual void log(int32_t severity, char const* text) noexcept = 0;
};

// nvinfer1::IProgressMonitor
class ProgressMonitor : public Versioned {
public:
    InterfaceInfo info() const noexcept override
    {
        return {"IProgressMonitor", 1, 0};
    }
    virtual void phase_start(char const* phase, char const* parent, int32_t steps) noexcept = 0;
    virtual bool step_complete(char const* phase, int32_t step) noexcept = 0;
    virtual void phase_finish(char const* phase) noexcept = 0;
};

} // namespace darnet_trt

#endif
