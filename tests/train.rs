//! Training against PyTorch, interrupted runs, runs that go wrong, import of checkpoints.
//!
//! Golden losses and the state dicts come from `tests/golden/train/make.py`. Everything here runs on the processor.

#![cfg(feature = "trainer")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use darnet::engine::{BackendKind, CancelToken, EngineOptions, Inference, prepare};
use darnet::model::manifest::SourceWindow;
use darnet::model::{Architecture, CLASS_KEYS, Model, Preprocessing, synthetic};
use darnet::phantom::{PhantomClass, PhantomSpec, generate};
use darnet::train::augment::{AugmentOptions, Pose, Recipe};
use darnet::train::cache::{CacheSpec, CacheWriter, NewRecord, ScanOutcome};
use darnet::train::checkpoint::CHECKPOINT_FILE;
use darnet::train::fit::{Engine, Event, FitOptions, RunOptions, SUMMARY_FILE, Summary, fit};
use darnet::train::net::{Precision, initial_weights};
use darnet::train::report::read_predictions;
use darnet::train::{Case, Dataset, MemoryCase, MemoryDataset, Split, TrainError};
use half::f16;
use serde::Deserialize;
use tch::{Device, Tensor};

#[derive(Deserialize)]
struct Goldens {
    schema: String,
    batch: usize,
    learning_rate: f64,
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    seed: u64,
    architecture: Architecture,
    losses: Vec<f64>,
}

fn options(architecture: Architecture) -> FitOptions {
    FitOptions { batch: 3, epochs: 3, augment: AugmentOptions::default(), ..FitOptions::paper(architecture) }
}

#[test]
fn twenty_steps_have_pytorchs_losses() {
    let all: Goldens = serde_json::from_str(include_str!("golden/train/golden.json")).unwrap();
    assert_eq!(all.schema, "darnet.golden-train/1");
    // The order of sums depends on the number of threads, and twenty steps magnify it.
    tch::set_num_threads(1);
    for case in all.cases {
        let dhw = case.architecture.input_dhw;
        let [d, h, w] = dhw.map(|n| n as i64);
        let weights = synthetic::weights(&case.architecture, case.seed);
        // Accumulated one by one, batch normalisation sees other batches; so the whole batch at once.
        let fit = FitOptions { batch: all.batch, ..options(case.architecture) };
        let mut engine = Engine::new(&fit, &[Device::Cpu], &weights).unwrap();
        let mut worst = 0.0f64;
        for (step, wanted) in case.losses.iter().enumerate() {
            let volumes: Vec<f32> =
                (0..all.batch).flat_map(|i| synthetic::volume(dhw, (1000 + step * all.batch + i) as u64)).collect();
            let volumes = Tensor::from_slice(&volumes).view([all.batch as i64, d, h, w]);
            let labels: Vec<i64> = (0..all.batch as i64).map(|i| i % 3).collect();
            let poses = vec![Pose::IDENTITY; all.batch];
            let got = engine.step(&volumes, &labels, &poses, all.learning_rate).unwrap().loss;
            worst = worst.max((got - wanted).abs());
            assert!((got - wanted).abs() <= 1e-4, "{} step {step}: {got} instead of {wanted}", case.name);
        }
        println!("{}: at most {worst:e} from PyTorch over {} steps", case.name, case.losses.len());
    }
}

fn small() -> Architecture {
    Architecture { base_width: 4, input_dhw: [8, 24, 24], ..Architecture::full() }
}

/// Made-up volumes: class c is bright in its third of the planes.
fn blobs(count: usize) -> MemoryDataset {
    let [d, h, w] = small().input_dhw;
    let cases = (0..count)
        .map(|i| {
            let class = i % 3;
            let noise = synthetic::volume([d, h, w], i as u64);
            let bright = |at: usize| if at / (h * w) * 3 / d == class { 0.5 } else { 0.0 };
            let volume = noise.iter().enumerate().map(|(at, v)| f16::from_f32(0.5 * v + bright(at))).collect();
            MemoryCase { scan: format!("scan-{i}"), patient: format!("patient-{i}"), class, volume, mask: None }
        })
        .collect();
    MemoryDataset::new([d, h, w], Preprocessing::default(), CLASS_KEYS.map(str::to_owned).to_vec(), cases).unwrap()
}

fn run_options(out: &Path) -> RunOptions<'static> {
    RunOptions {
        out: out.to_path_buf(),
        devices: vec![Device::Cpu],
        checkpoint_steps: 0,
        initial: None,
        stop: None,
        deadline: None,
        id: "t".to_owned(),
        trained_on: "made-up volumes".to_owned(),
        intended_use: "demo".to_owned(),
        half_weights: false,
    }
}

fn run(data: &dyn Dataset, options: &FitOptions, run: &RunOptions<'_>) -> Result<Summary, TrainError> {
    let n = data.len();
    let train: Vec<usize> = (0..n - 6).collect();
    let validation: Vec<usize> = (n - 6..n).collect();
    fit(data, &train, &validation, options, run, &mut |_| {})
}

/// Rows of a CSV without the columns that hold times.
fn untimed(path: &Path) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|l| l.split(',').take(7).map(str::to_owned).collect()).collect()
}

#[test]
fn a_run_that_is_stopped_everywhere_ends_with_the_same_bits() {
    let data = blobs(18);
    let dir = tempfile::tempdir().unwrap();
    let options = options(small());
    let (whole, torn) = (dir.path().join("whole"), dir.path().join("torn"));
    let one = run(&data, &options, &run_options(&whole)).unwrap();

    // Stopped after each of the 3 x 4 steps, in turn.
    let train: Vec<usize> = (0..12).collect();
    let validation: Vec<usize> = (12..18).collect();
    let mut stops = 0;
    let other = loop {
        let stop = AtomicBool::new(false);
        let run = RunOptions { stop: Some(&stop), ..run_options(&torn) };
        let mut on_event = |event: &Event<'_>| {
            if let Event::Step { .. } = event {
                stop.store(true, Ordering::Relaxed);
            }
        };
        match fit(&data, &train, &validation, &options, &run, &mut on_event) {
            Ok(summary) => break summary,
            Err(TrainError::Stopped) => stops += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(stops < 20);
    };
    assert!(stops >= 11, "{stops}");
    assert_eq!(one.best, other.best);
    assert_eq!(one.validation, other.validation);
    let weights = |out: &Path| Model::load(&out.join("model")).unwrap().weights;
    assert_eq!(weights(&whole), weights(&torn));
    for file in ["metrics.csv", "steps.csv", "validation.csv"] {
        assert_eq!(untimed(&whole.join(file)), untimed(&torn.join(file)), "{file}");
    }
    for file in ["curves.png", CHECKPOINT_FILE, SUMMARY_FILE] {
        assert!(whole.join(file).metadata().unwrap().len() > 0);
    }
    // A finished run is not done again, and not taken for another one.
    assert_eq!(run(&data, &options, &run_options(&whole)).unwrap(), one);
    let longer = FitOptions { epochs: 4, ..options };
    let error = run(&data, &longer, &run_options(&whole)).unwrap_err().to_string();
    assert!(error.contains("options.epochs was 3 and is 4"), "{error}");
}

#[test]
fn a_checkpoint_of_another_run_is_refused_and_the_difference_named() {
    let data = blobs(18);
    let dir = tempfile::tempdir().unwrap();
    let options = FitOptions { epochs: 2, ..options(small()) };
    run(&data, &options, &run_options(dir.path())).unwrap();
    std::fs::remove_file(dir.path().join(SUMMARY_FILE)).unwrap();
    let other = FitOptions { seed: 2, ..options.clone() };
    let error = run(&data, &other, &run_options(dir.path())).unwrap_err().to_string();
    assert!(error.contains("options.seed was 1 and is 2"), "{error}");
    // Torn, it is an error too, never a fresh start.
    let path = dir.path().join(CHECKPOINT_FILE);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(run(&data, &options, &run_options(dir.path())), Err(TrainError::Checkpoint { .. })));
}

#[test]
fn a_volume_that_is_not_finite_ends_the_run_and_is_named() {
    let healthy = blobs(18);
    let cases = (0..18)
        .map(|i| {
            let mut volume = healthy.volume_f16(i).to_vec();
            if i == 7 {
                volume[100] = f16::NAN;
            }
            let (scan, patient) = (healthy.scan(i).to_owned(), healthy.patient(i).to_owned());
            MemoryCase { scan, patient, class: healthy.class(i), volume, mask: None }
        })
        .collect();
    let keys = CLASS_KEYS.map(str::to_owned).to_vec();
    let data = MemoryDataset::new(healthy.input_dhw(), Preprocessing::default(), keys, cases).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = run(&data, &options(small()), &run_options(dir.path())).unwrap_err();
    assert!(matches!(&error, TrainError::NotFinite { epoch: 1, .. }), "{error}");
    assert!(error.to_string().contains("scan-7"), "{error}");
    assert!(!dir.path().join(SUMMARY_FILE).exists());
    assert!(!dir.path().join(CHECKPOINT_FILE).exists());
}

#[test]
fn an_empty_fold_and_a_patient_on_both_sides_are_refused() {
    let data = blobs(18);
    let dir = tempfile::tempdir().unwrap();
    let (options, run) = (options(small()), run_options(dir.path()));
    let mut nothing = |_: &Event<'_>| {};
    let error = fit(&data, &[0, 1], &[], &options, &run, &mut nothing).unwrap_err().to_string();
    assert!(error.contains("no validation scans"), "{error}");
    let error = fit(&data, &[0, 1], &[1, 2], &options, &run, &mut nothing).unwrap_err().to_string();
    assert!(error.contains("both in training and in validation"), "{error}");
    let other = FitOptions { architecture: Architecture { input_dhw: [8, 24, 22], ..small() }, ..options };
    let error = fit(&data, &[0, 1], &[2], &other, &run, &mut nothing).unwrap_err().to_string();
    assert!(error.contains("[8, 24, 24]") && error.contains("[8, 24, 22]"), "{error}");
}

#[test]
fn six_phantoms_are_learned_by_heart_and_the_scanner_agrees() {
    let dhw = [8, 32, 32];
    let classes = [PhantomClass::Cp, PhantomClass::Covid, PhantomClass::Healthy];
    let cases: Vec<MemoryCase> = (0..12usize)
        .map(|i| {
            // The last six are the first again, as other patients: validation shows what was learned by heart.
            let class = i % 3;
            let spec = PhantomSpec::random(classes[class], (i % 6) as u64).with_shape(dhw[0], dhw[1], dhw[2]);
            let phantom = generate(&spec);
            let unit = |hu: &i16| f16::from_f32(((f32::from(*hu) + 1350.0) / 1500.0).clamp(0.0, 1.0));
            let volume = (0..dhw[0]).flat_map(|z| phantom.slice(z)).map(unit).collect();
            MemoryCase { scan: format!("s{i}"), patient: format!("p{i}"), class, volume, mask: None }
        })
        .collect();
    let keys = CLASS_KEYS.map(str::to_owned).to_vec();
    let data = MemoryDataset::new(dhw, Preprocessing::default(), keys, cases).unwrap();
    let architecture = Architecture { base_width: 8, input_dhw: dhw, ..Architecture::full() };
    let augment = AugmentOptions { enabled: false, ..AugmentOptions::default() };
    let options = FitOptions { epochs: 40, batch: 6, lr_every: 25, augment, ..FitOptions::paper(architecture) };
    let dir = tempfile::tempdir().unwrap();
    let run_as = RunOptions { half_weights: true, ..run_options(dir.path()) };
    let summary = run(&data, &options, &run_as).unwrap();
    assert_eq!(summary.validation.accuracy, 1.0, "{summary:?}");

    // The model that was written gives the same scores on the scanner's backend.
    let model = Model::load(&dir.path().join("model")).unwrap();
    assert_eq!(model.manifest.scores["validation_accuracy"], 1.0);
    let (_, predictions) = read_predictions(&dir.path().join("validation.csv")).unwrap();
    let backend = prepare(BackendKind::Cpu, &model, &EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
    let mut session = backend.session().unwrap();
    let mut out = Inference::default();
    for (i, p) in predictions.iter().enumerate() {
        let volume: Vec<f32> = data.volume_f16(6 + i).iter().map(|v| v.to_f32()).collect();
        session.run(&volume, &CancelToken::new(), &mut out).unwrap();
        for (a, b) in out.scores.iter().zip(&p.scores) {
            assert!((f64::from(*a) - b).abs() < 2e-4, "{:?} {:?}", out.scores, p.scores);
        }
    }
}

#[test]
fn every_recipe_and_memory_order_learns() {
    let data = blobs(18);
    let dir = tempfile::tempdir().unwrap();
    for (name, channels_last, recipe, micro_batch) in
        [("released", true, Recipe::AsReleased, 0), ("micro", false, Recipe::Corrected, 2)]
    {
        let augment = AugmentOptions { recipe, ..AugmentOptions::default() };
        let options = FitOptions { epochs: 8, channels_last, augment, micro_batch, ..options(small()) };
        let run_as = run_options(&dir.path().join(name));
        run(&data, &options, &run_as).unwrap();
        let rows = untimed(&run_as.out.join("metrics.csv"));
        let loss = |row: &Vec<String>| row[2].parse::<f64>().unwrap();
        assert!(loss(&rows[8]) < loss(&rows[1]) - 0.03, "{name}: {rows:?}");
    }
}

#[test]
fn half_precision_on_the_processor_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = FitOptions { precision: Precision::Bf16, ..options(small()) };
    let error = run(&blobs(18), &options, &run_options(dir.path())).unwrap_err().to_string();
    assert!(error.contains("precision") && error.contains("Bf16"), "{error}");
}

#[test]
fn two_devices_in_one_process_learn_like_one() {
    // Twice the processor: what goes over the threads is what goes over GPUs. Running statistics differ by design.
    let data = blobs(18);
    let weights = initial_weights(&small(), 1);
    let fit = FitOptions { batch: 4, micro_batch: 2, ..options(small()) };
    let [d, h, w] = small().input_dhw.map(|n| n as i64);
    let values: Vec<f16> = (0..4).flat_map(|i| data.volume_f16(i).to_vec()).collect();
    let volumes = Tensor::from_slice(&values).view([4, d, h, w]);
    let step = |devices: &[Device]| {
        let mut engine = Engine::new(&fit, devices, &weights).unwrap();
        let outcome = engine.step(&volumes, &[0, 1, 2, 0], &[Pose::IDENTITY; 4], 1e-3).unwrap();
        (outcome, engine.weights().unwrap())
    };
    let (one, a) = step(&[Device::Cpu]);
    let (two, b) = step(&[Device::Cpu, Device::Cpu]);
    assert!((one.loss - two.loss).abs() < 1e-6);
    for (name, t) in a.iter().filter(|(n, _)| !n.contains("running")) {
        let far = t.data.iter().zip(b.get(name)).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        // A first step of Adam moves by the learning rate; where a gradient is all rounding, either way.
        assert!(far <= 2.1e-3, "{name}: {far}");
    }
    assert_eq!(a.get("fc.bias"), b.get("fc.bias"));
}

/// A cache of [`blobs`] and its split, as `prepare` and `split` leave them.
fn cache(dir: &Path, count: usize) {
    let data = blobs(count);
    let spec = CacheSpec {
        input_dhw: data.input_dhw(),
        preprocessing: Preprocessing::default(),
        class_keys: data.class_names().to_vec(),
    };
    let writer = CacheWriter::open(&dir.join("cache"), &spec).unwrap();
    let mut outcomes = Vec::new();
    for i in 0..count {
        let case = Case {
            scan: data.scan(i).to_owned(),
            patient: data.patient(i).to_owned(),
            class: data.class(i),
            source: "made-up".to_owned(),
            source_window: SourceWindow::Hu,
            has_mask: false,
        };
        let outcome = ScanOutcome {
            scan: case.scan.clone(),
            patient: case.patient.clone(),
            class: CLASS_KEYS[case.class].to_owned(),
            source: case.source.clone(),
            kept: true,
            reason: None,
            detail: None,
            notes: Vec::new(),
            slices: 8,
            has_mask: false,
            made_with: String::new(),
            siblings: 1,
        };
        let record = NewRecord { case: &case, slices: 8, volume: data.volume_f16(i), mask: None };
        writer.keep(&record, &outcome).unwrap();
        outcomes.push(outcome);
    }
    let cache = writer.finish(&outcomes).unwrap();
    let split = Split::stratified(cache.cases(), 0.2, 2, 1).unwrap();
    split.write_csv(&dir.join("split.csv")).unwrap();
}

fn trainer(command: &str, dir: &Path, out: &Path, extra: &[&str]) -> Command {
    let mut process = Command::new(env!("CARGO_BIN_EXE_darnet-train"));
    process.arg(command).arg("--cache").arg(dir.join("cache")).arg("--split").arg(dir.join("split.csv"));
    process.args(["--threads", "1", "--device", "cpu", "--width", "4", "--batch", "4"]);
    process.arg("--out").arg(out).args(extra);
    process
}

#[test]
fn a_killed_command_goes_on_and_ends_with_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    cache(dir.path(), 30);
    let fit = |out: &Path| trainer("fit", dir.path(), out, &["--epochs", "5", "--checkpoint-steps", "1", "--json"]);
    let (whole, killed): (PathBuf, PathBuf) = (dir.path().join("whole"), dir.path().join("killed"));
    let output = fit(&whole).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary: Summary = serde_json::from_slice(&output.stdout).unwrap();
    assert!(summary.wait_share < 0.5);

    let mut kills = 0;
    let mut at = 0;
    loop {
        let mut child = fit(&killed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Killed as soon as it has got three steps further.
        let deadline = Instant::now() + Duration::from_secs(120);
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            let steps = std::fs::read_to_string(killed.join("steps.csv")).map_or(0, |t| t.lines().count());
            if steps >= at + 3 {
                at = steps;
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            assert!(Instant::now() < deadline, "no progress");
            std::thread::sleep(Duration::from_millis(1));
        };
        match ended {
            Some(status) => {
                assert!(status.success());
                break;
            }
            None => kills += 1,
        }
        assert!(kills < 40);
    }
    assert!(kills >= 2, "{kills}");
    let weights = |out: &Path| std::fs::read(out.join("model/weights.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&killed));
    assert_eq!(untimed(&whole.join("metrics.csv")), untimed(&killed.join("metrics.csv")));
}

#[test]
fn an_ablation_prints_its_tables_and_is_not_done_twice() {
    let dir = tempfile::tempdir().unwrap();
    cache(dir.path(), 18);
    let out = dir.path().join("out");
    let ablate = || {
        let output = trainer("ablate", dir.path(), &out, &["--epochs", "1"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let first = ablate();
    for text in ["Table II)", "Table III)", "Table IV)", "| none |", "| both |", "mean ± sd"] {
        assert!(first.contains(text), "{text}\n{first}");
    }
    let model = out.join("da/fold-1/model/model.toml");
    let written = model.metadata().unwrap().modified().unwrap();
    assert_eq!(ablate(), first);
    assert_eq!(model.metadata().unwrap().modified().unwrap(), written);
    for file in ["evaluation.md", "evaluation.csv", "evaluation.json", "roc.png", "confusion.png"] {
        assert!(out.join(file).exists(), "{file}");
    }

    // The same model on the test set, through evaluate.
    let table = dir.path().join("table");
    let mut evaluate = Command::new(env!("CARGO_BIN_EXE_darnet-train"));
    evaluate.arg("evaluate").arg(out.join("both/fold-0")).arg("--cache").arg(dir.path().join("cache"));
    evaluate.arg("--split").arg(dir.path().join("split.csv")).args(["--device", "cpu", "--record", "unseen", "--out"]);
    evaluate.arg(&table);
    let output = evaluate.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(table.join("evaluation.json").exists() && table.join("fold-0.csv").exists());
    let recorded = darnet::model::Model::load(&out.join("both/fold-0/model")).unwrap().manifest.scores;
    assert!(recorded.contains_key("unseen_accuracy") && recorded.contains_key("validation_accuracy"), "{recorded:?}");
}
