//! Where the network runs on a device: slices resampled there, its input gathered there, and what is said of it.
//!
//! Input: the session's word on where its input lies, which changes when a device fails and is opened anew. Output: the
//! resample workers hear which device makes planes ([`DeviceMail`]), the session's input is filled in the session's own
//! order of work ([`DeviceStage`]), metrics, log and `/readyz` hear what works ([`BackendState`]).
//!
//! Invariants: planes of a device that is gone are never used; a device that cannot resample is no error, the planes are
//! made in memory then, with the same bits.
//!
//! Deliberately absent: the choice of a backend and its return ([`crate::engine::fallback`]).
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::engine::Session;
use crate::engine::fallback::DeviceNews;
use crate::pipeline::planes::SlicePlane;
use crate::resample::cpu::Window;
use crate::resample::cuda::{DevicePlane, GpuGatherer, GpuResampler};
use crate::resample::plan::DepthPlan;
use crate::resample::texture::Texture;
use crate::telemetry::events;

/// Tells one resample worker which device makes planes now; the last word counts.
#[derive(Clone, Debug)]
pub struct DeviceMail {
    put: Sender<Option<Arc<GpuResampler>>>,
    take: Receiver<Option<Arc<GpuResampler>>>,
}

impl Default for DeviceMail {
    fn default() -> Self {
        let (put, take) = bounded(1);
        Self { put, take }
    }
}

impl DeviceMail {
    /// Replaces what was not read yet. One thread writes.
    pub fn put(&self, resampler: Option<Arc<GpuResampler>>) {
        let mut next = resampler;
        while let Err(TrySendError::Full(back)) = self.put.try_send(next) {
            let _ = self.take.try_recv();
            next = back;
        }
    }

    /// What was said since the last call, if anything.
    pub fn take(&self) -> Option<Option<Arc<GpuResampler>>> {
        self.take.try_recv().ok()
    }
}

/// The inference worker's part.
#[derive(Debug, Default)]
pub struct DeviceStage {
    gatherer: Option<GpuGatherer>,
    /// Slices that the device holds resampled; 0 leaves them in memory.
    slots: usize,
    mail: Vec<DeviceMail>,
    window: Option<Window>,
    texture: Option<Texture>,
    input_dhw: [usize; 3],
}

impl DeviceStage {
    /// Nothing on a device yet: up to `slots` slices will be, made by the workers that read `mail`.
    pub fn new(slots: usize, mail: Vec<DeviceMail>, window: Window, input_dhw: [usize; 3]) -> Self {
        Self { gatherer: None, slots, mail, window: Some(window), texture: None, input_dhw }
    }

    /// Whether slices are resampled on a device now.
    pub fn is_used(&self) -> bool {
        self.gatherer.is_some()
    }

    /// Has planes made on the device that `session` has now, or in memory if it has none.
    pub fn follow(&mut self, session: &dyn Session) {
        let (Some(window), true) = (self.window, self.slots > 0) else { return };
        let input = session.device_input();
        let is_current = match (&self.gatherer, &input) {
            (None, None) => true,
            (Some(gatherer), Some(input)) => {
                Arc::ptr_eq(gatherer.resampler().gpu(), &input.gpu) && !gatherer.resampler().has_failed()
            }
            _ => false,
        };
        if is_current {
            return;
        }
        // The old one first: its memory may be needed for the new one.
        self.gatherer = None;
        self.tell(None);
        let Some(input) = input else { return };
        let [d, h, w] = self.input_dhw;
        let made = GpuResampler::new(input.gpu, window, [h, w], self.slots)
            .and_then(|resampler| GpuGatherer::new(Arc::new(resampler), self.slots, d));
        match made {
            Ok(gatherer) => {
                self.tell(Some(gatherer.resampler()));
                self.gatherer = Some(gatherer);
            }
            Err(error) => {
                // Not tried again: the network runs all the same, with its input from memory.
                self.slots = 0;
                events::DeviceResamplingFailed { detail: &error.to_string() }.emit();
            }
        }
    }

    fn tell(&self, resampler: Option<&Arc<GpuResampler>>) {
        for mail in &self.mail {
            mail.put(resampler.cloned());
        }
    }

    /// Puts the gathering of the session's input into the session's order of work; `false` when not all planes are on the
    /// device, or the device fails, which a run will tell.
    ///
    /// # Panics
    /// When the plan is for another number of slices or planes.
    pub fn gather(&mut self, session: &dyn Session, planes: &[Option<SlicePlane>], depth: &DepthPlan) -> bool {
        let (Some(gatherer), Some(input)) = (&mut self.gatherer, session.device_input()) else { return false };
        if !Arc::ptr_eq(&input.gpu, gatherer.resampler().gpu()) {
            return false;
        }
        let planes: Option<Vec<&DevicePlane>> =
            planes.iter().map(|p| p.as_ref().and_then(SlicePlane::device)).collect();
        let Some(planes) = planes else { return false };
        assert_eq!(depth.planes(), self.input_dhw[0], "planes of the input");
        // SAFETY: a session's input is D x H x W floats of its own on the device it names, for as long as it is open, and
        // the session itself uses it on that stream alone: the contract of `Session::device_input`. The gatherer makes
        // planes of H x W, and the plan has D of them, as just asserted.
        match unsafe { gatherer.gather(depth, &planes, &input.stream, input.ptr) } {
            Ok(done) => done,
            Err(error) => {
                events::DeviceResamplingFailed { detail: &error.to_string() }.emit();
                false
            }
        }
    }

    /// The texture of the input that the last run was made from; none when it was not gathered here, or its device failed.
    pub fn texture(&mut self) -> Option<Texture> {
        self.texture.take()
    }

    /// After a run: lets the planes go that it was made from.
    pub fn finish(&mut self) {
        if let Some(gatherer) = &mut self.gatherer {
            // Where the device failed, the run said so.
            self.texture = gatherer.finish().ok().flatten();
        }
    }
}

/// Which backend works, for `/readyz`; shared.
#[derive(Clone, Debug)]
pub struct BackendState {
    as_started: Arc<str>,
    now: Arc<Mutex<String>>,
}

impl BackendState {
    /// `note` says why the backend is the one it is.
    pub fn new(backend: &'static str, note: Option<&str>) -> Self {
        let as_started = note.map_or_else(|| format!("{backend}, as configured"), str::to_owned);
        events::BackendDegraded { degraded: false }.emit();
        Self { now: Arc::new(Mutex::new(as_started.clone())), as_started: as_started.into() }
    }

    /// What works, and why.
    pub fn describe(&self) -> String {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs and counts, and remembers.
    pub fn hear(&self, news: Vec<DeviceNews>) {
        for news in news {
            let degraded = !matches!(news, DeviceNews::Back { .. });
            let text = match news {
                DeviceNews::Fell { backend, reason, retry_in } => {
                    events::BackendFell { backend, detail: &reason, retry_in }.emit();
                    // The device stays open.
                    let Some(wait) = retry_in else { continue };
                    format!("cpu stands in for {backend}, to be tried again after {} s: {reason}", wait.as_secs())
                }
                DeviceNews::StillAway { backend, reason, retry_in } => {
                    events::BackendRetried { backend, result: "failed", detail: &reason }.emit();
                    format!("cpu stands in for {backend}, to be tried again after {} s: {reason}", retry_in.as_secs())
                }
                DeviceNews::Back { backend, away } => {
                    let detail = format!("cpu stood in for {} s", away.as_secs());
                    events::BackendRetried { backend, result: "opened", detail: &detail }.emit();
                    self.as_started.to_string()
                }
            };
            events::BackendDegraded { degraded }.emit();
            *self.now.lock().unwrap_or_else(PoisonError::into_inner) = text;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn readiness_says_who_stands_in_and_why() {
        let state = BackendState::new("cuda", Some("using cuda; tensorrt not: no library"));
        assert_eq!(state.describe(), "using cuda; tensorrt not: no library");
        let reason = "out of memory".to_owned();
        state.hear(vec![DeviceNews::Fell { backend: "cuda", reason: reason.clone(), retry_in: None }]);
        assert_eq!(state.describe(), "using cuda; tensorrt not: no library", "the device stays");
        state.hear(vec![DeviceNews::Fell { backend: "cuda", reason, retry_in: Some(Duration::from_secs(10)) }]);
        assert_eq!(state.describe(), "cpu stands in for cuda, to be tried again after 10 s: out of memory");
        state.hear(vec![DeviceNews::Back { backend: "cuda", away: Duration::from_secs(12) }]);
        assert_eq!(state.describe(), "using cuda; tensorrt not: no library");
        assert_eq!(BackendState::new("cpu", None).describe(), "cpu, as configured");
    }

    #[test]
    fn the_last_word_about_the_device_counts() {
        let mail = DeviceMail::default();
        assert!(mail.take().is_none());
        for _ in 0..3 {
            mail.put(None);
        }
        assert!(matches!(mail.take(), Some(None)));
        assert!(mail.take().is_none());
    }
}
