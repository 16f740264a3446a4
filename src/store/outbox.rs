//! Items that shall leave.
//!
//! ```text
//!             lease               delivered
//!   pending ────────> sending ────────────────> delivered
//!      ^  ^              │ │
//!      │  └── failed ────┘ └─ dead ──> dead ──┐
//!      └───────────── resend ─────────────────┘
//! ```
//! A lease runs out after [`LEASE_MS`], and at the next start ([`StoreHandle::recover_leases`]); the item is due again
//! then. A lease is named by (id, attempt): the end of a lease that ran out changes nothing.

use rusqlite::{OptionalExtension as _, Transaction, params};

use super::outcome::OutcomeBody;
use super::{MAX_LIST, MAX_PAYLOAD_BYTES, StoreError, StoreHandle, fault, schema};

/// How long a lease lasts: more than the longest attempt a sink may make (120 s), several times over.
pub const LEASE_MS: i64 = 600_000;

/// Most characters kept of a sink's last error.
const MAX_ERROR_CHARS: usize = 300;

/// Longest name of a sink.
const MAX_SINK_NAME_BYTES: usize = 64;

/// What an item carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// The result's document as it is kept.
    Document,
    /// Bytes made by the caller.
    Bytes(Vec<u8>),
}

/// Something that shall leave, before it has a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxDraft {
    /// Name of the sink.
    pub sink: String,
    /// What it gets.
    pub payload: Payload,
}

impl OutboxDraft {
    /// The result's document for a sink.
    pub fn document(sink: impl Into<String>) -> Self {
        Self { sink: sink.into(), payload: Payload::Document }
    }

    /// Given bytes for a sink.
    pub fn bytes(sink: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { sink: sink.into(), payload: Payload::Bytes(bytes) }
    }
}

/// An item under a lease.
#[derive(Clone, PartialEq, Eq)]
pub struct Leased {
    /// Its number.
    pub id: i64,
    /// The result it is about.
    pub result_uid: String,
    /// Which edition of it, from 1; with the result's UID what a receiver knows a repetition by.
    pub edition: u32,
    /// Name of the sink.
    pub sink: String,
    /// What to send.
    pub payload: Vec<u8>,
    /// This attempt, from 1, over the item's life.
    pub attempt: u32,
    /// This attempt, from 1, since the item was made or last resent by a person.
    pub attempt_since_resend: u32,
    /// Unix time it was made, ms.
    pub created_at_ms: i64,
}

impl std::fmt::Debug for Leased {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leased").field("id", &self.id).field("attempt", &self.attempt).finish_non_exhaustive()
    }
}

/// An item as a person sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxEntry {
    /// Its number.
    pub id: i64,
    /// The result it is about.
    pub result_uid: String,
    /// Which edition of it, from 1.
    pub edition: u32,
    /// Name of the sink.
    pub sink: String,
    /// `pending`, `sending`, `delivered` or `dead`.
    pub state: String,
    /// Attempts made.
    pub attempts: u32,
    /// Unix time of the next attempt, ms.
    pub next_attempt_ms: i64,
    /// What went wrong last.
    pub last_error: Option<String>,
    /// Unix time it was made, ms.
    pub created_at_ms: i64,
    /// Unix time it was delivered, ms.
    pub delivered_at_ms: Option<i64>,
}

/// Items by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutboxCounts {
    /// Waiting for an attempt.
    pub pending: u64,
    /// In an attempt.
    pub sending: u64,
    /// Taken by their sink.
    pub delivered: u64,
    /// Given up.
    pub dead: u64,
}

pub(super) fn insert_drafts(
    tx: &Transaction<'_>,
    result_uid: &str,
    edition: u32,
    body: &OutcomeBody,
    now_ms: i64,
) -> Result<(), StoreError> {
    const OPERATION: &str = "put an item into the outbox";
    let mut statement = tx
        .prepare_cached(
            "INSERT INTO outbox (result_uid, sink, payload, state, next_attempt_ms, created_at_ms, edition)
             VALUES (?1, ?2, ?3, 'pending', ?4, ?4, ?5)",
        )
        .map_err(fault(OPERATION))?;
    for draft in &body.outbox {
        let payload = match &draft.payload {
            Payload::Document => body.document.as_bytes(),
            Payload::Bytes(bytes) => bytes,
        };
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(StoreError::Invalid { operation: OPERATION, fault: "the payload is too large" });
        }
        if draft.sink.is_empty() || draft.sink.len() > MAX_SINK_NAME_BYTES {
            return Err(StoreError::Invalid { operation: OPERATION, fault: "the sink's name is empty or too long" });
        }
        statement.execute(params![result_uid, draft.sink, payload, now_ms, edition]).map_err(fault(OPERATION))?;
    }
    Ok(())
}

const LEASED_COLUMNS: &str =
    "id, result_uid, sink, payload, attempts, attempts - attempts_at_resend, created_at_ms, edition";

fn leased_of(r: &rusqlite::Row<'_>) -> rusqlite::Result<Leased> {
    Ok(Leased {
        id: r.get(0)?,
        result_uid: r.get(1)?,
        sink: r.get(2)?,
        payload: r.get(3)?,
        attempt: r.get(4)?,
        attempt_since_resend: r.get(5)?,
        created_at_ms: r.get(6)?,
        edition: r.get(7)?,
    })
}

/// An error's text without control characters, cut to [`MAX_ERROR_CHARS`].
fn tidy_error(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_ERROR_CHARS).collect()
}

impl StoreHandle {
    /// Leases up to `limit` due items of any sink, the longest due first.
    pub fn lease_due(&mut self, now_ms: i64, limit: u32) -> Result<Vec<Leased>, StoreError> {
        self.lease(None, now_ms, limit)
    }

    /// Leases up to `limit` due items of one sink, the longest due first.
    pub fn lease_due_for(&mut self, sink: &str, now_ms: i64, limit: u32) -> Result<Vec<Leased>, StoreError> {
        self.lease(Some(sink), now_ms, limit)
    }

    fn lease(&mut self, sink: Option<&str>, now_ms: i64, limit: u32) -> Result<Vec<Leased>, StoreError> {
        const OPERATION: &str = "lease an item of the outbox";
        self.write(OPERATION, |tx| {
            let ids = {
                let mut statement = tx
                    .prepare_cached(
                        "SELECT id FROM outbox WHERE state IN ('pending', 'sending') AND next_attempt_ms <= ?1
                         AND (?2 IS NULL OR sink = ?2) ORDER BY next_attempt_ms, id LIMIT ?3",
                    )
                    .map_err(fault(OPERATION))?;
                let rows = statement
                    .query_map(params![now_ms, sink, limit.min(MAX_LIST)], |r| r.get::<_, i64>(0))
                    .map_err(fault(OPERATION))?;
                rows.collect::<Result<Vec<_>, _>>().map_err(fault(OPERATION))?
            };
            let mut statement = tx
                .prepare_cached(&format!(
                    "UPDATE outbox SET state = 'sending', attempts = attempts + 1, next_attempt_ms = ?2 WHERE id = ?1
                     RETURNING {LEASED_COLUMNS}"
                ))
                .map_err(fault(OPERATION))?;
            ids.into_iter()
                .map(|id| {
                    statement
                        .query_row(params![id, now_ms.saturating_add(LEASE_MS)], leased_of)
                        .map_err(fault(OPERATION))
                })
                .collect()
        })
    }

    /// When the next item of a sink is due, Unix time in ms; none if none waits. Leases count with their end.
    pub fn next_due_for(&self, sink: &str) -> Result<Option<i64>, StoreError> {
        self.connection
            .prepare_cached(
                "SELECT min(next_attempt_ms) FROM outbox WHERE state IN ('pending', 'sending') AND sink = ?1",
            )
            .and_then(|mut s| s.query_row([sink], |r| r.get(0)))
            .map_err(fault("read the outbox"))
    }

    /// Ends a lease: the sink took the item. False if the lease had run out or the item is gone.
    pub fn mark_delivered(&mut self, item: &Leased, now_ms: i64) -> Result<bool, StoreError> {
        const OPERATION: &str = "mark an item delivered";
        self.write(OPERATION, |tx| {
            let changed = tx
                .prepare_cached(
                    "UPDATE outbox SET state = 'delivered', delivered_at_ms = ?3, last_error = NULL
                     WHERE id = ?1 AND attempts = ?2 AND state = 'sending'",
                )
                .and_then(|mut s| s.execute(params![item.id, item.attempt, now_ms]))
                .map_err(fault(OPERATION))?;
            if changed > 0 {
                audit_item(tx, now_ms, "delivered", item)?;
            }
            Ok(changed > 0)
        })
    }

    /// Ends a lease: the item is tried again at `next_attempt_ms`. False as in [`StoreHandle::mark_delivered`].
    pub fn mark_failed(&mut self, item: &Leased, next_attempt_ms: i64, error: &str) -> Result<bool, StoreError> {
        const OPERATION: &str = "mark an item failed";
        self.write(OPERATION, |tx| {
            let changed = tx
                .prepare_cached(
                    "UPDATE outbox SET state = 'pending', next_attempt_ms = ?3, last_error = ?4
                     WHERE id = ?1 AND attempts = ?2 AND state = 'sending'",
                )
                .and_then(|mut s| s.execute(params![item.id, item.attempt, next_attempt_ms, tidy_error(error)]))
                .map_err(fault(OPERATION))?;
            Ok(changed > 0)
        })
    }

    /// Ends a lease: the item is given up until a person resends it. False as in [`StoreHandle::mark_delivered`].
    pub fn mark_dead(&mut self, item: &Leased, now_ms: i64, error: &str) -> Result<bool, StoreError> {
        const OPERATION: &str = "mark an item dead";
        self.write(OPERATION, |tx| {
            let changed = tx
                .prepare_cached(
                    "UPDATE outbox SET state = 'dead', last_error = ?3
                     WHERE id = ?1 AND attempts = ?2 AND state = 'sending'",
                )
                .and_then(|mut s| s.execute(params![item.id, item.attempt, tidy_error(error)]))
                .map_err(fault(OPERATION))?;
            if changed > 0 {
                audit_item(tx, now_ms, "dead", item)?;
            }
            Ok(changed > 0)
        })
    }

    /// Makes items of sinks that are not in `known` dead, so that a person sees them. Returns how many.
    pub fn bury_unknown_sinks(&mut self, known: &[&str], now_ms: i64) -> Result<u64, StoreError> {
        const OPERATION: &str = "bury items of unknown sinks";
        let known = serde_json::json!(known).to_string();
        self.write(OPERATION, |tx| {
            let buried = tx
                .execute(
                    "UPDATE outbox SET state = 'dead', last_error = 'sink not configured'
                     WHERE state IN ('pending', 'sending') AND sink NOT IN (SELECT value FROM json_each(?1))",
                    [known],
                )
                .map_err(fault(OPERATION))?;
            if buried > 0 {
                let detail = serde_json::json!({ "items": buried }).to_string();
                schema::append_audit(tx, now_ms, "sinks not configured", None, None, &detail)?;
            }
            Ok(buried as u64)
        })
    }

    /// Makes dead items due again: one by its number, or all. Returns how many.
    pub fn resend_dead(&mut self, id: Option<i64>, now_ms: i64) -> Result<u64, StoreError> {
        const OPERATION: &str = "resend dead items";
        self.write(OPERATION, |tx| {
            let changed = tx
                .execute(
                    "UPDATE outbox SET state = 'pending', next_attempt_ms = ?2, attempts_at_resend = attempts
                     WHERE state = 'dead' AND (?1 IS NULL OR id = ?1)",
                    params![id, now_ms],
                )
                .map_err(fault(OPERATION))?;
            if changed > 0 {
                let detail = serde_json::json!({ "items": changed, "id": id }).to_string();
                schema::append_audit(tx, now_ms, "resend", None, None, &detail)?;
            }
            Ok(changed as u64)
        })
    }

    /// Makes items whose attempt a stopped process left unfinished due now. Only for the start of the one process that
    /// sends. Returns how many.
    pub fn recover_leases(&mut self, now_ms: i64) -> Result<u64, StoreError> {
        const OPERATION: &str = "recover items of the outbox";
        self.write(OPERATION, |tx| {
            tx.execute("UPDATE outbox SET state = 'pending', next_attempt_ms = ?1 WHERE state = 'sending'", [now_ms])
                .map(|n| n as u64)
                .map_err(fault(OPERATION))
        })
    }

    /// Items by state.
    pub fn outbox_counts(&self) -> Result<OutboxCounts, StoreError> {
        const OPERATION: &str = "count the outbox";
        let mut statement = self
            .connection
            .prepare_cached("SELECT state, count(*) FROM outbox GROUP BY state")
            .map_err(fault(OPERATION))?;
        let mut rows = statement.query([]).map_err(fault(OPERATION))?;
        let mut counts = OutboxCounts::default();
        while let Some(row) = rows.next().map_err(fault(OPERATION))? {
            let state: String = row.get(0).map_err(fault(OPERATION))?;
            let n = row.get::<_, i64>(1).map_err(fault(OPERATION))?.unsigned_abs();
            match state.as_str() {
                "pending" => counts.pending = n,
                "sending" => counts.sending = n,
                "delivered" => counts.delivered = n,
                _ => counts.dead = n,
            }
        }
        Ok(counts)
    }

    /// The newest items in a state, at most `limit` and [`MAX_LIST`].
    pub fn outbox_entries(&self, state: &str, limit: u32) -> Result<Vec<OutboxEntry>, StoreError> {
        const OPERATION: &str = "list the outbox";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT id, result_uid, sink, state, attempts, next_attempt_ms, last_error, created_at_ms,
                 delivered_at_ms, edition FROM outbox WHERE state = ?1 ORDER BY id DESC LIMIT ?2",
            )
            .map_err(fault(OPERATION))?;
        let rows = statement
            .query_map(params![state, limit.min(MAX_LIST)], |r| {
                Ok(OutboxEntry {
                    id: r.get(0)?,
                    result_uid: r.get(1)?,
                    sink: r.get(2)?,
                    state: r.get(3)?,
                    attempts: r.get(4)?,
                    next_attempt_ms: r.get(5)?,
                    last_error: r.get(6)?,
                    created_at_ms: r.get(7)?,
                    delivered_at_ms: r.get(8)?,
                    edition: r.get(9)?,
                })
            })
            .map_err(fault(OPERATION))?;
        rows.collect::<Result<_, _>>().map_err(fault(OPERATION))
    }

    /// The payload of an item, as it was or will be sent.
    pub fn outbox_payload(&self, id: i64) -> Result<Option<Vec<u8>>, StoreError> {
        self.connection
            .query_row("SELECT payload FROM outbox WHERE id = ?1", [id], |r| r.get(0))
            .optional()
            .map_err(fault("read the outbox"))
    }
}

fn audit_item(tx: &Transaction<'_>, now_ms: i64, event: &str, item: &Leased) -> Result<(), StoreError> {
    let detail = serde_json::json!({
        "item": item.id, "result_uid": item.result_uid, "edition": item.edition, "sink": item.sink, "attempts": item.attempt,
    });
    schema::append_audit(tx, now_ms, event, None, None, &detail.to_string())
}
