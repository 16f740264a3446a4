//! The cpu backend against the reference on many shapes, and its work ahead.

use darnet::engine::cpu::dispatch::Isa;
use darnet::engine::{Backend, BackendKind, CancelToken, EngineError, EngineOptions, Inference, prepare};
use darnet::model::Model;
use darnet::model::manifest::{Architecture, AttentionOrder};
use darnet::model::synthetic::{self, Stream};
use proptest::prelude::*;

fn run(backend: &dyn Backend, input: &[f32]) -> Inference {
    let mut out = Inference::default();
    backend.session().unwrap().run(input, &CancelToken::new(), &mut out).unwrap();
    out
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn cpu(model: &Model, threads: usize, isa: Isa) -> Box<dyn Backend> {
    let options = EngineOptions { threads, isa: Some(isa), ..EngineOptions::default() };
    prepare(BackendKind::Cpu, model, &options).unwrap()
}

/// The design's tolerance between cpu and reference.
fn assert_agree(got: &Inference, expected: &Inference, what: &str) {
    let scale = expected.logits.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
    let logits = largest(&got.logits, &expected.logits);
    assert!(logits <= 1e-3 * scale, "{what}: logits differ by {logits}, scale {scale}");
    let scores = largest(&got.scores, &expected.scores);
    assert!(scores <= 1e-4, "{what}: probabilities differ by {scores}");
    let scale = expected.feature_map.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
    let map = largest(&got.feature_map, &expected.feature_map);
    assert!(map <= 1e-3 * scale, "{what}: feature maps differ by {map}, scale {scale}");
}

/// Weights as training leaves them: small kernels with a heavy tail, batch normalisation with wide scales and running
/// statistics, some channels nearly dead.
fn trained_like(architecture: &Architecture, seed: u64) -> Model {
    let mut model = Model::synthetic("trained-like", architecture, seed).unwrap();
    model.weights = model.weights.with_values(|name, values| {
        let uniform = Stream::new(seed ^ 0x5eed, name);
        for (i, v) in values.iter_mut().enumerate() {
            let u = uniform.uniform(i as u64);
            if name.ends_with("running_var") {
                *v = (1e-3 * 10_f64.powf(4.0 * u)) as f32;
            } else if name.contains("bn") && name.ends_with("weight") {
                *v *= if u < 0.1 { 1e-3 } else { (0.3 + u) as f32 };
            } else if name.contains("conv") {
                *v *= if u < 0.01 { 6.0 } else { 0.5 };
            }
        }
    });
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn cpu_agrees_with_the_reference_on_odd_shapes(
        width in 1_usize..20, d in 1_usize..11, h in 8_usize..40, w in 8_usize..40, ca: bool, da: bool, channel_first: bool,
        trained: bool, seed in 0_u64..1000,
    ) {
        let architecture = Architecture {
            base_width: width,
            input_dhw: [d, h, w],
            channel_attention: ca,
            depth_attention: da,
            attention_order: if channel_first { AttentionOrder::ChannelFirst } else { AttentionOrder::DepthFirst },
            ..Architecture::full()
        };
        let model = if trained { trained_like(&architecture, seed) } else { Model::synthetic("t", &architecture, seed).unwrap() };
        let input = synthetic::volume(architecture.input_dhw, seed);
        let reference = prepare(BackendKind::Reference, &model, &EngineOptions::default()).unwrap();
        let expected = run(&*reference, &input);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let got = run(&*cpu(&model, 1, isa), &input);
            assert_agree(&got, &expected, &format!("{isa} {architecture:?}"));
            prop_assert!(got == run(&*cpu(&model, 3, isa), &input), "threads change no bit");
        }
    }

    /// Any planes in any order, wrong guesses among them, a cancelled step, another series before: the same bits.
    #[test]
    fn work_ahead_changes_no_bit(
        d in 1_usize..24, steps in prop::collection::vec((0_u64..100, any::<bool>(), any::<bool>()), 0..6), seed in 0_u64..1000,
    ) {
        let architecture = Architecture { base_width: 6, input_dhw: [d, 17, 20], ..Architecture::full() };
        let model = Model::synthetic("t", &architecture, 3).unwrap();
        let input = synthetic::volume(architecture.input_dhw, seed);
        let backend = cpu(&model, 2, Isa::best());
        let expected = run(&*backend, &input);
        let mut session = backend.session().unwrap();
        let mut out = Inference::default();
        for (step, (pick, wrong, cancelled)) in steps.into_iter().enumerate() {
            let mut guess = input.clone();
            let ready: Vec<bool> = (0..d).map(|z| Stream::new(pick, "ready").uniform(z as u64) < 0.6).collect();
            if wrong {
                let plane = (pick as usize * 7) % d;
                guess[plane * 17 * 20 + 5] += 0.25;
            }
            let cancel = CancelToken::new();
            if cancelled {
                cancel.cancel();
            }
            match session.advance(&guess, &ready, &cancel) {
                // a set token is only seen where there is something to do
                Ok(()) => {}
                Err(error) => prop_assert!(cancelled && error == EngineError::Cancelled),
            }
            if step == 3 {
                session.run(&synthetic::volume(architecture.input_dhw, seed + 1), &CancelToken::new(), &mut out).unwrap();
            }
        }
        session.run(&input, &CancelToken::new(), &mut out).unwrap();
        prop_assert!(out == expected);
        session.run(&input, &CancelToken::new(), &mut out).unwrap();
        prop_assert!(out == expected);
    }
}

#[test]
fn planes_that_are_ready_are_not_computed_again() {
    let architecture = Architecture { base_width: 4, input_dhw: [32, 20, 20], ..Architecture::full() };
    let model = Model::synthetic("t", &architecture, 1).unwrap();
    let backend = cpu(&model, 2, Isa::best());
    let input = synthetic::volume(architecture.input_dhw, 1);
    let cancel = CancelToken::new();
    let mut session = backend.session().unwrap();
    let mut out = Inference::default();
    let mut share = |ready: &[bool], input: &[f32], changed: Option<usize>| {
        session.advance(input, ready, &cancel).unwrap();
        let mut last = input.to_vec();
        if let Some(plane) = changed {
            last[plane * 400 + 3] += 0.5;
        }
        session.run(&last, &cancel, &mut out).unwrap();
        let reuse = session.reuse();
        assert!(reuse.reused_macs <= reuse.ahead_macs && reuse.ahead_macs < reuse.total_macs);
        reuse.share()
    };
    assert_eq!(share(&[false; 32], &input, None), 0.0);
    assert_eq!(share(&[true; 32], &input, None), 1.0);
    // planes 0 to 29 known: stem to 28; conv1 reads one more plane: tiles of planes 0 to 27; conv2 to 23
    let ready: Vec<bool> = (0..32).map(|z| z < 30).collect();
    let known = share(&ready, &input, None);
    assert!((0.75..0.9).contains(&known), "{known}");
    // one plane of 32 differs: stem 15 to 17, conv1 tiles 3 and 4, conv2 tiles 2 to 5
    let changed = share(&[true; 32], &input, Some(16));
    assert!((0.5..0.8).contains(&changed), "{changed}");
    // nothing of an earlier series is taken for this one's
    assert_eq!(share(&[false; 32], &synthetic::volume([32, 20, 20], 2), None), 0.0);
}

#[test]
fn a_wrong_length_is_a_typed_error() {
    let architecture = Architecture { base_width: 4, input_dhw: [4, 16, 16], ..Architecture::full() };
    let model = Model::synthetic("t", &architecture, 1).unwrap();
    let mut session = cpu(&model, 1, Isa::Scalar).session().unwrap();
    let input = synthetic::volume([4, 16, 16], 1);
    let cancel = CancelToken::new();
    assert!(matches!(session.advance(&input[1..], &[true; 4], &cancel), Err(EngineError::InputLength { .. })));
    assert!(matches!(session.advance(&input, &[true; 3], &cancel), Err(EngineError::InputLength { .. })));
}
