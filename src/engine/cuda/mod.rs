//! The `cuda` backend.

pub mod cudnn;
