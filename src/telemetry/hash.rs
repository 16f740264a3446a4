//! The keyed hash that names a study or a series outside the store.
//!
//! HMAC-SHA256 of the UID under a random key of this installation, cut to 16 bytes: a UID cannot be confirmed by
//! guessing without the key, and two installations give different names. 128 bits keep the chance of a collision
//! among a million studies below 10^12 / 2^129, about 10^-27.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Sha256;

/// Length of the text form: 16 bytes in hex.
pub const HASH_HEX_LEN: usize = 32;

/// Key length in bytes: the output size of SHA-256.
const KEY_LEN: usize = 32;

/// A key file is 64 hex digits and a newline; more is not read.
const MAX_KEY_FILE_BYTES: u64 = 2 * KEY_LEN as u64 + 2;

/// The name of a study or of a series: 32 lowercase hex digits, safe in logs, paths and URLs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StudyHash(String);

/// Text that is not a [`StudyHash`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a study hash: expected {HASH_HEX_LEN} lowercase hex digits")]
pub struct InvalidStudyHash;

impl StudyHash {
    /// Reads the text form.
    pub fn parse(text: &str) -> Result<Self, InvalidStudyHash> {
        let valid = text.len() == HASH_HEX_LEN && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidStudyHash) }
    }

    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for StudyHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for StudyHash {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for StudyHash {
    type Err = InvalidStudyHash;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl Serialize for StudyHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for StudyHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Why the key of a [`StudyHasher`] cannot be had. The caller knows the path; it is not repeated here.
#[derive(Debug, thiserror::Error)]
pub enum HasherError {
    /// The key file cannot be read, written or listed.
    #[error("{operation} the hash key file: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The key file holds something else.
    #[error(
        "read the hash key file: expected 64 hex digits, got something else; restore it from a backup or remove it"
    )]
    Malformed,
    /// Others may read the key file.
    #[error("read the hash key file: mode {mode:03o} lets others read it; set it to 600")]
    TooOpen {
        /// The permission bits found.
        mode: u32,
    },
    /// The system gave no random bytes.
    #[error("make a hash key: the system gave no random bytes")]
    NoRandom,
}

fn io(operation: &'static str) -> impl Fn(std::io::Error) -> HasherError {
    move |source| HasherError::Io { operation, source }
}

/// Makes a [`StudyHash`] from a UID, under the key of this installation.
#[derive(Clone)]
pub struct StudyHasher {
    mac: Hmac<Sha256>,
}

impl std::fmt::Debug for StudyHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StudyHasher(<redacted>)")
    }
}

impl StudyHasher {
    /// A hasher with a given key.
    pub fn new(key: [u8; KEY_LEN]) -> Self {
        Self { mac: Hmac::new_from_slice(&key).unwrap_or_else(|_| unreachable!("HMAC takes keys of any length")) }
    }

    /// The hash of a StudyInstanceUID or a SeriesInstanceUID. Padding (a trailing NUL or space) does not matter.
    pub fn hash(&self, uid: &str) -> StudyHash {
        let mut mac = self.mac.clone();
        mac.update(uid.trim_end_matches(['\0', ' ']).as_bytes());
        let full = mac.finalize().into_bytes();
        StudyHash(hex(&full[..HASH_HEX_LEN / 2]))
    }

    /// Reads the key file, or makes one with a random key and mode 0600.
    ///
    /// The file appears whole or not at all, also when two processes start at once: both then read the same key.
    pub fn load_or_create(path: &Path) -> Result<Self, HasherError> {
        match Self::load(path) {
            Err(HasherError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut key = [0u8; KEY_LEN];
        getrandom::fill(&mut key).map_err(|_| HasherError::NoRandom)?;
        let mut suffix = [0u8; 8];
        getrandom::fill(&mut suffix).map_err(|_| HasherError::NoRandom)?;
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", hex(&suffix)));
        let temporary = PathBuf::from(temporary);
        let linked = write_key(&temporary, &key).and_then(|()| match fs::hard_link(&temporary, path) {
            // Another process was first: its key counts.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(io("create")),
        });
        let removed = fs::remove_file(&temporary).map_err(io("create"));
        linked?;
        removed?;
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io("sync the folder of"))?;
        }
        Self::load(path)
    }

    fn load(path: &Path) -> Result<Self, HasherError> {
        let file = fs::File::open(path).map_err(io("open"))?;
        let mode = file.metadata().map_err(io("open"))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(HasherError::TooOpen { mode });
        }
        let mut text = Vec::new();
        file.take(MAX_KEY_FILE_BYTES + 1).read_to_end(&mut text).map_err(io("read"))?;
        let text = std::str::from_utf8(&text).map_err(|_| HasherError::Malformed)?.trim_end();
        let key = unhex(text).ok_or(HasherError::Malformed)?;
        Ok(Self::new(key.try_into().map_err(|_| HasherError::Malformed)?))
    }
}

fn write_key(path: &Path, key: &[u8]) -> Result<(), HasherError> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io("create"))?;
    file.write_all(format!("{}\n", hex(key)).as_bytes()).and_then(|()| file.sync_all()).map_err(io("write"))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn hash_is_hmac_sha256_cut_to_16_bytes() {
        // RFC 4231 test case 2 has a 4-byte key; HMAC pads keys with zeros, so 32 bytes with zeros are the same key.
        let mut key = [0u8; 32];
        key[..4].copy_from_slice(b"Jefe");
        let hash = StudyHasher::new(key).hash("what do ya want for nothing?");
        assert_eq!(hash.as_str(), "5bdcc146bf60754e6a042426089575c7");
        assert_eq!(hash.to_string().len(), HASH_HEX_LEN);
    }

    #[test]
    fn padding_does_not_change_the_hash_and_keys_do() {
        let a = StudyHasher::new([1; 32]);
        assert_eq!(a.hash("1.2.3"), a.hash("1.2.3\0"));
        assert_eq!(a.hash("1.2.3"), a.hash("1.2.3 "));
        assert_ne!(a.hash("1.2.3"), a.hash("1.2.4"));
        assert_ne!(a.hash("1.2.3"), StudyHasher::new([2; 32]).hash("1.2.3"));
    }

    #[test]
    fn key_file_is_private_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hash.key");
        let first = StudyHasher::load_or_create(&path).unwrap().hash("1.2.3");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(StudyHasher::load_or_create(&path).unwrap().hash("1.2.3"), first);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn two_starts_at_once_agree_on_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hash.key");
        let hashes: Vec<_> = std::thread::scope(|s| {
            let threads: Vec<_> =
                (0..8).map(|_| s.spawn(|| StudyHasher::load_or_create(&path).unwrap().hash("1.2.3"))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(hashes.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn bad_key_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hash.key");
        for content in ["", "zz", "00", &"0".repeat(63), &"0".repeat(66), &"é".repeat(32)] {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(StudyHasher::load_or_create(&path), Err(HasherError::Malformed)), "{content:?}");
        }
        fs::write(&path, "0".repeat(64)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(StudyHasher::load_or_create(&path), Err(HasherError::TooOpen { mode: 0o644 })));
        let missing = dir.path().join("none").join("hash.key");
        assert!(matches!(StudyHasher::load_or_create(&missing), Err(HasherError::Io { .. })));
    }

    #[test]
    fn text_form_round_trips_and_is_checked() {
        let hash = StudyHasher::new([3; 32]).hash("1.2.3");
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<StudyHash>(&json).unwrap(), hash);
        assert_eq!(hash.as_str().parse::<StudyHash>().unwrap(), hash);
        for bad in ["", "1.2.3", &"A".repeat(32), &"0".repeat(31), &"0".repeat(33), "../../../../../../../../../etc/"] {
            assert_eq!(StudyHash::parse(bad), Err(InvalidStudyHash), "{bad:?}");
        }
        assert!(!format!("{:?}", StudyHasher::new([7; 32])).contains('7'));
    }
}
