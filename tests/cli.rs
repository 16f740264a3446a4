//! The command line as a user meets it: help, exit codes, documents, formats.

mod common;

use std::path::Path;

use common::{darnet, phantom_series};
use darnet::model::Model;
use darnet::phantom::{PhantomClass, PhantomSpec, generate};
use serde_json::Value;

const COMMANDS: [&str; 11] =
    ["demo", "serve", "check-config", "infer", "send", "phantom", "model", "acceptance", "bench", "completions", "man"];

#[test]
fn every_command_explains_itself() {
    let (code, help, _) = darnet(&["--help"]);
    assert_eq!(code, 0);
    for command in COMMANDS {
        assert!(help.contains(command), "{command}");
        let (code, out, _) = darnet(&[command, "--help"]);
        assert_eq!(code, 0, "{command}");
        assert!(out.len() > 100, "{command}: {out}");
    }
    let (code, out, _) = darnet(&["--version"]);
    assert_eq!(code, 0);
    assert!(out.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [&["nonsense"][..], &["infer", "--no-such-option"], &["bench"], &["infer", "--backend", "abacus", "x"]]
    {
        assert_eq!(darnet(args).0, 2, "{args:?}");
    }
}

#[test]
fn shell_completions_and_manual_pages_are_written() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = darnet(&["completions", shell]);
        assert_eq!(code, 0);
        assert!(out.contains("check-config"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (code, _, err) = darnet(&["man", "--out", dir.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    for page in ["darnet.1", "darnet-serve.1", "darnet-model-new.1"] {
        let text = std::fs::read_to_string(dir.path().join(page)).unwrap_or_else(|_| panic!("{page}"));
        assert!(text.contains(".TH"), "{page}");
    }
}

#[test]
fn model_show_prints_the_exact_tables_of_the_paper() {
    let (code, out, _) = darnet(&["model", "show", "--full-size"]);
    assert_eq!(code, 0);
    let plain = out.replace([',', '_'], "");
    assert!(plain.contains("35237163"), "{out}");
    for (stage, macs) in [
        ("stem", "7552892928"),
        ("layer1", "355141157888"),
        ("layer2", "156196409344"),
        ("layer3", "78098219008"),
        ("layer4", "39049166848"),
        ("all", "636037847552"),
    ] {
        let found = plain.lines().any(|l| l.starts_with(stage) && l.ends_with(macs));
        assert!(found, "{stage} {macs} in {out}");
    }
    let (code, out, _) = darnet(&["model", "show", "--json"]);
    assert_eq!(code, 0);
    let document: Value = serde_json::from_str(&out).unwrap();
    assert!(document["manifest"]["trained_on"].as_str().unwrap().contains("phantoms"), "{document}");
    assert_eq!(document["manifest"]["intended_use"], "demo");
}

#[test]
fn a_model_is_made_verified_and_used_and_a_damaged_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let weights = dir.path().join("weights.safetensors");
    let embedded = Model::embedded().unwrap();
    let architecture = &embedded.manifest.architecture;
    std::fs::write(&weights, embedded.weights.to_safetensors()).unwrap();
    let out = dir.path().join("mine");
    let (code, _, err) = darnet(&[
        "model",
        "new",
        "--weights",
        weights.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--width",
        &architecture.base_width.to_string(),
        "--input",
        &architecture.input_dhw.map(|n| n.to_string()).join(","),
        "--trained-on",
        "nothing",
        "--intended-use",
        "demo",
    ]);
    assert_eq!(code, 0, "{err}");
    let (code, text, err) = darnet(&["model", "verify", out.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}{err}");
    let series = phantom_series(41, 30, 128);
    let (code, with_mine, err) =
        darnet(&["infer", "--json", "--model", out.to_str().unwrap(), series.folder.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    let (_, with_embedded, _) = darnet(&["infer", "--json", series.folder.to_str().unwrap()]);
    let logits = |text: &str| serde_json::from_str::<Value>(text).unwrap()["series"][0]["logits"].clone();
    assert_eq!(logits(&with_mine), logits(&with_embedded));

    let file = out.join(Model::load(&out).unwrap().manifest.weights_file);
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (code, _, err) = darnet(&["model", "verify", out.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.to_lowercase().contains("sha"), "{err}");
}

fn infer(path: &Path) -> (i32, Value) {
    let (code, out, err) = darnet(&["infer", "--json", path.to_str().unwrap()]);
    (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}")))
}

/// One phantom as DICOM, NIfTI and PNG.
#[test]
fn every_format_is_judged_and_dicom_and_nifti_agree() {
    let dir = tempfile::tempdir().unwrap();
    let mut scores = Vec::new();
    for format in ["dicom", "nifti", "png"] {
        let out = dir.path().join(format);
        let (code, listed, err) = darnet(&[
            "phantom",
            "--out",
            out.to_str().unwrap(),
            "--class",
            "cp",
            "--seed",
            "5",
            "--format",
            format,
            "--slices",
            "48",
            "--size",
            "160",
        ]);
        assert_eq!(code, 0, "{err}");
        let image = listed.lines().next().unwrap().split('\t').next().unwrap().to_owned();
        let (code, document) = infer(Path::new(&image));
        assert_eq!(code, 0, "{format}: {document}");
        assert_eq!(document["schema"], "darnet.infer/1");
        assert_eq!(document["model"]["intended_use"], "demo");
        let series = &document["series"][0];
        assert_eq!(series["outcome"], "result", "{format}: {series}");
        let logits: Vec<f64> = serde_json::from_value(series["logits"].clone()).unwrap();
        scores.push(logits);
    }
    for (a, b) in scores[0].iter().zip(&scores[1]) {
        assert!((a - b).abs() < 1e-4, "DICOM {:?} NIfTI {:?}", scores[0], scores[1]);
    }
}

#[test]
fn a_prepared_tensor_is_judged_without_preprocessing() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::embedded().unwrap();
    let shape = model.manifest.architecture.input_dhw;
    let volume = darnet::model::synthetic::volume(shape, 3);
    let bytes: Vec<u8> = volume.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes).unwrap();
    let file = dir.path().join("volume.safetensors");
    std::fs::write(&file, safetensors::serialize([("volume", view)], None).unwrap()).unwrap();
    let (code, out, err) = darnet(&["infer", "--json", "--tensor", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    let document: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(document["series"][0]["outcome"], "result");
    // The same through the library's oracle.
    let backend = darnet::engine::prepare(darnet::engine::BackendKind::Reference, &model, &Default::default()).unwrap();
    let mut oracle = darnet::engine::Inference::default();
    backend.session().unwrap().run(&volume, &darnet::engine::CancelToken::new(), &mut oracle).unwrap();
    let logits: Vec<f64> = serde_json::from_value(document["series"][0]["logits"].clone()).unwrap();
    for (a, b) in logits.iter().zip(&oracle.logits) {
        assert!(
            (a - f64::from(*b)).abs() <= 1e-3 * oracle.logits.iter().fold(1.0f64, |m, l| m.max(f64::from(l.abs())))
        );
    }
}

#[test]
fn the_heat_map_is_written_with_its_raw_map() {
    let series = phantom_series(42, 40, 128);
    let out = tempfile::tempdir().unwrap();
    let (code, text, err) = darnet(&[
        "infer",
        "--json",
        "--out",
        out.path().to_str().unwrap(),
        "--cam-class",
        "covid19",
        series.folder.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{err}");
    let document: Value = serde_json::from_str(&text).unwrap();
    let cam = &document["series"][0]["cam"];
    assert_eq!(cam["class"], "covid19");
    let file = Path::new(cam["file"].as_str().unwrap());
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let [_, d, h, w] = Model::embedded().unwrap().manifest.architecture.feature_shape_cdhw();
    assert_eq!(tensors.tensor("cam").unwrap().shape(), [d, h, w]);
    let page = std::fs::read_to_string(file.with_file_name("summary.html")).unwrap();
    assert!(page.contains("demo") && page.contains("phantoms"), "the page says what the model is");
    assert!(file.with_file_name("top-1.png").is_file());
}

#[test]
fn phantoms_of_one_seed_are_identical() {
    let spec = PhantomSpec::random(PhantomClass::Cp, 9).with_shape(24, 96, 96);
    assert_eq!(generate(&spec).hu, generate(&spec).hu);
}

#[test]
fn the_demo_runs_the_whole_program_and_ends_by_itself() {
    let out = tempfile::tempdir().unwrap();
    let (code, text, err) =
        darnet(&["demo", "--json", "--slices", "60", "--rate", "200", "--out", out.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["schema"], "darnet.demo/1");
    assert_eq!(document["result"]["report"]["outcome"], "result");
    assert!(document["result"]["model"]["trained_on"].as_str().unwrap().contains("phantoms"), "{document}");
    let page = document["heat_map"][0].as_str().unwrap();
    assert!(Path::new(page).is_file());
}

#[test]
fn the_acceptance_test_passes_on_the_embedded_model() {
    let (code, text, err) = darnet(&["acceptance", "--json"]);
    let document: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}{err}"));
    assert_eq!(code, 0, "{document:#}");
    assert_eq!(document["passed"], true);
    let known =
        document["checks"].as_array().unwrap().iter().filter(|c| c["check"].as_str().unwrap().contains("known result"));
    assert_eq!(known.count(), 3, "{document:#}");
}
