//! The result of a series does not depend on how it arrived.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::{DARNET, Daemon, phantom_series, run};
use darnet::dicom::scu::{SendOptions, send};
use serde_json::Value;

/// A seeded shuffle (xorshift64*), so that a failure can be repeated.
fn shuffle(files: &mut [PathBuf], seed: u64) {
    let mut state = seed.max(1);
    for i in (1..files.len()).rev() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let at = state.wrapping_mul(0x2545_F491_4F6C_DD1D) % (i as u64 + 1);
        files.swap(i, at as usize);
    }
}

fn push(daemon: &Daemon, files: &[PathBuf], associations: usize) {
    let options = SendOptions { to: daemon.dicom.clone(), associations, ..SendOptions::default() };
    let report = send(files, &options, &mut |_| {}).unwrap();
    assert_eq!(report.stored, files.len());
}

/// Everything of a result that the pixels decide, as exact text.
fn judged(result: &Value) -> String {
    format!("{} {} {} {}", result["logits"], result["scores"], result["predicted"], result["slices"])
}

#[test]
fn a_300_slice_series_in_random_order_gives_bit_identical_scores() {
    let series = phantom_series(7, 300, 128);
    let mut judgements = Vec::new();
    for seed in 0..3u64 {
        let mut files = series.files.clone();
        if seed > 0 {
            shuffle(&mut files, seed);
            assert_ne!(files, series.files);
        }
        let daemon = Daemon::start("");
        push(&daemon, &files, if seed == 2 { 4 } else { 1 });
        let results = daemon.wait_results(1, 120);
        assert_eq!(results[0]["outcome"], "result", "{}", results[0]);
        judgements.push(judged(&results[0]));
    }
    assert_eq!(judgements[0], judgements[1]);
    assert_eq!(judgements[0], judgements[2], "four associations at once");

    let (code, out, err) = run(Command::new(DARNET).args(["infer", "--json"]).arg(&series.folder));
    assert_eq!(code, 0, "{err}");
    let document: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(judged(&document["series"][0]), judgements[0], "files give what the network gives");
}

#[test]
fn two_studies_interleaved_over_four_associations_do_not_mix() {
    let (a, b) = (phantom_series(11, 80, 128), phantom_series(12, 90, 128));
    let mut alone = Vec::new();
    for series in [&a, &b] {
        let daemon = Daemon::start("");
        push(&daemon, &series.files, 1);
        alone.push(judged(&daemon.wait_results(1, 60)[0]));
    }
    let mut mixed: Vec<PathBuf> = a.files.iter().chain(&b.files).cloned().collect();
    shuffle(&mut mixed, 5);
    let daemon = Daemon::start("");
    push(&daemon, &mixed, 4);
    let mut together: Vec<String> = daemon.wait_results(2, 60).iter().map(judged).collect();
    together.sort();
    alone.sort();
    assert_eq!(together, alone);
}
