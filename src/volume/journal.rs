//! The journal of a series: every received data set, as encoded, appended with its length and checksums.
//!
//! Input: data sets as the wire carried them. Output: records that survive what [`JournalWriter::sync`] promises. The
//! journal is the truth of a series; the volume, results and pictures can be rebuilt from it. Layout and protocol:
//! `docs/formats.md`.
//!
//! Invariants:
//! - a record lies before the file's end in one piece, or it is not there: [`JournalWriter::append`] restores the
//!   file on failure, and [`JournalWriter::open`] cuts what a crash left half-written;
//! - what was synced is never dropped in silence: damage before the last good record is reported ([`Recovery`]);
//! - one writer a file (an exclusive lock), any number of readers;
//! - after a failed sync the writer refuses all work, because what is on the disk is no longer known.
//!
//! Cost of an append: one checksum pass over the payload and one `pwritev`, no allocation beyond the head's buffer,
//! which is kept; a `fallocate` every 16 MiB.
//!
//! Deliberately absent: knowledge of DICOM (the UIDs are strings here), deletion (retention removes whole files), an
//! index (the caller keeps the [`RecordRef`]s), locks (a writer is owned by one thread).

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, IoSlice, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::volume::layout::journal::*;

/// Bytes read at a time while scanning.
const SCAN_LEN: usize = 1 << 20;
const ZEROS: [u8; ALIGN] = [0; ALIGN];

/// What went wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk or the quota is full; the file is as it was.
    #[error("journal {operation}: no space left on the disk or in the quota; nothing was written")]
    NoSpace {
        /// What was tried.
        operation: &'static str,
    },
    /// The operating system refused.
    #[error("journal {operation}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A part of a record is longer than the format takes.
    #[error("journal append: {what}: expected at most {max} bytes, got {len}")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// The bound.
        max: u64,
    },
    /// The file does not start as a journal does.
    #[error("journal open: not a journal (other magic)")]
    NotAJournal,
    /// The file has a layout this program does not know.
    #[error("journal open: expected version {VERSION}, got {found}; use the program that wrote it")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The file header's checksum is wrong.
    #[error("journal open: header checksum does not match")]
    HeaderDamaged,
    /// The bytes at a record's place are not that record.
    #[error("journal read: record at offset {offset}: {what}")]
    Damaged {
        /// Where the record starts.
        offset: u64,
        /// What does not match.
        what: &'static str,
    },
    /// Another writer has the file.
    #[error("journal open: in use by another writer")]
    Locked,
    /// An earlier sync or cut failed.
    #[error("journal: an earlier write failed and the file's state is unknown; open it again")]
    Poisoned,
}

impl JournalError {
    /// Whether the cause is a full disk or quota (to be answered 0xA700).
    pub fn is_no_space(&self) -> bool {
        matches!(self, JournalError::NoSpace { .. })
    }

    /// Whether what is on the disk is lost, so that trying again is of no use: the file's header is damaged, or the disk
    /// does not give it back. Another version of the format, a lock or a lack of descriptors is none of these.
    pub fn is_unreadable(&self) -> bool {
        match self {
            JournalError::HeaderDamaged | JournalError::NotAJournal => true,
            JournalError::Io { source, .. } => Errno::from_io_error(source) == Some(Errno::IO),
            _ => false,
        }
    }

    fn io(operation: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        if no_space(&source) { JournalError::NoSpace { operation } } else { JournalError::Io { operation, source } }
    }
}

/// Whether an error means that the file system takes no more bytes: full disk, full quota, largest file.
pub(crate) fn no_space(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    [Errno::NOSPC, Errno::DQUOT, Errno::FBIG].into_iter().any(|e| errno == Some(e))
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecordRef {
    /// First byte of the record.
    pub offset: u64,
    /// First byte of its payload.
    pub payload_offset: u64,
    /// Bytes of its payload.
    pub payload_len: u64,
}

impl RecordRef {
    /// First byte after the record and its padding.
    fn end(&self) -> u64 {
        // A record's place was checked against the file's length, far below the overflow.
        self.payload_offset + self.payload_len.next_multiple_of(ALIGN as u64)
    }
}

/// What a record's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// A DICOM data set in the record's transfer syntax, without file meta information.
    Dataset,
    /// A small note of the program's own (released, published revision).
    Note,
}

impl RecordKind {
    fn to_u16(self) -> u16 {
        match self {
            RecordKind::Dataset => KIND_DATASET,
            RecordKind::Note => KIND_NOTE,
        }
    }

    fn from_u16(value: u64) -> Option<Self> {
        [RecordKind::Dataset, RecordKind::Note].into_iter().find(|k| u64::from(k.to_u16()) == value)
    }
}

/// What a record says about its payload.
///
/// `Debug` hides the instance UID.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RecordHead<'a> {
    /// What the payload is.
    pub kind: RecordKind,
    /// TransferSyntaxUID of the payload.
    pub transfer_syntax_uid: &'a str,
    /// SOPClassUID.
    pub sop_class_uid: &'a str,
    /// SOPInstanceUID.
    pub sop_instance_uid: &'a str,
    /// When its last byte was received, nanoseconds since 1970-01-01 UTC.
    pub received_unix_ns: u64,
}

/// [`RecordHead`] with strings of its own.
///
/// `Debug` hides the instance UID.
#[derive(Clone, PartialEq, Eq)]
pub struct OwnedRecordHead {
    /// What the payload is.
    pub kind: RecordKind,
    /// TransferSyntaxUID of the payload.
    pub transfer_syntax_uid: String,
    /// SOPClassUID.
    pub sop_class_uid: String,
    /// SOPInstanceUID.
    pub sop_instance_uid: String,
    /// When its last byte was received, nanoseconds since 1970-01-01 UTC.
    pub received_unix_ns: u64,
}

impl OwnedRecordHead {
    /// The same, borrowed.
    pub fn as_head(&self) -> RecordHead<'_> {
        RecordHead {
            kind: self.kind,
            transfer_syntax_uid: &self.transfer_syntax_uid,
            sop_class_uid: &self.sop_class_uid,
            sop_instance_uid: &self.sop_instance_uid,
            received_unix_ns: self.received_unix_ns,
        }
    }
}

impl fmt::Debug for RecordHead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordHead")
            .field("kind", &self.kind)
            .field("transfer_syntax_uid", &self.transfer_syntax_uid)
            .field("sop_class_uid", &self.sop_class_uid)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for OwnedRecordHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_head().fmt(f)
    }
}

/// Bytes of the journal that are no good record although a good one follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub len: u64,
    /// Records lost here.
    pub records: u64,
    /// The record's head, when only the payload is damaged.
    pub head: Option<OwnedRecordHead>,
}

/// What opening a journal found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Good records.
    pub records: u64,
    /// Bytes of the torn tail that were cut, zeros at its end not counted.
    pub torn_bytes: u64,
    /// Heads of cut records of which only the payload was torn.
    pub torn_heads: Vec<OwnedRecordHead>,
    /// Damage before the last good record, in order. It stays in the file.
    pub damage: Vec<Damage>,
}

/// Everything a scan found.
struct Scan {
    journal_id: u64,
    records: Vec<(RecordRef, OwnedRecordHead)>,
    end: u64,
    next_sequence: u64,
    recovery: Recovery,
}

/// Appends to one journal.
///
/// Space taken ahead is given back when the writer is dropped.
#[derive(Debug)]
pub struct JournalWriter {
    file: Arc<File>,
    journal_id: u64,
    len: u64,
    allocated: u64,
    sequence: u64,
    /// Bytes to take ahead; 0 where the file system cannot.
    ahead: u64,
    poisoned: bool,
    dirty: bool,
    /// Length at the last sync; what was there when the file was opened counts as synced.
    synced_len: u64,
    /// After a failed sync: whether what was not synced is gone from the file.
    untouched: bool,
    head: Vec<u8>,
    recovery: Recovery,
    #[cfg(test)]
    fault: tests::Fault,
}

impl JournalWriter {
    /// Makes a journal. It and its name are on the disk when this returns (the folder itself is the caller's to sync). A
    /// file that could not be finished is removed.
    ///
    /// # Errors
    /// `Io` when the file exists or cannot be made; `NoSpace`.
    pub fn create(path: &Path) -> Result<Self, JournalError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| JournalError::io("create", e))?;
        let build = || {
            lock(&file)?;
            let journal_id = write_header(&file)?;
            sync_folder(path)?;
            Ok(journal_id)
        };
        match build() {
            Ok(journal_id) => Ok(Self::new(file, journal_id, HEADER_LEN as u64, 0, Recovery::default())),
            Err(error) => {
                // It was made by this call and nobody else knows it.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// Opens a journal to append: verifies every record, cuts a torn tail, returns the good records in order.
    /// [`recovery`](Self::recovery) says what was cut and what is damaged.
    ///
    /// Reads the whole file once.
    ///
    /// # Errors
    /// `Io`, `Locked`, `NotAJournal`, `Version`, `HeaderDamaged`; the file is then unchanged.
    pub fn open(path: &Path) -> Result<(Self, Vec<(RecordRef, OwnedRecordHead)>), JournalError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| JournalError::io("open", e))?;
        lock(&file)?;
        let file_len = file.metadata().map_err(|e| JournalError::io("open", e))?.len();
        if never_announced(&file, file_len)? {
            file.set_len(0).map_err(|e| JournalError::io("cut", e))?;
            let journal_id = write_header(&file)?;
            sync_folder(path)?;
            let recovery = Recovery { torn_bytes: file_len, ..Recovery::default() };
            return Ok((Self::new(file, journal_id, HEADER_LEN as u64, 0, recovery), Vec::new()));
        }
        let scan = scan(&file, file_len)?;
        if file_len > scan.end {
            file.set_len(scan.end).map_err(|e| JournalError::io("cut", e))?;
        }
        // A process that was killed may have left records that it never synced; from here on they count as kept.
        file.sync_data().map_err(|e| JournalError::io("sync", e))?;
        Ok((Self::new(file, scan.journal_id, scan.end, scan.next_sequence, scan.recovery), scan.records))
    }

    fn new(file: File, journal_id: u64, len: u64, sequence: u64, recovery: Recovery) -> Self {
        Self {
            file: Arc::new(file),
            journal_id,
            len,
            allocated: len,
            sequence,
            ahead: PREALLOCATE_LEN,
            poisoned: false,
            dirty: false,
            synced_len: len,
            untouched: true,
            head: Vec::with_capacity(RECORD_HEAD_LEN + 3 * MAX_UID_LEN + ALIGN),
            recovery,
            #[cfg(test)]
            fault: tests::Fault::default(),
        }
    }

    /// Has every sync fail from now on.
    #[cfg(test)]
    pub(crate) fn fail_syncs(&mut self) {
        self.fault.sync_fails = true;
    }

    /// Appends a record with one positional vectored write. It is durable after the next [`sync`](Self::sync).
    ///
    /// # Errors
    /// `TooLarge`, `NoSpace`, `Io`: the file is as before. `Poisoned` when it could not be made so, or an earlier sync
    /// failed.
    pub fn append(&mut self, head: &RecordHead<'_>, payload: &[u8]) -> Result<RecordRef, JournalError> {
        if self.poisoned {
            return Err(JournalError::Poisoned);
        }
        encode_head(&mut self.head, self.journal_id, self.sequence, head, payload)?;
        let record = RecordRef {
            offset: self.len,
            payload_offset: self.len + self.head.len() as u64,
            payload_len: payload.len() as u64,
        };
        let end = record.end();
        self.allocate(end)?;
        let padding = (end - record.payload_offset - record.payload_len) as usize;
        if let Err(source) = self.write(payload, padding) {
            self.restore();
            return Err(JournalError::io("append", source));
        }
        self.len = end;
        self.allocated = self.allocated.max(end);
        self.sequence += 1;
        self.dirty = true;
        Ok(record)
    }

    /// Takes space for the bytes up to `end`, and some ahead. A file system without `fallocate` is left to the write.
    fn allocate(&mut self, end: u64) -> Result<(), JournalError> {
        if self.ahead == 0 || end <= self.allocated {
            return Ok(());
        }
        let mut wanted = [end.max(self.allocated + self.ahead), end].into_iter();
        loop {
            let Some(to) = wanted.next() else {
                // Gives back what a failed call took all the same.
                self.restore();
                return Err(JournalError::NoSpace { operation: "append" });
            };
            let from = self.allocated;
            match retry(|| rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, from, to - from)) {
                Ok(()) => {
                    self.allocated = to;
                    return Ok(());
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.ahead = 0;
                    return Ok(());
                }
                Err(error) if no_space(&error.into()) => {}
                Err(error) => return Err(JournalError::io("append", error)),
            }
        }
    }

    /// Cuts the file back to its records. Also drops the space taken ahead, which the next append asks for again.
    /// After a failed sync: whether the file holds nothing that was not synced, so that it may be opened again.
    pub fn was_cut_back(&self) -> bool {
        self.untouched
    }

    fn restore(&mut self) {
        self.allocated = self.len;
        if self.file.set_len(self.len).is_err() {
            self.poisoned = true;
        }
    }

    /// Head, payload and padding at the end of the file.
    fn write(&mut self, payload: &[u8], padding: usize) -> io::Result<()> {
        let mut parts = [IoSlice::new(&self.head), IoSlice::new(payload), IoSlice::new(&ZEROS[..padding])];
        let mut parts = &mut parts[..];
        let mut at = self.len;
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            #[cfg(test)]
            if let Some(result) = self.fault.write(&self.file, parts, at) {
                let written = result?;
                at += written as u64;
                IoSlice::advance_slices(&mut parts, written);
                continue;
            }
            let written = retry(|| rustix::io::pwritev(&*self.file, parts, at))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += written as u64;
            IoSlice::advance_slices(&mut parts, written);
        }
        Ok(())
    }

    /// Makes all appended records durable (`fdatasync`). Only after it may they be acknowledged.
    ///
    /// # Errors
    /// `Io` or `NoSpace`: what is on the disk is not known; every later call says `Poisoned`. The file is cut back to
    /// what was synced before; [`JournalWriter::was_cut_back`] says whether that worked.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        if self.poisoned {
            return Err(JournalError::Poisoned);
        }
        if !self.dirty {
            return Ok(());
        }
        let synced = self.file.sync_data();
        #[cfg(test)]
        let synced = if self.fault.sync_fails { Err(io::Error::other("a fault of the test")) } else { synced };
        if let Err(source) = synced {
            self.poisoned = true;
            // What was not synced was not acknowledged: it must not be found by whoever opens the file next, or a
            // sender that tries again would be told that it is there already.
            self.untouched = self.file.set_len(self.synced_len).is_ok();
            return Err(JournalError::io("sync", source));
        }
        self.dirty = false;
        self.synced_len = self.len;
        Ok(())
    }

    /// Bytes of the file, header included.
    // A journal is never empty in this sense: it has its header.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Number of the next record.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// What [`open`](Self::open) found; empty after [`create`](Self::create).
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// A reader of the same file.
    ///
    /// # Errors
    /// None today; the result leaves room for a reader with a descriptor of its own.
    pub fn reader(&self) -> Result<JournalReader, JournalError> {
        Ok(JournalReader { file: Arc::clone(&self.file), journal_id: self.journal_id })
    }
}

impl Drop for JournalWriter {
    fn drop(&mut self) {
        // Gives the space beyond the end back; if that fails, the next open does it.
        if !self.poisoned && self.allocated > self.len {
            let _ = self.file.set_len(self.len);
        }
        // Readers share the descriptor and would keep the lock.
        let _ = self.file.unlock();
    }
}

/// Reads records of one journal, from any thread, while it is written or not.
#[derive(Clone, Debug)]
pub struct JournalReader {
    file: Arc<File>,
    journal_id: u64,
}

impl JournalReader {
    /// Opens a journal to read.
    ///
    /// # Errors
    /// `Io`, `NotAJournal`, `Version`, `HeaderDamaged`.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let file = File::open(path).map_err(|e| JournalError::io("open", e))?;
        let journal_id = read_header(&file)?;
        Ok(Self { file: Arc::new(file), journal_id })
    }

    /// Reads the payload of a record into `out` (whose capacity is reused) and verifies head and payload.
    ///
    /// # Errors
    /// `Damaged` when the bytes are not the record `r` names; `Io`. `out` then holds nothing of use.
    pub fn read(&self, r: RecordRef, out: &mut Vec<u8>) -> Result<OwnedRecordHead, JournalError> {
        let damaged = |what| JournalError::Damaged { offset: r.offset, what };
        let read = |bytes: &mut [u8], at| match self.file.read_exact_at(bytes, at) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(damaged("the file ends before it")),
            Err(source) => Err(JournalError::Io { operation: "read", source }),
        };
        let head_len = r.payload_offset.checked_sub(r.offset).filter(|l| *l <= MAX_HEAD_LEN as u64);
        let Some(head_len) = head_len.filter(|l| *l >= RECORD_HEAD_LEN as u64) else {
            return Err(damaged("no such record"));
        };
        let mut head = [0u8; MAX_HEAD_LEN];
        let head = &mut head[..head_len as usize];
        read(head, r.offset)?;
        let parsed = parse_head(head, self.journal_id).ok_or_else(|| damaged("head checksum does not match"))?;
        if parsed.head_len as u64 != head_len || parsed.payload_len != r.payload_len {
            return Err(damaged("no such record"));
        }
        // Bounded by MAX_PAYLOAD_LEN, which parse_head checked.
        out.resize(parsed.payload_len as usize, 0);
        read(out, r.payload_offset)?;
        let mut checksum = seeded(self.journal_id);
        checksum.update(out);
        if checksum.finalize() != parsed.payload_crc32 {
            return Err(damaged("payload checksum does not match"));
        }
        Ok(parsed.head)
    }

    /// Scans the file as [`JournalWriter::open`] does and changes nothing: the good records, and what a writer would
    /// cut or report.
    ///
    /// # Errors
    /// `Io`, `HeaderDamaged`.
    pub fn scan(&self) -> Result<(Vec<(RecordRef, OwnedRecordHead)>, Recovery), JournalError> {
        let file_len = self.file.metadata().map_err(|e| JournalError::io("read", e))?.len();
        let scan = scan(&self.file, file_len)?;
        Ok((scan.records, scan.recovery))
    }
}

/// Head and strings, padded.
const MAX_HEAD_LEN: usize = RECORD_HEAD_LEN + 3 * MAX_UID_LEN + ALIGN;

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Takes the file for one process. File systems that cannot lock are let through.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(e)) => match Errno::from_io_error(&e) {
            Some(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(true),
            _ => Err(e),
        },
    }
}

fn lock(file: &File) -> Result<(), JournalError> {
    match try_lock(file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(JournalError::Locked),
        Err(e) => Err(JournalError::io("lock", e)),
    }
}

/// Makes a file's name durable.
fn sync_folder(path: &Path) -> Result<(), JournalError> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| JournalError::io("sync of the folder", e))
}

fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// A random number for a file's id.
pub(crate) fn random_id() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(u64::from_le_bytes(bytes))
}

fn seeded(id: u64) -> crc32fast::Hasher {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&id.to_le_bytes());
    hasher
}

/// Writes and syncs the header of an empty file; returns the journal id.
fn write_header(file: &File) -> Result<u64, JournalError> {
    let journal_id = random_id().map_err(|e| JournalError::io("create", e))?;
    let mut header = [0u8; HEADER_LEN];
    H_MAGIC.put(&mut header, &MAGIC);
    H_VERSION.put_uint(&mut header, u64::from(VERSION));
    H_HEADER_LEN.put_uint(&mut header, HEADER_LEN as u64);
    H_CREATED.put_uint(&mut header, unix_ns());
    H_JOURNAL_ID.put_uint(&mut header, journal_id);
    let checksum = crc32fast::hash(&header[..H_CHECKSUM.offset]);
    H_CHECKSUM.put_uint(&mut header, u64::from(checksum));
    file.write_all_at(&header, 0).map_err(|e| JournalError::io("create", e))?;
    file.sync_data().map_err(|e| JournalError::io("create", e))?;
    Ok(journal_id)
}

/// Checks the header; returns the journal id.
fn read_header(file: &File) -> Result<u64, JournalError> {
    let mut header = [0u8; HEADER_LEN];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(JournalError::NotAJournal),
        Err(e) => return Err(JournalError::io("open", e)),
    }
    if H_MAGIC.of(&header) != MAGIC {
        return Err(JournalError::NotAJournal);
    }
    if H_CHECKSUM.get_uint(&header) != u64::from(crc32fast::hash(&header[..H_CHECKSUM.offset])) {
        // A version that moved the checksum would end here too; its number says more.
        let found = H_VERSION.get_uint(&header) as u32;
        return Err(if found == VERSION { JournalError::HeaderDamaged } else { JournalError::Version { found } });
    }
    if H_VERSION.get_uint(&header) != u64::from(VERSION) || H_HEADER_LEN.get_uint(&header) != HEADER_LEN as u64 {
        return Err(JournalError::Version { found: H_VERSION.get_uint(&header) as u32 });
    }
    Ok(H_JOURNAL_ID.get_uint(&header))
}

/// Whether the making of the file was cut short: its header is torn and nothing follows, so that no record in it was
/// ever acknowledged. What is there must be the start of a header, or zeros: another program's file is not touched.
fn never_announced(file: &File, file_len: u64) -> Result<bool, JournalError> {
    let mut start = Vec::new();
    let mut from = Positioned { file, at: 0 };
    from.by_ref().take(HEADER_LEN as u64).read_to_end(&mut start).map_err(|e| JournalError::io("open", e))?;
    let whole = start.len();
    start.resize(HEADER_LEN, 0);
    let known = start.iter().zip(MAGIC).take_while(|(a, b)| **a == *b).count();
    if start[known..MAGIC.len()].iter().any(|&b| b != 0) {
        return Ok(false);
    }
    if ![0, u64::from(VERSION)].contains(&H_VERSION.get_uint(&start)) {
        return Ok(false);
    }
    let sound = H_CHECKSUM.get_uint(&start) == u64::from(crc32fast::hash(&start[..H_CHECKSUM.offset]));
    if sound && whole == HEADER_LEN {
        return Ok(false);
    }
    Ok(file_len <= HEADER_LEN as u64 || last_nonzero(file, HEADER_LEN as u64, file_len)?.is_none())
}

/// Reads a file from a position without moving its cursor.
struct Positioned<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Offset of the last byte in `from..to` that is not zero.
fn last_nonzero(file: &File, from: u64, to: u64) -> Result<Option<u64>, JournalError> {
    let mut buffer = vec![0u8; SCAN_LEN.min((to - from) as usize)];
    let mut end = to;
    while end > from {
        let n = (end - from).min(SCAN_LEN as u64);
        let part = &mut buffer[..n as usize];
        file.read_exact_at(part, end - n).map_err(|e| JournalError::io("open", e))?;
        if let Some(i) = part.iter().rposition(|&b| b != 0) {
            return Ok(Some(end - n + i as u64));
        }
        end -= n;
    }
    Ok(None)
}

fn encode_head(
    out: &mut Vec<u8>,
    journal_id: u64,
    sequence: u64,
    head: &RecordHead<'_>,
    payload: &[u8],
) -> Result<(), JournalError> {
    let too_large = |what, len: usize, max| JournalError::TooLarge { what, len: len as u64, max };
    let strings = [
        ("TransferSyntaxUID", head.transfer_syntax_uid, R_TRANSFER_SYNTAX_LEN),
        ("SOPClassUID", head.sop_class_uid, R_SOP_CLASS_LEN),
        ("SOPInstanceUID", head.sop_instance_uid, R_SOP_INSTANCE_LEN),
    ];
    for (what, text, _) in strings {
        if text.len() > MAX_UID_LEN {
            return Err(too_large(what, text.len(), MAX_UID_LEN as u64));
        }
    }
    if payload.len() as u64 > MAX_PAYLOAD_LEN {
        return Err(too_large("payload", payload.len(), MAX_PAYLOAD_LEN));
    }
    let mut fixed = [0u8; RECORD_HEAD_LEN];
    R_MAGIC.put(&mut fixed, &RECORD_MAGIC);
    R_KIND.put_uint(&mut fixed, u64::from(head.kind.to_u16()));
    R_SEQUENCE.put_uint(&mut fixed, sequence);
    R_RECEIVED.put_uint(&mut fixed, head.received_unix_ns);
    R_PAYLOAD_LEN.put_uint(&mut fixed, payload.len() as u64);
    let mut checksum = seeded(journal_id);
    checksum.update(payload);
    R_PAYLOAD_CHECKSUM.put_uint(&mut fixed, u64::from(checksum.finalize()));
    let mut checksum = seeded(journal_id);
    for (_, text, field) in strings {
        field.put_uint(&mut fixed, text.len() as u64);
    }
    checksum.update(&fixed[..R_HEAD_CHECKSUM.offset]);
    out.clear();
    out.extend_from_slice(&fixed);
    for (_, text, _) in strings {
        checksum.update(text.as_bytes());
        out.extend_from_slice(text.as_bytes());
    }
    R_HEAD_CHECKSUM.put_uint(out, u64::from(checksum.finalize()));
    out.resize(out.len().next_multiple_of(ALIGN), 0);
    Ok(())
}

struct ParsedHead {
    head: OwnedRecordHead,
    sequence: u64,
    /// Head, strings and padding.
    head_len: usize,
    payload_len: u64,
    payload_crc32: u32,
}

/// Parses and verifies a head at the start of `bytes`; `None` when it is none or is cut.
fn parse_head(bytes: &[u8], journal_id: u64) -> Option<ParsedHead> {
    let fixed = bytes.get(..RECORD_HEAD_LEN)?;
    if R_MAGIC.of(fixed) != RECORD_MAGIC {
        return None;
    }
    let lens = [R_TRANSFER_SYNTAX_LEN, R_SOP_CLASS_LEN, R_SOP_INSTANCE_LEN].map(|f| f.get_uint(fixed) as usize);
    if lens.iter().any(|&l| l > MAX_UID_LEN) {
        return None;
    }
    let strings = bytes.get(RECORD_HEAD_LEN..RECORD_HEAD_LEN + lens.iter().sum::<usize>())?;
    let mut checksum = seeded(journal_id);
    checksum.update(&fixed[..R_HEAD_CHECKSUM.offset]);
    checksum.update(strings);
    if u64::from(checksum.finalize()) != R_HEAD_CHECKSUM.get_uint(fixed) {
        return None;
    }
    let payload_len = R_PAYLOAD_LEN.get_uint(fixed);
    if payload_len > MAX_PAYLOAD_LEN {
        return None;
    }
    let (transfer_syntax, rest) = strings.split_at(lens[0]);
    let (sop_class, sop_instance) = rest.split_at(lens[1]);
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    Some(ParsedHead {
        head: OwnedRecordHead {
            kind: RecordKind::from_u16(R_KIND.get_uint(fixed))?,
            transfer_syntax_uid: text(transfer_syntax)?,
            sop_class_uid: text(sop_class)?,
            sop_instance_uid: text(sop_instance)?,
            received_unix_ns: R_RECEIVED.get_uint(fixed),
        },
        sequence: R_SEQUENCE.get_uint(fixed),
        head_len: (RECORD_HEAD_LEN + strings.len()).next_multiple_of(ALIGN),
        payload_len,
        payload_crc32: R_PAYLOAD_CHECKSUM.get_uint(fixed) as u32,
    })
}

/// A window on the file that moves forward.
struct Window<'a> {
    file: &'a File,
    file_len: u64,
    buffer: Vec<u8>,
    start: u64,
    filled: usize,
}

impl Window<'_> {
    /// Up to `len` bytes at `at`, fewer at the end of the file.
    fn bytes(&mut self, at: u64, len: usize) -> Result<&[u8], JournalError> {
        let len = len.min(usize::try_from(self.file_len.saturating_sub(at)).unwrap_or(usize::MAX));
        if at < self.start || at + len as u64 > self.start + self.filled as u64 {
            let n = SCAN_LEN.max(len).min((self.file_len - at) as usize);
            self.buffer.resize(SCAN_LEN.max(len), 0);
            self.filled = 0;
            self.file.read_exact_at(&mut self.buffer[..n], at).map_err(|e| JournalError::io("open", e))?;
            (self.start, self.filled) = (at, n);
        }
        let from = (at - self.start) as usize;
        Ok(&self.buffer[from..from + len])
    }
}

/// Reads the whole file; see "Recovery" in `docs/formats.md`.
fn scan(file: &File, file_len: u64) -> Result<Scan, JournalError> {
    let journal_id = read_header(file)?;
    let mut window = Window { file, file_len, buffer: Vec::new(), start: 0, filled: 0 };
    let mut records: Vec<(RecordRef, OwnedRecordHead)> = Vec::new();
    let mut damage: Vec<Damage> = Vec::new();
    let mut good_damage = 0;
    let (mut good_end, mut good_sequence) = (HEADER_LEN as u64, 0);
    let (mut at, mut sequence) = (good_end, 0u64);
    while at < file_len {
        let parsed = parse_head(window.bytes(at, MAX_HEAD_LEN)?, journal_id).filter(|p| p.sequence >= sequence);
        let Some(parsed) = parsed else {
            let Some((next, next_sequence)) = next_head(&mut window, at, journal_id, sequence)? else { break };
            damage.push(Damage { offset: at, len: next - at, records: next_sequence - sequence, head: None });
            (at, sequence) = (next, next_sequence);
            continue;
        };
        let record =
            RecordRef { offset: at, payload_offset: at + parsed.head_len as u64, payload_len: parsed.payload_len };
        let end = record.end();
        if end > file_len {
            break;
        }
        // The jump without any bytes between cannot come from a writer, but from lost ones.
        if parsed.sequence > sequence {
            damage.push(Damage { offset: at, len: 0, records: parsed.sequence - sequence, head: None });
        }
        let mut checksum = seeded(journal_id);
        let payload_end = record.payload_offset + record.payload_len;
        let mut from = record.payload_offset;
        while from < payload_end {
            let n = (payload_end - from).min(SCAN_LEN as u64) as usize;
            checksum.update(window.bytes(from, n)?);
            from += n as u64;
        }
        if checksum.finalize() == parsed.payload_crc32 {
            records.push((record, parsed.head));
            (good_end, good_sequence, good_damage) = (end, parsed.sequence + 1, damage.len());
        } else {
            damage.push(Damage { offset: at, len: end - at, records: 1, head: Some(parsed.head) });
        }
        (at, sequence) = (end, parsed.sequence + 1);
    }
    let torn = damage.split_off(good_damage);
    let torn_bytes = last_nonzero(file, good_end, file_len)?.map_or(0, |last| last + 1 - good_end);
    let recovery = Recovery {
        records: records.len() as u64,
        torn_bytes,
        torn_heads: torn.into_iter().filter_map(|d| d.head).collect(),
        damage,
    };
    Ok(Scan { journal_id, records, end: good_end, next_sequence: good_sequence, recovery })
}

/// The next right head after `from` whose sequence is at least `sequence`.
fn next_head(
    window: &mut Window<'_>,
    from: u64,
    journal_id: u64,
    sequence: u64,
) -> Result<Option<(u64, u64)>, JournalError> {
    let mut at = from + ALIGN as u64;
    while at < window.file_len {
        let bytes = window.bytes(at, SCAN_LEN / 2)?;
        let here = bytes.chunks(ALIGN).position(|c| c.starts_with(&RECORD_MAGIC));
        let Some(blocks) = here else {
            at += bytes.len().next_multiple_of(ALIGN) as u64;
            continue;
        };
        at += (blocks * ALIGN) as u64;
        if let Some(parsed) = parse_head(window.bytes(at, MAX_HEAD_LEN)?, journal_id)
            && parsed.sequence >= sequence
        {
            return Ok(Some((at, parsed.sequence)));
        }
        at += ALIGN as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Seeded faults of the write call.
    #[derive(Debug, Default)]
    pub(super) struct Fault {
        /// Each write takes at most this many bytes.
        short: Option<usize>,
        /// Writes left before the disk is full.
        writes_left: Option<usize>,
        /// The next sync fails.
        pub(super) sync_fails: bool,
    }

    impl Fault {
        pub(super) fn write(&mut self, file: &File, parts: &[IoSlice<'_>], at: u64) -> Option<io::Result<usize>> {
            if let Some(left) = &mut self.writes_left {
                if *left == 0 {
                    return Some(Err(Errno::NOSPC.into()));
                }
                *left -= 1;
            }
            let part = &parts[0][..self.short?.min(parts[0].len())];
            Some(file.write_all_at(part, at).map(|()| part.len()))
        }
    }

    fn head(uid: &str) -> RecordHead<'_> {
        RecordHead {
            kind: RecordKind::Dataset,
            transfer_syntax_uid: "1.2.840.10008.1.2",
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.2",
            sop_instance_uid: uid,
            received_unix_ns: 7,
        }
    }

    fn payload(k: usize) -> Vec<u8> {
        (0..k * 13 % 70).map(|i| (i * 31 + k * 7 + 1) as u8).collect()
    }

    /// A journal of `n` records; also the file's length after each.
    fn written(path: &Path, n: usize) -> Vec<u64> {
        let mut writer = JournalWriter::create(path).expect("create");
        (0..n)
            .map(|k| {
                let r = writer.append(&head(&format!("1.2.{k}")), &payload(k)).expect("append");
                writer.sync().expect("sync");
                assert_eq!(r.offset % ALIGN as u64, 0);
                assert_eq!(r.payload_offset % ALIGN as u64, 0);
                writer.len()
            })
            .collect()
    }

    /// A folder for tests that open thousands of times: in memory where there is one, so that syncs cost nothing.
    fn quick_dir() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("tempdir")
    }

    /// The bytes of a journal of 12 records.
    fn template() -> Vec<u8> {
        static TEMPLATE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let make = || {
            let dir = tempfile::tempdir().expect("tempdir");
            written(&dir.path().join("j"), 12);
            std::fs::read(dir.path().join("j")).expect("read")
        };
        TEMPLATE.get_or_init(make).clone()
    }

    fn check(writer: &JournalWriter, records: &[(RecordRef, OwnedRecordHead)]) -> Vec<usize> {
        let reader = writer.reader().expect("reader");
        let mut out = Vec::new();
        records
            .iter()
            .map(|(r, h)| {
                assert_eq!(&reader.read(*r, &mut out).expect("a recovered record must read"), h);
                let k: usize = h.sop_instance_uid.strip_prefix("1.2.").and_then(|k| k.parse().ok()).expect("own uid");
                assert_eq!((h.as_head(), &out), (head(&format!("1.2.{k}")), &payload(k)));
                k
            })
            .collect()
    }

    #[test]
    fn what_was_appended_is_read_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let ends = written(&path, 9);
        assert_eq!(std::fs::metadata(&path).expect("stat").len(), ends[8], "no length beyond the records");
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), (0..9).collect::<Vec<_>>());
        assert_eq!(writer.recovery(), &Recovery { records: 9, ..Default::default() });
        let reader = JournalReader::open(&path).expect("open");
        assert_eq!(reader.scan().expect("scan").0, records);
        let wrong = RecordRef { offset: records[1].0.offset + 8, ..records[1].0 };
        assert!(matches!(reader.read(wrong, &mut Vec::new()), Err(JournalError::Damaged { .. })));
        let huge = RecordRef { payload_len: u64::MAX, ..records[1].0 };
        assert!(matches!(reader.read(huge, &mut Vec::new()), Err(JournalError::Damaged { .. })));
        assert!(!format!("{:?}", records[3].1).contains("1.2.3"), "no instance UID in logs");
    }

    #[test]
    fn a_cut_at_every_byte_leaves_exactly_the_acknowledged_records() {
        let dir = quick_dir();
        let (path, cut_path) = (dir.path().join("j"), dir.path().join("cut"));
        let ends = written(&path, 6);
        let bytes = std::fs::read(&path).expect("read");
        for cut in 0..=bytes.len() {
            // As it is, and with the zeros of space taken ahead behind it.
            for zeros in [0, 100] {
                let mut torn = bytes[..cut].to_vec();
                torn.resize(cut + zeros, 0);
                std::fs::write(&cut_path, &torn).expect("write");
                // Zeros may replace padding that was cut: that loses nothing.
                let whole = |e: usize| e <= cut || e <= cut + zeros && bytes[cut..e].iter().all(|&b| b == 0);
                let kept = ends.iter().filter(|&&e| whole(e as usize)).count();
                let (mut writer, records) = JournalWriter::open(&cut_path).expect("a cut journal must open");
                let found = check(&writer, &records);
                assert_eq!(found, (0..kept).collect::<Vec<_>>(), "cut at {cut}");
                assert!(writer.recovery().damage.is_empty());
                // The journal goes on. (Memory file systems fill what is taken ahead: take little.)
                writer.ahead = 4096;
                writer.append(&head("1.2.7"), &payload(7)).expect("append");
                writer.sync().expect("sync");
                drop(writer);
                let (writer, records) = JournalWriter::open(&cut_path).expect("open");
                assert_eq!(check(&writer, &records), (0..kept).chain([7]).collect::<Vec<_>>());
                assert_eq!(writer.recovery().torn_bytes, 0);
            }
        }
    }

    #[test]
    fn lost_sectors_of_the_unsynced_tail_never_touch_synced_records() {
        let dir = quick_dir();
        let (path, crash_path) = (dir.path().join("j"), dir.path().join("crash"));
        let ends = written(&path, 60);
        let bytes = std::fs::read(&path).expect("read");
        let mut x = 0x9E37_79B9_7F4A_7C15u64;
        for round in 0..200u64 {
            let synced = (round as usize * 7) % 50 + 1;
            let from = ends[synced - 1] as usize;
            let mut crashed = bytes.clone();
            for sector in (from / 512)..bytes.len().div_ceil(512) {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if x >> 63 == 0 {
                    let part = (sector * 512).max(from)..((sector + 1) * 512).min(bytes.len());
                    crashed[part].fill(0);
                }
            }
            std::fs::write(&crash_path, &crashed).expect("write");
            let (writer, records) = JournalWriter::open(&crash_path).expect("open");
            let found = check(&writer, &records);
            assert_eq!(found[..synced], (0..synced).collect::<Vec<_>>());
            assert!(found.windows(2).all(|w| w[0] < w[1]));
            let reported: u64 = writer.recovery().damage.iter().map(|d| d.records).sum();
            assert_eq!(reported, (found.last().expect("some") + 1 - found.len()) as u64, "each loss is counted");
        }
    }

    #[test]
    fn damage_in_the_middle_is_reported_and_later_records_are_kept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let ends = written(&path, 8);
        let bytes = std::fs::read(&path).expect("read");
        let (_, heads) = JournalReader::open(&path).map(|r| ((), r.scan().expect("scan").0)).expect("open");
        // A payload byte: the head stands.
        let mut spoiled = bytes.clone();
        spoiled[heads[3].0.payload_offset as usize] ^= 1;
        std::fs::write(&path, &spoiled).expect("write");
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [0, 1, 2, 4, 5, 6, 7]);
        let damage = &writer.recovery().damage;
        assert_eq!((damage.len(), damage[0].offset, damage[0].len), (1, ends[2], ends[3] - ends[2]));
        assert_eq!(damage[0].head.as_ref().map(|h| h.sop_instance_uid.as_str()), Some("1.2.3"));
        drop(writer);
        // The heads of two records.
        let mut spoiled = bytes.clone();
        spoiled[ends[2] as usize + R_PAYLOAD_LEN.offset + 7] ^= 0x80;
        spoiled[ends[3] as usize] ^= 1;
        std::fs::write(&path, &spoiled).expect("write");
        let (mut writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [0, 1, 2, 5, 6, 7]);
        let expected = Damage { offset: ends[2], len: ends[4] - ends[2], records: 2, head: None };
        assert_eq!(writer.recovery().damage, [expected]);
        assert_eq!(writer.recovery().torn_bytes, 0);
        writer.append(&head("1.2.8"), &payload(8)).expect("append");
        drop(writer);
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [0, 1, 2, 5, 6, 7, 8]);
        drop(writer);
        // The last payload: torn, its head told.
        let mut spoiled = bytes;
        spoiled[heads[7].0.payload_offset as usize] ^= 1;
        std::fs::write(&path, &spoiled).expect("write");
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), (0..7).collect::<Vec<_>>());
        assert_eq!(writer.recovery().torn_heads.len(), 1);
        assert!(writer.recovery().torn_bytes > 0 && writer.len() == ends[6]);
    }

    #[test]
    fn a_journal_within_a_payload_is_not_taken_for_records() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (inner_path, path) = (dir.path().join("inner"), dir.path().join("j"));
        written(&inner_path, 5);
        let inner = std::fs::read(&inner_path).expect("read");
        let mut writer = JournalWriter::create(&path).expect("create");
        let first = writer.append(&head("1.2.0"), &inner).expect("append");
        writer.append(&head("1.2.1"), &payload(1)).expect("append");
        drop(writer);
        let mut bytes = std::fs::read(&path).expect("read");
        bytes[first.offset as usize] ^= 1;
        std::fs::write(&path, &bytes).expect("write");
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [1]);
        assert_eq!(writer.recovery().damage.len(), 1);
    }

    #[test]
    fn a_payload_longer_than_the_scan_window_is_kept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let big: Vec<u8> = (0..3 * SCAN_LEN + 5).map(|i| (i % 251) as u8).collect();
        let mut writer = JournalWriter::create(&path).expect("create");
        writer.append(&head("1.2.0"), &payload(0)).expect("append");
        writer.append(&head("big"), &big).expect("append");
        writer.append(&head("1.2.2"), &payload(2)).expect("append");
        drop(writer);
        // The small record's head is damaged, so that the search runs into the big one.
        let mut bytes = std::fs::read(&path).expect("read");
        bytes[HEADER_LEN] ^= 1;
        std::fs::write(&path, &bytes).expect("write");
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(records.len(), 2);
        let mut out = Vec::new();
        writer.reader().expect("reader").read(records[0].0, &mut out).expect("read");
        assert_eq!(out, big);
        assert_eq!(check(&writer, &records[1..]), [2]);
    }

    #[test]
    fn short_writes_are_continued() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let mut writer = JournalWriter::create(&path).expect("create");
        for (k, short) in [(0, 1), (5, 3), (3, 64), (4, 1000)] {
            writer.fault = Fault { short: Some(short), ..Fault::default() };
            writer.append(&head(&format!("1.2.{k}")), &payload(k)).expect("append");
        }
        drop(writer);
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [0, 5, 3, 4]);
    }

    #[test]
    fn a_disk_that_fills_in_the_middle_of_a_write_leaves_the_file_as_it_was() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let mut writer = JournalWriter::create(&path).expect("create");
        writer.append(&head("1.2.1"), &payload(1)).expect("append");
        let len = writer.len();
        for writes in 0..5 {
            writer.fault = Fault { short: Some(20), writes_left: Some(writes), ..Fault::default() };
            let error = writer.append(&head("1.2.9"), &payload(9)).expect_err("full");
            assert!(error.is_no_space(), "{error}");
            assert_eq!((writer.len(), std::fs::metadata(&path).expect("stat").len()), (len, len));
        }
        writer.fault = Fault::default();
        writer.append(&head("1.2.2"), &payload(2)).expect("space again");
        drop(writer);
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [1, 2]);
    }

    #[test]
    fn what_a_failed_sync_left_unsynced_is_not_found_by_the_next_writer() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let mut writer = JournalWriter::create(&path).expect("create");
        writer.append(&head("1.2.1"), &payload(1)).expect("append");
        writer.sync().expect("sync");
        writer.append(&head("1.2.2"), &payload(2)).expect("append");
        writer.fault.sync_fails = true;
        writer.sync().expect_err("the disk");
        assert!(writer.was_cut_back());
        assert!(matches!(writer.append(&head("1.2.3"), &payload(3)), Err(JournalError::Poisoned)));
        drop(writer);
        let (mut writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [1], "the second was not acknowledged");
        writer.append(&head("1.2.2"), &payload(2)).expect("the sender tries again");
        writer.sync().expect("sync");
        drop(writer);
        let (writer, records) = JournalWriter::open(&path).expect("open");
        assert_eq!(check(&writer, &records), [1, 2]);
    }

    #[test]
    fn a_second_writer_is_refused_while_the_first_lives() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        let writer = JournalWriter::create(&path).expect("create");
        let reader = writer.reader().expect("reader");
        assert!(matches!(JournalWriter::open(&path), Err(JournalError::Locked)));
        assert!(matches!(JournalWriter::create(&path), Err(JournalError::Io { .. })), "never overwritten");
        drop(writer);
        JournalWriter::open(&path).expect("readers do not hold the lock");
        drop(reader);
    }

    #[test]
    fn too_long_parts_are_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut writer = JournalWriter::create(&dir.path().join("j")).expect("create");
        let long = "1".repeat(MAX_UID_LEN + 1);
        assert!(matches!(writer.append(&head(&long), &[]), Err(JournalError::TooLarge { .. })));
        assert_eq!(writer.len(), HEADER_LEN as u64);
        writer.append(&head(&long[1..]), &[]).expect("the longest");
    }

    #[test]
    fn other_files_are_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("j");
        written(&path, 2);
        let good = std::fs::read(&path).expect("read");
        let refuse = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("write");
            let error = JournalWriter::open(&path).expect_err("must be refused");
            assert_eq!(std::fs::read(&path).expect("read"), bytes);
            error
        };
        assert!(matches!(refuse(b"short, but not ours"), JournalError::NotAJournal));
        assert!(matches!(refuse(&[b'x'; 4096]), JournalError::NotAJournal));
        let mut newer = good.clone();
        newer[H_VERSION.offset] = 2;
        assert!(matches!(refuse(&newer), JournalError::Version { found: 2 }));
        let checksum = crc32fast::hash(&newer[..60]).to_le_bytes();
        newer[60..64].copy_from_slice(&checksum);
        assert!(matches!(refuse(&newer), JournalError::Version { found: 2 }));
        let mut damaged = good;
        damaged[H_JOURNAL_ID.offset] ^= 1;
        assert!(matches!(refuse(&damaged), JournalError::HeaderDamaged));
        assert!(matches!(JournalWriter::open(&dir.path().join("none")), Err(JournalError::Io { .. })));
        assert!(matches!(JournalReader::open(dir.path()), Err(JournalError::Io { .. })));
    }

    #[test]
    fn only_what_no_second_try_can_read_is_unreadable() {
        let io = |errno: Errno| JournalError::io("open", errno);
        assert!(JournalError::HeaderDamaged.is_unreadable() && JournalError::NotAJournal.is_unreadable());
        assert!(io(Errno::IO).is_unreadable());
        let passing = [io(Errno::MFILE), io(Errno::NOSPC), JournalError::Locked, JournalError::Version { found: 9 }];
        assert!(passing.iter().all(|e| !e.is_unreadable()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn garbage_never_panics_and_never_yields_a_wrong_record(
            flips in proptest::collection::vec((0usize..2000, any::<u8>()), 0..12), cut in 0usize..2000, extend in 0usize..300,
            fill: u8, swap in proptest::option::of((0usize..1500, 0usize..1500, 1usize..300))) {
            let dir = quick_dir();
            let path = dir.path().join("j");
            let mut bytes = template();
            for (at, with) in flips {
                let at = at % bytes.len();
                bytes[at] ^= with;
            }
            if let Some((from, to, len)) = swap {
                let from = from % (bytes.len() - len);
                let to = to % (bytes.len() - len);
                bytes.copy_within(from..from + len, to);
            }
            bytes.truncate(cut.max(1));
            let len = bytes.len() + extend;
            bytes.resize(len, fill);
            std::fs::write(&path, &bytes)?;
            if let Ok((writer, records)) = JournalWriter::open(&path) {
                let found = check(&writer, &records);
                prop_assert!(found.windows(2).all(|w| w[0] < w[1]));
            }
        }

        #[test]
        fn pure_garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), ours: bool) {
            let dir = quick_dir();
            let path = dir.path().join("j");
            let mut content = Vec::new();
            if ours {
                content = template()[..HEADER_LEN].to_vec();
            }
            content.extend(bytes);
            std::fs::write(&path, &content)?;
            if let Ok((writer, records)) = JournalWriter::open(&path) {
                prop_assert!(records.is_empty() && writer.len() >= HEADER_LEN as u64);
            }
        }
    }
}
