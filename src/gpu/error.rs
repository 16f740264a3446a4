//! What can go wrong between this program and a GPU.

use cudarc::driver::DriverError;

/// Why a GPU, its driver or a library of its maker cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// A library is not on this machine, or not where the system looks.
    #[error("open {library}: none of {tried} was found; install the NVIDIA driver or toolkit, or set LD_LIBRARY_PATH")]
    LibraryAbsent {
        /// Which.
        library: &'static str,
        /// The names that were tried.
        tried: String,
    },
    /// A library is too old for what is needed of it.
    #[error("{library} has no function {symbol}; expected the driver of CUDA 12.0 or later")]
    Symbol {
        /// Which library.
        library: &'static str,
        /// Which function.
        symbol: &'static str,
    },
    /// The driver is there and sees no such GPU.
    #[error("GPU {ordinal}: the driver sees {count}")]
    NoDevice {
        /// Which was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU or its driver cannot do what a kernel needs.
    #[error("{what}: expected {expected}, got {got}")]
    Unsupported {
        /// What.
        what: &'static str,
        /// What is needed.
        expected: String,
        /// What there is.
        got: String,
    },
    /// The driver refused.
    #[error("{operation}: {name} ({text})")]
    Driver {
        /// What was attempted.
        operation: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// Device memory was refused.
    #[error("reserve {bytes} bytes of GPU memory: {name}")]
    Memory {
        /// How many.
        bytes: usize,
        /// The driver's name of the error.
        name: String,
    },
    /// A kernel does not compile.
    #[error("compile {name} for {arch}: {log}")]
    Compile {
        /// Which source.
        name: String,
        /// The architecture.
        arch: String,
        /// The compiler's words.
        log: String,
    },
}

impl GpuError {
    /// A refusal of the driver while doing `operation`.
    pub fn driver(operation: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| {
            let text = |c: Result<&std::ffi::CStr, DriverError>| {
                c.map_or_else(|_| format!("error {}", error.0 as u32), |c| c.to_string_lossy().into_owned())
            };
            Self::Driver { operation, name: text(error.error_name()), text: text(error.error_string()) }
        }
    }
}
