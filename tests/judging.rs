//! The commands that judge a model, from the outside: `calibrate`, `flags`, `cam`, `shift`, on the model inside the
//! program and phantoms prepared for it. No libtorch.
#![cfg(feature = "train-data")]

mod common;

use std::path::Path;
use std::process::Command;

use common::darnet;
use darnet::model::Model;
use darnet::report::calibration::{Calibration, TEXTURE_FEATURES};
use darnet::train::Cache;
use serde_json::Value;

/// Exit code, stdout, stderr.
fn trainer(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_darnet-train")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn done(args: &[&str]) -> String {
    let (code, out, err) = trainer(args);
    assert_eq!(code, 0, "{args:?}: {err}");
    out
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn a_model_is_calibrated_and_its_flags_maps_and_drift_are_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (cache, split, model) = (path("cache"), path("split.csv"), path("model"));
    let [count, seed, size, input] = ["48", "5", "64", "24,64,64"];
    done(&[
        "prepare",
        "--format",
        "phantom",
        "--count",
        count,
        "--seed",
        seed,
        "--size",
        size,
        "--input",
        input,
        "--workers",
        "2",
        "--no-sheets",
        "--out",
        &cache,
    ]);
    done(&["split", "--cache", &cache, "--test-share", "0.25", "--folds", "3", "--seed", "1", "--out", &split]);
    Model::embedded().unwrap().save(Path::new(&model)).unwrap();

    // Without a calibration nothing is known of likeness.
    let bare = path("bare");
    let mut unfitted = Model::embedded().unwrap();
    unfitted.manifest.calibration = None;
    unfitted.calibration_text = None;
    unfitted.save(Path::new(&bare)).unwrap();
    let (code, _, err) = trainer(&["flags", &bare, "--cache", &cache, "--out", &path("none")]);
    assert_eq!(code, 1);
    assert!(err.contains("calibrat"), "{err}");

    let told =
        done(&["calibrate", &model, "--cache", &cache, "--split", &split, "--picture", &path("reliability.png")]);
    assert!(told.contains("12 texture features of 24 scans"), "{told}");
    let fitted = Model::load(Path::new(&model)).unwrap();
    let calibration = Calibration::parse(fitted.calibration_text.as_deref().unwrap()).unwrap();
    calibration.check_model(&fitted.manifest.id, &fitted.sha256).unwrap();
    let (features, texture) = (calibration.ood.unwrap(), calibration.texture.unwrap());
    assert_eq!((features.features, texture.features), (64, TEXTURE_FEATURES));
    assert_eq!((features.scans, features.limit_scans, features.quantile), (24, 12, 0.995));
    assert!(image::open(path("reliability.png")).is_ok());

    // Of the scans that the limits are from none lies beyond.
    let table = done(&["flags", &model, "--cache", &cache, "--split", &split, "--out", &path("flags")]);
    assert!(table.contains("| not flagged | 12 |"), "{table}");
    let document = json(&dir.path().join("flags/flags.json"));
    assert_eq!(document["rows"][0]["scans"], 12);
    let all =
        json_after(&["flags", &model, "--cache", &cache, "--out", &path("all")], &dir.path().join("all/flags.json"));
    assert_eq!(all["rows"][0]["scans"], 48);
    let sum = |key: &str| all["rows"][1][key].as_u64().unwrap() + all["rows"][2][key].as_u64().unwrap();
    assert_eq!((sum("scans"), sum("right")), (48, all["rows"][0]["right"].as_u64().unwrap()));

    let table = done(&["cam", &format!("one={model}"), "--cache", &cache, "--out", &path("maps"), "--figure", "1"]);
    let opened = Cache::open(Path::new(&cache)).unwrap();
    let with_lesion = (0..48).filter(|i| opened.mask(*i).is_some_and(|m| m.contains(&1))).count();
    assert!(table.contains(&format!("| one | all | {with_lesion} |")) && with_lesion > 28, "{with_lesion}: {table}");
    assert!(image::open(dir.path().join("maps/cam.png")).is_ok());

    let drift = json_after(
        &["shift", &model, "--size", size, "--count", "3", "--out", &path("drift")],
        &dir.path().join("drift/shift.json"),
    );
    assert_eq!(drift["rows"].as_array().unwrap().len(), 20);
    let thickest = drift["rows"].as_array().unwrap().iter().find(|r| r["what"] == "32 mm").unwrap();
    assert!(thickest["texture"].as_f64().unwrap() > thickest["features"].as_f64().unwrap(), "{thickest}");
    assert!(image::open(dir.path().join("drift/shift.png")).is_ok());

    // The scanner reads what was fitted here.
    let scans = path("scans");
    let (code, _, err) = darnet(&["phantom", "--out", &scans, "--class", "covid", "--count", "1", "--seed", "3"]);
    assert_eq!(code, 0, "{err}");
    let (code, out, err) = darnet(&["infer", "--json", "--model", &model, &scans]);
    assert_eq!(code, 0, "{err}");
    let series = serde_json::from_str::<Value>(&out).unwrap()["series"].clone();
    let judged = series.as_array().unwrap().iter().find(|s| s["outcome"] == "result").unwrap();
    let part = |name: &str| judged["ood"][name].as_f64().unwrap();
    assert_eq!(part("score"), part("features").max(part("texture")));

    // A calibration of other weights is not used.
    let name = fitted.manifest.calibration.unwrap();
    let file = Path::new(&model).join(name);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(&fitted.sha256, &"0".repeat(64))).unwrap();
    let (code, _, err) = trainer(&["flags", &model, "--cache", &cache, "--out", &path("other")]);
    assert_eq!(code, 1);
    assert!(err.contains("another weights"), "{err}");
}

fn json_after(args: &[&str], file: &Path) -> Value {
    done(args);
    json(file)
}
