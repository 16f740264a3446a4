//! The network as data: architecture, manifest, weights.
//!
//! A leaf: imports no stage.

pub mod manifest;
