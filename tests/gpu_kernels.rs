//! GPU kernels on a machine without a GPU: every source compiles for every architecture, and the resampling kernels,
//! compiled as C++ for the processor, give the processor's numbers.

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use darnet::gpu::Source;
use darnet::gpu::nvrtc::{ENVIRONMENT, Nvrtc, Product};
use darnet::model::manifest::{DepthGrid, SliceDirection};
use darnet::resample::alone;
use darnet::resample::cpu::{Window, gather, in_plane};
use darnet::resample::cuda::{self, pack_depth, pack_in_plane};
use darnet::resample::plan::{DepthPlan, InPlanePlan};
use darnet::resample::texture::{CLIP, LEVELS, SUMS, Texture, TextureMeter};
use darnet::volume::geometry::InPlaneOrientation;

/// Compute capabilities that the kernels are for: Turing, Ampere (data centre, workstation), Ada, Hopper, Blackwell.
const ARCHITECTURES: [&str; 6] = ["75", "80", "86", "89", "90", "120"];
/// What a source is compiled for that uses instructions of one architecture alone.
const SPECIFIC: &str = "90a";

/// Every source of the program.
fn sources() -> Vec<Source> {
    let of_backend = darnet::engine::cuda::sources();
    let of_backend = of_backend.into_iter().map(|(name, text, options, arch_specific)| Source {
        name,
        text: text.into(),
        options,
        arch_specific,
    });
    std::iter::once(cuda::source()).chain(of_backend).collect()
}

/// The folder of the compiler's library: named by the environment, or installed beside the test Python.
fn compiler() -> PathBuf {
    if let Some(folder) = std::env::var_os(ENVIRONMENT) {
        return folder.into();
    }
    let find = "import importlib.util as u, os, sys
for name in ('nvidia.cu13', 'nvidia.cuda_nvrtc'):
    try:
        spec = u.find_spec(name)
    except ModuleNotFoundError:
        continue
    if spec:
        print(os.path.join(list(spec.submodule_search_locations)[0], 'lib'))
        break";
    let output = Command::new(common::python()).args(["-c", find]).output().unwrap();
    let folder = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    assert!(
        !folder.is_empty(),
        "NVIDIA's run-time compiler is missing: .venv/bin/python -m pip install -r tests/requirements.txt"
    );
    folder.into()
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let nvrtc = Nvrtc::open_in(&compiler()).unwrap();
    for source in sources() {
        let architectures = if source.arch_specific { &[SPECIFIC][..] } else { &ARCHITECTURES[..] };
        for arch in architectures {
            for product in [Product::Cubin, Product::Ptx] {
                let made = nvrtc
                    .compile(source.name, &source.text, arch, &source.options, product)
                    .unwrap_or_else(|error| panic!("{error}"));
                match product {
                    Product::Cubin => assert_eq!(&made[..4], b"\x7fELF", "{} for {arch}", source.name),
                    Product::Ptx => {
                        let text = String::from_utf8_lossy(&made);
                        assert!(text.contains(&format!(".target sm_{arch}")), "{} for {arch}", source.name);
                    }
                }
            }
        }
    }
}

#[test]
fn a_source_that_does_not_compile_is_an_error_with_the_compilers_words() {
    let nvrtc = Nvrtc::open_in(&compiler()).unwrap();
    let error =
        nvrtc.compile("wrong.cu", "__global__ void f() { no_such_word; }", "80", &[], Product::Ptx).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("wrong.cu") && text.contains("no_such_word"), "{text}");
}

/// The kernels as a program of the processor.
struct Host {
    program: PathBuf,
    _dir: tempfile::TempDir,
}

impl Host {
    fn build() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("kernels");
        common::compile_gpu_host("main.cpp", &program, &[]);
        Self { program, _dir: dir }
    }

    /// Sends the cases, returns what comes back.
    fn run(&self, cases: Vec<u8>) -> Vec<f32> {
        let mut child = Command::new(&self.program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the kernels");
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || stdin.write_all(&cases).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success(), "{}", output.status);
        let (values, rest) = output.stdout.as_chunks::<4>();
        assert!(rest.is_empty());
        values.iter().map(|b| f32::from_ne_bytes(*b)).collect()
    }
}

/// xorshift64*, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn share(&mut self) -> f64 {
        self.below(1 << 30) as f64 / (1u64 << 30) as f64
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 1
    }
}

fn words(cases: &mut Vec<u8>, words: &[u32]) {
    cases.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
}

#[test]
fn the_in_plane_kernel_gives_the_processors_bits() {
    let host = Host::build();
    let mut random = Random(0x0DD5_EED5);
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    let mut table = Vec::new();
    for case in 0..200 {
        let (rows, columns) = (1 + random.below(180) as u32, 1 + random.below(180) as u32);
        let orientation =
            InPlaneOrientation { transpose: random.coin(), flip_rows: random.coin(), flip_columns: random.coin() };
        let out_hw = [1 + random.below(96) as usize, 1 + random.below(96) as usize];
        let shift = if case % 4 == 0 { [random.share() * 60.0 - 30.0, random.share() * 8.0 - 4.0] } else { [0.0, 0.0] };
        let crop = 0.05 + 0.95 * random.share();
        let plan = InPlanePlan::new(rows, columns, orientation, crop, out_hw, shift);
        let window = Window {
            center_hu: (random.share() * 2000.0 - 1000.0) as f32,
            width_hu: 1.0 + (random.share() * 3000.0) as f32,
        };
        let hu: Vec<i16> = (0..rows * columns).map(|_| random.next() as i16 >> (case % 5)).collect();
        let mut plane = vec![f32::NAN; out_hw[0] * out_hw[1]];
        in_plane(&plan, &window, &hu, &mut vec![f32::NAN; plan.scratch_len()], &mut plane);
        pack_in_plane(&plan, &mut table);
        words(&mut cases, &[1, table.len() as u32, hu.len() as u32, plane.len() as u32]);
        words(&mut cases, &[window.low_hu().to_bits(), (1.0 / window.width_hu).to_bits()]);
        // Outputs along stored rows and columns.
        let along = if orientation.transpose { [out_hw[1], out_hw[0]] } else { out_hw };
        words(&mut cases, &along.map(|n| n as u32));
        words(&mut cases, &table);
        cases.extend(hu.iter().flat_map(|v| v.to_ne_bytes()));
        expected.extend(plane);
    }
    let got = host.run(cases);
    assert_eq!(got.len(), expected.len());
    let different = got.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    assert_eq!(different, 0, "of {}", got.len());
}

#[test]
fn the_gather_kernel_gives_the_processors_bits_for_uneven_stacks() {
    let host = Host::build();
    let mut random = Random(0x5EED_0DD5);
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    let mut table = Vec::new();
    for case in 0..120 {
        let slices = 2 + random.below(70) as usize;
        let mut z = random.share() * 500.0 - 250.0;
        let depth_mm: Vec<f64> = (0..slices)
            .map(|_| {
                z += if case % 3 == 0 { 1.25 } else { 0.3 + random.share() * 5.0 };
                z
            })
            .collect();
        let grid = if random.coin() { DepthGrid::Fit } else { DepthGrid::FixedMm(0.4 + random.share() * 6.0) };
        let direction = if random.coin() { SliceDirection::FeetToHead } else { SliceDirection::HeadToFeet };
        let plan = DepthPlan::new(&depth_mm, grid, direction, 1 + random.below(80) as usize).unwrap();
        let area = 1 + random.below(700) as usize;
        let planes: Vec<Vec<f32>> = (0..slices).map(|_| (0..area).map(|_| random.share() as f32).collect()).collect();
        let borrowed: Vec<&[f32]> = planes.iter().map(Vec::as_slice).collect();
        let mut volume = vec![f32::NAN; plan.planes() * area];
        gather(&plan, &borrowed, &mut volume);
        pack_depth(&plan, &mut table);
        words(&mut cases, &[2, table.len() as u32, slices as u32, area as u32, plan.planes() as u32]);
        words(&mut cases, &table);
        cases.extend(planes.iter().flatten().flat_map(|v| v.to_ne_bytes()));
        expected.extend(volume);
    }
    let got = host.run(cases);
    assert_eq!(got.len(), expected.len());
    let different = got.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    assert_eq!(different, 0, "of {}", got.len());
}

#[test]
fn the_texture_kernel_gives_the_processors_sums() {
    let host = Host::build();
    let mut random = Random(0x7E47_5EED);
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for case in 0..60 {
        let dhw = [1 + random.below(9) as usize, 1 + random.below(40) as usize, 1 + random.below(150) as usize];
        let contrast = [1.0, 0.3, 0.01][case % 3];
        let input: Vec<f32> = (0..dhw.iter().product()).map(|_| (contrast * random.share()) as f32).collect();
        let strip = 1 + random.below(20) as u32;
        words(&mut cases, &[3, dhw[0] as u32, dhw[1] as u32, dhw[2] as u32, strip]);
        words(&mut cases, &[LEVELS.to_bits(), CLIP as u32]);
        cases.extend(input.iter().flat_map(|v| v.to_ne_bytes()));
        expected.push(TextureMeter::new(dhw).measure(&input, &alone));
    }
    let got = host.run(cases);
    let sum = |pair: &[f32; 2]| u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32;
    let got: Vec<u64> = got.as_chunks::<2>().0.iter().map(sum).collect();
    let got: Vec<Texture> = got.as_chunks::<SUMS>().0.iter().map(|s| Texture(*s)).collect();
    assert!(expected.iter().any(|t| t.0.iter().all(|s| *s > 0)));
    assert_eq!(got, expected);
}
