//! `serve` and `check-config`.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use darnet::config::Config;
use darnet::pipeline::Daemon;
use darnet::telemetry::{events, init_logging};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{CheckConfigArgs, Ended, ServeArgs};

/// Time associations get to finish their object when the daemon stops.
const DRAIN: Duration = Duration::from_secs(20);
/// How often the main thread looks at signals, threads and the watchdog.
const TICK: Duration = Duration::from_millis(100);

fn load(path: &Path) -> anyhow::Result<Config> {
    let config = Config::load(path)?;
    let faults = config.validate();
    if !faults.is_empty() {
        bail!("{} is not usable:\n  {}", path.display(), faults.join("\n  "));
    }
    Ok(config)
}

/// `darnet check-config`.
pub fn check_config(args: &CheckConfigArgs) -> anyhow::Result<Ended> {
    let config = Config::load(&args.config)?;
    let mut faults = config.validate();
    let model = match &config.model.path {
        Some(path) => darnet::model::Model::load(path),
        None => darnet::model::Model::embedded(),
    };
    match model {
        Ok(model) => {
            let options = config.model.engine_options();
            if let Err(error) = darnet::engine::prepare(config.model.backend, &model, &options) {
                faults.push(format!("model.backend: {error}"));
            }
            if let Err(error) = darnet::pipeline::publish::calibration(&model) {
                faults.push(format!("model.path: {error}"));
            }
        }
        Err(error) => faults.push(format!("model.path: {error}")),
    }
    if faults.is_empty() {
        println!("{}: no fault", args.config.display());
        return Ok(Ended::Done);
    }
    for fault in &faults {
        eprintln!("{}: {fault}", args.config.display());
    }
    Ok(Ended::Failed)
}

/// `darnet serve`.
pub fn serve(args: &ServeArgs) -> anyhow::Result<Ended> {
    let mut config = load(&args.config)?;
    init_logging(&config.log)?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("listen for signals")?;
    let mut daemon = Daemon::start(&config, None)?;
    let mut running = pinned(&config, &daemon);
    announce(&daemon)?;
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    let watchdog = sd_notify::watchdog_enabled().map(|every| every / 3);
    let mut fed = Instant::now();
    loop {
        std::thread::sleep(TICK);
        let mut stop = false;
        let mut reload = false;
        for signal in signals.pending() {
            match signal {
                SIGHUP => reload = true,
                _ => stop = true,
            }
        }
        if stop {
            events::ServerStopping { cause: "signal" }.emit();
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
            daemon.shutdown(DRAIN);
            return Ok(Ended::Done);
        }
        if reload {
            match load(&args.config) {
                Err(error) => events::ConfigFault { fault: &format!("kept the old configuration: {error:#}") }.emit(),
                Ok(next) => {
                    // Free ports chosen by the system stay the same while the file asks for the same.
                    let mut wanted = next.clone();
                    if next.dicom.bind == config.dicom.bind {
                        wanted.dicom.bind.clone_from(&running.dicom.bind);
                    }
                    if next.web.bind == config.web.bind {
                        wanted.web.bind.clone_from(&running.web.bind);
                    }
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                    daemon.shutdown(DRAIN);
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                    daemon = match Daemon::start(&wanted, None) {
                        Ok(daemon) => {
                            running = pinned(&wanted, &daemon);
                            config = next;
                            daemon
                        }
                        Err(error) => {
                            events::ConfigFault { fault: &format!("went back to the old configuration: {error}") }
                                .emit();
                            Daemon::start(&running, None)?
                        }
                    };
                }
            }
        }
        if !daemon.is_sound() {
            daemon.shutdown(Duration::ZERO);
            bail!("a thread of the pipeline ended; restart the daemon: every acknowledged slice is in the journals");
        }
        if let Some(every) = watchdog
            && fed.elapsed() >= every
        {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            fed = Instant::now();
        }
    }
}

/// The configuration with the addresses that `daemon` listens on.
fn pinned(config: &Config, daemon: &Daemon) -> Config {
    let mut pinned = config.clone();
    pinned.dicom.bind = daemon.dicom_addr().to_string();
    pinned.web.bind = daemon.web_addr().to_string();
    pinned
}

/// The first line on stdout: where the daemon listens.
fn announce(daemon: &Daemon) -> anyhow::Result<()> {
    let line = serde_json::json!({
        "schema": "darnet.serve/1",
        "dicom": daemon.dicom_addr().to_string(),
        "web": daemon.web_addr().to_string(),
        "backend": daemon.backend(),
        "version": env!("CARGO_PKG_VERSION"),
    });
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}
