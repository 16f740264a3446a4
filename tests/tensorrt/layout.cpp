// Compares src/engine/tensorrt/layout.h with NVIDIA's headers of one version, which the include path decides.
// Prints what differs and ends with 1; prints the version and ends with 0 if nothing does.
#include <NvInfer.h>
#include <NvOnnxParser.h>

#include "layout.h"

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <type_traits>

using namespace nvinfer1;
using namespace nvinfer1::apiv;

namespace {

int faults = 0;

void expect(char const* what, long ours, long theirs)
{
    if (ours != theirs) {
        std::printf("%s: layout.h says %ld, the header %ld\n", what, ours, theirs);
        ++faults;
    }
}

// A pointer to a virtual method holds 1 plus its offset in the virtual table (Itanium C++ ABI, x86-64).
template <typename Method>
long place(Method method)
{
    long value = 0;
    std::memcpy(&value, &method, sizeof value);
    return (value - 1) / static_cast<long>(sizeof(void*));
}

// The method must have this signature, or the file does not compile.
#define METHOD(field, Class, method, Result, ...)                                                                    \
    expect(#Class "::" #method, ours->field, place(static_cast<Result (Class::*)(__VA_ARGS__)>(&Class::method)))
#define CONST_METHOD(field, Class, method, Result, ...)                                                              \
    expect(#Class "::" #method, ours->field, place(static_cast<Result (Class::*)(__VA_ARGS__) const>(&Class::method)))

template <typename A, typename B>
struct SameSize {
    static_assert(sizeof(A) == sizeof(B) && alignof(A) == alignof(B), "size and alignment");
    static_assert(std::is_trivially_copyable_v<A> == std::is_trivially_copyable_v<B>, "passed the same way");
};
template struct SameSize<Dims, darnet_trt::Dims>;
template struct SameSize<InterfaceInfo, darnet_trt::InterfaceInfo>;
static_assert(offsetof(Dims, nbDims) == offsetof(darnet_trt::Dims, rank));
static_assert(offsetof(Dims, d) == offsetof(darnet_trt::Dims, size));
static_assert(offsetof(InterfaceInfo, major) == offsetof(darnet_trt::InterfaceInfo, major));
static_assert(Dims::MAX_DIMS == darnet_trt::MAX_DIMS);

// Enumerators and the types they are passed as.
static_assert(static_cast<int32_t>(DataType::kFLOAT) == darnet_trt::TYPE_FLOAT);
static_assert(static_cast<int32_t>(TensorIOMode::kINPUT) == darnet_trt::MODE_INPUT);
static_assert(static_cast<int32_t>(TensorIOMode::kOUTPUT) == darnet_trt::MODE_OUTPUT);
static_assert(static_cast<int32_t>(MemoryPoolType::kWORKSPACE) == darnet_trt::POOL_WORKSPACE);
static_assert(static_cast<int32_t>(ExecutionContextAllocationStrategy::kSTATIC) == darnet_trt::CONTEXT_STATIC);
static_assert(static_cast<int32_t>(APILanguage::kCPP) == 0);
static_assert(static_cast<int32_t>(ILogger::Severity::kERROR) == 1);
static_assert(static_cast<int32_t>(ILogger::Severity::kVERBOSE) == 4);
template <typename Enum>
constexpr bool is_int = std::is_same_v<std::underlying_type_t<Enum>, int32_t>;
static_assert(is_int<DataType> && is_int<TensorIOMode> && is_int<MemoryPoolType> && is_int<ILogger::Severity>
    && is_int<ExecutionContextAllocationStrategy> && is_int<APILanguage>);
static_assert(std::is_same_v<NetworkDefinitionCreationFlags, uint32_t>);

// An object is its table's pointer and its implementation's, and begins with its destructor.
static_assert(sizeof(IHostMemory) == 2 * sizeof(void*) && std::has_virtual_destructor_v<IHostMemory>);
static_assert(sizeof(IRuntime) == 2 * sizeof(void*) && std::has_virtual_destructor_v<IRuntime>);
static_assert(sizeof(ICudaEngine) == 2 * sizeof(void*) && std::has_virtual_destructor_v<ICudaEngine>);
static_assert(sizeof(IExecutionContext) == 2 * sizeof(void*) && std::has_virtual_destructor_v<IExecutionContext>);
static_assert(sizeof(IBuilder) == 2 * sizeof(void*) && std::has_virtual_destructor_v<IBuilder>);
static_assert(sizeof(IBuilderConfig) == 2 * sizeof(void*) && std::has_virtual_destructor_v<IBuilderConfig>);
static_assert(sizeof(ITimingCache) == 2 * sizeof(void*) && std::has_virtual_destructor_v<ITimingCache>);
static_assert(sizeof(INetworkDefinition) == 2 * sizeof(void*) && std::has_virtual_destructor_v<INetworkDefinition>);
static_assert(darnet_trt::OBJECT_IMPL_OFFSET == sizeof(void*));

} // namespace

int main()
{
    darnet_trt::Layout const* ours = darnet_trt::layout_of(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
    if (ours == nullptr) {
        std::printf("version %d.%d has no layout\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
        return 1;
    }
    CONST_METHOD(host_memory_data, VHostMemory, data, void*);
    CONST_METHOD(host_memory_size, VHostMemory, size, std::size_t);
    METHOD(runtime_deserialize, VRuntime, deserializeCudaEngine, ICudaEngine*, void const*, std::size_t);
    METHOD(engine_create_context, VCudaEngine, createExecutionContext, IExecutionContext*,
        ExecutionContextAllocationStrategy);
    CONST_METHOD(engine_tensor_shape, VCudaEngine, getTensorShape, Dims, char const*);
    CONST_METHOD(engine_tensor_type, VCudaEngine, getTensorDataType, DataType, char const*);
    CONST_METHOD(engine_tensor_mode, VCudaEngine, getTensorIOMode, TensorIOMode, char const*);
    CONST_METHOD(engine_tensor_count, VCudaEngine, getNbIOTensors, int32_t);
    CONST_METHOD(engine_tensor_name, VCudaEngine, getIOTensorName, char const*, int32_t);
    METHOD(context_set_address, VExecutionContext, setTensorAddress, bool, char const*, void*);
    METHOD(context_enqueue, VExecutionContext, enqueueV3, bool, cudaStream_t);
    METHOD(builder_create_config, VBuilder, createBuilderConfig, IBuilderConfig*);
    METHOD(builder_create_network, VBuilder, createNetworkV2, INetworkDefinition*, NetworkDefinitionCreationFlags);
    METHOD(builder_build, VBuilder, buildSerializedNetwork, IHostMemory*, INetworkDefinition&, IBuilderConfig&);
    CONST_METHOD(config_create_cache, VBuilderConfig, createTimingCache, ITimingCache*, void const*, std::size_t);
    METHOD(config_set_cache, VBuilderConfig, setTimingCache, bool, ITimingCache const&, bool);
    CONST_METHOD(config_get_cache, VBuilderConfig, getTimingCache, ITimingCache const*);
    METHOD(config_set_pool_limit, VBuilderConfig, setMemoryPoolLimit, void, MemoryPoolType, std::size_t);
    METHOD(config_set_monitor, VBuilderConfig, setProgressMonitor, void, IProgressMonitor*);
    CONST_METHOD(cache_serialize, VTimingCache, serialize, IHostMemory*);
    CONST_METHOD(network_layer_count, VNetworkDefinition, getNbLayers, int32_t);
    CONST_METHOD(network_input_count, VNetworkDefinition, getNbInputs, int32_t);
    CONST_METHOD(network_output_count, VNetworkDefinition, getNbOutputs, int32_t);

    using nvonnxparser::IParser;
    using nvonnxparser::IParserError;
    METHOD(parser_parse, IParser, parse, bool, void const*, size_t, char const*);
    CONST_METHOD(parser_error_count, IParser, getNbErrors, int);
    CONST_METHOD(parser_error, IParser, getError, IParserError const*, int);
    CONST_METHOD(parser_error_text, IParserError, desc, char const*);
    CONST_METHOD(parser_error_node, IParserError, node, int);
    // The destructor stands between these two and takes two places, the second of which frees.
    long const before = place(&IParser::clearErrors);
    long const after = place(&IParser::getUsedVCPluginLibraries);
    expect("places of IParser's destructor", 2, after - before - 1);
    expect("~IParser that frees", ours->parser_delete, after - 1);

    long const log = place(&ILogger::log);
    long const our_log = ours->logger_is_versioned ? place(&darnet_trt::VersionedLogger::log)
                                                   : place(&darnet_trt::PlainLogger::log);
    expect("ILogger::log", our_log, log);
    expect("IVersionedInterface::getAPILanguage", place(&darnet_trt::Versioned::language),
        place(&IVersionedInterface::getAPILanguage));
    expect("IVersionedInterface::getInterfaceInfo", place(&darnet_trt::Versioned::info),
        place(&IVersionedInterface::getInterfaceInfo));
    using OurMonitor = darnet_trt::ProgressMonitor;
    expect("IProgressMonitor::phaseStart", place(&OurMonitor::phase_start), place(&IProgressMonitor::phaseStart));
    expect("IProgressMonitor::stepComplete", place(&OurMonitor::step_complete), place(&IProgressMonitor::stepComplete));
    expect("IProgressMonitor::phaseFinish", place(&OurMonitor::phase_finish), place(&IProgressMonitor::phaseFinish));
    static_assert(std::is_same_v<decltype(&IProgressMonitor::phaseStart),
        void (IProgressMonitor::*)(char const*, char const*, int32_t) noexcept>);
    static_assert(std::is_same_v<decltype(&IProgressMonitor::stepComplete),
        bool (IProgressMonitor::*)(char const*, int32_t) noexcept>);
    static_assert(std::is_same_v<decltype(&ILogger::log),
        void (ILogger::*)(ILogger::Severity, AsciiChar const*) noexcept>);

    expect("kSTRONGLY_TYPED", ours->strongly_typed_bit,
        static_cast<long>(NetworkDefinitionCreationFlag::kSTRONGLY_TYPED));

    if (faults == 0) {
        std::printf("%d.%d: %s\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, ours->name);
    }
    return faults == 0 ? 0 : 1;
}
