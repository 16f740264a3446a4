//! What identifies a GPU in a plan's key.

use crate::gpu::Gpu;

/// Where the kernel module says its version.
const DRIVER_VERSION_FILE: &str = "/sys/module/nvidia/version";
/// Characters of it that are kept; versions have about ten.
const MAX_VERSION_CHARS: usize = 64;

/// A GPU and its driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability, `9.0`.
    pub compute_capability: String,
    /// Version of the driver and of the CUDA interface it has, `580.65.06 (CUDA 13.0)`.
    pub driver: String,
}

impl DeviceInfo {
    /// That of an open GPU.
    pub fn of(gpu: &Gpu) -> Self {
        let (major, minor) = gpu.compute_capability();
        let cuda = gpu.driver_version();
        let cuda = format!("CUDA {}.{}", cuda / 1000, cuda % 1000 / 10);
        // In a container without it the interface's version stands alone.
        let module = std::fs::read_to_string(DRIVER_VERSION_FILE).unwrap_or_default();
        let module: String = module.trim().chars().take(MAX_VERSION_CHARS).collect();
        let driver = if module.is_empty() { cuda } else { format!("{module} ({cuda})") };
        Self { name: gpu.name().to_owned(), compute_capability: format!("{major}.{minor}"), driver }
    }
}
