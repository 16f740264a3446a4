//! Real senders push a real chest CT series into the running daemon and get a result.
//!
//! With `DARNET_TEST_DATA` set the series is LIDC-IDRI-0306 (123 slices, 512 x 512); otherwise a phantom.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{ChestSeries, Daemon, chest_series, http, python, require, run};

const DCMTK: &str = "apt-get install dcmtk";

fn expect_one_result(daemon: &Daemon, series: &ChestSeries, peer: &str) {
    let results = daemon.wait_results(1, 120);
    assert_eq!(results.len(), 1, "{peer}");
    let result = &results[0];
    assert_eq!(result["outcome"], "result", "{peer}: {result}");
    assert_eq!(result["slices"], series.files.len(), "{peer}");
    assert_eq!(result["model"]["intended_use"], "demo", "{peer}");
    let sum: f64 = result["scores"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{peer}: scores sum to {sum}");
    assert_eq!(daemon.metric("darnet_outcomes_total{outcome=\"result\""), 1.0, "{peer}");
}

#[test]
fn dcmsend_pushes_a_series_and_gets_a_result() {
    let dcmsend = require("dcmsend", DCMTK);
    let series = chest_series();
    let daemon = Daemon::start("");
    let (code, out, err) =
        run(Command::new(dcmsend).args(["-aec", "DARNET", "127.0.0.1", daemon.dicom_port()]).args(&series.files));
    assert_eq!(code, 0, "{out}{err}");
    expect_one_result(&daemon, &series, "dcmsend");
}

#[test]
fn storescu_pushes_a_series_and_gets_a_result() {
    let storescu = require("storescu", DCMTK);
    let series = chest_series();
    let daemon = Daemon::start("");
    let (code, out, err) =
        run(Command::new(storescu).args(["-aec", "DARNET", "127.0.0.1", daemon.dicom_port()]).args(&series.files));
    assert_eq!(code, 0, "{out}{err}");
    expect_one_result(&daemon, &series, "storescu");
}

#[test]
fn pynetdicom_pushes_a_series_and_gets_a_result() {
    let series = chest_series();
    let daemon = Daemon::start("");
    let script = r#"
import sys
from pydicom import dcmread
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage
ae = AE(ae_title="PYNETDICOM")
first = dcmread(sys.argv[2])
ae.add_requested_context(CTImageStorage, first.file_meta.TransferSyntaxUID)
assoc = ae.associate("127.0.0.1", int(sys.argv[1]), ae_title="DARNET")
assert assoc.is_established
for path in sys.argv[2:]:
    status = assoc.send_c_store(dcmread(path))
    assert status.Status == 0, hex(status.Status)
assoc.release()
"#;
    let (code, out, err) = run(Command::new(python()).args(["-c", script, daemon.dicom_port()]).args(&series.files));
    assert_eq!(code, 0, "{out}{err}");
    expect_one_result(&daemon, &series, "pynetdicom");
}

#[test]
fn orthanc_pushes_a_series_and_gets_a_result() {
    let orthanc = require("Orthanc", "apt-get install orthanc");
    let series = chest_series();
    let daemon = Daemon::start("");
    let dir = tempfile::tempdir().unwrap();
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let until = Instant::now() + Duration::from_secs(120);
    let (mut child, address) = 'started: loop {
        // Free ports are given back and taken again. Somebody else may be faster, then it ends by itself.
        let (http_port, dicom_port) = (free(), free());
        let config = serde_json::json!({
            "Name": "ORTHANC",
            "StorageDirectory": dir.path().join("storage"),
            "IndexDirectory": dir.path().join("index"),
            "HttpPort": http_port,
            "DicomPort": dicom_port,
            "RemoteAccessAllowed": false,
            "AuthenticationEnabled": false,
            "DicomModalities": {
                "darnet": ["DARNET", "127.0.0.1", daemon.dicom_port().parse::<u16>().unwrap()],
            },
        });
        let file = dir.path().join("orthanc.json");
        std::fs::write(&file, config.to_string()).unwrap();
        let mut child = Command::new(&orthanc).arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let address = format!("127.0.0.1:{http_port}");
        while child.try_wait().unwrap().is_none() {
            if std::net::TcpStream::connect(&address).is_ok() {
                break 'started (child, address);
            }
            assert!(Instant::now() < until, "Orthanc did not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(Instant::now() < until, "Orthanc did not come up");
    };
    let mut parent = String::new();
    for path in &series.files {
        let bytes = std::fs::read(path).unwrap();
        let (status, body) = http(&address, "POST", "/instances", "application/dicom", &bytes);
        assert_eq!(status, 200, "{body}");
        parent = serde_json::from_str::<serde_json::Value>(&body).unwrap()["ParentSeries"].as_str().unwrap().to_owned();
    }
    let (status, body) = http(&address, "POST", "/modalities/darnet/store", "text/plain", parent.as_bytes());
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert_eq!(status, 200, "{body}");
        expect_one_result(&daemon, &series, "Orthanc");
    }));
    let _ = child.kill();
    let _ = child.wait();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}
