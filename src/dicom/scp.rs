//! The association server: C-ECHO and C-STORE, many associations at once.
//!
//! Input: TCP connections. Output: each received data set, as encoded, handed to an [`AssociationHandler`] whose answer
//! is the C-STORE status; [`ScpEvent`]s for what is counted. One thread an association. The handler gets the data set's
//! buffer by value and gives a buffer back, so that in the steady state a slice allocates nothing here but its two
//! UID strings.
//!
//! Bounds (all from [`ScpConfig`] or constants here): associations, PDU length, association PDU, command set, object
//! bytes, time before the association request (ARTIM), idle time, time to write, time to close. Memory of one
//! association: 256 KiB receive buffer, the object under way (at most `max_object_bytes`, times two for the growth of
//! its buffer), 4 MiB of kept buffer.
//!
//! Errors of a peer end in the fitting reject, abort or DIMSE status (see `docs/conformance.md`), never in a panic; a
//! panic of a handler ends its association. Deliberately absent: TLS (the connection is generic over
//! [`Transport`]), asynchronous operations, user identity, storage commitment.

use crate::dicom::syntax;
use crate::dicom::upper::{
    APPLICATION_CONTEXT, AssociationPduError, Command, CommandWriter, IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME, MAX_COMMAND, NO_DATA_SET, RELEASE_RP_PDU, Transport, Wire, abort_pdu, append_pdata,
    command_field, encode_association_pdu, pdu_type, read_association_pdu,
};
use dicom_ul::pdu::{
    AssociationAC, AssociationRJ, AssociationRJResult, AssociationRJServiceProviderASCEReason,
    AssociationRJServiceProviderPresentationReason, AssociationRJServiceUserReason, AssociationRJSource, AssociationRQ,
    Pdu, PresentationContextResult, PresentationContextResultReason, UserVariableItem,
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time a connection has to send its whole association request (PS3.8 9.1.4, ARTIM).
const ARTIM: Duration = Duration::from_secs(30);
/// Time to write one answer; a peer that does not read one in this time is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time a peer has to close its side after a release, reject or abort.
const LINGER: Duration = Duration::from_secs(1);
/// Connections beyond `max_associations` that may be under negotiation; they are answered with a reject. Any more are
/// closed at once.
const MAX_PENDING: usize = 16;
/// An object over `max_object_bytes` is drained up to this multiple of it, then the association is aborted.
const DRAIN_FACTOR: u64 = 4;
/// A buffer larger than this is not kept for the next object: 4 MiB are a 1448 x 1448 slice, CT has 0.5 MiB.
const MAX_KEPT_BUFFER: usize = 4 << 20;
/// Pause after an accept that failed (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Statuses beside [`StoreStatus`] (PS3.7 annex C).
mod status {
    pub const SUCCESS: u16 = 0;
    pub const PROCESSING_FAILURE: u16 = 0x0110;
    pub const SOP_CLASS_NOT_SUPPORTED: u16 = 0x0122;
    pub const UNRECOGNIZED_OPERATION: u16 = 0x0211;
}

/// The association server's part of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScpConfig {
    /// Address and port to listen on; port 0 picks a free one.
    pub bind: String,
    /// The AE title peers must call.
    pub ae_title: String,
    /// AE titles that may call; empty: any.
    pub calling_ae_titles: Vec<String>,
    /// Answer to any called AE title.
    pub accept_any_called_ae_title: bool,
    /// Largest P-DATA-TF PDU accepted, bytes.
    pub max_pdu_length: u32,
    /// Associations at once.
    pub max_associations: usize,
    /// Largest data set kept, bytes.
    pub max_object_bytes: u64,
    /// An association that sends nothing for this long is aborted.
    pub association_idle_timeout_ms: u64,
    /// Take objects of private SOP classes (they are counted and ignored).
    pub accept_private_sop_classes: bool,
}

impl Default for ScpConfig {
    fn default() -> Self {
        Self {
            bind: "0.0.0.0:11112".into(),
            ae_title: "DARNET".into(),
            calling_ae_titles: Vec::new(),
            accept_any_called_ae_title: false,
            max_pdu_length: 131_072,
            max_associations: 16,
            max_object_bytes: 64 << 20,
            association_idle_timeout_ms: 300_000,
            accept_private_sop_classes: true,
        }
    }
}

impl ScpConfig {
    /// Every fault of the configuration, one fragment each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |ok: bool, fault: &str| {
            if !ok {
                faults.push(fault.to_owned());
            }
        };
        let title = |t: &str| {
            !t.trim().is_empty() && t.len() <= 16 && t.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\\')
        };
        check(title(&self.ae_title), "ae_title must have 1 to 16 printable ASCII characters without backslash");
        check(
            self.calling_ae_titles.iter().all(|t| title(t)),
            "calling_ae_titles must each have 1 to 16 printable ASCII characters without backslash",
        );
        check((4096..=1 << 20).contains(&self.max_pdu_length), "max_pdu_length must be 4096 to 1048576");
        check((1..=256).contains(&self.max_associations), "max_associations must be 1 to 256");
        check(
            ((1 << 20)..=(1 << 31)).contains(&self.max_object_bytes),
            "max_object_bytes must be 1048576 to 2147483648",
        );
        check(
            (1000..=86_400_000).contains(&self.association_idle_timeout_ms),
            "association_idle_timeout_ms must be 1000 to 86400000",
        );
        faults
    }
}

/// Who is at the other end.
#[derive(Clone)]
pub struct AssociationInfo {
    /// Counts up from 1 within this server.
    pub id: u64,
    /// The requestor's AE title.
    pub calling_ae_title: String,
    /// The AE title it called.
    pub called_ae_title: String,
    /// Its address.
    pub peer: SocketAddr,
}

impl std::fmt::Debug for AssociationInfo {
    /// AE titles come from outside and are left out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AssociationInfo").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One C-STORE request, complete.
pub struct StoreRequest<'a> {
    /// AffectedSOPClassUID.
    pub sop_class_uid: &'a str,
    /// AffectedSOPInstanceUID.
    pub sop_instance_uid: &'a str,
    /// The presentation context's transfer syntax.
    pub transfer_syntax_uid: &'a str,
    /// When the read returned that brought the last byte of the data set.
    pub last_pdata_at: Instant,
    /// When the read returned that brought the first byte of the data set.
    pub first_pdata_at: Instant,
}

/// The answer to a C-STORE (PS3.4 B.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreStatus {
    /// 0x0000.
    Success,
    /// 0xA700.
    OutOfResources,
    /// 0xA900.
    Mismatch,
    /// 0xC000.
    CannotUnderstand,
}

impl StoreStatus {
    /// The status code.
    pub fn code(self) -> u16 {
        match self {
            StoreStatus::Success => status::SUCCESS,
            StoreStatus::OutOfResources => 0xa700,
            StoreStatus::Mismatch => 0xa900,
            StoreStatus::CannotUnderstand => 0xc000,
        }
    }
}

/// What happens to the objects of one association. Runs on the association's thread.
pub trait AssociationHandler: Send {
    /// Takes one data set, as encoded, and answers. The returned buffer is used for the next object.
    fn store(&mut self, request: &StoreRequest<'_>, dataset: Vec<u8>) -> (StoreStatus, Vec<u8>);
    /// The association has ended: released by the peer, or else aborted or lost. Called exactly once, last.
    fn closed(&mut self, released: bool);
}

/// Makes handlers and takes events.
pub trait HandlerFactory: Send + Sync + 'static {
    /// A handler for an accepted association.
    fn open(&self, association: &AssociationInfo) -> Box<dyn AssociationHandler>;
    /// Something to count.
    fn event(&self, event: ScpEvent);
}

/// What the server reports. Text is from a closed set and comes from no peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScpEvent {
    /// An association was accepted.
    AssociationAccepted,
    /// An association was rejected.
    AssociationRejected {
        /// `calling_ae_title`, `called_ae_title`, `local_limit`, `application_context` or `protocol_version`.
        reason: &'static str,
    },
    /// An association was released by its peer.
    AssociationReleased,
    /// An association ended in any other way.
    AssociationAborted,
    /// A peer broke the protocol.
    ProtocolError {
        /// What it did, snake case.
        kind: &'static str,
    },
    /// A C-ECHO was answered.
    Echo,
    /// Bytes of data sets received (also of discarded ones).
    BytesReceived(u64),
    /// An object was refused without asking the handler.
    ObjectRefused {
        /// `too_large`, `no_data_set`, `sop_class` or `no_instance`.
        reason: &'static str,
    },
    /// An operation other than C-STORE and C-ECHO was refused.
    OperationRefused,
    /// A connection was closed at once because too many wait.
    ConnectionDropped,
    /// The handler panicked; its association was aborted.
    HandlerPanicked,
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ScpError {
    /// A value out of range.
    #[error("association server: {0}")]
    Config(String),
    /// The address cannot be listened on.
    #[error("association server cannot listen on {address}: {source}")]
    Bind {
        /// The configured address.
        address: String,
        /// The system's error.
        source: io::Error,
    },
}

struct Live {
    stream: TcpStream,
    /// Set while a message is being received and answered.
    busy: Arc<AtomicBool>,
}

struct Shared {
    config: ScpConfig,
    factory: Arc<dyn HandlerFactory>,
    stopping: AtomicBool,
    /// Accepted associations.
    active: AtomicUsize,
    next_association: AtomicU64,
    /// Open connections, for shut-down; locked when one opens or ends.
    live: Mutex<HashMap<u64, Live>>,
}

impl Shared {
    fn live(&self) -> MutexGuard<'_, HashMap<u64, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A listening association server.
pub struct ScpServer {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    local_addr: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl ScpServer {
    /// Listens and serves until [`shutdown`](Self::shutdown).
    ///
    /// # Errors
    /// The configuration is out of range, or the address cannot be bound.
    pub fn bind(config: &ScpConfig, factory: Arc<dyn HandlerFactory>) -> Result<Self, ScpError> {
        if let Some(fault) = config.faults().into_iter().next() {
            return Err(ScpError::Config(fault));
        }
        let bind_error = |source| ScpError::Bind { address: config.bind.clone(), source };
        let addresses: Vec<SocketAddr> = config.bind.to_socket_addrs().map_err(bind_error)?.collect();
        let listener = TcpListener::bind(&addresses[..]).map_err(bind_error)?;
        let local_addr = listener.local_addr().map_err(bind_error)?;
        let shared = Arc::new(Shared {
            config: config.clone(),
            factory,
            stopping: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            next_association: AtomicU64::new(1),
            live: Mutex::new(HashMap::new()),
        });
        let listener = Arc::new(listener);
        let acceptor = std::thread::Builder::new()
            .name("scp-accept".into())
            .spawn({
                let (shared, listener) = (Arc::clone(&shared), Arc::clone(&listener));
                move || accept_loop(&shared, &listener)
            })
            .map_err(bind_error)?;
        Ok(Self { shared, listener, local_addr, acceptor: Some(acceptor) })
    }

    /// The address it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Associations now accepted.
    pub fn active(&self) -> usize {
        self.shared.active.load(Ordering::Relaxed)
    }

    /// Stops: accepts nothing more, lets each object under way be received and answered, aborts the associations;
    /// after `drain` what is left is cut off.
    pub fn shutdown(mut self, drain: Duration) {
        self.stop(drain);
    }

    fn stop(&mut self, drain: Duration) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the blocked accept.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        let _ = acceptor.join();
        let until = Instant::now() + drain;
        // Every connection's thread watches `stopping` between messages; an idle one is woken by the end of its input.
        loop {
            {
                let live = self.shared.live();
                if live.is_empty() {
                    return;
                }
                for connection in live.values() {
                    if !connection.busy.load(Ordering::SeqCst) {
                        let _ = connection.stream.shutdown(Shutdown::Read);
                    }
                }
            }
            if Instant::now() >= until {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for connection in self.shared.live().values() {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        // The threads end on their own now, as soon as their handlers return.
        let until = Instant::now() + LINGER;
        while !self.shared.live().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ScpServer {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

fn accept_loop(shared: &Arc<Shared>, listener: &TcpListener) {
    let mut next_connection = 0u64;
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => continue,
            Err(_) => {
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let id = next_connection;
        next_connection += 1;
        let busy = Arc::new(AtomicBool::new(false));
        let opened = {
            let mut live = shared.live();
            if live.len() >= shared.config.max_associations + MAX_PENDING {
                None
            } else {
                // Small answers must not wait for an acknowledgement. The receive buffer is left to the kernel's
                // tuning: setting it would fix it at `net.core.rmem_max`, below what the tuning reaches.
                stream.set_nodelay(true).and_then(|()| stream.try_clone()).ok().map(|clone| {
                    live.insert(id, Live { stream: clone, busy: Arc::clone(&busy) });
                    stream
                })
            }
        };
        let Some(stream) = opened else {
            shared.factory.event(ScpEvent::ConnectionDropped);
            continue;
        };
        let spawned = std::thread::Builder::new().name("scp-association".into()).spawn({
            let shared = Arc::clone(shared);
            move || {
                // A fault of one association ends that association.
                let served = catch_unwind(AssertUnwindSafe(|| serve(&shared, stream, peer, &busy)));
                if served.is_err() {
                    shared.factory.event(ScpEvent::HandlerPanicked);
                }
                shared.live().remove(&id);
            }
        });
        if spawned.is_err() {
            shared.live().remove(&id);
            shared.factory.event(ScpEvent::ConnectionDropped);
            std::thread::sleep(ACCEPT_PAUSE);
        }
    }
}

/// How an association ended.
enum End {
    Released,
    /// By the peer, by us, or lost; the abort PDU, if any, was written.
    Aborted,
}

/// A fault to answer with A-ABORT from the service provider.
struct Fault {
    kind: &'static str,
    /// PS3.8 table 9-26, reasons of source 2.
    reason: u8,
}

const NOT_SPECIFIED: u8 = 0;
const UNRECOGNIZED_PDU: u8 = 1;
const UNEXPECTED_PDU: u8 = 2;
const INVALID_PARAMETER: u8 = 6;

fn fault(kind: &'static str, reason: u8) -> Stop {
    Stop::Fault(Fault { kind, reason })
}

/// Why the message loop stopped short.
enum Stop {
    Fault(Fault),
    /// The connection failed or ended.
    Lost(io::Error),
    /// The peer sent A-ABORT.
    PeerAborted,
    /// The peer asked for release.
    Released,
    /// The server is shutting down.
    Stopping,
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Self {
        Stop::Lost(e)
    }
}

/// An accepted presentation context.
struct Context {
    abstract_syntax: String,
    transfer_syntax: String,
}

fn serve<T: Transport>(shared: &Shared, transport: T, peer: SocketAddr, busy: &AtomicBool) {
    let mut wire = Wire::new(transport);
    let _ = wire.transport().set_write_timeout(Some(WRITE_TIMEOUT));
    match negotiate(shared, &mut wire) {
        Ok(Some(accepted)) => {
            let mut association = Association::open(shared, wire, accepted, peer);
            association.run(busy);
        }
        Ok(None) => wire.linger(LINGER),
        Err(stop) => {
            if let Stop::Fault(fault) = stop {
                shared.factory.event(ScpEvent::ProtocolError { kind: fault.kind });
                if wire.write_all(&abort_pdu(2, fault.reason)).is_ok() {
                    wire.linger(LINGER);
                }
            }
        }
    }
}

struct Accepted<'s> {
    contexts: Vec<Option<Context>>,
    calling: String,
    called: String,
    peer_max_pdu: u32,
    /// Given back when the association ends, before the peer is told.
    slot: Option<Slot<'s>>,
}

/// One of `max_associations`.
struct Slot<'s>(&'s AtomicUsize);

impl<'s> Slot<'s> {
    fn take(active: &'s AtomicUsize, max: usize) -> Option<Self> {
        active
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < max).then_some(n + 1))
            .ok()
            .map(|_| Self(active))
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Reads the association request and answers it. `None`: rejected, and the reject was written.
fn negotiate<'s, T: Transport>(shared: &'s Shared, wire: &mut Wire<T>) -> Result<Option<Accepted<'s>>, Stop> {
    let request = read_request(wire)?;
    let config = &shared.config;
    let (slot, rejection) = judge_request(shared, &request);
    let Some(slot) = slot else {
        let (rj, reason) = rejection;
        shared.factory.event(ScpEvent::AssociationRejected { reason });
        wire.write_all(&encode_association_pdu(&Pdu::AssociationRJ(rj))?)?;
        return Ok(None);
    };
    let peer_max_pdu = request
        .user_variables
        .iter()
        .find_map(|v| if let UserVariableItem::MaxLength(n) = v { Some(*n) } else { None })
        .unwrap_or(0);
    let mut contexts: Vec<Option<Context>> = (0..256).map(|_| None).collect();
    let mut results = Vec::with_capacity(request.presentation_contexts.len());
    for proposed in &request.presentation_contexts {
        let slot = &mut contexts[usize::from(proposed.id)];
        let (reason, transfer_syntax) = if proposed.id % 2 == 0 || slot.is_some() {
            (PresentationContextResultReason::NoReason, None)
        } else if !syntax::accepts_abstract_syntax(&proposed.abstract_syntax, config.accept_private_sop_classes) {
            (PresentationContextResultReason::AbstractSyntaxNotSupported, None)
        } else {
            match syntax::choose_transfer_syntax(&proposed.abstract_syntax, &proposed.transfer_syntaxes) {
                Some(chosen) => {
                    *slot = Some(Context {
                        abstract_syntax: proposed.abstract_syntax.clone(),
                        transfer_syntax: chosen.to_owned(),
                    });
                    (PresentationContextResultReason::Acceptance, Some(chosen))
                }
                None => (PresentationContextResultReason::TransferSyntaxesNotSupported, None),
            }
        };
        results.push(PresentationContextResult {
            id: proposed.id,
            reason,
            // Not significant in a refusal, but some peers want to see one.
            transfer_syntax: transfer_syntax.unwrap_or(syntax::IMPLICIT_LE).to_owned(),
        });
    }
    let answer = Pdu::AssociationAC(AssociationAC {
        protocol_version: 1,
        calling_ae_title: request.calling_ae_title.clone(),
        called_ae_title: request.called_ae_title.clone(),
        application_context_name: APPLICATION_CONTEXT.to_owned(),
        presentation_contexts: results,
        user_variables: vec![
            UserVariableItem::MaxLength(config.max_pdu_length),
            UserVariableItem::ImplementationClassUID(IMPLEMENTATION_CLASS_UID.to_owned()),
            UserVariableItem::ImplementationVersionName(IMPLEMENTATION_VERSION_NAME.to_owned()),
        ],
    });
    wire.write_all(&encode_association_pdu(&answer)?)?;
    Ok(Some(Accepted {
        contexts,
        calling: request.calling_ae_title,
        called: request.called_ae_title,
        peer_max_pdu,
        slot: Some(slot),
    }))
}

/// The association request, whole within [`ARTIM`].
fn read_request<T: Transport>(wire: &mut Wire<T>) -> Result<AssociationRQ, Stop> {
    wire.set_deadline(Some(Instant::now() + ARTIM));
    let header: [u8; 6] = wire.array()?;
    match header[0] {
        pdu_type::ASSOCIATE_RQ => {}
        pdu_type::ABORT => return Err(Stop::PeerAborted),
        pdu_type::ASSOCIATE_AC..=pdu_type::RELEASE_RP => {
            return Err(fault("pdu_before_association", UNEXPECTED_PDU));
        }
        _ => return Err(fault("not_dicom", UNRECOGNIZED_PDU)),
    }
    match read_association_pdu(wire, header) {
        Ok(Pdu::AssociationRQ(request)) => Ok(request),
        Ok(_) | Err(AssociationPduError::Malformed) => Err(fault("association_request_malformed", INVALID_PARAMETER)),
        Err(AssociationPduError::TooLarge(_)) => Err(fault("association_request_too_large", INVALID_PARAMETER)),
        Err(AssociationPduError::Io(e)) => Err(Stop::Lost(e)),
    }
}

/// A slot, or the reject (PS3.8 9.3.4) when there is none.
fn judge_request<'s>(shared: &'s Shared, request: &AssociationRQ) -> (Option<Slot<'s>>, (AssociationRJ, &'static str)) {
    let config = &shared.config;
    let reject = |result, source, reason| (AssociationRJ { result, source }, reason);
    let user = |r, reason| reject(AssociationRJResult::Permanent, AssociationRJSource::ServiceUser(r), reason);
    let context_name = request.application_context_name.trim_end_matches(['\0', ' ']);
    if request.protocol_version & 1 == 0 {
        let source = AssociationRJSource::ServiceProviderASCE(
            AssociationRJServiceProviderASCEReason::ProtocolVersionNotSupported,
        );
        return (None, reject(AssociationRJResult::Permanent, source, "protocol_version"));
    }
    if context_name != APPLICATION_CONTEXT {
        let reason = AssociationRJServiceUserReason::ApplicationContextNameNotSupported;
        return (None, user(reason, "application_context"));
    }
    let calling = request.calling_ae_title.trim();
    if !config.calling_ae_titles.is_empty() && !config.calling_ae_titles.iter().any(|t| t.trim() == calling) {
        return (None, user(AssociationRJServiceUserReason::CallingAETitleNotRecognized, "calling_ae_title"));
    }
    if !config.accept_any_called_ae_title && request.called_ae_title.trim() != config.ae_title.trim() {
        return (None, user(AssociationRJServiceUserReason::CalledAETitleNotRecognized, "called_ae_title"));
    }
    let limit = AssociationRJSource::ServiceProviderPresentation(
        AssociationRJServiceProviderPresentationReason::LocalLimitExceeded,
    );
    let slot = Slot::take(&shared.active, config.max_associations);
    (slot, reject(AssociationRJResult::Transient, limit, "local_limit"))
}

/// One accepted association. Closes its handler exactly once, also when unwinding.
struct Association<'s, T> {
    shared: &'s Shared,
    wire: Wire<T>,
    accepted: Accepted<'s>,
    handler: Box<dyn AssociationHandler>,
    /// Whether the handler was told of the end.
    closed: bool,
    end: End,
    /// Command set under way.
    command: Vec<u8>,
    /// The next object's buffer.
    dataset: Vec<u8>,
    answer: Vec<u8>,
}

impl<T> Association<'_, T> {
    /// Tells the handler and frees the place, once. Not left to the drop alone: a peer may be slow to close.
    fn finish(&mut self) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let _slot = self.accepted.slot.take();
        let released = matches!(self.end, End::Released);
        let handler = &mut self.handler;
        if catch_unwind(AssertUnwindSafe(|| handler.closed(released))).is_err() {
            self.shared.factory.event(ScpEvent::HandlerPanicked);
        }
        self.shared.factory.event(if released { ScpEvent::AssociationReleased } else { ScpEvent::AssociationAborted });
    }
}

impl<T> Drop for Association<'_, T> {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The last PDV header.
struct Pdv {
    context: u8,
    command: bool,
    last: bool,
    length: usize,
}

/// Bytes left of the P-DATA-TF PDU under way.
#[derive(Default)]
struct PduRest(usize);

/// An object being received.
struct Incoming {
    received: u64,
    discard: bool,
    first_pdata_at: Option<Instant>,
}

impl<'s, T: Transport> Association<'s, T> {
    fn open(shared: &'s Shared, wire: Wire<T>, accepted: Accepted<'s>, peer: SocketAddr) -> Self {
        let info = AssociationInfo {
            id: shared.next_association.fetch_add(1, Ordering::Relaxed),
            calling_ae_title: accepted.calling.clone(),
            called_ae_title: accepted.called.clone(),
            peer,
        };
        shared.factory.event(ScpEvent::AssociationAccepted);
        let handler = shared.factory.open(&info);
        Self {
            shared,
            wire,
            accepted,
            handler,
            closed: false,
            end: End::Aborted,
            command: Vec::new(),
            dataset: Vec::new(),
            answer: Vec::new(),
        }
    }

    fn run(&mut self, busy: &AtomicBool) {
        let idle = Duration::from_millis(self.shared.config.association_idle_timeout_ms);
        self.wire.set_deadline(None);
        let _ = self.wire.transport().set_read_timeout(Some(idle));
        let stop = loop {
            if let Err(stop) = self.message(busy) {
                break stop;
            }
            busy.store(false, Ordering::SeqCst);
        };
        // Closing is not to be cut short by a shut-down.
        busy.store(true, Ordering::SeqCst);
        let abort = match stop {
            Stop::Released => {
                self.end = End::Released;
                // A peer that has the answer may ask for its next association at once, and must find the place free.
                self.accepted.slot = None;
                let _ = self.wire.write_all(&RELEASE_RP_PDU);
                self.finish();
                self.wire.linger(LINGER);
                return;
            }
            Stop::PeerAborted => return,
            Stop::Stopping => abort_pdu(0, 0),
            Stop::Lost(_) if self.shared.stopping.load(Ordering::SeqCst) => abort_pdu(0, 0),
            Stop::Lost(e) => {
                let kind = match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "idle_timeout",
                    _ => "connection_lost",
                };
                self.shared.factory.event(ScpEvent::ProtocolError { kind });
                abort_pdu(2, NOT_SPECIFIED)
            }
            Stop::Fault(fault) => {
                self.shared.factory.event(ScpEvent::ProtocolError { kind: fault.kind });
                abort_pdu(2, fault.reason)
            }
        };
        let written = self.wire.write_all(&abort).is_ok();
        self.finish();
        if written {
            self.wire.linger(LINGER);
        }
    }

    /// Receives and answers one message.
    fn message(&mut self, busy: &AtomicBool) -> Result<(), Stop> {
        if self.shared.stopping.load(Ordering::SeqCst) {
            return Err(Stop::Stopping);
        }
        let mut rest = PduRest::default();
        self.command.clear();
        let context = loop {
            let pdv = self.next_pdv(&mut rest)?;
            busy.store(true, Ordering::SeqCst);
            if !pdv.command {
                return Err(fault("data_without_command", UNEXPECTED_PDU));
            }
            if self.command.len() + pdv.length > MAX_COMMAND {
                return Err(fault("command_too_large", INVALID_PARAMETER));
            }
            let command = &mut self.command;
            self.wire.pieces(pdv.length, |piece| command.extend_from_slice(piece))?;
            if pdv.last {
                break pdv.context;
            }
        };
        let command = Command::parse(&self.command).ok_or_else(|| fault("command_malformed", INVALID_PARAMETER))?;
        if self.accepted.contexts[usize::from(context)].is_none() {
            return Err(fault("unknown_presentation_context", INVALID_PARAMETER));
        }
        let has_data = command.data_set_type != NO_DATA_SET;
        if rest.0 != 0 && !has_data {
            // What follows in this PDU would belong to the next message.
            return Err(fault("messages_mixed_in_a_pdu", INVALID_PARAMETER));
        }
        if command.field == command_field::C_CANCEL_RQ {
            // Nothing here can be cancelled, and a cancel has no answer (PS3.7 9.3.2.3).
            return Ok(());
        }
        if command.field & 0x8000 != 0 {
            return Err(fault("response_without_request", UNEXPECTED_PDU));
        }
        let Some(message_id) = command.message_id else {
            return Err(fault("no_message_id", INVALID_PARAMETER));
        };
        let is_store = command.field == command_field::C_STORE_RQ;
        let refusal = if !is_store { None } else { self.refuse_store(context, &command, has_data) };
        let mut incoming = Incoming { received: 0, discard: !is_store || refusal.is_some(), first_pdata_at: None };
        self.dataset.clear();
        if has_data {
            self.receive_data(&mut rest, context, &mut incoming)?;
        }
        let code = match command.field {
            command_field::C_STORE_RQ => match refusal {
                Some((code, reason)) => {
                    self.shared.factory.event(ScpEvent::ObjectRefused { reason });
                    code
                }
                None => self.store(context, &command, &incoming),
            },
            command_field::C_ECHO_RQ => {
                self.shared.factory.event(ScpEvent::Echo);
                status::SUCCESS
            }
            _ => {
                self.shared.factory.event(ScpEvent::OperationRefused);
                status::UNRECOGNIZED_OPERATION
            }
        };
        self.respond(context, &command, message_id, code)?;
        if code == status::PROCESSING_FAILURE {
            return Err(fault("handler_failed", NOT_SPECIFIED));
        }
        Ok(())
    }

    /// The next PDV header, over PDU boundaries. Release, abort and everything unexpected is a [`Stop`].
    fn next_pdv(&mut self, rest: &mut PduRest) -> Result<Pdv, Stop> {
        if rest.0 == 0 {
            let header: [u8; 6] = self.wire.array()?;
            match header[0] {
                pdu_type::P_DATA => {}
                pdu_type::RELEASE_RQ => return Err(Stop::Released),
                pdu_type::ABORT => return Err(Stop::PeerAborted),
                pdu_type::ASSOCIATE_RQ..=pdu_type::ASSOCIATE_RJ | pdu_type::RELEASE_RP => {
                    return Err(fault("unexpected_pdu", UNEXPECTED_PDU));
                }
                _ => return Err(fault("unrecognized_pdu", UNRECOGNIZED_PDU)),
            }
            let length = u32::from_be_bytes([header[2], header[3], header[4], header[5]]);
            if length > self.shared.config.max_pdu_length {
                return Err(fault("pdu_too_large", INVALID_PARAMETER));
            }
            rest.0 = length as usize;
        }
        if rest.0 < 6 {
            return Err(fault("pdv_malformed", INVALID_PARAMETER));
        }
        let pdv: [u8; 6] = self.wire.array()?;
        let length = u32::from_be_bytes([pdv[0], pdv[1], pdv[2], pdv[3]]) as usize;
        if length < 2 || length > rest.0 - 4 {
            return Err(fault("pdv_malformed", INVALID_PARAMETER));
        }
        rest.0 -= 4 + length;
        Ok(Pdv { context: pdv[4], command: pdv[5] & 1 != 0, last: pdv[5] & 2 != 0, length: length - 2 })
    }

    /// Receives a data set into the object's buffer, or past it.
    fn receive_data(&mut self, rest: &mut PduRest, context: u8, incoming: &mut Incoming) -> Result<(), Stop> {
        let max = self.shared.config.max_object_bytes;
        let result = loop {
            let pdv = match self.next_pdv(rest) {
                Ok(pdv) => pdv,
                Err(stop) => break Err(stop),
            };
            if pdv.command || pdv.context != context {
                break Err(fault("data_of_another_message", INVALID_PARAMETER));
            }
            incoming.received += pdv.length as u64;
            if incoming.received > max {
                incoming.discard = true;
                // What came so far is of no use to anyone.
                self.dataset = Vec::new();
            }
            if incoming.received > max.saturating_mul(DRAIN_FACTOR) {
                break Err(fault("object_endless", NOT_SPECIFIED));
            }
            if incoming.first_pdata_at.is_none() {
                incoming.first_pdata_at = Some(self.wire.last_read_at());
            }
            let (dataset, discard) = (&mut self.dataset, incoming.discard);
            let read = self.wire.pieces(pdv.length, |piece| {
                if !discard {
                    dataset.extend_from_slice(piece);
                }
            });
            if let Err(e) = read {
                break Err(e.into());
            }
            if pdv.last {
                break Ok(());
            }
        };
        self.shared.factory.event(ScpEvent::BytesReceived(incoming.received));
        if result.is_ok() && rest.0 != 0 {
            return Err(fault("messages_mixed_in_a_pdu", INVALID_PARAMETER));
        }
        result
    }

    /// Why a C-STORE is refused before its data set is looked at.
    fn refuse_store(&self, context: u8, command: &Command, has_data: bool) -> Option<(u16, &'static str)> {
        let abstract_syntax = self.accepted.contexts[usize::from(context)].as_ref().map(|c| c.abstract_syntax.as_str());
        if abstract_syntax == Some(syntax::VERIFICATION) {
            Some((status::SOP_CLASS_NOT_SUPPORTED, "sop_class"))
        } else if abstract_syntax != Some(command.sop_class.as_str()) {
            Some((StoreStatus::Mismatch.code(), "sop_class"))
        } else if command.sop_instance.is_empty() {
            Some((StoreStatus::CannotUnderstand.code(), "no_instance"))
        } else if !has_data {
            Some((StoreStatus::CannotUnderstand.code(), "no_data_set"))
        } else {
            None
        }
    }

    fn store(&mut self, context: u8, command: &Command, incoming: &Incoming) -> u16 {
        if incoming.discard {
            self.shared.factory.event(ScpEvent::ObjectRefused { reason: "too_large" });
            return StoreStatus::OutOfResources.code();
        }
        let Some(context) = &self.accepted.contexts[usize::from(context)] else {
            return StoreStatus::CannotUnderstand.code();
        };
        let last_pdata_at = self.wire.last_read_at();
        let request = StoreRequest {
            sop_class_uid: &command.sop_class,
            sop_instance_uid: &command.sop_instance,
            transfer_syntax_uid: &context.transfer_syntax,
            last_pdata_at,
            first_pdata_at: incoming.first_pdata_at.unwrap_or(last_pdata_at),
        };
        let dataset = std::mem::take(&mut self.dataset);
        let handler = &mut self.handler;
        match catch_unwind(AssertUnwindSafe(|| handler.store(&request, dataset))) {
            Ok((status, buffer)) => {
                if buffer.capacity() <= MAX_KEPT_BUFFER {
                    self.dataset = buffer;
                }
                status.code()
            }
            Err(_) => {
                self.shared.factory.event(ScpEvent::HandlerPanicked);
                status::PROCESSING_FAILURE
            }
        }
    }

    /// Writes the response in one write: a second small one would wait for the peer's delayed acknowledgement.
    fn respond(&mut self, context: u8, command: &Command, message_id: u16, code: u16) -> Result<(), Stop> {
        let mut response = CommandWriter::new();
        if !command.sop_class.is_empty() {
            response = response.text(0x0002, &command.sop_class, 0);
        }
        response = response
            .number(0x0100, command.field | 0x8000)
            .number(0x0120, message_id)
            .number(0x0800, NO_DATA_SET)
            .number(0x0900, code);
        if !command.sop_instance.is_empty() {
            response = response.text(0x1000, &command.sop_instance, 0);
        }
        self.answer.clear();
        append_pdata(&mut self.answer, context, true, &response.finish(), self.accepted.peer_max_pdu);
        self.wire.write_all(&self.answer)?;
        Ok(())
    }
}
