//! What is said about a series, who is alerted, and how it leaves.
//!
//! Input: logits and refusals from the pipeline. Output: JSON documents ([`outcome`]), alert decisions ([`policy`] over
//! [`calibration`]), and deliveries: [`outbox`] workers hand stored items to [`sink`]s, of which [`webhook`] is one.
//!
//! Invariants: a number that is not finite never gets into a document; a fault becomes "no result", never a negative
//! finding; result UIDs are fixed in the store before the first attempt to deliver; a demo model reaches no clinical
//! sink unless the configuration says so.
//!
//! Absent: DICOM, HL7, FHIR and e-mail sinks (they will implement [`sink::Sink`]), and the web pages.

pub mod calibration;
pub mod outbox;
pub mod outcome;
pub mod policy;
pub mod sink;
pub mod webhook;
