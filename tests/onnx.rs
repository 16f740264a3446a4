//! Exported models against the engine: `onnx.checker`, and the same outputs in ONNX Runtime.
//!
//! Tolerances: float32 logits, pooled vectors and feature maps 1e-3 * max(1, largest), scores 1e-4; float16 scores 2e-3,
//! activation maps 1e-2 of their range.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{darnet, python};
use darnet::engine::{BackendKind, CancelToken, EngineOptions, Inference, prepare};
use darnet::explain::class_activation_map;
use darnet::model::onnx::{INPUT_NAME, OPSET, OUTPUT_NAMES, OnnxPrecision, export_file};
use darnet::model::{Architecture, AttentionOrder, Model, synthetic};
use darnet::pipeline::workers::predicted;
use serde_json::{Value, json};

/// A model, its file, what the engine says.
struct Case {
    name: String,
    model: Model,
    precision: OnnxPrecision,
    file: PathBuf,
    input: PathBuf,
    expected: Inference,
}

fn engine(model: &Model, input: &[f32]) -> Inference {
    let backend = prepare(BackendKind::Cpu, model, &EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let mut out = Inference::default();
    backend.session().unwrap().run(input, &CancelToken::new(), &mut out).unwrap();
    out
}

/// Writes the input of `model` and exports it by `write`.
fn case(
    dir: &Path,
    name: String,
    model: Model,
    precision: OnnxPrecision,
    write: impl Fn(&Model, OnnxPrecision, &Path),
) -> Case {
    let volume = synthetic::volume(model.manifest.architecture.input_dhw, 11);
    let input = dir.join(format!("{name}.f32"));
    std::fs::write(&input, volume.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let file = dir.join(format!("{name}.onnx"));
    write(&model, precision, &file);
    let expected = engine(&model, &volume);
    Case { name, model, precision, file, input, expected }
}

/// Runs the cases in one Python; its answers in the same order.
fn onnx_runtime(cases: &[Case]) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/onnx/run.py");
    let mut child = Command::new(python()).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let list: Vec<Value> = cases.iter().map(|c| json!({ "model": c.file, "input": c.input })).collect();
    child.stdin.take().unwrap().write_all(json!(list).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "tests/onnx/run.py failed; its reason is on stderr above");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn max_abs(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (x, y)| m.max((x - y).abs()))
}

fn output(answer: &Value, index: usize) -> (Vec<usize>, Vec<f32>) {
    let output = &answer["outputs"][index];
    assert_eq!(output["name"], OUTPUT_NAMES[index]);
    assert_eq!(output["type"], "float32");
    let shape = serde_json::from_value(output["shape"].clone()).unwrap();
    (shape, serde_json::from_value(output["values"].clone()).unwrap())
}

fn check(case: &Case, answer: &Value) {
    let name = &case.name;
    let [c, d, h, w] = case.expected.feature_shape_cdhw;
    let classes = case.expected.logits.len();
    let [id, ih, iw] = case.model.manifest.architecture.input_dhw;
    assert_eq!(answer["input"], json!([INPUT_NAME, "tensor(float)", [1, 1, id, ih, iw]]), "{name}");
    assert_eq!(answer["opset"], json!([["", OPSET]]), "{name}");
    // Of float16 only one step in 1024 is left at each of some 40 layers; the scores' bound is the design's.
    let (relative, scores_within, map_within) = match case.precision {
        OnnxPrecision::F32 => (1e-3, 1e-4, 1e-3),
        OnnxPrecision::F16 => (1e-2, 2e-3, 1e-2),
    };
    let near = |index: usize, shape: &[usize], expected: &[f32], bound: f32| {
        let (got_shape, got) = output(answer, index);
        assert_eq!(got_shape, shape, "{name}: {}", OUTPUT_NAMES[index]);
        let difference = max_difference(&got, expected);
        println!("{name}: {} differ by {difference}, bound {bound}", OUTPUT_NAMES[index]);
        assert!(difference <= bound, "{name}: {} differ by {difference}, bound {bound}", OUTPUT_NAMES[index]);
    };
    let e = &case.expected;
    near(0, &[1, classes], &e.logits, relative * max_abs(&e.logits).max(1.0));
    near(1, &[1, classes], &e.scores, scores_within);
    near(2, &[1, c], &e.pooled, relative * max_abs(&e.pooled).max(1.0));
    near(3, &[1, c, d, h, w], &e.feature_map, relative * max_abs(&e.feature_map).max(1.0));

    // The map of the predicted class, as a share of its range: what a float16 backend can give.
    let class = predicted(&e.logits);
    let map = |inference: &Inference| class_activation_map(inference, case.model.weights.head_weight(), class).values;
    let expected = map(e);
    let got = map(&Inference { feature_map: output(answer, 3).1, ..e.clone() });
    let range = expected.iter().fold(f32::MIN, |m, v| m.max(*v)) - expected.iter().fold(f32::MAX, |m, v| m.min(*v));
    // A map of one cell has no range; its feature map was compared above.
    let share = if expected.len() > 1 { max_difference(&got, &expected) / range } else { 0.0 };
    println!("{name}: the map differs by {share} of its range");
    assert!(share <= map_within, "{name}: the map differs by {share} of its range, bound {map_within}");

    let metadata = &answer["metadata"];
    let manifest = &case.model.manifest;
    assert_eq!(metadata["darnet.model_id"], manifest.id.as_str());
    assert_eq!(metadata["darnet.weights_sha256"], case.model.sha256.as_str());
    assert_eq!(metadata["darnet.intended_use"], "demo");
    assert_eq!(metadata["darnet.precision"], case.precision.as_str());
    let parsed = |key: &str| serde_json::from_str::<Value>(metadata[key].as_str().unwrap()).unwrap();
    assert_eq!(parsed("darnet.class_keys"), json!(manifest.class_keys));
    assert_eq!(parsed("darnet.class_names"), json!(manifest.class_names));
    assert_eq!(parsed("darnet.preprocessing"), json!(manifest.preprocessing));
    assert_eq!(parsed("darnet.architecture"), json!(manifest.architecture));

    // float16 where the work is, float32 where precision is lost.
    let body = match case.precision {
        OnnxPrecision::F32 => json!(["FLOAT"]),
        OnnxPrecision::F16 => json!(["FLOAT16"]),
    };
    for op in ["Conv", "Add"] {
        assert_eq!(answer["types"][op], body, "{name}: {op}");
    }
    for op in ["ReduceMean", "Gemm", "Softmax", "Sigmoid"] {
        let absent =
            op == "Sigmoid" && !manifest.architecture.channel_attention && !manifest.architecture.depth_attention;
        assert!(absent || answer["types"][op] == json!(["FLOAT"]), "{name}: {op}");
    }
}

fn export_by_library(model: &Model, precision: OnnxPrecision, file: &Path) {
    export_file(model, precision, file, false).unwrap();
}

#[test]
fn every_ablation_and_order_gives_the_engines_outputs_in_onnx_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases = Vec::new();
    // A depth of one, more classes, and a width that channel attention narrows to more than one.
    let shapes = [(4, [7, 37, 29], 3), (20, [5, 18, 23], 5), (3, [1, 9, 16], 1)];
    for (shape, (base_width, input_dhw, num_classes)) in shapes.into_iter().enumerate() {
        for (channel_attention, depth_attention) in [(false, false), (true, false), (false, true), (true, true)] {
            for attention_order in [AttentionOrder::DepthFirst, AttentionOrder::ChannelFirst] {
                let both = channel_attention && depth_attention;
                if shape > 0 && !both {
                    continue;
                }
                let architecture = Architecture {
                    base_width,
                    input_dhw,
                    num_classes,
                    channel_attention,
                    depth_attention,
                    attention_order,
                };
                for precision in [OnnxPrecision::F32, OnnxPrecision::F16] {
                    let model = Model::synthetic("ablation", &architecture, 4).unwrap();
                    let order = if attention_order == AttentionOrder::DepthFirst { "depth" } else { "channel" };
                    let attentions = format!("ca{channel_attention}-da{depth_attention}-{order}");
                    let name = format!("{shape}-{attentions}-{}", precision.as_str());
                    cases.push(case(dir.path(), name, model, precision, export_by_library));
                }
            }
        }
    }
    assert_eq!(cases.len(), 2 * (8 + 2 + 2));
    let answers = onnx_runtime(&cases);
    assert_eq!(answers.len(), cases.len());
    for (case, answer) in cases.iter().zip(&answers) {
        check(case, answer);
    }
    // The orders are told apart, so that one written for the other would have failed.
    let logits = |name: &str| &cases.iter().find(|c| c.name == name).unwrap().expected.logits;
    let apart = max_difference(logits("0-catrue-datrue-depth-f32"), logits("0-catrue-datrue-channel-f32"));
    assert!(apart > 2e-3 * max_abs(logits("0-catrue-datrue-depth-f32")).max(1.0), "{apart}");
}

#[test]
fn the_embedded_model_exported_on_the_command_line_gives_the_engines_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let by_command = |model: &Model, precision: OnnxPrecision, file: &Path| {
        let mut args = vec!["model", "export", "--json", "--onnx", file.to_str().unwrap()];
        if precision == OnnxPrecision::F16 {
            args.push("--fp16");
        }
        let (code, out, err) = darnet(&args);
        assert_eq!(code, 0, "{err}");
        let document: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(document["schema"], "darnet.model-export/1");
        assert_eq!(document["model"]["sha256"], model.sha256.as_str());
        assert_eq!(document["bytes"], std::fs::metadata(file).unwrap().len());
        assert_eq!(document["precision"], precision.as_str());
        // Not again unless asked, and then the same bytes.
        let before = std::fs::read(file).unwrap();
        let (code, _, err) = darnet(&args);
        assert_eq!(code, 1);
        assert!(err.contains("exists"), "{err}");
        args.push("--force");
        assert_eq!(darnet(&args).0, 0);
        assert!(std::fs::read(file).unwrap() == before);
    };
    let cases = [OnnxPrecision::F32, OnnxPrecision::F16].map(|precision| {
        let name = format!("embedded-{}", precision.as_str());
        case(dir.path(), name, Model::embedded().unwrap(), precision, by_command)
    });
    for (case, answer) in cases.iter().zip(&onnx_runtime(&cases)) {
        check(case, answer);
    }
}

#[test]
fn a_model_folder_is_exported_and_a_missing_one_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    let (folder, file) = (folder.to_str().unwrap(), dir.path().join("m.onnx"));
    let made = ["model", "synthetic", "--out", folder, "--width", "2", "--input", "4,16,16", "--seed", "9"];
    let (code, _, err) = darnet(&made);
    assert_eq!(code, 0, "{err}");
    let (code, out, err) = darnet(&["model", "export", folder, "--onnx", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("synthetic-9") && out.contains("say nothing about patients"), "{out}");
    let absent = dir.path().join("absent");
    let (code, _, err) = darnet(&["model", "export", absent.to_str().unwrap(), "--onnx", "x.onnx"]);
    assert_eq!(code, 1);
    assert!(err.contains("model.toml"), "{err}");
    assert_eq!(darnet(&["model", "export"]).0, 2);
}

#[test]
fn the_resident_bench_answers_line_by_line_and_outlives_a_bad_one() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::embedded().unwrap();
    let shape = model.manifest.architecture.input_dhw;
    let volume = synthetic::volume(shape, 3);
    let raw: Vec<u8> = volume.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &raw).unwrap();
    let file = dir.path().join("v.safetensors");
    std::fs::write(&file, safetensors::serialize([("volume", view)], None).unwrap()).unwrap();
    let mut child = Command::new(common::DARNET)
        .args(["bench", "inference", "--serve", "--threads", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = format!("{}\nabsent\n{}\n", file.display(), file.display());
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 4, "{text}");
    assert_eq!(answers[0]["ready"], true);
    assert_eq!(answers[0]["model"]["sha256"], model.sha256.as_str());
    assert_eq!(answers[1]["logits"], json!(engine(&model, &volume).logits));
    assert!(answers[1]["seconds"].as_f64().unwrap() > 0.0);
    assert!(answers[2]["error"].as_str().unwrap().contains("absent"));
    assert_eq!(answers[3]["logits"], answers[1]["logits"]);
}
