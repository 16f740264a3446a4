//! What the pipeline adds to the web server: readiness checks and the pictures of a result.
//!
//! Deliberately absent: the dashboard.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::pipeline::Ended;
use crate::pipeline::device::BackendState;
use crate::telemetry::StudyHash;
use crate::web::{Check, Readiness};

/// Free space below which the daemon says that it is not ready: two studies of 600 slices with their volumes.
pub const MIN_FREE_BYTES: u64 = 2 << 30;

/// The checks behind `/readyz`.
pub fn readiness(data_dir: &Path, ended: &Ended, backend: BackendState) -> Arc<dyn Readiness> {
    let data_dir = data_dir.to_path_buf();
    let ended = ended.clone();
    Arc::new(move || {
        let running = !ended.any();
        let free = rustix::fs::statvfs(&data_dir).map(|s| s.f_bavail.saturating_mul(s.f_frsize));
        let disk = match free {
            Ok(free) => Check::new("disk", free >= MIN_FREE_BYTES, format!("{} MiB free", free >> 20)),
            Err(error) => Check::new("disk", false, format!("look at the data folder: {error}")),
        };
        let threads = if running { "every thread runs" } else { "a thread ended" };
        vec![Check::new("pipeline", running, threads), disk, Check::new("backend", true, backend.describe())]
    })
}

/// `/results/{series}/{revision}/{file}`: summary page, pictures and map of a result.
pub fn router(results_dir: &Path) -> Router {
    Router::new()
        .route("/results/{series}/{revision}/{file}", get(file))
        .with_state(Arc::new(results_dir.to_path_buf()))
}

async fn file(
    State(root): State<Arc<PathBuf>>,
    UrlPath((series, revision, file)): UrlPath<(String, u32, String)>,
) -> Response {
    let kind = match file.rsplit_once('.') {
        Some((stem, kind)) if stem.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') => kind,
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    let content_type = match kind {
        "html" => "text/html; charset=utf-8",
        "png" => "image/png",
        "safetensors" => "application/octet-stream",
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    let Ok(series) = StudyHash::parse(&series) else { return StatusCode::NOT_FOUND.into_response() };
    // A summary page has at most some 10 MB and comes from the local disk.
    match std::fs::read(root.join(series.as_str()).join(revision.to_string()).join(&file)) {
        Ok(bytes) => ([(header::CONTENT_TYPE, content_type)], bytes).into_response(),
        Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}
