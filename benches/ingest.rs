//! CPU time and throughput of the association server against DCMTK's `storescp`, with the same sender, in turn.
//!
//! `cargo bench --bench ingest`. Needs DCMTK (`apt-get install dcmtk`). Both servers are child processes that drop what
//! they receive (`storescp --ignore`, Nagle off); their CPU time is read from `/proc/PID/stat` (10 ms ticks) around the
//! sending. The sender is `dicom::scu` with 512 x 512 slices in explicit VR little endian over one association. Each
//! round checks that every slice was acknowledged.

#[path = "../tests/dicom_support/mod.rs"]
mod dicom_support;

use darnet::dicom::decode::PixelDecoder;
use darnet::dicom::header::parse_header;
use darnet::dicom::part10::{Part10, parse_part10};
use darnet::dicom::scp::{
    AssociationHandler, AssociationInfo, HandlerFactory, ScpConfig, ScpEvent, ScpServer, StoreRequest, StoreStatus,
};
use darnet::dicom::scu::{SendOptions, echo, send_objects};
use dicom_support::{Builder, CT, EXPLICIT_LE};
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SERVE: &str = "DARNET_BENCH_SERVE";

struct Drops;
impl AssociationHandler for Drops {
    fn store(&mut self, _: &StoreRequest<'_>, dataset: Vec<u8>) -> (StoreStatus, Vec<u8>) {
        (StoreStatus::Success, dataset)
    }
    fn closed(&mut self, _: bool) {}
}
impl HandlerFactory for Drops {
    fn open(&self, _: &AssociationInfo) -> Box<dyn AssociationHandler> {
        Box::new(Drops)
    }
    fn event(&self, _: ScpEvent) {}
}

/// The child's side: serve until standard input ends.
fn serve() {
    let config = ScpConfig { bind: "127.0.0.1:0".into(), accept_any_called_ae_title: true, ..ScpConfig::default() };
    let server = ScpServer::bind(&config, Arc::new(Drops)).unwrap();
    println!("{}", server.local_addr().port());
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    server.shutdown(Duration::ZERO);
}

struct Server {
    name: &'static str,
    child: Child,
    port: u16,
}

impl Server {
    fn ours() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(SERVE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { name: "darnet", child, port: line.trim().parse().unwrap() }
    }

    fn dcmtk() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new("storescp")
            .args(["--ignore", "+xa", "--max-pdu", "131072", &port.to_string()])
            .env("TCP_NODELAY", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("storescp is needed and did not start ({e}): apt-get install dcmtk"));
        Self { name: "storescp", child, port }
    }

    fn options(&self) -> SendOptions {
        SendOptions { to: format!("127.0.0.1:{}", self.port), ..SendOptions::default() }
    }

    /// User and system time so far.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn round(server: &Server, slice: &Part10, count: usize) -> (Duration, Duration) {
    let before = server.cpu();
    let start = Instant::now();
    let mut objects = std::iter::repeat_n(slice, count).cloned();
    let report = send_objects(&mut objects, &[(CT, EXPLICIT_LE)], &server.options(), &mut |_| {}).unwrap();
    let wall = start.elapsed();
    assert_eq!(report.stored, count, "{}", server.name);
    (server.cpu() - before, wall)
}

/// Time of the header and of the pixels of one slice, on this thread.
fn stages(slice: &Part10, count: usize) {
    let mut decoder = PixelDecoder::new();
    let mut hu = vec![0; 512 * 512];
    let (mut header_time, mut pixel_time) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..count {
        let start = Instant::now();
        let header = parse_header(black_box(slice.dataset()), EXPLICIT_LE).unwrap();
        header_time += start.elapsed();
        let start = Instant::now();
        decoder.decode_hu(black_box(slice.dataset()), EXPLICIT_LE, &header, &mut hu).unwrap();
        pixel_time += start.elapsed();
    }
    assert_eq!(black_box(&hu)[..3], [-1024, -1021, -1018]);
    let micros = |t: Duration| t.as_secs_f64() * 1e6 / count as f64;
    println!("parse_header {:.1} us, decode_hu {:.0} us a slice", micros(header_time), micros(pixel_time));
}

fn main() {
    if std::env::var_os(SERVE).is_some() {
        return serve();
    }
    // Without --bench (a test run) once through is enough.
    let (rounds, count) = if std::env::args().any(|a| a == "--bench") { (3, 5000) } else { (1, 20) };
    let servers = [Server::ours(), Server::dcmtk()];
    let until = Instant::now() + Duration::from_secs(10);
    while echo(&servers[1].options()).is_err() {
        assert!(Instant::now() < until, "storescp does not answer");
        std::thread::sleep(Duration::from_millis(50));
    }
    let slice = parse_part10(Builder::ct(512, 512).encode(EXPLICIT_LE)).unwrap();
    println!("{count} slices of {} bytes a round, {rounds} rounds, one association", slice.dataset().len());
    let mut cpu = [Duration::ZERO; 2];
    for n in 0..rounds {
        for (which, server) in servers.iter().enumerate() {
            let (used, wall) = round(server, &slice, count);
            cpu[which] += used;
            let rate = count as f64 / wall.as_secs_f64();
            let per_slice = used.as_secs_f64() * 1e6 / count as f64;
            println!("round {n} {:9} {per_slice:7.0} us CPU a slice, {rate:6.0} slices/s", server.name);
        }
    }
    stages(&slice, count);
    println!("CPU of darnet / storescp: {:.2}", cpu[0].as_secs_f64() / cpu[1].as_secs_f64().max(1e-3));
}
