//! Which backend `auto` takes, and what happens when a device fails while the daemon runs.
//!
//! Input: backends in order of preference. Output: one [`Backend`] that says why it is the one, and whose sessions do
//! not fail with the device: a run that a device backend cannot do is done by `cpu`, the same run, at once. The device is
//! closed then and opened anew, by another thread, after a wait that grows from [`FIRST_RETRY`] to [`LAST_RETRY`] with
//! each failure in a row; a run that comes in between is `cpu`'s. A device whose result is not finite keeps its place
//! (half precision has a range), but that run is `cpu`'s, too.
//!
//! Invariants: a run is cancelled, refused for its input, or done; a result says which backend made it
//! ([`Session::ran_on`]); at most one attempt to open a device is under way a session; what happened is told once
//! ([`Session::news`]). The clock is the caller's.
//!
//! Deliberately absent: any knowledge of what a device is, and logs and metrics, which the caller makes of the news.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use super::{
    Backend, BackendKind, CancelToken, DeviceInput, EngineError, EngineOptions, Inference, LayerTiming, Reuse, Session,
};
use crate::model::Model;

/// Wait before a failed device is opened again for the first time. A reset of the driver takes a few seconds.
pub const FIRST_RETRY: Duration = Duration::from_secs(10);
/// Longest wait between two attempts: a device that is gone costs one attempt every ten minutes.
pub const LAST_RETRY: Duration = Duration::from_secs(600);

/// Backends that `auto` tries, the fastest first; the last one is always there.
pub const ORDER: [BackendKind; 3] = [BackendKind::Tensorrt, BackendKind::Cuda, BackendKind::Cpu];

/// What became of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceNews {
    /// A run failed on it and was done by `cpu`.
    Fell {
        /// The device's backend.
        backend: &'static str,
        /// Why.
        reason: String,
        /// Until it is opened again; none if it stays open.
        retry_in: Option<Duration>,
    },
    /// It could not be opened again.
    StillAway {
        /// The device's backend.
        backend: &'static str,
        /// Why.
        reason: String,
        /// Until the next attempt.
        retry_in: Duration,
    },
    /// It runs again.
    Back {
        /// The device's backend.
        backend: &'static str,
        /// How long `cpu` stood in.
        away: Duration,
    },
}

/// Opens the device's backend anew.
pub type Reopen = Arc<dyn Fn() -> Result<Box<dyn Backend>, EngineError> + Send + Sync>;
/// The time.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;
/// Runs work beside the caller.
pub type Spawn = Arc<dyn Fn(Box<dyn FnOnce() + Send>) -> std::io::Result<()> + Send + Sync>;

/// A device backend with `cpu` behind it.
pub struct FallbackBackend {
    device: Box<dyn Backend>,
    cpu: Arc<dyn Backend>,
    reopen: Reopen,
    clock: Clock,
    spawn: Spawn,
    note: Option<String>,
}

impl FallbackBackend {
    /// `device` in front of `cpu`; `reopen` makes `device` anew, `note` is what [`Backend::note`] returns.
    pub fn new(device: Box<dyn Backend>, cpu: Arc<dyn Backend>, reopen: Reopen, note: Option<String>) -> Self {
        let spawn: Spawn =
            Arc::new(|work| std::thread::Builder::new().name("reopen-device".to_owned()).spawn(work).map(drop));
        Self { device, cpu, reopen, clock: Arc::new(Instant::now), spawn, note }
    }

    /// The same with another clock, and another way to run work beside the caller.
    pub fn with_clock(mut self, clock: Clock, spawn: Spawn) -> Self {
        (self.clock, self.spawn) = (clock, spawn);
        self
    }
}

impl Backend for FallbackBackend {
    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let (name, session) = (self.device.name(), self.device.session()?);
        Ok(Box::new(FallbackSession {
            name,
            device: Device::Open(session),
            delay: FIRST_RETRY,
            cpu_backend: Arc::clone(&self.cpu),
            cpu: None,
            reopen: Arc::clone(&self.reopen),
            clock: Arc::clone(&self.clock),
            spawn: Arc::clone(&self.spawn),
            news: Vec::new(),
            ran_on: name,
            pass_over: false,
        }))
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref().or_else(|| self.device.note())
    }

    fn threads(&self) -> usize {
        self.device.threads()
    }

    fn instruction_set(&self) -> &'static str {
        self.device.instruction_set()
    }

    fn weight_bytes(&self) -> usize {
        self.device.weight_bytes() + self.cpu.weight_bytes()
    }

    fn mapped_bytes(&self) -> usize {
        self.device.mapped_bytes() + self.cpu.mapped_bytes()
    }

    fn session_bytes(&self) -> usize {
        self.device.session_bytes()
    }
}

/// A session of the device, opened beside the caller.
type Opened = Result<Box<dyn Session>, EngineError>;

enum Device {
    Open(Box<dyn Session>),
    Away {
        since: Instant,
        retry_at: Instant,
        /// Answer of the attempt under way.
        attempt: Option<Receiver<Opened>>,
    },
}

struct FallbackSession {
    name: &'static str,
    device: Device,
    /// Wait before the attempt after the next failure.
    delay: Duration,
    cpu_backend: Arc<dyn Backend>,
    /// Opened with the first failure.
    cpu: Option<Box<dyn Session>>,
    reopen: Reopen,
    clock: Clock,
    spawn: Spawn,
    news: Vec<DeviceNews>,
    ran_on: &'static str,
    /// The next run is `cpu`'s though the device is open: it gave this input's result, and that was not finite.
    pass_over: bool,
}

/// What an error of the device means.
enum Meaning {
    /// Not the device's fault.
    Caller,
    /// This run is not for it.
    Run,
    /// It is gone.
    Lost,
}

fn meaning(error: &EngineError) -> Meaning {
    match error {
        EngineError::Cancelled | EngineError::InputLength { .. } | EngineError::InputValue { .. } => Meaning::Caller,
        EngineError::NotFinite => Meaning::Run,
        _ => Meaning::Lost,
    }
}

impl FallbackSession {
    /// Closes the device after an error of it, unless the error is the caller's; `true` if `cpu` has to do the run.
    fn falls(&mut self, error: &EngineError) -> bool {
        let retry_in = match meaning(error) {
            Meaning::Caller => return false,
            Meaning::Run => None,
            Meaning::Lost => {
                let now = (self.clock)();
                let wait = self.next_delay();
                // Drops the session, and with it what the device holds.
                self.device = Device::Away { since: now, retry_at: now + wait, attempt: None };
                Some(wait)
            }
        };
        self.news.push(DeviceNews::Fell { backend: self.name, reason: error.to_string(), retry_in });
        true
    }

    fn next_delay(&mut self) -> Duration {
        let wait = self.delay;
        self.delay = (wait * 2).min(LAST_RETRY);
        wait
    }

    /// Takes over a device that was opened, or starts to open one when it is time.
    fn tend(&mut self) {
        let now = (self.clock)();
        let Device::Away { since, retry_at, attempt } = &mut self.device else { return };
        if attempt.is_none() && now >= *retry_at {
            let (answer, opened) = sync_channel(1);
            let reopen = Arc::clone(&self.reopen);
            let work = move || {
                // The backend itself is let go: its session holds what it needs.
                let _ = answer.send(reopen().and_then(|backend| backend.session()));
            };
            if (self.spawn)(Box::new(work)).is_ok() {
                *attempt = Some(opened);
            } else {
                *retry_at = now + FIRST_RETRY;
            }
        }
        let since = *since;
        let opened = match attempt.as_ref().map(Receiver::try_recv) {
            None | Some(Err(TryRecvError::Empty)) => return,
            Some(Ok(opened)) => opened,
            // The thread ended without an answer: it panicked.
            Some(Err(TryRecvError::Disconnected)) => {
                Err(EngineError::Device { backend: self.name, reason: "opening it ended early".to_owned() })
            }
        };
        match opened {
            Ok(session) => {
                self.device = Device::Open(session);
                self.news.push(DeviceNews::Back { backend: self.name, away: now.saturating_duration_since(since) });
            }
            Err(error) => {
                let wait = self.next_delay();
                self.device = Device::Away { since, retry_at: now + wait, attempt: None };
                let reason = error.to_string();
                self.news.push(DeviceNews::StillAway { backend: self.name, reason, retry_in: wait });
            }
        }
    }

    fn run_on_cpu(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        self.ran_on = self.cpu_backend.name();
        if self.cpu.is_none() {
            self.cpu = Some(self.cpu_backend.session()?);
        }
        match &mut self.cpu {
            Some(session) => session.run(input, cancel, out),
            None => Err(EngineError::Unavailable { backend: "cpu", reason: "its session is gone".to_owned() }),
        }
    }

    fn succeeded(&mut self) {
        (self.ran_on, self.delay) = (self.name, FIRST_RETRY);
    }

    fn active(&self) -> Option<&dyn Session> {
        match &self.device {
            Device::Open(session) if self.ran_on == self.name => Some(session.as_ref()),
            _ => self.cpu.as_deref(),
        }
    }
}

impl Session for FallbackSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        self.tend();
        if let Device::Open(session) = &mut self.device
            && !std::mem::take(&mut self.pass_over)
        {
            match session.run(input, cancel, out) {
                Ok(()) => {
                    self.succeeded();
                    return Ok(());
                }
                Err(error) if !self.falls(&error) => return Err(error),
                Err(_) => {}
            }
        }
        self.run_on_cpu(input, cancel, out)
    }

    fn device_input(&self) -> Option<DeviceInput> {
        match &self.device {
            Device::Open(session) => session.device_input(),
            Device::Away { .. } => None,
        }
    }

    /// As the device's; when the device fails the caller has the input in memory yet to make, and calls
    /// [`run`](Session::run).
    fn run_device(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        let Device::Open(session) = &mut self.device else {
            return Err(EngineError::Device { backend: self.name, reason: "it is closed after a failure".to_owned() });
        };
        match session.run_device(cancel, out) {
            Ok(()) => {
                self.succeeded();
                Ok(())
            }
            Err(error) => {
                self.pass_over = self.falls(&error);
                Err(error)
            }
        }
    }

    fn advance(&mut self, input: &[f32], ready: &[bool], cancel: &CancelToken) -> Result<(), EngineError> {
        match &mut self.device {
            Device::Open(session) => session.advance(input, ready, cancel),
            Device::Away { .. } => Ok(()),
        }
    }

    fn computes_ahead(&self) -> bool {
        match &self.device {
            Device::Open(session) => session.computes_ahead(),
            Device::Away { .. } => false,
        }
    }

    fn share(&self, values: &mut [f32], len: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        match self.active() {
            Some(session) => session.share(values, len, work),
            None => super::share_alone(values, len, work),
        }
    }

    fn device_ms(&self) -> Option<f64> {
        self.active().and_then(Session::device_ms)
    }

    fn profile(&mut self) -> Result<(), EngineError> {
        match &mut self.device {
            Device::Open(session) => session.profile(),
            Device::Away { .. } => Ok(()),
        }
    }

    fn layers(&self) -> Vec<LayerTiming> {
        self.active().map(Session::layers).unwrap_or_default()
    }

    fn reuse(&self) -> Reuse {
        self.active().map(Session::reuse).unwrap_or_default()
    }

    fn ran_on(&self) -> Option<&'static str> {
        Some(self.ran_on)
    }

    fn is_degraded(&self) -> bool {
        matches!(self.device, Device::Away { .. })
    }

    fn news(&mut self) -> Vec<DeviceNews> {
        self.tend();
        std::mem::take(&mut self.news)
    }
}

/// A backend with a reason for its choice.
struct Noted {
    inner: Box<dyn Backend>,
    note: String,
}

impl Backend for Noted {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        self.inner.session()
    }

    fn note(&self) -> Option<&str> {
        Some(&self.note)
    }

    fn threads(&self) -> usize {
        self.inner.threads()
    }

    fn instruction_set(&self) -> &'static str {
        self.inner.instruction_set()
    }

    fn weight_bytes(&self) -> usize {
        self.inner.weight_bytes()
    }

    fn mapped_bytes(&self) -> usize {
        self.inner.mapped_bytes()
    }

    fn session_bytes(&self) -> usize {
        self.inner.session_bytes()
    }
}

/// The first of `order` that `open` gives, and why it is that one.
///
/// # Errors
/// That of the last, when none is there.
fn first_of(
    order: &[BackendKind],
    mut open: impl FnMut(BackendKind) -> Result<Box<dyn Backend>, EngineError>,
) -> Result<(BackendKind, Box<dyn Backend>, String), EngineError> {
    let mut passed = String::new();
    let mut last = EngineError::UnknownBackend(String::new());
    for kind in order {
        match open(*kind) {
            Ok(backend) => {
                let more = backend.note().map(|note| format!(" ({note})")).unwrap_or_default();
                let note = format!("using {kind}{more}{passed}");
                return Ok((*kind, backend, note));
            }
            Err(error) => {
                let reason = match &error {
                    EngineError::Unavailable { reason, .. } | EngineError::Device { reason, .. } => reason.clone(),
                    other => other.to_string(),
                };
                passed.push_str(&format!("; {kind} not: {reason}"));
                last = error;
            }
        }
    }
    Err(last)
}

/// The fastest backend that works here, with `cpu` behind it if it is a device's.
///
/// # Errors
/// As [`super::open`] for `cpu`.
pub(super) fn auto(model: &Model, options: &EngineOptions) -> Result<Box<dyn Backend>, EngineError> {
    let (kind, backend, note) = first_of(&ORDER, |kind| super::open(kind, model, options))?;
    if kind == BackendKind::Cpu {
        return Ok(Box::new(Noted { inner: backend, note }));
    }
    guarded(kind, backend, model, options, Some(note))
}

/// `backend` with `cpu` behind it.
///
/// # Errors
/// As [`super::open`] for `cpu`.
pub(super) fn guarded(
    kind: BackendKind,
    backend: Box<dyn Backend>,
    model: &Model,
    options: &EngineOptions,
    note: Option<String>,
) -> Result<Box<dyn Backend>, EngineError> {
    let cpu = Arc::from(super::open(BackendKind::Cpu, model, options)?);
    // Kept for the day when the device is opened again: at full size 141 MB.
    let (model, options) = (model.clone(), options.clone());
    let reopen: Reopen = Arc::new(move || super::open(kind, &model, &options));
    Ok(Box::new(FallbackBackend::new(backend, cpu, reopen, note)))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

    use super::*;

    /// A device that fails on command, and a clock and threads that stand still until told.
    #[derive(Clone)]
    struct World(Arc<WorldState>);

    struct WorldState {
        start: Instant,
        ms: AtomicU64,
        /// What the next runs on the device end with.
        run: Mutex<Option<EngineError>>,
        opens: AtomicBool,
        attempts: AtomicUsize,
        sessions: AtomicUsize,
        threads: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
    }

    struct Fake(World, &'static str);
    struct FakeSession(World, &'static str);

    impl Drop for FakeSession {
        fn drop(&mut self) {
            self.0.0.sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl Backend for Fake {
        fn name(&self) -> &'static str {
            self.1
        }

        fn session(&self) -> Result<Box<dyn Session>, EngineError> {
            self.0.0.sessions.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(FakeSession(self.0.clone(), self.1)))
        }
    }

    impl Session for FakeSession {
        fn run(&mut self, _: &[f32], _: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
            if self.1 == "cuda"
                && let Some(error) = self.0.0.run.lock().unwrap().clone()
            {
                return Err(error);
            }
            out.logits = vec![if self.1 == "cuda" { 1.0 } else { 2.0 }];
            Ok(())
        }

        fn run_device(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
            self.run(&[], cancel, out)
        }
    }

    impl World {
        fn new() -> (Self, Box<dyn Session>) {
            let world = Self(Arc::new(WorldState {
                start: Instant::now(),
                ms: AtomicU64::new(0),
                run: Mutex::new(None),
                opens: AtomicBool::new(true),
                attempts: AtomicUsize::new(0),
                sessions: AtomicUsize::new(0),
                threads: Mutex::new(Vec::new()),
            }));
            let (again, clock, spawn) = (world.clone(), world.clone(), world.clone());
            let reopen: Reopen = Arc::new(move || {
                again.0.attempts.fetch_add(1, Ordering::Relaxed);
                if again.0.opens.load(Ordering::Relaxed) {
                    Ok(Box::new(Fake(again.clone(), "cuda")))
                } else {
                    Err(lost())
                }
            });
            let (device, cpu) = (Box::new(Fake(world.clone(), "cuda")), Arc::new(Fake(world.clone(), "cpu")));
            let backend = FallbackBackend::new(device, cpu, reopen, None).with_clock(
                Arc::new(move || clock.0.start + Duration::from_millis(clock.0.ms.load(Ordering::Relaxed))),
                Arc::new(move |work| {
                    spawn.0.threads.lock().unwrap().push(work);
                    Ok(())
                }),
            );
            let session = backend.session().unwrap();
            (world, session)
        }

        fn fail(&self, error: Option<EngineError>) {
            *self.0.run.lock().unwrap() = error;
        }

        fn wait(&self, by: Duration) {
            self.0.ms.fetch_add(by.as_millis() as u64, Ordering::Relaxed);
        }

        /// Lets the threads run that wait.
        fn let_threads_run(&self) -> usize {
            let waiting = std::mem::take(&mut *self.0.threads.lock().unwrap());
            let count = waiting.len();
            waiting.into_iter().for_each(|work| work());
            count
        }
    }

    fn lost() -> EngineError {
        EngineError::Device { backend: "cuda", reason: "out of memory".to_owned() }
    }

    fn run(session: &mut Box<dyn Session>) -> Result<f32, EngineError> {
        let mut out = Inference::default();
        session.run(&[], &CancelToken::new(), &mut out).map(|()| out.logits[0])
    }

    #[test]
    fn a_run_that_the_device_fails_is_done_by_cpu_at_once_and_told_once() {
        let (world, mut session) = World::new();
        assert_eq!(run(&mut session), Ok(1.0));
        assert_eq!((session.ran_on(), session.is_degraded()), (Some("cuda"), false));
        assert_eq!(session.news(), []);
        world.fail(Some(lost()));
        assert_eq!(run(&mut session), Ok(2.0));
        assert_eq!((session.ran_on(), session.is_degraded()), (Some("cpu"), true));
        let told = session.news();
        let retry_in = Some(FIRST_RETRY);
        assert_eq!(told, [DeviceNews::Fell { backend: "cuda", reason: lost().to_string(), retry_in }]);
        assert_eq!(session.news(), []);
        assert_eq!(world.0.sessions.load(Ordering::Relaxed), 1, "the device's session is closed, cpu's is open");
    }

    #[test]
    fn the_device_comes_back_after_its_wait_and_no_run_waits_for_it() {
        let (world, mut session) = World::new();
        world.fail(Some(lost()));
        assert_eq!(run(&mut session), Ok(2.0));
        world.fail(None);
        world.wait(FIRST_RETRY - Duration::from_millis(1));
        assert_eq!(run(&mut session), Ok(2.0));
        assert_eq!(world.let_threads_run(), 0, "too early");
        world.wait(Duration::from_millis(1));
        assert_eq!(run(&mut session), Ok(2.0), "opened beside the run");
        assert_eq!(run(&mut session), Ok(2.0));
        assert_eq!(world.let_threads_run(), 1, "one attempt at a time");
        session.news();
        assert_eq!(run(&mut session), Ok(1.0));
        assert_eq!((session.ran_on(), session.is_degraded()), (Some("cuda"), false));
        assert_eq!(session.news(), []);
    }

    #[test]
    fn waits_double_up_to_their_bound_and_start_anew_after_a_run_that_succeeds() {
        let (world, mut session) = World::new();
        world.fail(Some(lost()));
        world.0.opens.store(false, Ordering::Relaxed);
        assert_eq!(run(&mut session), Ok(2.0));
        session.news();
        let mut waits = vec![FIRST_RETRY];
        for _ in 0..9 {
            world.wait(*waits.last().unwrap());
            assert_eq!(session.news(), []);
            assert_eq!(world.let_threads_run(), 1);
            let [DeviceNews::StillAway { retry_in, .. }] = session.news()[..] else { panic!("no news") };
            waits.push(retry_in);
        }
        assert!(waits.windows(2).all(|w| w[1] == (w[0] * 2).min(LAST_RETRY)), "{waits:?}");
        assert_eq!(waits.last(), Some(&LAST_RETRY));
        world.0.opens.store(true, Ordering::Relaxed);
        world.wait(LAST_RETRY);
        session.news();
        world.let_threads_run();
        let [DeviceNews::Back { away, .. }] = session.news()[..] else { panic!("no news") };
        assert_eq!(away, waits.iter().sum::<Duration>());
        // It opens, but fails in its first run: the wait goes on growing.
        assert_eq!(run(&mut session), Ok(2.0));
        assert!(matches!(session.news()[..], [DeviceNews::Fell { retry_in: Some(w), .. }] if w == LAST_RETRY));
        world.wait(LAST_RETRY);
        session.news();
        world.let_threads_run();
        world.fail(None);
        assert_eq!(run(&mut session), Ok(1.0));
        world.fail(Some(lost()));
        assert_eq!(run(&mut session), Ok(2.0));
        assert!(session.news().contains(&DeviceNews::Fell {
            backend: "cuda",
            reason: lost().to_string(),
            retry_in: Some(FIRST_RETRY)
        }));
    }

    #[test]
    fn errors_of_the_caller_do_not_close_the_device() {
        let (world, mut session) = World::new();
        for error in [
            EngineError::Cancelled,
            EngineError::InputLength { expected: 1, got: 2 },
            EngineError::InputValue { index: 0 },
        ] {
            world.fail(Some(error.clone()));
            assert_eq!(run(&mut session), Err(error));
            assert!(!session.is_degraded());
        }
        assert_eq!(session.news(), []);
    }

    #[test]
    fn a_result_that_is_not_finite_is_made_again_by_cpu_and_keeps_the_device() {
        let (world, mut session) = World::new();
        world.fail(Some(EngineError::NotFinite));
        assert_eq!(run(&mut session), Ok(2.0));
        assert_eq!((session.ran_on(), session.is_degraded()), (Some("cpu"), false));
        assert!(matches!(session.news()[..], [DeviceNews::Fell { retry_in: None, .. }]));
        world.fail(None);
        assert_eq!(run(&mut session), Ok(1.0));
    }

    #[test]
    fn a_run_from_device_memory_fails_once_and_the_run_from_memory_succeeds() {
        let (world, mut session) = World::new();
        let mut out = Inference::default();
        assert_eq!(session.run_device(&CancelToken::new(), &mut out), Ok(()));
        world.fail(Some(lost()));
        assert_eq!(session.run_device(&CancelToken::new(), &mut out), Err(lost()));
        assert!(session.device_input().is_none());
        assert_eq!(run(&mut session), Ok(2.0));
        assert_eq!(session.news().len(), 1);
        assert!(session.run_device(&CancelToken::new(), &mut out).is_err());
        // Not finite: the same input is not given to it again, the next one is.
        let (world, mut session) = World::new();
        world.fail(Some(EngineError::NotFinite));
        assert_eq!(session.run_device(&CancelToken::new(), &mut out), Err(EngineError::NotFinite));
        world.fail(None);
        assert_eq!(run(&mut session), Ok(2.0));
        assert_eq!(run(&mut session), Ok(1.0));
        assert_eq!(session.news().len(), 1);
    }

    #[test]
    fn an_attempt_that_panics_is_a_failed_attempt() {
        let (world, mut session) = World::new();
        world.fail(Some(lost()));
        run(&mut session).unwrap();
        session.news();
        world.wait(FIRST_RETRY);
        session.news();
        drop(std::mem::take(&mut *world.0.threads.lock().unwrap()));
        assert!(matches!(session.news()[..], [DeviceNews::StillAway { .. }]));
    }

    #[test]
    fn auto_takes_the_first_that_opens_and_says_why_not_the_others() {
        let (world, _session) = World::new();
        let absent = |backend, reason: &str| Err(EngineError::Unavailable { backend, reason: reason.to_owned() });
        let (kind, backend, note) = first_of(&ORDER, |kind| match kind {
            BackendKind::Tensorrt => absent("tensorrt", "no library"),
            BackendKind::Cuda => absent("cuda", "no driver"),
            _ => Ok(Box::new(Fake(world.clone(), "cpu"))),
        })
        .unwrap();
        assert_eq!((kind, backend.name()), (BackendKind::Cpu, "cpu"));
        assert_eq!(note, "using cpu; tensorrt not: no library; cuda not: no driver");
        let (kind, _, note) = first_of(&ORDER, |_| Ok(Box::new(Fake(world.clone(), "x")))).unwrap();
        assert_eq!((kind, note.as_str()), (BackendKind::Tensorrt, "using tensorrt"));
        let none = first_of(&ORDER, |kind| absent(kind.as_str(), "none")).err();
        assert_eq!(none, Some(EngineError::Unavailable { backend: "cpu", reason: "none".to_owned() }));
    }
}
