//! A fixed pool of threads that share the items of one piece of work at a time.
//!
//! [`Pool::run`] hands out item numbers from a counter to the pool's threads and the calling one, and returns when all
//! are done. It allocates nothing, so that a run of the network in the steady state does not either. Between two pieces
//! of work a thread spins for a moment (the pieces of one inference follow each other within microseconds), then sleeps.
//!
//! Which thread does which item is left to chance: items must write to places of their own and must not depend on each
//! other. Deliberately absent: nesting, several pieces at a time (callers wait for each other), stealing.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Rounds a thread looks for new work before it sleeps; the pieces of one inference follow each other sooner.
const SPINS: usize = 2_000;
/// Rounds between two offers of the processor to others while waiting for the last items.
const SPINS_BEFORE_YIELD: usize = 200;

/// What is done with an item: its number, then the number of the thread, below [`Pool::threads`].
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Job {
    work: *const Work<'static>,
    items: usize,
}

struct Shared {
    /// Written by the caller while no thread works, read by threads between the change of `generation` and `pending`.
    job: UnsafeCell<Job>,
    /// Counts pieces of work; a change tells the threads to look at `job`.
    generation: AtomicUsize,
    /// The next item.
    next: AtomicUsize,
    /// Threads that have not finished the present piece.
    pending: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the caller that holds the pool's lock, before `generation` changes (release), and
// read only by threads that have seen that change (acquire) and have not yet lowered `pending`, for which the caller
// waits before it returns: never written while read. The work it points to is `Sync` and outlives that wait.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is only followed under that protocol.
unsafe impl Send for Shared {}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes items until there are none.
    fn work(&self, thread: usize) {
        // SAFETY: see `Sync` above: the job is not written while this runs, and the closure is alive.
        let (work, items) = unsafe {
            let job = &*self.job.get();
            (&*job.work, job.items)
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    return;
                }
                work(item, thread);
            }
        }));
        if let Err(payload) = result {
            self.next.store(items, Ordering::Relaxed);
            *locked(&self.panic) = Some(payload);
        }
    }

    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            let mut generation = self.generation.load(Ordering::Acquire);
            while generation == seen {
                if spins < SPINS {
                    spins += 1;
                    std::hint::spin_loop();
                } else {
                    let guard = locked(&self.sleepers);
                    if self.generation.load(Ordering::Acquire) == seen {
                        drop(self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner));
                    }
                }
                generation = self.generation.load(Ordering::Acquire);
            }
            seen = generation;
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            self.work(thread);
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Threads that work for one caller at a time.
pub struct Pool {
    shared: Arc<Shared>,
    caller: Mutex<()>,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads - 1` threads; the caller of [`run`](Self::run) is the remaining one. `started` runs first on each.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(threads: usize, started: impl Fn() + Clone + Send + 'static) -> std::io::Result<Self> {
        let work: &'static Work<'static> = &|_, _| {};
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(Job { work, items: 0 }),
            generation: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleepers: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self { shared, caller: Mutex::new(()), handles: Vec::with_capacity(threads.saturating_sub(1)) };
        for thread in 1..threads.max(1) {
            let (shared, started) = (Arc::clone(&pool.shared), started.clone());
            // On an error the pool is dropped, which ends the threads that have started.
            let handle = std::thread::Builder::new().name(format!("darnet-cpu-{thread}")).spawn(move || {
                started();
                shared.serve(thread);
            })?;
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Threads that share the work, the caller among them.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    fn announce(&self) {
        self.shared.generation.fetch_add(1, Ordering::Release);
        // Whoever has found nothing new holds this lock until it sleeps: the change is seen, or the call wakes it.
        drop(locked(&self.shared.sleepers));
        self.shared.wake.notify_all();
    }

    /// Calls `work(item, thread)` once for each item below `items`. Waits while another caller's work is under way.
    ///
    /// # Panics
    /// With the panic of `work`, after all threads have stopped.
    pub fn run(&self, items: usize, work: &Work<'_>) {
        if items == 0 {
            return;
        }
        let _caller = locked(&self.caller);
        if self.handles.is_empty() || items == 1 {
            for item in 0..items {
                work(item, 0);
            }
            return;
        }
        let shared = &self.shared;
        // SAFETY: only the lifetime is changed. The closure outlives its use: this function returns, or unwinds, only
        // after `pending` is zero, and no thread follows the pointer after that. `work` on this thread cannot unwind
        // past the wait: `Shared::work` catches it.
        let work: *const Work<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(work)) };
        // SAFETY: no thread reads the job now: `pending` was zero at the end of the last call, and the lock is held.
        unsafe { *shared.job.get() = Job { work, items } };
        shared.next.store(0, Ordering::Relaxed);
        shared.pending.store(self.handles.len(), Ordering::Relaxed);
        self.announce();
        shared.work(0);
        let mut spins = 0;
        while shared.pending.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins % SPINS_BEFORE_YIELD == 0 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if let Some(payload) = locked(&shared.panic).take() {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.announce();
        for handle in self.handles.drain(..) {
            // Its panics were handed to the caller of `run`.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_item_is_done_once_by_some_thread() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads, || {}).unwrap();
            for items in [0, 1, 2, 7, 1000] {
                let done: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, &|item, thread| {
                    assert!(thread < threads);
                    done[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_pieces_follow_each_other() {
        let pool = Pool::new(2, || {}).unwrap();
        let sum = AtomicU64::new(0);
        for round in 0..20_000 {
            pool.run(3, &|item, _| {
                sum.fetch_add(item as u64, Ordering::Relaxed);
            });
            if round % 5000 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 60_000);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3, || {}).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|item, _| assert!(item != 57, "item 57"));
        }));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        pool.run(100, &|_, _| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn callers_wait_for_each_other() {
        let pool = Pool::new(2, || {}).unwrap();
        let busy = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, &|_, _| {
                            busy.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(busy.load(Ordering::Relaxed), 4 * 200 * 4);
    }
}
