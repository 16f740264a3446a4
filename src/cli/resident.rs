//! `bench inference --serve`: one prepared session, inputs named on stdin, one JSON line each on stdout.
//!
//! For comparisons that measure several programs in turn: the process stays, the caller says when it works.
//!
//! ```text
//! -> (start)      {"schema":"darnet.bench-serve/1","ready":true,"model":{…},"backend":"cpu","threads":2,"load_s":…}
//! <- FILE         a safetensors file with `volume`
//! -> {"seconds":…,"device_ms":…,"logits":[…],"scores":[…]}      or {"error":"…"}, and the next line is awaited
//! ```
//!
//! `seconds` is the inference alone; reading the file is outside. `device_ms` is the part on a GPU, null without one. The
//! process ends when stdin does.

use std::io::{BufRead, Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use darnet::engine::{CancelToken, Inference, prepare};
use serde_json::{Value, json};

use super::{BenchArgs, Ended, bench, infer};

/// Longest accepted line: Linux's longest path, 4096 bytes, and its end.
const MAX_LINE_BYTES: u64 = 4097;

/// Runs until stdin ends.
pub fn serve(args: &BenchArgs) -> anyhow::Result<Ended> {
    let started = Instant::now();
    let model = bench::model(args)?;
    let backend = prepare(args.engine.backend, &model, &args.engine.options())?;
    let mut session = backend.session()?;
    let input_dhw = model.manifest.architecture.input_dhw;
    say(&json!({
        "schema": "darnet.bench-serve/1",
        "ready": true,
        "model": { "id": model.manifest.id, "sha256": model.sha256 },
        "version": env!("CARGO_PKG_VERSION"),
        "backend": backend.name(),
        "threads": backend.threads(),
        "input_dhw": input_dhw,
        "load_s": started.elapsed().as_secs_f64(),
    }))?;
    drop(model); // the daemon does not keep the weights as loaded either
    let mut out = Inference::default();
    let cancel = CancelToken::new();
    let mut stdin = std::io::stdin().lock();
    let mut line = String::new();
    loop {
        line.clear();
        if stdin.by_ref().take(MAX_LINE_BYTES).read_line(&mut line).context("read a file name from stdin")? == 0 {
            return Ok(Ended::Done);
        }
        let mut run = || -> anyhow::Result<Value> {
            let input = infer::read_volume(Path::new(line.trim_end_matches('\n')), input_dhw)?;
            let started = Instant::now();
            session.run(&input, &cancel, &mut out)?;
            let seconds = started.elapsed().as_secs_f64();
            let device_ms = session.device_ms();
            Ok(json!({ "seconds": seconds, "device_ms": device_ms, "logits": out.logits, "scores": out.scores }))
        };
        let answer = run().unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        say(&answer)?;
    }
}

fn say(document: &Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{document}")?;
    out.flush()?;
    Ok(())
}
