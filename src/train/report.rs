//! Predictions as CSV, and evaluations as tables: Markdown, CSV, JSON, ROC and confusion pictures.
//!
//! Input: [`Prediction`]s and [`Evaluation`]s. Output: files, each whole or absent. The tables have the shape of the
//! paper's Tables II to IV: results by fold, the ablation, and two-class and three-way figures side by side.
//!
//! The paper's two-class tables print the three-way accuracy in their accuracy column. Here both are printed, and named.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::metrics::{self, Binary, Evaluation, Prediction, mean_deviation};
use super::{TrainError, plot, write_atomic, write_results};

/// Version of the JSON document.
pub const REPORT_SCHEMA: &str = "darnet.evaluation/1";
/// Largest accepted table of predictions: a million scans of a hundred bytes.
pub const MAX_CSV_BYTES: u64 = 100 << 20;

/// Predictions of one model on one set of scans.
pub struct Judged {
    /// `fold-0`, `test`, the model's id: what the row is called.
    pub name: String,
    /// Its predictions.
    pub predictions: Vec<Prediction>,
    /// What they amount to.
    pub evaluation: Evaluation,
}

/// One network over several folds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// Trainable parameters.
    pub parameters: u64,
    /// Rows: name and evaluation.
    pub rows: Vec<(String, Evaluation)>,
}

/// The JSON document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// [`REPORT_SCHEMA`].
    pub schema: String,
    /// What was judged on what.
    pub title: String,
    /// Networks.
    pub variants: Vec<Variant>,
    /// Mean and standard deviation (n - 1) over rows: variant, figure, mean, deviation.
    pub summary: Vec<(String, String, f64, f64)>,
}

/// A figure's name and where it is found.
type Figure = (&'static str, fn(&Evaluation) -> Option<f64>);

/// Figures of a row, in the order of the tables.
const FIGURES: [Figure; 10] = [
    ("accuracy (three-way)", |e| Some(e.accuracy)),
    ("accuracy (COVID-19 or not)", |e| e.target().map(|b| b.accuracy)),
    ("AUC", |e| e.target().and_then(|b| b.auc).map(|a| a.value)),
    ("sensitivity", |e| e.target().and_then(|b| b.sensitivity)),
    ("specificity", |e| e.target().and_then(|b| b.specificity)),
    ("F1", |e| e.target().map(|b| b.f1)),
    ("macro AUC", |e| e.macro_auc),
    ("macro sensitivity", |e| Some(e.macro_sensitivity)),
    ("macro specificity", |e| Some(e.macro_specificity)),
    ("macro F1", |e| Some(e.macro_f1)),
];

/// Scores for a model's manifest: `PREFIX_accuracy`, `PREFIX_auc_covid19` and so on.
pub fn manifest_scores(prefix: &str, e: &Evaluation) -> BTreeMap<String, f64> {
    let mut scores = BTreeMap::from([
        (format!("{prefix}_accuracy"), e.accuracy),
        (format!("{prefix}_macro_f1"), e.macro_f1),
        (format!("{prefix}_scans"), e.scans as f64),
    ]);
    if let (Some(b), Some(key)) = (e.target(), e.classes.get(e.covid.unwrap_or(0))) {
        let figures = [("auc", b.auc.map(|a| a.value)), ("sensitivity", b.sensitivity), ("specificity", b.specificity)];
        for (name, value) in figures {
            if let Some(value) = value {
                scores.insert(format!("{prefix}_{name}_{key}"), value);
            }
        }
    }
    scores
}

/// Scans of all `evaluations` by true class (rows) and judged class.
fn summed_confusion(evaluations: &[&Evaluation]) -> Vec<Vec<usize>> {
    let k = evaluations.first().map_or(0, |e| e.classes.len());
    let cell = |r: usize, c: usize| evaluations.iter().map(|e| e.confusion[r][c]).sum();
    (0..k).map(|r| (0..k).map(|c| cell(r, c)).collect()).collect()
}

/// A CSV field, quoted where it must be.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

/// The fields of a CSV line.
fn fields(line: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let last = found.len() - 1;
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                found[last].push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => found.push(String::new()),
            _ => found[last].push(c),
        }
    }
    found
}

/// Writes `scan,patient,class,score_KEY…`; scores keep every digit.
///
/// # Errors
/// A full disk, or a name with a line break.
pub fn write_predictions(path: &Path, classes: &[String], predictions: &[Prediction]) -> Result<(), TrainError> {
    let mut csv = String::from("scan,patient,class");
    for key in classes {
        let _ = write!(csv, ",score_{key}");
    }
    csv.push('\n');
    for p in predictions {
        if [&p.scan, &p.patient].iter().any(|n| n.contains(['\n', '\r'])) {
            return Err(TrainError::Data("a scan or patient whose name has a line break".to_owned()));
        }
        let class = classes.get(p.class).map_or("?", String::as_str);
        let _ = write!(csv, "{},{},{class}", field(&p.scan), field(&p.patient));
        for s in &p.scores {
            let _ = write!(csv, ",{s}");
        }
        csv.push('\n');
    }
    write_atomic(path, csv.as_bytes())
}

/// Reads what [`write_predictions`] wrote: keys of the classes, and predictions.
///
/// # Errors
/// A file of another form; the line is named.
pub fn read_predictions(path: &Path) -> Result<(Vec<String>, Vec<Prediction>), TrainError> {
    let io = |source| TrainError::Io { action: "read", path: path.to_path_buf(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    let bad = |line: usize, what: &str| TrainError::Data(format!("{}, line {line}: {what}", path.display()));
    if size > MAX_CSV_BYTES {
        return Err(bad(1, "more than 100 MiB"));
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    let mut lines = text.lines();
    let header = fields(lines.next().unwrap_or_default());
    let classes: Option<Vec<String>> =
        header.get(3..).map(|keys| keys.iter().map_while(|k| k.strip_prefix("score_")).map(str::to_owned).collect());
    let classes = classes.filter(|k| header[..3] == ["scan", "patient", "class"] && k.len() + 3 == header.len());
    let classes = classes.ok_or_else(|| bad(1, "expected scan,patient,class,score_…"))?;
    let mut predictions = Vec::new();
    for (i, line) in lines.enumerate() {
        let f = fields(line);
        if f.len() != header.len() {
            return Err(bad(i + 2, "another number of fields than the first line"));
        }
        let class = classes.iter().position(|k| *k == f[2]).ok_or_else(|| bad(i + 2, "an unknown class"))?;
        let scores = f[3..].iter().map(|s| s.parse().map_err(|_| bad(i + 2, "a score that is no number")));
        predictions.push(Prediction {
            scan: f[0].clone(),
            patient: f[1].clone(),
            class,
            scores: scores.collect::<Result<_, _>>()?,
        });
    }
    Ok((classes, predictions))
}

/// Mean and deviation of every figure over the rows that have it.
fn summarise(variant: &Variant) -> Vec<(String, String, f64, f64)> {
    let figure = |(name, get): &Figure| {
        let values: Vec<f64> = variant.rows.iter().filter_map(|(_, e)| get(e)).collect();
        let (mean, deviation) = mean_deviation(&values);
        (!values.is_empty()).then(|| (variant.name.clone(), (*name).to_owned(), mean, deviation))
    };
    FIGURES.iter().filter_map(figure).collect()
}

/// The document of `variants`.
pub fn document(title: &str, variants: Vec<Variant>) -> Document {
    Document {
        schema: REPORT_SCHEMA.to_owned(),
        title: title.to_owned(),
        summary: variants.iter().flat_map(summarise).collect(),
        variants,
    }
}

/// The document as Markdown.
pub fn markdown(d: &Document) -> String {
    let mut out = format!("# {}\n", d.title);
    let percent = |v: Option<f64>| v.map_or("–".to_owned(), |v| format!("{:.2}", 100.0 * v));
    let pm = |variant: &str, figure: &str| {
        let found = d.summary.iter().find(|(v, f, _, _)| v == variant && f == figure);
        found.map_or("–".to_owned(), |(_, _, m, s)| format!("{:.2} ± {:.2}", 100.0 * m, 100.0 * s))
    };
    let head = |out: &mut String, first: &str, names: &[String]| {
        let _ = writeln!(out, "| {first} | {} |", names.join(" | "));
        let _ = writeln!(out, "|---|{}", "---|".repeat(names.len()));
    };
    let names: Vec<String> = FIGURES.iter().map(|(n, _)| (*n).to_owned()).collect();
    for v in &d.variants {
        let _ = write!(out, "\n## Results of {} by row (shape of Table II), percent\n\n", v.name);
        head(&mut out, "row", &names);
        for (row, e) in &v.rows {
            let cells: Vec<String> = FIGURES.iter().map(|(_, get)| percent(get(e))).collect();
            let _ = writeln!(out, "| {row} | {} |", cells.join(" | "));
        }
        if v.rows.len() > 1 {
            let cells: Vec<String> = names.iter().map(|n| pm(&v.name, n)).collect();
            let _ = writeln!(out, "| mean ± sd | {} |", cells.join(" | "));
        }
        out.push_str(
            "\nAUC of COVID-19 against the rest, 95 % intervals (DeLong over scans; bootstrap over patients):\n\n",
        );
        for (row, e) in &v.rows {
            let part = |b: &Binary| {
                let text = |i: metrics::Interval| format!("{:.4} ({:.4} to {:.4})", i.value, i.low, i.high);
                format!("{}; {}", b.auc.map_or("–".into(), text), b.auc_bootstrap.map_or("–".into(), text))
            };
            let _ = writeln!(out, "- {row}: {}", e.target().map_or("–".to_owned(), part));
        }
        let evaluations: Vec<&Evaluation> = v.rows.iter().map(|(_, e)| e).collect();
        if let Some(first) = evaluations.first() {
            out.push_str("\nConfusion, scans of all rows:\n\n");
            head(&mut out, "true", &first.classes.iter().map(|c| format!("judged {c}")).collect::<Vec<_>>());
            for (class, judged) in first.classes.iter().zip(summed_confusion(&evaluations)) {
                let cells: Vec<String> = judged.iter().map(ToString::to_string).collect();
                let _ = writeln!(out, "| {class} | {} |", cells.join(" | "));
            }
        }
    }
    if d.variants.len() > 1 {
        out.push_str("\n## Ablation (shape of Table III), percent, mean ± sd over rows\n\n");
        let wanted = ["accuracy (three-way)", "AUC", "sensitivity", "specificity", "F1"].map(str::to_owned);
        head(&mut out, "network | parameters", &wanted);
        out = out.replace("|---|---|---|---|---|---|\n", "|---|---|---|---|---|---|---|\n");
        for v in &d.variants {
            let cells: Vec<String> = wanted.iter().map(|n| pm(&v.name, n)).collect();
            let _ = writeln!(out, "| {} | {} | {} |", v.name, v.parameters, cells.join(" | "));
        }
    }
    out.push_str("\n## Two classes and three (shape of Table IV), percent, mean over rows\n\n");
    out.push_str("| network | class | sensitivity | specificity | precision | F1 | AUC | accuracy (class or not) |\n");
    out.push_str("|---|---|---|---|---|---|---|---|\n");
    for v in &d.variants {
        let classes = v.rows.first().map(|(_, e)| e.classes.clone()).unwrap_or_default();
        for (c, key) in classes.iter().enumerate() {
            let over = |get: fn(&Binary) -> Option<f64>| {
                let values: Vec<f64> = v.rows.iter().filter_map(|(_, e)| e.per_class.get(c).and_then(get)).collect();
                percent((!values.is_empty()).then(|| metrics::mean(&values)))
            };
            let _ = writeln!(
                out,
                "| {} | {key} | {} | {} | {} | {} | {} | {} |",
                v.name,
                over(|b| b.sensitivity),
                over(|b| b.specificity),
                over(|b| b.precision),
                over(|b| Some(b.f1)),
                over(|b| b.auc.map(|a| a.value)),
                over(|b| Some(b.accuracy))
            );
        }
        let _ = writeln!(
            out,
            "| {} | macro | {} | {} | – | {} | {} | three-way {} |",
            v.name,
            pm(&v.name, "macro sensitivity"),
            pm(&v.name, "macro specificity"),
            pm(&v.name, "macro F1"),
            pm(&v.name, "macro AUC"),
            pm(&v.name, "accuracy (three-way)")
        );
    }
    out.push_str(
        "\nThe accuracy column of the paper's two-class tables is the three-way accuracy; both are printed here.\n",
    );
    out
}

/// The document's rows as CSV, one a line.
pub fn csv(d: &Document) -> String {
    let mut out = String::from("network,parameters,row,scans,patients");
    for (name, _) in FIGURES {
        let _ = write!(out, ",{}", field(name));
    }
    out.push_str(",AUC low,AUC high\n");
    for v in &d.variants {
        for (row, e) in &v.rows {
            let _ = write!(out, "{},{},{},{},{}", field(&v.name), v.parameters, field(row), e.scans, e.patients);
            for (_, get) in FIGURES {
                let _ = write!(out, ",{}", get(e).map_or(String::new(), |v| v.to_string()));
            }
            let interval = e.target().and_then(|b| b.auc);
            let end = |f: fn(metrics::Interval) -> f64| interval.map_or(String::new(), |i| f(i).to_string());
            let _ = writeln!(out, ",{},{}", end(|i| i.low), end(|i| i.high));
        }
    }
    out
}

/// Writes `evaluation.{md,csv,json}` into `dir`.
///
/// # Errors
/// A full disk.
pub fn write_document(dir: &Path, d: &Document) -> Result<(), TrainError> {
    write_results(dir, "evaluation", d, &markdown(d))?;
    write_atomic(&dir.join("evaluation.csv"), csv(d).as_bytes())
}

/// Writes `roc.png` (COVID-19 against the rest, one line a row, at most six) and `confusion.png` (all rows together).
///
/// # Errors
/// A full disk.
pub fn write_pictures(dir: &Path, rows: &[Judged]) -> Result<(), TrainError> {
    let Some(first) = rows.first() else { return Ok(()) };
    let target = first.evaluation.covid.unwrap_or(0);
    let lines: Vec<plot::Line> = rows
        .iter()
        .take(plot::COLOURS.len())
        .map(|row| {
            let scores: Vec<f64> = row.predictions.iter().map(|p| p.scores[target]).collect();
            let truth: Vec<bool> = row.predictions.iter().map(|p| p.class == target).collect();
            let area = metrics::auc(&scores, &truth).map_or("–".to_owned(), |a| format!("{a:.4}"));
            plot::Line {
                name: format!("{} AUC {area}", row.name),
                points: metrics::roc(&scores, &truth).iter().map(|p| [p[0], p[1]]).collect(),
            }
        })
        .collect();
    plot::roc_picture(&lines).save(&dir.join("roc.png"))?;
    let all: Vec<&Evaluation> = rows.iter().map(|j| &j.evaluation).collect();
    plot::confusion_picture(&summed_confusion(&all), &first.evaluation.classes).save(&dir.join("confusion.png"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(name: &str) -> Judged {
        let keys: Vec<String> = crate::model::CLASS_KEYS.map(str::to_owned).to_vec();
        let predictions: Vec<Prediction> = (0..9)
            .map(|i| Prediction {
                scan: format!("a,\"{i}\""),
                patient: format!("p{i}"),
                class: i % 3,
                scores: (0..3).map(|c| if c == i % 3 { 0.5 + 0.05 * i as f64 } else { 0.1 }).collect(),
            })
            .collect();
        let evaluation = metrics::evaluate(&predictions, &keys, 1).unwrap();
        Judged { name: name.to_owned(), predictions, evaluation }
    }

    #[test]
    fn predictions_survive_the_file_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.csv");
        let j = judged("x");
        write_predictions(&path, &j.evaluation.classes, &j.predictions).unwrap();
        let (classes, back) = read_predictions(&path).unwrap();
        assert_eq!((classes, back), (j.evaluation.classes, j.predictions));
        std::fs::write(&path, "scan,patient,class,score_a\ns,p,b,0.5\n").unwrap();
        let error = read_predictions(&path).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("class"), "{error}");
    }

    #[test]
    fn every_table_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let variant = |name: &str| Variant {
            name: name.to_owned(),
            parameters: 7,
            rows: ["fold-0", "fold-1"].map(|r| (r.to_owned(), judged(r).evaluation)).to_vec(),
        };
        let d = document("T", vec![variant("both"), variant("none")]);
        write_document(dir.path(), &d).unwrap();
        write_pictures(dir.path(), &[judged("fold-0")]).unwrap();
        let md = std::fs::read_to_string(dir.path().join("evaluation.md")).unwrap();
        let confusion = "| cp | 6 | 0 | 0 |\n| covid19 | 0 | 6 | 0 |";
        for text in
            ["Table II)", "Table III)", "Table IV)", "100.00 ± 0.00", "three-way accuracy; both are printed", confusion]
        {
            assert!(md.contains(text), "{text}\n{md}");
        }
        let json = std::fs::read_to_string(dir.path().join("evaluation.json")).unwrap();
        assert_eq!(serde_json::from_str::<Document>(&json).unwrap(), d);
        let csv = std::fs::read_to_string(dir.path().join("evaluation.csv")).unwrap();
        let widths: Vec<usize> = csv.lines().map(|l| fields(l).len()).collect();
        assert_eq!(widths, [17; 5]);
        for file in ["roc.png", "confusion.png"] {
            assert!(dir.path().join(file).metadata().unwrap().len() > 100);
        }
    }
}
