//! The messages between the assembler and the workers: handles, never pixels.

use std::sync::Arc;
use std::time::Instant;

use crate::dicom::header::SliceHeader;
use crate::engine::{CancelToken, Inference, Reuse};
use crate::explain::Cam;
use crate::pipeline::planes::{SharedPlane, SlicePlane};
use crate::resample::lung::{LungReport, SliceLung};
use crate::resample::plan::{DepthPlan, InPlanePlan};
use crate::resample::texture::SUMS;
use crate::telemetry::StudyHash;
use crate::volume::completion::Cause;
use crate::volume::geometry::Stack;
use crate::volume::journal::{JournalReader, RecordRef};
use crate::volume::refusal::Refusal;
use crate::volume::store::VolumeFile;

/// Decode one record into a slot of the volume, or compare it with one.
#[derive(Clone, Debug)]
pub struct DecodeJob {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Index of the entry in the series.
    pub entry: usize,
    /// Where the data set is.
    pub reader: JournalReader,
    /// Which record.
    pub record: RecordRef,
    /// How it is encoded.
    pub transfer_syntax_uid: Arc<str>,
    /// Its header.
    pub header: Arc<SliceHeader>,
    /// The volume that takes its HU.
    pub volume: Arc<VolumeFile>,
    /// What to do.
    pub task: DecodeTask,
}

/// What a decode job is for.
#[derive(Clone, Debug)]
pub enum DecodeTask {
    /// Fill a new slot, then resample in-plane.
    Fill {
        /// The in-plane plan of the slice's grid.
        plan: Arc<InPlanePlan>,
    },
    /// Decode again and compare with the first of its SOPInstanceUID, which came with other bytes.
    Compare {
        /// The slot of the first; `None` when the first cannot be decoded: then only one that cannot either is the same.
        slot: Option<u32>,
    },
}

/// What became of a [`DecodeJob`].
#[derive(Debug)]
pub struct Decoded {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Index of the entry in the series.
    pub entry: usize,
    /// The result.
    pub result: Result<DecodedSlice, Refusal>,
    /// Seconds of decoding.
    pub decode_s: f64,
    /// Seconds of in-plane resampling.
    pub resample_s: f64,
    /// When its HU were there.
    pub decoded_at: Instant,
    /// When it was resampled, or on its way to be.
    pub resampled_at: Instant,
}

/// A decoded slice, by handle.
#[derive(Debug)]
pub enum DecodedSlice {
    /// In its slot, resampled.
    Filled {
        /// Slot in the series' volume.
        slot: u32,
        /// The in-plane resampled slice, if the pool had room.
        plane: Option<SlicePlane>,
        /// What the lung check saw.
        lung: SliceLung,
    },
    /// The repeat has the pixels of the first.
    Same,
    /// The repeat has other pixels.
    Different,
}

/// One slice of a volume to be inferred, by handle.
#[derive(Clone, Debug)]
pub struct SliceHandle {
    /// The volume file.
    pub volume: Arc<VolumeFile>,
    /// Its slot there.
    pub slot: u32,
    /// Resampled already, unless the pool was empty.
    pub plane: Option<SlicePlane>,
    /// What the lung check saw.
    pub lung: SliceLung,
}

/// Compute the first layers on planes that are final already.
#[derive(Debug)]
pub struct AheadJob {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Number of the guess: planes gathered for the same one need not be gathered again.
    pub guess: u64,
    /// The plan of the finished stack, as guessed.
    pub depth: DepthPlan,
    /// In-plane results by place in the finished stack, those that are there.
    pub planes: Vec<Option<SharedPlane>>,
    /// Planes of the network's input that are final.
    pub ready: Vec<bool>,
    /// Set when a run waits.
    pub cancel: Arc<CancelToken>,
}

/// What became of an [`AheadJob`].
#[derive(Debug)]
pub struct AheadDone {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Number of the guess.
    pub guess: u64,
    /// Whether all that the planes allow is done.
    pub finished: bool,
}

/// What the inference worker is given.
#[derive(Debug)]
pub enum ToInfer {
    /// A whole run.
    Run(InferJob),
    /// Work ahead of one.
    Ahead(AheadJob),
}

/// What it answers.
#[derive(Debug)]
pub enum FromInfer {
    /// To a run.
    Run(InferDone),
    /// To work ahead.
    Ahead(AheadDone),
}

/// Gather, infer.
#[derive(Debug)]
pub struct InferJob {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Which content of the series this judges.
    pub version: u64,
    /// Geometry; its `order` is meaningless here, `slices` are ordered.
    pub stack: Stack,
    /// Slices, feet first.
    pub slices: Vec<SliceHandle>,
    /// Set when another slice came.
    pub cancel: Arc<CancelToken>,
}

/// What became of an [`InferJob`].
#[derive(Debug)]
pub struct InferDone {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Which content of the series was judged.
    pub version: u64,
    /// The result; `Ok(None)` when cancelled.
    pub result: Result<Option<Box<Inferred>>, Refusal>,
}

/// What was made of a volume.
#[derive(Debug)]
pub struct Judged {
    /// What the network said.
    pub inference: Inference,
    /// The activation map of the predicted class.
    pub cam: Cam,
    /// How sharp and noisy the network's input was: features of its [`Texture`](crate::resample::texture::Texture).
    pub texture: [f32; SUMS],
    /// How much of the run had been done ahead.
    pub reuse: Reuse,
    /// What the lung check says of the volume.
    pub lung: LungReport,
    /// Where the planes lie.
    pub depth: DepthPlan,
    /// Where the rows and columns lie (of the middle slice).
    pub in_plane: InPlanePlan,
    /// The backend that ran the network, where it may be another than the configured one.
    pub ran_on: Option<&'static str>,
    /// When work on it began.
    pub started_at: Instant,
    /// When it was done.
    pub ended_at: Instant,
    /// Seconds of gathering along depth (with in-plane resampling where it had to be done again).
    pub gather_s: f64,
    /// Seconds of the network.
    pub infer_s: f64,
    /// Seconds of the activation map.
    pub cam_s: f64,
}

impl Judged {
    /// Share of what can be computed ahead that was; `None` when the backend does nothing ahead.
    pub fn reused_share(&self) -> Option<f64> {
        (self.reuse.ahead_macs > 0).then(|| self.reuse.share())
    }
}

/// A judged series with its slices.
#[derive(Debug)]
pub struct Inferred {
    /// What was made of the volume.
    pub judged: Judged,
    /// Geometry.
    pub stack: Stack,
    /// Slices, feet first.
    pub slices: Vec<SliceHandle>,
}

/// Where the time of a series went.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// When the last P-DATA byte of the last slice was read.
    pub last_pdata_at: Instant,
    /// When the last slice was written to its journal.
    pub written_at: Instant,
    /// When the last slice was on disk.
    pub durable_at: Instant,
    /// When the last slice's HU were there.
    pub decoded_at: Instant,
    /// When the last slice was resampled, or on its way to be.
    pub resampled_at: Instant,
    /// When the series was found complete.
    pub completed_at: Instant,
    /// Seconds of decoding, all slices.
    pub decode_s: f64,
    /// Seconds of in-plane resampling, all slices.
    pub resample_s: f64,
}

/// Where the time from the last P-DATA byte of the last slice to the alert's commit went, seconds, in order. The sum is
/// *last slice to alert* where nothing was done before the last slice was there and nobody waited for completion.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Breakdown {
    /// Header and append.
    pub journal_s: f64,
    /// Reading back and pixels to HU, with the wait for a worker.
    pub decode_s: f64,
    /// In-plane resampling, or its start on a device.
    pub resample_s: f64,
    /// Choice of the slices, geometry, hand-over to the inference worker, and the wait for it.
    pub start_s: f64,
    /// Gathering along depth, or its start on a device.
    pub gather_s: f64,
    /// The network.
    pub network_s: f64,
    /// The activation map.
    pub explain_s: f64,
    /// Waiting for the sync of the last slice, which began when it was written.
    pub sync_wait_s: f64,
    /// Hand-over to the publisher.
    pub hand_over_s: f64,
    /// Calibration, policy, commit.
    pub commit_s: f64,
    /// The whole sync of the last slice; no part of the sum.
    pub sync_s: f64,
}

impl Breakdown {
    /// From the times of a judged series, `publishing` and `committed` being the publisher's.
    pub fn new(timing: &Timing, judged: &Judged, publishing: Instant, committed: Instant) -> Self {
        // Work done before its turn counts nothing: each step begins where the one before it ended.
        let since = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        Self {
            journal_s: since(timing.last_pdata_at, timing.written_at),
            decode_s: since(timing.written_at, timing.decoded_at),
            resample_s: since(timing.decoded_at, timing.resampled_at),
            start_s: since(timing.resampled_at, judged.started_at),
            gather_s: judged.gather_s,
            network_s: judged.infer_s,
            explain_s: judged.cam_s,
            sync_wait_s: since(judged.ended_at, timing.durable_at),
            hand_over_s: since(judged.ended_at.max(timing.durable_at), publishing),
            commit_s: since(publishing, committed),
            sync_s: since(timing.written_at, timing.durable_at),
        }
    }

    /// Names and values, in order.
    pub fn parts(&self) -> [(&'static str, f64); 11] {
        [
            ("journal", self.journal_s),
            ("decode", self.decode_s),
            ("resample", self.resample_s),
            ("start", self.start_s),
            ("gather", self.gather_s),
            ("network", self.network_s),
            ("explain", self.explain_s),
            ("sync_wait", self.sync_wait_s),
            ("hand_over", self.hand_over_s),
            ("commit", self.commit_s),
            ("(sync)", self.sync_s),
        ]
    }
}

/// An outcome to be published.
#[derive(Debug)]
pub struct PublishJob {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Its study.
    pub study: StudyHash,
    /// Which content of the series this is.
    pub version: u64,
    /// Revision of the outcome, from 1.
    pub revision: u32,
    /// A header of the series, for identifiers and the choice among reconstructions.
    pub header: Arc<SliceHeader>,
    /// Distinct objects.
    pub slices: usize,
    /// Offset in the journal after the last record that this covers.
    pub covered: u64,
    /// Whether two objects of one SOPInstanceUID differ.
    pub conflict: bool,
    /// Why the series was complete.
    pub cause: Cause,
    /// The outcome.
    pub result: Result<Box<Inferred>, Refusal>,
    /// Notes of the selection.
    pub notes: Vec<String>,
    /// Times.
    pub timing: Timing,
}

/// An outcome that is in the store.
#[derive(Debug)]
pub struct Published {
    /// The series.
    pub series: StudyHash,
    /// Which stay of the series in memory this belongs to.
    pub epoch: u64,
    /// Which content of the series it covers.
    pub version: u64,
    /// Revision of the outcome.
    pub revision: u32,
    /// The job, when the store did not take it: to be offered again.
    pub failed: Option<Box<PublishJob>>,
}
