//! Which kernel does which convolution, kept beside the model so that a GPU is timed once.
//!
//! A JSON file in the model's folder, named after the GPU's architecture. Its key names everything that a choice depends
//! on; a file of another key, or one that cannot be read, is passed over and written anew. It is written beside and renamed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::conv::{Choice, Shape};

/// Largest file that is read: a choice is some 200 bytes, a network has eleven shapes.
const MAX_BYTES: u64 = 1 << 20;
/// Counts changes of our kernels: choices of an earlier version are not taken over.
const KERNEL_VERSION: u32 = 1;

/// What a choice depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    pub kernels: u32,
    pub gpu: String,
    pub arch: String,
    pub multiprocessors: u32,
    pub driver: u32,
    pub cudnn: Option<usize>,
}

impl Key {
    pub fn new(gpu: &crate::gpu::Gpu, cudnn: Option<usize>) -> Self {
        Self {
            kernels: KERNEL_VERSION,
            gpu: gpu.name().to_owned(),
            arch: gpu.arch(false),
            multiprocessors: gpu.multiprocessors(),
            driver: gpu.driver_version(),
            cudnn,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    key: Key,
    choices: Vec<(Shape, Choice)>,
}

pub(super) fn path(dir: &Path, key: &Key) -> PathBuf {
    dir.join(format!("cuda-sm{}.choices", key.arch))
}

/// The choices of `key`; none when the file is absent, unreadable or of another key.
pub(super) fn load(path: &Path, key: &Key) -> Vec<(Shape, Choice)> {
    let small = fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() <= MAX_BYTES);
    let text = if small { fs::read_to_string(path).ok() } else { None };
    let file: Option<File> = text.and_then(|t| serde_json::from_str(&t).ok());
    file.filter(|f| f.key == *key).map(|f| f.choices).unwrap_or_default()
}

/// Keeps the choices; a folder that cannot be written means that the GPU is timed again next time.
pub(super) fn store(path: &Path, key: &Key, choices: &[(Shape, Choice)]) {
    let file = File { key: key.clone(), choices: choices.to_vec() };
    let Ok(text) = serde_json::to_string_pretty(&file) else { return };
    let beside = path.with_extension(format!("choices.{}", std::process::id()));
    if fs::write(&beside, text).is_err() || fs::rename(&beside, path).is_err() {
        let _ = fs::remove_file(&beside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cuda::conv::Variant;

    #[test]
    fn choices_come_back_for_the_same_gpu_and_for_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key {
            kernels: KERNEL_VERSION,
            gpu: "a GPU".to_owned(),
            arch: "90".to_owned(),
            multiprocessors: 132,
            driver: 13_000,
            cudnn: Some(91_900),
        };
        let shape = Shape { c_in: 64, c_out: 64, input_dhw: [4, 8, 8], output_dhw: [4, 8, 8], kernel: 3, stride: 1 };
        let own = Variant { nh: 8, pw: 1, pd: 2, split: 1, np: 5, nw: 4 };
        let choices = vec![
            (shape, Choice::Own(own)),
            (Shape { stride: 2, output_dhw: [2, 4, 4], ..shape }, Choice::Cudnn("engine 5".to_owned())),
        ];
        let path = path(dir.path(), &key);
        assert!(load(&path, &key).is_empty());
        store(&path, &key, &choices);
        assert_eq!(load(&path, &key), choices);
        assert!(load(&path, &Key { driver: 13_010, ..key.clone() }).is_empty());
        fs::write(&path, "{\"key\":").unwrap();
        assert!(load(&path, &key).is_empty());
    }
}
