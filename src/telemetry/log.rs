//! Log lines on stderr.

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Shape of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people and journald.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// How and what to log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Shape of a line.
    pub format: LogFormat,
    /// What is logged, in the syntax of `tracing-subscriber`'s `EnvFilter`: `info`, `darnet=debug,warn`.
    pub filter: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into() }
    }
}

impl LogConfig {
    /// Every fault of the values.
    pub fn validate(&self) -> Vec<String> {
        match EnvFilter::try_new(&self.filter) {
            Ok(_) => Vec::new(),
            Err(e) => vec![format!("filter: not a log filter, use e.g. \"info\" or \"darnet=debug,warn\" ({e})")],
        }
    }
}

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is malformed.
    #[error("start logging: {0}")]
    Filter(String),
    /// Logging was started before.
    #[error("start logging: already started in this process")]
    AlreadyStarted,
}

/// Starts logging to stderr, once a process. Colours only on a terminal.
pub fn init_logging(config: &LogConfig) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(&config.filter).map_err(|e| LogError::Filter(e.to_string()))?;
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match config.format {
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            tracing::subscriber::set_global_default(base.with_ansi(colours).finish())
        }
        LogFormat::Json => tracing::subscriber::set_global_default(base.json().flatten_event(true).finish()),
    };
    started.map_err(|_| LogError::AlreadyStarted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_faults_are_named() {
        assert_eq!(LogConfig::default().validate(), Vec::<String>::new());
        let bad = LogConfig { filter: "darnet=loud".into(), ..LogConfig::default() };
        assert_eq!(bad.validate().len(), 1);
        assert!(toml::from_str::<LogConfig>("colour = true").is_err());
        assert_eq!(toml::from_str::<LogConfig>("format = \"json\"").unwrap().format, LogFormat::Json);
    }
}
