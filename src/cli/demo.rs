//! `demo` and `acceptance`: the whole program on synthetic patients.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use darnet::config::Config;
use darnet::dicom::scu::{SendOptions, send};
use darnet::phantom::{DicomOptions, PhantomClass, PhantomSpec, generate, write_dicom};
use darnet::pipeline::publish::ResultNotice;
use darnet::pipeline::{Daemon, observer};
use darnet::report::webhook::{WebhookConfig, verify_signature};
use darnet::store::unix_ms;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{AcceptanceArgs, DemoArgs, Ended, modelcmd, print_json, progress_bar};

/// A new folder under the system's temporary one, removed when dropped.
pub struct ScratchDir {
    path: PathBuf,
    keep: bool,
}

impl ScratchDir {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Makes a [`ScratchDir`].
pub fn scratch_dir(what: &str) -> anyhow::Result<ScratchDir> {
    for attempt in 0..100u32 {
        let path = std::env::temp_dir().join(format!("darnet-{what}-{}-{attempt}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => return Ok(ScratchDir { path, keep: false }),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("make {}", path.display())),
        }
    }
    bail!("make a folder under the temporary one: a hundred names are taken")
}

fn local_config(data: &Path) -> Config {
    let mut config = Config { data_dir: data.to_path_buf(), ..Config::default() };
    config.dicom.bind = "127.0.0.1:0".to_owned();
    config.web.bind = "127.0.0.1:0".to_owned();
    config
}

/// `darnet demo`.
pub fn demo(args: &DemoArgs) -> anyhow::Result<Ended> {
    let say = |text: &str| {
        if !args.json {
            println!("{text}");
        }
    };
    if args.rate <= 0.0 || !args.rate.is_finite() {
        bail!("--rate wants a positive number of slices a second, got {}", args.rate);
    }
    let mut scratch = scratch_dir("demo")?;
    scratch.keep = args.out.is_none();
    let out = args.out.clone().unwrap_or_else(|| scratch.path().to_path_buf());
    let (data, files) = (out.join("data"), out.join("series"));
    std::fs::create_dir_all(&data).with_context(|| format!("make {}", data.display()))?;

    let class: PhantomClass = args.class.into();
    let model = modelcmd::load(None)?;
    say(&format!(
        "model     {} (trained on {}, intended use {}): its scores say nothing about patients, the path they take is real",
        model.manifest.id, model.manifest.trained_on, model.manifest.intended_use
    ));
    let started = Instant::now();
    let spec = PhantomSpec::random(class, args.seed).with_shape(args.slices, 512, 512);
    let phantom = generate(&spec);
    let paths = write_dicom(&phantom, &files, &DicomOptions::default())?;
    drop(phantom);
    say(&format!(
        "phantom   {} slices of 512 x 512, {}, made in {:.1} s",
        paths.len(),
        class.as_str(),
        started.elapsed().as_secs_f64()
    ));

    let (tx, notices) = observer();
    let config = local_config(&data);
    let daemon = Daemon::start_with(&config, &model, Some(tx))?;
    say(&format!(
        "daemon    DICOM {} as {}, web http://{}",
        daemon.dicom_addr(),
        config.dicom.ae_title,
        daemon.web_addr()
    ));
    let bar = progress_bar(paths.len() as u64, "C-STORE");
    let options =
        SendOptions { to: daemon.dicom_addr().to_string(), slices_per_s: Some(args.rate), ..SendOptions::default() };
    let report = send(&paths, &options, &mut |p| bar.set_position(p.done as u64))?;
    bar.finish_and_clear();
    if report.stored != paths.len() {
        bail!("{} of {} slices were not stored", paths.len() - report.stored, paths.len());
    }
    say(&format!(
        "sent      {} slices in {:.1} s, every one acknowledged after it was durable",
        report.stored,
        report.elapsed.as_secs_f64()
    ));
    let notice = notices.recv_timeout(Duration::from_secs(600)).context("wait for the outcome")?;
    notice.wait_rendered(Duration::from_secs(60));
    show(&notice, args.json, &daemon)?;
    if args.keep {
        say(&format!("page      http://{} stays up until interrupted", daemon.web_addr()));
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let _ = signals.forever().next();
    }
    daemon.shutdown(Duration::from_secs(2));
    Ok(if notice.report()["outcome"] == "result" { Ended::Done } else { Ended::NoResult })
}

fn show(notice: &ResultNotice, as_json: bool, daemon: &Daemon) -> anyhow::Result<()> {
    let pages = notice.pages();
    if as_json {
        return print_json(&json!({
            "schema": "darnet.demo/1",
            "result": notice.document,
            "heat_map": pages,
            "dicom": daemon.dicom_addr().to_string(),
            "web": daemon.web_addr().to_string(),
        }));
    }
    println!("outcome   {}", notice.report()["outcome"].as_str().unwrap_or("?"));
    if let Some(scores) = notice.report()["scores"].as_object() {
        for (class, score) in scores {
            println!("  {class:<12} {:.4}", score.as_f64().unwrap_or(f64::NAN));
        }
        println!("predicted {}", notice.report()["predicted"].as_str().unwrap_or("?"));
    } else {
        println!("reason    {}: {}", notice.report()["reason"], notice.report()["detail"]);
    }
    println!("alert     {}", notice.document["alert"]);
    if let Some(latency) = notice.report()["latency_ms"].as_object() {
        println!("latency   milliseconds");
        for (stage, ms) in latency {
            println!("  {stage:<28} {:>10.2}", ms.as_f64().unwrap_or(f64::NAN));
        }
    }
    println!(
        "last slice to alert {:.1} ms, of which {:.1} ms were waiting for completion",
        notice.last_slice_to_alert_s * 1e3,
        notice.completion_wait_s * 1e3
    );
    for page in pages {
        println!("heat map  {}", page.display());
    }
    Ok(())
}

/// What a model answers to the phantoms of the acceptance test.
#[derive(serde::Serialize, serde::Deserialize)]
struct Expected {
    schema: String,
    /// Largest difference of a score on an FP32 backend.
    tolerance: f64,
    /// Scores by phantom, then class.
    scores: BTreeMap<String, BTreeMap<String, f64>>,
}

const EXPECTED_FILE: &str = "acceptance.json";
const EXPECTED_SCHEMA: &str = "darnet.acceptance-expected/1";
/// Tolerance written by `--record`: that of FP32 backends for probabilities. Phantoms are the same to the bit everywhere.
const EXPECTED_TOLERANCE: f64 = 1e-4;
/// Tolerance of FP16 backends.
const FP16_TOLERANCE: f64 = 2e-3;
/// Above the grace time, how long the alert may take on a workstation that is not overloaded.
const LATENCY_MARGIN_S: f64 = 30.0;

struct Check {
    name: String,
    passed: bool,
    detail: String,
}

/// `darnet acceptance`.
pub fn acceptance(args: &AcceptanceArgs) -> anyhow::Result<Ended> {
    let model = modelcmd::load(args.engine.model.as_ref())?;
    let expected_text: Option<String> = match &args.engine.model {
        Some(dir) => std::fs::read_to_string(dir.join(EXPECTED_FILE)).ok(),
        None => Some(include_str!("../../engines/demo/acceptance.json").to_owned()),
    };
    let expected: Option<Expected> = expected_text
        .filter(|t| !t.trim().is_empty())
        .map(|t| serde_json::from_str(&t))
        .transpose()
        .context("read what the model answers")?;
    let scratch = scratch_dir("acceptance")?;
    let data = scratch.path().join("data");
    std::fs::create_dir(&data)?;

    let secret = "the acceptance test of this installation";
    let secret_file = scratch.path().join("secret");
    std::fs::write(&secret_file, secret)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let (delivered_tx, delivered) = crossbeam_channel::bounded(64);
    std::thread::spawn(move || receive(&listener, &delivered_tx));

    let mut config = local_config(&data);
    args.engine.configure(&mut config.model);
    config.assembly.grace_ms = 500;
    config.webhook =
        WebhookConfig { url: format!("http://{address}/"), secret_file: Some(secret_file), ..WebhookConfig::default() };
    let (tx, notices) = observer();
    let daemon = Daemon::start_with(&config, &model, Some(tx))?;

    let mut checks = Vec::new();
    let mut recorded = BTreeMap::new();
    for class in [PhantomClass::Healthy, PhantomClass::Cp, PhantomClass::Covid] {
        let name = class.as_str();
        let spec = PhantomSpec::random(class, 4242).with_shape(96, 256, 256);
        let paths = write_dicom(&generate(&spec), &scratch.path().join(name), &DicomOptions::default())?;
        let options = SendOptions { to: daemon.dicom_addr().to_string(), ..SendOptions::default() };
        let report = send(&paths, &options, &mut |_| {})?;
        checks.push(Check {
            name: format!("{name}: every slice acknowledged"),
            passed: report.stored == paths.len(),
            detail: format!("{} of {}", report.stored, paths.len()),
        });
        let notice = notices.recv_timeout(Duration::from_secs(600)).context("wait for the outcome")?;
        let scores: BTreeMap<String, f64> =
            serde_json::from_value(notice.report()["scores"].clone()).unwrap_or_default();
        match &expected {
            Some(expected) => {
                let fp16 = matches!(daemon.backend(), "tensorrt" | "cuda");
                let tolerance = if fp16 { expected.tolerance.max(FP16_TOLERANCE) } else { expected.tolerance };
                let known = expected.scores.get(name);
                let worst = known.map_or(f64::INFINITY, |known| {
                    known
                        .iter()
                        .map(|(c, v)| (scores.get(c).unwrap_or(&f64::NAN) - v).abs())
                        .fold(0.0, |a, b| if b.is_nan() { f64::INFINITY } else { f64::max(a, b) })
                });
                checks.push(Check {
                    name: format!("{name}: the known result"),
                    passed: worst <= tolerance,
                    detail: format!("largest difference of a score {worst:.2e}, allowed {tolerance:.0e}"),
                });
            }
            None => checks.push(Check {
                name: format!("{name}: a result"),
                passed: notice.report()["outcome"] == "result",
                detail: format!("the model has no {EXPECTED_FILE}: only that there is a result was checked"),
            }),
        }
        recorded.insert(name.to_owned(), scores);
        let bound = config.assembly.grace_ms as f64 / 1e3 + LATENCY_MARGIN_S;
        checks.push(Check {
            name: format!("{name}: last slice to alert"),
            passed: notice.last_slice_to_alert_s <= bound,
            detail: format!("{:.0} ms, allowed {:.0} ms", notice.last_slice_to_alert_s * 1e3, bound * 1e3),
        });
        let delivery = delivered.recv_timeout(Duration::from_secs(30));
        let signed = delivery.as_ref().is_ok_and(|(signature, body): &(String, Vec<u8>)| {
            verify_signature(secret.as_bytes(), signature, body, unix_ms() / 1000, 300)
        });
        checks.push(Check {
            name: format!("{name}: delivered and signed"),
            passed: signed,
            detail: if delivery.is_ok() { "received".to_owned() } else { "nothing received within 30 s".to_owned() },
        });
    }
    // What must not be judged is not judged.
    let spec = PhantomSpec::random(PhantomClass::Healthy, 4243).with_shape(5, 256, 256);
    let paths = write_dicom(&generate(&spec), &scratch.path().join("short"), &DicomOptions::default())?;
    send(&paths, &SendOptions { to: daemon.dicom_addr().to_string(), ..SendOptions::default() }, &mut |_| {})?;
    let notice = notices.recv_timeout(Duration::from_secs(60)).context("wait for the refusal")?;
    checks.push(Check {
        name: "five slices are refused".to_owned(),
        passed: notice.report()["reason"] == "too_few_slices",
        detail: notice.report()["reason"].to_string(),
    });
    daemon.shutdown(Duration::from_secs(2));

    if let Some(path) = &args.record {
        let expected = Expected { schema: EXPECTED_SCHEMA.to_owned(), tolerance: EXPECTED_TOLERANCE, scores: recorded };
        std::fs::write(path, serde_json::to_string_pretty(&expected)? + "\n")
            .with_context(|| format!("write {}", path.display()))?;
    }
    let passed = checks.iter().all(|c| c.passed);
    if args.json {
        let list: Vec<Value> =
            checks.iter().map(|c| json!({ "check": c.name, "passed": c.passed, "detail": c.detail })).collect();
        print_json(&json!({
            "schema": "darnet.acceptance/1",
            "passed": passed,
            "model": { "id": model.manifest.id, "sha256": model.sha256, "intended_use": model.manifest.intended_use },
            "checks": list,
        }))?;
    } else {
        for check in &checks {
            println!("{} {:<40} {}", if check.passed { "pass" } else { "FAIL" }, check.name, check.detail);
        }
    }
    Ok(if passed { Ended::Done } else { Ended::Failed })
}

/// Answers 200 to everything and passes signature and body on.
fn receive(listener: &TcpListener, to: &crossbeam_channel::Sender<(String, Vec<u8>)>) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
        let mut bytes = Vec::new();
        let mut chunk = [0u8; 8192];
        let delivery = loop {
            if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&bytes[..at]).into_owned();
                let header = |name: &str| {
                    head.lines().find_map(|l| {
                        let (key, value) = l.split_once(':')?;
                        key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
                    })
                };
                let length: usize = header("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
                if bytes.len() >= at + 4 + length {
                    let signature = header("x-darnet-signature").unwrap_or_default();
                    break Some((signature, bytes[at + 4..at + 4 + length].to_vec()));
                }
            }
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => break None,
                Ok(n) => bytes.extend_from_slice(&chunk[..n]),
            }
        };
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        if let Some(delivery) = delivery
            && to.send(delivery).is_err()
        {
            return;
        }
    }
}
