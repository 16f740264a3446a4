//! Computing ahead and speculation change no bit of a result, whatever comes in whatever order, and give way at once.

mod common;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use darnet::config::Config;
use darnet::dicom::scu::{SendOptions, send};
use darnet::engine::{Backend, CancelToken, EngineError, EngineOptions, Inference, Reuse, Session, cpu::CpuBackend};
use darnet::model::Model;
use darnet::model::manifest::{Architecture, DepthGrid};
use darnet::phantom::{DicomOptions, PhantomClass, PhantomSpec, generate, write_dicom};
use darnet::pipeline::publish::ResultNotice;
use darnet::pipeline::{Daemon, observer};
use serde_json::Value;

/// Wait for a result of the small model; a run takes well under a second.
const RESULT_WAIT: Duration = Duration::from_secs(60);
/// Fast enough for a test, slow enough for steps between slices.
const SLICES_PER_S: f64 = 100.0;

/// A series that states its own count.
fn series(seed: u64, slices: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let spec = PhantomSpec::random(PhantomClass::Covid, seed).with_shape(slices, 128, 128);
    let options = DicomOptions { declare_count: true, ..DicomOptions::default() };
    let files = write_dicom(&generate(&spec), dir.path(), &options).unwrap();
    (dir, files)
}

fn shuffled(files: &[PathBuf], seed: u64) -> Vec<PathBuf> {
    let mut files = files.to_vec();
    let mut state = seed | 1;
    for i in (1..files.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        files.swap(i, (state >> 33) as usize % (i + 1));
    }
    files
}

/// What the sessions of a [`Watched`] backend did.
#[derive(Default)]
struct Seen {
    /// Planes given ahead since the last whole run.
    ahead: Mutex<Vec<Option<Vec<f32>>>>,
    /// Calls to compute ahead.
    advances: AtomicUsize,
    /// Whole runs that ended.
    runs: AtomicUsize,
    /// Planes given ahead before whole runs, and how many of them had the bits of the run.
    given: AtomicUsize,
    kept: AtomicUsize,
    /// Runs that were told to stop.
    cancelled: AtomicUsize,
}

/// The cpu backend, watched; optionally with blocks of a millisecond before the first run.
struct Watched {
    inner: CpuBackend,
    seen: Arc<Seen>,
    slow_blocks: usize,
}

struct WatchedSession {
    inner: Box<dyn Session>,
    seen: Arc<Seen>,
    slow_blocks: usize,
}

impl Watched {
    fn new(model: &Model, slow_blocks: usize) -> Self {
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        Self { inner: CpuBackend::new(model, &options, None).unwrap(), seen: Arc::default(), slow_blocks }
    }
}

impl Backend for Watched {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let seen = Arc::clone(&self.seen);
        Ok(Box::new(WatchedSession { inner: self.inner.session()?, seen, slow_blocks: self.slow_blocks }))
    }
}

impl Session for WatchedSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        // Only the first run is slow.
        for _ in 0..std::mem::take(&mut self.slow_blocks) {
            if cancel.is_cancelled() {
                self.seen.cancelled.fetch_add(1, Ordering::SeqCst);
                return Err(EngineError::Cancelled);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inner.run(input, cancel, out)?;
        let given = std::mem::take(&mut *self.seen.ahead.lock().unwrap());
        if let Some(planes) = (!given.is_empty()).then(|| input.chunks_exact(input.len() / given.len())) {
            for (plane, given) in planes.zip(&given) {
                let Some(given) = given else { continue };
                let same = given.iter().zip(plane).all(|(a, b)| a.to_bits() == b.to_bits());
                self.seen.given.fetch_add(1, Ordering::SeqCst);
                self.seen.kept.fetch_add(usize::from(same), Ordering::SeqCst);
            }
        }
        self.seen.runs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn advance(&mut self, input: &[f32], ready: &[bool], cancel: &CancelToken) -> Result<(), EngineError> {
        let planes = input.chunks_exact(input.len() / ready.len());
        let given = planes.zip(ready).map(|(plane, ready)| ready.then(|| plane.to_vec())).collect();
        *self.seen.ahead.lock().unwrap() = given;
        self.seen.advances.fetch_add(1, Ordering::SeqCst);
        self.inner.advance(input, ready, cancel)
    }

    fn computes_ahead(&self) -> bool {
        self.inner.computes_ahead()
    }

    fn reuse(&self) -> Reuse {
        self.inner.reuse()
    }
}

struct Running {
    daemon: Daemon,
    notices: Receiver<ResultNotice>,
    seen: Arc<Seen>,
    _data: tempfile::TempDir,
}

/// How a daemon is set up for a test.
struct Setup {
    ahead: bool,
    trust: bool,
    grace_ms: u64,
    slow_blocks: usize,
    grid: DepthGrid,
}

impl Default for Setup {
    fn default() -> Self {
        Self { ahead: true, trust: true, grace_ms: 300, slow_blocks: 0, grid: DepthGrid::Fit }
    }
}

fn start(setup: &Setup) -> Running {
    let data = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: data.path().to_path_buf(), ..Config::default() };
    config.dicom.bind = "127.0.0.1:0".to_owned();
    config.web.bind = "127.0.0.1:0".to_owned();
    config.assembly.compute_ahead = setup.ahead;
    config.assembly.grace_ms = setup.grace_ms;
    if setup.trust {
        config.peers.trust_series_count = vec![SendOptions::default().calling_ae_title];
    }
    let architecture = Architecture { base_width: 8, input_dhw: [32, 96, 96], ..Architecture::full() };
    let mut model = Model::synthetic("ahead", &architecture, 1).unwrap();
    model.manifest.preprocessing.depth_grid = setup.grid;
    let backend = Watched::new(&model, setup.slow_blocks);
    let seen = Arc::clone(&backend.seen);
    let (tx, notices) = observer();
    let daemon = Daemon::start_on(&config, &model, &backend, Some(tx)).unwrap();
    Running { daemon, notices, seen, _data: data }
}

impl Running {
    fn push(&self, files: &[PathBuf], slices_per_s: Option<f64>, associations: usize) {
        let to = self.daemon.dicom_addr().to_string();
        let options = SendOptions { to, slices_per_s, associations, ..SendOptions::default() };
        assert_eq!(send(files, &options, &mut |_| {}).unwrap().stored, files.len());
    }

    fn result(&self) -> Value {
        let notice = self.notices.recv_timeout(RESULT_WAIT).expect("an outcome");
        assert_eq!(notice.report()["outcome"], "result", "{}", notice.document);
        notice.document
    }

    fn given_and_kept(&self) -> (usize, usize) {
        (self.seen.given.load(Ordering::SeqCst), self.seen.kept.load(Ordering::SeqCst))
    }
}

/// Everything of a result that the pixels decide, as exact text.
fn judged(document: &Value) -> String {
    let report = &document["report"];
    format!("{} {} {} {}", report["logits"], report["scores"], report["predicted"], report["slices"])
}

fn plain(files: &[PathBuf], grid: DepthGrid) -> String {
    let running = start(&Setup { ahead: false, grid, ..Setup::default() });
    running.push(files, None, 1);
    let document = running.result();
    assert_eq!(running.seen.advances.load(Ordering::SeqCst), 0);
    judged(&document)
}

#[test]
fn scores_are_the_same_to_the_bit_in_every_order_of_arrival() {
    let (_keep, files) = series(21, 100);
    let expected = plain(&files, DepthGrid::Fit);
    let descending: Vec<PathBuf> = files.iter().rev().cloned().collect();
    for (what, files, associations, from_one_end) in [
        ("ascending", files.clone(), 1, true),
        ("descending", descending, 1, true),
        ("shuffled", shuffled(&files, 3), 1, false),
        ("four associations", files.clone(), 4, true),
    ] {
        let running = start(&Setup::default());
        running.push(&files, Some(SLICES_PER_S), associations);
        assert_eq!(judged(&running.result()), expected, "{what}");
        let (given, kept) = running.given_and_kept();
        println!("{what}: {given} planes given ahead, {kept} kept their bits");
        if from_one_end {
            assert!(given >= 16, "{what}: {given} planes given ahead");
            assert_eq!(kept, given, "{what}: a plane given ahead has the bits of the run");
        }
    }
}

#[test]
fn a_fixed_grid_computes_ahead_without_a_count() {
    let grid = DepthGrid::FixedMm(4.0);
    let (_keep, files) = series(22, 100);
    // Nobody states a count: the sender's is not in files of another kind of writer.
    let dir = tempfile::tempdir().unwrap();
    let spec = PhantomSpec::random(PhantomClass::Covid, 22).with_shape(100, 128, 128);
    let silent = write_dicom(&generate(&spec), dir.path(), &DicomOptions::default()).unwrap();
    let expected = plain(&files, grid);
    let running = start(&Setup { trust: false, grid, ..Setup::default() });
    running.push(&silent, Some(SLICES_PER_S), 1);
    assert_eq!(judged(&running.result()), expected);
    let (given, kept) = running.given_and_kept();
    assert!(given >= 8, "{given} planes given ahead");
    assert_eq!(kept, given);
}

#[test]
fn a_wrong_count_and_a_late_slice_change_time_only() {
    let (_keep, files) = series(23, 81);
    let fewer = &files[..80];
    let (of_80, of_81) = (plain(fewer, DepthGrid::Fit), plain(&files, DepthGrid::Fit));

    // One more stated than there is: the release completes it; the late slice makes it right.
    let running = start(&Setup::default());
    running.push(fewer, Some(SLICES_PER_S), 1);
    let first = running.result();
    assert_eq!(judged(&first), of_80);
    assert_eq!(first["completion"]["cause"], "released");
    assert!(running.given_and_kept().0 >= 16);
    running.push(&files[80..], None, 1);
    let second = running.result();
    assert_eq!(judged(&second), of_81);
    assert_eq!(second["revision"], 2);
    let (status, metrics) = common::http(&running.daemon.web_addr().to_string(), "GET", "/metrics", "", &[]);
    assert_eq!(status, 200);
    for line in ["darnet_ahead_mispredictions_total ", "darnet_ahead_advances_total{result=\"done\"} "] {
        let value = metrics.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("no {line}"));
        assert!(value.parse::<f64>().unwrap() >= 1.0, "{line}{value}");
    }
    drop(running);

    // One fewer stated than there is: 80 of 81 complete it, the last one corrects it.
    let (_keep, stated) = series(23, 81);
    for file in &stated {
        let mut object = dicom_object::open_file(file).unwrap();
        object.put_str(dicom_dictionary_std::tags::NUMBER_OF_SERIES_RELATED_INSTANCES, dicom_core::VR::IS, "80");
        object.write_to_file(file).unwrap();
    }
    let running = start(&Setup::default());
    running.push(&stated, Some(SLICES_PER_S), 1);
    let mut last = running.result();
    if last["report"]["slices"] != 81 {
        assert_eq!(judged(&last), of_80);
        last = running.result();
    }
    assert_eq!(judged(&last), of_81);
}

#[test]
fn two_series_at_once_do_not_mix() {
    let ((_a, a), (_b, b)) = (series(24, 80), series(25, 90));
    let mut expected = [plain(&a, DepthGrid::Fit), plain(&b, DepthGrid::Fit)];
    let mut mixed: Vec<PathBuf> = Vec::new();
    for (i, file) in b.iter().enumerate() {
        mixed.extend(a.get(i).cloned());
        mixed.push(file.clone());
    }
    let running = start(&Setup::default());
    running.push(&mixed, Some(2.0 * SLICES_PER_S), 1);
    let mut got = [judged(&running.result()), judged(&running.result())];
    expected.sort();
    got.sort();
    assert_eq!(got, expected);
    assert!(running.seen.advances.load(Ordering::SeqCst) > 0);
}

#[test]
fn another_slice_cancels_a_run_started_early() {
    let (_keep, files) = series(26, 60);
    let expected = plain(&files, DepthGrid::Fit);
    // The run has 30 s of blocks of a millisecond before it: it ends early only because it is told to.
    let running = start(&Setup { trust: false, grace_ms: 1_500, slow_blocks: 30_000, ..Setup::default() });
    running.push(&files[..59], None, 1); // the release starts a run
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(running.seen.cancelled.load(Ordering::SeqCst), 0);
    let sent = Instant::now();
    running.push(&files[59..], None, 1);
    while running.seen.cancelled.load(Ordering::SeqCst) == 0 {
        assert!(sent.elapsed() < Duration::from_secs(20), "not cancelled");
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("cancelled {} ms after the slice was sent off", sent.elapsed().as_millis());
    assert_eq!(judged(&running.result()), expected);
    assert_eq!(running.seen.runs.load(Ordering::SeqCst), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn the_inference_thread_gives_way_to_the_others() {
    /// Nice value of a thread of this process, by its name; proc_pid_stat(5), field 19.
    fn nice_of(name: &str) -> Vec<i32> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
        let named = stats.filter_map(|stat| {
            let (head, fields) = stat.rsplit_once(')')?;
            head.ends_with(&format!("({name}")).then(|| fields.split_whitespace().nth(16)?.parse().ok())?
        });
        named.collect()
    }
    let running = start(&Setup::default());
    let wanted = Config::default().model.nice;
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let (infer, assemble) = (nice_of("infer"), nice_of("assemble"));
        // A thread has its name, and its priority, a moment after it is started.
        if let Some(usual) = assemble.first()
            && !infer.is_empty()
            && infer.iter().all(|n| *n == (usual + wanted).min(19))
        {
            break;
        }
        assert!(Instant::now() < until, "infer {infer:?}, assemble {assemble:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(running);
}

#[test]
fn most_is_reused_when_the_extent_is_known_and_declared() {
    let (_keep, files) = series(27, 100);
    let running = start(&Setup::default());
    running.push(&files, Some(30.0), 1);
    let document = running.result();
    let share = document["latency"]["reused_share"].as_f64().expect("a backend that computes ahead");
    println!("reused {share}");
    assert!(share > 0.8, "{share}");
}
