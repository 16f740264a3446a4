//! The `darnet-train` command: data, training, evaluation, import. What it does is in `darnet::train`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use darnet::train;

/// Trains DARNet: splits, folds, ablations, tables, import
#[derive(Parser)]
#[command(name = "darnet-train", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a cache of network inputs from scans or phantoms
    Prepare(Box<train::commands_data::PrepareArgs>),
    /// Split a cache by patient into a test set and folds
    Split(train::commands_data::SplitArgs),
    /// Train one fold; a run that was interrupted goes on
    #[cfg(feature = "trainer")]
    Fit(Box<train::commands_fit::FitArgs>),
    /// Train the four variants over the folds, and print the tables
    #[cfg(feature = "trainer")]
    Ablate(Box<train::commands_fit::AblateArgs>),
    /// Judge runs or models: tables, ROC, confusion
    #[cfg(feature = "trainer")]
    Evaluate(Box<train::commands_fit::EvaluateArgs>),
    /// Make a model folder from a PyTorch state dict
    #[cfg(feature = "trainer")]
    Import(train::commands_fit::ImportArgs),
    /// Time training steps
    #[cfg(feature = "trainer")]
    Bench(Box<train::commands_fit::BenchArgs>),
    /// Activation maps against lesion masks: pointing game, energy inside, Dice, the figure
    Cam(train::commands_judge::CamArgs),
    /// Temperature, alert thresholds and likeness to the training data of a model
    Calibrate(Box<train::commands_judge::CalibrateArgs>),
    /// Accuracy of scans that are flagged as unlike the training data, and of the others
    Flags(train::commands_judge::FlagsArgs),
    /// Accuracy and distance score of a model on phantoms unlike its training data
    Shift(train::commands_judge::ShiftArgs),
    /// Tables from files of predictions (`validation.csv` of runs), one row a file
    Tables {
        /// Files of predictions
        #[arg(required = true)]
        predictions: Vec<PathBuf>,
        /// Where the tables and pictures go
        #[arg(long)]
        out: PathBuf,
    },
}

fn tables(files: &[PathBuf], out: &std::path::Path) -> anyhow::Result<()> {
    use train::{metrics, report};
    const BOOTSTRAP_SEED: u64 = 1;
    let mut rows = Vec::new();
    for (i, file) in files.iter().enumerate() {
        let (classes, predictions) = report::read_predictions(file)?;
        let evaluation = metrics::evaluate(&predictions, &classes, BOOTSTRAP_SEED)?;
        rows.push(report::Judged { name: format!("file-{}", i + 1), predictions, evaluation });
    }
    let variant = report::Variant {
        name: "predictions".to_owned(),
        parameters: 0,
        rows: rows.iter().map(|j| (j.name.clone(), j.evaluation.clone())).collect(),
    };
    let document = report::document("Predictions", vec![variant]);
    report::write_document(out, &document)?;
    report::write_pictures(out, &rows)?;
    println!("{}", report::markdown(&document));
    Ok(())
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Prepare(args) => train::commands_data::prepare(&args),
        Command::Split(args) => train::commands_data::split(&args),
        #[cfg(feature = "trainer")]
        Command::Fit(args) => train::commands_fit::fit(&args),
        #[cfg(feature = "trainer")]
        Command::Ablate(args) => train::commands_fit::ablate(&args),
        #[cfg(feature = "trainer")]
        Command::Evaluate(args) => train::commands_fit::evaluate(&args),
        #[cfg(feature = "trainer")]
        Command::Import(args) => train::commands_fit::import(&args),
        #[cfg(feature = "trainer")]
        Command::Bench(args) => train::commands_fit::bench(&args),
        Command::Cam(args) => train::commands_judge::cam(&args),
        Command::Calibrate(args) => train::commands_judge::calibrate(&args),
        Command::Flags(args) => train::commands_judge::flags(&args),
        Command::Shift(args) => train::commands_judge::shift(&args),
        Command::Tables { predictions, out } => tables(&predictions, &out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("darnet-train: {error:#}");
            ExitCode::FAILURE
        }
    }
}
