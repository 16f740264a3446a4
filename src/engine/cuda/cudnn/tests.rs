//! Without a GPU: the real library plans for devices that are only described to it. With one, `engine::cuda` compares
//! every candidate with a plain kernel before it is used.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use super::library::{open_cublaslt, open_for_good};
use super::*;

const fn conv(c: [usize; 2], input_dhw: [usize; 3], kernel: usize, stride: usize, relu: bool) -> ConvSpec {
    ConvSpec {
        c_in: c[0],
        c_out: c[1],
        input_dhw,
        kernel_dhw: [kernel; 3],
        stride_dhw: [stride; 3],
        padding_dhw: [kernel / 2; 3],
        relu,
        residual: false,
        bias: BiasType::F16,
    }
}

const fn stem(c_in: usize) -> ConvSpec {
    ConvSpec {
        kernel_dhw: [3, 7, 7],
        stride_dhw: [1, 2, 2],
        padding_dhw: [1, 3, 3],
        ..conv([c_in, 64], [64, 224, 224], 3, 1, true)
    }
}

/// The convolutions of DARNet at full size, and how often each is in one inference.
///
/// A block's second convolution has no ReLU, and none has a residual, because attention comes between. The stem is also
/// there with its channel padded to 8, which tensor cores take; that case is in no inference.
const CASES: [(&str, usize, ConvSpec); 15] = [
    ("stem", 1, stem(1)),
    ("stem padded to 8 channels", 0, stem(8)),
    ("layer1 relu", 2, conv([64, 64], [64, 112, 112], 3, 1, true)),
    ("layer1", 2, conv([64, 64], [64, 112, 112], 3, 1, false)),
    ("layer2 strided relu", 1, conv([64, 128], [64, 112, 112], 3, 2, true)),
    ("layer2 relu", 1, conv([128, 128], [32, 56, 56], 3, 1, true)),
    ("layer2", 2, conv([128, 128], [32, 56, 56], 3, 1, false)),
    ("layer2 shortcut", 1, conv([64, 128], [64, 112, 112], 1, 2, false)),
    ("layer3 strided relu", 1, conv([128, 256], [32, 56, 56], 3, 2, true)),
    ("layer3 relu", 3, conv([256, 256], [16, 28, 28], 3, 1, true)),
    ("layer3 shortcut", 1, conv([128, 256], [32, 56, 56], 1, 2, false)),
    ("layer4 strided relu", 1, conv([256, 512], [16, 28, 28], 3, 2, true)),
    ("layer4 relu", 3, conv([512, 512], [8, 14, 14], 3, 1, true)),
    ("layer4 shortcut", 1, conv([256, 512], [16, 28, 28], 1, 2, false)),
    ("layer1 residual relu", 0, ConvSpec { residual: true, ..conv([64, 64], [64, 112, 112], 3, 1, true) }),
];

const INSTALL: &str = ".venv/bin/python -m pip install --no-deps nvidia-cudnn-cu13==9.19.0.56";

/// The folder of the real library: `DARNET_TEST_CUDNN`, or where [`INSTALL`] puts it.
fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("DARNET_TEST_CUDNN") {
        return PathBuf::from(folder);
    }
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/lib");
    let pythons = std::fs::read_dir(&lib).into_iter().flatten().flatten();
    let mut folders = pythons.map(|python| python.path().join("site-packages/nvidia/cudnn/lib"));
    folders
        .find(|folder| folder.join(Library::FILE).exists())
        .unwrap_or_else(|| panic!("no cuDNN for the tests: run `{INSTALL}`, or set DARNET_TEST_CUDNN to its folder"))
}

fn library() -> Arc<Library> {
    static OPENED: LazyLock<Arc<Library>> = LazyLock::new(|| {
        let folder = folder();
        match Library::open(Some(&folder)) {
            Err(CudnnError::LibraryAbsent { library, .. }) if library.contains("libcublasLt") => {
                stand_in_for_cublaslt(&library);
                Library::open(Some(&folder)).expect("the real library")
            }
            opened => opened.expect("the real library"),
        }
    });
    Arc::clone(&OPENED)
}

/// While it plans, cuDNN asks cuBLASLt for its version and for a handle, and nothing else where it gets none, which it
/// does not without a device. The real one is half a gigabyte, so where it is not there a library with these two
/// functions stands in for it; whatever runs on a device needs the real one.
fn stand_in_for_cublaslt(file: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("version.c");
    // 1 is CUBLAS_STATUS_NOT_INITIALIZED.
    let functions =
        "unsigned long cublasLtGetVersion(void) { return 130100; }\nint cublasLtCreate(void) { return 1; }\n";
    std::fs::write(&source, functions).expect("write");
    let built = folder.path().join(file);
    let compiled = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", &format!("-Wl,-soname,{file}"), "-o"])
        .args([&built, &source])
        .status();
    assert!(compiled.expect("a C compiler").success(), "cc");
    open_for_good(&built).expect("the library just built");
}

fn driver_is_there() -> bool {
    open_for_good(Path::new("libcuda.so.1")).is_ok()
}

/// A device as cuDNN describes one: compute capability times 100, multiprocessors, shared memory a block, L2 in MiB.
struct Device(u32, u32, u32, u32);

const T4: Device = Device(750, 40, 65_536, 4);
const A100: Device = Device(800, 108, 166_912, 40);
const RTX_A4000: Device = Device(860, 48, 101_376, 4);
const L4: Device = Device(890, 60, 101_376, 48);
const H200: Device = Device(900, 132, 232_448, 60);
const RTX_5090: Device = Device(1200, 170, 101_376, 96);

impl Device {
    fn target(&self, library: &Arc<Library>) -> Target<'static> {
        let Self(capability, multiprocessors, shared, l2_mib) = self;
        let json = format!(
            r#"{{"cudaDeviceId": 0, "deviceName": "described", "deviceVer": {capability}, "driverVer": 13000,
            "multiProcessorCount": {multiprocessors}, "l2CacheSize": {}, "totalGlobalMem": 17179869184,
            "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": {shared},
            "reservedSharedMemoryPerBlock": 1024, "maxGridSize": [2147483647, 65535, 65535],
            "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "warpSize": 32,
            "maxCtasPerSM": 16, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 1024, "pciDeviceId": 1,
            "isTccDriver": 0, "supportCoopLaunch": 1, "smClockRateKHz": 1500000, "memClockRateKHz": 5000000}}"#,
            l2_mib << 20
        );
        let mut properties =
            Descriptor::new(library, kind!(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)).expect("cuDNN 9.8 or later");
        properties.set(attribute!(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION), json.as_bytes()).expect("set");
        Target::Described(properties.finalize().expect("every property that cuDNN asks for"))
    }
}

const SMALL: ConvSpec = ConvSpec {
    c_in: 64,
    c_out: 128,
    input_dhw: [6, 9, 11],
    kernel_dhw: [3, 3, 3],
    stride_dhw: [2, 2, 2],
    padding_dhw: [1, 1, 1],
    relu: true,
    residual: false,
    bias: BiasType::F16,
};

fn everything(target: &Target<'_>, spec: &ConvSpec, fusion: Fusion) -> Vec<Candidate> {
    find_plans(target, spec, fusion, usize::MAX).unwrap_or_else(|e| panic!("{spec}: {e}"))
}

#[test]
fn a_library_that_is_not_there_is_an_error_that_names_it() {
    let missing = Library::open(Some(Path::new("no/such/folder"))).expect_err("opened");
    assert!(matches!(&missing, CudnnError::LibraryAbsent { library, .. } if library.ends_with(Library::FILE)));
    assert!(missing.to_string().contains("no/such/folder") && missing.to_string().contains("install"), "{missing}");
}

#[test]
fn a_library_without_the_functions_is_an_error_that_names_the_first() {
    let other = Library::open_file(Path::new("libm.so.6")).expect_err("took another library");
    assert!(matches!(other, CudnnError::MissingSymbol { symbol: "cudnnGetVersion", .. }), "{other}");
}

#[test]
fn without_cublaslt_the_library_is_not_taken() {
    let missing = open_cublaslt(&folder(), 99).expect_err("opened");
    assert!(
        matches!(&missing, CudnnError::LibraryAbsent { library, .. } if library == "libcublasLt.so.99"),
        "{missing}"
    );
}

#[test]
fn the_real_library_has_every_function_and_a_version_that_is_taken() {
    let library = library();
    assert!((Library::OLDEST..=Library::NEWEST).contains(&library.version()), "{library:?}");
}

#[test]
fn without_a_driver_a_handle_is_an_error() {
    if driver_is_there() {
        // Whatever the driver says, nothing panics.
        // SAFETY: the default stream.
        let _ = unsafe { Cudnn::open_with(&library(), std::ptr::null_mut()) };
        return;
    }
    // SAFETY: no context is needed for a call that fails before it looks at the stream.
    let handle = unsafe { Cudnn::open_with(&library(), std::ptr::null_mut()) }.expect_err("a handle without a driver");
    assert!(matches!(&handle, CudnnError::Status { status: 1.., .. }), "{handle}");
    assert!(!handle.is_unsupported(), "{handle}");
    assert!(handle.to_string().starts_with("create a cuDNN handle: cuDNN status"), "{handle}");
}

#[test]
fn what_cudnn_refuses_is_an_error_with_its_words() {
    let library = library();
    let x = tensor(&library, uid::X, HALF, 1, 64, SMALL.input_dhw).expect("x");
    let w = tensor(&library, uid::W, HALF, 128, 64, SMALL.kernel_dhw).expect("w");
    let y = tensor(&library, uid::Y, HALF, 1, 128, SMALL.output_dhw()).expect("y");
    convolution(&library, &SMALL, &x, &w, &y).expect("shapes that fit");
    let short = tensor(&library, uid::Y, HALF, 1, 128, [3, 5, 5]).expect("a tensor");
    let refused = convolution(&library, &SMALL, &x, &w, &short).err().expect("shapes that do not fit");
    assert!(matches!(&refused, CudnnError::Status { status: 2000..=2999, .. }), "{refused}");
    assert!(refused.to_string().contains("CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR"), "{refused}");
    let mut blank = Descriptor::new(&library, kind!(CUDNN_BACKEND_TENSOR_DESCRIPTOR)).expect("a descriptor");
    let foreign = blank.set(attribute!(CUDNN_ATTR_POINTWISE_MODE), &[FLOAT]).expect_err("another kind's attribute");
    assert!(matches!(foreign, CudnnError::Status { .. }), "{foreign}");
    let blank = blank.finalize().err().expect("a tensor without a shape");
    assert!(matches!(blank, CudnnError::Status { .. }), "{blank}");
    let unknown = Descriptor::new(&library, Named { value: 9999, name: "none" }).err().expect("no such kind");
    assert!(matches!(unknown, CudnnError::Status { .. }), "{unknown}");
}

#[test]
fn every_convolution_of_the_network_has_fused_tensor_core_plans_on_each_kind_of_device() {
    let library = library();
    for device in [T4, A100, RTX_A4000, L4, H200, RTX_5090] {
        let target = device.target(&library);
        for (case, _, spec) in &CASES {
            let plans = everything(&target, spec, Fusion::Full);
            let good = |plan: &Candidate| plan.notes().contains(&Note::Numerical(0)) && plan.is_deterministic();
            assert!(plans.iter().any(good), "{case} on {}: {plans:?}", device.0);
            let names: HashSet<&str> = plans.iter().map(Candidate::name).collect();
            assert_eq!(names.len(), plans.len(), "{case} on {}: a plan twice", device.0);
        }
    }
}

/// A pass of training.
#[derive(Clone, Copy, Debug)]
enum Pass {
    Forward,
    Data,
    Filter,
}

/// What cuDNN proposes first for a pass over bf16, whose filter (or its gradient) lies at multiples of `alignment` bytes:
/// the notes of each engine that makes a plan.
fn proposed(target: &Target<'_>, spec: &ConvSpec, pass: Pass, alignment: i64) -> Result<Vec<Vec<u32>>, CudnnError> {
    const BF16: DataType = Enumerated(sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16 as u32);
    let library = target.library();
    let x = tensor_at(library, uid::X, BF16, 1, spec.c_in, spec.input_dhw, 512)?;
    let w = tensor_at(library, uid::W, BF16, spec.c_out, spec.c_in, spec.kernel_dhw, alignment)?;
    let y = tensor_at(library, uid::Y, BF16, 1, spec.c_out, spec.output_dhw(), 512)?;
    let how = convolution_descriptor(library, spec)?;
    let (kind, [conv, of_x, of_w, of_y, alpha, beta]) = match pass {
        Pass::Forward => (
            kind!(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR),
            [
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA),
            ],
        ),
        Pass::Data => (
            kind!(CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR),
            [
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA),
            ],
        ),
        Pass::Filter => (
            kind!(CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR),
            [
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA),
                attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA),
            ],
        ),
    };
    let mut operation = Descriptor::new(library, kind)?;
    for (name, part) in [(conv, &how), (of_x, &x), (of_w, &w), (of_y, &y)] {
        operation.refer(name, &[part])?;
    }
    operation.set(alpha, &[1.0f32])?;
    operation.set(beta, &[0.0f32])?;
    let operation = operation.finalize()?;
    let mut graph = Descriptor::new(library, kind!(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR))?;
    graph.refer(attribute!(CUDNN_ATTR_OPERATIONGRAPH_OPS), &[&operation])?;
    let graph = graph.finalize()?;
    let mut notes = Vec::new();
    for configuration in proposals(target, &graph, sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_INSTANT)? {
        let (name, engine) = identify(&configuration, Fusion::Plain)?;
        if let Ok(plan) = build(target, spec, &name, &engine, &configuration) {
            let numerical = |note: &Note| if let Note::Numerical(n) = note { Some(*n) } else { None };
            notes.push(plan.notes().iter().filter_map(numerical).collect());
        }
    }
    Ok(notes)
}

/// `train::net::ALIGNED` half-precision numbers are 128 bytes, and an allocation begins at 512.
#[test]
fn training_has_matrix_units_in_every_pass_where_filters_are_aligned_and_on_hopper_in_none_at_odd_addresses() {
    let library = library();
    for device in [A100, L4, H200, RTX_5090] {
        let target = device.target(&library);
        for (case, _, spec) in CASES.iter().filter(|(case, uses, _)| *uses > 0 && !case.starts_with("stem")) {
            for pass in [Pass::Forward, Pass::Data, Pass::Filter] {
                let what = format!("{case}, {pass:?}, on {}", device.0);
                let aligned = proposed(&target, spec, pass, 128).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(aligned.first().is_some_and(|notes| notes.contains(&0)), "{what}: {aligned:?}");
                // Other devices have some at any address.
                if device.0 == H200.0 {
                    let odd = proposed(&target, spec, pass, 2).unwrap_or_default();
                    assert!(odd.iter().all(|notes| !notes.contains(&0)), "{what}: {odd:?}");
                }
            }
        }
    }
}

#[test]
fn a_plan_is_found_again_by_its_name() {
    let library = library();
    let target = H200.target(&library);
    for spec in [SMALL, ConvSpec { residual: true, stride_dhw: [1; 3], ..SMALL }] {
        for fusion in Fusion::ALL {
            let plans = everything(&target, &spec, fusion);
            assert!(!plans.is_empty(), "{fusion:?} of {spec}");
            for plan in &plans {
                let again = named_plan(&target, &spec, plan.name()).unwrap_or_else(|e| panic!("{plan:?}: {e}"));
                assert_eq!(
                    (again.name(), again.workspace(), again.fusion(), again.notes()),
                    (plan.name(), plan.workspace(), fusion, plan.notes())
                );
            }
        }
    }
}

#[test]
fn a_plan_that_the_device_does_not_have_is_an_error() {
    let library = library();
    let on_h200 = H200.target(&library);
    let unknown = named_plan(&on_h200, &SMALL, "full:100000:").expect_err("an engine that is not there");
    assert!(matches!(unknown, CudnnError::Status { .. }), "{unknown}");
    let knob = named_plan(&on_h200, &SMALL, "full:0:2=99999").expect_err("a knob that engine does not have");
    assert!(matches!(knob, CudnnError::Status { .. }), "{knob}");
    // The engines of compute capability 9.0 are not those of 7.5.
    let newest = everything(&on_h200, &SMALL, Fusion::Full).remove(0);
    let old = named_plan(&T4.target(&library), &SMALL, newest.name()).expect_err("a Hopper plan on a Turing device");
    assert!(matches!(old, CudnnError::Status { .. }), "{old}");
}

#[test]
fn a_workspace_limit_is_kept_and_no_plan_at_all_is_an_error() {
    let library = library();
    let target = H200.target(&library);
    let spec = ConvSpec { stride_dhw: [1; 3], ..SMALL };
    let all = everything(&target, &spec, Fusion::Full);
    let limit = all.iter().map(Candidate::workspace).max().expect("plans") - 1;
    let fewer = find_plans(&target, &spec, Fusion::Full, limit).expect("plans");
    assert!(fewer.len() < all.len() && fewer.iter().all(|plan| plan.workspace() <= limit), "{fewer:?}");
    let error = no_engine(&spec, limit, Some(CudnnError::ForeignHandle)).to_string();
    assert!(error.contains("64->128 on 6x9x11") && error.contains(&limit.to_string()), "{error}");
}

#[test]
fn addresses_are_checked_when_they_are_bound() {
    let library = library();
    let target = H200.target(&library);
    let spec = ConvSpec { residual: true, ..SMALL };
    let fine = Pointers { x: 0x1000, w: 0x2000, bias: 0x3000, residual: 0x4000, y: 0x5000, workspace: 0x6000 };
    for fusion in Fusion::ALL {
        for plan in everything(&target, &spec, fusion) {
            // SAFETY: never executed; without a handle it cannot be.
            let bind = |pointers: Pointers| unsafe { plan.bind(&pointers) };
            bind(fine).unwrap_or_else(|e| panic!("{plan:?}: {e}"));
            assert!(matches!(bind(Pointers { x: 0, ..fine }), Err(CudnnError::Pointer { operand: "x", .. })));
            assert!(matches!(bind(Pointers { w: 0x2008, ..fine }), Err(CudnnError::Pointer { operand: "w", .. })));
            assert!(matches!(bind(Pointers { y: 0x5001, ..fine }), Err(CudnnError::Pointer { operand: "y", .. })));
            // Operands that the plan does not use may be anything.
            assert_eq!(bind(Pointers { bias: 0, ..fine }).is_ok(), fusion == Fusion::Plain, "{plan:?}");
            assert_eq!(bind(Pointers { residual: 0, ..fine }).is_ok(), fusion != Fusion::Full, "{plan:?}");
            assert_eq!(bind(Pointers { workspace: 0, ..fine }).is_ok(), plan.workspace() == 0, "{plan:?}");
        }
    }
}

#[test]
fn only_names_as_they_are_written_are_read() {
    for name in ["full:41:2=4,13=0", "bias:0:", "plain:7:28=-1"] {
        assert_eq!(PlanName::parse(name).expect(name).to_string(), name);
    }
    for name in [
        "",
        "full",
        "full:41",
        "half:41:",
        "full:x:",
        "full:1:2",
        "full:1:2=",
        "full:1:2=3,",
        "full:01:",
        "full:1:2=3:4",
        "full:1: 2=3",
        "full:99999999999999999999:",
    ] {
        assert_eq!(PlanName::parse(name), None, "{name}");
    }
}

#[test]
fn notes_have_names_and_unknown_ones_numbers() {
    let said = |note: Note| note.to_string();
    assert_eq!(said(Note::Numerical(4)), "nondeterministic");
    assert_eq!(said(Note::Behavior(0)), "runtime-compilation");
    assert_eq!(said(Note::Numerical(99)), "numerical-99");
}

#[test]
fn a_convolution_that_cannot_be_is_refused() {
    SMALL.check().expect("one that can");
    for spec in [
        ConvSpec { c_in: 0, ..SMALL },
        ConvSpec { c_out: 0, ..SMALL },
        ConvSpec { input_dhw: [6, 0, 11], ..SMALL },
        ConvSpec { kernel_dhw: [3, 3, 0], ..SMALL },
        ConvSpec { stride_dhw: [0, 1, 1], ..SMALL },
        ConvSpec { kernel_dhw: [9, 3, 3], ..SMALL },
        ConvSpec { padding_dhw: [3, 1, 1], ..SMALL },
        ConvSpec { c_out: usize::MAX, ..SMALL },
        ConvSpec { input_dhw: [1 << 12, 1 << 12, 1 << 12], ..SMALL },
        ConvSpec { input_dhw: [usize::MAX, 1, 1], ..SMALL },
    ] {
        assert!(matches!(spec.check(), Err(CudnnError::Spec(_))), "{spec}");
    }
}

#[test]
fn the_cases_are_the_network() {
    assert_eq!(SMALL.output_dhw(), [3, 5, 6]);
    let macs: u64 = CASES.iter().map(|(_, uses, spec)| *uses as u64 * spec.macs()).sum();
    // 636.04 G with the linear layers, which have 2.5 M.
    assert_eq!((macs + 5_000_000) / 10_000_000, 63_604, "{macs}");
    assert_eq!(CASES.iter().map(|(_, uses, _)| uses).sum::<usize>(), 1 + 16 + 3);
}
