//! Scalars as a TensorBoard event file.
//!
//! Input: tag, step, value. Output: `events.out.tfevents.*`: TFRecord frames of `tensorflow.Event` messages, of which only
//! the scalar fields are written, by hand, because they are four.
//!
//! Each start of a run opens a new file, whose first events say from which step on earlier files are void. A file that
//! ends within a frame is read up to it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::TrainError;

/// An open event file.
pub struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventFile {
    /// A new file in `dir`. Events of earlier files at or after `step` are void.
    ///
    /// # Errors
    /// A file that cannot be made.
    pub fn create(dir: &Path, step: u64) -> Result<Self, TrainError> {
        let micros = now().as_micros();
        let path = dir.join(format!("events.out.tfevents.{micros:016}.darnet"));
        let file = File::create_new(&path).map_err(|source| TrainError::Io {
            action: "create",
            path: path.clone(),
            source,
        })?;
        let mut events = Self { path, file: BufWriter::new(file) };
        let mut version = Vec::new();
        text(&mut version, 3, b"brain.Event:2");
        events.event(0, &version)?;
        let mut session = Vec::new();
        let mut started = Vec::new();
        integer(&mut started, 1, 1);
        text(&mut session, 7, &started);
        events.event(step, &session)?;
        events.flush()?;
        Ok(events)
    }

    /// Writes `value` under `tag` at `step`.
    ///
    /// # Errors
    /// A full disk.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> Result<(), TrainError> {
        let mut entry = Vec::new();
        text(&mut entry, 1, tag.as_bytes());
        entry.push(2 << 3 | 5);
        entry.extend((value as f32).to_le_bytes());
        let mut summary = Vec::new();
        text(&mut summary, 1, &entry);
        let mut body = Vec::new();
        text(&mut body, 5, &summary);
        self.event(step, &body)
    }

    /// Hands everything to the system.
    ///
    /// # Errors
    /// A full disk.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        self.file.flush().map_err(|source| TrainError::Io { action: "write", path: self.path.clone(), source })
    }

    fn event(&mut self, step: u64, body: &[u8]) -> Result<(), TrainError> {
        let mut message = vec![1 << 3 | 1];
        message.extend(now().as_secs_f64().to_le_bytes());
        integer(&mut message, 2, step);
        message.extend(body);
        let length = (message.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(message.len() + 16);
        frame.extend(length);
        frame.extend(masked_crc(&length).to_le_bytes());
        frame.extend(&message);
        frame.extend(masked_crc(&message).to_le_bytes());
        self.file.write_all(&frame).map_err(|source| TrainError::Io {
            action: "write",
            path: self.path.clone(),
            source,
        })
    }
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A varint field.
fn integer(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    varint(out, value);
}

/// A length-delimited field.
fn text(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// CRC-32C, rotated and shifted as TFRecord wants it.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), bit by bit: a few hundred bytes a step.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0x82F6_3B78 } else { c >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_has_its_published_value() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn frames_hold_tag_step_and_value() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path(), 300).unwrap();
        events.scalar("loss/train", 301, 0.5).unwrap();
        events.flush().unwrap();
        let bytes = std::fs::read(&events.path).unwrap();
        let mut at = 0;
        let mut frames = Vec::new();
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let crc = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap());
            assert_eq!(crc, masked_crc(&bytes[at..at + 8]));
            let body = &bytes[at + 12..at + 12 + length];
            let crc = u32::from_le_bytes(bytes[at + 12 + length..at + 16 + length].try_into().unwrap());
            assert_eq!(crc, masked_crc(body));
            frames.push(body.to_vec());
            at += 16 + length;
        }
        assert_eq!(frames.len(), 3);
        assert!(frames[0].ends_with(b"brain.Event:2"));
        // step 300 in two bytes, then field 7 with a message of two bytes: status 1
        assert!(frames[1].ends_with(&[0x10, 0xAC, 0x02, 0x3A, 2, 8, 1]));
        let tail = [&b"\x0a\x0aloss/train\x15"[..], &0.5f32.to_le_bytes()].concat();
        assert!(frames[2].ends_with(&tail));
    }
}
