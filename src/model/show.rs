//! The tables of `darnet model show`.

use std::fmt::Write;

use serde::Serialize;

use super::architecture::{LayerRow, StageRow};
use super::manifest::{Architecture, Manifest};
use super::{AttentionOrder, Model};

/// Schema of [`ModelSummary`] as JSON.
pub const SUMMARY_SCHEMA: &str = "darnet.model-summary/1";

/// What `darnet model show --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct ModelSummary<'a> {
    /// [`SUMMARY_SCHEMA`].
    pub schema: &'static str,
    /// The manifest.
    pub manifest: &'a Manifest,
    /// SHA-256 of the weights file.
    pub sha256: &'a str,
    /// Trainable parameters.
    pub parameters: u64,
    /// Multiply-adds of one inference.
    pub macs: u64,
    /// Shape of the last feature map.
    pub feature_shape_cdhw: [usize; 4],
    /// Stem, layer1 to layer4, head.
    pub stages: Vec<StageRow>,
    /// Every layer with weights.
    pub layers: Vec<LayerRow>,
}

/// The summary of `model`.
pub fn summary(model: &Model) -> ModelSummary<'_> {
    let architecture = &model.manifest.architecture;
    ModelSummary {
        schema: SUMMARY_SCHEMA,
        manifest: &model.manifest,
        sha256: &model.sha256,
        parameters: architecture.parameter_count(),
        macs: architecture.macs(),
        feature_shape_cdhw: architecture.feature_shape_cdhw(),
        stages: architecture.stages(),
        layers: architecture.layers(),
    }
}

/// The model's facts and its exact parameter and multiply-add tables, for a terminal.
pub fn render_table(model: &Model) -> String {
    let m = &model.manifest;
    let p = &m.preprocessing;
    let mut out = String::new();
    let mut fact = |key: &str, value: String| {
        let _ = writeln!(out, "{key:<14} {value}");
    };
    fact("model", m.id.clone());
    fact("trained on", m.trained_on.clone());
    fact("intended use", m.intended_use.clone());
    fact("weights", format!("{} sha256 {}", m.weights_file, model.sha256));
    let classes: Vec<String> =
        m.class_keys.iter().zip(&m.class_names).map(|(key, name)| format!("{key} ({name})")).collect();
    fact("classes", classes.join(", "));
    fact("attention", attention(&m.architecture).to_owned());
    fact("window", format!("centre {} HU, width {} HU", p.window_center_hu, p.window_width_hu));
    fact("crop", format!("{} of rows and columns", p.crop_fraction));
    fact("depth", format!("{:?}, {:?}", p.depth_grid, p.slice_direction));
    fact("calibration", m.calibration.clone().unwrap_or_else(|| "none".to_owned()));
    for (key, value) in &m.scores {
        fact("score", format!("{key} {value}"));
    }
    out.push('\n');
    out.push_str(&render_architecture(&m.architecture));
    out
}

/// The parameter and multiply-add tables alone.
pub fn render_architecture(architecture: &Architecture) -> String {
    let mut out = String::new();
    let [d, h, w] = architecture.input_dhw;
    let _ = writeln!(out, "input 1 x {d} x {h} x {w}\n");
    let line = |out: &mut String, cells: [&str; 6]| {
        let [name, kind, kernel, shape, parameters, macs] = cells;
        let text = format!("{name:<22} {kind:<18} {kernel:<15} {shape:<20} {parameters:>12} {macs:>18}");
        let _ = writeln!(out, "{}", text.trim_end());
    };
    line(&mut out, ["layer", "kind", "kernel/stride", "output", "parameters", "multiply-adds"]);
    for l in architecture.layers() {
        let kernel = match (l.kernel_dhw, l.stride_dhw) {
            (Some(k), Some(s)) => format!("{}/{}", join(&k, ""), join(&s, "")),
            _ => String::new(),
        };
        line(
            &mut out,
            [&l.name, l.kind, &kernel, &shape(l.channels, l.output_dhw), &grouped(l.parameters), &grouped(l.macs)],
        );
    }
    out.push('\n');
    line(&mut out, ["stage", "", "", "output", "parameters", "multiply-adds"]);
    for s in architecture.stages() {
        line(&mut out, [&s.name, "", "", &shape(s.channels, s.output_dhw), &grouped(s.parameters), &grouped(s.macs)]);
    }
    let (parameters, macs) = (architecture.parameter_count(), architecture.macs());
    line(&mut out, ["all", "", "", "", &grouped(parameters), &grouped(macs)]);
    out
}

fn attention(architecture: &Architecture) -> &'static str {
    match (architecture.depth_attention, architecture.channel_attention, architecture.attention_order) {
        (true, true, AttentionOrder::DepthFirst) => "depth, then channel",
        (true, true, AttentionOrder::ChannelFirst) => "channel, then depth",
        (true, false, _) => "depth",
        (false, true, _) => "channel",
        (false, false, _) => "none",
    }
}

fn join(numbers: &[usize], separator: &str) -> String {
    let texts: Vec<String> = numbers.iter().map(usize::to_string).collect();
    texts.join(separator)
}

fn shape(channels: usize, dhw: [usize; 3]) -> String {
    format!("{channels} x {}", join(&dhw, " x "))
}

/// A number with thousands separated.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_the_full_network_show_the_published_totals() {
        let table = render_architecture(&Architecture::full());
        assert!(table.contains("35,237,163"), "{table}");
        assert!(table.contains("512 x 8 x 14 x 14"));
        let all = table.lines().last().unwrap();
        assert!(all.starts_with("all") && all.contains("636,037,847,552"), "{all}");
        assert!(table.lines().all(|l| l.len() <= 112), "{table}");
    }

    #[test]
    fn the_summary_is_json_with_the_same_totals() {
        let model = Model::embedded().unwrap();
        let json = serde_json::to_value(summary(&model)).unwrap();
        assert_eq!(json["manifest"]["id"], "demo");
        let stages = json["stages"].as_array().unwrap();
        let sum: u64 = stages.iter().map(|s| s["macs"].as_u64().unwrap()).sum();
        assert_eq!(json["macs"].as_u64(), Some(sum));
        assert!(render_table(&model).contains(&format!("trained on     {}", model.manifest.trained_on)));
    }

    #[test]
    fn thousands_are_separated() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
