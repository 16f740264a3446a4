//! Log-only events of the pipeline's rarer turns; what is counted is counted by the events beside them.

use tracing::{debug, error, info, warn};

use super::StudyHash;

/// A journal could not be written or read; the sender was answered accordingly.
#[derive(Clone, Copy, Debug)]
pub struct JournalFailed<'a> {
    /// What was tried: `append`, `sync`, `read`, `recover`, `resend`, `note`.
    pub operation: &'static str,
    /// The error, without attribute values.
    pub detail: &'a str,
}

impl JournalFailed<'_> {
    /// Logs.
    pub fn emit(&self) {
        error!(operation = self.operation, detail = self.detail, "journal failed");
    }
}

/// The priority of the inference thread could not be lowered.
#[derive(Clone, Copy, Debug)]
pub struct PriorityKept<'a> {
    /// The system's error.
    pub detail: &'a str,
}

impl PriorityKept<'_> {
    /// Logs.
    pub fn emit(&self) {
        warn!(detail = self.detail, "thread priority not lowered");
    }
}

/// A data set whose header cannot be read was answered 0xC000.
#[derive(Clone, Copy, Debug)]
pub struct HeaderUnreadable<'a> {
    /// The error, without attribute values.
    pub detail: &'a str,
}

impl HeaderUnreadable<'_> {
    /// Logs.
    pub fn emit(&self) {
        warn!(detail = self.detail, "header unreadable");
    }
}

/// A file of the watched folder was not taken; it stays where it is.
#[derive(Clone, Copy, Debug)]
pub struct FolderFileRefused<'a> {
    /// The error, without the file's name.
    pub detail: &'a str,
}

impl FolderFileRefused<'_> {
    /// Logs.
    pub fn emit(&self) {
        warn!(detail = self.detail, "folder file not taken");
    }
}

/// An outcome could not be committed; it is offered again.
#[derive(Clone, Copy, Debug)]
pub struct CommitFailed<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// The store's error.
    pub detail: &'a str,
}

impl CommitFailed<'_> {
    /// Logs.
    pub fn emit(&self) {
        error!(series = self.series.as_str(), detail = self.detail, "outcome not committed");
    }
}

/// A series had as many outcomes as allowed; a person must look.
#[derive(Clone, Copy, Debug)]
pub struct CorrectionBoundReached<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Outcomes so far.
    pub revisions: u32,
}

impl CorrectionBoundReached<'_> {
    /// Logs.
    pub fn emit(&self) {
        error!(series = self.series.as_str(), revisions = self.revisions, "correction bound reached");
    }
}

/// A published series left memory.
#[derive(Clone, Copy, Debug)]
pub struct SeriesRetired<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Series in memory now.
    pub open: usize,
}

impl SeriesRetired<'_> {
    /// Logs.
    pub fn emit(&self) {
        debug!(series = self.series.as_str(), open = self.open, "series retired");
    }
}

/// Pictures were not made because too many waited.
#[derive(Clone, Copy, Debug)]
pub struct RenderingSkipped<'a> {
    /// The series.
    pub series: &'a StudyHash,
}

impl RenderingSkipped<'_> {
    /// Logs.
    pub fn emit(&self) {
        warn!(series = self.series.as_str(), "pictures skipped");
    }
}

/// Pictures could not be made; the outcome stands.
#[derive(Clone, Copy, Debug)]
pub struct RenderingFailed<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// The error.
    pub detail: &'a str,
}

impl RenderingFailed<'_> {
    /// Logs.
    pub fn emit(&self) {
        error!(series = self.series.as_str(), detail = self.detail, "pictures failed");
    }
}

/// Old studies were deleted.
#[derive(Clone, Copy, Debug)]
pub struct RetentionDone {
    /// Studies deleted.
    pub studies: u64,
    /// Old studies kept because something of them is not delivered yet.
    pub kept: u64,
}

impl RetentionDone {
    /// Logs.
    pub fn emit(&self) {
        info!(studies = self.studies, kept = self.kept, "retention done");
    }
}

/// Old studies could not be deleted; it is tried again.
#[derive(Clone, Copy, Debug)]
pub struct RetentionFailed<'a> {
    /// The store's error.
    pub detail: &'a str,
}

impl RetentionFailed<'_> {
    /// Logs.
    pub fn emit(&self) {
        error!(detail = self.detail, "retention failed");
    }
}
