//! The tables and how an older file is brought up to date.

use rusqlite::{Connection, TransactionBehavior, params};

use super::{StoreError, fault};
use crate::telemetry::StudyHash;

/// `PRAGMA application_id`: "DARN".
pub const APPLICATION_ID: i64 = 0x4441_524E;

/// `PRAGMA user_version` of the present schema: the number of migrations.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;

/// Each brings a file from version `i` to `i + 1`. Only ever append.
pub(super) const MIGRATIONS: [&str; 2] = [V1, V2];

const V1: &str = "
CREATE TABLE studies (
    hash TEXT PRIMARY KEY CHECK (length(hash) = 32),
    study_instance_uid TEXT NOT NULL,
    first_seen_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX studies_by_update ON studies (updated_ms);

CREATE TABLE series (
    hash TEXT PRIMARY KEY CHECK (length(hash) = 32),
    study_hash TEXT NOT NULL REFERENCES studies (hash) ON DELETE CASCADE,
    series_instance_uid TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'complete', 'published')),
    slices INTEGER NOT NULL CHECK (slices >= 0),
    first_seen_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX series_by_study ON series (study_hash);

CREATE TABLE results (
    result_uid TEXT PRIMARY KEY CHECK (result_uid GLOB '2.25.[1-9]*'),
    study_hash TEXT NOT NULL REFERENCES studies (hash) ON DELETE CASCADE,
    series_hash TEXT NOT NULL REFERENCES series (hash) ON DELETE CASCADE,
    revision INTEGER NOT NULL CHECK (revision >= 1),
    slices INTEGER NOT NULL CHECK (slices >= 0),
    outcome TEXT NOT NULL CHECK (outcome IN ('result', 'no_result')),
    reason TEXT CHECK ((outcome = 'no_result') = (reason IS NOT NULL)),
    document TEXT NOT NULL,
    supersedes TEXT REFERENCES results (result_uid) ON DELETE CASCADE,
    live INTEGER NOT NULL CHECK (live IN (0, 1)),
    alerted INTEGER NOT NULL CHECK (alerted IN (0, 1)),
    created_at_ms INTEGER NOT NULL,
    UNIQUE (series_hash, revision)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX one_live_result_a_study ON results (study_hash) WHERE live = 1;
CREATE UNIQUE INDEX one_successor_a_result ON results (supersedes) WHERE supersedes IS NOT NULL;
CREATE INDEX results_by_study ON results (study_hash);
CREATE INDEX results_by_time ON results (created_at_ms);

CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    result_uid TEXT NOT NULL REFERENCES results (result_uid) ON DELETE CASCADE,
    sink TEXT NOT NULL,
    payload BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'sending', 'delivered', 'dead')),
    attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    attempts_at_resend INTEGER NOT NULL DEFAULT 0,
    next_attempt_ms INTEGER NOT NULL,
    last_error TEXT,
    created_at_ms INTEGER NOT NULL,
    delivered_at_ms INTEGER CHECK ((state = 'delivered') = (delivered_at_ms IS NOT NULL)),
    UNIQUE (result_uid, sink)
) STRICT;
CREATE INDEX outbox_due ON outbox (sink, next_attempt_ms) WHERE state IN ('pending', 'sending');
CREATE INDEX outbox_by_state ON outbox (state);

CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    event TEXT NOT NULL,
    study_hash TEXT,
    series_hash TEXT,
    detail TEXT NOT NULL
) STRICT;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'append only'); END;
";

/// Editions: a result may change `live` and its alert, and each edition leaves once.
const V2: &str = "
ALTER TABLE results ADD COLUMN edition INTEGER NOT NULL DEFAULT 1 CHECK (edition >= 1);
CREATE TABLE outbox_v2 (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    result_uid TEXT NOT NULL REFERENCES results (result_uid) ON DELETE CASCADE,
    edition INTEGER NOT NULL DEFAULT 1 CHECK (edition >= 1),
    sink TEXT NOT NULL,
    payload BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'sending', 'delivered', 'dead')),
    attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    attempts_at_resend INTEGER NOT NULL DEFAULT 0,
    next_attempt_ms INTEGER NOT NULL,
    last_error TEXT,
    created_at_ms INTEGER NOT NULL,
    delivered_at_ms INTEGER CHECK ((state = 'delivered') = (delivered_at_ms IS NOT NULL)),
    UNIQUE (result_uid, sink, edition)
) STRICT;
INSERT INTO outbox_v2 (id, result_uid, sink, payload, state, attempts, attempts_at_resend, next_attempt_ms, last_error,
                       created_at_ms, delivered_at_ms)
    SELECT id, result_uid, sink, payload, state, attempts, attempts_at_resend, next_attempt_ms, last_error,
           created_at_ms, delivered_at_ms FROM outbox;
DELETE FROM sqlite_sequence WHERE name = 'outbox_v2';
INSERT INTO sqlite_sequence (name, seq) SELECT 'outbox_v2', seq FROM sqlite_sequence WHERE name = 'outbox';
DROP TABLE outbox;
ALTER TABLE outbox_v2 RENAME TO outbox;
CREATE INDEX outbox_due ON outbox (sink, next_attempt_ms) WHERE state IN ('pending', 'sending');
CREATE INDEX outbox_by_state ON outbox (state);
";

/// Brings the file to [`SCHEMA_VERSION`], all or nothing.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    const OPERATION: &str = "update the store's schema";
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault(OPERATION))?;
    let read = |name: &str| tx.pragma_query_value(None, name, |r| r.get::<_, i64>(0)).map_err(fault(OPERATION));
    let (id, found) = (read("application_id")?, read("user_version")?);
    let tables: i64 = tx.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0)).map_err(fault(OPERATION))?;
    let is_new = id == 0 && found == 0 && tables == 0;
    if id != APPLICATION_ID && !is_new {
        return Err(StoreError::NotAStore);
    }
    if found > SCHEMA_VERSION {
        return Err(StoreError::TooNew { found });
    }
    let done = usize::try_from(found).map_err(|_| StoreError::NotAStore)?;
    for migration in &MIGRATIONS[done..] {
        tx.execute_batch(migration).map_err(fault(OPERATION))?;
    }
    if is_new || found < SCHEMA_VERSION {
        tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(fault(OPERATION))?;
        tx.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(fault(OPERATION))?;
    }
    tx.commit().map_err(fault(OPERATION))
}

pub(super) fn append_audit(
    connection: &Connection,
    at_ms: i64,
    event: &str,
    study: Option<&StudyHash>,
    series: Option<&StudyHash>,
    detail: &str,
) -> Result<(), StoreError> {
    const OPERATION: &str = "append to the audit trail";
    let mut statement = connection
        .prepare_cached("INSERT INTO audit (at_ms, event, study_hash, series_hash, detail) VALUES (?1, ?2, ?3, ?4, ?5)")
        .map_err(fault(OPERATION))?;
    statement
        .execute(params![at_ms, event, study.map(StudyHash::as_str), series.map(StudyHash::as_str), detail])
        .map_err(fault(OPERATION))?;
    Ok(())
}
