//! `model new|show|verify`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use darnet::model::manifest::{AttentionOrder, Preprocessing};
use darnet::model::{Model, new as new_model, show as show_model, verify as verify_model};

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

/// `darnet model new`.
pub fn new(args: &NewArgs) -> anyhow::Result<Ended> {
    let input_dhw = match &args.input {
        None => None,
        Some(list) => match list.as_slice() {
            &[d, h, w] => Some([d, h, w]),
            other => bail!("--input wants three numbers D,H,W, got {}", other.len()),
        },
    };
    let attention_order = match args.attention_order.as_str() {
        "depth-first" => AttentionOrder::DepthFirst,
        "channel-first" => AttentionOrder::ChannelFirst,
        other => bail!("--attention-order wants depth-first or channel-first, got {other}"),
    };
    let (mut channel_attention, mut depth_attention) = (None, None);
    for name in &args.without {
        match name.as_str() {
            "ca" => channel_attention = Some(false),
            "da" => depth_attention = Some(false),
            other => bail!("--without wants ca or da, got {other}"),
        }
    }
    let options = new_model::NewModel {
        id: args.id.clone(),
        base_width: args.width,
        input_dhw,
        attention_order,
        channel_attention,
        depth_attention,
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
