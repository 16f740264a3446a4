//! Ingest: from a received object to a durable journal record and an acknowledgement.
//!
//! ```text
//! association threads ──┐
//! folder watcher ───────┼──> journal threads (by series) ──> assembler
//!                       ┘      append, sync, forward, reply
//! ```
//!
//! Input: whole data sets in reusable buffers. Output: [`Arrival`] messages to the assembler, and a status for the
//! sender. Invariants: success is answered only after the record is on disk (`durability = "fsync"`); a record reaches
//! the assembler before its sender hears of success, so the end of an association can never overtake its slices; a
//! journal thread owns its journals alone, so there is no lock. Several associations waiting on one thread share one
//! sync (group commit, at most [`GROUP_COMMIT`] records).
//!
//! The assembler hears of a record when it is written, so that decoding, and the network after the last slice, go on while
//! the disk works; it publishes nothing before it hears that the record is on disk ([`ToAssembler::Durable`]), and lets a
//! series go whose sync failed ([`ToAssembler::Undone`]).
//!
//! Deliberately absent: pixel decoding.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::dicom::header::{self, ObjectClass, SliceHeader};
use crate::dicom::scp::{AssociationHandler, AssociationInfo, HandlerFactory, ScpEvent, StoreRequest, StoreStatus};
use crate::telemetry::events::Stage;
use crate::telemetry::{StudyHash, StudyHasher, events, incidents};
use crate::volume::journal::{
    JournalError, JournalReader, JournalWriter, OwnedRecordHead, RecordHead, RecordKind, RecordRef, no_space,
};

/// Records one sync may cover. Bounded by the associations that can wait: 64 x 512 KiB is 32 MiB of dirty pages.
pub const GROUP_COMMIT: usize = 64;
/// Requests waiting for one journal thread; more than the associations allowed by default, so a send rarely waits.
pub const JOURNAL_QUEUE: usize = 64;
/// File name of a series' journal inside its folder.
pub const JOURNAL_FILE: &str = "journal";
/// What the names of volume files begin with.
pub const VOLUME_PREFIX: &str = "volume-";
/// File beside the journal that holds its length when everything in it was published.
pub const PUBLISHED_FILE: &str = "published";
/// File beside the journal that says whose series it is, for the day when the journal cannot be read.
pub const IDENTITY_FILE: &str = "identity";
/// Open journals of one thread; the least recently used is closed beyond it (it is reopened when needed).
pub const MAX_OPEN_JOURNALS: usize = 256;

/// Bytes of an [`IDENTITY_FILE`] that are read: two UIDs of 64, a hash of 32, and names; each may be escaped.
const MAX_IDENTITY: u64 = 4096;

/// When a slice may be acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// After `fdatasync`: survives power loss.
    #[default]
    Fsync,
    /// After the write: survives a killed process, not a power loss.
    PageCache,
}

/// One distinct object of a series, as the assembler sees it.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Hash of the SeriesInstanceUID.
    pub series: StudyHash,
    /// Hash of the StudyInstanceUID.
    pub study: StudyHash,
    /// The parsed header.
    pub header: Arc<SliceHeader>,
    /// How the record's payload is encoded.
    pub transfer_syntax_uid: Arc<str>,
    /// Where the record is.
    pub record: RecordRef,
    /// How to read it.
    pub reader: JournalReader,
    /// Who brought it; [`RECOVERED`] after a restart.
    pub association: u64,
    /// When its last P-DATA byte was read.
    pub last_pdata_at: Instant,
    /// When its record was written, to be synced next.
    pub written_at: Instant,
    /// Its place: the offset of its record in the journal. Rises with every record and never changes.
    pub ordinal: u64,
    /// Whether it is the first data set of its journal.
    pub first: bool,
    /// Whether a count stated in this header is a declaration by a trusted peer.
    pub count_is_declared: bool,
}

/// The association number of slices read back from a journal.
pub const RECOVERED: u64 = 0;

/// What a journal's notes say: the last published revision and how many records it covered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedNote {
    /// Revision of the outcome.
    pub revision: u32,
    /// Offset after the last data set record that the outcome covers.
    pub covered: u64,
    /// Distinct SOPInstanceUIDs among them.
    pub distinct: u64,
    /// Whether two of them were in conflict.
    pub conflict: bool,
    /// The outcome's UID.
    pub result_uid: String,
}

/// To the assembler.
#[derive(Debug)]
pub enum ToAssembler {
    /// A new object.
    Slice(Box<Arrival>),
    /// A series read back from its journal: everything in it, and what was published of it.
    Recovered {
        /// Hash of the SeriesInstanceUID.
        series: StudyHash,
        /// Every object, in the order of arrival.
        slices: Vec<Arrival>,
        /// The last publication, if any.
        published: Option<PublishedNote>,
        /// Acknowledged objects that the disk no longer gives back.
        lost: u64,
    },
    /// Nothing of the series can be read back from its journal.
    Unreadable {
        /// Hash of the SeriesInstanceUID.
        series: StudyHash,
        /// Hash of the StudyInstanceUID.
        study: StudyHash,
        /// Its identifiers.
        header: Arc<SliceHeader>,
    },
    /// Every object of the series sent before is on disk.
    Durable {
        /// Hash of the SeriesInstanceUID.
        series: StudyHash,
        /// Since when.
        at: Instant,
    },
    /// Objects of the series sent since the last [`ToAssembler::Durable`] are not on disk, and their senders hear so.
    Undone {
        /// Hash of the SeriesInstanceUID.
        series: StudyHash,
    },
    /// An object that is there already came again: its sender is still at work.
    Seen {
        /// Hash of the SeriesInstanceUID.
        series: StudyHash,
        /// Who brought it.
        association: u64,
    },
    /// An association ended (released or aborted).
    Closed {
        /// Its number.
        association: u64,
    },
    /// Finish what is running, start nothing, end.
    Stop,
}

struct AppendRequest {
    series: StudyHash,
    study: StudyHash,
    header: Arc<SliceHeader>,
    transfer_syntax_uid: Arc<str>,
    dataset: Vec<u8>,
    association: u64,
    last_pdata_at: Instant,
    count_is_declared: bool,
    reply: Sender<(StoreStatus, Vec<u8>)>,
}

enum ToJournal {
    Append(Box<AppendRequest>),
    Note { series: StudyHash, note: PublishedNote },
    Recover { series: StudyHash },
    Resend { series: StudyHash },
    Close { series: StudyHash },
    Delete { series: StudyHash, not_after: SystemTime },
}

/// Settings of the journal threads.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// Folder that holds one folder a series.
    pub series_dir: PathBuf,
    /// Threads; a series always belongs to the same one.
    pub threads: usize,
    /// When a slice may be acknowledged.
    pub durability: Durability,
    /// Data set records a series may hold; one more is answered 0xA700.
    pub max_records_per_series: u64,
    /// Bytes all journals together may hold; beyond it objects are answered 0xA700.
    pub max_total_bytes: u64,
}

/// The journal threads.
#[derive(Clone)]
pub struct Journals {
    queues: Arc<[Sender<ToJournal>]>,
}

impl Journals {
    /// Starts the threads. They end when the last clone of the handle is gone.
    pub fn start(
        options: &JournalOptions,
        hasher: &StudyHasher,
        assembler: &Sender<ToAssembler>,
    ) -> std::io::Result<(Self, Vec<JoinHandle<()>>)> {
        let threads = options.threads.max(1);
        let total_bytes = Arc::new(AtomicU64::new(journal_bytes(&options.series_dir)));
        let mut queues = Vec::with_capacity(threads);
        let mut handles = Vec::with_capacity(threads);
        for n in 0..threads {
            let (tx, rx) = bounded(JOURNAL_QUEUE);
            let mut worker = JournalThread {
                options: options.clone(),
                hasher: hasher.clone(),
                open: HashMap::new(),
                broken: HashSet::new(),
                uses: 0,
                assembler: assembler.clone(),
                total_bytes: Arc::clone(&total_bytes),
            };
            handles.push(std::thread::Builder::new().name(format!("journal-{n}")).spawn(move || worker.run(&rx))?);
            queues.push(tx);
        }
        Ok((Self { queues: queues.into() }, handles))
    }

    fn queue(&self, series: &StudyHash) -> &Sender<ToJournal> {
        let spread = crc32fast::hash(series.as_str().as_bytes()) as usize;
        &self.queues[spread % self.queues.len()]
    }

    /// Requests waiting, all threads together.
    pub fn waiting(&self) -> usize {
        self.queues.iter().map(Sender::len).sum()
    }

    /// Notes a publication in the journal of `series`.
    pub fn note(&self, series: StudyHash, note: PublishedNote) {
        let _ = self.queue(&series).send(ToJournal::Note { series, note });
    }

    /// Closes the journal of a series that nothing waits for. Never blocks: an open journal only costs a descriptor.
    pub fn close(&self, series: StudyHash) {
        let _ = self.queue(&series).try_send(ToJournal::Close { series });
    }

    /// Asks for everything in the journal of `series` again, as [`ToAssembler::Recovered`]. Never blocks; `false`
    /// means ask again later.
    pub fn resend(&self, series: &StudyHash) -> bool {
        self.queue(series).try_send(ToJournal::Resend { series: series.clone() }).is_ok()
    }

    /// Deletes the folder of `series`, unless its journal was written to after `not_after`.
    pub fn delete(&self, series: StudyHash, not_after: SystemTime) {
        let _ = self.queue(&series).send(ToJournal::Delete { series, not_after });
    }

    /// Reads back every journal under the series folder; unpublished series go to the assembler.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn recover_all(&self, series_dir: &Path) -> std::io::Result<usize> {
        let mut names: Vec<StudyHash> = Vec::new();
        for entry in std::fs::read_dir(series_dir)? {
            let entry = entry?;
            if entry.path().join(JOURNAL_FILE).is_file()
                && let Some(series) = entry.file_name().to_str().and_then(|name| StudyHash::parse(name).ok())
            {
                names.push(series);
            }
        }
        names.sort();
        for series in &names {
            // Volumes are made anew from the journals.
            remove_volumes(&series_dir.join(series.as_str()));
        }
        let count = names.len();
        for series in names {
            let _ = self.queue(&series).send(ToJournal::Recover { series });
        }
        Ok(count)
    }
}

/// Removes the volume files of a series; who has one mapped keeps it.
pub fn remove_volumes(series_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(series_dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(VOLUME_PREFIX) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn journal_bytes(series_dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(series_dir) else { return 0 };
    entries.flatten().filter_map(|e| std::fs::metadata(e.path().join(JOURNAL_FILE)).ok()).map(|m| m.len()).sum()
}

/// Why a record was not appended.
#[derive(Debug, thiserror::Error)]
enum AppendError {
    #[error("{0}")]
    Bound(String),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("make the series folder: {0}")]
    Folder(std::io::Error),
}

impl AppendError {
    fn is_no_space(&self) -> bool {
        match self {
            AppendError::Journal(error) => error.is_no_space(),
            AppendError::Folder(error) => no_space(error),
            AppendError::Bound(_) => false,
        }
    }
}

/// Whose series it is; the text of [`IDENTITY_FILE`].
#[derive(Serialize, Deserialize)]
struct Identity {
    study_instance_uid: String,
    series_instance_uid: String,
    /// Hash of `study_instance_uid`: with the folder's name, the hash of the other one, it proves the text whole.
    study: String,
}

impl Identity {
    /// Written before the journal is made, whose making syncs the folder.
    fn write(path: &Path, header: &SliceHeader, study: &StudyHash, durability: Durability) -> std::io::Result<()> {
        let identity = Self {
            study_instance_uid: header.study_instance_uid.clone(),
            series_instance_uid: header.series_instance_uid.clone(),
            study: study.as_str().to_owned(),
        };
        let text = serde_json::to_vec(&identity)?;
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(&text)?;
        if durability == Durability::Fsync { file.sync_all() } else { Ok(()) }
    }

    /// What the file says of `series`, if it is there and whole.
    fn read(path: &Path, series: &StudyHash, hasher: &StudyHasher) -> Option<(StudyHash, SliceHeader)> {
        let mut text = Vec::new();
        std::fs::File::open(path).ok()?.take(MAX_IDENTITY).read_to_end(&mut text).ok()?;
        let identity: Self = serde_json::from_slice(&text).ok()?;
        let study = hasher.hash(&identity.study_instance_uid);
        let whole = study.as_str() == identity.study && hasher.hash(&identity.series_instance_uid) == *series;
        whole.then(|| (study, SliceHeader::of_series(identity.study_instance_uid, identity.series_instance_uid)))
    }
}

struct OpenJournal {
    writer: JournalWriter,
    reader: JournalReader,
    seen: HashMap<String, Vec<RecordRef>>,
    records: u64,
    /// Offset of the last data set record.
    last_dataset: u64,
    last_use: u64,
}

struct JournalThread {
    options: JournalOptions,
    hasher: StudyHasher,
    open: HashMap<StudyHash, OpenJournal>,
    /// Series whose journal could not be cut back after a failed sync: refused until the next start.
    broken: HashSet<StudyHash>,
    uses: u64,
    assembler: Sender<ToAssembler>,
    total_bytes: Arc<AtomicU64>,
}

struct Appended {
    request: Box<AppendRequest>,
    status: StoreStatus,
    forward: Option<ToAssembler>,
}

impl JournalThread {
    fn run(&mut self, queue: &Receiver<ToJournal>) {
        let mut group: Vec<Appended> = Vec::with_capacity(GROUP_COMMIT);
        let mut touched: Vec<StudyHash> = Vec::with_capacity(GROUP_COMMIT);
        while let Ok(first) = queue.recv() {
            let mut next = Some(first);
            while let Some(message) = next {
                if !matches!(message, ToJournal::Append(_)) {
                    // Whatever closes or reads back a journal must find it synced and answered for.
                    self.commit(&mut group, &mut touched);
                }
                match message {
                    ToJournal::Append(request) => {
                        let appended = self.append(request);
                        if appended.status == StoreStatus::Success && !touched.contains(&appended.request.series) {
                            touched.push(appended.request.series.clone());
                        }
                        group.push(appended);
                    }
                    ToJournal::Note { series, note } => self.note(&series, &note),
                    ToJournal::Recover { series } => self.recover(&series),
                    ToJournal::Resend { series } => self.resend(&series),
                    ToJournal::Close { series } => {
                        self.open.remove(&series);
                    }
                    ToJournal::Delete { series, not_after } => self.delete(&series, not_after),
                }
                next = if group.len() < GROUP_COMMIT { queue.try_recv().ok() } else { None };
            }
            self.commit(&mut group, &mut touched);
        }
    }

    /// Tells the assembler what was written, syncs the journals touched, tells it so, and answers.
    fn commit(&mut self, group: &mut Vec<Appended>, touched: &mut Vec<StudyHash>) {
        let started = Instant::now();
        for appended in group.iter_mut().filter(|a| a.status == StoreStatus::Success) {
            if let Some(message @ ToAssembler::Slice(_)) =
                appended.forward.take_if(|m| matches!(m, ToAssembler::Slice(_)))
            {
                // Nobody there: shutting down. The record is safe and comes back at the next start.
                let _ = self.assembler.send(message);
            }
        }
        let mut failed: Vec<StudyHash> = Vec::new();
        if self.options.durability == Durability::Fsync {
            for series in touched.iter() {
                let synced = match self.open.get_mut(series) {
                    Some(journal) => journal.writer.sync().map_err(|e| (e, journal.writer.was_cut_back())),
                    // Closed since: whether it was synced is not known.
                    None => Err((JournalError::Poisoned, true)),
                };
                if let Err((error, cut_back)) = synced {
                    incidents::JournalFailed { operation: "sync", detail: &error.to_string() }.emit();
                    // What the page cache holds after a failed sync is unknown: reopen and read back before going on.
                    self.open.remove(series);
                    if !cut_back {
                        self.broken.insert(series.clone());
                    }
                    failed.push(series.clone());
                }
            }
        }
        let durable_at = Instant::now();
        if !touched.is_empty() {
            events::StageTimed { stage: Stage::Journal, took: durable_at.duration_since(started) }.emit();
        }
        for series in touched.drain(..) {
            let message = if failed.contains(&series) {
                ToAssembler::Undone { series }
            } else {
                ToAssembler::Durable { series, at: durable_at }
            };
            let _ = self.assembler.send(message);
        }
        for Appended { request, mut status, forward } in group.drain(..) {
            if status == StoreStatus::Success && failed.contains(&request.series) {
                status = StoreStatus::OutOfResources;
            } else if let Some(message) = forward {
                let _ = self.assembler.send(message);
            }
            let _ = request.reply.send((status, request.dataset));
        }
    }

    fn append(&mut self, request: Box<AppendRequest>) -> Appended {
        let outcome = self.try_append(&request);
        match outcome {
            Ok(arrival) => {
                let forward = match arrival {
                    Some(arrival) => {
                        let slices = self.open.get(&request.series).map_or(0, |j| j.records);
                        events::SliceStored { series: &request.series, slices }.emit();
                        ToAssembler::Slice(arrival)
                    }
                    None => {
                        events::SliceDuplicate { series: &request.series, conflict: false }.emit();
                        ToAssembler::Seen { series: request.series.clone(), association: request.association }
                    }
                };
                Appended { request, status: StoreStatus::Success, forward: Some(forward) }
            }
            Err(error) => {
                let reason = match &error {
                    AppendError::Bound(_) => "bound",
                    error if error.is_no_space() => "no_space",
                    AppendError::Journal(_) | AppendError::Folder(_) => "journal",
                };
                events::SliceRefused { reason, status: StoreStatus::OutOfResources.code() }.emit();
                incidents::JournalFailed { operation: "append", detail: &error.to_string() }.emit();
                if matches!(&error, AppendError::Journal(e) if !e.is_no_space()) {
                    // A writer that failed may fail for ever; the next slice opens the file anew.
                    self.open.remove(&request.series);
                }
                Appended { request, status: StoreStatus::OutOfResources, forward: None }
            }
        }
    }

    fn try_append(&mut self, request: &AppendRequest) -> Result<Option<Box<Arrival>>, AppendError> {
        let size = request.dataset.len() as u64;
        let max_total = self.options.max_total_bytes;
        let max_records = self.options.max_records_per_series;
        let total = Arc::clone(&self.total_bytes);
        if self.broken.contains(&request.series) {
            return Err(AppendError::Bound("the journal could not be cut back after a failed sync".to_owned()));
        }
        let journal = self.journal(&request.series, Some((&request.header, &request.study)))?;
        if let Some(earlier) = journal.seen.get(&request.header.sop_instance_uid) {
            let mut stored = Vec::new();
            for record in earlier.iter().filter(|r| r.payload_len == size) {
                // A record that cannot be read back is no reason to refuse the same object again.
                let Ok(head) = journal.reader.read(*record, &mut stored) else { continue };
                if stored == request.dataset && head.transfer_syntax_uid == *request.transfer_syntax_uid {
                    return Ok(None);
                }
            }
        }
        if journal.records >= max_records {
            return Err(AppendError::Bound(format!("series holds its limit of {max_records} objects")));
        }
        if total.load(Ordering::Relaxed).saturating_add(size) > max_total {
            return Err(AppendError::Bound(format!("journals hold their limit of {max_total} bytes")));
        }
        let head = RecordHead {
            kind: RecordKind::Dataset,
            transfer_syntax_uid: &request.transfer_syntax_uid,
            sop_class_uid: &request.header.sop_class_uid,
            sop_instance_uid: &request.header.sop_instance_uid,
            received_unix_ns: unix_ns(),
        };
        let before = journal.writer.len();
        let record = journal.writer.append(&head, &request.dataset)?;
        let added = journal.writer.len() - before;
        let first = journal.records == 0;
        journal.last_dataset = record.offset;
        journal.records += 1;
        journal.seen.entry(request.header.sop_instance_uid.clone()).or_default().push(record);
        total.fetch_add(added, Ordering::Relaxed);
        Ok(Some(Box::new(Arrival {
            series: request.series.clone(),
            study: request.study.clone(),
            header: Arc::clone(&request.header),
            transfer_syntax_uid: Arc::clone(&request.transfer_syntax_uid),
            record,
            reader: journal.reader.clone(),
            association: request.association,
            last_pdata_at: request.last_pdata_at,
            written_at: Instant::now(),
            ordinal: record.offset,
            first,
            count_is_declared: request.count_is_declared,
        })))
    }

    fn path(&self, series: &StudyHash) -> PathBuf {
        self.options.series_dir.join(series.as_str()).join(JOURNAL_FILE)
    }

    /// The open journal of `series`: created (of the series that `of` says it is), or reopened and its content handed to
    /// the assembler first.
    fn journal(
        &mut self,
        series: &StudyHash,
        of: Option<(&SliceHeader, &StudyHash)>,
    ) -> Result<&mut OpenJournal, AppendError> {
        self.uses += 1;
        if !self.open.contains_key(series) {
            if self.open.len() >= MAX_OPEN_JOURNALS
                && let Some(oldest) = self.open.iter().min_by_key(|(_, j)| j.last_use).map(|(s, _)| s.clone())
            {
                self.open.remove(&oldest);
            }
            let path = self.path(series);
            let journal = if path.exists() {
                let (journal, recovered) = self.reopen(series)?;
                let _ = self.assembler.send(recovered);
                journal
            } else {
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder).map_err(AppendError::Folder)?;
                }
                if let Some((header, study)) = of {
                    let identity = path.with_file_name(IDENTITY_FILE);
                    Identity::write(&identity, header, study, self.options.durability).map_err(AppendError::Folder)?;
                }
                let writer = JournalWriter::create(&path)?;
                sync_dir(&self.options.series_dir).map_err(AppendError::Folder)?;
                let reader = writer.reader()?;
                OpenJournal { writer, reader, seen: HashMap::new(), records: 0, last_dataset: 0, last_use: 0 }
            };
            self.open.insert(series.clone(), journal);
        }
        let uses = self.uses;
        let journal = self.open.get_mut(series).expect("inserted above");
        journal.last_use = uses;
        Ok(journal)
    }

    fn reopen(&self, series: &StudyHash) -> Result<(OpenJournal, ToAssembler), JournalError> {
        let (writer, records) = JournalWriter::open(&self.path(series))?;
        let reader = writer.reader()?;
        let mut journal =
            OpenJournal { writer, reader, seen: HashMap::new(), records: 0, last_dataset: 0, last_use: 0 };
        let mut slices = Vec::with_capacity(records.len());
        let mut published: Option<PublishedNote> = None;
        let mut lost = journal.writer.recovery().damage.len() as u64;
        let mut payload = Vec::new();
        for (record, head) in records {
            match head.kind {
                RecordKind::Note => {
                    journal.reader.read(record, &mut payload)?;
                    published = serde_json::from_slice(&payload).ok().or(published);
                }
                RecordKind::Dataset => {
                    journal.seen.entry(head.sop_instance_uid.clone()).or_default().push(record);
                    let first = journal.records == 0;
                    journal.last_dataset = record.offset;
                    journal.records += 1;
                    match self.read_back(series, &journal.reader, record, &head, first, &mut payload) {
                        Some(arrival) => slices.push(arrival),
                        None => lost += 1,
                    }
                }
            }
        }
        if slices.is_empty()
            && lost > 0
            && published.is_none()
            && let Some(unreadable) = self.unreadable(series)
        {
            return Ok((journal, unreadable));
        }
        Ok((journal, ToAssembler::Recovered { series: series.clone(), slices, published, lost }))
    }

    /// What is left to say of a series whose journal gives nothing back; `None` if it is not known whose it is.
    fn unreadable(&self, series: &StudyHash) -> Option<ToAssembler> {
        let path = self.path(series).with_file_name(IDENTITY_FILE);
        let (study, header) = Identity::read(&path, series, &self.hasher)?;
        Some(ToAssembler::Unreadable { series: series.clone(), study, header: Arc::new(header) })
    }

    fn read_back(
        &self,
        series: &StudyHash,
        reader: &JournalReader,
        record: RecordRef,
        head: &OwnedRecordHead,
        first: bool,
        payload: &mut Vec<u8>,
    ) -> Option<Arrival> {
        if let Err(error) = reader.read(record, payload) {
            incidents::JournalFailed { operation: "read", detail: &error.to_string() }.emit();
            return None;
        }
        let header = header::parse_header(payload, &head.transfer_syntax_uid).ok()?;
        Some(Arrival {
            series: series.clone(),
            study: self.hasher.hash(&header.study_instance_uid),
            header: Arc::new(header),
            transfer_syntax_uid: Arc::from(head.transfer_syntax_uid.as_str()),
            record,
            reader: reader.clone(),
            association: RECOVERED,
            last_pdata_at: Instant::now(),
            written_at: Instant::now(),
            ordinal: record.offset,
            first,
            count_is_declared: false,
        })
    }

    fn recover(&mut self, series: &StudyHash) {
        if self.open.contains_key(series) {
            return;
        }
        let path = self.path(series);
        let published_len = std::fs::read_to_string(path.with_file_name(PUBLISHED_FILE)).ok();
        let len = std::fs::metadata(&path).map(|m| m.len()).ok();
        if len.is_some() && published_len.and_then(|text| text.trim().parse().ok()) == len {
            return; // as it was when everything in it was published
        }
        match self.reopen(series) {
            Ok((journal, recovered)) => {
                if let ToAssembler::Recovered { slices, published, .. } = &recovered {
                    let done = published.as_ref().is_some_and(|p| p.covered > journal.last_dataset);
                    if done || slices.is_empty() {
                        return;
                    }
                }
                self.open.insert(series.clone(), journal);
                let _ = self.assembler.send(recovered);
            }
            Err(error) => self.cannot_read_back("recover", series, &error),
        }
    }

    /// Reports that a journal could not be opened, and to the assembler if that is final.
    fn cannot_read_back(&self, operation: &'static str, series: &StudyHash, error: &JournalError) {
        incidents::JournalFailed { operation, detail: &error.to_string() }.emit();
        if error.is_unreadable()
            && let Some(message) = self.unreadable(series)
        {
            let _ = self.assembler.send(message);
        }
    }

    /// Closes the journal if it is open, reads it back and forwards everything in it.
    fn resend(&mut self, series: &StudyHash) {
        self.open.remove(series);
        match self.journal(series, None) {
            Ok(_) => {}
            Err(AppendError::Journal(error)) => self.cannot_read_back("resend", series, &error),
            // The assembler asks again.
            Err(error) => incidents::JournalFailed { operation: "resend", detail: &error.to_string() }.emit(),
        }
    }

    /// Deletes what retention has given up, unless something came since.
    fn delete(&mut self, series: &StudyHash, not_after: SystemTime) {
        let path = self.path(series);
        let Ok(meta) = std::fs::metadata(&path) else { return };
        if meta.modified().is_ok_and(|at| at > not_after) {
            return;
        }
        self.open.remove(series);
        let Some(folder) = path.parent() else { return };
        match std::fs::remove_dir_all(folder) {
            Ok(()) => {
                let freed = meta.len();
                let less = |total: u64| Some(total.saturating_sub(freed));
                let _ = self.total_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            }
            Err(error) => incidents::JournalFailed { operation: "delete", detail: &error.kind().to_string() }.emit(),
        }
    }

    fn note(&mut self, series: &StudyHash, note: &PublishedNote) {
        let payload = serde_json::to_vec(note).unwrap_or_default();
        let fsync = self.options.durability == Durability::Fsync;
        let written = self.journal(series, None).and_then(|journal| {
            let head = RecordHead {
                kind: RecordKind::Note,
                transfer_syntax_uid: "",
                sop_class_uid: "",
                sop_instance_uid: "",
                received_unix_ns: unix_ns(),
            };
            journal.writer.append(&head, &payload)?;
            if fsync {
                journal.writer.sync()?;
            }
            let all = note.covered > journal.last_dataset;
            Ok(all.then(|| journal.writer.len()))
        });
        let marker = self.path(series).with_file_name(PUBLISHED_FILE);
        let written = written.and_then(|len| match len {
            // Only spares the next start a read of the journal; a torn one does not match the journal's length.
            Some(len) => std::fs::write(&marker, len.to_string()).map_err(AppendError::Folder),
            None => Ok(()),
        });
        if let Err(error) = written {
            self.open.remove(series);
            // Without its note the series is judged again after a restart, with the same result and UIDs.
            incidents::JournalFailed { operation: "note", detail: &error.to_string() }.emit();
        }
    }
}

fn sync_dir(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}

/// Nanoseconds since the Unix epoch.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// Where every object enters, whoever brings it.
#[derive(Clone)]
pub struct Entrance {
    journals: Journals,
    hasher: StudyHasher,
    assembler: Sender<ToAssembler>,
    next_association: Arc<AtomicU64>,
    trust_series_count: Arc<[String]>,
}

impl Entrance {
    /// An entrance to `journals`. `trust_series_count` lists the calling AE titles whose
    /// NumberOfSeriesRelatedInstances is a declaration (the series is complete at that count).
    pub fn new(
        journals: Journals,
        hasher: StudyHasher,
        assembler: Sender<ToAssembler>,
        trust_series_count: &[String],
    ) -> Self {
        Self {
            journals,
            hasher,
            assembler,
            next_association: Arc::new(AtomicU64::new(RECOVERED + 1)),
            trust_series_count: trust_series_count.into(),
        }
    }

    /// A sender's own door. `calling_ae_title` decides whether its counts are declarations.
    pub fn door(&self, calling_ae_title: &str) -> Door {
        Door {
            entrance: self.clone(),
            association: self.next_association.fetch_add(1, Ordering::Relaxed),
            trusted: self.trust_series_count.iter().any(|t| t == calling_ae_title),
        }
    }
}

/// One sender: an association or one batch of a watched folder. Dropping it ends the association.
pub struct Door {
    entrance: Entrance,
    association: u64,
    trusted: bool,
}

impl Door {
    /// Takes one data set; returns when it is durable or refused. The buffer comes back for reuse.
    ///
    /// `expected_sop_instance_uid` is what the C-STORE command named (PS3.7 9.1.1.1.4); a data set that says
    /// otherwise is a mismatch (0xA900).
    pub fn take(
        &mut self,
        dataset: Vec<u8>,
        transfer_syntax_uid: &str,
        expected: Option<(&str, &str)>,
        last_pdata_at: Instant,
    ) -> (StoreStatus, Vec<u8>) {
        let header = match header::parse_header(&dataset, transfer_syntax_uid) {
            Ok(header) => header,
            Err(error) => {
                events::SliceRefused { reason: "header", status: StoreStatus::CannotUnderstand.code() }.emit();
                incidents::HeaderUnreadable { detail: &error.to_string() }.emit();
                return (StoreStatus::CannotUnderstand, dataset);
            }
        };
        if header::object_class(&header) == ObjectClass::Ignored {
            events::ObjectIgnored { kind: "not_an_image" }.emit();
            return (StoreStatus::Success, dataset);
        }
        if let Some((sop_class_uid, sop_instance_uid)) = expected
            && (header.sop_instance_uid != sop_instance_uid || header.sop_class_uid != sop_class_uid)
        {
            events::SliceRefused { reason: "mismatch", status: StoreStatus::Mismatch.code() }.emit();
            return (StoreStatus::Mismatch, dataset);
        }
        let series = self.entrance.hasher.hash(&header.series_instance_uid);
        let study = self.entrance.hasher.hash(&header.study_instance_uid);
        let (reply, answer) = bounded(1);
        let request = Box::new(AppendRequest {
            series: series.clone(),
            study,
            header: Arc::new(header),
            transfer_syntax_uid: Arc::from(transfer_syntax_uid),
            dataset,
            association: self.association,
            last_pdata_at,
            count_is_declared: self.trusted,
            reply,
        });
        if let Err(back) = self.entrance.journals.queue(&series).send(ToJournal::Append(request)) {
            let ToJournal::Append(request) = back.0 else { return (StoreStatus::OutOfResources, Vec::new()) };
            return (StoreStatus::OutOfResources, request.dataset);
        }
        // A journal thread that died drops the request and with it the only sender of the answer.
        answer.recv().unwrap_or((StoreStatus::OutOfResources, Vec::new()))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = self.entrance.assembler.send(ToAssembler::Closed { association: self.association });
    }
}

struct StoreHandler {
    door: Option<Door>,
    association: u64,
    objects: u64,
    active: Arc<AtomicUsize>,
}

impl AssociationHandler for StoreHandler {
    fn store(&mut self, request: &StoreRequest<'_>, dataset: Vec<u8>) -> (StoreStatus, Vec<u8>) {
        let Some(door) = &mut self.door else { return (StoreStatus::OutOfResources, dataset) };
        let took = request.last_pdata_at.saturating_duration_since(request.first_pdata_at);
        events::StageTimed { stage: Stage::Ingest, took }.emit();
        let expected = Some((request.sop_class_uid, request.sop_instance_uid));
        let (status, buffer) = door.take(dataset, request.transfer_syntax_uid, expected, request.last_pdata_at);
        self.objects += u64::from(status == StoreStatus::Success);
        (status, buffer)
    }

    fn closed(&mut self, released: bool) {
        if self.door.take().is_none() {
            return;
        }
        let active = self.active.fetch_sub(1, Ordering::Relaxed) - 1;
        if released {
            events::AssociationClosed { association: self.association, active, objects: self.objects }.emit();
        } else {
            events::AssociationAborted { association: self.association, active }.emit();
        }
    }
}

impl Drop for StoreHandler {
    fn drop(&mut self) {
        self.closed(false);
    }
}

/// Makes a handler for each association of the DICOM server.
pub struct StoreFactory {
    entrance: Entrance,
    active: Arc<AtomicUsize>,
}

impl StoreFactory {
    /// Handlers that bring their objects to `entrance`.
    pub fn new(entrance: Entrance) -> Self {
        Self { entrance, active: Arc::default() }
    }
}

impl HandlerFactory for StoreFactory {
    fn open(&self, association: &AssociationInfo) -> Box<dyn AssociationHandler> {
        let active = self.active.fetch_add(1, Ordering::Relaxed) + 1;
        events::AssociationAccepted { association: association.id, active }.emit();
        Box::new(StoreHandler {
            door: Some(self.entrance.door(&association.calling_ae_title)),
            association: association.id,
            objects: 0,
            active: Arc::clone(&self.active),
        })
    }

    fn event(&self, event: ScpEvent) {
        match event {
            // Told by the handlers, which know the association.
            ScpEvent::AssociationAccepted | ScpEvent::AssociationReleased | ScpEvent::AssociationAborted => {}
            ScpEvent::AssociationRejected { reason } => events::AssociationRejected { reason }.emit(),
            ScpEvent::ProtocolError { kind } => events::ProtocolViolated { kind }.emit(),
            ScpEvent::Echo => events::EchoAnswered.emit(),
            ScpEvent::BytesReceived(bytes) => events::BytesReceived { bytes }.emit(),
            ScpEvent::ObjectRefused { reason } => {
                events::SliceRefused { reason, status: StoreStatus::OutOfResources.code() }.emit();
            }
            ScpEvent::OperationRefused => events::ProtocolViolated { kind: "operation" }.emit(),
            ScpEvent::ConnectionDropped => events::ProtocolViolated { kind: "connection_dropped" }.emit(),
            ScpEvent::HandlerPanicked => events::PanicContained { stage: "ingest", series: None }.emit(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What became of `count` objects of one series in one group, the last sync failing if told: messages, statuses.
    fn committed(count: usize, fails: bool) -> (Vec<String>, Vec<StoreStatus>) {
        let dir = tempfile::tempdir().unwrap();
        let hasher = StudyHasher::new([7; 32]);
        let (assembler, heard) = bounded(64);
        let mut thread = JournalThread {
            options: JournalOptions {
                series_dir: dir.path().to_path_buf(),
                threads: 1,
                durability: Durability::Fsync,
                max_records_per_series: 100,
                max_total_bytes: 1 << 30,
            },
            hasher: hasher.clone(),
            open: HashMap::new(),
            broken: HashSet::new(),
            uses: 0,
            assembler,
            total_bytes: Arc::default(),
        };
        let (study, series) = (hasher.hash("1.2.3"), hasher.hash("1.2.3.4"));
        let mut group = Vec::new();
        let mut answers = Vec::new();
        for n in 0..count {
            let (reply, answer) = bounded(1);
            answers.push(answer);
            let mut header = SliceHeader::of_series("1.2.3".to_owned(), "1.2.3.4".to_owned());
            header.sop_instance_uid = format!("1.2.3.4.{n}");
            group.push(thread.append(Box::new(AppendRequest {
                series: series.clone(),
                study: study.clone(),
                header: Arc::new(header),
                transfer_syntax_uid: Arc::from("1.2.840.10008.1.2.1"),
                dataset: vec![n as u8; 100],
                association: 1,
                last_pdata_at: Instant::now(),
                count_is_declared: false,
                reply,
            })));
        }
        if fails {
            thread.open.get_mut(&series).unwrap().writer.fail_syncs();
        }
        thread.commit(&mut group, &mut vec![series]);
        let messages = heard
            .try_iter()
            .map(|message| match message {
                ToAssembler::Slice(arrival) => arrival.header.sop_instance_uid.clone(),
                ToAssembler::Durable { .. } => "durable".to_owned(),
                ToAssembler::Undone { .. } => "undone".to_owned(),
                other => format!("{other:?}"),
            })
            .collect();
        (messages, answers.iter().map(|a| a.recv().unwrap().0).collect())
    }

    #[test]
    fn the_assembler_hears_of_a_record_before_its_sync_and_of_the_sync_after_it() {
        let (messages, statuses) = committed(2, false);
        assert_eq!(messages, ["1.2.3.4.0", "1.2.3.4.1", "durable"]);
        assert_eq!(statuses, [StoreStatus::Success; 2]);
        let (messages, statuses) = committed(2, true);
        assert_eq!(messages, ["1.2.3.4.0", "1.2.3.4.1", "undone"]);
        assert_eq!(statuses, [StoreStatus::OutOfResources; 2]);
    }

    #[test]
    fn an_identity_counts_only_whole_and_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(IDENTITY_FILE);
        let hasher = StudyHasher::new([7; 32]);
        let (study, series) = (hasher.hash("1.2.3"), hasher.hash("1.2.3.4"));
        assert!(Identity::read(&path, &series, &hasher).is_none());
        let header = SliceHeader::of_series("1.2.3".to_owned(), "1.2.3.4".to_owned());
        Identity::write(&path, &header, &study, Durability::Fsync).unwrap();
        assert_eq!(Identity::read(&path, &series, &hasher), Some((study.clone(), header)));
        assert!(Identity::read(&path, &study, &hasher).is_none(), "another series' folder");
        let text = std::fs::read(&path).unwrap();
        for at in 0..text.len() {
            let mut torn = text.clone();
            torn[at] ^= 0x01;
            std::fs::write(&path, &torn).unwrap();
            assert!(Identity::read(&path, &series, &hasher).is_none(), "byte {at}");
            std::fs::write(&path, &text[..at]).unwrap();
            assert!(Identity::read(&path, &series, &hasher).is_none(), "cut at {at}");
        }
    }
}
