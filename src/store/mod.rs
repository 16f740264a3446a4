//! The durable record: studies, series, results, outbox and audit trail in one SQLite file.
//!
//! Input: outcomes the pipeline publishes ([`NewOutcome`]) with what shall leave ([`OutboxDraft`]). Output: the stored
//! results, and items leased to the outbox's workers.
//!
//! Invariants:
//! - an outcome, its outbox items and its audit line are committed in one transaction, synced to disk before
//!   [`StoreHandle::commit_outcome`] returns;
//! - an outcome is named by its series and revision: committing the same again changes nothing and returns the UIDs
//!   of the first time, so a repetition after a crash never doubles;
//! - a study has at most one live result, and it is never a superseded one (a partial unique index holds it); with
//!   [`StoreHandle::commit_outcome_ranked`] it is chosen anew from the latest results of all its series at each commit;
//! - what a result says of itself changes only in `live` and its alert; each such edition has its number;
//! - an item is delivered at least once; a crash during an attempt makes it due again;
//! - the audit trail is only appended to (triggers refuse the rest).
//!
//! [`Store`] is a description that can be cloned and shared; each thread opens its own [`StoreHandle`], a connection.
//! The file is in WAL mode with `synchronous = FULL`, mode 0600. UIDs of studies and series are in it, no names, dates
//! or images. The layout is drawn in `docs/store.md`.
//!
//! Absent: any knowledge of what a document or a payload says, and of how it is delivered.

mod outbox;
mod outcome;
mod schema;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::telemetry::StudyHash;

pub use outbox::{LEASE_MS, Leased, OutboxCounts, OutboxDraft, OutboxEntry, Payload};
pub use outcome::{
    CommittedOutcome, DecidedBody, ListResults, MAX_LIST, NewOutcome, OutcomeBody, Restated, ResultIds, ResultRecord,
    RetentionReport, SeriesState, StudyRecord,
};
pub use schema::{APPLICATION_ID, SCHEMA_VERSION};

/// How long a connection waits for another one's write before [`StoreError::Busy`].
///
/// A write is a handful of rows and one sync: tens of milliseconds on a disk, so 10 s is hundreds of them in a row.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Pages of the WAL from which a commit itself moves them into the database file: 64 MiB. Until then
/// [`StoreHandle::checkpoint`] does it, so that no alert waits for the two syncs it takes.
const WAL_PAGES: u32 = 16_384;

/// Largest payload or document, bytes: an SR or a JSON document is some KiB, a secondary capture some MiB.
pub const MAX_PAYLOAD_BYTES: usize = 32 << 20;

/// Why the store cannot do what was asked. No message repeats a UID, a document or a path.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk or the quota is full.
    #[error("{operation}: no space left for the store; free some and try again")]
    NoSpace {
        /// What was tried.
        operation: &'static str,
    },
    /// Another process or thread kept the store locked.
    #[error("{operation}: the store stayed locked for {} s; is another process using it?", BUSY_TIMEOUT.as_secs())]
    Busy {
        /// What was tried.
        operation: &'static str,
    },
    /// The file is another program's, or none of SQLite's.
    #[error("open the store: expected a darnet store, got another kind of file")]
    NotAStore,
    /// The file was written by a later version.
    #[error(
        "open the store: its schema version {found} is later than {SCHEMA_VERSION}, which this program knows; update it"
    )]
    TooNew {
        /// The version found.
        found: i64,
    },
    /// The file cannot be made.
    #[error("create the store: {0}")]
    Create(std::io::Error),
    /// A value that must not be stored.
    #[error("{operation}: {fault}")]
    Invalid {
        /// What was tried.
        operation: &'static str,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// There is no such row.
    #[error("{operation}: not found")]
    NotFound {
        /// What was tried.
        operation: &'static str,
    },
    /// The system gave no random bytes.
    #[error("make a result UID: the system gave no random bytes")]
    NoRandom,
    /// Any other fault of SQLite, by its extended code: messages of SQLite may quote values.
    #[error("{operation}: SQLite error {code}")]
    Sqlite {
        /// What was tried.
        operation: &'static str,
        /// The extended result code, 0 when the fault is not SQLite's own.
        code: i32,
    },
}

/// Turns a fault of rusqlite into one of ours, for `map_err`.
pub(super) fn fault(operation: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |e| match &e {
        rusqlite::Error::SqliteFailure(inner, _) => match inner.code {
            rusqlite::ErrorCode::DiskFull => StoreError::NoSpace { operation },
            rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked => StoreError::Busy { operation },
            rusqlite::ErrorCode::NotADatabase => StoreError::NotAStore,
            _ => StoreError::Sqlite { operation, code: inner.extended_code },
        },
        rusqlite::Error::QueryReturnedNoRows => StoreError::NotFound { operation },
        _ => StoreError::Sqlite { operation, code: 0 },
    }
}

/// Where the store is. Cheap to clone; makes connections.
#[derive(Clone)]
pub struct Store {
    path: Arc<PathBuf>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Opens the file at `path`, makes it (mode 0600) if it is not there, and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        use std::os::unix::fs::OpenOptionsExt as _;
        // SQLite gives the WAL and the shared-memory file the permissions of the database file.
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(StoreError::Create)?;
        let store = Self { path: Arc::new(path.to_path_buf()) };
        let mut connection = store.connect(OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        schema::migrate(&mut connection)?;
        Ok(store)
    }

    /// A connection for the calling thread.
    pub fn handle(&self) -> Result<StoreHandle, StoreError> {
        Ok(StoreHandle { connection: self.connect(OpenFlags::SQLITE_OPEN_READ_WRITE)? })
    }

    /// A connection that cannot write, for the web pages.
    pub fn reader(&self) -> Result<StoreHandle, StoreError> {
        let handle = self.handle()?;
        handle.connection.pragma_update(None, "query_only", true).map_err(fault("open the store"))?;
        Ok(handle)
    }

    fn connect(&self, flags: OpenFlags) -> Result<Connection, StoreError> {
        const OPERATION: &str = "open the store";
        let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let c = Connection::open_with_flags(self.path.as_path(), flags).map_err(fault(OPERATION))?;
        c.busy_timeout(BUSY_TIMEOUT).map_err(fault(OPERATION))?;
        c.pragma_update(None, "journal_mode", "WAL").map_err(fault(OPERATION))?;
        c.pragma_update(None, "synchronous", "FULL").map_err(fault(OPERATION))?;
        c.pragma_update(None, "wal_autocheckpoint", WAL_PAGES).map_err(fault(OPERATION))?;
        c.pragma_update(None, "foreign_keys", true).map_err(fault(OPERATION))?;
        // What retention deletes is overwritten, not only unlinked.
        c.pragma_update(None, "secure_delete", true).map_err(fault(OPERATION))?;
        c.pragma_update(None, "trusted_schema", false).map_err(fault(OPERATION))?;
        Ok(c)
    }
}

/// One connection to the store. It belongs to one thread at a time.
pub struct StoreHandle {
    connection: Connection,
}

impl std::fmt::Debug for StoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoreHandle")
    }
}

impl StoreHandle {
    /// Whether the store answers a query.
    pub fn ping(&self) -> Result<(), StoreError> {
        self.connection
            .query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0))
            .map(drop)
            .map_err(fault("query the store"))
    }

    /// SQLite's own check of the file, and of the foreign keys. True when sound. Reads the whole file.
    pub fn is_sound(&self) -> Result<bool, StoreError> {
        const OPERATION: &str = "check the store";
        let verdict: String =
            self.connection.query_row("PRAGMA quick_check(1)", [], |r| r.get(0)).map_err(fault(OPERATION))?;
        let mut statement = self.connection.prepare("PRAGMA foreign_key_check").map_err(fault(OPERATION))?;
        let dangling = statement.exists([]).map_err(fault(OPERATION))?;
        Ok(verdict == "ok" && !dangling)
    }

    /// Moves what is in the WAL into the database file, as far as nobody reads it, and syncs both. Waits for nobody. To be
    /// called now and then by a thread that nobody waits for.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        self.connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))
            .map_err(fault("move the store's log"))
    }

    /// Appends a line to the audit trail. `detail` is JSON or text without patient data.
    pub fn audit(
        &mut self,
        at_ms: i64,
        event: &str,
        study: Option<&StudyHash>,
        series: Option<&StudyHash>,
        detail: &str,
    ) -> Result<(), StoreError> {
        schema::append_audit(&self.connection, at_ms, event, study, series, detail)
    }

    /// The last `limit` lines of the audit trail, newest first.
    pub fn audit_tail(&self, limit: u32) -> Result<Vec<AuditRecord>, StoreError> {
        const OPERATION: &str = "read the audit trail";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT id, at_ms, event, study_hash, series_hash, detail FROM audit ORDER BY id DESC LIMIT ?1",
            )
            .map_err(fault(OPERATION))?;
        let rows = statement
            .query_map([limit.min(MAX_LIST)], |r| {
                Ok(AuditRecord {
                    id: r.get(0)?,
                    at_ms: r.get(1)?,
                    event: r.get(2)?,
                    study: r.get(3)?,
                    series: r.get(4)?,
                    detail: r.get(5)?,
                })
            })
            .map_err(fault(OPERATION))?;
        rows.collect::<Result<_, _>>().map_err(fault(OPERATION))
    }

    /// A write transaction: takes the write lock at once, so that it never fails half way for a lock.
    fn write<T>(
        &mut self,
        operation: &'static str,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let tx = self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault(operation))?;
        let out = work(&tx)?;
        tx.commit().map_err(fault(operation))?;
        Ok(out)
    }
}

/// A line of the audit trail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRecord {
    /// Rising number.
    pub id: i64,
    /// Unix time, ms.
    pub at_ms: i64,
    /// What happened.
    pub event: String,
    /// Study, if any.
    pub study: Option<String>,
    /// Series, if any.
    pub series: Option<String>,
    /// More.
    pub detail: String,
}

/// Unix time in milliseconds; 0 before 1970.
pub fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
