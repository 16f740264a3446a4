//! `send`, `phantom`, `man`.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use darnet::dicom::scu::{self, SendOptions};
use darnet::phantom::{self, Format, WriteRequest};

use super::{Ended, FormatArg, PhantomArgs, SendArgs, print_json, progress_bar};

/// Every file below `paths`, sorted, so that a run can be repeated.
pub fn files_below(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut pending: Vec<PathBuf> = paths.to_vec();
    while let Some(path) = pending.pop() {
        let meta = std::fs::metadata(&path).with_context(|| format!("read {}", path.display()))?;
        if meta.is_dir() {
            for entry in std::fs::read_dir(&path).with_context(|| format!("list {}", path.display()))? {
                pending.push(entry?.path());
            }
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// `darnet send`.
pub fn send(args: &SendArgs) -> anyhow::Result<Ended> {
    let files = files_below(&args.paths)?;
    if files.is_empty() {
        bail!("nothing to send: no file below the paths given");
    }
    let bar = progress_bar(files.len() as u64, "sending");
    let options = SendOptions {
        to: args.to.clone(),
        calling_ae_title: args.aet.clone(),
        called_ae_title: args.aec.clone(),
        slices_per_s: args.rate,
        associations: args.associations,
        ..SendOptions::default()
    };
    let mut last_answer = SystemTime::now();
    let report = scu::send(&files, &options, &mut |progress| {
        last_answer = SystemTime::now();
        bar.set_position(progress.done as u64);
    })?;
    bar.finish_and_clear();
    let failed = report.statuses.len() - report.stored;
    if args.json {
        let statuses: Vec<String> = report.statuses.iter().map(ToString::to_string).collect();
        print_json(&serde_json::json!({
            "schema": "darnet.send/1",
            "stored": report.stored,
            "failed": failed,
            "bytes": report.bytes,
            "last_answer_unix_s": last_answer.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            "elapsed_ms": report.elapsed.as_secs_f64() * 1e3,
            "statuses": statuses,
        }))?;
    } else {
        println!("{} stored, {failed} failed, {:.1} s", report.stored, report.elapsed.as_secs_f64());
    }
    Ok(if failed == 0 { Ended::Done } else { Ended::Failed })
}

/// `darnet phantom`.
pub fn phantom(args: &PhantomArgs) -> anyhow::Result<Ended> {
    let bar = progress_bar(args.count as u64, "phantoms");
    let format = match args.format {
        FormatArg::Dicom => Format::Dicom,
        FormatArg::Nifti => Format::Nifti,
        FormatArg::Png => Format::Png,
    };
    let mut request = WriteRequest::new(&args.out, args.class.into(), args.count, args.seed, format);
    request.variants = args.variants;
    if args.slices.is_some() || args.size.is_some() {
        let size = args.size.unwrap_or(512);
        request.shape = Some([args.slices.unwrap_or(160), size, size]);
    }
    let cases = phantom::write_cases(&request, &mut |progress| bar.set_position(progress.done as u64))?;
    bar.finish_and_clear();
    for case in cases {
        println!("{}\t{}", case.image.display(), case.lesion.display());
    }
    Ok(Ended::Done)
}

/// `darnet man`: one page a command.
pub fn man(out: &Path, command: clap::Command) -> anyhow::Result<Ended> {
    std::fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    clap_mangen::generate_to(command, out).with_context(|| format!("write manual pages to {}", out.display()))?;
    Ok(Ended::Done)
}
