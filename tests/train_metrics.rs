//! The figures of merit against scikit-learn. Golden values come from `tests/golden/metrics/make.py`.

#![cfg(feature = "train-data")]

use darnet::train::metrics::{Prediction, Z_95, evaluate};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    schema: String,
    classes: Vec<String>,
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    class: Vec<usize>,
    scores: Vec<Vec<f64>>,
    confusion: Vec<Vec<usize>>,
    accuracy: f64,
    covid_accuracy: f64,
    covid_auc: f64,
    covid_auc_error: f64,
    covid_sensitivity: f64,
    covid_specificity: f64,
    covid_precision: f64,
    covid_f1: f64,
    precision: Vec<f64>,
    recall: Vec<f64>,
    f1: Vec<f64>,
    macro_f1: f64,
    macro_precision: f64,
    macro_sensitivity: f64,
    macro_auc: f64,
}

#[test]
fn every_figure_is_scikit_learns() {
    let all: Goldens = serde_json::from_str(include_str!("golden/metrics/golden.json")).unwrap();
    assert_eq!(all.schema, "darnet.golden-metrics/1");
    for g in all.cases {
        let predictions: Vec<Prediction> = g
            .class
            .iter()
            .zip(&g.scores)
            .enumerate()
            .map(|(i, (&class, scores))| Prediction {
                scan: format!("s{i}"),
                patient: format!("p{i}"),
                class,
                scores: scores.clone(),
            })
            .collect();
        let e = evaluate(&predictions, &all.classes, 1).unwrap();
        assert_eq!(e.confusion, g.confusion, "{}", g.name);
        let covid = e.target().unwrap();
        let auc = covid.auc.unwrap();
        let pairs = [
            ("accuracy", e.accuracy, g.accuracy),
            ("covid accuracy", covid.accuracy, g.covid_accuracy),
            ("covid auc", auc.value, g.covid_auc),
            ("covid auc low", auc.low, (g.covid_auc - Z_95 * g.covid_auc_error).max(0.0)),
            ("covid auc high", auc.high, (g.covid_auc + Z_95 * g.covid_auc_error).min(1.0)),
            ("covid sensitivity", covid.sensitivity.unwrap(), g.covid_sensitivity),
            ("covid specificity", covid.specificity.unwrap(), g.covid_specificity),
            ("covid precision", covid.precision.unwrap(), g.covid_precision),
            ("covid f1", covid.f1, g.covid_f1),
            ("macro f1", e.macro_f1, g.macro_f1),
            ("macro precision", e.macro_precision, g.macro_precision),
            ("macro sensitivity", e.macro_sensitivity, g.macro_sensitivity),
            ("macro auc", e.macro_auc.unwrap(), g.macro_auc),
        ];
        for (what, got, wanted) in pairs {
            assert!((got - wanted).abs() < 1e-12, "{}: {what} {got} instead of {wanted}", g.name);
        }
        for (c, b) in e.per_class.iter().enumerate() {
            assert!((b.precision.unwrap_or(0.0) - g.precision[c]).abs() < 1e-12);
            assert!((b.sensitivity.unwrap_or(0.0) - g.recall[c]).abs() < 1e-12);
            assert!((b.f1 - g.f1[c]).abs() < 1e-12);
        }
        let bootstrap = covid.auc_bootstrap.unwrap();
        assert!(bootstrap.low <= auc.value && auc.value <= bootstrap.high);
    }
}
