//! What the association server and client share of the upper layer (PS3.8) and of DIMSE (PS3.7).
//!
//! The association PDUs are read and written by `dicom-ul` on bounded buffers in memory. P-DATA-TF, which carries all
//! the bytes, is framed here: its header is checked before anything is allocated, and its payload goes from the
//! receive buffer straight into the object's own buffer.

use crate::dicom::dataset::{Step, Walker};
use crate::dicom::header::valid_uid;
use crate::dicom::syntax;
use dicom_ul::pdu::{Pdu, read_pdu, write_pdu};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Implementation Class UID (PS3.7 D.3.3.2), a UUID-derived UID of this program.
pub const IMPLEMENTATION_CLASS_UID: &str = "2.25.249492168523927144010297931885350813121";
/// Implementation Version Name, at most 16 characters.
pub const IMPLEMENTATION_VERSION_NAME: &str = concat!("DARNET_", env!("CARGO_PKG_VERSION"));
/// The DICOM application context (PS3.7 annex A).
pub const APPLICATION_CONTEXT: &str = "1.2.840.10008.3.1.1.1";

/// Largest association PDU that is read: 128 presentation contexts of one abstract and 40 transfer syntaxes with 64
/// bytes each are 128 * 41 * 68 = 357 KiB.
pub const MAX_ASSOCIATION_PDU: u32 = 512 << 10;
/// Largest command set that is read: a C-STORE request has about 300 bytes.
pub const MAX_COMMAND: usize = 16 << 10;
/// Receive buffer of one association. One read takes what the kernel has, up to this: several PDUs at a time.
const RECEIVE_BUFFER: usize = 256 << 10;

/// PDU types (PS3.8 table 9-11 ff).
pub(crate) mod pdu_type {
    pub const ASSOCIATE_RQ: u8 = 1;
    pub const ASSOCIATE_AC: u8 = 2;
    pub const ASSOCIATE_RJ: u8 = 3;
    pub const P_DATA: u8 = 4;
    pub const RELEASE_RQ: u8 = 5;
    pub const RELEASE_RP: u8 = 6;
    pub const ABORT: u8 = 7;
}

/// DIMSE command fields (PS3.7 annex E.1).
pub(crate) mod command_field {
    pub const C_STORE_RQ: u16 = 0x0001;
    pub const C_STORE_RSP: u16 = 0x8001;
    pub const C_ECHO_RQ: u16 = 0x0030;
    pub const C_ECHO_RSP: u16 = 0x8030;
    pub const C_CANCEL_RQ: u16 = 0x0fff;
}

/// CommandDataSetType: no data set follows.
pub(crate) const NO_DATA_SET: u16 = 0x0101;

/// A byte stream an association runs on: TCP now, TLS over TCP through the same seam.
pub trait Transport: Read + Write + Send {
    /// Bounds each following read.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// Bounds each following write.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// Ends the sending direction, so that the peer sees the end after the last byte.
    fn finish_writing(&mut self) -> io::Result<()>;
}

impl Transport for TcpStream {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        TcpStream::set_read_timeout(self, timeout)
    }
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        TcpStream::set_write_timeout(self, timeout)
    }
    fn finish_writing(&mut self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

/// A transport with a receive buffer that knows when its last byte came.
pub(crate) struct Wire<T> {
    transport: T,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    last_read_at: Instant,
    deadline: Option<Instant>,
}

impl<T: Transport> Wire<T> {
    pub fn new(transport: T) -> Self {
        let buffer = vec![0; RECEIVE_BUFFER].into_boxed_slice();
        Self { transport, buffer, start: 0, end: 0, last_read_at: Instant::now(), deadline: None }
    }

    pub fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    /// Bounds all following reads together; `None` leaves each to the transport's own timeout.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// When the read returned that delivered the byte consumed last: a read happens only when a byte is needed that
    /// is not in the buffer, so every byte consumed after it came with it.
    pub fn last_read_at(&self) -> Instant {
        self.last_read_at
    }

    /// Reads once more. An end of the stream is an error of kind `UnexpectedEof`.
    fn fill(&mut self) -> io::Result<()> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.transport.set_read_timeout(Some(left))?;
        }
        let count = loop {
            match self.transport.read(&mut self.buffer[self.end..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.last_read_at = Instant::now();
        self.end += count;
        Ok(())
    }

    /// The next `N` bytes. `N` is small.
    pub fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        while self.end - self.start < N {
            self.fill()?;
        }
        let mut out = [0; N];
        out.copy_from_slice(&self.buffer[self.start..self.start + N]);
        self.start += N;
        Ok(out)
    }

    /// Hands the next `length` bytes to `sink` in pieces as they come.
    pub fn pieces(&mut self, mut length: usize, mut sink: impl FnMut(&[u8])) -> io::Result<()> {
        while length > 0 {
            if self.start == self.end {
                self.fill()?;
            }
            let count = length.min(self.end - self.start);
            sink(&self.buffer[self.start..self.start + count]);
            self.start += count;
            length -= count;
        }
        Ok(())
    }

    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.transport.write_all(bytes)
    }

    /// Ends the connection so that the peer gets what was written: the peer closes first (PS3.8 9.2, state 13), we do
    /// after `bound`. Closing earlier makes some peers see a lost connection instead of the answer, and closing with
    /// unread bytes would reset it.
    pub fn linger(&mut self, bound: Duration) {
        let until = Instant::now() + bound;
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
            if self.transport.set_read_timeout(Some(left)).is_err() {
                return;
            }
            match self.transport.read(&mut self.buffer) {
                Ok(0) => return,
                Err(_) => break,
                Ok(_) => {}
            }
        }
        let _ = self.transport.finish_writing();
    }
}

/// Why an association PDU could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AssociationPduError {
    #[error("association PDU claims {0} bytes, more than the bound")]
    TooLarge(u32),
    #[error("association PDU is malformed")]
    Malformed,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads the body of an association PDU whose header was consumed, and parses the whole.
pub(crate) fn read_association_pdu<T: Transport>(
    wire: &mut Wire<T>,
    header: [u8; 6],
) -> Result<Pdu, AssociationPduError> {
    let length = u32::from_be_bytes([header[2], header[3], header[4], header[5]]);
    if length > MAX_ASSOCIATION_PDU {
        return Err(AssociationPduError::TooLarge(length));
    }
    // Grows with what arrives, not with what is claimed.
    let mut pdu = header.to_vec();
    wire.pieces(length as usize, |piece| pdu.extend_from_slice(piece))?;
    parse_association_pdu(&pdu).ok_or(AssociationPduError::Malformed)
}

fn parse_association_pdu(pdu: &[u8]) -> Option<Pdu> {
    // The parser reads some fields without a bound check; a panic means the same as an error.
    match catch_unwind(AssertUnwindSafe(|| read_pdu(pdu, MAX_ASSOCIATION_PDU, true))) {
        Ok(Ok(pdu)) => pdu,
        Ok(Err(_)) | Err(_) => None,
    }
}

/// An association PDU as bytes, to be sent in one write.
pub(crate) fn encode_association_pdu(pdu: &Pdu) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    write_pdu(&mut out, pdu).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(out)
}

/// An A-ABORT PDU: source 2 is the service provider, 0 the user (PS3.8 9.3.8).
pub(crate) fn abort_pdu(source: u8, reason: u8) -> [u8; 10] {
    [pdu_type::ABORT, 0, 0, 0, 0, 4, 0, 0, source, reason]
}

pub(crate) const RELEASE_RQ_PDU: [u8; 10] = [pdu_type::RELEASE_RQ, 0, 0, 0, 0, 4, 0, 0, 0, 0];
pub(crate) const RELEASE_RP_PDU: [u8; 10] = [pdu_type::RELEASE_RP, 0, 0, 0, 0, 4, 0, 0, 0, 0];

/// Appends `payload` as P-DATA-TF PDUs of at most `max_pdu` bytes (0: unlimited) with one PDV each.
pub(crate) fn append_pdata(out: &mut Vec<u8>, context: u8, command: bool, payload: &[u8], max_pdu: u32) {
    // A PDV has 4 bytes of length, the context and the control byte in front.
    let room = if max_pdu == 0 { 1 << 20 } else { (max_pdu as usize).saturating_sub(6).max(1) };
    let mut left = payload;
    loop {
        let (piece, rest) = left.split_at(room.min(left.len()));
        let control = u8::from(command) | if rest.is_empty() { 2 } else { 0 };
        out.extend_from_slice(&[pdu_type::P_DATA, 0]);
        out.extend_from_slice(&(piece.len() as u32 + 6).to_be_bytes());
        out.extend_from_slice(&(piece.len() as u32 + 2).to_be_bytes());
        out.extend_from_slice(&[context, control]);
        out.extend_from_slice(piece);
        if rest.is_empty() {
            return;
        }
        left = rest;
    }
}

/// A command set under construction: implicit VR little endian, group length first (PS3.7 6.3.1).
pub(crate) struct CommandWriter {
    bytes: Vec<u8>,
}

impl CommandWriter {
    pub fn new() -> Self {
        Self { bytes: vec![0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0] }
    }

    fn head(&mut self, element: u16, length: usize) {
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&element.to_le_bytes());
        self.bytes.extend_from_slice(&(length as u32).to_le_bytes());
    }

    pub fn number(mut self, element: u16, value: u16) -> Self {
        self.head(element, 2);
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn text(mut self, element: u16, value: &str, pad: u8) -> Self {
        self.head(element, value.len() + value.len() % 2);
        self.bytes.extend_from_slice(value.as_bytes());
        if value.len() % 2 == 1 {
            self.bytes.push(pad);
        }
        self
    }

    pub fn finish(mut self) -> Vec<u8> {
        let length = (self.bytes.len() - 12) as u32;
        self.bytes[8..12].copy_from_slice(&length.to_le_bytes());
        self.bytes
    }
}

/// What this program reads of a command set.
#[derive(Default)]
pub(crate) struct Command {
    pub field: u16,
    pub message_id: Option<u16>,
    pub responded_to: Option<u16>,
    pub data_set_type: u16,
    pub status: Option<u16>,
    pub sop_class: String,
    pub sop_instance: String,
}

impl Command {
    /// Parses a command set. `None`: no command set, or one without CommandField.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut command = Command { data_set_type: NO_DATA_SET, ..Command::default() };
        let mut field = None;
        let mut walker = Walker::new(bytes, syntax::encoding(syntax::IMPLICIT_LE)?);
        while let Step::Element(e) = walker.step().ok()? {
            let number = || e.number(*b"US").map(|n| n as u16);
            let uid = || valid_uid(e.trimmed()).unwrap_or_default().to_owned();
            match e.tag {
                0x0000_0002 => command.sop_class = uid(),
                0x0000_0100 => field = number(),
                0x0000_0110 => command.message_id = number(),
                0x0000_0120 => command.responded_to = number(),
                0x0000_0800 => command.data_set_type = number()?,
                0x0000_0900 => command.status = number(),
                0x0000_1000 => command.sop_instance = uid(),
                _ => {}
            }
        }
        command.field = field?;
        Some(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_set_reads_back() {
        let bytes = CommandWriter::new()
            .text(0x0002, "1.2.3", 0)
            .number(0x0100, 1)
            .number(0x0110, 77)
            .number(0x0800, 0)
            .text(0x1000, "1.2.3.45", 0)
            .finish();
        let command = Command::parse(&bytes).unwrap();
        assert_eq!((command.field, command.message_id, command.data_set_type), (1, Some(77), 0));
        assert_eq!((command.sop_class.as_str(), command.sop_instance.as_str()), ("1.2.3", "1.2.3.45"));
        for cut in 0..bytes.len() {
            let _ = Command::parse(&bytes[..cut]);
        }
        assert!(Command::parse(&[]).is_none());
    }

    #[test]
    fn pdata_is_split_at_the_peers_pdu_length() {
        let payload: Vec<u8> = (0..=255).collect();
        let mut out = Vec::new();
        append_pdata(&mut out, 3, false, &payload, 106);
        let mut got = Vec::new();
        let mut at = 0;
        while at < out.len() {
            let length = u32::from_be_bytes(out[at + 2..at + 6].try_into().unwrap()) as usize;
            assert!(length <= 106);
            assert_eq!(out[at + 10], 3);
            got.extend_from_slice(&out[at + 12..at + 6 + length]);
            at += 6 + length;
            assert_eq!(out[at - length + 5] & 2 != 0, at == out.len(), "only the last piece is marked last");
        }
        assert_eq!(got, payload);
    }

    #[test]
    fn a_mutated_association_pdu_never_panics_out() {
        let mut pdu = vec![1, 0, 0, 0, 0, 100, 0, 1, 0, 0];
        pdu.resize(74, b' ');
        pdu.extend_from_slice(&[0x50, 0, 0, 8, 0x51, 0, 0, 1, 0, 0, 0, 0]);
        for i in 0..pdu.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut mutated = pdu.clone();
                mutated[i] = value;
                let _ = parse_association_pdu(&mutated);
            }
        }
    }
}
