//! What a receiver of results must do.

use super::policy::SinkKind;

/// One attempt to deliver.
///
/// [`Delivery::idempotency_key`] is the same in every attempt, also after a restart, and a receiver that has taken it
/// must take it again as done.
#[derive(Clone, Copy)]
pub struct Delivery<'a> {
    /// UID of the result, `2.25.…`.
    pub result_uid: &'a str,
    /// Which edition of the result, from 1; each is delivered once.
    pub edition: u32,
    /// What to send.
    pub payload: &'a [u8],
    /// This attempt, from 1.
    pub attempt: u32,
    /// Unix time of this attempt, ms.
    pub now_ms: i64,
}

impl Delivery<'_> {
    /// The result's UID; of a later edition, the UID, a slash and the edition.
    pub fn idempotency_key(&self) -> String {
        match self.edition {
            0 | 1 => self.result_uid.to_owned(),
            later => format!("{}/{later}", self.result_uid),
        }
    }
}

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct SinkError {
    /// Whether the same may succeed later.
    pub retryable: bool,
    /// The sink's own words: nothing a peer sent, nothing of the payload, no address.
    pub detail: String,
    /// How long the receiver asked to wait, ms.
    pub retry_after_ms: Option<u64>,
}

impl SinkError {
    /// A fault that may pass.
    pub fn retry(detail: impl Into<String>) -> Self {
        Self { retryable: true, detail: detail.into(), retry_after_ms: None }
    }

    /// A fault that will not pass by itself.
    pub fn permanent(detail: impl Into<String>) -> Self {
        Self { retryable: false, detail: detail.into(), retry_after_ms: None }
    }
}

/// A receiver of results. Called from one thread at a time.
///
/// `deliver` must end within 120 s; a lease in the store lasts five times that.
pub trait Sink: Send {
    /// Its name in the configuration, the store and the metrics.
    fn name(&self) -> &str;

    /// What kind of receiver it is, for the rule about demo models.
    fn kind(&self) -> SinkKind;

    /// Sends. Ok only when the receiver has taken it.
    fn deliver(&self, delivery: &Delivery<'_>) -> Result<(), SinkError>;
}
