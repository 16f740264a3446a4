//! The association server and client against real peers (DCMTK, pynetdicom) and against hostile ones.

mod dicom_support;

use darnet::dicom::header::parse_header;
use darnet::dicom::part10::{Part10, parse_part10, read_part10, write_part10};
use darnet::dicom::scp::{
    AssociationHandler, AssociationInfo, HandlerFactory, ScpConfig, ScpEvent, ScpServer, StoreRequest, StoreStatus,
};
use darnet::dicom::scu::{SendOptions, SendStatus, echo, send, send_objects};
use dicom_support::{Builder, CT, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE};
use dicom_ul::pdu::{
    AbortRQSource, AssociationRQ, PDataValue, PDataValueType, Pdu, PresentationContextProposed, UserVariableItem,
    read_pdu, write_pdu,
};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a test's server saw.
#[derive(Default)]
struct Seen {
    /// Objects given to a handler; `objects` has those it is done with.
    begun: usize,
    objects: Vec<(u64, String, String, Vec<u8>)>,
    closed: Vec<bool>,
    events: Vec<ScpEvent>,
}

#[derive(Clone, Default)]
struct Recorder {
    seen: Arc<Mutex<Seen>>,
    /// How long each store takes.
    delay: Duration,
    /// How long the handler takes to hear of the end.
    closing: Duration,
    panics: bool,
}

impl Recorder {
    fn seen<R>(&self, look: impl FnOnce(&Seen) -> R) -> R {
        look(&self.seen.lock().unwrap())
    }

    /// Waits until the condition holds; the server works on other threads.
    fn wait(&self, what: &str, condition: impl Fn(&Seen) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.seen(&condition) {
            assert!(Instant::now() < until, "waited 60 s for: {what}; events {:?}", self.seen(|s| s.events.clone()));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn protocol_errors(&self) -> Vec<&'static str> {
        self.seen(|s| {
            let kind = |e: &ScpEvent| if let ScpEvent::ProtocolError { kind } = e { Some(*kind) } else { None };
            s.events.iter().filter_map(kind).collect()
        })
    }
}

struct RecordingHandler {
    recorder: Recorder,
    id: u64,
}

impl AssociationHandler for RecordingHandler {
    fn store(&mut self, request: &StoreRequest<'_>, dataset: Vec<u8>) -> (StoreStatus, Vec<u8>) {
        assert!(!self.recorder.panics, "the handler fails on purpose");
        self.recorder.seen.lock().unwrap().begun += 1;
        std::thread::sleep(self.recorder.delay);
        assert!(request.last_pdata_at >= request.first_pdata_at);
        let mut seen = self.recorder.seen.lock().unwrap();
        let (instance, transfer) = (request.sop_instance_uid.to_owned(), request.transfer_syntax_uid.to_owned());
        seen.objects.push((self.id, instance, transfer, dataset.clone()));
        (StoreStatus::Success, dataset)
    }
    fn closed(&mut self, released: bool) {
        std::thread::sleep(self.recorder.closing);
        self.recorder.seen.lock().unwrap().closed.push(released);
    }
}

impl HandlerFactory for Recorder {
    fn open(&self, association: &AssociationInfo) -> Box<dyn AssociationHandler> {
        Box::new(RecordingHandler { recorder: self.clone(), id: association.id })
    }
    fn event(&self, event: ScpEvent) {
        self.seen.lock().unwrap().events.push(event);
    }
}

fn config() -> ScpConfig {
    ScpConfig { bind: "127.0.0.1:0".into(), ..ScpConfig::default() }
}

fn serve(config: &ScpConfig, recorder: &Recorder) -> ScpServer {
    ScpServer::bind(config, Arc::new(recorder.clone())).unwrap()
}

fn options(to: SocketAddr) -> SendOptions {
    SendOptions { to: to.to_string(), ..SendOptions::default() }
}

fn slice(n: usize, ts: &str) -> Vec<u8> {
    let mut b = Builder::ct(64, 64);
    b.text(0x0008_0018, b"UI", &format!("1.2.3.4.{n}"));
    b.text(0x0020_0032, b"DS", &format!("0\\0\\{n}"));
    b.encode(ts)
}

fn object(n: usize, ts: &str) -> Part10 {
    parse_part10(slice(n, ts)).unwrap()
}

/// `count` slices as Part 10 files.
fn files(dir: &Path, count: usize, ts: &str) -> Vec<PathBuf> {
    (0..count)
        .map(|n| {
            let path = dir.join(format!("{n:03}.dcm"));
            let mut file = std::fs::File::create(&path).unwrap();
            write_part10(&mut file, ts, CT, &format!("1.2.3.4.{n}"), &slice(n, ts)).unwrap();
            path
        })
        .collect()
}

/// Runs a peer's program to its end.
fn peer(program: &str, install: &str, arguments: &[String]) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .env("TCP_NODELAY", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed and did not start ({e}): {install}"));
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

const DCMTK: &str = "apt-get install dcmtk";

fn args(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn dcmtk_echoscu_is_answered() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let port = server.local_addr().port().to_string();
    let (ok, text) = peer("echoscu", DCMTK, &args(&["-v", "-aec", "DARNET", "127.0.0.1", &port]));
    assert!(ok, "{text}");
    recorder.wait("release", |s| s.closed == [true]);
    assert!(recorder.seen(|s| s.events.contains(&ScpEvent::Echo)));
}

#[test]
fn dcmtk_storescu_and_dcmsend_deliver_a_series_byte_for_byte() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let port = server.local_addr().port().to_string();
    for (program, ts) in [("storescu", IMPLICIT_LE), ("storescu", EXPLICIT_LE), ("dcmsend", EXPLICIT_LE)] {
        recorder.seen.lock().unwrap().objects.clear();
        let dir = tempfile::tempdir().unwrap();
        files(dir.path(), 20, ts);
        let folder = dir.path().to_string_lossy().into_owned();
        let mut arguments = args(&["-aec", "DARNET", "127.0.0.1", &port]);
        arguments.extend(args(&["+sd", &folder]));
        if program == "storescu" && ts == IMPLICIT_LE {
            arguments.push("-xi".into());
        }
        let (ok, text) = peer(program, DCMTK, &arguments);
        assert!(ok, "{program}: {text}");
        recorder.seen(|s| {
            assert_eq!(s.objects.len(), 20, "{program}");
            for (_, instance, transfer, dataset) in &s.objects {
                let header = parse_header(dataset, transfer).unwrap();
                assert_eq!(&header.sop_instance_uid, instance);
                let n: usize = instance.rsplit('.').next().unwrap().parse().unwrap();
                let tail = 64 * 64 * 2;
                let sent = slice(n, ts);
                assert!(dataset[dataset.len() - tail..] == sent[sent.len() - tail..], "{program}: pixels of {n}");
            }
        });
    }
}

/// The interpreter with pynetdicom: `DARNET_TEST_PYTHON`, or the project's own environment.
fn python() -> String {
    std::env::var("DARNET_TEST_PYTHON")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python").into())
}

const PYNETDICOM: &str = "python3 -m venv .venv && \
    .venv/bin/pip install pynetdicom (or set DARNET_TEST_PYTHON to an interpreter that has it)";

#[test]
fn pynetdicom_delivers_over_four_associations_at_once() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let dir = tempfile::tempdir().unwrap();
    files(dir.path(), 24, IMPLICIT_LE);
    let script = r#"
import sys, glob, threading
from pydicom import dcmread
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage, Verification
from pydicom.uid import ImplicitVRLittleEndian
port, folder = int(sys.argv[1]), sys.argv[2]
files = sorted(glob.glob(folder + "/*.dcm"))
failed = []
def work(mine):
    ae = AE(ae_title="PY")
    ae.add_requested_context(CTImageStorage, ImplicitVRLittleEndian)
    ae.add_requested_context(Verification)
    a = ae.associate("127.0.0.1", port, ae_title="DARNET")
    if not a.is_established:
        failed.append("not established"); return
    if a.send_c_echo().Status != 0: failed.append("echo")
    for f in mine:
        s = a.send_c_store(dcmread(f))
        if s.get("Status", -1) != 0: failed.append(f)
    a.release()
threads = [threading.Thread(target=work, args=(files[i::4],)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(failed); sys.exit(bool(failed))
"#;
    let port = server.local_addr().port().to_string();
    let folder = dir.path().to_string_lossy().into_owned();
    let (ok, text) = peer(&python(), PYNETDICOM, &args(&["-c", script, &port, &folder]));
    assert!(ok, "{text}\nif pynetdicom is missing: {PYNETDICOM}");
    recorder.wait("releases", |s| s.closed.len() == 4);
    recorder.seen(|s| {
        assert_eq!(s.objects.len(), 24);
        assert!(s.closed.iter().all(|r| *r));
        let mut ids: Vec<u64> = s.objects.iter().map(|o| o.0).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 4);
    });
}

/// DCMTK's storage server, stopped when dropped.
struct StoreScp(std::process::Child, u16, tempfile::TempDir);

impl StoreScp {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            // A free port: it is given back and taken again. Somebody else may be faster, then it ends at once.
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut child = Command::new("storescp")
                .args(["-aet", "PEER", "+xa", "-od"])
                .arg(dir.path())
                .arg(port.to_string())
                .env("TCP_NODELAY", "1")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|e| panic!("storescp is needed and did not start ({e}): {DCMTK}"));
            while child.try_wait().unwrap().is_none() {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() && child.try_wait().unwrap().is_none() {
                    return Self(child, port, dir);
                }
                assert!(Instant::now() < until, "storescp does not listen");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for StoreScp {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn our_client_echoes_and_stores_to_dcmtk() {
    let peer = StoreScp::start();
    let options =
        SendOptions { to: format!("127.0.0.1:{}", peer.1), called_ae_title: "PEER".into(), ..SendOptions::default() };
    assert!(echo(&options).unwrap() < Duration::from_secs(5));
    let dir = tempfile::tempdir().unwrap();
    let mut list = files(dir.path(), 6, EXPLICIT_LE);
    let text = dir.path().join("notes.txt");
    std::fs::write(&text, "no DICOM").unwrap();
    list.insert(2, text);
    list.push(dir.path().join("missing.dcm"));
    let mut calls = Vec::new();
    let report = send(&list, &options, &mut |p| calls.push((p.done, p.total))).unwrap();
    assert_eq!(report.stored, 6, "{:?}", report.statuses);
    assert!(matches!(report.statuses[2], SendStatus::Unreadable(_)));
    assert!(matches!(report.statuses[7], SendStatus::Unreadable(_)));
    assert_eq!(calls, (1..=8).map(|n| (n, Some(8))).collect::<Vec<_>>());
    let received: Vec<_> = std::fs::read_dir(peer.2.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(received.len(), 6);
    for file in received {
        let part = read_part10(&file, 1 << 20).unwrap();
        let n: usize = part.sop_instance_uid.rsplit('.').next().unwrap().parse().unwrap();
        assert_eq!(part.dataset(), slice(n, EXPLICIT_LE));
    }
}

#[test]
fn our_client_sends_over_several_associations_at_a_rate() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let options = SendOptions { associations: 4, slices_per_s: Some(100.0), ..options(server.local_addr()) };
    let mut objects = (0..40).map(|n| object(n, if n % 2 == 0 { EXPLICIT_LE } else { EXPLICIT_BE }));
    let contexts = [(CT, EXPLICIT_LE), (CT, EXPLICIT_BE)];
    let report = send_objects(&mut objects, &contexts, &options, &mut |_| {}).unwrap();
    assert_eq!(report.stored, 40, "{:?}", report.statuses);
    assert!(report.elapsed >= Duration::from_millis(390), "{:?}", report.elapsed);
    recorder.wait("releases", |s| s.closed.len() == 4 && s.closed.iter().all(|r| *r));
    recorder.seen(|s| {
        for (_, instance, transfer, dataset) in &s.objects {
            let n: usize = instance.rsplit('.').next().unwrap().parse().unwrap();
            assert_eq!(dataset, &slice(n, transfer), "byte for byte");
        }
    });
    // No peer, wrong title, nothing to send: errors, not empty reports.
    server.shutdown(Duration::from_secs(1));
    assert!(send_objects(&mut std::iter::once(object(0, EXPLICIT_LE)), &contexts, &options, &mut |_| {}).is_err());
}

#[test]
fn an_object_whose_syntax_the_peer_refuses_is_reported_as_not_accepted() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let extended = "1.2.840.10008.1.2.4.51";
    let mut part = object(1, EXPLICIT_LE);
    part.transfer_syntax_uid = extended.into();
    let mut objects = vec![part, object(2, EXPLICIT_LE)].into_iter();
    let contexts = [(CT, extended), (CT, EXPLICIT_LE)];
    let report = send_objects(&mut objects, &contexts, &options(server.local_addr()), &mut |_| {}).unwrap();
    assert_eq!(report.statuses, [SendStatus::NotAccepted, SendStatus::Stored]);
}

// ---- hostile and broken peers, by hand ----

struct Raw {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Raw {
    fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, received: Vec::new() }
    }

    fn pdu(&mut self, pdu: &Pdu) {
        let mut bytes = Vec::new();
        write_pdu(&mut bytes, pdu).unwrap();
        self.bytes(&bytes);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        // The server may have closed already; what it answered is what counts.
        let _ = self.stream.write_all(bytes);
    }

    /// The next PDU, or `None` when the server closed.
    fn read(&mut self) -> Option<Pdu> {
        loop {
            if let Some(pdu) = read_pdu(&self.received[..], 1 << 20, false).unwrap() {
                let length = u32::from_be_bytes(self.received[2..6].try_into().unwrap()) as usize;
                self.received.drain(..6 + length);
                return Some(pdu);
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("the server neither answered nor closed: {e}"),
                Ok(n) => self.received.extend_from_slice(&buffer[..n]),
            }
        }
    }

    fn request(calling: &str, called: &str) -> AssociationRQ {
        let context = |id, class: &str| PresentationContextProposed {
            id,
            abstract_syntax: class.into(),
            transfer_syntaxes: vec![EXPLICIT_LE.into()],
        };
        AssociationRQ {
            protocol_version: 1,
            calling_ae_title: calling.into(),
            called_ae_title: called.into(),
            application_context_name: "1.2.840.10008.3.1.1.1".into(),
            presentation_contexts: vec![
                context(1, CT),
                context(3, "1.2.840.10008.1.1"),
                context(5, "1.2.840.10008.1.20.1"),
                context(7, "1.2.840.10008.5.1.4.1.1.88.67"),
            ],
            user_variables: vec![UserVariableItem::MaxLength(16_384)],
        }
    }

    fn associate(to: SocketAddr) -> Self {
        let mut raw = Self::connect(to);
        raw.pdu(&Pdu::AssociationRQ(Self::request("RAW", "DARNET")));
        let Some(Pdu::AssociationAC(accepted)) = raw.read() else { panic!("not accepted") };
        let reasons: Vec<u8> = accepted.presentation_contexts.iter().map(|c| c.reason.clone() as u8).collect();
        assert_eq!(reasons, [0, 0, 3, 0], "storage commitment is refused, the rest is taken");
        raw
    }

    fn pdata(&mut self, context: u8, value_type: PDataValueType, is_last: bool, data: &[u8]) {
        let value = PDataValue { presentation_context_id: context, value_type, is_last, data: data.to_vec() };
        self.pdu(&Pdu::PData { data: vec![value] });
    }

    fn command(&mut self, context: u8, field: u16, id: u16, data: bool, instance: &str) {
        let bytes = command(field, id, data, instance);
        self.pdata(context, PDataValueType::Command, true, &bytes);
    }

    /// Status of the next response.
    fn status(&mut self) -> u16 {
        let Some(Pdu::PData { data }) = self.read() else { panic!("no response") };
        let bytes = &data[0].data;
        let at = bytes.windows(8).position(|w| w == [0, 0, 0, 9, 2, 0, 0, 0]).expect("a status") + 8;
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    fn expect_abort(&mut self) {
        match self.read() {
            Some(Pdu::AbortRQ { source: AbortRQSource::ServiceProvider(_) }) => {}
            other => panic!("expected A-ABORT from the provider, got {other:?}"),
        }
        assert!(self.read().is_none(), "closed behind the abort");
    }
}

fn command(field: u16, id: u16, data: bool, instance: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |element: u16, value: &[u8]| {
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&element.to_le_bytes());
        bytes.extend_from_slice(&((value.len() + value.len() % 2) as u32).to_le_bytes());
        bytes.extend_from_slice(value);
        if value.len() % 2 == 1 {
            bytes.push(0);
        }
    };
    put(0x0002, if field == 0x30 { b"1.2.840.10008.1.1" } else { CT.as_bytes() });
    put(0x0100, &field.to_le_bytes());
    put(0x0110, &id.to_le_bytes());
    put(0x0800, &u16::to_le_bytes(if data { 0 } else { 0x0101 }));
    if !instance.is_empty() {
        put(0x1000, instance.as_bytes());
    }
    bytes
}

#[test]
fn a_pdu_that_claims_4_gb_before_and_within_an_association_is_refused_at_once() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    for first in [1u8, 4, 7, 0x99] {
        let mut raw = Raw::connect(server.local_addr());
        raw.bytes(&[first, 0, 0xff, 0xff, 0xff, 0xff, 0, 1]);
        while raw.read().is_some() {}
    }
    let mut raw = Raw::associate(server.local_addr());
    raw.bytes(&[4, 0, 0xff, 0xff, 0xff, 0xff]);
    raw.expect_abort();
    let faults = |s: &Seen| s.events.iter().filter(|e| matches!(e, ScpEvent::ProtocolError { .. })).count();
    recorder.wait("the faults", |s| faults(s) == 4);
    let errors = recorder.protocol_errors();
    for kind in ["association_request_too_large", "pdu_before_association", "not_dicom", "pdu_too_large"] {
        assert!(errors.contains(&kind), "{errors:?}");
    }
    // It still serves.
    assert!(echo(&options(server.local_addr())).is_ok());
}

#[test]
fn protocol_errors_end_in_an_abort_and_an_event() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let to = server.local_addr();
    type Attack = fn(&mut Raw);
    let table: &[(&str, Attack)] = &[
        ("pdu_too_large", |r| r.bytes(&[4, 0, 0, 2, 0, 1])),
        ("unrecognized_pdu", |r| r.bytes(&[0x47, 0, 0, 0, 0, 0])),
        ("unexpected_pdu", |r| r.pdu(&Pdu::AssociationRQ(Raw::request("RAW", "DARNET")))),
        ("unexpected_pdu", |r| r.pdu(&Pdu::ReleaseRP)),
        ("pdv_malformed", |r| r.bytes(&[4, 0, 0, 0, 0, 0])),
        ("pdv_malformed", |r| r.bytes(&[4, 0, 0, 0, 0, 6, 0xff, 0xff, 0xff, 0xff, 1, 3])),
        ("pdv_malformed", |r| r.bytes(&[4, 0, 0, 0, 0, 6, 0, 0, 0, 1, 1, 3])),
        ("data_without_command", |r| r.pdata(1, PDataValueType::Data, true, &[0; 10])),
        ("command_malformed", |r| r.pdata(1, PDataValueType::Command, true, b"garbage garbage")),
        ("command_too_large", |r| r.pdata(1, PDataValueType::Command, false, &[0; 20_000])),
        ("unknown_presentation_context", |r| r.command(99, 0x30, 1, false, "")),
        ("unknown_presentation_context", |r| r.command(5, 1, 1, true, "1.2")),
        ("response_without_request", |r| r.command(1, 0x8001, 1, false, "")),
        ("data_of_another_message", |r| {
            r.command(1, 1, 1, true, "1.2");
            r.pdata(3, PDataValueType::Data, true, &[0; 10]);
        }),
        ("data_of_another_message", |r| {
            r.command(1, 1, 1, true, "1.2");
            r.command(1, 1, 2, true, "1.2");
        }),
        ("no_message_id", |r| {
            let mut bytes = command(1, 1, false, "1.2");
            let at = bytes.windows(4).position(|w| w == [0, 0, 0x10, 1]).unwrap();
            bytes[at + 3] = 2;
            r.pdata(1, PDataValueType::Command, true, &bytes);
        }),
    ];
    for (kind, attack) in table {
        recorder.seen.lock().unwrap().events.clear();
        let mut raw = Raw::associate(to);
        attack(&mut raw);
        raw.expect_abort();
        recorder.wait(kind, |s| s.events.contains(&ScpEvent::ProtocolError { kind }));
    }
    recorder.wait("every handler closed", |s| s.closed.len() == table.len() && s.closed.iter().all(|r| !*r));
    assert!(recorder.seen(|s| s.objects.is_empty()));
    assert!(echo(&options(to)).is_ok());
}

#[test]
fn refusals_carry_the_standards_reasons() {
    let recorder = Recorder::default();
    let config = ScpConfig { calling_ae_titles: vec!["RAW".into()], max_associations: 1, ..config() };
    let server = serve(&config, &recorder);
    let to = server.local_addr();
    let rejected = |request: AssociationRQ| {
        let mut raw = Raw::connect(to);
        let mut bytes = Vec::new();
        write_pdu(&mut bytes, &Pdu::AssociationRQ(request)).unwrap();
        raw.bytes(&bytes);
        let mut answer = [0; 10];
        raw.stream.read_exact(&mut answer).unwrap();
        (answer[0], answer[7], answer[8], answer[9])
    };
    assert_eq!(rejected(Raw::request("OTHER", "DARNET")), (3, 1, 1, 3), "calling AE title");
    assert_eq!(rejected(Raw::request("RAW", "OTHER")), (3, 1, 1, 7), "called AE title");
    let mut request = Raw::request("RAW", "DARNET");
    request.application_context_name = "1.2.3".into();
    assert_eq!(rejected(request), (3, 1, 1, 2), "application context");
    let mut request = Raw::request("RAW", "DARNET");
    request.protocol_version = 2;
    assert_eq!(rejected(request), (3, 1, 2, 2), "protocol version");
    let held = Raw::associate(to);
    assert_eq!(server.active(), 1);
    assert_eq!(rejected(Raw::request("RAW", "DARNET")), (3, 2, 3, 2), "local limit");
    drop(held);
    recorder.wait("the first to end", |s| s.closed.len() == 1);
    Raw::associate(to);
}

#[test]
fn a_peer_that_has_its_release_answered_finds_its_place_free() {
    // The handler is slow to hear of the end; the place must not wait for it.
    let recorder = Recorder { closing: Duration::from_millis(200), ..Recorder::default() };
    let server = serve(&ScpConfig { max_associations: 1, ..config() }, &recorder);
    for _ in 0..5 {
        let mut raw = Raw::associate(server.local_addr());
        raw.pdu(&Pdu::ReleaseRQ);
        assert_eq!(raw.read(), Some(Pdu::ReleaseRP));
    }
    recorder.wait("the last to end", |s| s.closed == [true; 5]);
}

#[test]
fn operations_other_than_store_and_echo_get_0211_and_the_association_goes_on() {
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let mut raw = Raw::associate(server.local_addr());
    raw.command(1, 0x0020, 1, true, "");
    raw.pdata(1, PDataValueType::Data, true, &[0; 100]);
    assert_eq!(raw.status(), 0x0211);
    raw.command(1, 0x0130, 2, false, "");
    assert_eq!(raw.status(), 0x0211);
    raw.command(1, 0x0fff, 2, false, "");
    raw.command(3, 0x0030, 3, false, "");
    assert_eq!(raw.status(), 0, "a cancel has no answer, the echo behind it has");
    raw.command(1, 1, 4, true, "1.2.3.4");
    let dataset = slice(4, EXPLICIT_LE);
    // A data set in fragments of one byte, then the rest.
    for byte in &dataset[..50] {
        raw.pdata(1, PDataValueType::Data, false, &[*byte]);
    }
    raw.pdata(1, PDataValueType::Data, true, &dataset[50..]);
    assert_eq!(raw.status(), 0);
    raw.command(1, 1, 5, false, "1.2.3.4");
    assert_eq!(raw.status(), 0xc000, "a store without a data set");
    raw.command(1, 1, 6, true, "");
    raw.pdata(1, PDataValueType::Data, true, &dataset);
    assert_eq!(raw.status(), 0xc000, "a store without an instance");
    raw.command(7, 1, 7, true, "1.2.3.4");
    raw.pdata(7, PDataValueType::Data, true, &dataset);
    assert_eq!(raw.status(), 0xa900, "a SOP class that is not the context's");
    raw.command(3, 1, 8, true, "1.2.3.4");
    raw.pdata(3, PDataValueType::Data, true, &dataset);
    assert_eq!(raw.status(), 0x0122, "a store on the verification context");
    raw.pdu(&Pdu::ReleaseRQ);
    assert_eq!(raw.read(), Some(Pdu::ReleaseRP));
    recorder.wait("release", |s| s.closed == [true]);
    recorder.seen(|s| {
        assert_eq!(s.objects.len(), 1);
        assert_eq!(s.objects[0].3, dataset);
    });
}

#[test]
fn an_object_over_the_bound_is_drained_and_refused_and_an_endless_one_aborted() {
    let recorder = Recorder::default();
    let server = serve(&ScpConfig { max_object_bytes: 1 << 20, ..config() }, &recorder);
    let mut raw = Raw::associate(server.local_addr());
    raw.command(1, 1, 1, true, "1.2.3");
    for n in 0..20 {
        raw.pdata(1, PDataValueType::Data, n == 19, &vec![0; 100_000]);
    }
    assert_eq!(raw.status(), 0xa700);
    raw.command(1, 1, 2, true, "1.2.3.4");
    raw.pdata(1, PDataValueType::Data, true, &slice(0, EXPLICIT_LE));
    assert_eq!(raw.status(), 0, "the association goes on");
    raw.command(1, 1, 3, true, "1.2.3.5");
    for _ in 0..60 {
        raw.pdata(1, PDataValueType::Data, false, &vec![0; 100_000]);
    }
    recorder.wait("abort", |s| s.events.contains(&ScpEvent::ProtocolError { kind: "object_endless" }));
    assert_eq!(recorder.seen(|s| s.objects.len()), 1);
}

#[test]
fn a_peer_that_vanishes_or_stalls_stores_nothing_and_frees_its_place() {
    let recorder = Recorder::default();
    let server = serve(&ScpConfig { association_idle_timeout_ms: 1000, ..config() }, &recorder);
    let mut raw = Raw::associate(server.local_addr());
    raw.command(1, 1, 1, true, "1.2.3");
    raw.pdata(1, PDataValueType::Data, false, &[0; 1000]);
    drop(raw);
    recorder.wait("the loss", |s| s.closed == [false]);
    let mut raw = Raw::associate(server.local_addr());
    raw.command(1, 1, 1, true, "1.2.3");
    raw.pdata(1, PDataValueType::Data, false, &[0; 1000]);
    raw.expect_abort();
    recorder.wait("the time-out", |s| s.events.contains(&ScpEvent::ProtocolError { kind: "idle_timeout" }));
    let mut raw = Raw::associate(server.local_addr());
    raw.pdu(&Pdu::AbortRQ { source: AbortRQSource::ServiceUser });
    recorder.wait("the abort", |s| s.closed == [false, false, false]);
    assert!(recorder.seen(|s| s.objects.is_empty()));
    let until = Instant::now() + Duration::from_secs(60);
    while server.active() > 0 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_handler_that_panics_ends_its_association_and_no_other() {
    let recorder = Recorder { panics: true, ..Recorder::default() };
    let server = serve(&config(), &recorder);
    let mut other = Raw::associate(server.local_addr());
    let mut raw = Raw::associate(server.local_addr());
    raw.command(1, 1, 1, true, "1.2.3");
    raw.pdata(1, PDataValueType::Data, true, &slice(0, EXPLICIT_LE));
    assert_eq!(raw.status(), 0x0110);
    raw.expect_abort();
    recorder.wait("close", |s| s.closed == [false]);
    other.command(3, 0x30, 1, false, "");
    assert_eq!(other.status(), 0);
}

#[test]
fn shutdown_answers_the_object_under_way_and_then_ends_every_association() {
    let recorder = Recorder { delay: Duration::from_millis(300), ..Recorder::default() };
    let server = serve(&config(), &recorder);
    let to = server.local_addr();
    let mut idle = Raw::associate(to);
    let mut raw = Raw::associate(to);
    raw.command(1, 1, 1, true, "1.2.3.4.0");
    raw.pdata(1, PDataValueType::Data, true, &slice(0, EXPLICIT_LE));
    recorder.wait("the object to reach its handler", |s| s.begun == 1);
    let start = Instant::now();
    server.shutdown(Duration::from_secs(30));
    assert!(start.elapsed() < Duration::from_secs(20), "it does not wait for the bound");
    assert_eq!(raw.status(), 0, "acknowledged before the end");
    assert!(matches!(raw.read(), Some(Pdu::AbortRQ { .. }) | None));
    assert!(matches!(idle.read(), Some(Pdu::AbortRQ { .. }) | None));
    recorder.seen(|s| {
        assert_eq!(s.objects.len(), 1);
        assert_eq!(s.closed.len(), 2);
    });
    assert!(TcpStream::connect(to).is_err(), "nothing listens");
}

#[test]
fn the_same_buffer_is_used_for_slice_after_slice() {
    struct Buffers(Arc<Mutex<Vec<usize>>>);
    struct One(Arc<Mutex<Vec<usize>>>);
    impl AssociationHandler for One {
        fn store(&mut self, _: &StoreRequest<'_>, dataset: Vec<u8>) -> (StoreStatus, Vec<u8>) {
            self.0.lock().unwrap().push(dataset.as_ptr() as usize);
            (StoreStatus::Success, dataset)
        }
        fn closed(&mut self, _: bool) {}
    }
    impl HandlerFactory for Buffers {
        fn open(&self, _: &AssociationInfo) -> Box<dyn AssociationHandler> {
            Box::new(One(Arc::clone(&self.0)))
        }
        fn event(&self, _: ScpEvent) {}
    }
    let pointers = Arc::new(Mutex::new(Vec::new()));
    let server = ScpServer::bind(&config(), Arc::new(Buffers(Arc::clone(&pointers)))).unwrap();
    let mut objects = (10..30).map(|n| object(n, EXPLICIT_LE));
    send_objects(&mut objects, &[(CT, EXPLICIT_LE)], &options(server.local_addr()), &mut |_| {}).unwrap();
    let pointers = pointers.lock().unwrap();
    assert_eq!(pointers.len(), 20);
    assert!(pointers.iter().all(|p| *p == pointers[0]));
}

#[test]
fn a_real_series_arrives_from_dcmtk_as_it_is_on_disk() {
    let Some(folder) = std::env::var_os("DARNET_TEST_DATA") else {
        eprintln!("not run: DARNET_TEST_DATA names no folder with lidc-idri-0306.tar.xz");
        return;
    };
    let archive = Path::new(&folder).join("lidc-idri-0306.tar.xz");
    assert!(archive.is_file(), "lidc-idri-0306.tar.xz is missing in the folder DARNET_TEST_DATA names");
    let dir = tempfile::tempdir().unwrap();
    assert!(Command::new("tar").arg("xf").arg(&archive).arg("-C").arg(dir.path()).status().unwrap().success());
    let recorder = Recorder::default();
    let server = serve(&config(), &recorder);
    let port = server.local_addr().port().to_string();
    let tree = dir.path().to_string_lossy().into_owned();
    let arguments = args(&["-aec", "DARNET", "127.0.0.1", &port, "+sd", "+r", "+sp", "*.dcm", &tree]);
    let (ok, text) = peer("dcmsend", DCMTK, &arguments);
    assert!(ok, "{text}");
    recorder.wait("release", |s| s.closed == [true]);
    recorder.seen(|s| {
        assert_eq!(s.objects.len(), 123);
        for (_, instance, transfer, dataset) in &s.objects {
            let header = parse_header(dataset, transfer).unwrap();
            assert_eq!(&header.sop_instance_uid, instance);
            assert_eq!(darnet::dicom::header::judge(&header), Ok(()));
        }
    });
}
