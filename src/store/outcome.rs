//! Studies, series and results.

use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};

use super::outbox::{OutboxDraft, insert_drafts};
use super::{MAX_PAYLOAD_BYTES, StoreError, StoreHandle, fault, schema};
use crate::telemetry::StudyHash;

/// Most rows one listing returns: a day of a busy scanner is about 100 studies, so ten days a page.
pub const MAX_LIST: u32 = 1000;

/// State of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeriesState {
    /// Slices come.
    Open,
    /// Complete, its outcome not yet committed.
    Complete,
    /// Its latest outcome is committed.
    Published,
}

impl SeriesState {
    /// The text form.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Complete => "complete",
            Self::Published => "published",
        }
    }
}

/// An outcome to be committed.
#[derive(Clone, Debug, PartialEq)]
pub struct NewOutcome {
    /// The study.
    pub study: StudyHash,
    /// Its UID, kept in the store only.
    pub study_instance_uid: String,
    /// The series.
    pub series: StudyHash,
    /// Its UID, kept in the store only.
    pub series_instance_uid: String,
    /// Revision, from 1; each is one more than the latest committed ([`StoreHandle::latest_result`]).
    pub revision: u32,
    /// Distinct slices the outcome was made from. After a restart it tells whether a series has slices not judged yet.
    pub slices: u64,
    /// The reason of "no result"; none for a result.
    pub reason: Option<&'static str>,
    /// The JSON object to keep. [`StoreHandle::commit_outcome`] adds `result_uid`, `revision`, `supersedes` and `live`;
    /// [`StoreHandle::commit_outcome_with`] and [`StoreHandle::commit_outcome_ranked`] do not look at it.
    pub document: serde_json::Value,
    /// Make it the study's live result. It becomes so in any case if it supersedes the live one.
    /// [`StoreHandle::commit_outcome_ranked`] does not look at it: there the ranking says it.
    pub live: bool,
    /// Whether it raises an alert. [`StoreHandle::commit_outcome_ranked`] does not look at it: there [`DecidedBody`]
    /// says it.
    pub alerted: bool,
    /// Unix time, ms.
    pub created_at_ms: i64,
}

/// What is fixed about a result before anything leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultIds {
    /// `2.25.` and a random UUID in decimal (DICOM PS3.5 annex B.2).
    pub result_uid: String,
    /// Revision, from 1.
    pub revision: u32,
    /// The result it replaces.
    pub supersedes: Option<String>,
    /// Whether it is the live result of its study.
    pub live: bool,
    /// Whether the result it replaces raised an alert.
    pub supersedes_alert: bool,
}

/// What a caller of [`StoreHandle::commit_outcome_with`] makes from the [`ResultIds`].
#[derive(Clone, Debug, PartialEq)]
pub struct OutcomeBody {
    /// The JSON text to keep.
    pub document: String,
    /// What shall leave.
    pub outbox: Vec<OutboxDraft>,
}

/// What a caller of [`StoreHandle::commit_outcome_ranked`] makes once it is known whether a result is live.
#[derive(Clone, Debug, PartialEq)]
pub struct DecidedBody {
    /// The document, and what shall leave.
    pub body: OutcomeBody,
    /// Whether it raises an alert.
    pub alerted: bool,
}

/// A committed outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedOutcome {
    /// What was fixed.
    pub ids: ResultIds,
    /// False when it had been committed before and nothing was changed.
    pub fresh: bool,
    /// Results of other series that became live or ceased to be.
    pub restated: Vec<Restated>,
}

/// A result of another series whose `live` a commit changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restated {
    /// As it is now.
    pub record: ResultRecord,
    /// Whether it raised an alert before.
    pub was_alerted: bool,
}

/// A stored result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultRecord {
    /// Its UID.
    pub result_uid: String,
    /// Hash of the study.
    pub study: String,
    /// Hash of the series.
    pub series: String,
    /// Revision, from 1.
    pub revision: u32,
    /// Distinct slices it was made from.
    pub slices: u64,
    /// `result` or `no_result`.
    pub outcome: String,
    /// The reason of `no_result`.
    pub reason: Option<String>,
    /// The JSON text.
    pub document: String,
    /// The result it replaces.
    pub supersedes: Option<String>,
    /// Whether it is the live result of its study.
    pub live: bool,
    /// Whether it raised an alert.
    pub alerted: bool,
    /// Unix time, ms.
    pub created_at_ms: i64,
    /// How often its document was written: 1, and one more each time it became live or ceased to be.
    pub edition: u32,
}

/// A study with its live result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StudyRecord {
    /// Hash of the study.
    pub study: String,
    /// Unix time of its first outcome, ms.
    pub first_seen_ms: i64,
    /// Unix time of its last change, ms.
    pub updated_ms: i64,
    /// Series known.
    pub series: u64,
    /// The live result.
    pub live: Option<ResultRecord>,
}

/// Which results to list, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListResults {
    /// At most so many; 0 and more than [`MAX_LIST`] mean [`MAX_LIST`].
    pub limit: u32,
    /// Only live ones.
    pub only_live: bool,
    /// Only of this study.
    pub study: Option<StudyHash>,
    /// Only older than this, Unix time in ms (for the next page).
    pub before_ms: Option<i64>,
}

/// What retention deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetentionReport {
    /// Hashes of the series, whose journals, volumes and pictures are to be deleted too.
    pub series: Vec<StudyHash>,
    /// Number of studies.
    pub studies: u64,
    /// Number of results.
    pub results: u64,
    /// Old studies kept because an item of the outbox is not delivered yet.
    pub kept_for_outbox: u64,
}

const RESULT_COLUMNS: &str = "result_uid, study_hash, series_hash, revision, slices, outcome, reason, document, \
    supersedes, live, alerted, created_at_ms, edition";

fn result_of(r: &Row<'_>) -> rusqlite::Result<ResultRecord> {
    Ok(ResultRecord {
        result_uid: r.get(0)?,
        study: r.get(1)?,
        series: r.get(2)?,
        revision: r.get(3)?,
        slices: r.get::<_, i64>(4)?.unsigned_abs(),
        outcome: r.get(5)?,
        reason: r.get(6)?,
        document: r.get(7)?,
        supersedes: r.get(8)?,
        live: r.get(9)?,
        alerted: r.get(10)?,
        created_at_ms: r.get(11)?,
        edition: r.get(12)?,
    })
}

/// A UID under `2.25`: a random UUID (version 4) as a decimal number without leading zeros.
fn new_result_uid() -> Result<String, StoreError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|_| StoreError::NoRandom)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    // At most 39 digits: with the prefix 44 characters, below DICOM's 64.
    Ok(format!("2.25.{}", u128::from_be_bytes(bytes)))
}

fn check_uid(uid: &str) -> bool {
    !uid.is_empty() && uid.len() <= 64 && uid.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

fn slices_to_i64(operation: &'static str, slices: u64) -> Result<i64, StoreError> {
    i64::try_from(slices).map_err(|_| StoreError::Invalid { operation, fault: "the number of slices is absurd" })
}

impl StoreHandle {
    /// Notes that a series exists and how far it is. Makes the study's row if needed.
    pub fn upsert_series(
        &mut self,
        study: (&StudyHash, &str),
        series: (&StudyHash, &str),
        state: SeriesState,
        slices: u64,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        self.write("note a series", |tx| put_series(tx, study, series, state, slices, now_ms))
    }

    /// Commits an outcome with what shall leave, in one transaction.
    ///
    /// The document gets the members `result_uid`, `revision`, `supersedes` and `live`; a draft with
    /// [`Payload::Document`](super::Payload) carries it as kept. Repeating a committed (series, revision) changes
    /// nothing and returns the first UIDs, whatever the rest of `outcome` and `sinks` says.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the revision is neither committed nor the next one, the document is no JSON object,
    /// or a payload is too large; the store is unchanged then, as after any other error.
    pub fn commit_outcome(
        &mut self,
        outcome: &NewOutcome,
        sinks: &[OutboxDraft],
    ) -> Result<CommittedOutcome, StoreError> {
        self.commit_outcome_with(outcome, |ids| {
            let mut document = outcome.document.clone();
            let members = document
                .as_object_mut()
                .ok_or(StoreError::Invalid { operation: OPERATION, fault: "the document is no JSON object" })?;
            members.insert("result_uid".into(), ids.result_uid.clone().into());
            members.insert("revision".into(), ids.revision.into());
            members.insert("supersedes".into(), ids.supersedes.clone().into());
            members.insert("live".into(), ids.live.into());
            Ok(OutcomeBody { document: document.to_string(), outbox: sinks.to_vec() })
        })
    }

    /// As [`StoreHandle::commit_outcome`], for documents and payloads that must know the UID: `build` is called with
    /// the fixed [`ResultIds`] inside the transaction, and not at all when the outcome had been committed before.
    pub fn commit_outcome_with(
        &mut self,
        outcome: &NewOutcome,
        build: impl FnOnce(&ResultIds) -> Result<OutcomeBody, StoreError>,
    ) -> Result<CommittedOutcome, StoreError> {
        self.write(OPERATION, |tx| {
            let mut ids = match place(tx, outcome)? {
                Place::Known(ids) => return Ok(CommittedOutcome { ids, fresh: false, restated: Vec::new() }),
                Place::Next(ids) => ids,
            };
            ids.live |= outcome.live;
            let body = build(&ids)?;
            put_result(tx, outcome, &ids, &body, outcome.alerted)?;
            Ok(CommittedOutcome { ids, fresh: true, restated: Vec::new() })
        })
    }

    /// As [`StoreHandle::commit_outcome_with`], and chooses the study's live result anew, in the same transaction, from
    /// the latest results of all its series: so which one is live never depends on the order of commits.
    ///
    /// - `outranked_by` gets the latest results of the study's other series, by series hash, and names the one that
    ///   shall be live, or none if the new result shall be.
    /// - `build` makes the new result's document, knowing [`ResultIds::live`].
    /// - `restate` is called for a result of another series that ceases to be live, then for one that becomes it. It gets
    ///   the record with the new `live` and `edition` and everything else as it was, and returns the document to keep
    ///   instead with what shall leave, or none to keep the document (and the alert) as it is. A draft carries the
    ///   edition's number.
    ///
    /// Repeating a committed (series, revision) calls none of the three and changes nothing. A superseded result is not
    /// restated; the one that supersedes it speaks.
    ///
    /// # Errors
    /// As [`StoreHandle::commit_outcome`]; [`StoreError::Invalid`] if `outranked_by` names what is not there.
    pub fn commit_outcome_ranked(
        &mut self,
        outcome: &NewOutcome,
        outranked_by: impl FnOnce(&[ResultRecord]) -> Option<usize>,
        build: impl FnOnce(&ResultIds) -> Result<DecidedBody, StoreError>,
        mut restate: impl FnMut(&ResultRecord) -> Result<Option<DecidedBody>, StoreError>,
    ) -> Result<CommittedOutcome, StoreError> {
        self.write(OPERATION, |tx| {
            let mut ids = match place(tx, outcome)? {
                Place::Known(ids) => return Ok(CommittedOutcome { ids, fresh: false, restated: Vec::new() }),
                Place::Next(ids) => ids,
            };
            let others = latest_of_others(tx, &outcome.study, &outcome.series)?;
            let winner = outranked_by(&others);
            if winner.is_some_and(|w| w >= others.len()) {
                return Err(StoreError::Invalid {
                    operation: OPERATION,
                    fault: "the live result is none of the study's",
                });
            }
            ids.live = winner.is_none();
            let made = build(&ids)?;
            put_result(tx, outcome, &ids, &made.body, made.alerted)?;
            let mut changed: Vec<ResultRecord> = Vec::new();
            for (i, mut other) in others.into_iter().enumerate() {
                let live = winner == Some(i);
                if other.live != live {
                    other.live = live;
                    other.edition += 1;
                    changed.push(other);
                }
            }
            // The one that ceases first: there is never more than one live result.
            changed.sort_by_key(|r| r.live);
            let mut restated = Vec::with_capacity(changed.len());
            for mut record in changed {
                let was_alerted = record.alerted;
                let body = restate(&record)?.map(|decided| {
                    record.alerted = decided.alerted;
                    decided.body
                });
                let body =
                    body.unwrap_or_else(|| OutcomeBody { document: record.document.clone(), outbox: Vec::new() });
                put_edition(tx, outcome, &record, &body)?;
                record.document = body.document;
                restated.push(Restated { record, was_alerted });
            }
            Ok(CommittedOutcome { ids, fresh: true, restated })
        })
    }

    /// Makes a result the live one of its study, by hand: its document stays, nothing leaves, and the next
    /// [`StoreHandle::commit_outcome_ranked`] of the study chooses anew.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Invalid`] for a superseded result.
    pub fn set_live(&mut self, result_uid: &str, now_ms: i64) -> Result<(), StoreError> {
        const OPERATION: &str = "switch the live result";
        self.write(OPERATION, |tx| {
            let (study, series): (String, String) = tx
                .query_row("SELECT study_hash, series_hash FROM results WHERE result_uid = ?1", [result_uid], |r| {
                    Ok((r.get(0)?, r.get(1)?))
                })
                .map_err(fault(OPERATION))?;
            let superseded = tx
                .prepare_cached("SELECT 1 FROM results WHERE supersedes = ?1")
                .and_then(|mut s| s.exists([result_uid]))
                .map_err(fault(OPERATION))?;
            if superseded {
                return Err(StoreError::Invalid { operation: OPERATION, fault: "the result is superseded" });
            }
            tx.execute("UPDATE results SET live = 0 WHERE study_hash = ?1 AND live = 1", [&study])
                .and_then(|_| tx.execute("UPDATE results SET live = 1 WHERE result_uid = ?1", [result_uid]))
                .and_then(|_| {
                    tx.execute(
                        "UPDATE studies SET updated_ms = max(updated_ms, ?2) WHERE hash = ?1",
                        params![study, now_ms],
                    )
                })
                .map_err(fault(OPERATION))?;
            let parse = |t: &str| StudyHash::parse(t).map_err(|_| StoreError::Sqlite { operation: OPERATION, code: 0 });
            let detail = serde_json::json!({ "result_uid": result_uid }).to_string();
            schema::append_audit(tx, now_ms, "live", Some(&parse(&study)?), Some(&parse(&series)?), &detail)
        })
    }

    /// The latest result of a series.
    pub fn latest_result(&self, series: &StudyHash) -> Result<Option<ResultRecord>, StoreError> {
        latest(&self.connection, series)
    }

    /// The live result of a study.
    pub fn live_result(&self, study: &StudyHash) -> Result<Option<ResultRecord>, StoreError> {
        live(&self.connection, study.as_str())
    }

    /// A result by its UID.
    pub fn result(&self, result_uid: &str) -> Result<Option<ResultRecord>, StoreError> {
        self.connection
            .prepare_cached(&format!("SELECT {RESULT_COLUMNS} FROM results WHERE result_uid = ?1"))
            .and_then(|mut s| s.query_row([result_uid], result_of).optional())
            .map_err(fault("read a result"))
    }

    /// Results, newest first.
    pub fn results(&self, which: &ListResults) -> Result<Vec<ResultRecord>, StoreError> {
        const OPERATION: &str = "list results";
        let mut statement = self
            .connection
            .prepare_cached(&format!(
                "SELECT {RESULT_COLUMNS} FROM results
                 WHERE (?1 = 0 OR live = 1) AND (?2 IS NULL OR study_hash = ?2) AND (?3 IS NULL OR created_at_ms < ?3)
                 ORDER BY created_at_ms DESC, result_uid LIMIT ?4"
            ))
            .map_err(fault(OPERATION))?;
        let limit = if which.limit == 0 { MAX_LIST } else { which.limit.min(MAX_LIST) };
        let rows = statement
            .query_map(
                params![which.only_live, which.study.as_ref().map(StudyHash::as_str), which.before_ms, limit],
                result_of,
            )
            .map_err(fault(OPERATION))?;
        rows.collect::<Result<_, _>>().map_err(fault(OPERATION))
    }

    /// Studies with their live results, last changed first, at most `limit` and [`MAX_LIST`].
    pub fn studies(&self, limit: u32) -> Result<Vec<StudyRecord>, StoreError> {
        const OPERATION: &str = "list studies";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT hash, first_seen_ms, updated_ms, (SELECT count(*) FROM series WHERE study_hash = studies.hash)
                 FROM studies ORDER BY updated_ms DESC, hash LIMIT ?1",
            )
            .map_err(fault(OPERATION))?;
        let rows = statement
            .query_map([limit.min(MAX_LIST)], |r| {
                Ok(StudyRecord {
                    study: r.get(0)?,
                    first_seen_ms: r.get(1)?,
                    updated_ms: r.get(2)?,
                    series: r.get::<_, i64>(3)?.unsigned_abs(),
                    live: None,
                })
            })
            .map_err(fault(OPERATION))?;
        let mut studies = rows.collect::<Result<Vec<_>, _>>().map_err(fault(OPERATION))?;
        for study in &mut studies {
            study.live = live(&self.connection, &study.study)?;
        }
        Ok(studies)
    }

    /// Deletes studies unchanged since `cutoff_ms` with their series, results and outbox items. A study with an item
    /// still to be delivered is kept. The audit trail stays.
    pub fn delete_older_than(&mut self, cutoff_ms: i64, now_ms: i64) -> Result<RetentionReport, StoreError> {
        const OPERATION: &str = "delete old studies";
        const OLD: &str = "SELECT hash FROM studies WHERE updated_ms < ?1";
        const UNDELIVERED: &str = "SELECT r.study_hash FROM outbox o JOIN results r USING (result_uid)
            WHERE o.state IN ('pending', 'sending')";
        self.write(OPERATION, |tx| {
            let count = |sql: &str| -> Result<u64, StoreError> {
                tx.query_row(sql, [cutoff_ms], |r| r.get::<_, i64>(0)).map(i64::unsigned_abs).map_err(fault(OPERATION))
            };
            let doomed = format!("{OLD} AND hash NOT IN ({UNDELIVERED})");
            let mut report = RetentionReport {
                studies: count(&format!("SELECT count(*) FROM ({doomed})"))?,
                results: count(&format!("SELECT count(*) FROM results WHERE study_hash IN ({doomed})"))?,
                kept_for_outbox: count(&format!("SELECT count(*) FROM ({OLD} AND hash IN ({UNDELIVERED}))"))?,
                series: Vec::new(),
            };
            let mut statement = tx
                .prepare(&format!("SELECT hash FROM series WHERE study_hash IN ({doomed}) ORDER BY hash"))
                .map_err(fault(OPERATION))?;
            let hashes = statement.query_map([cutoff_ms], |r| r.get::<_, String>(0)).map_err(fault(OPERATION))?;
            for hash in hashes {
                let hash = hash.map_err(fault(OPERATION))?;
                report.series.extend(StudyHash::parse(&hash).ok());
            }
            if report.studies > 0 {
                tx.execute(&format!("DELETE FROM studies WHERE hash IN ({doomed})"), [cutoff_ms])
                    .map_err(fault(OPERATION))?;
                let detail = serde_json::json!({ "studies": report.studies, "results": report.results });
                schema::append_audit(tx, now_ms, "retention", None, None, &detail.to_string())?;
            }
            Ok(report)
        })
    }
}

const OPERATION: &str = "commit an outcome";

/// The edition of a new result.
const FIRST_EDITION: u32 = 1;

fn put_series(
    tx: &Connection,
    (study, study_uid): (&StudyHash, &str),
    (series, series_uid): (&StudyHash, &str),
    state: SeriesState,
    slices: u64,
    now_ms: i64,
) -> Result<(), StoreError> {
    let slices = slices_to_i64("note a series", slices)?;
    tx.prepare_cached(
        "INSERT INTO studies (hash, study_instance_uid, first_seen_ms, updated_ms) VALUES (?1, ?2, ?3, ?3)
         ON CONFLICT (hash) DO UPDATE SET updated_ms = max(updated_ms, excluded.updated_ms)",
    )
    .and_then(|mut s| s.execute(params![study.as_str(), study_uid, now_ms]))
    .map_err(fault("note a study"))?;
    let changed = tx
        .prepare_cached(
            "INSERT INTO series (hash, study_hash, series_instance_uid, state, slices, first_seen_ms, updated_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6)
             ON CONFLICT (hash) DO UPDATE SET state = excluded.state, slices = excluded.slices,
                 updated_ms = max(updated_ms, excluded.updated_ms) WHERE study_hash = excluded.study_hash",
        )
        .and_then(|mut s| {
            s.execute(params![series.as_str(), study.as_str(), series_uid, state.as_str(), slices, now_ms])
        })
        .map_err(fault("note a series"))?;
    if changed == 0 {
        return Err(StoreError::Invalid { operation: "note a series", fault: "it belongs to another study" });
    }
    Ok(())
}

/// Where an outcome stands in its series.
enum Place {
    /// It had been committed.
    Known(ResultIds),
    /// It is the next revision; live if the one it supersedes is.
    Next(ResultIds),
}

fn place(tx: &Connection, outcome: &NewOutcome) -> Result<Place, StoreError> {
    if !check_uid(&outcome.study_instance_uid) || !check_uid(&outcome.series_instance_uid) {
        return Err(StoreError::Invalid { operation: OPERATION, fault: "a UID is malformed" });
    }
    if let Some(known) = ids_of(tx, &outcome.series, outcome.revision)? {
        return Ok(Place::Known(known));
    }
    let previous = latest(tx, &outcome.series)?;
    if outcome.revision != previous.as_ref().map_or(0, |p| p.revision) + 1 {
        return Err(StoreError::Invalid { operation: OPERATION, fault: "the revision is not the next one" });
    }
    Ok(Place::Next(ResultIds {
        result_uid: new_result_uid()?,
        revision: outcome.revision,
        live: previous.as_ref().is_some_and(|p| p.live),
        supersedes_alert: previous.as_ref().is_some_and(|p| p.alerted),
        supersedes: previous.map(|p| p.result_uid),
    }))
}

/// Writes a new result with its series, its items and its audit line.
fn put_result(
    tx: &Transaction<'_>,
    outcome: &NewOutcome,
    ids: &ResultIds,
    body: &OutcomeBody,
    alerted: bool,
) -> Result<(), StoreError> {
    check_document(body)?;
    put_series(
        tx,
        (&outcome.study, &outcome.study_instance_uid),
        (&outcome.series, &outcome.series_instance_uid),
        SeriesState::Published,
        outcome.slices,
        outcome.created_at_ms,
    )?;
    // A live result takes the place of any other; one that is not, of the one it supersedes.
    tx.execute(
        "UPDATE results SET live = 0 WHERE study_hash = ?1 AND live = 1 AND (?2 OR result_uid = ?3)",
        params![outcome.study.as_str(), ids.live, ids.supersedes],
    )
    .map_err(fault(OPERATION))?;
    let kind = if outcome.reason.is_some() { "no_result" } else { "result" };
    tx.prepare_cached(&format!(
        "INSERT INTO results ({RESULT_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)"
    ))
    .and_then(|mut s| {
        s.execute(params![
            ids.result_uid,
            outcome.study.as_str(),
            outcome.series.as_str(),
            ids.revision,
            outcome.slices.cast_signed(),
            kind,
            outcome.reason,
            body.document,
            ids.supersedes,
            ids.live,
            alerted,
            outcome.created_at_ms,
            FIRST_EDITION,
        ])
    })
    .map_err(fault(OPERATION))?;
    insert_drafts(tx, &ids.result_uid, FIRST_EDITION, body, outcome.created_at_ms)?;
    let detail = serde_json::json!({
        "result_uid": ids.result_uid, "revision": ids.revision, "outcome": kind, "reason": outcome.reason,
        "live": ids.live, "alerted": alerted, "supersedes": ids.supersedes,
    });
    let (study, series) = (Some(&outcome.study), Some(&outcome.series));
    schema::append_audit(tx, outcome.created_at_ms, "outcome", study, series, &detail.to_string())
}

/// Writes what changed of `record`, its items and its audit line.
fn put_edition(
    tx: &Transaction<'_>,
    cause: &NewOutcome,
    record: &ResultRecord,
    body: &OutcomeBody,
) -> Result<(), StoreError> {
    check_document(body)?;
    tx.prepare_cached("UPDATE results SET live = ?2, alerted = ?3, edition = ?4, document = ?5 WHERE result_uid = ?1")
        .and_then(|mut s| {
            s.execute(params![record.result_uid, record.live, record.alerted, record.edition, body.document])
        })
        .map_err(fault(OPERATION))?;
    insert_drafts(tx, &record.result_uid, record.edition, body, cause.created_at_ms)?;
    let series = StudyHash::parse(&record.series).map_err(|_| StoreError::Sqlite { operation: OPERATION, code: 0 })?;
    let detail = serde_json::json!({
        "result_uid": record.result_uid, "live": record.live, "alerted": record.alerted, "edition": record.edition,
    });
    schema::append_audit(tx, cause.created_at_ms, "live", Some(&cause.study), Some(&series), &detail.to_string())
}

fn check_document(body: &OutcomeBody) -> Result<(), StoreError> {
    if body.document.len() > MAX_PAYLOAD_BYTES {
        return Err(StoreError::Invalid { operation: OPERATION, fault: "the document is too large" });
    }
    Ok(())
}

/// The latest results of a study's series but one, by series hash.
fn latest_of_others(
    connection: &Connection,
    study: &StudyHash,
    but: &StudyHash,
) -> Result<Vec<ResultRecord>, StoreError> {
    let mut statement = connection
        .prepare_cached(&format!(
            "SELECT {RESULT_COLUMNS} FROM results WHERE study_hash = ?1 AND series_hash <> ?2
             AND result_uid NOT IN (SELECT supersedes FROM results WHERE study_hash = ?1 AND supersedes IS NOT NULL)
             ORDER BY series_hash"
        ))
        .map_err(fault(OPERATION))?;
    let rows = statement.query_map([study.as_str(), but.as_str()], result_of).map_err(fault(OPERATION))?;
    rows.collect::<Result<_, _>>().map_err(fault(OPERATION))
}

fn latest(connection: &Connection, series: &StudyHash) -> Result<Option<ResultRecord>, StoreError> {
    connection
        .prepare_cached(&format!(
            "SELECT {RESULT_COLUMNS} FROM results WHERE series_hash = ?1 ORDER BY revision DESC LIMIT 1"
        ))
        .and_then(|mut s| s.query_row([series.as_str()], result_of).optional())
        .map_err(fault("read the latest result"))
}

fn live(connection: &Connection, study: &str) -> Result<Option<ResultRecord>, StoreError> {
    connection
        .prepare_cached(&format!("SELECT {RESULT_COLUMNS} FROM results WHERE study_hash = ?1 AND live = 1"))
        .and_then(|mut s| s.query_row([study], result_of).optional())
        .map_err(fault("read the live result"))
}

fn ids_of(connection: &Connection, series: &StudyHash, revision: u32) -> Result<Option<ResultIds>, StoreError> {
    connection
        .prepare_cached(
            "SELECT r.result_uid, r.revision, r.supersedes, r.live, coalesce(p.alerted, 0) FROM results r
             LEFT JOIN results p ON p.result_uid = r.supersedes WHERE r.series_hash = ?1 AND r.revision = ?2",
        )
        .and_then(|mut s| {
            s.query_row(params![series.as_str(), revision], |r| {
                Ok(ResultIds {
                    result_uid: r.get(0)?,
                    revision: r.get(1)?,
                    supersedes: r.get(2)?,
                    live: r.get(3)?,
                    supersedes_alert: r.get(4)?,
                })
            })
            .optional()
        })
        .map_err(fault(OPERATION))
}
