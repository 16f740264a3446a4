//! A device that fails under a running daemon: the study in hand is judged by the cpu backend, at once and with its own
//! name, metrics and readiness say so, and the device comes back after its wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use darnet::config::Config;
use darnet::dicom::scu::{SendOptions, send};
use darnet::engine::cpu::CpuBackend;
use darnet::engine::fallback::{FIRST_RETRY, FallbackBackend, Reopen};
use darnet::engine::{Backend, CancelToken, EngineError, EngineOptions, Inference, Session};
use darnet::model::Model;
use darnet::phantom::{DicomOptions, PhantomClass, PhantomSpec, generate, write_dicom};
use darnet::pipeline::publish::ResultNotice;
use darnet::pipeline::{Daemon, observer};
use serde_json::Value;

const RESULT_WAIT: Duration = Duration::from_secs(60);

/// What a test tells its device.
#[derive(Default)]
struct Told {
    fails: AtomicBool,
    opens: AtomicU64,
    clock_ms: AtomicU64,
}

/// The cpu backend under a device's name, failing on command.
struct FakeDevice(Arc<CpuBackend>, Arc<Told>);
struct FakeSession(Box<dyn Session>, Arc<Told>);

impl Backend for FakeDevice {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        self.1.opens.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeSession(self.0.session()?, Arc::clone(&self.1))))
    }
}

impl Session for FakeSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        if self.1.fails.load(Ordering::SeqCst) {
            return Err(EngineError::Device { backend: "cuda", reason: "out of memory".to_owned() });
        }
        self.0.run(input, cancel, out)
    }
}

struct Running {
    daemon: Daemon,
    notices: Receiver<ResultNotice>,
    told: Arc<Told>,
    _data: tempfile::TempDir,
}

fn start() -> Running {
    let model = Model::embedded().unwrap();
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    let cpu = Arc::new(CpuBackend::new(&model, &options, None).unwrap());
    let told: Arc<Told> = Arc::default();
    let device = Box::new(FakeDevice(Arc::clone(&cpu), Arc::clone(&told)));
    let (inner, again) = (Arc::clone(&cpu), Arc::clone(&told));
    let reopen: Reopen = Arc::new(move || Ok(Box::new(FakeDevice(Arc::clone(&inner), Arc::clone(&again)))));
    let (clock, begun) = (Arc::clone(&told), Instant::now());
    let backend = FallbackBackend::new(device, cpu, reopen, Some("using cuda, for the test".to_owned())).with_clock(
        Arc::new(move || begun + Duration::from_millis(clock.clock_ms.load(Ordering::SeqCst))),
        Arc::new(|work| std::thread::Builder::new().spawn(work).map(drop)),
    );
    let data = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: data.path().to_path_buf(), ..Config::default() };
    config.dicom.bind = "127.0.0.1:0".to_owned();
    config.web.bind = "127.0.0.1:0".to_owned();
    config.assembly.grace_ms = 100;
    config.results.render = false;
    let (tx, notices) = observer();
    let daemon = Daemon::start_on(&config, &model, &backend, Some(tx)).unwrap();
    Running { daemon, notices, told, _data: data }
}

impl Running {
    /// Pushes a study of its own and returns what was published of it.
    fn study(&self, number: u32) -> Value {
        let dir = tempfile::tempdir().unwrap();
        let spec = PhantomSpec::random(PhantomClass::Covid, 3).with_shape(40, 128, 128);
        let options = DicomOptions { study_uid: Some(format!("2.25.{number}")), ..DicomOptions::default() };
        let files = write_dicom(&generate(&spec), dir.path(), &options).unwrap();
        let options = SendOptions { to: self.daemon.dicom_addr().to_string(), ..SendOptions::default() };
        assert_eq!(send(&files, &options, &mut |_| {}).unwrap().stored, files.len());
        self.notices.recv_timeout(RESULT_WAIT).unwrap().document
    }

    fn page(&self, path: &str) -> String {
        let url = format!("http://{}{path}", self.daemon.web_addr());
        ureq::get(url).config().http_status_as_error(false).build().call().unwrap().body_mut().read_to_string().unwrap()
    }

    /// Asks for `path` until `wanted` is on it.
    fn wait_for(&self, path: &str, wanted: &str) {
        let until = Instant::now() + Duration::from_secs(20);
        while !self.page(path).contains(wanted) {
            assert!(Instant::now() < until, "{wanted:?} is not on {path}:\n{}", self.page(path));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_device_that_fails_costs_no_study_and_comes_back() {
    let running = start();
    let by_device = running.study(1);
    assert_eq!(by_device["backend"], "cuda");
    running.wait_for("/readyz", "using cuda, for the test");
    running.wait_for("/metrics", "darnet_backend_degraded 0");

    running.told.fails.store(true, Ordering::SeqCst);
    let by_cpu = running.study(2);
    assert_eq!(by_cpu["backend"], "cpu");
    assert_eq!(by_cpu["report"]["outcome"], "result");
    assert_eq!(by_cpu["report"]["logits"], by_device["report"]["logits"]);
    running.wait_for("/metrics", "darnet_backend_fallbacks_total{backend=\"cuda\"} 1");
    running.wait_for("/metrics", "darnet_backend_degraded 1");
    running.wait_for("/readyz", "cpu stands in for cuda");
    assert_eq!(running.study(3)["backend"], "cpu");
    assert_eq!(running.told.opens.load(Ordering::SeqCst), 1, "not opened again before its time");

    running.told.fails.store(false, Ordering::SeqCst);
    running.told.clock_ms.fetch_add(FIRST_RETRY.as_millis() as u64, Ordering::SeqCst);
    // Nothing arrives: the idle worker looks after it.
    running.wait_for("/metrics", "darnet_backend_retries_total{backend=\"cuda\",result=\"opened\"} 1");
    running.wait_for("/metrics", "darnet_backend_degraded 0");
    running.wait_for("/readyz", "using cuda, for the test");
    assert_eq!(running.study(4)["backend"], "cuda");
    assert!(running.page("/readyz").contains("\"ready\":true"), "{}", running.page("/readyz"));
    running.daemon.shutdown(Duration::from_secs(1));
}
