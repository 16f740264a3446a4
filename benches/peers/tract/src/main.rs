//! tract with an exported model, resident: reads file names, answers with seconds and logits.
//!
//! `darnet-peers-tract MODEL.onnx THREADS`. The protocol is that of `worker.py`: a line `{"ready": true, …}`, then for
//! each safetensors file named on stdin `{"seconds": …, "logits": […]}`. `seconds` spans the run, from a tensor in memory
//! to all outputs in memory; reading the file is outside.

use std::error::Error;
use std::io::{BufRead, Write};
use std::time::Instant;

use serde_json::json;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::prelude::multithread::{Executor, set_default_executor};

/// `volume` of a safetensors file, as `[1, 1, D, H, W]`.
fn read_volume(path: &str) -> Result<Tensor, Box<dyn Error>> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let volume = file.tensor("volume")?;
    let &[d, h, w] = volume.shape() else { return Err("volume: expected three axes".into()) };
    let values: Vec<f32> = volume.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Ok(Tensor::from_shape(&[1, 1, d, h, w], &values)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, threads] = &arguments[..] else { return Err("usage: darnet-peers-tract MODEL.onnx THREADS".into()) };
    let threads: usize = threads.parse()?;
    set_default_executor(if threads > 1 { Executor::multithread(threads) } else { Executor::SingleThread });
    let started = Instant::now();
    let plan = tract_onnx::onnx().model_for_path(model)?.into_optimized()?.into_runnable()?;
    let load_s = started.elapsed().as_secs_f64();
    let mut out = std::io::stdout().lock();
    let version = "0.23";
    let ready = json!({"ready": true, "runtime": "tract", "version": version, "load_s": load_s, "precision": "f32"});
    writeln!(out, "{ready}")?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let volume = read_volume(line?.trim_end())?;
        let started = Instant::now();
        let outputs = plan.run(tvec!(volume.into()))?;
        let seconds = started.elapsed().as_secs_f64();
        let logits: Vec<f32> = outputs[0].to_plain_array_view::<f32>()?.iter().copied().collect();
        writeln!(out, "{}", json!({"seconds": seconds, "logits": logits}))?;
        out.flush()?;
    }
    Ok(())
}
