//! The watched folder: files that appear are taken in as if they had come over C-STORE.
//!
//! Input: a folder, watched with `notify` and listed again every [`RESCAN`] (a lost notification delays a file, it
//! does not lose it). Output: objects through a [`Door`]. A file is read once it has not changed for
//! `settle_ms`; a file that cannot be read or understood stays where it is and is tried again when it changes; one for
//! which there was no room (a full disk, a bound) is tried again after [`FIRST_RETRY`], then twice that, up to
//! [`LAST_RETRY`]; one that ends inside its pixels has [`CUT_PATIENCE`] to grow. What happens to a file that is in a
//! journal is configured: left, moved aside or deleted. An object that is no image (a dose report) is in no journal, so
//! its file stays whatever is configured.
//!
//! Deliberately absent: names in logs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, bounded};
use notify::{RecursiveMode, Watcher};
use serde::{Deserialize, Serialize};

use crate::dicom::decode::ends_early;
use crate::dicom::header::{self, ObjectClass};
use crate::dicom::part10::read_part10;
use crate::dicom::scp::StoreStatus;
use crate::pipeline::ingest::{Door, Entrance};
use crate::telemetry::incidents;

/// Time between two listings of the folder.
pub const RESCAN: Duration = Duration::from_secs(2);
/// Time that a file which ends inside its pixels has to change; it is taken as it is after that.
pub const CUT_PATIENCE: Duration = Duration::from_secs(30);
/// Files known at once; further ones wait for the next listing. 100,000 entries are about 20 MB.
pub const MAX_KNOWN_FILES: usize = 100_000;
/// Wait before a file for which there was no room is tried again.
pub const FIRST_RETRY: Duration = Duration::from_secs(5);
/// Longest wait between two attempts at a file: room made by hand is used within it.
pub const LAST_RETRY: Duration = Duration::from_secs(300);
/// Folder inside the watched one that kept files are moved to.
pub const TAKEN: &str = "taken";

/// What happens to a file that is safe in the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterTaking {
    /// It stays.
    #[default]
    Leave,
    /// It is moved to `taken/` inside the folder.
    Move,
    /// It is deleted.
    Delete,
}

/// Settings of the watched folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FolderConfig {
    /// The folder; none is watched when empty.
    pub path: Option<PathBuf>,
    /// What happens to a file once it is kept.
    pub after: AfterTaking,
    /// Quiet time before a file counts as fully written, milliseconds.
    pub settle_ms: u64,
}

impl Default for FolderConfig {
    fn default() -> Self {
        Self { path: None, after: AfterTaking::Leave, settle_ms: 500 }
    }
}

impl FolderConfig {
    /// Every fault, as a sentence fragment.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if let Some(path) = &self.path
            && !path.is_dir()
        {
            faults.push("folder.path: expected a folder that exists".to_owned());
        }
        if !(50..=60_000).contains(&self.settle_ms) {
            faults.push(format!("folder.settle_ms: expected 50 to 60000, got {}", self.settle_ms));
        }
        faults
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Look {
    len: u64,
    modified: Option<SystemTime>,
}

struct Known {
    look: Look,
    /// When it is to be taken; `None` once nothing more is to be done with it as it is.
    due: Option<Instant>,
    /// Attempts that ended for want of room.
    refused: u32,
    /// It ended inside its pixels when it was looked at.
    cut: bool,
}

impl Known {
    fn new(look: Look, settle: Duration) -> Self {
        Self { look, due: Some(Instant::now() + settle), refused: 0, cut: false }
    }
}

/// The wait after attempt number `refused` (from 1) ended for want of room.
fn retry_wait(refused: u32) -> Duration {
    FIRST_RETRY.saturating_mul(1 << refused.saturating_sub(1).min(16)).min(LAST_RETRY)
}

/// Whether an object is kept in a journal when it is taken. What cannot be read is judged by the door.
fn is_kept(dataset: &[u8], transfer_syntax_uid: &str) -> bool {
    header::parse_header(dataset, transfer_syntax_uid)
        .map_or(true, |header| header::object_class(&header) != ObjectClass::Ignored)
}

/// The thread that watches; dropping it stops it.
pub struct FolderWatcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FolderWatcher {
    /// Starts watching `config.path`, if there is one.
    ///
    /// # Errors
    /// The folder cannot be watched.
    pub fn start(
        config: &FolderConfig,
        entrance: &Entrance,
        max_object_bytes: u64,
    ) -> Result<Option<Self>, notify::Error> {
        let Some(path) = config.path.clone() else { return Ok(None) };
        let (tx, wake) = bounded(1);
        let mut watcher = notify::recommended_watcher(move |_event| {
            let _ = tx.try_send(());
        })?;
        watcher.watch(&path, RecursiveMode::Recursive)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut scan = Scan {
            path,
            config: config.clone(),
            entrance: entrance.clone(),
            max_object_bytes,
            known: HashMap::new(),
            door: None,
            last_taken: Instant::now(),
        };
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("folder".to_owned())
            .spawn(move || {
                let _watcher = watcher;
                scan.run(&wake, &stopped);
            })
            .map_err(notify::Error::io)?;
        Ok(Some(Self { stop, thread: Some(thread) }))
    }
}

impl Drop for FolderWatcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Scan {
    path: PathBuf,
    config: FolderConfig,
    entrance: Entrance,
    max_object_bytes: u64,
    known: HashMap<PathBuf, Known>,
    door: Option<Door>,
    last_taken: Instant,
}

impl Scan {
    fn run(&mut self, wake: &Receiver<()>, stop: &AtomicBool) {
        let settle = Duration::from_millis(self.config.settle_ms);
        let mut last_listing: Option<Instant> = None;
        while !stop.load(Ordering::Acquire) {
            let woken = wake.recv_timeout(Duration::from_millis(100)).is_ok();
            if woken || last_listing.is_none_or(|at| at.elapsed() >= RESCAN) {
                self.list(settle);
                last_listing = Some(Instant::now());
            }
            self.take_due(settle);
            // A batch ends like an association once nothing has come for the settling time twice over.
            if self.door.is_some() && self.last_taken.elapsed() >= settle * 2 {
                self.door = None;
            }
        }
    }

    fn list(&mut self, settle: Duration) {
        let mut found = HashMap::new();
        let mut pending = vec![self.path.clone()];
        while let Some(folder) = pending.pop() {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                let path = entry.path();
                let Ok(meta) = std::fs::metadata(&path) else { continue };
                if meta.is_dir() {
                    if path != self.path.join(TAKEN) {
                        pending.push(path);
                    }
                } else if found.len() < MAX_KNOWN_FILES {
                    found.insert(path, Look { len: meta.len(), modified: meta.modified().ok() });
                }
            }
        }
        self.known.retain(|path, _| found.contains_key(path));
        for (path, look) in found {
            let known = self.known.entry(path).or_insert_with(|| Known::new(look, settle));
            if known.look != look {
                *known = Known::new(look, settle);
            }
        }
    }

    fn take_due(&mut self, settle: Duration) {
        let started = Instant::now();
        let mut due: Vec<PathBuf> =
            self.known.iter().filter(|(_, k)| k.due.is_some_and(|at| at <= started)).map(|(p, _)| p.clone()).collect();
        due.sort();
        for path in due {
            // It may have grown since it was listed.
            let now = std::fs::metadata(&path).ok().map(|m| Look { len: m.len(), modified: m.modified().ok() });
            let Some(known) = self.known.get_mut(&path) else { continue };
            match now {
                Some(look) if look == known.look => known.due = None,
                Some(look) => {
                    *known = Known::new(look, settle);
                    continue;
                }
                None => continue,
            }
            if self.take(&path) == StoreStatus::OutOfResources
                && let Some(known) = self.known.get_mut(&path)
            {
                known.refused = known.refused.saturating_add(1);
                known.due = Some(Instant::now() + retry_wait(known.refused));
            }
        }
    }

    /// Takes a file in; says what the door said.
    fn take(&mut self, path: &Path) -> StoreStatus {
        let part10 = match read_part10(path, self.max_object_bytes) {
            Ok(part10) => part10,
            Err(error) => {
                incidents::FolderFileRefused { detail: &error.to_string() }.emit();
                return StoreStatus::CannotUnderstand;
            }
        };
        let mut dataset = part10.bytes;
        dataset.drain(..part10.dataset_offset);
        if let Some(known) = self.known.get_mut(path)
            && !known.cut
            && ends_early(&dataset, &part10.transfer_syntax_uid)
        {
            known.cut = true;
            known.due = Some(Instant::now() + CUT_PATIENCE);
            return StoreStatus::CannotUnderstand;
        }
        let kept = self.config.after == AfterTaking::Leave || is_kept(&dataset, &part10.transfer_syntax_uid);
        let door = self.door.get_or_insert_with(|| self.entrance.door(""));
        let expected = Some((part10.sop_class_uid.as_str(), part10.sop_instance_uid.as_str()));
        let (status, _) = door.take(dataset, &part10.transfer_syntax_uid, expected, Instant::now());
        self.last_taken = Instant::now();
        if status != StoreStatus::Success || !kept {
            return status; // counted by the door; the file stays
        }
        let done = match self.config.after {
            AfterTaking::Leave => Ok(()),
            AfterTaking::Delete => std::fs::remove_file(path),
            AfterTaking::Move => self.move_aside(path),
        };
        if done.is_err() {
            incidents::FolderFileRefused { detail: "a file that was taken could not be moved or deleted" }.emit();
        }
        status
    }

    fn move_aside(&self, path: &Path) -> std::io::Result<()> {
        let target = self.path.join(TAKEN).join(path.strip_prefix(&self.path).unwrap_or(path));
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::rename(path, target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dicom::part10::write_part10;
    use crate::phantom::{DicomOptions, PhantomClass, PhantomSpec, generate, write_dicom};
    use crate::pipeline::ingest::{Durability, JournalOptions, Journals, ToAssembler};
    use crate::telemetry::StudyHasher;

    /// A data set of a dose report, explicit little endian: no rows, no columns.
    fn dose_report() -> Vec<u8> {
        let mut out = Vec::new();
        for (group, element, vr, value) in [
            (0x0008u16, 0x0016u16, b"UI", "1.2.840.10008.5.1.4.1.1.88.67\0"),
            (0x0008, 0x0018, b"UI", "1.2.826.0.1.5\0"),
            (0x0008, 0x0060, b"CS", "SR"),
            (0x0020, 0x000d, b"UI", "1.2.826.0.1.6\0"),
            (0x0020, 0x000e, b"UI", "1.2.826.0.1.7\0"),
        ] {
            out.extend(group.to_le_bytes());
            out.extend(element.to_le_bytes());
            out.extend(vr);
            out.extend((value.len() as u16).to_le_bytes());
            out.extend(value.as_bytes());
        }
        out
    }

    struct Bench {
        scan: Scan,
        _messages: Receiver<ToAssembler>,
        _dir: tempfile::TempDir,
    }

    /// A folder with one CT slice and one dose report, over journals that hold `max_total_bytes`.
    fn bench(after: AfterTaking, max_total_bytes: u64) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let (path, series_dir) = (dir.path().join("in"), dir.path().join("series"));
        std::fs::create_dir(&path).unwrap();
        std::fs::create_dir(&series_dir).unwrap();
        let spec = PhantomSpec::random(PhantomClass::Healthy, 1).with_shape(2, 32, 32);
        let files = write_dicom(&generate(&spec), &dir.path().join("ct"), &DicomOptions::default()).unwrap();
        std::fs::copy(&files[0], path.join("slice.dcm")).unwrap();
        let mut report = std::fs::File::create(path.join("dose.dcm")).unwrap();
        let class = "1.2.840.10008.5.1.4.1.1.88.67";
        write_part10(&mut report, "1.2.840.10008.1.2.1", class, "1.2.826.0.1.5", &dose_report()).unwrap();

        let hasher = StudyHasher::new([3; 32]);
        let (assembler, messages) = bounded(64);
        let options = JournalOptions {
            series_dir,
            threads: 1,
            durability: Durability::PageCache,
            max_records_per_series: 10,
            max_total_bytes,
        };
        let (journals, _) = Journals::start(&options, &hasher, &assembler).unwrap();
        let scan = Scan {
            path,
            config: FolderConfig { after, ..FolderConfig::default() },
            entrance: Entrance::new(journals, hasher, assembler, &[]),
            max_object_bytes: 1 << 20,
            known: HashMap::new(),
            door: None,
            last_taken: Instant::now(),
        };
        Bench { scan, _messages: messages, _dir: dir }
    }

    impl Bench {
        fn look(&mut self) {
            self.scan.list(Duration::ZERO);
            self.scan.take_due(Duration::ZERO);
        }

        fn has(&self, name: &str) -> bool {
            self.scan.path.join(name).exists()
        }

        fn known(&mut self, name: &str) -> &mut Known {
            self.scan.known.get_mut(&self.scan.path.join(name)).unwrap()
        }
    }

    #[test]
    fn waits_double_to_their_bound() {
        let seconds: Vec<u64> = [1, 2, 3, 6, 7, 8, u32::MAX].map(|n| retry_wait(n).as_secs()).to_vec();
        assert_eq!(seconds, [5, 10, 20, 160, 300, 300, 300]);
    }

    #[test]
    fn only_what_is_in_a_journal_is_deleted_or_moved() {
        let mut deleted = bench(AfterTaking::Delete, u64::MAX);
        deleted.look();
        assert!(!deleted.has("slice.dcm") && deleted.has("dose.dcm"));
        assert!(deleted.known("dose.dcm").due.is_none(), "and it is not read again");
        let mut moved = bench(AfterTaking::Move, u64::MAX);
        moved.look();
        assert!(moved.has("taken/slice.dcm") && moved.has("dose.dcm") && !moved.has("taken/dose.dcm"));
        let mut left = bench(AfterTaking::Leave, u64::MAX);
        left.look();
        assert!(left.has("slice.dcm") && left.has("dose.dcm") && left.known("slice.dcm").due.is_none());
    }

    #[test]
    fn a_file_without_room_is_tried_again_later() {
        let mut full = bench(AfterTaking::Delete, 0);
        full.look();
        assert!(full.has("slice.dcm"));
        let first = full.known("slice.dcm").due.unwrap();
        assert!(first > Instant::now() + FIRST_RETRY / 2 && full.known("slice.dcm").refused == 1);
        full.look();
        assert_eq!(full.known("slice.dcm").refused, 1, "not before its time");
        full.known("slice.dcm").due = Some(Instant::now());
        full.look();
        assert_eq!(full.known("slice.dcm").refused, 2);
        assert!(full.known("slice.dcm").due.unwrap() > first);
        // There is room now.
        let roomy = bench(AfterTaking::Delete, u64::MAX);
        full.scan.entrance = roomy.scan.entrance.clone();
        full.scan.door = None;
        full.known("slice.dcm").due = Some(Instant::now());
        full.look();
        assert!(!full.has("slice.dcm"));
    }
}
