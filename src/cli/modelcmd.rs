//! `model new|show|verify|export|synthetic`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use darnet::model::manifest::{Architecture, AttentionOrder, Preprocessing};
use darnet::model::{Model, new as new_model, onnx, show as show_model, verify as verify_model};

use super::{Ended, print_json};

/// Arguments of `darnet model new`.
#[derive(Args)]
pub struct NewArgs {
    /// A safetensors file with the reference implementation's parameter names.
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// Model folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Identifier; the folder's name when absent.
    #[arg(long)]
    id: Option<String>,
    /// Channels of the first layer; found from the weights when absent.
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Input depth, height, width; 64,224,224 or what the weights say when absent.
    #[arg(long, value_name = "D,H,W", value_delimiter = ',')]
    input: Option<Vec<usize>>,
    /// Order of the attentions in a block: depth-first or channel-first.
    #[arg(long, default_value = "depth-first", value_name = "ORDER")]
    attention_order: String,
    /// Attentions the weights do not have: ca (channel), da (depth).
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    /// What the weights were trained on.
    #[arg(long)]
    trained_on: Option<String>,
    /// What the model is for: demo, research, …
    #[arg(long)]
    intended_use: Option<String>,
    /// Calibration file name.
    #[arg(long)]
    calibration: Option<String>,
}

/// Arguments of `darnet model show`.
#[derive(Args)]
pub struct ShowArgs {
    /// Model folder; the embedded demonstration model when absent.
    #[arg(value_name = "DIR")]
    model: Option<PathBuf>,
    /// Show the full-size architecture of the paper instead of a model.
    #[arg(long, conflicts_with = "model")]
    full_size: bool,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Arguments of `darnet model verify`.
#[derive(Args)]
pub struct VerifyArgs {
    /// Model folder.
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Arguments of `darnet model export`.
#[derive(Args)]
pub struct ExportArgs {
    /// Model folder; the embedded demonstration model when absent.
    #[arg(value_name = "DIR")]
    model: Option<PathBuf>,
    /// ONNX file to write: input `volume`, outputs `logits`, `scores`, `pooled`, `feature_map`.
    #[arg(long, value_name = "FILE")]
    onnx: PathBuf,
    /// Strongly typed float16 (means, gates and head stay float32).
    #[arg(long)]
    fp16: bool,
    /// Overwrite the file.
    #[arg(long)]
    force: bool,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Arguments of `darnet model synthetic`.
#[derive(Args)]
pub struct SyntheticArgs {
    /// Model folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The paper's size: width 64, input 64 x 224 x 224.
    #[arg(long, conflicts_with_all = ["width", "input"])]
    full_size: bool,
    /// Channels of the first layer.
    #[arg(long, default_value_t = 8, value_name = "N")]
    width: usize,
    /// Input depth, height, width.
    #[arg(long, default_value = "32,96,96", value_name = "D,H,W", value_delimiter = ',')]
    input: Vec<usize>,
    /// Order of the attentions in a block: depth-first or channel-first.
    #[arg(long, default_value = "depth-first", value_name = "ORDER")]
    attention_order: String,
    /// Attentions to leave out: ca (channel), da (depth).
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// `darnet model new`.
pub fn new(args: &NewArgs) -> anyhow::Result<Ended> {
    let input_dhw = args.input.as_deref().map(input_dhw).transpose()?;
    let attention_order = attention_order(&args.attention_order)?;
    let [without_ca, without_da] = without(&args.without)?;
    let options = new_model::NewModel {
        id: args.id.clone(),
        base_width: args.width,
        input_dhw,
        attention_order,
        channel_attention: without_ca.then_some(false),
        depth_attention: without_da.then_some(false),
        trained_on: args.trained_on.clone(),
        intended_use: args.intended_use.clone(),
        calibration: args.calibration.clone(),
        preprocessing: Preprocessing::default(),
    };
    let manifest = new_model::write_model(&args.weights, &args.out, &options)
        .with_context(|| format!("make a model in {}", args.out.display()))?;
    println!("{}: {}", args.out.display(), manifest.id);
    Ok(Ended::Done)
}

fn input_dhw(list: &[usize]) -> anyhow::Result<[usize; 3]> {
    match *list {
        [d, h, w] => Ok([d, h, w]),
        _ => bail!("--input wants three numbers D,H,W, got {}", list.len()),
    }
}

fn attention_order(name: &str) -> anyhow::Result<AttentionOrder> {
    match name {
        "depth-first" => Ok(AttentionOrder::DepthFirst),
        "channel-first" => Ok(AttentionOrder::ChannelFirst),
        other => bail!("--attention-order wants depth-first or channel-first, got {other}"),
    }
}

/// Whether `ca` and `da` are named.
fn without(names: &[String]) -> anyhow::Result<[bool; 2]> {
    let mut found = [false; 2];
    for name in names {
        match name.as_str() {
            "ca" => found[0] = true,
            "da" => found[1] = true,
            other => bail!("--without wants ca or da, got {other}"),
        }
    }
    Ok(found)
}

/// `darnet model export`.
pub fn export(args: &ExportArgs) -> anyhow::Result<Ended> {
    let model = load(args.model.as_ref())?;
    let precision = if args.fp16 { onnx::OnnxPrecision::F16 } else { onnx::OnnxPrecision::F32 };
    let exported = onnx::export_file(&model, precision, &args.onnx, args.force)
        .with_context(|| format!("export to {}", args.onnx.display()))?;
    let manifest = &model.manifest;
    if args.json {
        print_json(&serde_json::json!({
            "schema": "darnet.model-export/1",
            "model": { "id": manifest.id, "sha256": model.sha256, "intended_use": manifest.intended_use },
            "file": args.onnx.display().to_string(),
            "bytes": exported.bytes,
            "sha256": exported.sha256,
            "precision": precision.as_str(),
            "opset": onnx::OPSET,
            "input": onnx::INPUT_NAME,
            "outputs": onnx::OUTPUT_NAMES,
        }))?;
    } else {
        let (id, file) = (&manifest.id, args.onnx.display());
        println!("{file}: {id} as {}, {} bytes, sha256 {}", precision.as_str(), exported.bytes, exported.sha256);
        if manifest.is_demo() {
            println!(
                "  a demonstration model, trained on {}: its results say nothing about patients",
                manifest.trained_on
            );
        }
    }
    Ok(Ended::Done)
}

/// `darnet model synthetic`.
pub fn synthetic(args: &SyntheticArgs) -> anyhow::Result<Ended> {
    let [without_ca, without_da] = without(&args.without)?;
    let full = Architecture::full();
    let architecture = Architecture {
        base_width: if args.full_size { full.base_width } else { args.width },
        input_dhw: if args.full_size { full.input_dhw } else { input_dhw(&args.input)? },
        channel_attention: !without_ca,
        depth_attention: !without_da,
        attention_order: attention_order(&args.attention_order)?,
        ..full
    };
    let model = Model::synthetic(&format!("synthetic-{}", args.seed), &architecture, args.seed)?;
    model.save(&args.out).with_context(|| format!("make a model in {}", args.out.display()))?;
    println!("{}: {}, trained on nothing", args.out.display(), model.manifest.id);
    Ok(Ended::Done)
}

/// `darnet model show`.
pub fn show(args: &ShowArgs) -> anyhow::Result<Ended> {
    if args.full_size {
        let architecture = darnet::model::manifest::Architecture::full();
        if args.json {
            bail!("--json shows a model; --full-size has none");
        }
        print!("{}", show_model::render_architecture(&architecture));
        return Ok(Ended::Done);
    }
    let model = load(args.model.as_ref())?;
    if args.json {
        print_json(&show_model::summary(&model))?
    } else {
        print!("{}", show_model::render_table(&model))
    }
    Ok(Ended::Done)
}

/// `darnet model verify`.
pub fn verify(args: &VerifyArgs) -> anyhow::Result<Ended> {
    let report = verify_model::verify(&args.model).with_context(|| format!("verify {}", args.model.display()))?;
    if args.json {
        print_json(&report)?;
    } else {
        println!(
            "{}: {} tensors, {} parameters, all as the manifest says",
            report.id, report.tensors, report.parameters
        );
        for remark in &report.remarks {
            println!("  {remark}");
        }
    }
    Ok(Ended::Done)
}

/// The model of `dir`, or the embedded one.
pub fn load(dir: Option<&PathBuf>) -> anyhow::Result<Model> {
    Ok(match dir {
        Some(dir) => Model::load(dir).with_context(|| format!("load the model in {}", dir.display()))?,
        None => Model::embedded()?,
    })
}
