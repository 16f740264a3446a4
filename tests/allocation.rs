//! A run of the network allocates nothing after a session's first: a counting allocator, alone in its process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use darnet::engine::{BackendKind, CancelToken, EngineOptions, Inference, prepare};
use darnet::model::manifest::Architecture;
use darnet::model::{Model, synthetic};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is handed to the system's allocator as it is.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_run_and_work_ahead_allocate_nothing_in_the_steady_state() {
    let full_stages = Architecture { base_width: 16, input_dhw: [16, 64, 64], ..Architecture::full() };
    let odd = Architecture { base_width: 5, input_dhw: [7, 33, 30], ..Architecture::full() };
    let models = [
        Model::embedded().unwrap(),
        Model::synthetic("stages", &full_stages, 1).unwrap(),
        Model::synthetic("odd", &odd, 2).unwrap(),
    ];
    for model in models {
        for threads in [1, 2, 3] {
            let options = EngineOptions { threads, ..EngineOptions::default() };
            let backend = prepare(BackendKind::Cpu, &model, &options).unwrap();
            let mut session = backend.session().unwrap();
            let dhw = model.manifest.architecture.input_dhw;
            let inputs = [synthetic::volume(dhw, 1), synthetic::volume(dhw, 2)];
            let ready: Vec<bool> = (0..dhw[0]).map(|z| z < dhw[0] / 2).collect();
            let cancel = CancelToken::new();
            let mut out = Inference::default();
            session.run(&inputs[0], &cancel, &mut out).unwrap();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for input in inputs.iter().cycle().take(6) {
                session.advance(input, &ready, &cancel).unwrap();
                session.run(input, &cancel, &mut out).unwrap();
            }
            let after = ALLOCATIONS.load(Ordering::Relaxed);
            assert_eq!(after - before, 0, "{} with {threads} threads", model.manifest.id);
        }
    }
    // the counter counts
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    drop(std::hint::black_box(vec![1_u8; 100]));
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > before);
}
