//! Which scans train, validate and test: by patient, stratified by class, seeded, as CSV.
//!
//! Input: the cases of a cache, or a CSV. Output: [`Split`]. All scans of a patient are on one side; the same cases,
//! shares and seed give the same rows on every machine.
//!
//! CSV columns: `scan`, `patient`, `class` (key or number), `fold` (0, 1, … or `test`), in any order; others are passed
//! over.
//!
//! Deliberately absent: stratification by anything but class, leave-one-site-out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::model::manifest::CLASS_KEYS;
use crate::train::cache::{Case, csv_io, write_atomically};
use crate::train::error::TrainDataError;

/// Most folds.
pub const MAX_FOLDS: usize = 100;
/// Most rows of a CSV: ten times the scans of the largest public set.
pub const MAX_ROWS: usize = 200_000;

/// One scan of a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitRow {
    /// Name of the scan, as in [`Case`].
    pub scan: String,
    /// Name of the patient.
    pub patient: String,
    /// Index of the class.
    pub class: usize,
    /// The fold that validates on it; `None` for the test set.
    pub fold: Option<usize>,
}

/// A split of a set of scans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// One a scan, in the order of their names.
    pub rows: Vec<SplitRow>,
}

/// Text of a class in a CSV.
fn class_text(class: usize) -> String {
    CLASS_KEYS.get(class).map_or_else(|| class.to_string(), |key| (*key).to_owned())
}

impl Split {
    /// Reads a CSV. Call [`Split::verify`] with the cases it is for.
    ///
    /// # Errors
    /// A file that cannot be read, a column that is missing, a value out of range, a scan named twice.
    pub fn read_csv(path: &Path) -> Result<Self, TrainDataError> {
        let fault = |line: u64, what: String| TrainDataError::table("read split", format!("line {line}: {what}"));
        let file = std::fs::File::open(path).map_err(TrainDataError::io("open", path))?;
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
        let headers = reader.headers().map_err(|e| TrainDataError::table("read split", e))?.clone();
        let column = |name: &str| {
            let found = headers.iter().position(|h| h.trim_start_matches('\u{feff}').eq_ignore_ascii_case(name));
            found.ok_or_else(|| fault(1, format!("expected a column `{name}`, found none")))
        };
        let (scan, patient) = (column("scan")?, column("patient")?);
        let (class, fold) = (column("class")?, column("fold")?);
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(|e| TrainDataError::table("read split", e))?;
            let line = record.position().map_or(0, csv::Position::line);
            let text = |at: usize| record.get(at).unwrap_or_default();
            let class = CLASS_KEYS
                .iter()
                .position(|k| *k == text(class))
                .or_else(|| text(class).parse().ok().filter(|c| *c < 64))
                .ok_or_else(|| fault(line, format!("class: expected one of {} or a number", CLASS_KEYS.join(", "))))?;
            let fold = match text(fold) {
                "test" => None,
                n => Some(
                    n.parse()
                        .ok()
                        .filter(|n| *n < MAX_FOLDS)
                        .ok_or_else(|| fault(line, format!("fold: expected `test` or a number below {MAX_FOLDS}")))?,
                ),
            };
            if text(scan).is_empty() || text(patient).is_empty() {
                return Err(fault(line, "expected a scan and a patient, got nothing".to_owned()));
            }
            rows.push(SplitRow { scan: text(scan).to_owned(), patient: text(patient).to_owned(), class, fold });
            if rows.len() > MAX_ROWS {
                return Err(fault(line, format!("expected at most {MAX_ROWS} rows, got more")));
            }
        }
        rows.sort_by(|a, b| a.scan.cmp(&b.scan));
        let twice = rows.windows(2).filter(|w| w[0].scan == w[1].scan).count();
        if twice > 0 {
            return Err(TrainDataError::table("read split", format!("{twice} scans are named more than once")));
        }
        Ok(Self { rows })
    }

    /// Writes the CSV; the name appears with the whole file.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_csv(&self, path: &Path) -> Result<(), TrainDataError> {
        write_atomically("write split", path, |out| {
            let mut out = csv::Writer::from_writer(out);
            out.write_record(["scan", "patient", "class", "fold"]).map_err(csv_io)?;
            for row in &self.rows {
                let fold = row.fold.map_or_else(|| "test".to_owned(), |f| f.to_string());
                out.write_record([&row.scan, &row.patient, &class_text(row.class), &fold]).map_err(csv_io)?;
            }
            out.flush()
        })
    }

    /// Number of folds: one more than the highest that a row names.
    pub fn folds(&self) -> usize {
        self.rows.iter().filter_map(|r| r.fold).max().map_or(0, |f| f + 1)
    }

    /// What trains fold `fold`: all other folds.
    pub fn train_of(&self, fold: usize) -> Vec<&SplitRow> {
        self.rows.iter().filter(|r| r.fold.is_some_and(|f| f != fold)).collect()
    }

    /// What validates fold `fold`.
    pub fn validation_of(&self, fold: usize) -> Vec<&SplitRow> {
        self.rows.iter().filter(|r| r.fold == Some(fold)).collect()
    }

    /// The test set, which no fold sees.
    pub fn test(&self) -> Vec<&SplitRow> {
        self.rows.iter().filter(|r| r.fold.is_none()).collect()
    }

    /// Makes a split: `test_share` of each class's scans, as near as whole patients allow, is the test set; the rest goes
    /// to `folds` folds of about equal numbers of scans of each class.
    ///
    /// Patients of a class are sorted by name and shuffled (Fisher-Yates, ChaCha8); the test set takes them until its
    /// share is reached, then each patient goes to the fold with the fewest scans of the class.
    ///
    /// # Errors
    /// A share or a number out of range, a patient in two classes, a fold that gets no scan.
    pub fn stratified(cases: &[Case], test_share: f64, folds: usize, seed: u64) -> Result<Self, TrainDataError> {
        let option = |option, expected: String, got: String| TrainDataError::Option { option, expected, got };
        if !(0.0..1.0).contains(&test_share) {
            return Err(option("test share", "at least 0, below 1".to_owned(), test_share.to_string()));
        }
        if !(2..=MAX_FOLDS).contains(&folds) {
            return Err(option("folds", format!("2 to {MAX_FOLDS}"), folds.to_string()));
        }
        one_class_each(cases.iter().map(|c| (c.patient.as_str(), c.class)), "split")?;
        let mut classes: BTreeMap<usize, BTreeMap<&str, Vec<&Case>>> = BTreeMap::new();
        for case in cases {
            classes.entry(case.class).or_default().entry(&case.patient).or_default().push(case);
        }
        let mut rows = Vec::with_capacity(cases.len());
        for (class, patients) in classes {
            let scans: usize = patients.values().map(Vec::len).sum();
            let mut patients: Vec<Vec<&Case>> = patients.into_values().collect();
            // A stream for each class: the draws of one do not shift those of another.
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(class as u64);
            for i in (1..patients.len()).rev() {
                patients.swap(i, ((u128::from(random.next_u64()) * (i as u128 + 1)) >> 64) as usize);
            }
            let wanted = test_share * scans as f64;
            let mut tested = 0usize;
            let mut in_fold = vec![0usize; folds];
            for patient in patients {
                // The test set takes a patient when that brings it nearer to its share.
                let nearer = (tested + patient.len()) as f64 - wanted <= wanted - tested as f64;
                let fold = if nearer {
                    tested += patient.len();
                    None
                } else {
                    // The first of the emptiest, counted from the class's number, so that remainders spread.
                    let order = (0..folds).map(|f| (f + class) % folds);
                    order.min_by_key(|f| in_fold[*f])
                };
                if let Some(fold) = fold {
                    in_fold[fold] += patient.len();
                }
                rows.extend(patient.iter().map(|c| SplitRow {
                    scan: c.scan.clone(),
                    patient: c.patient.clone(),
                    class: c.class,
                    fold,
                }));
            }
        }
        rows.sort_by(|a, b| a.scan.cmp(&b.scan));
        let split = Self { rows };
        split.no_empty_fold(folds)?;
        split.verify(cases)?;
        Ok(split)
    }

    fn no_empty_fold(&self, folds: usize) -> Result<(), TrainDataError> {
        let empty: Vec<String> =
            (0..folds).filter(|f| self.validation_of(*f).is_empty()).map(|f| f.to_string()).collect();
        if empty.is_empty() && folds >= 2 {
            return Ok(());
        }
        let fault = if folds < 2 {
            format!("expected at least 2 folds, got {folds}")
        } else {
            format!("fold {} has no scan; take fewer folds or more patients", empty.join(", "))
        };
        Err(TrainDataError::table("split", fault))
    }

    /// Checks the split against the cases it is for: every row is a known scan of the same class, no patient is on two
    /// sides or in two classes, no fold is empty. Cases without a row are left out of training; that is allowed.
    ///
    /// # Errors
    /// The first fault, with counts.
    pub fn verify(&self, cases: &[Case]) -> Result<(), TrainDataError> {
        let fault = |text: String| Err(TrainDataError::table("split", text));
        let known: HashMap<&str, &Case> = cases.iter().map(|c| (c.scan.as_str(), c)).collect();
        let unknown = self.rows.iter().filter(|r| !known.contains_key(r.scan.as_str())).count();
        if unknown > 0 {
            return fault(format!("{unknown} of {} scans are not in the cache", self.rows.len()));
        }
        let unique: BTreeSet<&str> = self.rows.iter().map(|r| r.scan.as_str()).collect();
        if unique.len() < self.rows.len() {
            return fault(format!("{} scans are named more than once", self.rows.len() - unique.len()));
        }
        let other = self.rows.iter().filter(|r| known[r.scan.as_str()].class != r.class).count();
        if other > 0 {
            return fault(format!("{other} of {} scans have another class in the cache", self.rows.len()));
        }
        // By the split's names and by the cache's: either may know better who is one person.
        let names: [fn(&SplitRow, &Case) -> String; 2] = [|r, _| r.patient.clone(), |_, c| c.patient.clone()];
        for name in names {
            let named: Vec<(String, &SplitRow)> =
                self.rows.iter().map(|r| (name(r, known[r.scan.as_str()]), r)).collect();
            one_class_each(named.iter().map(|(n, r)| (n.as_str(), r.class)), "split")?;
            let mut sides: BTreeMap<&str, BTreeSet<Option<usize>>> = BTreeMap::new();
            for (patient, row) in &named {
                sides.entry(patient).or_default().insert(row.fold);
            }
            let both = sides.values().filter(|s| s.len() > 1).count();
            if both > 0 {
                return fault(format!("{both} patients are in more than one of the folds and the test set"));
            }
        }
        self.no_empty_fold(self.folds())
    }

    /// The paper's Table I: patients and scans of each class in training, validation (mean of the folds) and test, as
    /// Markdown.
    pub fn table(&self, class_names: &[String]) -> String {
        let folds = self.folds();
        let mut out = String::from("| class | patients | scans |");
        for fold in 0..folds {
            let _ = write!(out, " fold {fold} |");
        }
        out.push_str(" test |\n|---|---:|---:|");
        out.push_str(&"---:|".repeat(folds + 1));
        out.push('\n');
        let count = |rows: &[&SplitRow]| {
            let patients: BTreeSet<&str> = rows.iter().map(|r| r.patient.as_str()).collect();
            (patients.len(), rows.len())
        };
        let mut line = |name: &str, rows: Vec<&SplitRow>| {
            let (patients, scans) = count(&rows);
            let _ = write!(out, "| {name} | {patients} | {scans} |");
            for side in (0..folds).map(Some).chain([None]) {
                let part: Vec<&SplitRow> = rows.iter().copied().filter(|r| r.fold == side).collect();
                let (patients, scans) = count(&part);
                let _ = write!(out, " {patients} / {scans} |");
            }
            out.push('\n');
        };
        for (class, name) in class_names.iter().enumerate() {
            line(name, self.rows.iter().filter(|r| r.class == class).collect());
        }
        line("all", self.rows.iter().collect());
        out.push_str("\npatients / scans; a fold's scans validate it and train the others\n");
        out
    }
}

/// No patient may be in two classes.
fn one_class_each<'a>(pairs: impl Iterator<Item = (&'a str, usize)>, what: &'static str) -> Result<(), TrainDataError> {
    let mut classes: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    for (patient, class) in pairs {
        classes.entry(patient).or_default().insert(class);
    }
    let mixed = classes.values().filter(|c| c.len() > 1).count();
    if mixed > 0 {
        return Err(TrainDataError::table(what, format!("{mixed} patients have scans of more than one class")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::cache::SourceWindow;

    fn cases(patients: usize) -> Vec<Case> {
        let mut out = Vec::new();
        for p in 0..patients {
            for s in 0..1 + p % 3 {
                out.push(Case {
                    scan: format!("{p:04}/{s}"),
                    patient: format!("{p:04}"),
                    class: p % 3,
                    source: "test".to_owned(),
                    source_window: SourceWindow::Hu,
                    has_mask: false,
                });
            }
        }
        out
    }

    #[test]
    fn a_split_is_disjoint_by_patient_and_stratified() {
        let cases = cases(300);
        let split = Split::stratified(&cases, 0.2, 5, 7).unwrap();
        assert_eq!((split.rows.len(), split.folds()), (cases.len(), 5));
        split.verify(&cases).unwrap();
        for class in 0..3 {
            let of = |rows: Vec<&SplitRow>| rows.iter().filter(|r| r.class == class).count() as f64;
            let all = cases.iter().filter(|c| c.class == class).count() as f64;
            assert!((of(split.test()) / all - 0.2).abs() < 0.02);
            for fold in 0..5 {
                assert!((of(split.validation_of(fold)) / all - 0.16).abs() < 0.03, "class {class} fold {fold}");
                let used = split.train_of(fold).len() + split.validation_of(fold).len() + split.test().len();
                assert_eq!(used, cases.len());
            }
        }
        let mut shuffled = cases.clone();
        shuffled.reverse();
        assert_eq!(Split::stratified(&shuffled, 0.2, 5, 7).unwrap(), split, "order of the cases");
        assert_ne!(Split::stratified(&cases, 0.2, 5, 8).unwrap(), split, "another seed");
        let table = split.table(&CLASS_KEYS.map(str::to_owned));
        assert!(table.contains("| all | 300 | 600 |"), "{table}");
    }

    #[test]
    fn a_split_survives_its_csv_and_a_csv_may_have_its_columns_anywhere() {
        let cases = cases(60);
        let split = Split::stratified(&cases, 0.2, 5, 1).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("split.csv");
        split.write_csv(&path).unwrap();
        assert_eq!(Split::read_csv(&path).unwrap(), split);
        let text = "\u{feff}fold,note,class,patient,scan\n test ,x,1,a,s1\n0,y,healthy,b,s0\n";
        std::fs::write(&path, text).unwrap();
        let read = Split::read_csv(&path).unwrap();
        assert_eq!(read.rows.iter().map(|r| (r.class, r.fold)).collect::<Vec<_>>(), [(2, Some(0)), (1, None)]);
    }

    #[test]
    fn bad_tables_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("split.csv");
        for (text, expected) in [
            ("scan,patient,class\na,b,1\n", "column `fold`"),
            ("scan,patient,class,fold\na,b,flu,0\n", "line 2: class"),
            ("scan,patient,class,fold\na,b,cp,zero\n", "line 2: fold"),
            ("scan,patient,class,fold\n,b,cp,0\n", "line 2: expected a scan"),
            ("scan,patient,class,fold\na,b,cp,0\na,b,cp,1\n", "more than once"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Split::read_csv(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn verify_finds_every_fault() {
        let cases = cases(60);
        let sound = Split::stratified(&cases, 0.2, 5, 1).unwrap();
        let fault = |change: &dyn Fn(&mut Split)| {
            let mut split = sound.clone();
            change(&mut split);
            split.verify(&cases).unwrap_err().to_string()
        };
        assert!(fault(&|s| s.rows[0].scan = "elsewhere".to_owned()).contains("not in the cache"));
        assert!(fault(&|s| s.rows[0].class = (s.rows[0].class + 1) % 3).contains("another class"));
        assert!(
            fault(&|s| s.rows.iter_mut().filter(|r| r.fold == Some(3)).for_each(|r| r.fold = None)).contains("fold 3")
        );
        let double = sound.rows.windows(2).position(|w| w[0].patient == w[1].patient).unwrap();
        assert!(fault(&|s| s.rows[double].fold = s.rows[double].fold.map_or(Some(0), |_| None)).contains("1 patients"));
        // Another name in the table does not hide whose scan it is.
        assert!(
            fault(&|s| {
                s.rows[double].patient = "new".to_owned();
                s.rows[double].fold = s.rows[double].fold.map_or(Some(0), |_| None);
            })
            .contains("1 patients")
        );
        assert!(fault(&|s| s.rows.push(s.rows[0].clone())).contains("more than once"));
    }

    #[test]
    fn a_patient_in_two_classes_and_a_fold_without_scans_are_refused() {
        let mut mixed = cases(30);
        mixed[1].class = (mixed[1].class + 1) % 3;
        let at = mixed.iter().position(|c| c.patient == "0001").unwrap();
        mixed[at].class = 0;
        let error = Split::stratified(&mixed, 0.2, 5, 1).unwrap_err().to_string();
        assert!(error.contains("more than one class"), "{error}");
        let error = Split::stratified(&cases(4), 0.0, 5, 1).unwrap_err().to_string();
        assert!(error.contains("has no scan"), "{error}");
        assert!(Split::stratified(&cases(30), 1.0, 5, 1).is_err());
        assert!(Split::stratified(&cases(30), 0.2, 1, 1).is_err());
    }
}
