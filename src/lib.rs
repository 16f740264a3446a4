//! DARNet at the scanner: slices come in over DICOM, a diagnosis, a heat map and an alert go out.
//!
//! ```text
//! ingest ──> decode ──> assemble ──> resample ──> infer ──> explain ──> publish
//! C-STORE    pixels     mapped       in-plane     DARNet    CAM         store, alert
//! folder     to HU      volume       on arrival   backend
//! ```
//!
//! Arrows go down the pipeline. `model`, `volume`, `telemetry` and `gpu` are leaves that import no stage; [`pipeline`] alone
//! knows every stage and makes the channels, threads and pools. `tests/tidy.rs` enforces the arrows.
//!
//! Conventions: axes in DHW order (depth, rows, columns), row-major; distances in millimetres in the DICOM patient
//! coordinate system (LPS: x to the patient's left, y to posterior, z to the head); intensities in HU.

pub mod config;
pub mod dicom;
pub mod engine;
pub mod explain;
pub mod gpu;
pub mod model;
pub mod phantom;
pub mod pipeline;
pub mod report;
pub mod resample;
pub mod scan;
pub mod store;
pub mod telemetry;
#[cfg(feature = "train-data")]
pub mod train;
pub mod volume;
pub mod web;
