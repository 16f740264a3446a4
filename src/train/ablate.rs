//! The ablation: four networks over all folds as one plan that can be stopped and resumed.
//!
//! Input: options of the full network. Output: a folder `VARIANT/fold-K` a run, and the tables over all of them. A run
//! that is done is not done again; one that was interrupted goes on.

use std::path::{Path, PathBuf};

use super::TrainError;
use super::evaluate;
use super::report::{Document, Variant, document};
use crate::model::Architecture;

/// Name, channel attention, depth attention: the rows of Table III.
pub const VARIANTS: [(&str, bool, bool); 4] =
    [("none", false, false), ("ca", true, false), ("da", false, true), ("both", true, true)];

/// One run of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedRun {
    /// The variant's name.
    pub variant: &'static str,
    /// The fold.
    pub fold: usize,
    /// Its network.
    pub architecture: Architecture,
    /// Its folder.
    pub out: PathBuf,
}

/// The runs of `variants` (all four when empty) over `folds`, fold by fold, so that an early stop leaves whole columns.
///
/// # Errors
/// A variant that does not exist.
pub fn plan(
    architecture: &Architecture,
    variants: &[String],
    folds: &[usize],
    out: &Path,
) -> Result<Vec<PlannedRun>, TrainError> {
    if let Some(unknown) = variants.iter().find(|v| !VARIANTS.iter().any(|(name, ..)| name == v)) {
        return Err(TrainError::Option {
            option: "variant",
            expected: "none, ca, da or both".to_owned(),
            got: unknown.clone(),
        });
    }
    let wanted = |name: &str| variants.is_empty() || variants.iter().any(|v| v == name);
    let runs = folds.iter().flat_map(|&fold| {
        VARIANTS.iter().filter(|(name, ..)| wanted(name)).map(move |&(variant, ca, da)| PlannedRun {
            variant,
            fold,
            architecture: Architecture { channel_attention: ca, depth_attention: da, ..architecture.clone() },
            out: out.join(variant).join(format!("fold-{fold}")),
        })
    });
    Ok(runs.collect())
}

/// The tables of the finished runs of a plan.
///
/// # Errors
/// A run that is not finished.
pub fn tables(plan: &[PlannedRun], seed: u64) -> Result<Document, TrainError> {
    let mut variants = Vec::new();
    for (name, ..) in VARIANTS {
        let mut rows = Vec::new();
        let mut parameters = 0;
        for run in plan.iter().filter(|r| r.variant == name) {
            let judged = evaluate::of_run(&run.out, seed)?;
            parameters = run.architecture.parameter_count();
            rows.push((judged.name, judged.evaluation));
        }
        if !rows.is_empty() {
            variants.push(Variant { name: name.to_owned(), parameters, rows });
        }
    }
    Ok(document("Ablation of the attentions", variants))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_has_every_variant_of_every_fold() {
        let all = plan(&Architecture::full(), &[], &[0, 1, 2, 3, 4], Path::new("x")).unwrap();
        assert_eq!(all.len(), 20);
        let counts: Vec<u64> = all[..4].iter().map(|r| r.architecture.parameter_count()).collect();
        assert_eq!(counts, [33_148_995, 33_238_075, 35_148_083, 35_237_163]);
        assert_eq!(all[3].out, Path::new("x").join("both").join("fold-0"));
        let two = plan(&Architecture::full(), &["da".into(), "none".into()], &[2], Path::new("x")).unwrap();
        assert_eq!(two.len(), 2);
        assert!(plan(&Architecture::full(), &["cad".into()], &[2], Path::new("x")).is_err());
    }
}
