//! From slices to a volume: geometry and ordering (pure), the journal, the mapped store, completion rules.
//!
//! A leaf: imports no stage. Nothing here knows DICOM, decoding or the network.
//!
//! - [`geometry`]: which slices make one axial stack, in what order, and why not. Pure.
//! - [`journal`]: the received data sets, as encoded, append-only. The truth; everything else can be rebuilt from it.
//! - [`store`]: the decoded HU slices in a preallocated, memory-mapped file.
//! - [`completion`]: when a series is complete, when it looks so, and why. Pure, time is an argument.
//! - [`refusal`]: why a series gets no result, as data.
//!
//! Both file layouts are drawn byte by byte in `docs/formats.md`; [`layout`] holds the same numbers as constants and a
//! test compares the two.

pub mod completion;
pub mod geometry;
pub mod journal;
pub mod layout;
pub mod refusal;
pub mod store;
