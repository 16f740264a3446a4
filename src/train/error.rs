//! What can go wrong with training data, apart from a scan that is refused.

use std::path::PathBuf;

/// What stops a command. A scan that cannot be used never does: it is a refusal in the report.
#[derive(Debug, thiserror::Error)]
pub enum TrainDataError {
    /// The disk or the quota is full. What was whole before is whole still.
    #[error("{operation}: no space left on the disk or in the quota; free some and run the same command again")]
    NoSpace {
        /// What was tried.
        operation: &'static str,
    },
    /// The operating system refused.
    #[error("{operation} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path as given by the user, or a file of the cache.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of a cache is not what it should be.
    #[error("read cache file {file}: {fault}; remove the file and run `prepare` again")]
    Damaged {
        /// Name of the file, without its folder.
        file: String,
        /// Expected and got.
        fault: String,
    },
    /// A cache of another version of the program.
    #[error("read cache: expected format {expected}, got {got}; make the cache anew with `prepare`")]
    Version {
        /// What this version reads.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A cache or record that was made with other preprocessing, shape or classes.
    #[error("read cache: it was made for another manifest ({difference}); name another folder or the same manifest")]
    OtherPreprocessing {
        /// What differs.
        difference: String,
    },
    /// A cache whose first `prepare` never came to its end.
    #[error("read cache: it has no index, `prepare` did not finish; run it again, it does only what is missing")]
    Unfinished,
    /// Another process writes to the cache.
    #[error("write cache: another `prepare` has it open")]
    Busy,
    /// A split or a list that is not sound.
    #[error("{what}: {fault}")]
    Table {
        /// Which table.
        what: &'static str,
        /// Expected and got. Counts and line numbers, never an identifier.
        fault: String,
    },
    /// An option out of range.
    #[error("option {option}: expected {expected}, got {got}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A source folder without anything to read.
    #[error("expected {expected} below the folder given, found none")]
    Nothing {
        /// What was looked for.
        expected: &'static str,
    },
    /// The model's manifest could not be read.
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
}

impl TrainDataError {
    /// For `map_err` on input and output.
    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| {
            if crate::volume::journal::no_space(&source) {
                Self::NoSpace { operation }
            } else {
                Self::Io { operation, path, source }
            }
        }
    }

    pub(crate) fn table(what: &'static str, fault: impl std::fmt::Display) -> Self {
        Self::Table { what, fault: fault.to_string() }
    }

    pub(crate) fn damaged(file: &str, fault: impl std::fmt::Display) -> Self {
        Self::Damaged { file: file.to_owned(), fault: fault.to_string() }
    }
}
