//! `infer`: judges files.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use darnet::engine::prepare;
use darnet::explain::{CamGeometry, RenderOptions, SeriesToExplain, class_activation_map, explain_series, write_cam};
use darnet::model::Model;
use darnet::pipeline::judge;
use darnet::pipeline::offline::{Judgement, judge_paths};
use darnet::pipeline::publish::{Completion, complete, model_info};
use darnet::pipeline::workers::{Judge, JudgedTensor};
use darnet::report::outcome::{CamInfo, InferDocument, LatencyMs, Outcome, SeriesReport};
use darnet::telemetry::StudyHasher;
use darnet::volume::geometry::GeometryLimits;

use super::{Ended, InferArgs, modelcmd, print_json, progress_bar};

struct Files<'a> {
    model: &'a Model,
    completion: Completion,
    judge: Judge,
    cam_class: Option<usize>,
    out: Option<&'a Path>,
}

/// `darnet infer`.
pub fn infer(args: &InferArgs) -> anyhow::Result<Ended> {
    let model = modelcmd::load(args.engine.model.as_ref())?;
    let backend = prepare(args.engine.backend, &model, &args.engine.options())?;
    if let Some(note) = backend.note() {
        eprintln!("darnet: {note}");
    }
    let keys = &model.manifest.class_keys;
    let cam_class = match &args.cam_class {
        None => None,
        Some(name) => match keys.iter().position(|k| k == name) {
            Some(class) => Some(class),
            None => bail!("--cam-class wants one of {}, got {name}", keys.join(", ")),
        },
    };
    let mut context = Files {
        completion: Completion::of(&model)?,
        judge: judge(&model, backend.as_ref())?,
        model: &model,
        cam_class,
        out: args.out.as_deref(),
    };
    let hasher = StudyHasher::new([0; 32]);
    let series = match &args.tensor {
        Some(file) => vec![tensor(&mut context, file, &hasher)?],
        None => {
            let bar = progress_bar(args.paths.len() as u64, "series");
            let judgements = judge_paths(
                &args.paths,
                &mut context.judge,
                &GeometryLimits::default(),
                &hasher,
                &mut |_, done, of| {
                    bar.set_length(of as u64);
                    bar.set_position(done as u64);
                },
            )?;
            bar.finish_and_clear();
            judgements.iter().map(|j| report(&context, j)).collect::<anyhow::Result<Vec<_>>>()?
        }
    };
    let document = InferDocument::new(model_info(&model), backend.name(), series);
    if args.json {
        print_json(&document)?;
    } else {
        print_text(&document);
    }
    Ok(if document.any_result() { Ended::Done } else { Ended::NoResult })
}

fn report(context: &Files<'_>, judgement: &Judgement) -> anyhow::Result<SeriesReport> {
    let slices = judgement.slices as u64;
    let series = judgement.series.as_str();
    let decode = Some(judgement.decode_s * 1e3);
    let judged = match &judgement.result {
        Ok(judged) => judged,
        Err(refusal) => {
            let mut report = SeriesReport::no_result(series, refusal, slices);
            report.latency_ms.decode = decode;
            return Ok(report);
        }
    };
    let mut report = match SeriesReport::result(series, &judged.judged.inference.logits, slices) {
        Ok(report) => report,
        Err(refusal) => return Ok(SeriesReport::no_result(series, &refusal, slices)),
    };
    report.quality.clone_from(&judgement.notes);
    let class = context.cam_class.unwrap_or(judged.judged.cam.class);
    let file = match context.out {
        Some(out) => Some(explain(context, judgement, &out.join(series), class, &report)?),
        None => None,
    };
    let name = context.model.manifest.class_keys[class].clone();
    let file = file.map(|f| f.display().to_string());
    complete(&mut report, &context.completion, &judged.judged, judgement.in_hu, name, file);
    let j = &judged.judged;
    report.latency_ms = LatencyMs {
        decode,
        resample: Some((judgement.resample_s - j.infer_s - j.cam_s) * 1e3),
        infer: Some(j.infer_s * 1e3),
        explain: Some(j.cam_s * 1e3),
    };
    Ok(report)
}

/// Writes pictures, page and map; returns the map's file.
fn explain(
    context: &Files<'_>,
    judgement: &Judgement,
    dir: &Path,
    class: usize,
    report: &SeriesReport,
) -> anyhow::Result<PathBuf> {
    let Ok(series) = &judgement.result else { bail!("nothing to explain") };
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let manifest = &context.model.manifest;
    let notice = model_info(context.model).notice();
    let slices = |k: usize| series.hu.get(k).map(Vec::as_slice);
    let input = SeriesToExplain {
        slices: &slices,
        depth_mm: &series.stack.depth_mm,
        shear_px: series.stack.shear_px.as_deref(),
        rows: series.stack.rows,
        columns: series.stack.columns,
        pixel_spacing_mm: series.stack.pixel_spacing_mm,
        orientation: series.stack.in_plane,
        inference: &series.judged.inference,
        head_weight: context.model.weights.head_weight(),
        class,
        class_names: &manifest.class_names,
        scores: &series.judged.inference.scores,
        geometry: CamGeometry {
            in_plane: &series.judged.in_plane,
            depth: &series.judged.depth,
            input_dhw: manifest.architecture.input_dhw,
        },
        window: context.judge.window(),
        banner: notice.as_deref(),
        notes: &report.quality,
        model_id: &manifest.id,
        trained_on: &manifest.trained_on,
    };
    explain_series(dir, &input, &RenderOptions::default())?;
    Ok(dir.join("cam.safetensors"))
}

/// The tensor `volume` of a safetensors file, of the shape `wanted` and in [0, 1].
pub fn read_volume(file: &Path, wanted: [usize; 3]) -> anyhow::Result<Vec<f32>> {
    let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let tensors = safetensors::SafeTensors::deserialize(&bytes).with_context(|| format!("read {}", file.display()))?;
    let volume = tensors.tensor("volume").with_context(|| format!("find `volume` in {}", file.display()))?;
    let shape = volume.shape();
    let tail = &shape[shape.len().saturating_sub(3)..];
    if volume.dtype() != safetensors::Dtype::F32
        || tail != wanted
        || shape[..shape.len() - tail.len()].iter().any(|d| *d != 1)
    {
        bail!("expected `volume` as F32 {wanted:?}, got {:?} {shape:?}", volume.dtype());
    }
    let input: Vec<f32> = volume.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if let Some(bad) = input.iter().find(|v| !(0.0..=1.0).contains(*v)) {
        bail!("expected `volume` in [0, 1], got {bad}");
    }
    Ok(input)
}

fn tensor(context: &mut Files<'_>, file: &Path, hasher: &StudyHasher) -> anyhow::Result<SeriesReport> {
    let wanted = context.model.manifest.architecture.input_dhw;
    let input = read_volume(file, wanted)?;
    let series = hasher.hash(&file.to_string_lossy());
    let JudgedTensor { inference, cam, texture, infer_s, cam_s } = match context.judge.judge_tensor(&input) {
        Ok(judged) => judged,
        Err(refusal) => return Ok(SeriesReport::no_result(series.as_str(), &refusal, wanted[0] as u64)),
    };
    let mut report = match SeriesReport::result(series.as_str(), &inference.logits, wanted[0] as u64) {
        Ok(report) => report,
        Err(refusal) => return Ok(SeriesReport::no_result(series.as_str(), &refusal, wanted[0] as u64)),
    };
    let class = context.cam_class.unwrap_or(cam.class);
    let cam = class_activation_map(&inference, context.model.weights.head_weight(), class);
    let mut written = None;
    if let Some(out) = context.out {
        let dir = out.join(series.as_str());
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let path = dir.join("cam.safetensors");
        write_cam(&path, &cam)?;
        written = Some(path.display().to_string());
    }
    report.quality.push("a prepared tensor: preprocessing and its checks were skipped".to_owned());
    // Whoever prepared the tensor knows what its grey values mean.
    context.completion.judge(&mut report, &inference.pooled, &texture, false);
    report.cam = Some(CamInfo { class: context.model.manifest.class_keys[class].clone(), file: written });
    report.latency_ms.infer = Some(infer_s * 1e3);
    report.latency_ms.explain = Some(cam_s * 1e3);
    Ok(report)
}

fn print_text(document: &InferDocument) {
    if let Some(notice) = document.model.notice() {
        println!("{notice}");
    }
    for series in &document.series {
        println!("series {} ({} slices)", series.series, series.slices);
        match (series.outcome, &series.scores) {
            (Outcome::Result, Some(scores)) => {
                println!("  predicted {}", series.predicted.as_deref().unwrap_or("?"));
                for (class, score) in scores {
                    println!("  {class:<12} {score:.4}");
                }
                if let Some(calibrated) = &series.calibrated {
                    let text: Vec<String> = calibrated.iter().map(|(class, p)| format!("{class} {p:.4}")).collect();
                    println!("  calibrated {}", text.join(", "));
                }
                if let Some(ood) = &series.ood {
                    let score = ood.score.map_or("unknown".to_owned(), |s| format!("{s:.2} of the limit"));
                    let word = if ood.flag { "FLAGGED" } else { "not flagged" };
                    println!("  distance from the training data {score}, {word}");
                }
                for note in &series.quality {
                    println!("  note: {note}");
                }
                if let Some(file) = series.cam.as_ref().and_then(|c| c.file.as_ref()) {
                    println!("  heat map {file}");
                }
            }
            _ => println!(
                "  no result, because {}: {}",
                series.reason.map_or("unknown", |r| r.as_str()),
                series.detail.as_deref().unwrap_or("")
            ),
        }
    }
}
