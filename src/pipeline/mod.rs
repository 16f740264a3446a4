//! The pipeline: every stage, the channels between them, the threads and pools, and their end.
//!
//! Input: a [`Config`] and a model. Output: a running [`Daemon`]. Invariants: every channel is bounded; threads end
//! because their channels close, in the order of the data; a stage that panics ends one series and nothing else.
//!
//! This module alone knows every stage.

pub mod ahead;
pub mod assembler;
pub mod device;
pub mod folder;
pub mod ingest;
pub mod jobs;
pub mod offline;
pub mod pages;
pub mod planes;
pub mod publish;
pub mod workers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config::Config;
use crate::dicom::scp::{ScpError, ScpServer};
use crate::engine::priority::lower_this_thread;
use crate::engine::{Backend, EngineError, prepare_service};
use crate::model::{Model, ModelError};
use crate::report::calibration::CalibrationError;
use crate::report::outbox::Outbox;
use crate::store::{Store, StoreError};
use crate::telemetry::{HasherError, MetricsError, MetricsHandle, StudyHasher, events, incidents};
use crate::web::{WebError, WebServer, WebState};

use assembler::{Assembler, AssemblerChannels, AssemblerOptions};
use device::{BackendState, DeviceMail};
use folder::FolderWatcher;
use ingest::{Entrance, JournalOptions, Journals, StoreFactory, ToAssembler};
use planes::PlanePool;
use publish::{Publisher, ResultNotice};
use workers::Judge;

/// Messages from ingest to the assembler. 4096 handles of about 200 bytes are under 1 MB; the assembler empties it at
/// some 100,000 a second, so a sender meets it full only if the assembler is gone.
const ARRIVALS: usize = 4096;
/// Decode jobs handed out; the rest wait in the assembler's backlog.
const DECODE_QUEUE: usize = 64;
/// Slices between decoding and in-plane resampling.
const RESAMPLE_QUEUE: usize = 64;
/// Answers to the assembler: above `DECODE_QUEUE + RESAMPLE_QUEUE` and the workers' hands, so workers rarely wait.
const DECODED_QUEUE: usize = 512;
/// Inference jobs handed out: the assembler keeps the others, so that a complete series can go before a guess.
const INFER_QUEUE: usize = 1;
/// Outcomes waiting for the store.
const PUBLISH_QUEUE: usize = 16;
/// Wait for deliveries under way when the daemon stops; one not waited for is repeated after the next start.
const OUTBOX_WAIT: Duration = Duration::from_secs(5);
/// Publications on their way back to the assembler.
const PUBLISHED_QUEUE: usize = 64;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A folder or thread could not be made.
    #[error("{what}: {source}")]
    Io {
        /// The step.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The model cannot be loaded.
    #[error("load the model: {0}")]
    Model(#[from] ModelError),
    /// The model's calibration cannot be read.
    #[error("read the model's calibration: {0}")]
    Calibration(#[from] CalibrationError),
    /// No backend can run the model.
    #[error("prepare the backend: {0}")]
    Engine(#[from] EngineError),
    /// The store cannot be opened.
    #[error("open the store: {0}")]
    Store(#[from] StoreError),
    /// The key of the study hashes cannot be read or made.
    #[error("load the hash key: {0}")]
    Hasher(#[from] HasherError),
    /// The metrics recorder is taken.
    #[error("install the metrics recorder: {0}")]
    Metrics(#[from] MetricsError),
    /// The DICOM server cannot start.
    #[error("start the DICOM server: {0}")]
    Scp(#[from] ScpError),
    /// The web server cannot start.
    #[error("start the web server: {0}")]
    Web(#[from] WebError),
    /// A webhook is not usable.
    #[error("set up the sinks: {0}")]
    Sink(String),
    /// The folder cannot be watched.
    #[error("watch the folder: {0}")]
    Folder(#[from] notify::Error),
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::Io { what, source }
}

/// Whether a thread of the pipeline has ended, which none does while the daemon runs.
#[derive(Clone, Debug, Default)]
pub struct Ended(Arc<AtomicBool>);

impl Ended {
    /// Whether one has.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn guard(&self) -> EndGuard {
        EndGuard(Arc::clone(&self.0))
    }
}

struct EndGuard(Arc<AtomicBool>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The threads of the pipeline; dropping it ends them in the order of the data.
struct Running {
    entrance: Option<Entrance>,
    journals: Option<Journals>,
    arrivals: Sender<ToAssembler>,
    threads: Vec<JoinHandle<()>>,
    journal_threads: Vec<JoinHandle<()>>,
    recover: Option<JoinHandle<()>>,
    ended: Ended,
}

impl Running {
    fn is_sound(&self) -> bool {
        !self.ended.any() && !self.journal_threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Journal threads end when the last handle to them is gone: these, the assembler's and the publisher's.
        drop(self.entrance.take());
        drop(self.journals.take());
        let _ = self.arrivals.send(ToAssembler::Stop);
        let threads = self.threads.drain(..).chain(self.recover.take()).chain(self.journal_threads.drain(..));
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// The daemon, running.
pub struct Daemon {
    scp: Option<ScpServer>,
    folder: Option<FolderWatcher>,
    running: Option<Running>,
    outbox: Option<Arc<Outbox>>,
    web: Option<WebServer>,
    dicom_addr: SocketAddr,
    web_addr: SocketAddr,
    data_dir: PathBuf,
    backend: &'static str,
}

impl Daemon {
    /// Loads the model named by `config` and starts everything. `observer` hears of every publication.
    ///
    /// # Errors
    /// [`StartError`]; nothing keeps running then.
    pub fn start(config: &Config, observer: Option<Sender<ResultNotice>>) -> Result<Self, StartError> {
        let model = match &config.model.path {
            Some(path) => Model::load(path)?,
            None => Model::embedded()?,
        };
        Self::start_with(config, &model, observer)
    }

    /// As [`Daemon::start`], with a model at hand.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_with(
        config: &Config,
        model: &Model,
        observer: Option<Sender<ResultNotice>>,
    ) -> Result<Self, StartError> {
        let backend = prepare_service(config.model.backend, model, &config.model.engine_options())?;
        Self::start_on(config, model, backend.as_ref(), observer)
    }

    /// As [`Daemon::start_with`], with a backend prepared for `model`; a session of it is opened and kept.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_on(
        config: &Config,
        model: &Model,
        backend: &dyn Backend,
        observer: Option<Sender<ResultNotice>>,
    ) -> Result<Self, StartError> {
        let metrics = MetricsHandle::install()?;
        let data_dir = config.data_dir.clone();
        let series_dir = data_dir.join("series");
        let results_dir = data_dir.join("results");
        for folder in [&data_dir, &series_dir, &results_dir] {
            std::fs::create_dir_all(folder).map_err(io("make the data folder"))?;
        }
        let hasher = StudyHasher::load_or_create(&data_dir.join("hash.key"))?;
        let store = Store::open(&data_dir.join("darnet.sqlite"))?;
        let backend_name = backend.name();
        let backend_state = BackendState::new(backend_name, backend.note());
        let ended = Ended::default();

        let (arrivals_tx, arrivals) = bounded(ARRIVALS);
        let (decode_tx, decode) = bounded(DECODE_QUEUE);
        let (resample_tx, resample) = bounded(RESAMPLE_QUEUE);
        let (decoded_tx, decoded) = bounded(DECODED_QUEUE);
        let (infer_tx, infer) = bounded(INFER_QUEUE);
        let (inferred_tx, inferred) = bounded(INFER_QUEUE);
        let (publish_tx, publish) = bounded(PUBLISH_QUEUE);
        let (published_tx, published) = bounded(PUBLISHED_QUEUE);

        let mut threads = Vec::new();
        let mut spawn = |name: String, body: Box<dyn FnOnce() + Send>| -> Result<(), StartError> {
            let flag = ended.guard();
            let body = move || {
                let _flag = flag;
                body();
            };
            threads.push(std::thread::Builder::new().name(name).spawn(body).map_err(io("start a thread"))?);
            Ok(())
        };

        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let or_cores = |n: usize| if n == 0 { cores } else { n };
        let architecture = &model.manifest.architecture;
        let [_, height, width] = architecture.input_dhw;
        let pool = PlanePool::new(config.assembly.plane_cache_slices, height * width);
        for n in 0..or_cores(config.assembly.decode_threads) {
            let (jobs, next, back) = (decode.clone(), resample_tx.clone(), decoded_tx.clone());
            spawn(format!("decode-{n}"), Box::new(move || workers::decode_worker(&jobs, &next, &back)))?;
        }
        drop((decode, resample_tx));
        let mut judge = judge(model, backend)?;
        let window = judge.window();
        let mut mails = Vec::new();
        for n in 0..or_cores(config.assembly.resample_threads) {
            let (jobs, back, pool, mail) = (resample.clone(), decoded_tx.clone(), pool.clone(), DeviceMail::default());
            mails.push(mail.clone());
            let body = move || workers::resample_worker(&jobs, &back, &pool, &window, &mail);
            spawn(format!("resample-{n}"), Box::new(body))?;
        }
        judge.use_device(config.assembly.plane_cache_slices, mails);
        // Without it nobody need gather for a guess.
        let computes_ahead = config.assembly.compute_ahead && judge.computes_ahead();
        drop((resample, decoded_tx));
        let nice = config.model.nice;
        let state = backend_state.clone();
        let infer = move || {
            if let Err(error) = lower_this_thread(nice) {
                incidents::PriorityKept { detail: &error.kind().to_string() }.emit();
            }
            workers::infer_worker(&infer, &inferred_tx, judge, &state);
        };
        spawn("infer".to_owned(), Box::new(infer))?;

        let journal_options = JournalOptions {
            series_dir: series_dir.clone(),
            threads: config.assembly.journal_threads,
            durability: config.assembly.durability,
            max_records_per_series: config.assembly.max_objects_per_series,
            max_total_bytes: config.assembly.max_journal_bytes,
        };
        let (journals, journal_threads) =
            Journals::start(&journal_options, &hasher, &arrivals_tx).map_err(io("start the journal threads"))?;

        let publishing = publish::Setup::new(config, model, backend_name, &store, &results_dir, observer)?;
        let (outbox, publisher, renderer) = publishing.start(journals.clone(), metrics.clone())?;
        spawn("publish".to_owned(), Box::new(move || Publisher::run(publisher, &publish, &published_tx)))?;
        spawn("render".to_owned(), Box::new(move || renderer.run()))?;

        let assembler = Assembler::new(
            AssemblerOptions {
                series_dir: series_dir.clone(),
                completion: config.assembly.completion(),
                limits: config.geometry.clone(),
                max_slots: u32::try_from(config.assembly.max_objects_per_series).unwrap_or(u32::MAX),
                max_open_series: config.assembly.max_open_series,
                max_revisions: config.assembly.max_revisions,
                retire_after: Duration::from_secs(config.assembly.retire_after_s),
                input_hw: [height, width],
                crop_fraction: model.manifest.preprocessing.crop_fraction,
                speculate: config.assembly.speculate,
                ahead: computes_ahead.then_some(ahead::Grid {
                    depth_grid: model.manifest.preprocessing.depth_grid,
                    direction: model.manifest.preprocessing.slice_direction,
                    planes: architecture.input_dhw[0],
                }),
            },
            AssemblerChannels {
                arrivals,
                decode: decode_tx,
                decoded,
                infer: infer_tx,
                inferred,
                publish: publish_tx,
                published,
            },
            journals.clone(),
        );
        spawn("assemble".to_owned(), Box::new(move || assembler.run()))?;
        let recovering = journals.clone();
        let recover = std::thread::Builder::new()
            .name("recover".to_owned())
            .spawn(move || {
                if let Err(error) = recovering.recover_all(&series_dir) {
                    incidents::JournalFailed { operation: "recover", detail: &error.kind().to_string() }.emit();
                }
            })
            .map_err(io("start a thread"))?;
        let entrance = Entrance::new(journals.clone(), hasher, arrivals_tx.clone(), &config.peers.trust_series_count);
        // From here on an error stops what runs. It must hold the last handles: its threads end with them.
        let running = Running {
            entrance: Some(entrance),
            journals: Some(journals),
            arrivals: arrivals_tx,
            threads,
            journal_threads,
            recover: Some(recover),
            ended,
        };
        let entrance = running.entrance.as_ref().expect("given above");
        let scp = ScpServer::bind(&config.dicom, Arc::new(StoreFactory::new(entrance.clone())))?;
        let folder = FolderWatcher::start(&config.folder, entrance, config.dicom.max_object_bytes)?;
        let web = WebServer::start(
            &config.web,
            WebState {
                metrics,
                readiness: pages::readiness(&data_dir, &running.ended, backend_state),
                store: store.clone(),
                extra: Some(pages::router(&results_dir)),
            },
        )?;
        events::ServerStarted {
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("DARNET_COMMIT").unwrap_or("unknown"),
            backend: backend_name,
            instruction_set: backend.instruction_set(),
            choice: backend.note().unwrap_or("as configured"),
            model: &model.manifest.id,
            intended_use: &model.manifest.intended_use,
        }
        .emit();
        Ok(Self {
            dicom_addr: scp.local_addr(),
            web_addr: web.local_addr(),
            scp: Some(scp),
            folder,
            running: Some(running),
            outbox: Some(outbox),
            web: Some(web),
            data_dir,
            backend: backend_name,
        })
    }

    /// Where the DICOM server listens.
    pub fn dicom_addr(&self) -> SocketAddr {
        self.dicom_addr
    }

    /// Where the web server listens.
    pub fn web_addr(&self) -> SocketAddr {
        self.web_addr
    }

    /// The backend in use.
    pub fn backend(&self) -> &'static str {
        self.backend
    }

    /// The data folder.
    pub fn data_dir(&self) -> &std::path::Path {
        &self.data_dir
    }

    /// Whether every thread of the pipeline still runs.
    pub fn is_sound(&self) -> bool {
        self.running.as_ref().is_some_and(Running::is_sound)
    }

    /// Ends in the order of the data: associations get `drain` to finish their object, what is journalled stays for
    /// the next start, outcomes in hand are published, deliveries not made stay in the outbox.
    pub fn shutdown(mut self, drain: Duration) {
        if let Some(scp) = self.scp.take() {
            scp.shutdown(drain);
        }
        drop(self.folder.take());
        drop(self.running.take());
        if let Some(outbox) = self.outbox.take() {
            // The publisher's handle went with its thread.
            if let Some(outbox) = Arc::into_inner(outbox) {
                outbox.shutdown(OUTBOX_WAIT);
            }
        }
        if let Some(web) = self.web.take() {
            web.shutdown();
        }
    }
}

/// A judge for `model` with a session of `backend`.
///
/// # Errors
/// The session cannot be opened.
pub fn judge(model: &Model, backend: &dyn Backend) -> Result<Judge, EngineError> {
    let head_weight: Arc<[f32]> = Arc::from(model.weights.head_weight());
    Ok(Judge::new(
        &model.manifest.preprocessing,
        model.manifest.architecture.input_dhw,
        head_weight,
        backend.session()?,
    ))
}

/// A channel for an observer of publications.
pub fn observer() -> (Sender<ResultNotice>, Receiver<ResultNotice>) {
    bounded(PUBLISHED_QUEUE)
}
