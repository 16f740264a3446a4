//! An acknowledged slice survives a killed process; what leaves is repeated, never doubled.

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::Duration;

use common::{Daemon, phantom_series};
use darnet::dicom::scu::{SendOptions, send};

/// An HTTP receiver that answers with `statuses` in turn (the last for ever) and passes heads and bodies on.
fn receiver(statuses: Vec<u16>) -> (String, mpsc::Receiver<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || {
        let mut whole = 0;
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let mut bytes = Vec::new();
            let mut chunk = [0u8; 4096];
            let request = loop {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if let Some((head, body)) = text.split_once("\r\n\r\n") {
                    let length: usize = head
                        .lines()
                        .find_map(|l| {
                            l.to_ascii_lowercase().strip_prefix("content-length:").map(|v| v.trim().parse().unwrap())
                        })
                        .unwrap_or(0);
                    if body.len() >= length {
                        break Some((head.to_owned(), body.to_owned()));
                    }
                }
                match stream.read(&mut chunk) {
                    Ok(0) | Err(_) => break None,
                    Ok(got) => bytes.extend_from_slice(&chunk[..got]),
                }
            };
            // A sender that is killed may leave a part of one.
            let Some(request) = request else { continue };
            let status = statuses[whole.min(statuses.len() - 1)];
            whole += 1;
            let _ = write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            if tx.send(request).is_err() {
                return;
            }
        }
    });
    (address, rx)
}

fn push(daemon: &Daemon, files: &[std::path::PathBuf]) {
    let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
    assert_eq!(send(files, &options, &mut |_| {}).unwrap().stored, files.len());
}

#[test]
fn a_series_killed_half_way_is_resumed_and_gives_the_same_result() {
    let series = phantom_series(21, 60, 128);
    let whole = {
        let daemon = Daemon::start("");
        push(&daemon, &series.files);
        daemon.wait_results(1, 60)[0]["logits"].to_string()
    };
    let daemon = Daemon::start("[assembly]\ngrace_ms = 60000\n");
    push(&daemon, &series.files[..40]);
    let daemon = daemon.kill_and_restart();
    push(&daemon, &series.files[40..]);
    let daemon = {
        // Shorten the wait: the same data with the default grace.
        let text = std::fs::read_to_string(&daemon.config)
            .unwrap()
            .replace("grace_ms = 60000", "grace_ms = 500\nidle_ms = 2000");
        std::fs::write(&daemon.config, text).unwrap();
        daemon.kill_and_restart()
    };
    let results = daemon.wait_results(1, 60);
    assert_eq!(results[0]["slices"], 60);
    assert_eq!(results[0]["logits"].to_string(), whole);
    // Nothing more comes of it.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(daemon.results().len(), 1);
}

#[test]
fn a_published_series_is_not_published_again_after_a_restart() {
    let series = phantom_series(22, 40, 128);
    let daemon = Daemon::start("[assembly]\ngrace_ms = 200\nidle_ms = 1000\n");
    push(&daemon, &series.files);
    let first = daemon.wait_results(1, 60);
    std::thread::sleep(Duration::from_millis(500));
    let daemon = daemon.kill_and_restart();
    push(&daemon, &series.files); // the archive sends everything once more
    std::thread::sleep(Duration::from_secs(4));
    let again = daemon.results();
    assert_eq!(again.len(), 1, "{again:?}");
    assert_eq!(again[0]["result_uid"], first[0]["result_uid"]);
}

#[test]
fn a_late_slice_gives_a_correction_that_supersedes() {
    let series = phantom_series(23, 41, 128);
    let daemon = Daemon::start("[assembly]\ngrace_ms = 200\n");
    push(&daemon, &series.files[..40]);
    let first = daemon.wait_results(1, 60);
    push(&daemon, &series.files[40..]);
    let both = daemon.wait_results(2, 60);
    let later = both.iter().find(|r| r["revision"] == 2).expect("a second revision");
    assert_eq!(later["supersedes"], first[0]["result_uid"]);
    assert_eq!(later["slices"], 41);
}

#[test]
fn a_webhook_is_repeated_after_failure_and_restart_under_one_key() {
    let series = phantom_series(24, 40, 128);
    let (address, deliveries) = receiver(vec![503, 503, 200]);
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "a shared secret of the hospital\n").unwrap();
    let daemon = Daemon::start(&format!(
        "[assembly]\ngrace_ms = 200\n[outbox]\nbackoff_first_ms = 300\n[webhook]\nurl = \"http://{address}/hook\"\nsecret_file = {:?}\n",
        secret.path().display().to_string()
    ));
    push(&daemon, &series.files);
    let (head, body) = deliveries.recv_timeout(Duration::from_secs(60)).unwrap();
    let daemon = daemon.kill_and_restart();
    let key = |head: &str| {
        head.lines().find(|l| l.to_ascii_lowercase().starts_with("idempotency-key:")).unwrap().to_ascii_lowercase()
    };
    let mut last = (head.clone(), body.clone());
    for _ in 0..2 {
        last = deliveries.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(key(&last.0), key(&head));
        assert_eq!(last.1, body, "the body is fixed before the first attempt");
    }
    assert!(last.0.to_ascii_lowercase().contains("x-darnet-signature: t="));
    assert!(deliveries.recv_timeout(Duration::from_secs(3)).is_err(), "delivered once it was accepted, never again");
    drop(daemon);
}

#[test]
fn a_series_whose_journal_lost_its_header_ends_as_internal_and_is_told_once() {
    let series = phantom_series(26, 40, 128);
    let mut daemon = Daemon::start("[assembly]\ngrace_ms = 60000\nidle_ms = 60000\n");
    push(&daemon, &series.files[..30]);
    assert_eq!(daemon.terminate(), Some(0));
    let folders: Vec<_> = std::fs::read_dir(daemon.data.join("series")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(folders.len(), 1);
    let journal = folders[0].join("journal");
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[20] ^= 0xff;
    std::fs::write(&journal, &bytes).unwrap();

    let daemon = daemon.kill_and_restart();
    let results = daemon.wait_results(1, 60);
    assert_eq!((&results[0]["outcome"], &results[0]["reason"]), (&"no_result".into(), &"internal".into()));
    assert!(results[0]["detail"].as_str().unwrap().contains("SeriesInstanceUID"), "{}", results[0]["detail"]);
    // What comes of it now is refused, so that the sender keeps it, and the journal is left as it is.
    let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
    assert_eq!(send(&series.files[30..], &options, &mut |_| {}).unwrap().stored, 0);
    let daemon = daemon.kill_and_restart();
    assert_eq!(std::fs::read(&journal).unwrap(), bytes);
    // Other series go on.
    let other = phantom_series(27, 40, 128);
    let text = std::fs::read_to_string(&daemon.config).unwrap().replace("60000", "300");
    std::fs::write(&daemon.config, text).unwrap();
    let daemon = daemon.kill_and_restart();
    push(&daemon, &other.files);
    let results = daemon.wait_results(2, 60);
    assert_eq!(results.len(), 2, "each outcome once: {results:?}");
    assert_eq!(results.iter().filter(|r| r["outcome"] == "result").count(), 1);
    // Without the note of whose it is, it can only be reported in the log.
    std::fs::remove_file(folders[0].join("identity")).unwrap();
    let daemon = daemon.kill_and_restart();
    daemon.wait_until("the damage is logged", 30, |d| d.log().contains("header checksum does not match"));
}

#[test]
fn sigterm_ends_the_daemon_cleanly_and_keeps_open_series() {
    let series = phantom_series(25, 40, 128);
    let mut daemon = Daemon::start("[assembly]\ngrace_ms = 60000\nidle_ms = 60000\n");
    push(&daemon, &series.files);
    assert_eq!(daemon.terminate(), Some(0));
    let text = std::fs::read_to_string(&daemon.config).unwrap().replace("60000", "1000");
    std::fs::write(&daemon.config, text).unwrap();
    let daemon = daemon.kill_and_restart();
    assert_eq!(daemon.wait_results(1, 60)[0]["slices"], 40);
}
