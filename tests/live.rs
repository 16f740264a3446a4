//! Which reconstruction of a study is live follows from their latest results, never from the order in which they came,
//! and a receiver is told of every change.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use common::{Daemon, darnet};
use darnet::dicom::scu::{SendOptions, send};
use darnet::phantom::{DicomOptions, Kernel, PhantomClass, PhantomSpec, generate, series_variants, write_dicom};
use serde_json::Value;

/// What a receiver got: the idempotency key and the document.
type Message = (String, Value);

/// An HTTP receiver that takes everything and passes it on.
fn receiver() -> (String, mpsc::Receiver<Message>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut bytes = Vec::new();
            let mut chunk = [0u8; 4096];
            let message = loop {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if let Some((head, body)) = text.split_once("\r\n\r\n") {
                    let header = |name: &str| {
                        let of = |l: &str| {
                            Some(l.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case(name))?.1.trim().to_owned())
                        };
                        head.lines().find_map(of).unwrap()
                    };
                    if body.len() >= header("content-length").parse::<usize>().unwrap() {
                        break (header("idempotency-key"), serde_json::from_str(body).unwrap());
                    }
                }
                let got = stream.read(&mut chunk).unwrap();
                assert!(got > 0, "a whole request");
                bytes.extend_from_slice(&chunk[..got]);
            };
            let _ = write!(stream, "HTTP/1.1 204 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            if tx.send(message).is_err() {
                return;
            }
        }
    });
    (address, rx)
}

fn webhook(address: &str, events: &str) -> String {
    format!(
        "\n[webhook]\nurl = \"http://{address}/\"\nevents = \"{events}\"\nsecret = \"0123456789abcdef\"\n\
         allow_plaintext_secret = true\n"
    )
}

fn next(messages: &mpsc::Receiver<Message>) -> Message {
    messages.recv_timeout(Duration::from_secs(60)).expect("a message")
}

/// Series of one study, by name: thin and soft, thick and soft, thin and sharp.
struct Study {
    series: BTreeMap<&'static str, Vec<PathBuf>>,
    _dir: tempfile::TempDir,
}

impl Study {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = PhantomSpec::random(PhantomClass::Covid, seed).with_shape(100, 96, 96).with_kernel(Kernel::Soft);
        let mut series = BTreeMap::new();
        for (number, (name, spec)) in ["thin", "thick", "sharp"].into_iter().zip(series_variants(&spec)).enumerate() {
            let options = DicomOptions {
                study_uid: Some(format!("1.2.826.0.1.3680043.{seed}")),
                series_number: number as u32 + 1,
                ..DicomOptions::default()
            };
            series.insert(name, write_dicom(&generate(&spec), &dir.path().join(name), &options).unwrap());
        }
        Self { series, _dir: dir }
    }

    fn send(&self, daemon: &Daemon, name: &str) {
        push(daemon, &self.series[name]);
    }

    fn folder(&self, name: &str) -> &Path {
        self.series[name][0].parent().unwrap()
    }

    /// A slice again under the same SOPInstanceUID with other pixels.
    fn conflict(&self, daemon: &Daemon, name: &str) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = std::fs::read(&self.series[name][30]).unwrap();
        let at = bytes.len() - 4000;
        bytes[at] ^= 1;
        let file = dir.path().join("again.dcm");
        std::fs::write(&file, bytes).unwrap();
        push(daemon, &[file]);
    }
}

fn push(daemon: &Daemon, files: &[PathBuf]) {
    let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
    assert_eq!(send(files, &options, &mut |_| {}).unwrap().stored, files.len());
}

/// The study as the store has it: by series, what its latest result says of itself.
fn state(daemon: &Daemon) -> BTreeMap<String, String> {
    let mut latest: BTreeMap<String, Value> = BTreeMap::new();
    for result in daemon.results() {
        let series = result["series"].as_str().unwrap().to_owned();
        let newer = latest.get(&series).is_none_or(|l| l["revision"].as_u64() < result["revision"].as_u64());
        if newer {
            latest.insert(series, result);
        }
    }
    let said = |r: &Value| format!("{} {} {} {}", r["outcome"], r["reason"], r["live"], r["alert"]["alert"]);
    latest.into_iter().map(|(series, r)| (series, said(&r))).collect()
}

/// Checks that a receiver that keeps the highest edition of each result knows what the store has.
fn receiver_agrees(daemon: &Daemon, messages: &[Message]) {
    let results = daemon.results();
    for result in &results {
        let uid = result["result_uid"].as_str().unwrap();
        let told =
            messages.iter().map(|m| &m.1).filter(|d| d["result_uid"] == uid).max_by_key(|d| d["edition"].as_u64());
        let told = told.unwrap_or_else(|| panic!("{uid} was never told"));
        let superseded = results.iter().any(|r| r["supersedes"] == uid);
        if !superseded {
            assert_eq!(told["live"], result["live"]);
            assert_eq!(told["alert"], result["alert"]);
            assert_eq!(told["edition"], result["edition"]);
        }
    }
    let mut keys: Vec<&String> = messages.iter().map(|m| &m.0).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), messages.len(), "each key once");
}

#[test]
fn any_order_of_sending_gives_the_same_live_result() {
    let study = Study::new(3);
    let mut states = Vec::new();
    for order in [["thin", "thick", "sharp"], ["sharp", "thick", "thin"], ["thick", "sharp", "thin"]] {
        let (address, messages) = receiver();
        // Whatever the model says alerts, so that the alert shows which one is live.
        let alert = "[alert]\nclasses = { covid19 = \"urgent\" }\nthresholds = { covid19 = 0.0 }\n";
        let daemon = Daemon::start(&format!("{alert}{}", webhook(&address, "all")));
        // The key of the hashes differs from daemon to daemon, so series are told apart by their slices.
        let named = |daemon: &Daemon| -> BTreeMap<u64, String> {
            let state = state(daemon);
            let of = |r: &Value| Some((r["slices"].as_u64()?, state.get(r["series"].as_str()?)?.clone()));
            daemon.results().iter().filter_map(of).collect()
        };
        for (n, name) in order.into_iter().enumerate() {
            study.send(&daemon, name);
            daemon.wait_results(n + 1, 120);
        }
        let state = named(&daemon);
        assert_eq!(state.len(), 3, "{state:?}");
        assert_eq!(state.values().filter(|s| s.ends_with("true true")).count(), 1, "one live, which alerts: {state:?}");
        assert_eq!(state.values().filter(|s| s.ends_with("false false")).count(), 2, "{state:?}");
        states.push(state);
        let mut got = Vec::new();
        daemon.wait_until("every edition is told", 60, |d| {
            got.extend(messages.try_iter());
            let told =
                |r: &Value| got.iter().any(|(_, m)| m["result_uid"] == r["result_uid"] && m["edition"] == r["edition"]);
            d.results().iter().all(told)
        });
        while let Ok(message) = messages.recv_timeout(Duration::from_secs(1)) {
            got.push(message);
        }
        receiver_agrees(&daemon, &got);
    }
    assert_eq!(states[0], states[1]);
    assert_eq!(states[0], states[2]);
}

#[test]
fn when_the_live_result_becomes_no_result_the_next_one_speaks() {
    let study = Study::new(3);
    let (address, messages) = receiver();
    let alert = "[alert]\nclasses = { covid19 = \"urgent\" }\nthresholds = { covid19 = 0.0 }\n";
    let daemon = Daemon::start(&format!("{alert}{}", webhook(&address, "alerts")));
    study.send(&daemon, "thin");
    daemon.wait_results(1, 120);
    study.send(&daemon, "thick");
    daemon.wait_results(2, 120);
    let (key, first) = next(&messages);
    assert_eq!((&first["alert"]["alert"], &first["edition"]), (&true.into(), &1.into()));
    assert_eq!(first["result_uid"], key.as_str());

    study.conflict(&daemon, "thin");
    let results = daemon.wait_results(3, 120);
    let second = next(&messages);
    let third = next(&messages);
    let (withdrawn, alerted) = if second.1["revision"] == 2 { (second, third) } else { (third, second) };
    assert_eq!(withdrawn.1["report"]["reason"], "duplicate_conflict");
    assert_eq!(withdrawn.1["supersedes"], first["result_uid"]);
    assert_eq!((&withdrawn.1["live"], &withdrawn.1["alert"]["alert"]), (&false.into(), &false.into()));
    let uid = alerted.1["result_uid"].as_str().unwrap();
    assert_eq!(alerted.0, format!("{uid}/2"));
    assert_eq!(
        (&alerted.1["live"], &alerted.1["alert"]["alert"], &alerted.1["edition"]),
        (&true.into(), &true.into(), &2.into())
    );
    assert_eq!(alerted.1["report"]["outcome"], "result");
    let live: Vec<&Value> = results.iter().filter(|r| r["live"] == true).collect();
    assert_eq!((live.len(), live[0]["result_uid"].as_str()), (1, Some(uid)));

    // A restart repeats nothing that was noted as taken. The receiver answers before the note is made.
    daemon.wait_until("the three deliveries are noted", 60, |d| {
        d.metric("darnet_outbox_items{state=\"delivered\"}") == 3.0
    });
    let daemon = daemon.kill_and_restart();
    assert!(messages.recv_timeout(Duration::from_secs(3)).is_err(), "nothing is told twice");
    assert_eq!(daemon.results().len(), 3);
}

#[test]
fn an_alert_is_taken_back_when_a_better_reconstruction_speaks() {
    let study = Study::new(3);
    // A threshold between the two probabilities of a class that the thick series has more of.
    let scores = |name: &str| -> Value {
        let (code, out, err) = darnet(&["infer", "--json", study.folder(name).to_str().unwrap()]);
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<Value>(&out).unwrap()["series"][0]["scores"].clone()
    };
    let (thick, thin) = (scores("thick"), scores("thin"));
    let (class, threshold) = ["covid19", "cp", "healthy"]
        .into_iter()
        .filter_map(|c| Some((c, thick[c].as_f64()?, thin[c].as_f64()?)))
        .filter(|(_, a, b)| a > b)
        .map(|(c, a, b)| (c, 0.5 * (a + b)))
        .next()
        .expect("two reconstructions never have the same scores");
    let (address, messages) = receiver();
    let alert = format!("[alert]\nclasses = {{ {class} = \"urgent\" }}\nthresholds = {{ {class} = {threshold:?} }}\n");
    let daemon = Daemon::start(&format!("{alert}{}", webhook(&address, "alerts")));
    study.send(&daemon, "thick");
    daemon.wait_results(1, 120);
    let (_, first) = next(&messages);
    assert_eq!((&first["live"], &first["alert"]["alert"]), (&true.into(), &true.into()), "{first}");
    study.send(&daemon, "thin");
    let results = daemon.wait_results(2, 120);
    let (key, second) = next(&messages);
    assert_eq!(second["result_uid"], first["result_uid"]);
    assert_eq!(key, format!("{}/2", first["result_uid"].as_str().unwrap()));
    assert_eq!(
        (&second["live"], &second["alert"]["alert"], &second["edition"]),
        (&false.into(), &false.into(), &2.into())
    );
    assert_eq!(second["report"], first["report"], "nothing else changes");
    assert!(messages.recv_timeout(Duration::from_secs(2)).is_err(), "the negative result does not alert");
    let live: Vec<&Value> = results.iter().filter(|r| r["live"] == true).collect();
    assert_eq!((live.len(), &live[0]["alert"]["alert"]), (1, &Value::from(false)));
    assert_ne!(live[0]["result_uid"], first["result_uid"]);
}

#[test]
fn an_observer_is_told_of_the_result_that_ceased_to_be_live() {
    let study = Study::new(3);
    let dir = tempfile::tempdir().unwrap();
    let mut config = darnet::config::Config { data_dir: dir.path().to_path_buf(), ..Default::default() };
    config.dicom.bind = "127.0.0.1:0".to_owned();
    config.web.bind = "127.0.0.1:0".to_owned();
    config.assembly.grace_ms = 200;
    let (tx, notices) = darnet::pipeline::observer();
    let daemon = darnet::pipeline::Daemon::start(&config, Some(tx)).unwrap();
    let options = SendOptions { to: daemon.dicom_addr().to_string(), ..SendOptions::default() };
    let mut told = ["thick", "thin"].into_iter().map(|name| {
        assert_eq!(send(&study.series[name], &options, &mut |_| {}).unwrap().stored, study.series[name].len());
        notices.recv_timeout(Duration::from_secs(120)).expect("a notice")
    });
    let (first, second) = (told.next().unwrap(), told.next().unwrap());
    assert_eq!((&first.document["live"], first.restated.len()), (&true.into(), 0));
    assert_eq!((&second.document["live"], second.restated.len()), (&true.into(), 1));
    let restated = &second.restated[0];
    assert_eq!(restated["result_uid"], first.document["result_uid"]);
    assert_eq!((&restated["live"], &restated["edition"]), (&false.into(), &2.into()));
    assert_eq!(restated["report"], first.document["report"]);
    daemon.shutdown(Duration::from_secs(2));
}
