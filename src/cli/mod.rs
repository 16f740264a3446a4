//! The command line: argument types, dispatch, exit codes.
//!
//! Exit codes: 0 at least one result (or success), 1 failed, 2 usage, 3 no result. With `--json` one document goes to
//! stdout and nothing else; progress and logs go to stderr.

mod bench;
mod demo;
mod engine;
mod infer;
mod latency;
mod modelcmd;
mod resident;
mod serve;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use darnet::config::ModelConfig;
use darnet::engine::cpu::dispatch::Isa;
use darnet::engine::{BackendKind, EngineOptions};
use darnet::phantom::PhantomClass;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// At least one result, or success.
    Done,
    /// Nothing was judged, and the document says why.
    NoResult,
    /// A check failed.
    Failed,
}

/// Chest CT triage at the scanner.
///
/// Slices go in over DICOM as the scanner reconstructs them; a DARNet classification (COVID-19, common pneumonia,
/// healthy), a class activation map and an alert come out. Research software; not a medical device.
#[derive(Parser)]
#[command(name = "darnet", version, about, long_about, max_term_width = 100)]
pub struct Cli {
    /// Log filter for stderr, e.g. `info` or `darnet=debug`.
    #[arg(long, global = true, env = "DARNET_LOG", default_value = "warn", value_name = "FILTER")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the whole program on a synthetic chest CT: stream it into a real daemon, show stages, alert and heat map.
    Demo(DemoArgs),
    /// Run the daemon.
    Serve(ServeArgs),
    /// Check a configuration file: ranges, model, folders. Changes nothing; names every fault.
    CheckConfig(CheckConfigArgs),
    /// Judge files: a DICOM folder, a NIfTI or MetaImage file, a folder of PNG/JPEG/TIFF slices, or a prepared tensor.
    Infer(InferArgs),
    /// Send DICOM files to a C-STORE server.
    Send(SendArgs),
    /// Write synthetic chest CT studies with lesion masks.
    Phantom(PhantomArgs),
    /// Make, show, verify and export models.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Build, show and verify TensorRT plans; compare backends.
    #[command(subcommand)]
    Engine(engine::EngineCommand),
    /// A site's check after installation or update: known phantoms in, known results out, latency, delivery.
    Acceptance(AcceptanceArgs),
    /// Measure speed and memory.
    Bench(BenchArgs),
    /// Print the shell completion script.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages.
    Man {
        /// Folder to write to.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Arguments of `darnet demo`.
#[derive(Args)]
pub struct DemoArgs {
    /// Print one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
    /// Leave the daemon and its page up until interrupted.
    #[arg(long)]
    pub keep: bool,
    /// What the synthetic patient has.
    #[arg(long, value_enum, default_value = "covid")]
    pub class: ClassArg,
    /// Slices of the synthetic scan.
    #[arg(long, default_value_t = 160, value_name = "N")]
    pub slices: usize,
    /// Slices a second, as a scanner reconstructs.
    #[arg(long, default_value_t = 30.0, value_name = "RATE")]
    pub rate: f64,
    /// Seed of the synthetic patient.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where heat map and result are written; a new folder under the system's temporary one when absent.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Arguments of `darnet serve`.
#[derive(Args)]
pub struct ServeArgs {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// Arguments of `darnet check-config`.
#[derive(Args)]
pub struct CheckConfigArgs {
    /// Configuration file.
    #[arg(value_name = "FILE")]
    pub config: PathBuf,
}

/// Arguments of `darnet infer`.
#[derive(Args)]
pub struct InferArgs {
    /// DICOM folders or files, NIfTI and MetaImage files, folders of image slices.
    #[arg(value_name = "PATH", required_unless_present = "tensor")]
    pub paths: Vec<PathBuf>,
    /// A safetensors file with `volume`, D x H x W f32 in [0, 1]; preprocessing is skipped.
    #[arg(long, value_name = "FILE", conflicts_with = "paths")]
    pub tensor: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Print one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
    /// Write heat maps, summary page and CAM files here.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Class of the activation map; the predicted one when absent.
    #[arg(long, value_name = "CLASS")]
    pub cam_class: Option<String>,
}

/// Which model on which backend.
#[derive(Args, Clone)]
pub struct EngineArgs {
    /// Model folder; the embedded demonstration model when absent.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Inference backend: auto, reference, cpu, tensorrt, cuda.
    #[arg(long, default_value = "auto", value_name = "BACKEND")]
    pub backend: BackendKind,
    /// Threads; 0 takes every core.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Instruction set of the cpu backend: scalar, avx2, avx512; the best there is when absent.
    #[arg(long, value_name = "ISA")]
    pub isa: Option<Isa>,
}

impl EngineArgs {
    /// How the backend may use the machine.
    pub fn options(&self) -> EngineOptions {
        EngineOptions { threads: self.threads, isa: self.isa, ..EngineOptions::default() }
    }

    /// The same as part of a configuration.
    pub fn configure(&self, model: &mut ModelConfig) {
        model.path.clone_from(&self.model);
        (model.backend, model.threads, model.isa) = (self.backend, self.threads, self.isa);
    }
}

/// Arguments of `darnet send`.
#[derive(Args)]
pub struct SendArgs {
    /// DICOM files or folders.
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Address of the server.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// Calling AE title.
    #[arg(long, default_value = "DARNET_SEND", value_name = "TITLE")]
    pub aet: String,
    /// Called AE title.
    #[arg(long, default_value = "DARNET", value_name = "TITLE")]
    pub aec: String,
    /// Slices a second, all associations together; as fast as possible when absent.
    #[arg(long, value_name = "SLICES_PER_S")]
    pub rate: Option<f64>,
    /// Associations at once.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub associations: usize,
    /// Print one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Class of a phantom.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ClassArg {
    /// COVID-19 pattern.
    Covid,
    /// Common pneumonia pattern.
    Cp,
    /// No lesion.
    Healthy,
}

impl From<ClassArg> for PhantomClass {
    fn from(class: ClassArg) -> Self {
        match class {
            ClassArg::Covid => PhantomClass::Covid,
            ClassArg::Cp => PhantomClass::Cp,
            ClassArg::Healthy => PhantomClass::Healthy,
        }
    }
}

/// File format of a phantom.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FormatArg {
    /// A CT Image Storage series.
    Dicom,
    /// NIfTI, compressed.
    Nifti,
    /// 8-bit PNG slices at the lung window.
    Png,
}

/// Arguments of `darnet phantom`.
#[derive(Args)]
pub struct PhantomArgs {
    /// Folder to write to.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What the patients have.
    #[arg(long, value_enum)]
    pub class: ClassArg,
    /// Patients.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub count: usize,
    /// Seed of the first patient.
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub seed: u64,
    /// File format.
    #[arg(long, value_enum, default_value = "dicom")]
    pub format: FormatArg,
    /// Slices; random with the patient when absent (160 when only --size is given).
    #[arg(long, value_name = "N")]
    pub slices: Option<usize>,
    /// Rows and columns; random with the patient when absent (512 when only --slices is given).
    #[arg(long, value_name = "N")]
    pub size: Option<usize>,
    /// DICOM: also a thick soft and a thin sharp reconstruction of each patient, in one study.
    #[arg(long)]
    pub variants: bool,
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Write a manifest for a weights file.
    New(modelcmd::NewArgs),
    /// Print parameters, multiply-adds, preprocessing and provenance.
    Show(modelcmd::ShowArgs),
    /// Check manifest, hash, every tensor.
    Verify(modelcmd::VerifyArgs),
    /// Write the model for other runtimes: ONNX, float32 or float16.
    Export(modelcmd::ExportArgs),
    /// Make a model with generated weights, which has learned nothing: for benchmarks and tests.
    Synthetic(modelcmd::SyntheticArgs),
}

/// Arguments of `darnet acceptance`.
#[derive(Args)]
pub struct AcceptanceArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Write what the model answered, to be kept as `acceptance.json` in its folder.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Print one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `darnet bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure.
    #[arg(value_enum)]
    pub what: BenchWhat,
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Use the architecture at full size (64 x 224 x 224, width 64) with generated weights.
    #[arg(long, conflicts_with = "model")]
    pub full_size: bool,
    /// Counted runs.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub runs: usize,
    /// Slices of the series (ingest, pipeline, memory).
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub slices: usize,
    /// Slices a second (pipeline); line rate and 30 a second when absent.
    #[arg(long, value_name = "RATE")]
    pub rate: Option<f64>,
    /// Inference: stay, run each safetensors file named on a line of stdin, answer with a line of JSON.
    #[arg(long)]
    pub serve: bool,
    /// Only completion by a declared count (pipeline); by release of the association, too, when absent.
    #[arg(long)]
    pub declare_count: bool,
    /// Only completion by a declared count, at line rate or --rate, with where the time goes (pipeline): one daemon takes
    /// all runs, and pictures are not made.
    #[arg(long, conflicts_with = "declare_count")]
    pub declared_only: bool,
    /// Print one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

/// What `darnet bench` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchWhat {
    /// One whole inference.
    Inference,
    /// In-plane resampling and gathering.
    Resample,
    /// C-STORE to acknowledgement.
    Ingest,
    /// Last slice to alert.
    Pipeline,
    /// Resident set idle and with a long series.
    Memory,
    /// Every kernel that could do each convolution on a GPU: error against a plain one, and time.
    Convolutions,
}

/// Parses the arguments, runs the command, maps its end to an exit code.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let ended = match cli.command {
        Command::Serve(args) => serve::serve(&args),
        other => {
            let log = darnet::telemetry::LogConfig { filter: cli.log, ..Default::default() };
            if let Err(error) = darnet::telemetry::init_logging(&log) {
                eprintln!("darnet: {error}");
                return ExitCode::from(2);
            }
            match other {
                Command::Demo(args) => demo::demo(&args),
                Command::CheckConfig(args) => serve::check_config(&args),
                Command::Infer(args) => infer::infer(&args),
                Command::Send(args) => tools::send(&args),
                Command::Phantom(args) => tools::phantom(&args),
                Command::Model(ModelCommand::New(args)) => modelcmd::new(&args),
                Command::Model(ModelCommand::Show(args)) => modelcmd::show(&args),
                Command::Model(ModelCommand::Verify(args)) => modelcmd::verify(&args),
                Command::Model(ModelCommand::Export(args)) => modelcmd::export(&args),
                Command::Model(ModelCommand::Synthetic(args)) => modelcmd::synthetic(&args),
                Command::Engine(command) => engine::engine(&command),
                Command::Acceptance(args) => demo::acceptance(&args),
                Command::Bench(args) => bench::bench(&args),
                Command::Completions { shell } => {
                    clap_complete::generate(shell, &mut Cli::command(), "darnet", &mut std::io::stdout());
                    Ok(Ended::Done)
                }
                Command::Man { out } => tools::man(&out, Cli::command()),
                Command::Serve(_) => Ok(Ended::Done),
            }
        }
    };
    match ended {
        Ok(Ended::Done) => ExitCode::SUCCESS,
        Ok(Ended::Failed) => ExitCode::from(1),
        Ok(Ended::NoResult) => ExitCode::from(3),
        Err(error) => {
            eprintln!("darnet: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// A progress bar on stderr, hidden when stderr is no terminal.
pub fn progress_bar(len: u64, what: &'static str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(len);
    let style = indicatif::ProgressStyle::with_template("{msg:>12} [{wide_bar}] {pos}/{len} {eta}");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

/// Prints a document on stdout.
pub fn print_json(document: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(document)?);
    Ok(())
}
