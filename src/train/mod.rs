//! Training data: readers of what users have, the cache, the split.
//!
//! ```text
//! sources ──> prepare ──> cache ──> split ──> training
//! folders,    same code   f16,      by patient
//! phantoms    as daemon   mapped
//! ```
//!
//! - Input: folders of scans in the layouts of public data sets, or the phantom. Output: a [`cache::Cache`] of network
//!   inputs with their class, patient and lesion masks, a report of what was refused and why, pictures to look at, and
//!   a [`split::Split`].
//! - The preprocessing is the daemon's, called and not repeated ([`crate::resample`], [`crate::scan`]).
//! - The outcome does not depend on the number of threads, nor on where an earlier run was killed.
//!
//! Deliberately absent: augmentation (the trainer does it on the device), any download.

pub mod cache;
pub mod commands_data;
pub mod contact;
pub mod error;
pub(crate) mod layout;
mod map;
pub mod prepare;
pub mod sources;
pub mod split;

pub use cache::{Cache, Case};
pub use error::TrainDataError;
pub use split::{Split, SplitRow};
