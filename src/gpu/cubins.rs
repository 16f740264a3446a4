//! Compiled kernels kept in files, so that a start needs no compiler.
//!
//! ```text
//! offset  bytes  field
//!      0      8  "DARNETCU"
//!      8     32  SHA-256 of what follows
//!     40      n  the cubin
//! ```
//!
//! The file's name is made of source, options and architecture, so that no other kernel's is ever read. A file that is torn
//! or changed is passed over and written anew; it is written beside and renamed.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Source;

const MAGIC: &[u8; 8] = b"DARNETCU";
const HEADER: usize = 40;
/// Largest file that is read; the largest kernel has 70 KB.
const MAX_BYTES: u64 = 16 << 20;

/// Where the cubin of `source` for `arch` lies in `folder`.
pub(super) fn path(folder: &Path, source: &Source, arch: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in
        std::iter::once(arch).chain([source.name, &*source.text]).chain(source.options.iter().map(String::as_str))
    {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let name: String = hash.finalize().iter().take(12).map(|b| format!("{b:02x}")).collect();
    folder.join(format!("cuda-sm{arch}-{name}.cubin"))
}

/// The cubin, if the file is whole.
pub(super) fn load(file: &Path) -> Option<Vec<u8>> {
    let meta = fs::metadata(file).ok().filter(|m| m.is_file() && m.len() <= MAX_BYTES)?;
    let bytes = fs::read(file).ok().filter(|b| b.len() as u64 == meta.len() && b.len() > HEADER)?;
    let whole = bytes.starts_with(MAGIC) && bytes[8..HEADER] == *Sha256::digest(&bytes[HEADER..]);
    whole.then(|| bytes[HEADER..].to_vec())
}

/// Keeps a cubin; a file that cannot be written means that it is compiled again.
pub(super) fn store(file: &Path, cubin: &[u8]) {
    let mut bytes = Vec::with_capacity(HEADER + cubin.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&Sha256::digest(cubin));
    bytes.extend_from_slice(cubin);
    let beside = file.with_extension(format!("part-{}-{:?}", std::process::id(), std::thread::current().id()));
    if fs::write(&beside, bytes).is_err() || fs::rename(&beside, file).is_err() {
        let _ = fs::remove_file(&beside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    #[test]
    fn a_cubin_comes_back_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source {
            name: "a.cu",
            text: Cow::Borrowed("text"),
            options: vec!["-DN=1".to_owned()],
            arch_specific: false,
        };
        let file = path(dir.path(), &source, "90");
        assert_ne!(file, path(dir.path(), &source, "89"));
        assert_ne!(file, path(dir.path(), &Source { options: Vec::new(), ..source.clone() }, "90"));
        assert_eq!(load(&file), None);
        store(&file, b"machine code");
        assert_eq!(load(&file).as_deref(), Some(&b"machine code"[..]));
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert_eq!(load(&file), None);
        bytes.truncate(20);
        fs::write(&file, &bytes).unwrap();
        assert_eq!(load(&file), None);
    }
}
