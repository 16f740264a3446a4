//! What the tests of the running program share: a daemon on free ports, real data, peers that must be installed.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The program under test.
pub const DARNET: &str = env!("CARGO_BIN_EXE_darnet");

/// Fails with the install command when a peer is missing.
pub fn require(tool: &str, install: &str) -> PathBuf {
    for folder in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).chain(["/usr/sbin".into()]) {
        let candidate = folder.join(tool);
        if candidate.is_file() {
            return candidate;
        }
    }
    panic!("{tool} is missing: {install}");
}

/// Runs the C++ compiler (`$CXX`, or `c++`); fails with its words.
pub fn cxx<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(&compiler)
        .arg("-std=c++17")
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("a C++ compiler is missing ({error}): apt-get install g++"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Compiles a file of `tests/gpu_host` with the resampling kernels in it, for the processor.
pub fn compile_gpu_host(source: &str, out: &Path, flags: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let host = root.join("tests/gpu_host").display().to_string();
    let kernels = format!("-DKERNELS=\"{}\"", root.join("src/resample/kernels.cu").display());
    let (source, out) = (format!("{host}/{source}"), out.display().to_string());
    let own = ["-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-I", &host, &kernels, &source, "-o", &out];
    cxx(own.iter().chain(flags));
}

/// The Python with pydicom and pynetdicom.
pub fn python() -> PathBuf {
    let python = std::env::var_os("DARNET_TEST_PYTHON")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python"), PathBuf::from);
    assert!(
        python.is_file(),
        "the test Python is missing: python3 -m venv .venv && .venv/bin/python -m pip install -r tests/requirements.txt"
    );
    python
}

/// Unpacks one archive of the real data; `None`, with a line that says so, when `DARNET_TEST_DATA` is unset.
pub fn real_data(archive: &str) -> Option<tempfile::TempDir> {
    let Some(folder) = std::env::var_os("DARNET_TEST_DATA") else {
        println!("NOT RUN on real data: DARNET_TEST_DATA is unset");
        return None;
    };
    let file = Path::new(&folder).join(archive);
    assert!(file.is_file(), "DARNET_TEST_DATA is set but {archive} is missing there");
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new("tar").arg("xf").arg(&file).arg("-C").arg(dir.path()).status().unwrap();
    assert!(status.success(), "unpack {archive}");
    Some(dir)
}

/// Every file below `folder` that passes `keep`, sorted.
pub fn files_below(folder: &Path, keep: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut pending = vec![folder.to_path_buf()];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if keep(&path) {
            out.push(path);
        }
    }
    out.sort();
    out
}

/// The real chest series, or a phantom in its place.
pub struct ChestSeries {
    pub folder: PathBuf,
    pub files: Vec<PathBuf>,
    _keep: tempfile::TempDir,
}

pub fn chest_series() -> ChestSeries {
    if let Some(dir) = real_data("lidc-idri-0306.tar.xz") {
        let files = files_below(dir.path(), |p| p.extension().is_some_and(|e| e == "dcm"));
        assert_eq!(files.len(), 123, "slices of the real series");
        let folder = files[0].parent().unwrap().to_path_buf();
        return ChestSeries { folder, files, _keep: dir };
    }
    phantom_series(1, 60, 128)
}

/// A phantom series of `slices` slices of `size` x `size`.
pub fn phantom_series(seed: u64, slices: usize, size: usize) -> ChestSeries {
    use darnet::phantom::{DicomOptions, PhantomClass, PhantomSpec, generate, write_dicom};
    let dir = tempfile::tempdir().unwrap();
    let spec = PhantomSpec::random(PhantomClass::Covid, seed).with_shape(slices, size, size);
    let files = write_dicom(&generate(&spec), dir.path(), &DicomOptions::default()).unwrap();
    ChestSeries { folder: files[0].parent().unwrap().to_path_buf(), files, _keep: dir }
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    pub dicom: String,
    pub web: String,
    pub config: PathBuf,
    pub data: PathBuf,
    pub stderr: PathBuf,
    child: Child,
    dir: Option<tempfile::TempDir>,
}

impl Daemon {
    /// Starts a daemon on free ports with `extra` appended to its configuration.
    pub fn start(extra: &str) -> Self {
        let (dir, config, data) = Self::configure(extra);
        Self::launch(dir, config, data)
    }

    /// As [`Daemon::start`], through the command that `wrap` makes of the data folder and the configuration. It must
    /// end in `exec`, so that the child is the daemon.
    pub fn start_through(extra: &str, wrap: impl Fn(&Path, &Path) -> Command) -> Self {
        let (dir, config, data) = Self::configure(extra);
        let command = wrap(&data, &config);
        Self::launch_command(command, dir, config, data)
    }

    fn configure(extra: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("darnet.toml");
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let mut text = format!("data_dir = {:?}\n", data.display().to_string());
        // Top-level keys of `extra` come before the first table.
        let (top, tables) = match extra.find("\n[") {
            _ if extra.starts_with('[') => ("", extra),
            Some(at) => extra.split_at(at),
            None => (extra, ""),
        };
        text.push_str(top);
        if !tables.contains("[dicom]") {
            text.push_str("\n[dicom]\nbind = \"127.0.0.1:0\"\n");
        }
        if !tables.contains("[web]") {
            text.push_str("\n[web]\nbind = \"127.0.0.1:0\"\n");
        }
        text.push_str(tables);
        std::fs::write(&config, text).unwrap();
        (dir, config, data)
    }

    fn launch(dir: tempfile::TempDir, config: PathBuf, data: PathBuf) -> Self {
        let mut command = Command::new(DARNET);
        command.args(["serve", "--config"]).arg(&config);
        Self::launch_command(command, dir, config, data)
    }

    fn launch_command(mut command: Command, dir: tempfile::TempDir, config: PathBuf, data: PathBuf) -> Self {
        let stderr = dir.path().join("stderr.log");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&stderr).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Ok(first) = serde_json::from_str::<Value>(&line) else {
            let log = std::fs::read_to_string(&stderr).unwrap_or_default();
            panic!("the daemon did not start: {line}\n{log}");
        };
        Self {
            dicom: first["dicom"].as_str().unwrap().to_owned(),
            web: first["web"].as_str().unwrap().to_owned(),
            config,
            data,
            stderr,
            child,
            dir: Some(dir),
        }
    }

    pub fn dicom_port(&self) -> &str {
        self.dicom.rsplit(':').next().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills with SIGKILL and starts again on the same data.
    pub fn kill_and_restart(mut self) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let (config, data) = (self.config.clone(), self.data.clone());
        let dir = self.dir.take().unwrap();
        drop(self);
        Self::launch(dir, config, data)
    }

    /// Asks with SIGTERM and waits for the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        signal(self.child.id(), "TERM");
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the daemon did not end within 30 s of SIGTERM");
    }

    /// Changes the configuration file and asks with SIGHUP to take it.
    pub fn reload(&self, change: impl FnOnce(String) -> String) {
        let text = std::fs::read_to_string(&self.config).unwrap();
        std::fs::write(&self.config, change(text)).unwrap();
        signal(self.child.id(), "HUP");
    }

    /// What was logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Waits until `holds`, at most `seconds`; says `what` otherwise.
    pub fn wait_until(&self, what: &str, seconds: u64, mut holds: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(seconds);
        while !holds(self) {
            assert!(Instant::now() < until, "not within {seconds} s: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        http(&self.web, "GET", path, "", &[])
    }

    pub fn metric(&self, line_start: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        text.lines()
            .filter(|l| l.starts_with(line_start))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Every outcome in the store, as the documents that were published.
    pub fn results(&self) -> Vec<Value> {
        let (status, body) = self.get("/api/results");
        assert_eq!(status, 200, "{body}");
        let document: Value = serde_json::from_str(&body).unwrap();
        let list = document["results"].as_array().unwrap_or_else(|| panic!("no list of results: {body}"));
        // The report of the series beside what is said of the publication, so that tests read one level.
        list.iter()
            .map(|result| {
                let mut flat = result.as_object().unwrap().clone();
                if let Some(Value::Object(report)) = flat.remove("report") {
                    flat.extend(report);
                }
                Value::Object(flat)
            })
            .collect()
    }

    /// Waits until `count` outcomes are there.
    pub fn wait_results(&self, count: usize, seconds: u64) -> Vec<Value> {
        let until = Instant::now() + Duration::from_secs(seconds);
        loop {
            let results = self.results();
            if results.len() >= count {
                return results;
            }
            if Instant::now() > until {
                let log = std::fs::read_to_string(&self.stderr).unwrap_or_default();
                panic!("expected {count} outcomes within {seconds} s, got {}: {results:?}\n{log}", results.len());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal by the shell's own `kill`: a bare machine has no program of that name.
fn signal(pid: u32, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap();
    assert!(status.success());
}

/// One HTTP exchange.
pub fn http(address: &str, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut head = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n");
    if !body.is_empty() {
        head.push_str(&format!("Content-Type: {kind}\r\nContent-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.split_whitespace().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map(|(_, b)| b.to_owned()).unwrap_or_default();
    (status, body)
}

/// Runs a command to its end and returns its exit code, stdout and stderr.
pub fn run(command: &mut Command) -> (i32, String, String) {
    let out = command.output().unwrap();
    (
        out.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&out.stdout).into_owned(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    )
}

/// Runs `darnet`.
pub fn darnet(args: &[&str]) -> (i32, String, String) {
    run(Command::new(DARNET).args(args))
}
