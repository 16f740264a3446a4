//! The assembler: one thread that owns every open series and decides what happens next.
//!
//! Input: arrivals and ends of associations from ingest, decoded slices, finished inferences, publications. Output:
//! decode, inference and publish jobs. Invariants: it never blocks on a full queue (what does not fit waits in
//! bounded backlogs here), so ingest never waits on decoding or inference; a series is judged from the set of its
//! slices, never from their order; an outcome is published only when the completion rules say so and no slice is
//! still being decoded or is not on disk yet; every content of a series is published once.
//!
//! Speculation: when a series looks complete its inference starts at once; the outcome waits for completion, and
//! another slice cancels the run.
//!
//! Computing ahead: while slices arrive and the worker is free, the first layers run on planes that are final if the
//! series ends as [`ahead`] guesses. One series at a time has the worker's session for it; any run goes before it and
//! cancels it.
//!
//! Deliberately absent: pixels, files, the network.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, select};

use crate::dicom::header::SliceHeader;
use crate::engine::CancelToken;
use crate::pipeline::ahead::{self, Guess, Prediction};
use crate::pipeline::ingest::{
    Arrival, Journals, PublishedNote, RECOVERED, ToAssembler, VOLUME_PREFIX, remove_volumes,
};
use crate::pipeline::jobs::{
    AheadDone, AheadJob, DecodeJob, DecodeTask, Decoded, DecodedSlice, FromInfer, InferDone, InferJob, Inferred,
    PublishJob, Published, SliceHandle, Timing, ToInfer,
};
use crate::pipeline::planes::{SharedPlane, SlicePlane};
use crate::resample::lung::SliceLung;
use crate::resample::plan::InPlanePlan;
use crate::scan::select::{MAX_GRIDS, Selection, SliceFacts, facts, select};
use crate::telemetry::events::Stage;
use crate::telemetry::{StudyHash, events, incidents};
use crate::volume::completion::{Cause, Completion, CompletionRules, LULL_MS, Progress};
use crate::volume::geometry::{GeometryLimits, InPlaneOrientation, SliceGeometry};
use crate::volume::journal::{JournalReader, RecordRef};
use crate::volume::refusal::{Reason, Refusal};
use crate::volume::store::VolumeFile;

/// Wait before an outcome that the store did not take is made and offered again.
const COMMIT_RETRY: Duration = Duration::from_secs(5);
/// Wait before the content of a series is asked for again.
const RESEND_RETRY: Duration = Duration::from_secs(5);
/// Longest sleep of the assembler, so that the stop flag of a dead peer is seen.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// New final planes from which a step of computing ahead is worth it: the depth of a tile of the convolutions. Fewer do
/// towards the end, a quarter of the planes still missing, because what no step has taken when the series ends is lost.
const AHEAD_STEP_PLANES: usize = 4;
/// New slices after which the guess is looked at again. Looking takes less than a millisecond for 600 slices; with this
/// it is 150 looks a series.
const AHEAD_LOOK_SLICES: usize = 4;
/// Among the last slices of a stated count it is looked at after each: 32 looks more. Planes are made of up to 10
/// slices each way (600 slices, 64 planes).
const AHEAD_LAST_SLICES: u64 = 32;
/// Tilt from which a series is taken to be sheared in the end, degrees: so little moves the image by half a pixel over
/// 300 mm ([`crate::volume::geometry::NO_SHEAR_PX`]).
const AHEAD_MAX_TILT_DEG: f64 = 0.07;

/// Settings of the assembler.
#[derive(Clone, Debug)]
pub struct AssemblerOptions {
    /// Folder that holds one folder a series.
    pub series_dir: std::path::PathBuf,
    /// When a series is complete.
    pub completion: CompletionRules,
    /// What geometry is judged.
    pub limits: GeometryLimits,
    /// Slots of a volume file.
    pub max_slots: u32,
    /// Series held in memory at once; further series wait in their journals.
    pub max_open_series: usize,
    /// Outcomes a series may have before a person must look.
    pub max_revisions: u32,
    /// Quiet time after a publication before a series leaves memory.
    pub retire_after: Duration,
    /// Height and width of the network's input.
    pub input_hw: [usize; 2],
    /// Share of rows and columns kept.
    pub crop_fraction: f64,
    /// Whether inference may start before completion.
    pub speculate: bool,
    /// How planes are made, when the first layers may run on finished ones ahead of a run.
    pub ahead: Option<ahead::Grid>,
}

/// The assembler's ends of the channels.
pub struct AssemblerChannels {
    /// From ingest.
    pub arrivals: Receiver<ToAssembler>,
    /// To the decoders.
    pub decode: Sender<DecodeJob>,
    /// From the resamplers (or the decoders, for failures).
    pub decoded: Receiver<Decoded>,
    /// To the inference worker.
    pub infer: Sender<ToInfer>,
    /// From the inference worker.
    pub inferred: Receiver<FromInfer>,
    /// To the publisher.
    pub publish: Sender<PublishJob>,
    /// From the publisher.
    pub published: Receiver<Published>,
}

#[derive(Debug)]
struct Grid {
    rows: u32,
    columns: u32,
    orientation: InPlaneOrientation,
    volume: Arc<VolumeFile>,
    plan: Arc<InPlanePlan>,
}

#[derive(Debug)]
struct Entry {
    facts: SliceFacts,
    grid: Option<usize>,
    slot: Option<u32>,
    plane: Option<SlicePlane>,
    lung: Option<SliceLung>,
}

/// A repeat whose first is still being decoded: where it is, to be compared later.
#[derive(Debug)]
struct Repeat {
    ordinal: u64,
    first: usize,
    reader: JournalReader,
    record: RecordRef,
    transfer_syntax_uid: Arc<str>,
    header: Arc<SliceHeader>,
}

#[derive(Debug)]
struct Job {
    version: u64,
    cancel: Arc<CancelToken>,
    notes: Vec<String>,
    done: Option<Result<Box<Inferred>, Refusal>>,
    sent: bool,
    /// Started before the series was complete.
    speculative: bool,
    pending: Option<InferJob>,
}

/// What was computed ahead for a series.
#[derive(Debug, Default)]
struct Ahead {
    /// What the series is expected to become, with the guess's number, once work was done for it.
    guess: Option<(Guess, u64)>,
    /// Final planes that the session was given for it.
    planes: usize,
    /// Slices decoded when the guess was last looked at.
    looked: usize,
}

/// What the inference worker has in hand.
#[derive(Debug)]
enum Working {
    Run(StudyHash),
    Ahead { series: StudyHash, planes: usize, cancel: Arc<CancelToken> },
}

struct Series {
    epoch: u64,
    study: StudyHash,
    header: Arc<SliceHeader>,
    entries: Vec<Entry>,
    by_sop: HashMap<String, usize>,
    grids: Vec<Grid>,
    completion: Completion,
    recovered_open: bool,
    in_flight: usize,
    repeats: Vec<Repeat>,
    conflict: bool,
    /// Acknowledged objects that the disk no longer gives back.
    lost: u64,
    /// The journal gives back none of them.
    unreadable: bool,
    /// Offset in the journal after the last record seen.
    covered: u64,
    /// The same of the last record that is on disk: nothing is published before it is `covered`.
    durable: u64,
    version: u64,
    published_version: u64,
    publishing: Option<u64>,
    revision: u32,
    over_bound: bool,
    hold_until: Option<Instant>,
    /// An outcome the store did not take, to be offered again.
    retry: Option<Box<PublishJob>>,
    completed: Option<(Cause, Instant)>,
    job: Option<Job>,
    last_pdata_at: Instant,
    written_at: Instant,
    durable_at: Instant,
    decoded_at: Instant,
    resampled_at: Instant,
    quiet_since: Instant,
    decode_s: f64,
    resample_s: f64,
    hint: Option<u64>,
    /// Slices decoded, with HU in their slots.
    decoded: usize,
    ahead: Ahead,
    /// A slice came since the series was last read back: what was lost to a fault of this machine is tried once more.
    retry_lost: bool,
}

/// The assembler.
pub struct Assembler {
    options: AssemblerOptions,
    channels: AssemblerChannels,
    journals: Journals,
    started: Instant,
    series: HashMap<StudyHash, Series>,
    /// Stays of series in memory so far.
    epochs: u64,
    /// What the inference worker has in hand.
    running: Option<Working>,
    /// The series that the session computes ahead for.
    ahead_owner: Option<StudyHash>,
    /// Guesses worked for so far.
    guesses: u64,
    /// Series whose content is in the journal only, and when it was asked for.
    deferred: BTreeMap<StudyHash, Option<Instant>>,
    /// Complete series among the deferred ones: they wait for the grace time again, not for the idle bound.
    reread: BTreeSet<StudyHash>,
    backlog: VecDeque<DecodeJob>,
    publish_backlog: VecDeque<PublishJob>,
}

impl Assembler {
    /// An assembler with no series.
    pub fn new(options: AssemblerOptions, channels: AssemblerChannels, journals: Journals) -> Self {
        Self {
            options,
            channels,
            journals,
            started: Instant::now(),
            series: HashMap::new(),
            epochs: 0,
            running: None,
            ahead_owner: None,
            guesses: 0,
            deferred: BTreeMap::new(),
            reread: BTreeSet::new(),
            backlog: VecDeque::new(),
            publish_backlog: VecDeque::new(),
        }
    }

    fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    /// Runs until told to stop or until ingest is gone.
    pub fn run(mut self) {
        loop {
            self.drain_backlogs();
            let wait = self.next_wait();
            let channels = &self.channels;
            let event = select! {
                recv(channels.arrivals) -> m => match m { Ok(m) => Event::Arrival(m), Err(_) => Event::Stop },
                recv(channels.decoded) -> m => m.map_or(Event::Stop, Event::Decoded),
                recv(channels.inferred) -> m => m.map_or(Event::Stop, Event::Inferred),
                recv(channels.published) -> m => m.map_or(Event::Stop, Event::Published),
                default(wait) => Event::Tick,
            };
            let touched = match event {
                Event::Arrival(ToAssembler::Stop) | Event::Stop => break,
                Event::Arrival(ToAssembler::Slice(arrival)) => {
                    let series = arrival.series.clone();
                    if self.series.contains_key(&series) || (arrival.first && self.make_room()) {
                        let started = Instant::now();
                        self.arrival(*arrival);
                        events::StageTimed { stage: Stage::Assemble, took: started.elapsed() }.emit();
                    } else {
                        self.deferred.entry(series.clone()).or_insert(None);
                    }
                    Some(series)
                }
                Event::Arrival(ToAssembler::Recovered { series, slices, published, lost }) => {
                    self.recovered(&series, slices, published, lost);
                    Some(series)
                }
                Event::Arrival(ToAssembler::Unreadable { series, study, header }) => {
                    self.unreadable(&series, &study, &header);
                    Some(series)
                }
                Event::Arrival(ToAssembler::Seen { series, association }) => {
                    let now = self.now_ns();
                    if let Some(open) = self.series.get_mut(&series)
                        && open.published_version != open.version
                    {
                        open.completion.touch(association, now);
                        open.last_pdata_at = Instant::now();
                        open.completed = None;
                    }
                    Some(series)
                }
                Event::Arrival(ToAssembler::Durable { series, at }) => {
                    if let Some(open) = self.series.get_mut(&series) {
                        open.durable = open.covered;
                        open.durable_at = at;
                    }
                    Some(series)
                }
                Event::Arrival(ToAssembler::Undone { series }) => {
                    self.undone(&series);
                    Some(series)
                }
                Event::Arrival(ToAssembler::Closed { association }) => {
                    let now = self.now_ns();
                    for series in self.series.values_mut() {
                        series.completion.released(association, now);
                    }
                    None
                }
                Event::Decoded(decoded) => Some(self.decoded(decoded)),
                Event::Inferred(done) => Some(self.inferred(done)),
                Event::Published(published) => Some(self.published(published)),
                Event::Tick => None,
            };
            match touched {
                Some(series) => self.advance(&series),
                None => {
                    let all: Vec<StudyHash> = self.series.keys().cloned().collect();
                    for series in all {
                        self.advance(&series);
                    }
                }
            }
            self.observe();
        }
        for series in self.series.values() {
            if let Some(job) = &series.job {
                job.cancel.cancel();
            }
        }
        if let Some(Working::Ahead { cancel, .. }) = &self.running {
            cancel.cancel();
        }
    }

    fn observe(&self) {
        let c = &self.channels;
        let queues = [
            ("assemble", c.arrivals.len(), c.arrivals.capacity()),
            ("decode", c.decode.len() + self.backlog.len(), c.decode.capacity()),
            ("decoded", c.decoded.len(), c.decoded.capacity()),
            ("infer", c.infer.len(), c.infer.capacity()),
            ("publish", c.publish.len() + self.publish_backlog.len(), c.publish.capacity()),
        ];
        for (queue, depth, capacity) in queues {
            events::QueueObserved { queue, depth, capacity: capacity.unwrap_or(0) }.emit();
        }
    }

    fn drain_backlogs(&mut self) {
        while let Some(job) = self.backlog.pop_front() {
            if let Err(TrySendError::Full(job)) = self.channels.decode.try_send(job) {
                self.backlog.push_front(job);
                break;
            }
        }
        while let Some(job) = self.publish_backlog.pop_front() {
            if let Err(TrySendError::Full(job)) = self.channels.publish.try_send(job) {
                self.publish_backlog.push_front(job);
                break;
            }
        }
        if !self.deferred.is_empty()
            && self.make_room()
            && let Some((series, asked)) =
                self.deferred.iter_mut().find(|(_, asked)| asked.is_none_or(|at| at.elapsed() >= RESEND_RETRY))
            && self.journals.resend(series)
        {
            *asked = Some(Instant::now());
        }
        self.feed_inference();
    }

    /// Hands the worker one job at a time: complete series first, the longest complete first, then guesses, then work
    /// ahead of a run. A run of a series that is not complete is cancelled when a complete one waits, work ahead when
    /// any run waits; they start again later.
    fn feed_inference(&mut self) {
        let next = self
            .series
            .iter()
            .filter(|(_, s)| s.job.as_ref().is_some_and(|j| j.pending.is_some()))
            .min_by_key(|(_, s)| (s.completed.is_none(), s.completed.map(|(_, at)| at), s.quiet_since))
            .map(|(key, s)| (key.clone(), s.completed.is_some()));
        let Some((key, complete)) = next else {
            self.feed_ahead();
            return;
        };
        match &self.running {
            Some(Working::Ahead { cancel, .. }) => {
                cancel.cancel();
                return;
            }
            Some(Working::Run(running)) => {
                if complete
                    && let Some(series) = self.series.get(running)
                    && series.completed.is_none()
                    && let Some(job) = &series.job
                {
                    job.cancel.cancel();
                }
                return;
            }
            None => {}
        }
        let Some(job) = self.series.get_mut(&key).and_then(|s| s.job.as_mut()) else { return };
        let Some(pending) = job.pending.take() else { return };
        match self.channels.infer.try_send(ToInfer::Run(pending)) {
            Ok(()) => {
                job.sent = true;
                self.running = Some(Working::Run(key));
                // The run overwrites what was computed ahead, or takes it over.
                self.disown_ahead();
            }
            Err(TrySendError::Full(ToInfer::Run(pending)) | TrySendError::Disconnected(ToInfer::Run(pending))) => {
                job.pending = Some(pending);
            }
            Err(_) => {}
        }
    }

    /// Forgets which planes the session was given ahead.
    fn disown_ahead(&mut self) {
        if let Some(owner) = self.ahead_owner.take()
            && let Some(series) = self.series.get_mut(&owner)
        {
            series.ahead.planes = 0;
            series.ahead.looked = 0;
        }
    }

    /// Gives a free worker the planes that have become final. The series that has the session keeps it while slices
    /// come; then the one that got a slice last has it.
    fn feed_ahead(&mut self) {
        let Some(grid) = self.options.ahead else { return };
        if self.running.is_some() {
            return;
        }
        let owner = self.ahead_owner.as_ref();
        let kept = owner.filter(|owner| self.series.get(owner).is_some_and(Series::may_compute_ahead));
        let next = kept.or_else(|| {
            let open = self.series.iter().filter(|(_, s)| s.may_compute_ahead() && s.has_news_ahead());
            open.max_by_key(|(_, s)| s.quiet_since).map(|(key, _)| key)
        });
        let Some(key) = next.cloned() else { return };
        let limits = GeometryLimits {
            min_slices: 2,
            gap_factor: f64::INFINITY,
            max_spacing_mm: f64::INFINITY,
            ..self.options.limits.clone()
        };
        let Some(series) = self.series.get_mut(&key) else { return };
        if !series.has_news_ahead() {
            return;
        }
        series.ahead.looked = series.decoded;
        let Some((prediction, planes)) = series.predict(&limits, grid) else {
            if self.ahead_owner.as_ref() == Some(&key) {
                series.ahead.planes = 0;
                self.ahead_owner = None;
            }
            return;
        };
        let held: Vec<bool> = planes.iter().map(Option::is_some).collect();
        let ready = prediction.ready(&held);
        let count = ready.iter().filter(|r| **r).count();
        let guess = match series.ahead.guess {
            Some((earlier, number)) if earlier == prediction.guess => number,
            earlier => {
                if earlier.is_some() {
                    events::AheadMispredicted { series: &key }.emit();
                }
                series.ahead.guess = None;
                series.ahead.planes = 0;
                self.guesses + 1
            }
        };
        let missing = grid.planes.saturating_sub(series.ahead.planes);
        if count < series.ahead.planes + (missing / 4).clamp(1, AHEAD_STEP_PLANES) {
            return;
        }
        let mut by_place = vec![None; prediction.depth.slices()];
        for (place, plane) in prediction.place.iter().zip(planes) {
            by_place[*place] = plane;
        }
        let cancel = Arc::new(CancelToken::new());
        let job = AheadJob {
            series: key.clone(),
            epoch: series.epoch,
            guess,
            depth: prediction.depth,
            planes: by_place,
            ready,
            cancel: Arc::clone(&cancel),
        };
        if self.channels.infer.try_send(ToInfer::Ahead(job)).is_ok() {
            series.ahead.guess = Some((prediction.guess, guess));
            self.guesses = self.guesses.max(guess);
            if self.ahead_owner.as_ref() != Some(&key) {
                self.disown_ahead();
                self.ahead_owner = Some(key.clone());
            }
            self.running = Some(Working::Ahead { series: key, planes: count, cancel });
        }
    }

    fn next_wait(&self) -> Duration {
        if !self.backlog.is_empty() || !self.publish_backlog.is_empty() {
            return Duration::from_millis(1);
        }
        let now = self.now_ns();
        let speculate = self.options.speculate;
        let due = |s: &Series| {
            if s.publishing.is_some() || s.over_bound {
                return None;
            }
            if let Some(left) = s.hold_until.and_then(|until| until.checked_duration_since(Instant::now())) {
                return Some(now + left.as_nanos() as u64);
            }
            if s.completed.is_some() && s.job.is_some() {
                return None; // the worker's answer wakes us
            }
            let guess = s.completion.looks_complete_at_ns(s.hint).filter(|_| speculate && s.job.is_none());
            let known = s.completion.deadline_ns();
            match (guess.filter(|at| *at > now), known) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            }
        };
        let waiting = self.series.values().filter(|s| s.published_version != s.version && s.in_flight == 0);
        let next = waiting.filter_map(due).min();
        next.map_or(MAX_WAIT, |at| {
            Duration::from_nanos(at.saturating_sub(now)).clamp(Duration::from_micros(50), MAX_WAIT)
        })
    }

    fn send_decode(&mut self, job: DecodeJob) {
        // The backlog holds at most one job a record, and records a series are bounded at ingest.
        if self.backlog.is_empty() {
            if let Err(TrySendError::Full(job)) = self.channels.decode.try_send(job) {
                self.backlog.push_back(job);
            }
        } else {
            self.backlog.push_back(job);
        }
    }

    /// Whether another series fits in memory, after retiring a published one if need be.
    fn make_room(&mut self) -> bool {
        if self.series.len() < self.options.max_open_series {
            return true;
        }
        let idle = self
            .series
            .iter()
            .filter(|(_, s)| s.is_at_rest() && (s.published_version == s.version || s.over_bound))
            .min_by_key(|(_, s)| s.quiet_since)
            .map(|(k, _)| k.clone());
        if let Some(idle) = &idle {
            self.retire(idle);
        }
        idle.is_some()
    }

    fn open(&mut self, key: &StudyHash, study: &StudyHash, header: &Arc<SliceHeader>, recovered: bool) {
        if self.series.contains_key(key) {
            return;
        }
        events::SeriesOpened { study, series: key, open: self.series.len() + 1 }.emit();
        self.epochs += 1;
        self.series.insert(
            key.clone(),
            Series {
                epoch: self.epochs,
                study: study.clone(),
                header: Arc::clone(header),
                entries: Vec::new(),
                by_sop: HashMap::new(),
                grids: Vec::new(),
                completion: Completion::new(self.options.completion, self.now_ns()),
                recovered_open: recovered,
                in_flight: 0,
                repeats: Vec::new(),
                conflict: false,
                lost: 0,
                unreadable: false,
                covered: 0,
                durable: 0,
                version: 0,
                published_version: 0,
                publishing: None,
                revision: 0,
                over_bound: false,
                hold_until: None,
                retry: None,
                completed: None,
                job: None,
                last_pdata_at: Instant::now(),
                written_at: Instant::now(),
                durable_at: Instant::now(),
                decoded_at: Instant::now(),
                resampled_at: Instant::now(),
                quiet_since: Instant::now(),
                decode_s: 0.0,
                resample_s: 0.0,
                hint: None,
                decoded: 0,
                ahead: Ahead::default(),
                retry_lost: false,
            },
        );
    }

    fn recovered(&mut self, key: &StudyHash, slices: Vec<Arrival>, published: Option<PublishedNote>, lost: u64) {
        if self.series.contains_key(key) {
            // Its journal was closed and reopened. What is here already is passed over.
            for arrival in slices {
                self.arrival(arrival);
            }
            let now = self.now_ns();
            if let Some(series) = self.series.get_mut(key) {
                series.lose(key, lost);
                series.completion.released(RECOVERED, now);
            }
            self.deferred.remove(key);
            return;
        }
        if !self.make_room() {
            self.deferred.insert(key.clone(), None);
            return;
        }
        self.deferred.remove(key);
        let started = Instant::now();
        let covered = published.as_ref().map_or(0, |p| p.covered);
        let total = slices.len() as u64;
        for arrival in slices {
            self.arrival(arrival);
        }
        let now = self.now_ns();
        if self.reread.remove(key)
            && let Some(series) = self.series.get_mut(key)
        {
            series.recovered_open = false;
            series.completion.released(RECOVERED, now);
        }
        if let (Some(note), Some(series)) = (published, self.series.get_mut(key)) {
            series.revision = note.revision;
            let since = series.conflict && !note.conflict;
            series.conflict |= note.conflict;
            series.repeats.retain(|repeat| repeat.ordinal >= covered);
            if series.entries.len() as u64 == note.distinct && !since {
                series.published_version = series.version;
            }
        }
        if let Some(series) = self.series.get_mut(key) {
            series.lose(key, lost);
        }
        events::RecoveryDone { series: 1, slices: total, cut_bytes: 0, took: started.elapsed() }.emit();
    }

    /// A series whose journal gives nothing back: it has no result, and says so.
    fn unreadable(&mut self, key: &StudyHash, study: &StudyHash, header: &Arc<SliceHeader>) {
        if !self.series.contains_key(key) && !self.make_room() {
            self.deferred.insert(key.clone(), None);
            return;
        }
        self.deferred.remove(key);
        self.reread.remove(key);
        self.open(key, study, header, false);
        if let Some(series) = self.series.get_mut(key)
            && !series.unreadable
        {
            series.unreadable = true;
            series.changed(key);
            // Whatever else comes cannot change that, so there is nothing to wait for.
            series.completion.flush();
        }
    }

    /// Files one object.
    fn arrival(&mut self, arrival: Arrival) {
        let key = arrival.series.clone();
        let recovered = arrival.association == RECOVERED;
        self.open(&key, &arrival.study, &arrival.header, recovered);
        let now = self.now_ns();
        let open = self.series.len();
        let series = self.series.get_mut(&key).expect("opened above");
        if arrival.ordinal < series.covered {
            return; // read back from the journal already
        }
        series.covered = arrival.ordinal + 1;
        series.last_pdata_at = arrival.last_pdata_at;
        series.written_at = arrival.written_at;
        if recovered {
            series.durable = series.covered;
        }
        series.quiet_since = Instant::now();
        if series.recovered_open && !recovered {
            series.recovered_open = false;
            series.completion.released(RECOVERED, now);
        }
        series.retry_lost |= !recovered;
        if let Some(&first) = series.by_sop.get(&arrival.header.sop_instance_uid) {
            series.completion.touch(arrival.association, now);
            if series.published_version != series.version {
                series.completed = None;
            }
            if !series.entries[first].facts.header.same_object(&arrival.header) {
                series.conflicts(&key);
                return;
            }
            series.repeats.push(Repeat {
                ordinal: arrival.ordinal,
                first,
                reader: arrival.reader,
                record: arrival.record,
                transfer_syntax_uid: arrival.transfer_syntax_uid,
                header: arrival.header,
            });
            return;
        }
        series.completion.slice(arrival.association, now);
        if let Some(count) = arrival.header.series_count_hint {
            series.hint = Some(count);
            if arrival.count_is_declared {
                series.completion.declare(count, now);
            }
        }
        if arrival.header.sop_instance_uid < series.header.sop_instance_uid {
            // The same header, and study, whatever the order of arrival.
            series.header = Arc::clone(&arrival.header);
            series.study = arrival.study.clone();
        }
        if series.revision > 0 && series.published_version == series.version {
            events::SeriesReopened { series: &key, revision: series.revision, open }.emit();
        }
        series.changed(&key);
        let entry = series.entries.len();
        series.by_sop.insert(arrival.header.sop_instance_uid.clone(), entry);
        let mut facts = facts(&arrival.header, &self.options.limits);
        let mut grid = None;
        if facts.refusal.is_none()
            && let Ok(geometry) = &arrival.header.geometry
        {
            let geometry = geometry.clone();
            match self.grid(&key, &geometry) {
                Ok(found) => grid = found,
                Err(refusal) => facts.refusal = Some(refusal),
            }
        }
        let series = self.series.get_mut(&key).expect("opened above");
        series.entries.push(Entry { facts, grid, slot: None, plane: None, lung: None });
        if let Some(at) = grid {
            series.in_flight += 1;
            let job = DecodeJob {
                series: key.clone(),
                epoch: series.epoch,
                entry,
                reader: arrival.reader,
                record: arrival.record,
                transfer_syntax_uid: arrival.transfer_syntax_uid,
                header: arrival.header,
                volume: Arc::clone(&series.grids[at].volume),
                task: DecodeTask::Fill { plan: Arc::clone(&series.grids[at].plan) },
            };
            self.send_decode(job);
        }
    }

    /// The grid of a slice of this size and orientation, made if it is new.
    fn grid(&mut self, key: &StudyHash, geometry: &SliceGeometry) -> Result<Option<usize>, Refusal> {
        let orientation = geometry.in_plane_orientation(&self.options.limits)?;
        let series = self.series.get_mut(key).expect("opened by the caller");
        let found = series
            .grids
            .iter()
            .position(|g| g.rows == geometry.rows && g.columns == geometry.columns && g.orientation == orientation);
        if let Some(found) = found {
            return Ok(Some(found));
        }
        let at = series.grids.len();
        if at >= MAX_GRIDS {
            return Ok(None); // the series is refused as a whole: `select` counts the grids
        }
        let path = self.options.series_dir.join(key.as_str()).join(format!("{VOLUME_PREFIX}{at}"));
        // What a volume holds can be rebuilt from the journal, so an old one is simply replaced.
        let _ = std::fs::remove_file(&path);
        let volume = VolumeFile::create(&path, geometry.rows, geometry.columns, self.options.max_slots)
            .map_err(|error| Refusal::new(Reason::Internal, format!("create the volume: {error}")))?;
        let plan = InPlanePlan::new(
            geometry.rows,
            geometry.columns,
            orientation,
            self.options.crop_fraction,
            self.options.input_hw,
            [0.0, 0.0],
        );
        series.grids.push(Grid {
            rows: geometry.rows,
            columns: geometry.columns,
            orientation,
            volume,
            plan: Arc::new(plan),
        });
        Ok(Some(at))
    }

    fn decoded(&mut self, decoded: Decoded) -> StudyHash {
        let key = decoded.series.clone();
        let Some(series) = self.series.get_mut(&key).filter(|s| s.epoch == decoded.epoch) else { return key };
        series.in_flight -= 1;
        series.decode_s += decoded.decode_s;
        series.resample_s += decoded.resample_s;
        series.decoded_at = decoded.decoded_at;
        series.resampled_at = decoded.resampled_at;
        match decoded.result {
            Ok(DecodedSlice::Filled { slot, plane, lung }) => {
                let entry = &mut series.entries[decoded.entry];
                entry.slot = Some(slot);
                entry.plane = plane;
                entry.lung = Some(lung);
                series.decoded += 1;
            }
            Ok(DecodedSlice::Same) => {}
            Ok(DecodedSlice::Different) => {
                series.conflicts(&key);
            }
            Err(refusal) => series.entries[decoded.entry].facts.refusal = Some(refusal),
        }
        key
    }

    fn inferred(&mut self, done: FromInfer) -> StudyHash {
        match done {
            FromInfer::Run(done) => self.run_ended(done),
            FromInfer::Ahead(done) => self.ahead_ended(done),
        }
    }

    fn ahead_ended(&mut self, done: AheadDone) -> StudyHash {
        if let Some(Working::Ahead { series, planes, .. }) = self.running.take()
            && done.finished
            && let Some(open) = self.series.get_mut(&series).filter(|s| s.epoch == done.epoch)
            && open.ahead.guess.is_some_and(|(_, number)| number == done.guess)
        {
            open.ahead.planes = planes;
        }
        done.series
    }

    fn run_ended(&mut self, done: InferDone) -> StudyHash {
        self.running = None;
        if let Some(series) = self.series.get_mut(&done.series).filter(|s| s.epoch == done.epoch)
            && let Some(job) = &mut series.job
            && job.version == done.version
        {
            match done.result {
                Ok(Some(inferred)) => job.done = Some(Ok(inferred)),
                Err(refusal) => job.done = Some(Err(refusal)),
                Ok(None) => series.job = None,
            }
        }
        done.series
    }

    fn published(&mut self, published: Published) -> StudyHash {
        if let Some(series) = self.series.get_mut(&published.series).filter(|s| s.epoch == published.epoch) {
            series.publishing = None;
            match published.failed {
                None => {
                    series.published_version = published.version;
                    series.revision = published.revision;
                }
                Some(job) => {
                    series.hold_until = Some(Instant::now() + COMMIT_RETRY);
                    series.retry = Some(job).filter(|job| job.version == series.version);
                }
            }
            series.quiet_since = Instant::now();
        }
        published.series
    }

    /// Compares repeats whose first is decoded or cannot be. One that was refused by its header alone has no grid, and a
    /// repeat with the same header is refused alike.
    fn compare_repeats(&mut self, key: &StudyHash) {
        let Some(series) = self.series.get_mut(key) else { return };
        if series.repeats.is_empty() {
            return;
        }
        let mut jobs = Vec::new();
        let mut waiting = Vec::new();
        for repeat in std::mem::take(&mut series.repeats) {
            let first = &series.entries[repeat.first];
            match (first.grid, first.slot, &first.facts.refusal) {
                (Some(grid), slot, refusal) if slot.is_some() || refusal.is_some() => {
                    let same_size = repeat.header.rows == series.grids[grid].rows
                        && repeat.header.columns == series.grids[grid].columns;
                    if !same_size {
                        series.conflicts(key);
                        continue;
                    }
                    series.in_flight += 1;
                    jobs.push(DecodeJob {
                        series: key.clone(),
                        epoch: series.epoch,
                        entry: repeat.first,
                        reader: repeat.reader,
                        record: repeat.record,
                        transfer_syntax_uid: repeat.transfer_syntax_uid,
                        header: repeat.header,
                        volume: Arc::clone(&series.grids[grid].volume),
                        task: DecodeTask::Compare { slot },
                    });
                }
                (Some(_), None, None) => waiting.push(repeat),
                _ => {}
            }
        }
        series.repeats = waiting;
        for job in jobs {
            self.send_decode(job);
        }
    }

    /// Takes a series one step further, if there is one to take.
    fn advance(&mut self, key: &StudyHash) {
        self.compare_repeats(key);
        let now = self.now_ns();
        let retire_after = self.options.retire_after;
        let open = self.series.len();
        let Some(series) = self.series.get_mut(key) else { return };
        if series.published_version == series.version || series.over_bound {
            if series.is_at_rest() && series.quiet_since.elapsed() >= retire_after {
                self.retire(key);
            }
            return;
        }
        let held = series.hold_until.is_some_and(|until| Instant::now() < until);
        if series.in_flight > 0 || series.publishing.is_some() || held {
            return;
        }
        if let Some(job) = series.retry.take() {
            series.publishing = Some(job.version);
            self.publish_backlog.push_back(*job);
            self.drain_backlogs();
            return;
        }
        let complete = match series.completion.progress(now) {
            Progress::Complete(cause) => Some(cause),
            Progress::Open => None,
        };
        if let Some(cause) = complete
            && series.completed.is_none()
        {
            events::SeriesCompleted {
                series: key,
                cause: cause.as_str(),
                slices: series.entries.len() as u64,
                waited: series.last_pdata_at.elapsed(),
                open,
            }
            .emit();
            series.completed = Some((cause, Instant::now()));
        }
        let speculate = self.options.speculate && series.completion.looks_complete(series.hint, now);
        if series.job.is_none() && (complete.is_some() || speculate) {
            self.start(key, complete.is_some());
        }
        self.publish_if_done(key);
    }

    /// Starts inference on what is there; a refusal becomes the outcome, but only once the series is complete.
    fn start(&mut self, key: &StudyHash, complete: bool) {
        let limits = self.options.limits.clone();
        let Some(series) = self.series.get_mut(key) else { return };
        let version = series.version;
        let job = match series.plan(&limits) {
            Ok((selection, slices)) => {
                let cancel = Arc::new(CancelToken::new());
                let pending = InferJob {
                    series: key.clone(),
                    epoch: series.epoch,
                    version,
                    stack: selection.stack,
                    slices,
                    cancel: Arc::clone(&cancel),
                };
                Job {
                    version,
                    cancel,
                    notes: selection.notes,
                    done: None,
                    sent: false,
                    speculative: !complete,
                    pending: Some(pending),
                }
            }
            Err(refusal) if complete && refusal.reason == Reason::Internal && series.retry_lost => {
                // A full disk may have space again: everything is in the journal, so start from there, once.
                self.reread(key);
                return;
            }
            Err(refusal) if complete => Job {
                version,
                cancel: Arc::new(CancelToken::new()),
                notes: Vec::new(),
                done: Some(Err(refusal)),
                sent: true,
                speculative: false,
                pending: None,
            },
            Err(_) => return,
        };
        series.job = Some(job);
        self.drain_backlogs();
    }

    fn publish_if_done(&mut self, key: &StudyHash) {
        let max_revisions = self.options.max_revisions;
        let Some(series) = self.series.get_mut(key) else { return };
        let Some((cause, completed_at)) = series.completed else { return };
        if !series.job.as_ref().is_some_and(|job| job.done.is_some() && job.version == series.version) {
            return;
        }
        if series.durable < series.covered {
            return; // its sync is under way, and its end wakes us
        }
        let Some(Job { done: Some(result), notes, version, speculative, .. }) = series.job.take() else { return };
        if series.revision >= max_revisions {
            if !series.over_bound {
                series.over_bound = true;
                incidents::CorrectionBoundReached { series: key, revisions: series.revision }.emit();
            }
            return;
        }
        series.publishing = Some(version);
        let slices = result.as_ref().map_or(series.entries.len(), |inferred| inferred.slices.len());
        if let Some((Guess { slices: Some(expected), .. }, _)) = series.ahead.guess.take()
            && expected != slices
        {
            events::AheadMispredicted { series: key }.emit();
        }
        if speculative {
            events::SpeculationEnded { series: key, used: true }.emit();
        }
        let job = PublishJob {
            series: key.clone(),
            epoch: series.epoch,
            study: series.study.clone(),
            version,
            revision: series.revision + 1,
            header: Arc::clone(&series.header),
            slices: series.entries.len(),
            covered: series.covered,
            conflict: series.conflict,
            cause,
            result,
            notes,
            timing: Timing {
                last_pdata_at: series.last_pdata_at,
                written_at: series.written_at,
                durable_at: series.durable_at,
                decoded_at: series.decoded_at,
                resampled_at: series.resampled_at,
                completed_at,
                decode_s: series.decode_s,
                resample_s: series.resample_s,
            },
        };
        self.publish_backlog.push_back(job);
        self.drain_backlogs();
    }

    /// Lets a series go that has objects which are not on disk, and reads back from its journal what is. It waits for more
    /// as after a restart.
    fn undone(&mut self, key: &StudyHash) {
        if let Some(series) = self.series.remove(key) {
            if let Some(job) = &series.job {
                job.cancel.cancel();
            }
            self.deferred.insert(key.clone(), None);
            self.drain_backlogs();
        }
    }

    /// Lets a complete series go and reads it back from its journal.
    fn reread(&mut self, key: &StudyHash) {
        self.series.remove(key);
        self.deferred.insert(key.clone(), None);
        self.reread.insert(key.clone());
        self.drain_backlogs();
    }

    fn retire(&mut self, key: &StudyHash) {
        if self.series.remove(key).is_some() {
            self.journals.close(key.clone());
            // They can be made anew from the journal; pictures being made keep their mapping.
            remove_volumes(&self.options.series_dir.join(key.as_str()));
            incidents::SeriesRetired { series: key, open: self.series.len() }.emit();
        }
    }
}

enum Event {
    Arrival(ToAssembler),
    Decoded(Decoded),
    Inferred(FromInfer),
    Published(Published),
    Tick,
    Stop,
}

impl Series {
    /// Two objects of one SOPInstanceUID differ.
    fn conflicts(&mut self, key: &StudyHash) {
        if !self.conflict {
            events::SliceDuplicate { series: key, conflict: true }.emit();
            self.conflict = true;
            self.changed(key);
        }
    }

    /// Acknowledged objects are damaged on the disk.
    fn lose(&mut self, key: &StudyHash, lost: u64) {
        if lost > self.lost {
            self.lost = lost;
            self.changed(key);
        }
    }

    /// Nothing of it is under way.
    fn is_at_rest(&self) -> bool {
        self.in_flight == 0
            && self.repeats.is_empty()
            && self.job.is_none()
            && self.publishing.is_none()
            && self.retry.is_none()
    }

    /// The content changed: what was inferred of it is void.
    fn changed(&mut self, key: &StudyHash) {
        self.version += 1;
        self.completed = None;
        self.retry = None;
        if let Some(job) = self.job.take() {
            job.cancel.cancel();
            if job.sent && job.done.is_none() {
                events::SpeculationEnded { series: key, used: false }.emit();
            }
        }
    }

    /// Whether slices still come and nothing of it runs. Without a bound on the quiet time two series that wait would
    /// take the session from each other for ever.
    fn may_compute_ahead(&self) -> bool {
        self.version != self.published_version
            && self.completed.is_none()
            && self.job.is_none()
            && self.publishing.is_none()
            && !self.conflict
            && self.lost == 0
            && !self.over_bound
            && self.quiet_since.elapsed() < Duration::from_millis(LULL_MS)
    }

    /// Whether enough slices were decoded since the last look to look again.
    fn has_news_ahead(&self) -> bool {
        let nearly_all = self.hint.is_some_and(|count| count.saturating_sub(self.decoded as u64) <= AHEAD_LAST_SLICES);
        let news = if nearly_all { 1 } else { AHEAD_LOOK_SLICES };
        self.decoded >= self.ahead.looked + news
    }

    /// What the series is expected to become, with the in-plane result of each slice of the stack, in depth order.
    fn predict(&self, limits: &GeometryLimits, grid: ahead::Grid) -> Option<(Prediction, Vec<Option<SharedPlane>>)> {
        let facts: Vec<SliceFacts> = self.entries.iter().map(|e| e.facts.clone()).collect();
        let selection = select(&facts, limits).ok()?;
        let stack = &selection.stack;
        if stack.shear_px.is_some() || stack.tilt_deg > AHEAD_MAX_TILT_DEG {
            return None;
        }
        // Objects that are no part of the stack count, too, where objects are counted.
        let others = self.entries.len() - selection.ordered.len();
        let count = match self.hint {
            Some(hint) => Some(usize::try_from(hint).ok()?.checked_sub(others)?),
            None => None,
        };
        if count.is_some_and(|n| n > limits.max_slices) {
            return None;
        }
        // Entries are filed in the order of arrival.
        let arrival: Vec<u64> = selection.ordered.iter().map(|i| *i as u64).collect();
        let prediction = ahead::predict(&stack.depth_mm, &arrival, count, grid)?;
        let planes = selection
            .ordered
            .iter()
            .map(|i| self.entries[*i].plane.as_ref().and_then(SlicePlane::host).cloned())
            .collect();
        Some((prediction, planes))
    }

    fn plan(&self, limits: &GeometryLimits) -> Result<(Selection, Vec<SliceHandle>), Refusal> {
        if self.unreadable {
            return Err(Refusal::new(
                Reason::Internal,
                "the journal of the series is damaged on the disk; send it again under a new SeriesInstanceUID"
                    .to_owned(),
            ));
        }
        if self.lost > 0 {
            return Err(Refusal::new(
                Reason::Internal,
                format!("{} acknowledged objects are damaged on the disk; send the series again", self.lost),
            ));
        }
        if self.conflict {
            return Err(Refusal::new(
                Reason::DuplicateConflict,
                "one SOPInstanceUID came with different pixels; send the series again under new UIDs".to_owned(),
            ));
        }
        let facts: Vec<SliceFacts> = self.entries.iter().map(|e| e.facts.clone()).collect();
        let selection = select(&facts, limits)?;
        let mut slices = Vec::with_capacity(selection.ordered.len());
        for &i in &selection.ordered {
            let entry = &self.entries[i];
            let (Some(grid), Some(slot), Some(lung)) = (entry.grid, entry.slot, &entry.lung) else {
                return Err(Refusal::new(Reason::Internal, "a selected slice was not decoded".to_owned()));
            };
            slices.push(SliceHandle {
                volume: Arc::clone(&self.grids[grid].volume),
                slot,
                plane: entry.plane.clone(),
                lung: *lung,
            });
        }
        Ok((selection, slices))
    }
}

#[cfg(test)]
mod tests {
    use std::thread::JoinHandle;

    use crossbeam_channel::bounded;

    use super::*;
    use crate::pipeline::ingest::{Durability, JournalOptions};
    use crate::telemetry::StudyHasher;
    use crate::volume::journal::{JournalWriter, RecordHead, RecordKind};

    /// An assembler that runs, with the ends of its channels that a test holds.
    struct Bench {
        arrivals: Sender<ToAssembler>,
        publish: Receiver<PublishJob>,
        arrival: Arrival,
        thread: Option<JoinHandle<()>>,
        _others: Vec<Box<dyn std::any::Any>>,
        _dir: tempfile::TempDir,
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            let _ = self.arrivals.send(ToAssembler::Stop);
            self.thread.take().unwrap().join().unwrap();
        }
    }

    /// With one object that declares itself the only one of its series and is no CT slice, so that nothing is decoded.
    fn bench() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let hasher = StudyHasher::new([7; 32]);
        let (study, series) = (hasher.hash("1.2.3"), hasher.hash("1.2.3.4"));
        let mut writer = JournalWriter::create(&dir.path().join("journal")).unwrap();
        let head = RecordHead {
            kind: RecordKind::Dataset,
            transfer_syntax_uid: "1.2.840.10008.1.2.1",
            sop_class_uid: "1.2",
            sop_instance_uid: "1.2.3.4.5",
            received_unix_ns: 0,
        };
        let record = writer.append(&head, &[1; 100]).unwrap();
        let mut header = SliceHeader::of_series("1.2.3".to_owned(), "1.2.3.4".to_owned());
        header.sop_instance_uid = "1.2.3.4.5".to_owned();
        header.series_count_hint = Some(1);
        let now = Instant::now();
        let arrival = Arrival {
            series,
            study,
            header: Arc::new(header),
            transfer_syntax_uid: Arc::from("1.2.840.10008.1.2.1"),
            record,
            reader: writer.reader().unwrap(),
            association: 1,
            last_pdata_at: now,
            written_at: now,
            ordinal: record.offset,
            first: true,
            count_is_declared: true,
        };
        let (arrivals_tx, arrivals) = bounded(16);
        let (decode, decode_rx) = bounded(16);
        let (decoded_tx, decoded) = bounded(16);
        let (infer, infer_rx) = bounded(1);
        let (inferred_tx, inferred) = bounded(1);
        let (publish, publish_rx) = bounded(16);
        let (published_tx, published) = bounded(16);
        let options = JournalOptions {
            series_dir: dir.path().to_path_buf(),
            threads: 1,
            durability: Durability::Fsync,
            max_records_per_series: 100,
            max_total_bytes: 1 << 30,
        };
        let (journals, _) = Journals::start(&options, &hasher, &arrivals_tx).unwrap();
        let options = AssemblerOptions {
            series_dir: dir.path().to_path_buf(),
            completion: CompletionRules { grace_ms: 600_000, idle_ms: 600_000 },
            limits: GeometryLimits::default(),
            max_slots: 10,
            max_open_series: 4,
            max_revisions: 3,
            retire_after: Duration::from_secs(600),
            input_hw: [32, 32],
            crop_fraction: 1.0,
            speculate: true,
            ahead: None,
        };
        let channels = AssemblerChannels { arrivals, decode, decoded, infer, inferred, publish, published };
        let assembler = Assembler::new(options, channels, journals);
        Bench {
            arrivals: arrivals_tx,
            publish: publish_rx,
            arrival,
            thread: Some(std::thread::spawn(move || assembler.run())),
            _others: vec![
                Box::new(decode_rx),
                Box::new(decoded_tx),
                Box::new(infer_rx),
                Box::new(inferred_tx),
                Box::new(published_tx),
                Box::new(writer),
            ],
            _dir: dir,
        }
    }

    #[test]
    fn nothing_is_published_that_is_not_on_disk() {
        let bench = bench();
        let series = bench.arrival.series.clone();
        bench.arrivals.send(ToAssembler::Slice(Box::new(bench.arrival.clone()))).unwrap();
        assert!(bench.publish.recv_timeout(Duration::from_millis(300)).is_err(), "published before its sync");
        bench.arrivals.send(ToAssembler::Durable { series, at: Instant::now() }).unwrap();
        let job = bench.publish.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((job.slices, job.covered), (1, bench.arrival.ordinal + 1));
    }

    #[test]
    fn what_a_failed_sync_took_back_is_forgotten_and_may_come_again() {
        let bench = bench();
        let series = bench.arrival.series.clone();
        bench.arrivals.send(ToAssembler::Slice(Box::new(bench.arrival.clone()))).unwrap();
        bench.arrivals.send(ToAssembler::Undone { series: series.clone() }).unwrap();
        assert!(bench.publish.recv_timeout(Duration::from_millis(300)).is_err(), "it is not on disk");
        bench.arrivals.send(ToAssembler::Slice(Box::new(bench.arrival.clone()))).unwrap();
        assert!(bench.publish.recv_timeout(Duration::from_millis(300)).is_err(), "published before its sync");
        bench.arrivals.send(ToAssembler::Durable { series, at: Instant::now() }).unwrap();
        assert_eq!(bench.publish.recv_timeout(Duration::from_secs(10)).unwrap().slices, 1);
    }
}
