//! The tensorrt backend as far as it goes without a GPU, against NVIDIA's libraries and headers in `.tensorrt`.
//!
//! Real builders, parsers and runtimes: TensorRT for RTX 1.7 and 1.4 build whole plans on a machine without a GPU; the
//! lean runtimes 11.4 and 10.16 show the interface and the log of the full TensorRT. With a driver at hand the tests ask
//! less of what a driver changes.
//!
//! No test here runs a plan on a GPU. How a session calls driver and library (memory, streams, the recorded graph, order of
//! destruction, what happens when a call fails) is tested against stand-ins for both, `tensorrt/driver.cpp` and
//! `tensorrt/library.cpp`; the latter has its methods where NVIDIA's headers have them. They say nothing about NVIDIA's own.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

use common::darnet;
use darnet::engine::tensorrt::{
    BuildOptions, Library, Precision, Progress, TensorrtBackend, TensorrtError, TensorrtOptions, device, network, plan,
};
use darnet::engine::{BackendKind, EngineError, EngineOptions, Inference, prepare, softmax};
use darnet::explain::class_activation_map;
use darnet::gpu::Gpu;
use darnet::model::{Architecture, Model, synthetic};
use serde_json::{Value, json};

/// A file or folder of `.tensorrt`; fails with the install command where it is missing.
fn peer(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tensorrt").join(path);
    assert!(path.exists(), "{} is missing: scripts/tensorrt", path.display());
    path
}

fn has_driver() -> bool {
    Gpu::open(0).is_ok()
}

fn small_model() -> Model {
    let architecture = Architecture { base_width: 16, input_dhw: [8, 32, 32], ..Architecture::full() };
    Model::synthetic("small", &architecture, 5).unwrap()
}

const HEADERS: [&str; 8] = [
    "TRT-Enterprise-10.16",
    "TRT-Enterprise-11.0",
    "TRT-Enterprise-11.4",
    "TRT-RTX-1.3",
    "TRT-RTX-1.4",
    "TRT-RTX-1.5",
    "TRT-RTX-1.6",
    "TRT-RTX-1.7",
];

fn compile(source: &Path, includes: &[PathBuf], out: &Path, flags: &[&str]) {
    let includes = includes.iter().flat_map(|folder| [Path::new("-I"), folder]);
    let own = ["-w", "-O0"].map(Path::new);
    let last = [source, Path::new("-o"), out];
    common::cxx(own.into_iter().chain(includes).chain(flags.iter().map(Path::new)).chain(last));
}

/// Compiles and runs `layout.cpp` with the headers `version` and the `layout.h` in `ours`: whether it agrees, its output.
fn compare_layout(dir: &Path, version: &str, ours: &Path) -> (bool, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = dir.join(version);
    let includes = [peer("include").join(version), peer("include"), ours.to_path_buf()];
    compile(&root.join("tests/tensorrt/layout.cpp"), &includes, &program, &[]);
    let run = Command::new(&program).output().unwrap();
    (run.status.success(), String::from_utf8_lossy(&run.stdout).into_owned())
}

#[test]
fn every_place_in_the_virtual_tables_is_where_nvidias_headers_have_it() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine/tensorrt");
    for version in HEADERS {
        let (agrees, said) = compare_layout(dir.path(), version, &ours);
        assert!(agrees, "{version}: {said}");
        println!("{version}: {said}");
    }
    // A number that is wrong is found: here two that change places.
    let text = std::fs::read_to_string(ours.join("layout.h")).unwrap();
    let wrong = text.replace("15, 16, 19, 26, 27, 23, 36", "15, 16, 19, 27, 26, 23, 36");
    assert_ne!(wrong, text);
    std::fs::write(dir.path().join("layout.h"), wrong).unwrap();
    let (agrees, said) = compare_layout(dir.path(), "TRT-Enterprise-11.4", dir.path());
    assert!(!agrees && said.contains("getNbIOTensors") && said.contains("getIOTensorName"), "{said}");
    // And the release before is not taken for this one.
    let earlier = text.replace("if (major == 11)", "if (major == 12)").replace("major == 10", "major == 11");
    assert_ne!(earlier, text);
    std::fs::write(dir.path().join("layout.h"), earlier).unwrap();
    assert!(!compare_layout(dir.path(), "TRT-Enterprise-11.4", dir.path()).0);
}

#[test]
fn the_complete_network_is_built_without_a_gpu_and_its_plan_does_not_run_without_a_driver() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, cache) = (dir.path().join("m"), dir.path().join("timing.cache"));
    let folder_text = folder.to_str().unwrap();
    let (code, _, err) = darnet(&["model", "synthetic", "--out", folder_text, "--full-size"]);
    assert_eq!(code, 0, "{err}");
    let library = peer("rtx-1.7");
    let library_text = library.to_str().unwrap();
    let args = ["engine", "build", "--model", folder_text, "--library", library_text, "--timing-cache"];
    let args = [&args[..], &[cache.to_str().unwrap(), "--json"]].concat();
    let (code, out, err) = darnet(&args);
    assert_eq!(code, 0, "{err}");
    let built: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(built["schema"], "darnet.engine-build/1");
    assert_eq!(built["key"]["library"], "TensorRT for RTX");
    assert_eq!(built["key"]["library_version"], "1.7.1.116");
    assert_eq!(built["key"]["precision"], "fp16");
    assert_eq!(built["runs_here"], has_driver());
    assert!(built["layers"].as_u64().unwrap() > 100, "{built}");
    assert!(cache.is_file() && built["timing_cache_bytes"].as_u64() == Some(cache.metadata().unwrap().len()));
    let file = PathBuf::from(built["file"].as_str().unwrap());
    assert_eq!(file.parent(), Some(folder.as_path()), "in the model's folder");
    // 35 M weights of two bytes.
    assert!(built["bytes"].as_u64().unwrap() > 70_000_000, "{built}");

    let show = ["engine", "show", "--model", folder_text, "--library", library_text, "--json"];
    let (code, out, err) = darnet(&show);
    assert_eq!(code, 0, "{err}");
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(shown["library"]["version"], "1.7.1.116");
    assert_eq!(shown["plans"][0]["key"], built["key"]);

    let model = Model::load(&folder).unwrap();
    let opened = Library::open(Some(&library)).unwrap();
    let gpu = Gpu::open(0);
    let key = plan::list(&plan::folders(&model))[0].key.clone().unwrap();
    let bytes = plan::read(&file, &key).unwrap().plan;
    if gpu.is_err() {
        let error = opened.load(&bytes).map(|_| ()).unwrap_err();
        assert!(matches!(error, TensorrtError::Driver { .. } | TensorrtError::Engine { .. }), "{error}");
        assert!(error.to_string().contains("CUDA"), "says what the library said: {error}");
        let options = TensorrtOptions { library: Some(library.clone()), ..TensorrtOptions::default() };
        let error = TensorrtBackend::new(&model, &options).map(|_| ()).unwrap_err();
        assert!(matches!(&error, EngineError::Unavailable { backend: "tensorrt", .. }), "{error}");
    }

    // Damage is found before any of it reaches the library.
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(plan::read(&file, &key), Err(plan::PlanError::Torn { .. })));
    let mut flipped = whole;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    std::fs::write(&file, &flipped).unwrap();
    assert!(matches!(plan::read(&file, &key), Err(plan::PlanError::Checksum { .. })));
    let (code, out, _) = darnet(&show);
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("damaged"), "{out}");
}

#[test]
fn each_interface_builds_both_precisions_with_progress_and_a_timing_cache() {
    let model = small_model();
    for (folder, version) in [("rtx-1.7", "1.7.1.116"), ("rtx-1.4", "1.4.0.76")] {
        let library = Library::open(Some(&peer(folder))).unwrap();
        assert_eq!((library.product(), library.version().as_str()), ("TensorRT for RTX", version));
        assert!(library.can_build());
        for precision in [Precision::Fp16, Precision::Fp32] {
            let onnx = network(&model, precision).unwrap();
            let heard = Mutex::new(Vec::new());
            let hear = |progress: Progress| {
                heard.lock().unwrap().push(progress);
                true
            };
            let options = BuildOptions { workspace_bytes: 1 << 30, timing_cache: Some(&[]), progress: Some(&hear) };
            let built = library.build(&onnx, &options).unwrap();
            assert!(built.plan.len() > 1 << 20 && built.layers > 50, "{} layers", built.layers);
            let cache = built.timing_cache.unwrap();
            let heard = heard.into_inner().unwrap();
            let count = |wanted: fn(&Progress) -> bool| heard.iter().filter(|p| wanted(p)).count();
            let begun = count(|p| matches!(p, Progress::Begin { .. }));
            assert!(begun > 3 && begun == count(|p| matches!(p, Progress::End { .. })), "{heard:?}");
            assert!(count(|p| matches!(p, Progress::Step { .. })) > 3);
            assert!(matches!(&heard[0], Progress::Begin { parent: None, steps, .. } if *steps > 0), "{heard:?}");
            // The cache is taken again; one that is none is answered by an empty one.
            for cache in [cache, b"no timing cache at all".to_vec()] {
                let options = BuildOptions { timing_cache: Some(&cache), ..BuildOptions::default() };
                assert!(library.build(&onnx, &options).unwrap().timing_cache.is_some());
            }
        }
    }
}

#[test]
fn a_build_can_be_stopped_and_a_model_that_is_none_is_refused() {
    let library = Library::open(Some(&peer("rtx-1.7"))).unwrap();
    let onnx = network(&small_model(), Precision::Fp16).unwrap();
    let stop = |progress: Progress| !matches!(progress, Progress::Step { .. });
    let options = BuildOptions { progress: Some(&stop), ..BuildOptions::default() };
    let error = library.build(&onnx, &options).unwrap_err();
    assert!(matches!(error, TensorrtError::Stopped { .. }), "{error}");
    let error = library.build(&onnx[..onnx.len() / 2], &BuildOptions::default()).unwrap_err();
    assert!(matches!(&error, TensorrtError::Parse { reason, .. } if !reason.is_empty()), "{error}");
    // And the library goes on.
    library.build(&onnx, &BuildOptions::default()).unwrap();
}

#[test]
fn the_full_runtimes_open_say_their_version_and_log_through_us() {
    let files = [
        ("lean-11.4/libnvinfer_lean.so.11", "11.4.0.106", "TensorRT 11"),
        ("lean-10.16/libnvinfer_lean.so.10", "10.16.1.11", "TensorRT 10"),
    ];
    for (file, version, interface) in files {
        let library = Library::open(Some(&peer(file))).unwrap();
        assert_eq!((library.product(), library.version().as_str()), ("TensorRT", version));
        assert!(library.layout().starts_with(interface), "{}", library.layout());
        assert!(!library.can_build());
        let error = library.build(b"", &BuildOptions::default()).unwrap_err();
        assert!(matches!(&error, TensorrtError::NoBuilder { .. }), "{error}");
        if has_driver() {
            continue;
        }
        // The factory returns 0x228, which is no object; why stands in the log, which came through our logger.
        let error = library.load(&[0; 64]).map(|_| ()).unwrap_err();
        assert!(matches!(&error, TensorrtError::Driver { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("0x228") && text.contains("CUDA initialization failure"), "{text}");
    }
}

#[test]
fn a_plan_of_another_driver_library_or_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = small_model();
    model.dir = Some(dir.path().to_path_buf());
    let library = Library::open(Some(&peer("rtx-1.7"))).unwrap();
    let info = |driver: &str| device::DeviceInfo {
        name: "NVIDIA RTX 4000".to_owned(),
        compute_capability: "8.9".to_owned(),
        driver: driver.to_owned(),
    };
    let folders = &plan::folders(&model)[..1];
    let (old, new) = (info("580.65 (CUDA 13.0)"), info("590.10 (CUDA 13.1)"));
    let build = |device: &device::DeviceInfo| {
        darnet::engine::tensorrt::build(
            &model,
            Precision::Fp16,
            library,
            Some(device),
            folders,
            &BuildOptions::default(),
        )
    };
    let stored = build(&old).unwrap();
    let key = |device: &device::DeviceInfo, library: &Library| {
        plan::PlanKey::new(&model, Precision::Fp16, library, Some(device))
    };
    assert_eq!(plan::find(folders, &key(&old, &library)).unwrap().1.plan, stored.built.plan);
    let field = |key| match plan::find(folders, &key).unwrap_err() {
        plan::PlanError::Mismatch { field, .. } => field,
        error => panic!("{error}"),
    };
    assert_eq!(field(key(&new, &library)), "driver");
    let earlier = Library::open(Some(&peer("rtx-1.4"))).unwrap();
    assert_eq!(field(key(&old, &earlier)), "library version");
    // Rebuilt, it has a file of its own; the old one stays for who goes back.
    build(&new).unwrap();
    assert!(plan::find(folders, &key(&new, &library)).is_ok() && plan::find(folders, &key(&old, &library)).is_ok());
    // Put under another's name it is refused all the same.
    let renamed = dir.path().join(key(&new, &library).file_name());
    std::fs::copy(&stored.path, &renamed).unwrap();
    assert_eq!(field(key(&new, &library)), "driver");
}

#[test]
fn the_backend_without_a_driver_is_a_typed_error_and_the_program_says_why() {
    if has_driver() {
        println!("NOT RUN: this machine has an NVIDIA driver");
        return;
    }
    let model = Model::embedded().unwrap();
    let error = prepare(BackendKind::Tensorrt, &model, &EngineOptions::default()).err().unwrap();
    assert!(matches!(&error, EngineError::Unavailable { backend: "tensorrt", .. }), "{error}");
    let (code, _, err) = darnet(&["engine", "verify", "--backend", "tensorrt", "--count", "1"]);
    assert_eq!(code, 1);
    assert!(err.contains("tensorrt") && err.contains("driver"), "{err}");
    let (code, out, err) = darnet(&["engine", "show", "--json"]);
    assert_eq!(code, 0, "{err}");
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert!(shown["gpu"]["error"].as_str().unwrap().contains("driver"), "{shown}");
}

#[test]
fn verify_measures_a_backend_against_the_cpu_one() {
    let (code, out, err) = darnet(&["engine", "verify", "--backend", "reference", "--count", "3", "--json"]);
    assert_eq!(code, 0, "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["schema"], "darnet.engine-verify/1");
    assert_eq!((&report["backend"], &report["against"]), (&"reference".into(), &"cpu".into()));
    assert_eq!((&report["phantoms"], &report["agreement"]), (&3.into(), &3.into()));
    assert_eq!(report["within"], true);
    let measured = ["max_logit_difference", "max_probability_difference", "max_cam_difference_of_range"];
    for field in measured {
        let v = report[field].as_f64().unwrap();
        assert!(v > 0.0 && v < 1e-3, "{field}: two ways to compute differ, by {v}");
    }
    let (code, out, _) = darnet(&["engine", "verify", "--backend", "cpu", "--count", "1", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["max_logit_difference"]), (0, &0.0.into()));
}

/// A model folder with a plan for stand-ins of driver and library.
struct StandIns {
    dir: tempfile::TempDir,
    model: Model,
    driver: PathBuf,
    library: PathBuf,
}

impl StandIns {
    fn new(headers: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tensorrt");
        let driver = dir.path().join("libcuda.so.1");
        compile(&source.join("driver.cpp"), &[], &driver, &["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]);
        let library = dir.path().join("library.so");
        let includes = [peer("include").join(headers), peer("include")];
        compile(&source.join("library.cpp"), &includes, &library, &["-shared", "-fPIC"]);
        let mut model = small_model();
        let folder = dir.path().join("m");
        model.save(&folder).unwrap();
        model = Model::load(&folder).unwrap();
        let stand_ins = Self { dir, model, driver, library };
        stand_ins.write_plan(&stand_ins.plan());
        stand_ins
    }

    /// The lines that `library.cpp` reads.
    fn plan(&self) -> String {
        let architecture = &self.model.manifest.architecture;
        let [d, h, w] = architecture.input_dhw;
        let [c, fd, fh, fw] = architecture.feature_shape_cdhw();
        let classes = architecture.num_classes;
        format!(
            "scores 2 0 1 {classes}\nvolume 1 0 1 1 {d} {h} {w}\npooled 2 0 1 {c}\n\
             feature_map 2 0 1 {c} {fd} {fh} {fw}\nlogits 2 0 1 {classes}\n"
        )
    }

    fn write_plan(&self, text: &str) {
        let output = self.run(&["engine", "show", "--json"], &[], "");
        let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
        let field = |name: &str| shown["gpu"][name].as_str().unwrap_or_else(|| panic!("{shown}")).to_owned();
        let info = device::DeviceInfo {
            name: field("name"),
            compute_capability: field("compute_capability"),
            driver: field("driver"),
        };
        assert_eq!((info.name.as_str(), info.compute_capability.as_str()), ("Stand-in GPU", "8.9"));
        let library = Library::open(Some(&self.library)).unwrap();
        let key = plan::PlanKey::new(&self.model, Precision::Fp16, &library, Some(&info));
        plan::store(&plan::folders(&self.model)[..1], &key, text.as_bytes()).unwrap();
    }

    fn run(&self, args: &[&str], environment: &[(&str, &str)], input: &str) -> Output {
        let mut child = Command::new(common::DARNET)
            .args(args)
            .env("LD_PRELOAD", &self.driver)
            .env("DARNET_TENSORRT", &self.library)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // One that has ended already does not read.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    fn folder(&self) -> String {
        self.dir.path().join("m").display().to_string()
    }

    fn volume(&self, seed: u64) -> (Vec<f32>, PathBuf) {
        let shape = self.model.manifest.architecture.input_dhw;
        let volume = synthetic::volume(shape, seed);
        let raw: Vec<u8> = volume.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &raw).unwrap();
        let file = self.dir.path().join(format!("{seed}.safetensors"));
        std::fs::write(&file, safetensors::serialize([("volume", view)], None).unwrap()).unwrap();
        (volume, file)
    }

    /// Runs volumes through one session: exit code, an answer a line, what stands on stderr.
    fn serve(&self, seeds: &[u64], environment: &[(&str, &str)]) -> (Option<i32>, Vec<Value>, String) {
        let lines: String = seeds.iter().map(|s| format!("{}\n", self.volume(*s).1.display())).collect();
        let folder = self.folder();
        let args = ["bench", "inference", "--serve", "--backend", "tensorrt", "--model", &folder];
        let output = self.run(&args, environment, &lines);
        let text = String::from_utf8(output.stdout).unwrap();
        let answers = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (output.status.code(), answers, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn expected(&self, seed: u64) -> Vec<f32> {
        let volume = self.volume(seed).0;
        (0..self.model.manifest.architecture.num_classes).map(|k| volume[k] + k as f32).collect()
    }
}

#[test]
fn a_session_runs_its_graph_each_time_and_leaves_in_order_whatever_the_interface() {
    for headers in ["TRT-Enterprise-11.4", "TRT-Enterprise-10.16", "TRT-RTX-1.4"] {
        let s = StandIns::new(headers);
        let (code, answers, err) = s.serve(&[1, 2, 3], &[]);
        assert_eq!(code, Some(0), "{headers}: {err}");
        assert_eq!(answers.len(), 4, "{headers}: {err}");
        assert_eq!(answers[0]["backend"], "tensorrt");
        for (answer, seed) in answers[1..].iter().zip([1, 2, 3]) {
            let logits = s.expected(seed);
            assert_eq!(answer["logits"], json!(logits), "{headers}");
            assert_eq!(answer["scores"], json!(softmax(&logits)), "{headers}: our softmax, not the plan's");
        }
        assert_eq!(err.matches("graph launched").count(), 3, "{headers}: {err}");
        assert!(err.contains("the logger is heard"), "{headers}: {err}");
        assert!(err.contains("all destroyed"), "{headers}: {err}");

        // The feature map reaches the activation map.
        let (volume, file) = s.volume(4);
        let (folder, out) = (s.folder(), s.dir.path().join("out"));
        let args = ["infer", "--tensor", file.to_str().unwrap(), "--backend", "tensorrt", "--model", &folder, "--json"];
        let output = s.run(&[&args[..], &["--out", out.to_str().unwrap()]].concat(), &[], "");
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{headers}: {}", String::from_utf8_lossy(&output.stderr)));
        let file = document["series"][0]["cam"]["file"].as_str().unwrap_or_else(|| panic!("{document}"));
        let feature_shape_cdhw = s.model.manifest.architecture.feature_shape_cdhw();
        let len = feature_shape_cdhw.iter().product();
        let feature_map = volume.iter().copied().cycle().take(len).collect();
        let inference = Inference { feature_map, feature_shape_cdhw, ..Inference::default() };
        let cam = class_activation_map(&inference, s.model.weights.head_weight(), 2);
        let bytes = std::fs::read(file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let raw: Vec<u8> = cam.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(tensors.tensor("cam").unwrap().data() == raw, "{headers}");
    }
}

#[test]
fn a_run_that_cannot_be_recorded_goes_call_by_call() {
    let s = StandIns::new("TRT-Enterprise-11.4");
    for call in ["cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"] {
        let (code, answers, err) = s.serve(&[1, 2], &[("STAND_IN_FAIL", call)]);
        assert_eq!(code, Some(0), "{call}: {err}");
        assert!(err.contains("cannot be recorded") && !err.contains("graph launched"), "{call}: {err}");
        assert_eq!(answers[2]["logits"], json!(s.expected(2)), "{call}");
        assert!(err.contains("all destroyed"), "{call}: {err}");
    }
}

#[test]
fn a_gpu_call_that_fails_is_an_error_that_names_it_and_the_next_run_is_good() {
    let s = StandIns::new("TRT-Enterprise-11.4");
    // At the start: the first, some and the last thing that a session takes.
    for call in ["cuInit", "cuDevicePrimaryCtxRetain", "cuMemAlloc_v2:1", "cuMemAlloc_v2:4", "cuMemHostAlloc:5"] {
        let (code, answers, err) = s.serve(&[1], &[("STAND_IN_FAIL", call)]);
        assert_eq!((code, answers.len()), (Some(1), 0), "{call}: {err}");
        assert!(err.contains("tensorrt") && err.contains("OUT_OF_MEMORY"), "{call}: {err}");
    }
    for call in ["cuStreamCreate", "cuMemcpyHtoDAsync_v2:1", "cuMemcpyDtoHAsync_v2:2", "cuStreamSynchronize:1"] {
        let (code, _, err) = s.serve(&[1], &[("STAND_IN_FAIL", call)]);
        assert_eq!(code, Some(1), "{call}: {err}");
        assert!(err.contains("OUT_OF_MEMORY"), "{call}: {err}");
    }
    // While it runs: the run fails, the session goes on.
    for call in ["cuGraphLaunch:2", "cuStreamSynchronize:3"] {
        let (code, answers, err) = s.serve(&[1, 2, 3], &[("STAND_IN_FAIL", call)]);
        assert_eq!(code, Some(0), "{call}: {err}");
        assert_eq!(answers[1]["logits"], json!(s.expected(1)), "{call}");
        assert!(answers[2]["error"].as_str().unwrap().contains("OUT_OF_MEMORY"), "{call}: {}", answers[2]);
        assert_eq!(answers[3]["logits"], json!(s.expected(3)), "{call}");
    }
    let (code, _, err) = s.serve(&[1], &[("STAND_IN_REFUSE_RUN", "1")]);
    assert_eq!(code, Some(1));
    assert!(err.contains("the run is refused"), "what the library logged: {err}");
}

#[test]
fn a_plan_with_other_inputs_or_outputs_is_refused_before_it_runs() {
    let s = StandIns::new("TRT-Enterprise-10.16");
    let good = s.plan();
    let cases = [
        (good.replace("pooled", "pool"), "tensor pooled is missing"),
        (good.replace("volume 1 0", "volume 1 1"), "tensor volume"),
        (good.replace("logits 2", "logits 1"), "tensor logits is missing"),
        (good.replace("scores 2 0 1 3", "scores 2 0 1 -1"), "tensor scores"),
        (good.replace("8 32 32", "8 32 31"), "tensor volume"),
        (format!("{good}more 2 0 1\n"), "expected 5 tensors, got 6"),
        ("nonsense".to_owned(), "this is no plan"),
    ];
    for (text, says) in cases {
        assert_ne!(text, good, "{says}");
        s.write_plan(&text);
        let (code, answers, err) = s.serve(&[1], &[]);
        assert_eq!((code, answers.len()), (Some(1), 0), "{says}: {err}");
        assert!(err.contains(says), "{says}: {err}");
    }
    s.write_plan(&good);
    assert_eq!(s.serve(&[1], &[]).0, Some(0));
}
