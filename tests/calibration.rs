//! What the scanner does with a calibration: probabilities, the distance from the training data, what follows from it.

mod common;

use std::path::{Path, PathBuf};

use common::{Daemon, darnet, phantom_series, real_data};
use darnet::dicom::scu::{SendOptions, send};
use darnet::model::manifest::SourceWindow;
use darnet::model::{CLASS_KEYS, Model};
use darnet::phantom::{DicomOptions, Format, PhantomClass, Ranges, Subject, WriteRequest, write_cases, write_dicom};
use darnet::report::calibration::{Calibration, OodReference, Threshold};
use serde_json::Value;

/// A model folder with a calibration whose limit is `limit`; every scan's distance is that of its features from 0.
fn model(dir: &Path, limit: f64, source_window: SourceWindow) -> PathBuf {
    Model::embedded().unwrap().save(dir).unwrap();
    let mut model = Model::load(dir).unwrap();
    model.manifest.calibration = Some("calibration.toml".into());
    model.manifest.source_window = source_window;
    std::fs::write(dir.join("model.toml"), model.manifest.to_toml().unwrap()).unwrap();
    let n = model.manifest.architecture.feature_shape_cdhw()[0];
    let mut whitening = Vec::new();
    for row in 0..n {
        whitening.extend((0..=row).map(|column| if row == column { 1.0f32 } else { 0.0 }));
    }
    let calibration = Calibration {
        model: model.manifest.id.clone(),
        weights_sha256: model.sha256.clone(),
        fitted_on: "thirty scans".into(),
        temperature: 2.0,
        thresholds: CLASS_KEYS[..2]
            .iter()
            .map(|k| ((*k).into(), Threshold { alert: 0.0, ..Threshold::default() }))
            .collect(),
        ood: Some(OodReference {
            features: n,
            scans: 30,
            shrinkage: 0.0,
            limit,
            quantile: 0.99,
            limit_scans: 30,
            means: vec![0.0; CLASS_KEYS.len() * n],
            whitening,
        }),
        ..Calibration::none()
    };
    std::fs::write(dir.join("calibration.toml"), toml::to_string(&calibration).unwrap()).unwrap();
    dir.to_path_buf()
}

fn infer(model: &Path, scan: &Path) -> Value {
    let (code, out, err) = darnet(&["infer", "--json", "--model", model.to_str().unwrap(), scan.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str::<Value>(&out).unwrap()["series"][0].clone()
}

#[test]
fn calibrated_probabilities_and_the_distance_come_with_every_result() {
    let dir = tempfile::tempdir().unwrap();
    let scan = phantom_series(51, 30, 128);
    let near = infer(&model(&dir.path().join("near"), 1e6, SourceWindow::Hu), &scan.folder);
    let logits: Vec<f64> = serde_json::from_value(near["logits"].clone()).unwrap();
    let exp: Vec<f64> = logits.iter().map(|l| (l / 2.0).exp()).collect();
    for (i, key) in CLASS_KEYS.iter().enumerate() {
        let wanted = exp[i] / exp.iter().sum::<f64>();
        assert!((near["calibrated"][key].as_f64().unwrap() - wanted).abs() < 1e-12, "{near}");
    }
    assert_eq!(near["ood"]["flag"], false);
    assert!(near["ood"]["why"].is_null());
    let far = infer(&model(&dir.path().join("far"), 1e-6, SourceWindow::Hu), &scan.folder);
    assert_eq!((far["ood"]["flag"].clone(), far["outcome"].clone()), (true.into(), "result".into()));
    // The same distance under another limit.
    let ratio = far["ood"]["score"].as_f64().unwrap() / near["ood"]["score"].as_f64().unwrap();
    assert!((ratio / 1e12 - 1.0).abs() < 1e-9, "{ratio}");
    assert!(far["quality"].to_string().contains("unlike the training data"), "{far}");
}

#[test]
fn a_model_of_pictures_with_an_unknown_window_flags_every_scan_in_hu_and_no_picture() {
    let dir = tempfile::tempdir().unwrap();
    let folder = model(&dir.path().join("m"), 1e6, SourceWindow::Unknown);
    let scan = phantom_series(52, 30, 128);
    let report = infer(&folder, &scan.folder);
    assert_eq!(report["ood"]["flag"], true);
    assert!(report["ood"]["why"].as_str().unwrap().contains("unknown window"), "{report}");
    let request = WriteRequest {
        shape: Some([30, 128, 128]),
        ..WriteRequest::new(dir.path().join("png"), PhantomClass::Covid, 1, 53, Format::Png)
    };
    let cases = write_cases(&request, &mut |_| {}).unwrap();
    let report = infer(&folder, &cases[0].image);
    assert_eq!(report["ood"]["flag"], false, "{report}");
}

#[test]
fn a_calibration_of_other_weights_is_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = model(&dir.path().join("m"), 1.0, SourceWindow::Hu);
    let file = folder.join("calibration.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let sha = Calibration::parse(&text).unwrap().weights_sha256;
    let scan = phantom_series(54, 30, 128);
    let refused = |text: String, word: &str| {
        std::fs::write(&file, text).unwrap();
        let (code, _, err) = darnet(&["infer", "--model", folder.to_str().unwrap(), scan.folder.to_str().unwrap()]);
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(word), "{err}");
    };
    refused(text.replace(&sha, &"0".repeat(64)), "another weights");
    let config = dir.path().join("darnet.toml");
    std::fs::write(&config, format!("[model]\npath = {:?}\n", folder.display().to_string())).unwrap();
    let (code, _, err) = darnet(&["check-config", config.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.contains("another weights"), "{err}");
    refused(text.replace("fitted_on", "fitted_an"), "calibration");
}

#[test]
fn a_flagged_scan_alerts_is_suppressed_or_refused_as_configured() {
    let dir = tempfile::tempdir().unwrap();
    let folder = model(&dir.path().join("m"), 1e-6, SourceWindow::Hu);
    let scan = phantom_series(55, 30, 128);
    for (action, outcome, alert) in
        [("flag", "result", true), ("suppress", "result", false), ("refuse", "no_result", false)]
    {
        let daemon = Daemon::start(&format!(
            "[assembly]\ngrace_ms = 200\n[alert]\nood_action = \"{action}\"\n[model]\npath = {:?}\n",
            folder.display().to_string()
        ));
        let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
        send(&scan.files, &options, &mut |_| {}).unwrap();
        let result = &daemon.wait_results(1, 60)[0];
        assert_eq!(result["outcome"], outcome, "{action}: {result}");
        assert_eq!(result["alert"]["alert"], alert, "{action}: {result}");
        assert_eq!(result["ood"]["flag"], true, "{action}: {result}");
        if action == "refuse" {
            assert_eq!(result["reason"], "out_of_distribution");
            assert!(result["logits"].is_null() && result["scores"].is_null());
        }
    }
}

#[test]
fn the_embedded_model_tells_phantoms_like_its_training_data_apart() {
    let (mut right, mut flagged, mut told) = (0, 0, String::new());
    let mut phantoms = 0;
    for (i, class) in PhantomClass::ALL.iter().copied().cycle().take(12).enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let phantom = Subject::numbered(class, i, 777, Ranges::Train, 96).unwrap().generate();
        let files = write_dicom(&phantom, dir.path(), &DicomOptions::default()).unwrap();
        let (code, out, err) = darnet(&["infer", "--json", files[0].parent().unwrap().to_str().unwrap()]);
        assert_eq!(code, 0, "{err}");
        let report = serde_json::from_str::<Value>(&out).unwrap()["series"][0].clone();
        told += &format!("{} {} {} {}\n", class.class_key(), report["predicted"], report["scores"], report["ood"]);
        right += usize::from(report["predicted"] == class.class_key());
        flagged += usize::from(report["ood"]["flag"] == true);
        let sum: f64 = CLASS_KEYS.iter().map(|key| report["calibrated"][key].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{report}");
        phantoms += 1;
    }
    assert!(right >= 9 && flagged <= 2, "{right} right, {flagged} flagged, of {phantoms}:\n{told}");
}

#[test]
fn the_embedded_model_flags_phantoms_made_in_another_way() {
    for (i, class) in PhantomClass::ALL.iter().copied().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let mut subject = Subject::numbered(class, i, 779, Ranges::Train, 96).unwrap();
        subject.spec.thickness_mm = 24.0;
        let files = write_dicom(&subject.generate(), dir.path(), &DicomOptions::default()).unwrap();
        let (code, out, err) = darnet(&["infer", "--json", files[0].parent().unwrap().to_str().unwrap()]);
        assert_eq!(code, 0, "{err}");
        let report = serde_json::from_str::<Value>(&out).unwrap()["series"][0].clone();
        let score = |part: &str| report["ood"][part].as_f64().unwrap();
        assert_eq!(report["ood"]["flag"], true, "{report}");
        // What is in it is as usual.
        assert!(score("features") < 1.0 && score("texture") > 1.5, "{report}");
        assert_eq!(score("score"), score("texture"));
        assert!(report["ood"]["why"].as_str().unwrap().contains("sharpness"), "{report}");
    }
}

#[test]
fn the_embedded_model_flags_a_real_scan_and_reports_it_all_the_same() {
    let Some(data) = real_data("lidc-idri-0306.tar.xz") else { return };
    let (code, out, err) = darnet(&["infer", "--json", data.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    let report = serde_json::from_str::<Value>(&out).unwrap()["series"][0].clone();
    assert_eq!(report["outcome"], "result", "{report}");
    assert_eq!(report["ood"]["flag"], true, "{report}");
    assert!(report["ood"]["texture"].as_f64().unwrap() > 1.5, "{report}");
    assert!(report["calibrated"]["covid19"].is_number(), "{report}");
}
