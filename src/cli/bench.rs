//! `bench`: speed and memory, as text or JSON.
//!
//! Figures come with the number of runs and the machine's cores; medians, not best cases. Everything is measured
//! through the same code the daemon runs.

use std::io::BufRead;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use darnet::config::{Config, ModelConfig};
use darnet::dicom::scu::{SendOptions, send};
use darnet::engine::cpu::dispatch::{Isa, Kernels};
use darnet::engine::cpu::roof;
use darnet::engine::{Backend, BackendKind, CancelToken, Inference, LayerTiming, prepare};
use darnet::gpu::Gpu;
use darnet::model::Model;
use darnet::model::manifest::{Architecture, DepthGrid, SliceDirection};
use darnet::phantom::{DicomOptions, Phantom, PhantomClass, PhantomSpec, generate, write_dicom};
use darnet::pipeline::{Daemon, observer};
use darnet::resample::alone;
use darnet::resample::cpu::{Window, gather, in_plane};
use darnet::resample::cuda::{DevicePlane, GpuGatherer, GpuResampler};
use darnet::resample::plan::{DepthPlan, InPlanePlan};
use darnet::resample::texture::TextureMeter;
use darnet::volume::geometry::InPlaneOrientation;
use serde_json::{Value, json};

use super::{BenchArgs, BenchWhat, Ended, latency, modelcmd, print_json, resident};

/// `darnet bench`.
pub fn bench(args: &BenchArgs) -> anyhow::Result<Ended> {
    if args.runs == 0 || args.runs > 10_000 {
        bail!("--runs wants 1 to 10000, got {}", args.runs);
    }
    if args.serve {
        if args.what != BenchWhat::Inference {
            bail!("--serve goes with `bench inference`");
        }
        return resident::serve(args);
    }
    let mut document = match args.what {
        BenchWhat::Inference => inference(args)?,
        BenchWhat::Resample => resample(args)?,
        BenchWhat::Ingest => ingest(args)?,
        BenchWhat::Pipeline if args.declared_only => latency::declared(args)?,
        BenchWhat::Pipeline => pipeline(args)?,
        BenchWhat::Memory => memory(args)?,
        BenchWhat::Convolutions => convolutions(args)?,
    };
    document["schema"] = json!("darnet.bench/1");
    document["version"] = json!(env!("CARGO_PKG_VERSION"));
    document["cores"] = json!(std::thread::available_parallelism().map_or(1, usize::from));
    if args.json {
        print_json(&document)?;
    } else if let Value::Object(map) = &document {
        for (key, value) in map.iter().filter(|(key, _)| *key != "variants") {
            match value {
                Value::Array(rows) if rows.iter().all(Value::is_object) => print_table(key, rows),
                _ => println!("{key:>24}  {value}"),
            }
        }
    }
    Ok(Ended::Done)
}

/// A list of objects with the same keys, as a table.
fn print_table(title: &str, rows: &[Value]) {
    let Some(Value::Object(first)) = rows.first() else { return };
    println!("{title}:");
    let cell = |value: &Value| match value {
        Value::Number(n) if n.is_f64() => format!("{:.2}", n.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let line = |cells: Vec<String>| println!("  {}", cells.iter().map(|c| format!("{c:>18}")).collect::<String>());
    line(first.keys().cloned().collect());
    for row in rows {
        line(first.keys().map(|key| cell(&row[key])).collect());
    }
}

/// The model that is measured.
pub fn model(args: &BenchArgs) -> anyhow::Result<Model> {
    if args.full_size {
        return Ok(Model::synthetic("full-size-generated", &Architecture::full(), 1)?);
    }
    modelcmd::load(args.engine.model.as_ref())
}

/// Value at quantile `q` of the runs, by nearest rank.
pub(super) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

pub(super) fn spread(mut runs: Vec<f64>) -> Value {
    runs.sort_by(f64::total_cmp);
    json!({
        "runs": runs.len(),
        "p50_ms": quantile(&runs, 0.50) * 1e3,
        "p95_ms": quantile(&runs, 0.95) * 1e3,
        "p99_ms": quantile(&runs, 0.99) * 1e3,
        "min_ms": runs[0] * 1e3,
        "max_ms": runs[runs.len() - 1] * 1e3,
    })
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

/// A line of `/proc/PID/status` in MiB.
fn status_mib(pid: &str, key: &str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read the process status")?;
    let line = text.lines().find(|l| l.starts_with(key)).with_context(|| format!("{key} in the process status"))?;
    let kib: f64 = line.split_whitespace().nth(1).unwrap_or("0").parse().context("parse the process status")?;
    Ok(kib / 1024.0)
}

fn inference(args: &BenchArgs) -> anyhow::Result<Value> {
    let started = Instant::now();
    let model = model(args)?;
    let backend = prepare(args.engine.backend, &model, &args.engine.options())?;
    let mut session = backend.session()?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let architecture = model.manifest.architecture.clone();
    let (id, macs) = (model.manifest.id.clone(), architecture.macs());
    drop(model); // the daemon does not keep the weights as loaded either
    let mut layers: Vec<(LayerTiming, Vec<f64>)> = Vec::new();
    let input = darnet::model::synthetic::volume(architecture.input_dhw, 1);
    let mut out = Inference::default();
    let cancel = CancelToken::new();
    let started = Instant::now();
    session.run(&input, &cancel, &mut out)?;
    let first_ms = started.elapsed().as_secs_f64() * 1e3;
    session.profile()?;
    let mut runs = Vec::with_capacity(args.runs);
    let mut device_runs = Vec::new();
    for _ in 0..args.runs {
        let started = Instant::now();
        session.run(&input, &cancel, &mut out)?;
        runs.push(started.elapsed().as_secs_f64());
        device_runs.extend(session.device_ms().map(|ms| ms / 1e3));
        for (index, layer) in session.layers().into_iter().enumerate() {
            match layers.get_mut(index) {
                Some((_, seconds)) => seconds.push(layer.seconds),
                None => layers.push((layer.clone(), vec![layer.seconds])),
            }
        }
    }
    let layers: Vec<Value> = layers
        .into_iter()
        .map(|(layer, mut seconds)| {
            seconds.sort_by(f64::total_cmp);
            let p50_s = quantile(&seconds, 0.50);
            json!({
                "layer": layer.name,
                "kernel": layer.kernel,
                "gmacs": layer.macs as f64 / 1e9,
                "p50_ms": p50_s * 1e3,
                "gflops": 2.0 * layer.macs as f64 / 1e9 / p50_s,
            })
        })
        .collect();
    let mut document = json!({
        "bench": "inference",
        "model": id,
        "backend": backend.name(),
        "choice": backend.note(),
        "instruction_set": backend.instruction_set(),
        "threads": backend.threads(),
        "input_dhw": architecture.input_dhw,
        "gmacs": macs as f64 / 1e9,
        "load_ms": load_ms,
        "first_ms": first_ms,
        "rss_anon_mib": status_mib("self", "RssAnon:")?,
        "rss_file_mib": status_mib("self", "RssFile:")?,
        "weights_mib": backend.weight_bytes() as f64 / 1_048_576.0,
        "session_mib": backend.session_bytes() as f64 / 1_048_576.0,
        "mapped_weights_mib": backend.mapped_bytes() as f64 / 1_048_576.0,
        "layers": layers,
        "logits": out.logits,
        "scores": out.scores,
        "note": backend.note(),
    });
    if !device_runs.is_empty() {
        document["device"] = spread(device_runs);
    }
    if backend.name() == "cpu"
        && let Some(kernels) =
            Isa::ALL.into_iter().find(|isa| isa.as_str() == backend.instruction_set()).and_then(Kernels::of)
    {
        drop(session);
        document["roof"] = serde_json::to_value(roof::measure(&kernels, backend.threads())?)?;
    }
    let spread = spread(runs);
    let p50_s = spread["p50_ms"].as_f64().unwrap_or(f64::NAN) / 1e3;
    document["gflops"] = json!(2.0 * macs as f64 / 1e9 / p50_s);
    merge(&mut document, spread);
    Ok(document)
}

fn convolutions(args: &BenchArgs) -> anyhow::Result<Value> {
    let trials = darnet::engine::cuda::CudaBackend::trials(&model(args)?)?;
    let rows: Vec<Value> = trials
        .iter()
        .map(|t| {
            json!({
                "convolution": t.shape.name(),
                "micros": t.micros,
                "tflops": t.tflops(),
                "error": t.error.map(|e| format!("{e:.1e}")),
                "kernel": t.kernel,
                "fault": t.fault,
            })
        })
        .collect();
    Ok(json!({ "bench": "convolutions", "trials": rows }))
}

fn resample(args: &BenchArgs) -> anyhow::Result<Value> {
    let model = model(args)?;
    let [d, h, w] = model.manifest.architecture.input_dhw;
    let preprocessing = &model.manifest.preprocessing;
    let window = Window { center_hu: preprocessing.window_center_hu, width_hu: preprocessing.window_width_hu };
    let plan =
        InPlanePlan::new(512, 512, InPlaneOrientation::default(), preprocessing.crop_fraction, [h, w], [0.0, 0.0]);
    let hu: Vec<i16> = (0..512 * 512).map(|i| ((i * 7919) % 2000) as i16 - 1000).collect();
    let mut scratch = vec![0.0; plan.scratch_len()];
    let mut plane = vec![0.0; h * w];
    let mut in_plane_runs = Vec::new();
    for _ in 0..args.runs * 20 {
        let started = Instant::now();
        in_plane(&plan, &window, &hu, &mut scratch, &mut plane);
        in_plane_runs.push(started.elapsed().as_secs_f64());
    }
    let depth_mm: Vec<f64> = (0..args.slices).map(|k| k as f64).collect();
    let depth = DepthPlan::new(&depth_mm, DepthGrid::Fit, SliceDirection::FeetToHead, d)?;
    let planes: Vec<Vec<f32>> = (0..args.slices).map(|_| plane.clone()).collect();
    let planes: Vec<&[f32]> = planes.iter().map(Vec::as_slice).collect();
    let mut volume = vec![0.0; d * h * w];
    let mut gather_runs = Vec::new();
    for _ in 0..args.runs {
        let started = Instant::now();
        gather(&depth, &planes, &mut volume);
        gather_runs.push(started.elapsed().as_secs_f64());
    }
    let mut meter = TextureMeter::new([d, h, w]);
    let mut texture_runs = Vec::new();
    for _ in 0..args.runs {
        let started = Instant::now();
        std::hint::black_box(meter.measure(&volume, &alone));
        texture_runs.push(started.elapsed().as_secs_f64());
    }
    let mut document = json!({
        "bench": "resample",
        "slices": args.slices,
        "in_plane_512_to": [h, w],
        "in_plane": spread(in_plane_runs),
        "gather": spread(gather_runs),
        "texture": spread(texture_runs),
    });
    if matches!(args.engine.backend, BackendKind::Cuda | BackendKind::Tensorrt) {
        document["gpu"] = resample_on_gpu(args, &window, &plan, &depth, &hu, &volume)?;
    }
    Ok(document)
}

/// The same on the GPU, with the largest difference from `expected`, the processor's volume.
fn resample_on_gpu(
    args: &BenchArgs,
    window: &Window,
    plan: &InPlanePlan,
    depth: &DepthPlan,
    hu: &[i16],
    expected: &[f32],
) -> anyhow::Result<Value> {
    let gpu = Gpu::open(0)?;
    let resampler = Arc::new(GpuResampler::new(Arc::clone(&gpu), *window, plan.out_hw(), args.slices)?);
    let mut gatherer = GpuGatherer::new(Arc::clone(&resampler), args.slices, depth.planes())?;
    let (mut hand_over, mut whole, mut series, mut gathered) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut difference = 0.0f32;
    for run in 0..=args.runs {
        for _ in 0..20 {
            let started = Instant::now();
            let plane = resampler.resample(plan, hu)?.context("take a plane of the device's pool")?;
            let handed = started.elapsed().as_secs_f64();
            plane.wait()?;
            // The first run warms up.
            if run > 0 {
                hand_over.push(handed);
                whole.push(started.elapsed().as_secs_f64());
            }
        }
        let started = Instant::now();
        let mut planes = Vec::with_capacity(args.slices);
        for _ in 0..args.slices {
            planes.push(resampler.resample(plan, hu)?.context("take a plane of the device's pool")?);
        }
        gpu.synchronize()?;
        let series_s = started.elapsed().as_secs_f64();
        let planes: Vec<&DevicePlane> = planes.iter().collect();
        let on_device = gatherer.gather_to_host(depth, &planes)?.context("gather on the device")?;
        if run > 0 {
            series.push(series_s);
            gathered.push(f64::from(on_device.ms) / 1e3);
        }
        difference = on_device.values.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(difference, f32::max);
    }
    ensure!(difference <= 1e-6, "the device's volume differs from the processor's by {difference}");
    Ok(json!({
        "device": gpu.name(),
        "hand_over": spread(hand_over),
        "upload_and_in_plane": spread(whole),
        "series": spread(series),
        "gather": spread(gathered),
        "largest_difference": difference,
    }))
}

pub(super) fn phantom(slices: usize) -> Phantom {
    generate(&PhantomSpec::random(PhantomClass::Covid, 1).with_shape(slices, 512, 512))
}

pub(super) fn daemon_config(args: &BenchArgs, data: &Path) -> Config {
    let mut config = Config { data_dir: data.to_path_buf(), ..Config::default() };
    config.dicom.bind = "127.0.0.1:0".to_owned();
    config.web.bind = "127.0.0.1:0".to_owned();
    args.engine.configure(&mut config.model);
    config
}

fn ingest(args: &BenchArgs) -> anyhow::Result<Value> {
    let dir = super::demo::scratch_dir("bench-ingest")?;
    let phantom = phantom(args.slices);
    let mut runs = Vec::new();
    let mut bytes = 0;
    for run in 0..args.runs {
        let data = dir.path().join(format!("data-{run}"));
        std::fs::create_dir(&data)?;
        let mut config = daemon_config(args, &data);
        config.assembly.grace_ms = 600_000; // only what leads to the acknowledgement
        config.assembly.speculate = false;
        let daemon = Daemon::start(&config, None)?;
        let files = write_dicom(&phantom, &dir.path().join("series"), &DicomOptions::default())?;
        let report = send(&files, &to(&daemon), &mut |_| {})?;
        if report.stored != files.len() {
            bail!("{} of {} slices were not stored", files.len() - report.stored, files.len());
        }
        bytes = report.bytes;
        runs.push(report.elapsed.as_secs_f64() / files.len() as f64);
        daemon.shutdown(Duration::from_secs(1));
    }
    let mut document = json!({ "bench": "ingest", "slices": args.slices, "durability": "fsync", "bytes": bytes });
    let spread = spread(runs);
    let p50_s = spread["p50_ms"].as_f64().unwrap_or(f64::NAN) / 1e3;
    document["slices_per_s"] = json!(1.0 / p50_s);
    document["mib_per_s"] = json!(bytes as f64 / args.slices as f64 / p50_s / (1 << 20) as f64);
    document["per_slice"] = spread;
    Ok(document)
}

pub(super) fn to(daemon: &Daemon) -> SendOptions {
    SendOptions { to: daemon.dicom_addr().to_string(), ..SendOptions::default() }
}

/// What a sender says of the number of slices.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// Nothing.
    Unknown,
    /// The number.
    Known,
    /// One too many.
    OffByOne,
}

/// One way to send a series.
#[derive(Clone, Copy)]
struct Variant {
    slices_per_s: Option<f64>,
    extent: Extent,
    /// Whether the stated number completes the series; otherwise it is a hint.
    trusted: bool,
    compute_ahead: bool,
}

impl Variant {
    fn describe(&self) -> Value {
        json!({
            "rate": self.slices_per_s,
            "extent": match self.extent {
                Extent::Unknown => "unknown",
                Extent::Known => "known",
                Extent::OffByOne => "off-by-one",
            },
            "completion": if self.trusted && self.extent == Extent::Known { "declared" } else { "released" },
            "compute_ahead": self.compute_ahead,
        })
    }
}

/// The ways to be measured; one without computing ahead first for each kind of completion, to compare with.
fn variants(args: &BenchArgs) -> Vec<Variant> {
    let paces = args.rate.map_or_else(|| vec![None, Some(30.0)], |rate| vec![Some(rate)]);
    let mut variants = Vec::new();
    for slices_per_s in paces {
        let mut add = |extent, trusted, compute_ahead| {
            variants.push(Variant { slices_per_s, extent, trusted, compute_ahead });
        };
        if !args.declare_count {
            add(Extent::Unknown, false, false);
            add(Extent::Unknown, false, true);
            add(Extent::Known, false, true);
            add(Extent::OffByOne, true, true);
        }
        add(Extent::Known, true, false);
        add(Extent::Known, true, true);
    }
    variants
}

#[derive(Default)]
struct Measured {
    to_alert: Vec<f64>,
    waits: Vec<f64>,
    inferences: Vec<f64>,
    reused: Vec<f64>,
}

fn pipeline(args: &BenchArgs) -> anyhow::Result<Value> {
    let dir = super::demo::scratch_dir("bench-pipeline")?;
    let model = model(args)?;
    let mut config = ModelConfig::default();
    args.engine.configure(&mut config);
    let backend = prepare(args.engine.backend, &model, &config.engine_options())?;
    let cancelled = cancel_delays(backend.as_ref(), &model, args.runs)?;
    let phantom = phantom(args.slices);
    let plain = write_dicom(&phantom, &dir.path().join("plain"), &DicomOptions::default())?;
    let stated = DicomOptions { declare_count: true, ..DicomOptions::default() };
    let stated = write_dicom(&phantom, &dir.path().join("stated"), &stated)?;
    drop(phantom);
    let variants = variants(args);
    let mut measured: Vec<Measured> = variants.iter().map(|_| Measured::default()).collect();
    // In turn, so that whatever else the machine does falls on all of them.
    for run in 0..args.runs {
        for (variant, measured) in variants.iter().zip(&mut measured) {
            let files = match variant.extent {
                Extent::Unknown => &plain[..],
                Extent::Known => &stated[..],
                Extent::OffByOne => &stated[..stated.len() - 1],
            };
            let data = dir.path().join(format!("data-{run}"));
            std::fs::create_dir(&data)?;
            let mut config = daemon_config(args, &data);
            config.assembly.compute_ahead = variant.compute_ahead;
            if variant.trusted {
                config.peers.trust_series_count = vec![SendOptions::default().calling_ae_title];
            }
            let (tx, notices) = observer();
            let daemon = Daemon::start_on(&config, &model, backend.as_ref(), Some(tx))?;
            let options = SendOptions { slices_per_s: variant.slices_per_s, ..to(&daemon) };
            let report = send(files, &options, &mut |_| {})?;
            if report.stored != files.len() {
                bail!("{} of {} slices were not stored", files.len() - report.stored, files.len());
            }
            let notice = notices.recv_timeout(Duration::from_secs(600)).context("wait for the alert")?;
            measured.to_alert.push(notice.last_slice_to_alert_s);
            measured.waits.push(notice.completion_wait_s);
            measured.inferences.push(notice.infer_s);
            measured.reused.push(notice.reused_share.unwrap_or(0.0));
            daemon.shutdown(Duration::from_secs(1));
            std::fs::remove_dir_all(&data)?;
        }
    }
    let mut rows = Vec::new();
    for (variant, mut measured) in variants.iter().zip(measured) {
        let mut row = variant.describe();
        measured.reused.sort_by(f64::total_cmp);
        row["reused_share"] = json!(quantile(&measured.reused, 0.50));
        row["last_slice_to_alert"] = spread(measured.to_alert);
        row["completion_wait"] = spread(measured.waits);
        row["inference"] = spread(measured.inferences);
        rows.push(row);
    }
    if !args.json {
        println!("  rate  extent      completion  ahead  last slice to alert  inference  reused");
        for row in &rows {
            println!(
                "{:>6}  {:<10}  {:<10}  {:<5}  {:>16.0} ms  {:>6.0} ms  {:>6.3}",
                row["rate"].as_f64().map_or("line".to_owned(), |r| r.to_string()),
                row["extent"].as_str().unwrap_or_default(),
                row["completion"].as_str().unwrap_or_default(),
                row["compute_ahead"].as_bool().unwrap_or_default(),
                row["last_slice_to_alert"]["p50_ms"].as_f64().unwrap_or(f64::NAN),
                row["inference"]["p50_ms"].as_f64().unwrap_or(f64::NAN),
                row["reused_share"].as_f64().unwrap_or(f64::NAN),
            );
        }
    }
    Ok(json!({
        "bench": "pipeline",
        "model": model.manifest.id,
        "backend": backend.name(),
        "choice": backend.note(),
        "threads": args.engine.threads,
        "slices": args.slices,
        "grace_ms": Config::default().assembly.grace_ms,
        "cancel": cancelled,
        "variants": rows,
    }))
}

/// How long a run goes on after it was told to stop, at `runs` points of it.
fn cancel_delays(backend: &dyn Backend, model: &Model, runs: usize) -> anyhow::Result<Value> {
    let mut session = backend.session()?;
    let input = darnet::model::synthetic::volume(model.manifest.architecture.input_dhw, 1);
    let mut out = Inference::default();
    session.run(&input, &CancelToken::new(), &mut out)?;
    let started = Instant::now();
    session.run(&input, &CancelToken::new(), &mut out)?;
    let whole = started.elapsed();
    let mut delays = Vec::with_capacity(runs);
    for run in 0..runs {
        let cancel = CancelToken::new();
        let told = std::thread::scope(|scope| {
            let canceller = scope.spawn(|| {
                std::thread::sleep(whole.mul_f64((run as f64 + 0.5) / runs as f64));
                cancel.cancel();
                Instant::now()
            });
            let _ = session.run(&input, &cancel, &mut out);
            let ended = Instant::now();
            canceller.join().map(|told| ended.saturating_duration_since(told))
        });
        let Ok(delay) = told else { bail!("the cancelling thread ended early") };
        delays.push(delay.as_secs_f64());
    }
    Ok(spread(delays))
}

struct Served {
    child: Child,
    dicom: String,
    web: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(args: &BenchArgs, dir: &Path) -> anyhow::Result<Served> {
    let data = dir.join("data");
    std::fs::create_dir(&data)?;
    let config = dir.join("darnet.toml");
    std::fs::write(&config, toml::to_string(&daemon_config(args, &data))?)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", "--config"])
        .arg(&config)
        .stdout(Stdio::piped())
        .spawn()
        .context("start the daemon")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        std::io::BufReader::new(stdout).read_line(&mut line)?;
    }
    let first: Value = serde_json::from_str(&line).context("read the daemon's first line")?;
    let text = |key: &str| first[key].as_str().unwrap_or_default().to_owned();
    Ok(Served { child, dicom: text("dicom"), web: text("web") })
}

fn memory(args: &BenchArgs) -> anyhow::Result<Value> {
    let dir = super::demo::scratch_dir("bench-memory")?;
    let served = serve(args, dir.path())?;
    let pid = served.child.id().to_string();
    let figures = |when: &str| -> anyhow::Result<Value> {
        Ok(json!({
            "when": when,
            "rss_anon_mib": status_mib(&pid, "RssAnon:")?,
            "rss_file_mib": status_mib(&pid, "RssFile:")?,
            "rss_mib": status_mib(&pid, "VmRSS:")?,
            "peak_rss_mib": status_mib(&pid, "VmHWM:")?,
        }))
    };
    let idle = figures("idle")?;
    let phantom = phantom(args.slices);
    let files = write_dicom(&phantom, &dir.path().join("series"), &DicomOptions::default())?;
    drop(phantom);
    let options = SendOptions { to: served.dicom.clone(), ..SendOptions::default() };
    let report = send(&files, &options, &mut |_| {})?;
    if report.stored != files.len() {
        bail!("{} of {} slices were not stored", files.len() - report.stored, files.len());
    }
    let until = Instant::now() + Duration::from_secs(600);
    loop {
        let body = ureq::get(format!("http://{}/api/results", served.web)).call()?.body_mut().read_to_string()?;
        if body.contains("result_uid") {
            break;
        }
        if Instant::now() > until {
            bail!("no outcome within 600 s");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = figures("with the series in memory, published")?;
    Ok(json!({ "bench": "memory", "slices": args.slices, "matrix": [512, 512], "idle": idle, "series": after }))
}
