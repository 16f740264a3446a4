//! The watched folder: files that appear are taken in as if they had come over C-STORE.
//!
//! Input: a folder, watched with `notify` and listed again every [`RESCAN`] (a lost notification delays a file, it
//! does not lose it). Output: objects through a [`Door`]. A file is read once it has not changed for
//! `settle_ms`; one that ends inside its pixels is given [`CUT_PATIENCE`] to grow, because half a slice in the journal
//! would be in conflict with the whole one that follows. A file that cannot be read or kept stays where it is and is tried again when it changes. What happens
//! to a file that was kept is configured: left, moved aside or deleted.
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
    since: Instant,
    tried: bool,
    /// It ended inside its pixels when it was looked at.
    cut: bool,
}

impl Known {
    fn new(look: Look) -> Self {
        Self { look, since: Instant::now(), tried: false, cut: false }
    }

    fn is_due(&self, settle: Duration) -> bool {
        let patience = if self.cut { CUT_PATIENCE } else { Duration::ZERO };
        !self.tried && self.since.elapsed() >= settle + patience
    }
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
                self.list();
                last_listing = Some(Instant::now());
            }
            self.take_settled(settle);
            // A batch ends like an association once nothing has come for the settling time twice over.
            if self.door.is_some() && self.last_taken.elapsed() >= settle * 2 {
                self.door = None;
            }
        }
    }

    fn list(&mut self) {
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
            let known = self.known.entry(path).or_insert_with(|| Known::new(look));
            if known.look != look {
                *known = Known::new(look);
            }
        }
    }

    fn take_settled(&mut self, settle: Duration) {
        let mut due: Vec<PathBuf> =
            self.known.iter().filter(|(_, k)| k.is_due(settle)).map(|(p, _)| p.clone()).collect();
        due.sort();
        for path in due {
            // It may have grown since it was listed.
            let now = std::fs::metadata(&path).ok().map(|m| Look { len: m.len(), modified: m.modified().ok() });
            let Some(known) = self.known.get_mut(&path) else { continue };
            match now {
                Some(look) if look == known.look => known.tried = true,
                Some(look) => {
                    *known = Known::new(look);
                    continue;
                }
                None => continue,
            }
            self.take(&path);
        }
    }

    fn take(&mut self, path: &Path) {
        let part10 = match read_part10(path, self.max_object_bytes) {
            Ok(part10) => part10,
            Err(error) => {
                incidents::FolderFileRefused { detail: &error.to_string() }.emit();
                return;
            }
        };
        let mut dataset = part10.bytes;
        dataset.drain(..part10.dataset_offset);
        if let Some(known) = self.known.get_mut(path)
            && !known.cut
            && ends_early(&dataset, &part10.transfer_syntax_uid)
        {
            known.cut = true;
            known.tried = false;
            return;
        }
        let door = self.door.get_or_insert_with(|| self.entrance.door(""));
        let expected = Some((part10.sop_class_uid.as_str(), part10.sop_instance_uid.as_str()));
        let (status, _) = door.take(dataset, &part10.transfer_syntax_uid, expected, Instant::now());
        self.last_taken = Instant::now();
        if status != StoreStatus::Success {
            return; // counted by the door; the file stays
        }
        let done = match self.config.after {
            AfterTaking::Leave => Ok(()),
            AfterTaking::Delete => std::fs::remove_file(path),
            AfterTaking::Move => self.move_aside(path),
        };
        if done.is_err() {
            incidents::FolderFileRefused { detail: "a file that was taken could not be moved or deleted" }.emit();
        }
    }

    fn move_aside(&self, path: &Path) -> std::io::Result<()> {
        let target = self.path.join(TAKEN).join(path.strip_prefix(&self.path).unwrap_or(path));
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::rename(path, target)
    }
}
