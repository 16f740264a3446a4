//! The workers: decode, in-plane resampling, gathering and inference.
//!
//! Input: jobs with handles. Output: the same handles, further on. Invariants: every job yields exactly one answer,
//! a panic inside one becomes the refusal `internal` of that series and nothing else; scratch belongs to the worker
//! and is made once for each image size.
//!
//! Deliberately absent: decisions. The assembler takes them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::dicom::decode::PixelDecoder;
use crate::engine::fallback::DeviceNews;
use crate::engine::{CancelToken, EngineError, Inference, Session};
use crate::explain::{Cam, class_activation_map};
use crate::model::manifest::Preprocessing;
use crate::pipeline::device::{BackendState, DeviceMail, DeviceStage};
use crate::pipeline::jobs::{
    AheadDone, AheadJob, DecodeJob, DecodeTask, Decoded, DecodedSlice, FromInfer, InferDone, InferJob, Inferred,
    Judged, ToInfer,
};
use crate::pipeline::planes::{PlanePool, SharedPlane, SlicePlane};
use crate::resample::cpu::{SlicesToGather, Window, gather_plane, gather_slices, in_plane};
use crate::resample::cuda::{DevicePlane, GpuResampler};
use crate::resample::lung::{self, LungCheck, SliceLung};
use crate::resample::plan::{DepthPlan, InPlanePlan};
use crate::resample::texture::{SUMS, Texture, TextureMeter};
use crate::telemetry::events::{self, Stage};
use crate::volume::geometry::Stack;
use crate::volume::refusal::{Reason, Refusal};
use crate::volume::store::{SlotMeta, VolumeFile};

/// A slice whose HU are in the volume and which is to be resampled in-plane.
#[derive(Debug)]
pub struct ResampleJob {
    decode: DecodeJob,
    plan: Arc<InPlanePlan>,
    slot: u32,
    decode_s: f64,
    decoded_at: Instant,
}

/// How often a failed device is looked after while nothing else is to be done.
const TEND_EVERY: Duration = Duration::from_secs(1);

fn contained<T>(work: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        events::PanicContained { stage: "worker", series: None }.emit();
        Err(Refusal::new(Reason::Internal, "a fault of this program, contained; nothing was judged"))
    })
}

/// One decode worker; ends when its queue closes.
pub fn decode_worker(jobs: &Receiver<DecodeJob>, resample: &Sender<ResampleJob>, decoded: &Sender<Decoded>) {
    let mut decoder = PixelDecoder::new();
    let mut payload = Vec::new();
    let mut again: Vec<i16> = Vec::new();
    while let Ok(job) = jobs.recv() {
        let started = Instant::now();
        let result = contained(|| decode(&job, &mut decoder, &mut payload, &mut again));
        let decoded_at = Instant::now();
        let decode_s = decoded_at.duration_since(started).as_secs_f64();
        events::StageTimed { stage: Stage::Decode, took: Duration::from_secs_f64(decode_s) }.emit();
        let answer = match result {
            Ok(Step::Resample { plan, slot }) => {
                if resample.send(ResampleJob { decode: job, plan, slot, decode_s, decoded_at }).is_err() {
                    return;
                }
                continue;
            }
            Ok(Step::Compared(result)) => Ok(result),
            // The first of them is sound whatever happened to its repeat.
            Err(_) if matches!(job.task, DecodeTask::Compare { .. }) => Ok(DecodedSlice::Different),
            Err(refusal) => Err(refusal),
        };
        let message = Decoded {
            series: job.series,
            epoch: job.epoch,
            entry: job.entry,
            result: answer,
            decode_s,
            resample_s: 0.0,
            decoded_at,
            resampled_at: decoded_at,
        };
        if decoded.send(message).is_err() {
            return;
        }
    }
}

enum Step {
    Resample { plan: Arc<InPlanePlan>, slot: u32 },
    Compared(DecodedSlice),
}

fn decode(
    job: &DecodeJob,
    decoder: &mut PixelDecoder,
    payload: &mut Vec<u8>,
    again: &mut Vec<i16>,
) -> Result<Step, Refusal> {
    job.reader
        .read(job.record, payload)
        .map_err(|error| Refusal::new(Reason::Internal, format!("read the journal: {error}")))?;
    match &job.task {
        DecodeTask::Fill { plan } => {
            let mut slot = job
                .volume
                .claim()
                .map_err(|error| Refusal::new(Reason::Internal, format!("claim a slot of the volume: {error}")))?;
            decoder.decode_hu(payload, &job.transfer_syntax_uid, &job.header, slot.pixels_mut())?;
            let position_mm = job.header.geometry.as_ref().map_or([f64::NAN; 3], |g| g.position_mm);
            let index = slot.publish(&SlotMeta { position_mm, journal_offset: job.record.offset });
            Ok(Step::Resample { plan: Arc::clone(plan), slot: index })
        }
        DecodeTask::Compare { slot } => {
            again.clear();
            again.resize(job.volume.rows() as usize * job.volume.columns() as usize, 0);
            let decoded = decoder.decode_hu(payload, &job.transfer_syntax_uid, &job.header, again).is_ok();
            // One that can be decoded and one that cannot differ, whichever came first.
            let same = match slot {
                Some(slot) => decoded && again == slot_pixels(&job.volume, *slot)?,
                None => !decoded,
            };
            Ok(Step::Compared(if same { DecodedSlice::Same } else { DecodedSlice::Different }))
        }
    }
}

fn slot_pixels(volume: &VolumeFile, slot: u32) -> Result<&[i16], Refusal> {
    volume.slot(slot).ok_or_else(|| Refusal::new(Reason::Internal, "a slot of the volume is not published"))
}

/// One in-plane resampling worker; ends when its queue closes. Planes are made on the device that `mail` names, if any;
/// when that fails, in memory until `mail` names another.
pub fn resample_worker(
    jobs: &Receiver<ResampleJob>,
    decoded: &Sender<Decoded>,
    pool: &PlanePool,
    window: &Window,
    mail: &DeviceMail,
) {
    let mut scratch: Vec<f32> = Vec::new();
    let mut device: Option<Arc<GpuResampler>> = None;
    let mut check: Option<(u32, u32, LungCheck)> = None;
    while let Ok(job) = jobs.recv() {
        let started = Instant::now();
        if let Some(named) = mail.take() {
            device = named;
        }
        let result = contained(|| {
            let hu = slot_pixels(&job.decode.volume, job.slot)?;
            // First, so that the copy to the device goes on while the rest is looked at.
            let on_device = on_device(&mut device, &job.plan, hu);
            let (rows, columns) = (job.decode.volume.rows(), job.decode.volume.columns());
            if check.as_ref().is_none_or(|(r, c, _)| (*r, *c) != (rows, columns)) {
                check = Some((rows, columns, LungCheck::new(rows, columns)));
            }
            let spacing = job.decode.header.geometry.as_ref().map_err(Clone::clone)?.pixel_spacing_mm;
            let (_, _, check) = check.as_mut().expect("made above");
            let lung = check.slice_stats(hu, spacing);
            let in_memory = || {
                pool.take().map(|mut plane| {
                    scratch.resize(job.plan.scratch_len().max(scratch.len()), 0.0);
                    in_plane(&job.plan, window, hu, &mut scratch, plane.values_mut());
                    SlicePlane::Host(Arc::new(plane))
                })
            };
            let plane = on_device.map(SlicePlane::Device).or_else(in_memory);
            Ok(DecodedSlice::Filled { slot: job.slot, plane, lung })
        });
        let resampled_at = Instant::now();
        let resample_s = resampled_at.duration_since(started).as_secs_f64();
        events::StageTimed { stage: Stage::Resample, took: Duration::from_secs_f64(resample_s) }.emit();
        let message = Decoded {
            series: job.decode.series,
            epoch: job.decode.epoch,
            entry: job.decode.entry,
            result,
            decode_s: job.decode_s,
            resample_s,
            decoded_at: job.decoded_at,
            resampled_at,
        };
        if decoded.send(message).is_err() {
            return;
        }
    }
}

/// The plane of a slice on the device, if there is one that works.
fn on_device(device: &mut Option<Arc<GpuResampler>>, plan: &InPlanePlan, hu: &[i16]) -> Option<DevicePlane> {
    match device.as_ref()?.resample(plan, hu) {
        Ok(plane) => plane,
        Err(error) => {
            events::DeviceResamplingFailed { detail: &error.to_string() }.emit();
            *device = None;
            None
        }
    }
}

/// What turns an ordered stack into network input and an [`Inferred`]; owned by one inference worker.
pub struct Judge {
    preprocessing: Preprocessing,
    input_dhw: [usize; 3],
    head_weight: Arc<[f32]>,
    session: Box<dyn Session>,
    input: Vec<f32>,
    scratch: Vec<f32>,
    meter: TextureMeter,
    /// The guess that `input` was gathered for ahead of a run, and the planes that were.
    gathered: Option<(u64, Vec<bool>)>,
    /// Fills the session's input where it lies.
    device: DeviceStage,
}

/// What [`Judge::judge_tensor`] makes.
#[derive(Debug)]
pub struct JudgedTensor {
    /// What the network said.
    pub inference: Inference,
    /// The activation map of the predicted class.
    pub cam: Cam,
    /// As in [`Judged`].
    pub texture: [f32; SUMS],
    /// Seconds of the network.
    pub infer_s: f64,
    /// Seconds of the activation map.
    pub cam_s: f64,
}

/// A volume ready for [`Judge::judge`].
pub struct VolumeToJudge<'a> {
    /// Geometry.
    pub stack: &'a Stack,
    /// HU of each slice, feet first.
    pub hu: &'a [&'a [i16]],
    /// In-plane resampled slices made earlier, where there are any.
    pub planes: &'a [Option<SlicePlane>],
    /// The lung check of each slice.
    pub lung: &'a [SliceLung],
    /// Set when the run is to stop.
    pub cancel: &'a CancelToken,
}

impl Judge {
    /// A judge around an open session. `head_weight` is `fc.weight`, classes x channels.
    pub fn new(
        preprocessing: &Preprocessing,
        input_dhw: [usize; 3],
        head_weight: Arc<[f32]>,
        session: Box<dyn Session>,
    ) -> Self {
        Self {
            preprocessing: preprocessing.clone(),
            input_dhw,
            head_weight,
            session,
            input: vec![0.0; input_dhw.iter().product()],
            scratch: Vec::new(),
            meter: TextureMeter::new(input_dhw),
            gathered: None,
            device: DeviceStage::default(),
        }
    }

    /// Has slices resampled where the session takes its input, if that is a device: up to `slots` of them at a time, by
    /// the workers that read `mail`.
    pub fn use_device(&mut self, slots: usize, mail: Vec<DeviceMail>) {
        self.device = DeviceStage::new(slots, mail, self.window(), self.input_dhw);
        self.device.follow(self.session.as_ref());
    }

    /// Whether slices are resampled on a device now.
    pub fn resamples_on_device(&self) -> bool {
        self.device.is_used()
    }

    /// Whether the session does anything in [`Judge::advance`].
    pub fn computes_ahead(&self) -> bool {
        self.session.computes_ahead()
    }

    /// Whether a device failed and another backend stands in.
    pub fn is_degraded(&self) -> bool {
        self.session.is_degraded()
    }

    /// What became of the session's device; to be called after a run, and about once a second while it is degraded.
    pub fn news(&mut self) -> Vec<DeviceNews> {
        let news = self.session.news();
        self.device.follow(self.session.as_ref());
        news
    }

    /// The manifest's preprocessing.
    pub fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }

    /// The window of the manifest.
    pub fn window(&self) -> Window {
        Window { center_hu: self.preprocessing.window_center_hu, width_hu: self.preprocessing.window_width_hu }
    }

    /// Checks for lungs, gathers the planes, measures their texture, runs the network, makes the activation map of the predicted class.
    ///
    /// # Errors
    /// `no_lung`; `internal` when the backend fails. `Ok(None)` when cancelled.
    pub fn judge(&mut self, volume: &VolumeToJudge<'_>) -> Result<Option<Judged>, Refusal> {
        let [d, h, w] = self.input_dhw;
        let stack = volume.stack;
        let started = Instant::now();
        let plan = InPlanePlan::new(
            stack.rows,
            stack.columns,
            stack.in_plane,
            self.preprocessing.crop_fraction,
            [h, w],
            [0.0, 0.0],
        );
        let lung = lung::judge(volume.lung, &stack.depth_mm, &plan)?;
        let depth =
            DepthPlan::new(&stack.depth_mm, self.preprocessing.depth_grid, self.preprocessing.slice_direction, d)?;
        self.gathered = None;
        let mut on_device =
            stack.shear_px.is_none() && self.device.gather(self.session.as_ref(), volume.planes, &depth);
        let mut texture = Texture::default();
        let (inference, cam, gather_s, infer_s, cam_s) = loop {
            if !on_device {
                self.gather(volume, &plan, &depth);
                texture = self.measure();
            }
            let gather_s = started.elapsed().as_secs_f64();
            match self.infer(volume.cancel, on_device) {
                Ok((inference, cam, infer_s, cam_s)) => {
                    if on_device {
                        let Some(measured) = self.device.texture() else {
                            let detail = "the run is good and the texture of its input did not come back";
                            events::DeviceResamplingFailed { detail }.emit();
                            on_device = false;
                            continue;
                        };
                        texture = measured;
                    }
                    break (inference, cam, gather_s, infer_s, cam_s);
                }
                Err(EngineError::Cancelled) => return Ok(None),
                // Another backend stands in, and it takes its input from memory.
                Err(EngineError::Device { .. } | EngineError::NotFinite) if on_device => on_device = false,
                Err(error) => return Err(Refusal::new(Reason::Internal, format!("run the network: {error}"))),
            }
        };
        let (reuse, ran_on) = (self.session.reuse(), self.session.ran_on());
        let ended_at = Instant::now();
        let judged = Judged {
            inference,
            cam,
            texture: texture.features(self.input_dhw),
            reuse,
            lung,
            depth,
            in_plane: plan,
            ran_on,
            started_at: started,
            ended_at,
            gather_s,
            infer_s,
            cam_s,
        };
        Ok(Some(judged))
    }

    /// Gathers the planes marked in `ready`, with the sums that [`Judge::judge`] would make, and computes ahead on them.
    /// `planes` are the in-plane results by place in the finished stack. Planes that an earlier call with the same number
    /// of a `guess` gathered are there still, unless a run came between.
    ///
    /// # Errors
    /// As [`Session::advance`].
    ///
    /// # Panics
    /// When a marked plane needs a slice that is not in `planes`, or a length does not fit the plan.
    pub fn advance(
        &mut self,
        guess: u64,
        depth: &DepthPlan,
        planes: &[Option<SharedPlane>],
        ready: &[bool],
        cancel: &CancelToken,
    ) -> Result<(), EngineError> {
        let [d, h, w] = self.input_dhw;
        assert!(depth.planes() == d && ready.len() == d, "one flag a plane");
        assert_eq!(planes.len(), depth.slices(), "one entry a slice");
        let mut gathered = match self.gathered.take() {
            Some((earlier, gathered)) if earlier == guess => gathered,
            _ => vec![false; d],
        };
        let planes: Vec<&[f32]> = planes.iter().map(|p| p.as_ref().map_or(&[][..], |p| p.values())).collect();
        for (plane, out) in self.input.chunks_exact_mut(h * w).enumerate() {
            if ready[plane] && !gathered[plane] {
                gather_plane(depth, plane, &planes, out);
                gathered[plane] = true;
            }
            if cancel.is_cancelled() {
                break;
            }
        }
        // A plane is marked for the network only once it is gathered.
        let ready: Vec<bool> = ready.iter().zip(&gathered).map(|(r, g)| *r && *g).collect();
        self.gathered = Some((guess, gathered));
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        self.session.advance(&self.input, &ready, cancel)
    }

    /// Fills the input.
    fn gather(&mut self, volume: &VolumeToJudge<'_>, plan: &InPlanePlan, depth: &DepthPlan) {
        self.gathered = None;
        let window = self.window();
        let shear_px = volume.stack.shear_px.as_deref();
        let host = |p: &'_ Option<SlicePlane>| p.as_ref().and_then(SlicePlane::host).cloned();
        let planes: Vec<Option<SharedPlane>> = volume.planes.iter().map(host).collect();
        let planes: Vec<Option<&[f32]>> = planes.iter().map(|p| p.as_ref().map(|p| p.values())).collect();
        let slices = SlicesToGather { hu: volume.hu, planes: &planes, shear_px };
        let session = self.session.as_ref();
        gather_slices(&slices, plan, depth, &window, &mut self.scratch, &mut self.input, &|values, len, work| {
            session.share(values, len, work);
        });
    }

    /// The texture of `input`.
    fn measure(&mut self) -> Texture {
        let session = self.session.as_ref();
        self.meter.measure(&self.input, &|values, len, work| session.share(values, len, work))
    }

    /// Runs the network on `input` as it is: D x H x W in [0, 1].
    ///
    /// # Errors
    /// As [`Judge::judge`].
    pub fn judge_tensor(&mut self, input: &[f32]) -> Result<JudgedTensor, Refusal> {
        self.gathered = None;
        self.input.copy_from_slice(input);
        let texture = self.measure().features(self.input_dhw);
        let (inference, cam, infer_s, cam_s) = self
            .infer(&CancelToken::new(), false)
            .map_err(|error| Refusal::new(Reason::Internal, format!("run the network: {error}")))?;
        Ok(JudgedTensor { inference, cam, texture, infer_s, cam_s })
    }

    /// Runs the network on `input`, or on what was gathered on the device.
    fn infer(&mut self, cancel: &CancelToken, on_device: bool) -> Result<(Inference, Cam, f64, f64), EngineError> {
        let started = Instant::now();
        let mut inference = Inference::default();
        let ran = if on_device {
            self.session.run_device(cancel, &mut inference)
        } else {
            self.session.run(&self.input, cancel, &mut inference)
        };
        self.device.finish();
        ran?;
        if inference.logits.iter().any(|v| !v.is_finite()) {
            return Err(EngineError::NotFinite);
        }
        let infer_s = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let cam = class_activation_map(&inference, &self.head_weight, predicted(&inference.logits));
        Ok((inference, cam, infer_s, started.elapsed().as_secs_f64()))
    }
}

/// Index of the largest logit; the first of equals.
pub fn predicted(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best
}

/// The inference worker; ends when its queue closes. `state` hears which backend works.
pub fn infer_worker(jobs: &Receiver<ToInfer>, done: &Sender<FromInfer>, mut judge: Judge, state: &BackendState) {
    loop {
        let job = if judge.is_degraded() {
            match jobs.recv_timeout(TEND_EVERY) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => {
                    state.hear(judge.news());
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        } else {
            let Ok(job) = jobs.recv() else { return };
            job
        };
        let answer = match job {
            ToInfer::Run(job) => {
                let result = contained(|| infer_one(&mut judge, &job));
                FromInfer::Run(InferDone { series: job.series, epoch: job.epoch, version: job.version, result })
            }
            ToInfer::Ahead(job) => {
                let finished = ahead_one(&mut judge, &job);
                FromInfer::Ahead(AheadDone { series: job.series, epoch: job.epoch, guess: job.guess, finished })
            }
        };
        if done.send(answer).is_err() {
            return;
        }
        // After the answer: nobody waits for it.
        state.hear(judge.news());
    }
}

/// Whether all that the planes allow is done. A fault here is no fault of the series: its run is still to come.
fn ahead_one(judge: &mut Judge, job: &AheadJob) -> bool {
    let started = Instant::now();
    let done = contained(|| Ok(judge.advance(job.guess, &job.depth, &job.planes, &job.ready, &job.cancel)));
    let result = match &done {
        Ok(Ok(())) => "done",
        Ok(Err(EngineError::Cancelled)) => "cancelled",
        Ok(Err(_)) | Err(_) => "failed",
    };
    let planes = job.ready.iter().filter(|r| **r).count();
    events::AheadAdvanced { series: &job.series, planes, result, took: started.elapsed() }.emit();
    result == "done"
}

fn infer_one(judge: &mut Judge, job: &InferJob) -> Result<Option<Box<Inferred>>, Refusal> {
    if job.cancel.is_cancelled() {
        return Ok(None);
    }
    let mut hu = Vec::with_capacity(job.slices.len());
    for slice in &job.slices {
        hu.push(slot_pixels(&slice.volume, slice.slot)?);
    }
    let planes: Vec<Option<SlicePlane>> = job.slices.iter().map(|s| s.plane.clone()).collect();
    let lung: Vec<SliceLung> = job.slices.iter().map(|s| s.lung).collect();
    let volume = VolumeToJudge { stack: &job.stack, hu: &hu, planes: &planes, lung: &lung, cancel: &job.cancel };
    let Some(judged) = judge.judge(&volume)? else { return Ok(None) };
    events::StageTimed { stage: Stage::Resample, took: Duration::from_secs_f64(judged.gather_s) }.emit();
    events::StageTimed { stage: Stage::Infer, took: Duration::from_secs_f64(judged.infer_s) }.emit();
    events::StageTimed { stage: Stage::Explain, took: Duration::from_secs_f64(judged.cam_s) }.emit();
    if let Some(share) = judged.reused_share() {
        events::AheadReused { series: &job.series, share }.emit();
    }
    Ok(Some(Box::new(Inferred { judged, stack: job.stack.clone(), slices: job.slices.clone() })))
}
