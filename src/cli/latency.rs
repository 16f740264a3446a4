//! `bench pipeline --declared-only`: *last slice to alert* of series whose sender declares their length, with where the
//! time goes.
//!
//! One daemon takes all runs, as at a scanner: every run is another study of the same phantom, encoded in memory before it
//! is sent. The journal is synced and the store commits as configured by default; pictures are not made, so that those of
//! one run do not take the processor from the next.

use std::time::Duration;

use anyhow::{Context, bail};
use darnet::config::ModelConfig;
use darnet::dicom::part10::{Part10, parse_part10};
use darnet::dicom::scu::{SendOptions, send_objects};
use darnet::engine::prepare;
use darnet::phantom::{DicomOptions, DicomSeries, Phantom};
use darnet::pipeline::{Daemon, observer};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::BenchArgs;
use super::bench::{daemon_config, model, phantom, spread, to};

/// Runs before those that count: files, caches and clocks of the device warm up.
const WARM_UP: usize = 3;
/// Longest wait for an outcome.
const WAIT: Duration = Duration::from_secs(600);

/// The objects of one more study of `phantom`.
fn study(phantom: &Phantom, run: usize) -> anyhow::Result<Vec<Part10>> {
    let options =
        DicomOptions { declare_count: true, study_uid: Some(format!("2.25.{}", run + 1)), ..DicomOptions::default() };
    let series = DicomSeries::new(phantom, &options)?;
    (0..series.len()).into_par_iter().map(|index| Ok(parse_part10(series.slice(index)?)?)).collect()
}

/// Measures.
pub fn declared(args: &BenchArgs) -> anyhow::Result<Value> {
    let dir = super::demo::scratch_dir("bench-declared")?;
    let model = model(args)?;
    let mut engine = ModelConfig::default();
    args.engine.configure(&mut engine);
    let backend = prepare(args.engine.backend, &model, &engine.engine_options())?;
    let phantom = phantom(args.slices);
    let mut config = daemon_config(args, dir.path());
    config.peers.trust_series_count = vec![SendOptions::default().calling_ae_title];
    config.results.render = false;
    // The series before the last leaves memory with the first slice of the next, and not by the clock, which could give its
    // blocks back just when an alert is committed: the file system makes the one wait for the other.
    config.assembly.max_open_series = 2;
    let (tx, notices) = observer();
    let daemon = Daemon::start_on(&config, &model, backend.as_ref(), Some(tx))?;
    let options = SendOptions { slices_per_s: args.rate, ..to(&daemon) };
    let (mut to_alert, mut slice_rate) = (Vec::new(), Vec::new());
    let mut parts: Vec<(&'static str, Vec<f64>)> = Vec::new();
    let mut series_before: Option<String> = None;
    for run in 0..WARM_UP + args.runs {
        let objects = study(&phantom, run)?;
        let count = objects.len();
        let first = objects.first().context("a series without slices")?;
        let context = (first.sop_class_uid.clone(), first.transfer_syntax_uid.clone());
        let contexts = [(context.0.as_str(), context.1.as_str())];
        let report = send_objects(&mut objects.into_iter(), &contexts, &options, &mut |_| {})?;
        if report.stored != count {
            bail!("{} of {count} slices were not stored", count - report.stored);
        }
        let notice = notices.recv_timeout(WAIT).context("wait for the alert")?;
        let breakdown = notice.breakdown.with_context(|| format!("a result, not {}", notice.report()["reason"]))?;
        if notice.document["backend"] != backend.name() {
            bail!("a run was made by {}, not by {}", notice.document["backend"], backend.name());
        }
        let series = notice.report()["series"].as_str().map(str::to_owned);
        if let Some(before) = std::mem::replace(&mut series_before, series) {
            // Only names yet: journal and volume are open until the series leaves memory.
            let _ = std::fs::remove_dir_all(dir.path().join("series").join(before));
        }
        if run < WARM_UP {
            continue;
        }
        to_alert.push(notice.last_slice_to_alert_s);
        slice_rate.push(report.elapsed.as_secs_f64() / count as f64);
        if parts.is_empty() {
            parts = breakdown.parts().iter().map(|(name, _)| (*name, Vec::new())).collect();
        }
        for ((_, values), (_, value)) in parts.iter_mut().zip(breakdown.parts()) {
            values.push(value);
        }
    }
    daemon.shutdown(Duration::from_secs(1));
    let rows: Vec<Value> = parts
        .into_iter()
        .map(|(part, values)| {
            let spread = spread(values);
            json!({
                "part": part,
                "p50_ms": spread["p50_ms"],
                "p95_ms": spread["p95_ms"],
                "p99_ms": spread["p99_ms"],
                "max_ms": spread["max_ms"],
            })
        })
        .collect();
    Ok(json!({
        "bench": "pipeline",
        "completion": "declared",
        "model": model.manifest.id,
        "backend": backend.name(),
        "choice": backend.note(),
        "threads": args.engine.threads,
        "slices": args.slices,
        "rate": args.rate,
        "durability": "fsync",
        "last_slice_to_alert": spread(to_alert),
        "a_slice_at_the_sender": spread(slice_rate),
        "breakdown": rows,
    }))
}
