//! The association client: sends objects by C-STORE, as they are encoded, and asks by C-ECHO.
//!
//! Input: files, or objects in memory. Output: a [`SendReport`] with the status of each. One thread an association;
//! each takes the next object when it is free, so that over several associations the order is only roughly that of
//! the input. Invariants: nothing is transcoded (each object needs the peer's acceptance of its own transfer syntax),
//! an object is held in memory only while it is sent. Deliberately absent: retries and a spool (what was not stored
//! is in the report), TLS (the association is generic over [`Transport`]).

use crate::dicom::header::HeaderError;
use crate::dicom::part10::{Part10, parse_part10, read_part10};
use crate::dicom::syntax;
use crate::dicom::upper::{
    APPLICATION_CONTEXT, Command, CommandWriter, IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, MAX_COMMAND,
    NO_DATA_SET, RELEASE_RQ_PDU, Transport, Wire, abort_pdu, append_pdata, command_field, encode_association_pdu,
    pdu_type, read_association_pdu,
};
use dicom_ul::pdu::{
    AssociationRQ, Pdu, PresentationContextProposed, PresentationContextResultReason, UserVariableItem,
};
use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Largest file that is sent.
const MAX_FILE_BYTES: u64 = 1 << 30;
/// Bytes of a file that are read to learn what to propose. A file whose identity lies deeper is read whole.
const PEEK_BYTES: u64 = 64 << 10;
/// Presentation contexts of one association: the odd identifiers 1 to 255 (PS3.8 9.3.2.2).
const MAX_CONTEXTS: usize = 128;
/// Associations of one send.
const MAX_ASSOCIATIONS: usize = 64;
/// Largest P-DATA-TF PDU that is sent, whatever the peer allows.
const MAX_SENT_PDU: u32 = 1 << 20;

/// Where and how to send.
#[derive(Clone, Debug, PartialEq)]
pub struct SendOptions {
    /// `HOST:PORT`.
    pub to: String,
    /// Our AE title.
    pub calling_ae_title: String,
    /// The peer's AE title.
    pub called_ae_title: String,
    /// Objects a second over all associations together; `None`: as fast as the peer takes them.
    pub slices_per_s: Option<f64>,
    /// Associations at once.
    pub associations: usize,
    /// Largest PDU we receive.
    pub max_pdu_length: u32,
    /// Bound of connecting, and of each answer.
    pub timeout_ms: u64,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            to: "127.0.0.1:11112".into(),
            calling_ae_title: "DARNET_SEND".into(),
            called_ae_title: "DARNET".into(),
            slices_per_s: None,
            associations: 1,
            max_pdu_length: 131_072,
            timeout_ms: 30_000,
        }
    }
}

/// What became of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendStatus {
    /// Status 0x0000.
    Stored,
    /// A warning status (0xBxxx): stored, with a remark.
    Warning(u16),
    /// A failure status: not stored.
    Refused(u16),
    /// The peer accepted no presentation context for its SOP class and transfer syntax.
    NotAccepted,
    /// It could not be read; says why.
    Unreadable(String),
    /// The association was lost before the answer.
    NotSent,
}

impl SendStatus {
    /// Whether the peer has it.
    pub fn stored(&self) -> bool {
        matches!(self, SendStatus::Stored | SendStatus::Warning(_))
    }
}

impl std::fmt::Display for SendStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SendStatus::Stored => f.write_str("stored"),
            SendStatus::Warning(code) => write!(f, "stored with warning 0x{code:04x}"),
            SendStatus::Refused(code) => write!(f, "refused with status 0x{code:04x}"),
            SendStatus::NotAccepted => f.write_str("the peer does not accept its SOP class and transfer syntax"),
            SendStatus::Unreadable(why) => write!(f, "unreadable: {why}"),
            SendStatus::NotSent => f.write_str("not sent: the association was lost"),
        }
    }
}

/// Where a send stands, after each object.
#[derive(Clone, Debug)]
pub struct SendProgress {
    /// Objects finished, well or not.
    pub done: usize,
    /// Objects in all, if known.
    pub total: Option<usize>,
    /// Bytes of data sets sent.
    pub bytes: u64,
    /// Position in the input of the object just finished.
    pub index: usize,
    /// What became of it.
    pub status: SendStatus,
}

/// What a send did.
#[derive(Clone, Debug)]
pub struct SendReport {
    /// The status of each object, in the order of the input.
    pub statuses: Vec<SendStatus>,
    /// Objects the peer has.
    pub stored: usize,
    /// Bytes of data sets sent.
    pub bytes: u64,
    /// From the first association request to the last release.
    pub elapsed: Duration,
}

/// Why nothing could be sent.
#[derive(Debug, thiserror::Error)]
pub enum ScuError {
    /// An option out of range.
    #[error("cannot send: {0}")]
    Options(&'static str),
    /// Nothing to send.
    #[error("cannot send: no object to send was found")]
    Nothing,
    /// The peer cannot be reached.
    #[error("cannot connect to {to}: {source}")]
    Connect {
        /// The configured peer.
        to: String,
        /// The system's error.
        source: io::Error,
    },
    /// The peer answered with A-ASSOCIATE-RJ.
    #[error("the peer rejected the association: {0}")]
    Rejected(String),
    /// The peer aborted.
    #[error("the peer aborted the association")]
    Aborted,
    /// The peer answered with something else.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The connection failed.
    #[error("the connection to the peer failed: {0}")]
    Io(#[from] io::Error),
    /// C-ECHO was not answered with success.
    #[error("the peer answered C-ECHO with status 0x{0:04x}")]
    EchoStatus(u16),
}

/// One established association.
struct Client<T: Transport> {
    wire: Wire<T>,
    /// Identifier by SOP class and transfer syntax.
    contexts: HashMap<(String, String), u8>,
    max_pdu: u32,
    next_message: u16,
    out: Vec<u8>,
}

fn connect(options: &SendOptions) -> Result<TcpStream, ScuError> {
    let failed = |source| ScuError::Connect { to: options.to.clone(), source };
    let timeout = Duration::from_millis(options.timeout_ms);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in options.to.to_socket_addrs().map_err(failed)? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(failed)?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(failed(last))
}

impl<T: Transport> Client<T> {
    fn establish(transport: T, options: &SendOptions, wanted: &[(String, String)]) -> Result<Self, ScuError> {
        let timeout = Duration::from_millis(options.timeout_ms);
        transport.set_read_timeout(Some(timeout))?;
        transport.set_write_timeout(Some(timeout))?;
        let mut wire = Wire::new(transport);
        let wanted = &wanted[..wanted.len().min(MAX_CONTEXTS)];
        let request = Pdu::AssociationRQ(AssociationRQ {
            protocol_version: 1,
            calling_ae_title: options.calling_ae_title.clone(),
            called_ae_title: options.called_ae_title.clone(),
            application_context_name: APPLICATION_CONTEXT.to_owned(),
            presentation_contexts: wanted
                .iter()
                .enumerate()
                .map(|(n, (class, transfer))| PresentationContextProposed {
                    id: (2 * n + 1) as u8,
                    abstract_syntax: class.clone(),
                    transfer_syntaxes: vec![transfer.clone()],
                })
                .collect(),
            user_variables: vec![
                UserVariableItem::MaxLength(options.max_pdu_length),
                UserVariableItem::ImplementationClassUID(IMPLEMENTATION_CLASS_UID.to_owned()),
                UserVariableItem::ImplementationVersionName(IMPLEMENTATION_VERSION_NAME.to_owned()),
            ],
        });
        wire.write_all(&encode_association_pdu(&request)?)?;
        let header: [u8; 6] = wire.array()?;
        if header[0] == pdu_type::ABORT {
            return Err(ScuError::Aborted);
        }
        if !matches!(header[0], pdu_type::ASSOCIATE_AC | pdu_type::ASSOCIATE_RJ) {
            return Err(ScuError::Protocol("no answer to the association request"));
        }
        let answer = read_association_pdu(&mut wire, header)
            .map_err(|_| ScuError::Protocol("the answer to the association request cannot be read"))?;
        let accepted = match answer {
            Pdu::AssociationAC(accepted) => accepted,
            Pdu::AssociationRJ(rejected) => return Err(ScuError::Rejected(rejected.source.to_string())),
            _ => return Err(ScuError::Protocol("no answer to the association request")),
        };
        let peer_max = accepted
            .user_variables
            .iter()
            .find_map(|v| if let UserVariableItem::MaxLength(n) = v { Some(*n) } else { None })
            .unwrap_or(0);
        let contexts = accepted
            .presentation_contexts
            .iter()
            .filter(|c| c.reason == PresentationContextResultReason::Acceptance && c.id % 2 == 1)
            .filter_map(|c| wanted.get(usize::from(c.id / 2)).map(|w| (w.clone(), c.id)))
            .collect();
        let max_pdu = if peer_max == 0 { MAX_SENT_PDU } else { peer_max.min(MAX_SENT_PDU) };
        Ok(Self { wire, contexts, max_pdu, next_message: 1, out: Vec::new() })
    }

    /// Sends a request with an optional data set and waits for its status.
    fn request(&mut self, context: u8, command: CommandWriter, data: Option<&[u8]>) -> Result<u16, ScuError> {
        self.out.clear();
        append_pdata(&mut self.out, context, true, &command.finish(), self.max_pdu);
        if let Some(data) = data {
            append_pdata(&mut self.out, context, false, data, self.max_pdu);
        }
        self.wire.write_all(&self.out)?;
        self.response()
    }

    fn response(&mut self) -> Result<u16, ScuError> {
        let mut command = Vec::new();
        loop {
            let header: [u8; 6] = self.wire.array()?;
            let length = u32::from_be_bytes([header[2], header[3], header[4], header[5]]) as usize;
            match header[0] {
                pdu_type::P_DATA => {}
                pdu_type::ABORT => return Err(ScuError::Aborted),
                _ => return Err(ScuError::Protocol("a PDU that is no response")),
            }
            let mut left = length;
            while left > 0 {
                if left < 6 || length > MAX_COMMAND {
                    return Err(ScuError::Protocol("a malformed response"));
                }
                let pdv: [u8; 6] = self.wire.array()?;
                let pdv_length = u32::from_be_bytes([pdv[0], pdv[1], pdv[2], pdv[3]]) as usize;
                if pdv_length < 2 || pdv_length > left - 4 || pdv[5] & 1 == 0 {
                    return Err(ScuError::Protocol("a malformed response"));
                }
                left -= 4 + pdv_length;
                self.wire.pieces(pdv_length - 2, |piece| command.extend_from_slice(piece))?;
                if command.len() > MAX_COMMAND {
                    return Err(ScuError::Protocol("a response that is too large"));
                }
                if pdv[5] & 2 != 0 {
                    let response = Command::parse(&command)
                        .filter(|c| matches!(c.field, command_field::C_STORE_RSP | command_field::C_ECHO_RSP))
                        .ok_or(ScuError::Protocol("a response without a command field of a response"))?;
                    if response.responded_to != Some(self.next_message) {
                        return Err(ScuError::Protocol("a response to another message"));
                    }
                    self.next_message = self.next_message.wrapping_add(1);
                    return response.status.ok_or(ScuError::Protocol("a response without a status"));
                }
            }
        }
    }

    fn store(&mut self, object: &Part10) -> Result<SendStatus, ScuError> {
        let key = (object.sop_class_uid.clone(), object.transfer_syntax_uid.clone());
        let Some(context) = self.contexts.get(&key).copied() else {
            return Ok(SendStatus::NotAccepted);
        };
        let command = CommandWriter::new()
            .text(0x0002, &object.sop_class_uid, 0)
            .number(0x0100, command_field::C_STORE_RQ)
            .number(0x0110, self.next_message)
            .number(0x0700, 0) // priority medium
            .number(0x0800, 0) // a data set follows
            .text(0x1000, &object.sop_instance_uid, 0);
        Ok(match self.request(context, command, Some(object.dataset()))? {
            0 => SendStatus::Stored,
            code if code & 0xf000 == 0xb000 => SendStatus::Warning(code),
            code => SendStatus::Refused(code),
        })
    }

    fn echo(&mut self) -> Result<(), ScuError> {
        let key = (syntax::VERIFICATION.to_owned(), syntax::IMPLICIT_LE.to_owned());
        let context = *self
            .contexts
            .get(&key)
            .ok_or(ScuError::Protocol("the peer does not accept the Verification SOP class"))?;
        let command = CommandWriter::new()
            .text(0x0002, syntax::VERIFICATION, 0)
            .number(0x0100, command_field::C_ECHO_RQ)
            .number(0x0110, self.next_message)
            .number(0x0800, NO_DATA_SET);
        match self.request(context, command, None)? {
            0 => Ok(()),
            code => Err(ScuError::EchoStatus(code)),
        }
    }

    /// Releases; a peer that does not answer is let go.
    fn release(mut self) {
        if self.wire.write_all(&RELEASE_RQ_PDU).is_ok() {
            let _ = self.wire.array::<10>();
        }
    }

    fn abort(mut self) {
        let _ = self.wire.write_all(&abort_pdu(0, 0));
    }
}

/// C-ECHO; the time from connecting to the answer.
///
/// # Errors
/// The peer cannot be reached, rejects, or does not answer with success.
pub fn echo(options: &SendOptions) -> Result<Duration, ScuError> {
    check(options)?;
    let start = Instant::now();
    let wanted = [(syntax::VERIFICATION.to_owned(), syntax::IMPLICIT_LE.to_owned())];
    let mut client = Client::establish(connect(options)?, options, &wanted)?;
    client.echo()?;
    let elapsed = start.elapsed();
    client.release();
    Ok(elapsed)
}

fn check(options: &SendOptions) -> Result<(), ScuError> {
    let title = |t: &str| !t.trim().is_empty() && t.len() <= 16 && t.is_ascii();
    if !title(&options.calling_ae_title) || !title(&options.called_ae_title) {
        return Err(ScuError::Options("an AE title must have 1 to 16 ASCII characters"));
    }
    if !(1..=MAX_ASSOCIATIONS).contains(&options.associations) {
        return Err(ScuError::Options("associations must be 1 to 64"));
    }
    if options.timeout_ms == 0 || !(4096..=1 << 20).contains(&options.max_pdu_length) {
        return Err(ScuError::Options("timeout_ms must be positive and max_pdu_length 4096 to 1048576"));
    }
    if options.slices_per_s.is_some_and(|r| !r.is_finite() || r <= 0.0) {
        return Err(ScuError::Options("the rate must be a positive number"));
    }
    Ok(())
}

/// One object to send.
enum Item {
    Path(PathBuf),
    Object(Box<Part10>),
}

/// SOP class and transfer syntax of a file, from its beginning where that is enough.
fn peek(path: &Path) -> Result<(String, String), HeaderError> {
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(PEEK_BYTES).read_to_end(&mut head)?;
    let part = match parse_part10(head) {
        // The header may go on behind the peeked bytes.
        Err(HeaderError::Dataset(_) | HeaderError::MissingUid { .. } | HeaderError::Inflate(_)) => {
            read_part10(path, MAX_FILE_BYTES)?
        }
        other => other?,
    };
    Ok((part.sop_class_uid, part.transfer_syntax_uid))
}

/// Sends files by C-STORE, in their order. A file that is no DICOM object is reported and skipped.
///
/// `progress` is called on this thread after each object.
///
/// # Errors
/// Nothing to send, or no association could be made at all. What happened to each object is in the report.
pub fn send(
    files: &[PathBuf],
    options: &SendOptions,
    progress: &mut dyn FnMut(&SendProgress),
) -> Result<SendReport, ScuError> {
    // Unreadable files are met again, and reported, when their turn comes.
    let wanted: BTreeSet<_> = files.iter().filter_map(|f| peek(f).ok()).collect();
    let mut items = files.iter().cloned().map(Item::Path);
    run(&mut items, Some(files.len()), wanted.into_iter().collect(), options, progress)
}

/// Sends objects in memory by C-STORE, as the iterator gives them. It is asked for one object at a time, from several
/// threads in turn.
///
/// `contexts` are the SOP classes and transfer syntaxes to propose; an object of another pair is reported as not
/// accepted.
///
/// # Errors
/// As [`send`].
pub fn send_objects(
    objects: &mut (dyn Iterator<Item = Part10> + Send),
    contexts: &[(&str, &str)],
    options: &SendOptions,
    progress: &mut dyn FnMut(&SendProgress),
) -> Result<SendReport, ScuError> {
    let total = match objects.size_hint() {
        (low, Some(high)) if low == high => Some(high),
        _ => None,
    };
    let wanted = contexts.iter().map(|(c, t)| ((*c).to_owned(), (*t).to_owned())).collect();
    let mut items = objects.map(|o| Item::Object(Box::new(o)));
    run(&mut items, total, wanted, options, progress)
}

struct Done {
    index: usize,
    bytes: u64,
    status: SendStatus,
}

fn run(
    items: &mut (dyn Iterator<Item = Item> + Send),
    total: Option<usize>,
    wanted: Vec<(String, String)>,
    options: &SendOptions,
    progress: &mut dyn FnMut(&SendProgress),
) -> Result<SendReport, ScuError> {
    check(options)?;
    if wanted.is_empty() || total == Some(0) {
        return Err(ScuError::Nothing);
    }
    let start = Instant::now();
    // The first association decides whether there is a peer; the others are optional.
    let first = Client::establish(connect(options)?, options, &wanted)?;
    let paced_from = Instant::now();
    let queue = Mutex::new(items.enumerate());
    let mut statuses: Vec<SendStatus> = Vec::new();
    let mut bytes = 0;
    let mut done = 0;
    let mut finish = |outcome: Done| {
        if statuses.len() <= outcome.index {
            statuses.resize(outcome.index + 1, SendStatus::NotSent);
        }
        statuses[outcome.index] = outcome.status.clone();
        bytes += outcome.bytes;
        done += 1;
        progress(&SendProgress { done, total, bytes, index: outcome.index, status: outcome.status });
    };
    std::thread::scope(|scope| {
        // Bounded: a slow progress display slows the sending, it does not pile up.
        let (report, reports) = crossbeam_channel::bounded::<Done>(64);
        let mut first = Some(first);
        for _ in 0..options.associations {
            let client = first.take();
            let (report, queue, wanted) = (report.clone(), &queue, &wanted);
            scope.spawn(move || {
                let client = match client {
                    Some(client) => client,
                    None => match connect(options).and_then(|s| Client::establish(s, options, wanted)) {
                        Ok(client) => client,
                        Err(_) => return,
                    },
                };
                send_from(client, queue, options, paced_from, &report);
            });
        }
        drop(report);
        for outcome in &reports {
            finish(outcome);
        }
    });
    // What no association was left to take.
    for (index, _) in queue.into_inner().unwrap_or_else(PoisonError::into_inner) {
        finish(Done { index, bytes: 0, status: SendStatus::NotSent });
    }
    let stored = statuses.iter().filter(|s| s.stored()).count();
    Ok(SendReport { stored, statuses, bytes, elapsed: start.elapsed() })
}

/// Sends objects over one association until none is left or the association fails.
fn send_from<T: Transport, I: Iterator<Item = (usize, Item)>>(
    mut client: Client<T>,
    queue: &Mutex<I>,
    options: &SendOptions,
    paced_from: Instant,
    report: &crossbeam_channel::Sender<Done>,
) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some((index, item)) = next else {
            client.release();
            return;
        };
        let object = match item {
            Item::Object(object) => *object,
            Item::Path(path) => match read_part10(&path, MAX_FILE_BYTES) {
                Ok(object) => object,
                Err(e) => {
                    let _ = report.send(Done { index, bytes: 0, status: SendStatus::Unreadable(e.to_string()) });
                    continue;
                }
            },
        };
        if let Some(rate) = options.slices_per_s {
            let due = paced_from + Duration::from_secs_f64(index as f64 / rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        match client.store(&object) {
            Ok(status) => {
                let bytes = if status == SendStatus::NotAccepted { 0 } else { object.dataset().len() as u64 };
                let _ = report.send(Done { index, bytes, status });
            }
            Err(_) => {
                let _ = report.send(Done { index, bytes: 0, status: SendStatus::NotSent });
                client.abort();
                return;
            }
        }
    }
}
