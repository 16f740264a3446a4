//! The daemon's configuration: one TOML file, unknown keys refused, units in the names.
//!
//! Every module defines its own part; this file only puts them together and checks what concerns several. The complete
//! commented file with every default is `systemd/darnet.toml`; a test loads it and compares it with these defaults.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dicom::scp::ScpConfig;
use crate::engine::cpu::dispatch::Isa;
use crate::engine::priority::MAX_NICE;
use crate::engine::tensorrt::TensorrtOptions;
use crate::engine::{BackendKind, EngineOptions};
use crate::pipeline::folder::FolderConfig;
use crate::pipeline::ingest::Durability;
use crate::pipeline::publish::{Preference, ResultsConfig};
use crate::report::outbox::OutboxConfig;
use crate::report::policy::AlertPolicy;
use crate::report::webhook::WebhookConfig;
use crate::telemetry::LogConfig;
use crate::volume::completion::CompletionRules;
use crate::volume::geometry::GeometryLimits;
use crate::web::WebConfig;

/// Why a configuration cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is no valid configuration.
    #[error("parse {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
}

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder of journals, volumes, results, database and key. The only place with patient data.
    pub data_dir: PathBuf,
    /// Model and backend.
    pub model: ModelConfig,
    /// The C-STORE server.
    pub dicom: ScpConfig,
    /// Which senders are believed what.
    pub peers: PeersConfig,
    /// The watched folder.
    pub folder: FolderConfig,
    /// Completion rules, durability, bounds.
    pub assembly: AssemblyConfig,
    /// What geometry is judged.
    pub geometry: GeometryLimits,
    /// Which reconstruction of a study is live.
    pub preference: Preference,
    /// What is rendered and for how long it is kept.
    pub results: ResultsConfig,
    /// The alert policy.
    pub alert: AlertPolicy,
    /// Where alerts and results go.
    pub webhook: WebhookConfig,
    /// Retries.
    pub outbox: OutboxConfig,
    /// Metrics, health, results.
    pub web: WebConfig,
    /// Logs.
    pub log: LogConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/darnet"),
            model: ModelConfig::default(),
            dicom: ScpConfig::default(),
            peers: PeersConfig::default(),
            folder: FolderConfig::default(),
            assembly: AssemblyConfig::default(),
            geometry: GeometryLimits::default(),
            preference: Preference::default(),
            results: ResultsConfig::default(),
            alert: AlertPolicy::default(),
            webhook: WebhookConfig::default(),
            outbox: OutboxConfig::default(),
            web: WebConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// Model and backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Model folder; the embedded demonstration model when absent.
    pub path: Option<PathBuf>,
    /// Inference backend.
    pub backend: BackendKind,
    /// Threads of the backend; 0 takes every core.
    pub threads: usize,
    /// How much the threads that compute are lowered below those that receive (nice value, Linux); 0 leaves them.
    pub nice: i32,
    /// Instruction set of the cpu backend: scalar, avx2, avx512; the best there is when absent.
    pub isa: Option<Isa>,
    /// Keep the cpu backend's packed weights in a file beside the model, where its folder can be written.
    pub weight_cache: bool,
    /// The tensorrt backend's library and plan.
    pub tensorrt: TensorrtOptions,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            path: None,
            backend: BackendKind::default(),
            threads: 0,
            nice: 5,
            isa: None,
            weight_cache: true,
            tensorrt: TensorrtOptions::default(),
        }
    }
}

impl ModelConfig {
    /// How the backend may use the machine.
    pub fn engine_options(&self) -> EngineOptions {
        EngineOptions {
            threads: self.threads,
            nice: self.nice,
            isa: self.isa,
            weight_cache: self.weight_cache,
            tensorrt: self.tensorrt.clone(),
        }
    }
}

/// Which senders are believed what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeersConfig {
    /// Calling AE titles whose NumberOfSeriesRelatedInstances declares a series complete. From everyone else it is a
    /// hint, which starts inference early and never publishes.
    pub trust_series_count: Vec<String>,
}

/// Completion rules, durability, bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssemblyConfig {
    /// Wait after the last association of a series is released, milliseconds.
    pub grace_ms: u64,
    /// Wait after the last slice while an association stays open, milliseconds.
    pub idle_ms: u64,
    /// When a slice is acknowledged.
    pub durability: Durability,
    /// Whether inference may start before completion is certain.
    pub speculate: bool,
    /// Whether the first layers may run on finished planes while slices still arrive.
    pub compute_ahead: bool,
    /// Journal threads.
    pub journal_threads: usize,
    /// Decode threads; 0 takes every core.
    pub decode_threads: usize,
    /// In-plane resampling threads; 0 takes every core.
    pub resample_threads: usize,
    /// In-plane resampled slices held ready, all series together: 196 KiB each at 224 x 224.
    pub plane_cache_slices: usize,
    /// Series in memory at once.
    pub max_open_series: usize,
    /// Data sets a series may have; one more is answered 0xA700.
    pub max_objects_per_series: u64,
    /// Bytes of all journals; beyond it objects are answered 0xA700.
    pub max_journal_bytes: u64,
    /// Outcomes a series may have before a person must look.
    pub max_revisions: u32,
    /// Quiet time after publication before a series leaves memory, seconds.
    pub retire_after_s: u64,
    /// Days before journals, volumes and results are deleted; 0 keeps them.
    pub retention_days: u32,
}

impl Default for AssemblyConfig {
    fn default() -> Self {
        let rules = CompletionRules::default();
        Self {
            grace_ms: rules.grace_ms,
            idle_ms: rules.idle_ms,
            durability: Durability::Fsync,
            speculate: true,
            compute_ahead: true,
            journal_threads: 2,
            decode_threads: 0,
            resample_threads: 0,
            plane_cache_slices: 1280,
            max_open_series: 64,
            max_objects_per_series: 6000,
            max_journal_bytes: 200 << 30,
            max_revisions: 10,
            retire_after_s: 600,
            retention_days: 14,
        }
    }
}

impl AssemblyConfig {
    /// The completion rules among the settings.
    pub fn completion(&self) -> CompletionRules {
        CompletionRules { grace_ms: self.grace_ms, idle_ms: self.idle_ms }
    }

    /// Every fault, as a sentence fragment.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut range = |name: &str, value: u64, low: u64, high: u64| {
            if !(low..=high).contains(&value) {
                faults.push(format!("assembly.{name}: expected {low} to {high}, got {value}"));
            }
        };
        range("grace_ms", self.grace_ms, 0, 600_000);
        range("idle_ms", self.idle_ms, 100, 3_600_000);
        range("journal_threads", self.journal_threads as u64, 1, 64);
        range("decode_threads", self.decode_threads as u64, 0, 256);
        range("resample_threads", self.resample_threads as u64, 0, 256);
        range("plane_cache_slices", self.plane_cache_slices as u64, 0, 65_536);
        range("max_open_series", self.max_open_series as u64, 1, 4096);
        range("max_objects_per_series", self.max_objects_per_series, 1, 65_536);
        range("max_journal_bytes", self.max_journal_bytes, 1 << 20, 1 << 50);
        range("max_revisions", u64::from(self.max_revisions), 1, 1000);
        range("retire_after_s", self.retire_after_s, 1, 86_400);
        range("retention_days", u64::from(self.retention_days), 0, 3650);
        faults
    }
}

impl Config {
    /// Reads and parses `path`. Ranges are checked by [`Config::validate`].
    ///
    /// # Errors
    /// [`ConfigError`]: unreadable, or no valid configuration.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        toml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.to_path_buf(), message: error.to_string() })
    }

    /// Every fault at once; empty when there is none. Opens folders and the model, changes nothing.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        match std::fs::metadata(&self.data_dir) {
            Ok(meta) if !meta.is_dir() => faults.push("data_dir: expected a folder".to_owned()),
            Ok(meta) if meta.permissions().readonly() => faults.push("data_dir: expected a writable folder".to_owned()),
            Ok(_) => {}
            Err(error) => faults.push(format!("data_dir: {error}; make it and give it to the daemon's user")),
        }
        if !(0..=MAX_NICE).contains(&self.model.nice) {
            faults.push(format!("model.nice: expected 0 to {MAX_NICE}, got {}", self.model.nice));
        }
        faults.extend(self.dicom.faults().into_iter().map(|f| format!("dicom: {f}")));
        faults.extend(self.folder.validate());
        faults.extend(self.assembly.validate());
        faults.extend(self.geometry.faults().into_iter().map(|f| format!("geometry.{f}")));
        faults.extend(self.results.validate());
        faults.extend(self.alert.validate().into_iter().map(|f| format!("alert.{f}")));
        faults.extend(self.webhook.validate().into_iter().map(|f| format!("webhook.{f}")));
        faults.extend(self.outbox.validate().into_iter().map(|f| format!("outbox.{f}")));
        faults.extend(self.web.validate().into_iter().map(|f| format!("web.{f}")));
        faults.extend(self.log.validate().into_iter().map(|f| format!("log.{f}")));
        if self.geometry.max_slices as u64 > self.assembly.max_objects_per_series {
            faults.push("geometry.max_slices: expected at most assembly.max_objects_per_series".to_owned());
        }
        faults
    }
}
