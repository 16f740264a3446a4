//! From slices to a volume: geometry and ordering (pure), the journal, the mapped store, completion rules.
//!
//! A leaf: imports no stage.

pub mod geometry;
pub mod refusal;
