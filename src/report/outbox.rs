//! The workers that deliver what lies in the store's outbox.
//!
//! One thread a sink, so that a slow receiver holds up no other. A worker leases one item, tries it, writes the end
//! down, and goes on; with nothing due it sleeps until the next item is, a kick comes, or [`MAX_IDLE`] has passed. What a
//! killed process had in hand is due again at the next start: at least once, under the same idempotency key.
//!
//! Bounds: retries double from `backoff_first_ms` to `backoff_max_ms`, shortened by a jitter of up to half, at most
//! `max_attempts` of them; then the item is dead until a person resends it. With the defaults 1 s, 15 min and 300
//! attempts: 1 + 2 + … + 512 s = 17 min, then 289 waits of 15 min = 72 h, less the jitter's quarter on average: a
//! receiver may be down for a weekend.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};

use super::sink::{Delivery, Sink, SinkError};
use crate::store::{Leased, Store, StoreError, StoreHandle, unix_ms};
use crate::telemetry::events::{
    OutboxObserved, OutboxStoreFailed, PanicContained, SinkDead, SinkDelivered, SinkFailed,
};

/// Longest sleep of a worker: bounds the harm of a clock that jumps and of a lost wake-up.
pub const MAX_IDLE: Duration = Duration::from_secs(5);

/// Wait after a fault of the store.
const STORE_FAULT_WAIT: Duration = Duration::from_secs(2);

/// The present time, replaceable in tests.
pub trait Clock: Send + Sync {
    /// Unix time, ms.
    fn now_ms(&self) -> i64;
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> i64 {
        unix_ms()
    }
}

/// The `[outbox]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutboxConfig {
    /// Attempts before an item is dead.
    pub max_attempts: u32,
    /// Wait after the first failed attempt, ms.
    pub backoff_first_ms: u64,
    /// Longest wait between attempts, ms.
    pub backoff_max_ms: u64,
    /// Seed of the jitter.
    pub jitter_seed: u64,
}

impl Default for OutboxConfig {
    fn default() -> Self {
        Self { max_attempts: 300, backoff_first_ms: 1_000, backoff_max_ms: 900_000, jitter_seed: 0 }
    }
}

impl OutboxConfig {
    /// Every fault of the values.
    pub fn validate(&self) -> Vec<String> {
        const DAY_MS: u64 = 86_400_000;
        let mut faults = Vec::new();
        if !(1..=100_000).contains(&self.max_attempts) {
            faults.push(format!("max_attempts: expected 1 to 100000, got {}", self.max_attempts));
        }
        if !(1..=DAY_MS).contains(&self.backoff_max_ms) {
            faults.push(format!("backoff_max_ms: expected 1 to {DAY_MS}, got {}", self.backoff_max_ms));
        }
        if !(1..=self.backoff_max_ms.max(1)).contains(&self.backoff_first_ms) {
            faults.push(format!("backoff_first_ms: expected 1 to backoff_max_ms, got {}", self.backoff_first_ms));
        }
        faults
    }

    /// Wait after failed attempt number `attempt` (from 1) of item `id`: in (d/2, d] for
    /// d = min(first * 2^(attempt - 1), max). The same seed, item and attempt give the same wait.
    pub fn backoff_ms(&self, id: i64, attempt: u32) -> u64 {
        let doublings = attempt.saturating_sub(1).min(63);
        let full = self.backoff_first_ms.saturating_mul(1 << doublings).min(self.backoff_max_ms);
        let half = full / 2;
        let random = mix(self.jitter_seed ^ mix(id.cast_unsigned()) ^ u64::from(attempt));
        full - if half == 0 { 0 } else { random % half }
    }
}

/// The output function of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Why the outbox cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The configuration; every fault.
    #[error("start the outbox: {}", .0.join("; "))]
    Config(Vec<String>),
    /// Two sinks have one name.
    #[error("start the outbox: two sinks have the same name")]
    SameName,
    /// The store.
    #[error("start the outbox: {0}")]
    Store(#[from] StoreError),
    /// No thread.
    #[error("start the outbox: {0}")]
    Thread(std::io::Error),
}

struct WorkerHandle {
    kick: Sender<()>,
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

/// The running workers.
pub struct Outbox {
    workers: Vec<WorkerHandle>,
    names: Vec<String>,
    stop: Arc<AtomicBool>,
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("sinks", &self.names).finish_non_exhaustive()
    }
}

impl Outbox {
    /// Recovers what an earlier process left, makes items of sinks no longer configured dead, and starts a worker a
    /// sink. One outbox a store, in one process.
    pub fn start(
        store: &Store,
        sinks: Vec<Box<dyn Sink>>,
        config: &OutboxConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OutboxError> {
        let faults = config.validate();
        if !faults.is_empty() {
            return Err(OutboxError::Config(faults));
        }
        let names: Vec<String> = sinks.iter().map(|s| s.name().to_owned()).collect();
        if names.iter().enumerate().any(|(i, n)| names[..i].contains(n)) {
            return Err(OutboxError::SameName);
        }
        let mut handle = store.handle()?;
        handle.recover_leases(clock.now_ms())?;
        handle.bury_unknown_sinks(&names.iter().map(String::as_str).collect::<Vec<_>>(), clock.now_ms())?;
        observe(&handle)?;
        let mut outbox = Self { workers: Vec::new(), names, stop: Arc::new(AtomicBool::new(false)) };
        for sink in sinks {
            // One pending kick is enough: a worker looks at everything that is due when it wakes.
            let (kick, kicked) = bounded(1);
            let (finished, done) = bounded(0);
            let mut worker = Worker {
                store: store.handle()?,
                sink,
                config: config.clone(),
                clock: Arc::clone(&clock),
                kicked,
                stop: Arc::clone(&outbox.stop),
            };
            let thread = std::thread::Builder::new()
                .name("outbox".into())
                .spawn(move || {
                    worker.run();
                    drop(finished);
                })
                .map_err(OutboxError::Thread)?;
            outbox.workers.push(WorkerHandle { kick, done, thread });
        }
        Ok(outbox)
    }

    /// Names of the sinks, for the drafts of an outcome.
    pub fn sinks(&self) -> &[String] {
        &self.names
    }

    /// Says that there are new items. Never blocks.
    pub fn kick(&self) {
        for worker in &self.workers {
            // Full: it will wake anyway.
            let _ = worker.kick.try_send(());
        }
    }

    /// Stops after the attempts in hand, waiting for them at most `wait`. True if every worker ended. An attempt not
    /// waited for is repeated after the next start.
    pub fn shutdown(mut self, wait: Duration) -> bool {
        self.stop.store(true, Ordering::Release);
        self.kick();
        let until = Instant::now() + wait;
        let mut all = true;
        for worker in self.workers.drain(..) {
            // The worker drops its end when it is done.
            match worker.done.recv_deadline(until) {
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => all = false,
                _ => all &= worker.thread.join().is_ok(),
            }
        }
        all
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }
}

fn observe(store: &StoreHandle) -> Result<(), StoreError> {
    let c = store.outbox_counts()?;
    OutboxObserved { pending: c.pending, sending: c.sending, delivered: c.delivered, dead: c.dead }.emit();
    Ok(())
}

struct Worker {
    store: StoreHandle,
    sink: Box<dyn Sink>,
    config: OutboxConfig,
    clock: Arc<dyn Clock>,
    kicked: Receiver<()>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Acquire) {
            let wait = match self.work() {
                Ok(wait) => wait,
                Err(e) => {
                    OutboxStoreFailed { detail: &e.to_string() }.emit();
                    STORE_FAULT_WAIT
                }
            };
            if self.kicked.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    /// Delivers what is due; returns how long to sleep.
    fn work(&mut self) -> Result<Duration, StoreError> {
        loop {
            if self.stop.load(Ordering::Acquire) {
                return Ok(Duration::ZERO);
            }
            let Some(item) = self.store.lease_due_for(self.sink.name(), self.clock.now_ms(), 1)?.pop() else { break };
            self.attempt(&item)?;
        }
        observe(&self.store)?;
        let Some(due_ms) = self.store.next_due_for(self.sink.name())? else { return Ok(MAX_IDLE) };
        let wait_ms = u64::try_from(due_ms.saturating_sub(self.clock.now_ms())).unwrap_or(0).max(1);
        Ok(Duration::from_millis(wait_ms).min(MAX_IDLE))
    }

    fn attempt(&mut self, item: &Leased) -> Result<(), StoreError> {
        let delivery = Delivery {
            result_uid: &item.result_uid,
            edition: item.edition,
            payload: &item.payload,
            attempt: item.attempt,
            now_ms: self.clock.now_ms(),
        };
        let began = Instant::now();
        let sink = &self.sink;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| sink.deliver(&delivery)))
            .unwrap_or_else(|_| {
                PanicContained { stage: "sink", series: None }.emit();
                Err(SinkError::retry("the sink panicked"))
            });
        let (name, attempts, now_ms) = (self.sink.name(), item.attempt, self.clock.now_ms());
        match outcome {
            Ok(()) => {
                if self.store.mark_delivered(item, now_ms)? {
                    SinkDelivered { sink: name, item: item.id, attempts, took: began.elapsed() }.emit();
                }
            }
            Err(e) if e.retryable && item.attempt_since_resend < self.config.max_attempts => {
                let asked_ms = e.retry_after_ms.unwrap_or(0);
                let wait_ms = self.config.backoff_ms(item.id, item.attempt_since_resend).max(asked_ms);
                let next_ms = now_ms.saturating_add(i64::try_from(wait_ms).unwrap_or(i64::MAX));
                if self.store.mark_failed(item, next_ms, &e.detail)? {
                    let retry_in = Duration::from_millis(wait_ms);
                    SinkFailed { sink: name, item: item.id, attempts, detail: &e.detail, retry_in }.emit();
                }
            }
            Err(e) => {
                if self.store.mark_dead(item, now_ms, &e.detail)? {
                    SinkDead { sink: name, item: item.id, attempts, detail: &e.detail }.emit();
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn defaults_hold_out_a_weekend() {
        let c = OutboxConfig::default();
        assert!(c.validate().is_empty());
        let total_ms: u64 = (1..c.max_attempts).map(|a| c.backoff_ms(7, a)).sum();
        assert!((48 * 3_600_000..=73 * 3_600_000).contains(&total_ms), "{} h", total_ms / 3_600_000);
    }

    #[test]
    fn faults_of_the_configuration_are_named() {
        let c: OutboxConfig =
            toml::from_str("max_attempts = 0\nbackoff_first_ms = 5000\nbackoff_max_ms = 1000").unwrap();
        assert_eq!(c.validate().len(), 2, "{:?}", c.validate());
        assert!(toml::from_str::<OutboxConfig>("retries = 3").is_err());
    }

    proptest! {
        #[test]
        fn backoff_stays_in_its_bounds_and_repeats(first in 1u64..10_000, factor in 1u64..1000, seed: u64, id: i64, attempt: u32) {
            let c = OutboxConfig { max_attempts: 9, backoff_first_ms: first, backoff_max_ms: first * factor, jitter_seed: seed };
            let wait = c.backoff_ms(id, attempt);
            let full = (u128::from(first) << attempt.saturating_sub(1).min(63)).min(u128::from(first * factor)) as u64;
            prop_assert!(wait <= full && wait >= full - full / 2 && wait >= 1, "{wait} of {full}");
            prop_assert_eq!(wait, c.backoff_ms(id, attempt));
        }
    }
}
