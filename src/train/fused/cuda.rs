//! `kernels.cu` on an NVIDIA GPU: compiled at start-up by NVIDIA's run-time compiler, started through the driver.
//!
//! Input: libtorch's tensors. Output: libtorch's tensors. `gpu` opens driver and compiler and shares libtorch's context.
//! Kernels run on the default stream, where libtorch computes, so that no order is left to chance.
//!
//! Invariants: every tensor that a kernel gets is checked for device, number format, memory order and length, so that no
//! kernel reads or writes beyond one.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::{Kernels, Norm, NormGradient, Planes, Shortcut};
use crate::gpu::{Function, Gpu, GpuError, Source, Stream};
use crate::model::architecture::BN_EPSILON;
use crate::train::TrainError;
use crate::train::net::BN_MOMENTUM;
use crate::train::optimiser::{BETA1, BETA2, EPSILON};

const SOURCE: &str = include_str!("kernels.cu");
/// Threads of a block; `kernels.cu` has shared memory for as many.
pub const THREADS: usize = 256;
/// Blocks of the optimiser's kernel: enough for every GPU, each thread takes several numbers.
const ADAM_BLOCKS: i64 = 2048;

const KERNELS: [&str; 11] = [
    "sums_forward",
    "affine_relu",
    "block_out",
    "sums_relu",
    "grad_relu",
    "sums_block",
    "grad_block",
    "bn_coefficients",
    "gate_gradient",
    "bn_gradients",
    "adam",
];

/// An argument of a kernel: eight bytes, of which a number takes the first.
#[derive(Clone, Copy)]
struct Arg([u8; 8]);

impl From<i32> for Arg {
    fn from(v: i32) -> Self {
        let [a, b, c, d] = v.to_ne_bytes();
        Self([a, b, c, d, 0, 0, 0, 0])
    }
}
impl From<f32> for Arg {
    fn from(v: f32) -> Self {
        Self::from(i32::from_ne_bytes(v.to_ne_bytes()))
    }
}
impl From<i64> for Arg {
    fn from(v: i64) -> Self {
        Self(v.to_ne_bytes())
    }
}

/// Where the kernels are.
enum Loaded {
    /// On a GPU, started on the default stream.
    Gpu { functions: HashMap<&'static str, Function>, stream: Stream },
    /// In a library for the processor, which its tests make.
    #[cfg(test)]
    Host { functions: HashMap<&'static str, usize>, launch: HostLaunch, _library: libloading::Library },
}

/// `host_launch` of `emulate.h`: a kernel, its grid and its block, shared memory, stream, arguments, extras.
#[cfg(test)]
type HostLaunch = unsafe extern "C" fn(
    *mut c_void,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    *mut c_void,
    *mut *mut c_void,
    *mut *mut c_void,
) -> i32;

/// The kernels of one GPU in one number format.
pub struct Cuda {
    device: Device,
    kind: Kind,
    loaded: Loaded,
}

impl Cuda {
    /// Compiles and loads the kernels for GPU `index`, for activations of `kind`.
    ///
    /// # Errors
    /// What is absent, in words.
    pub fn open(index: usize, kind: Kind) -> Result<Self, String> {
        let device = Device::Cuda(index);
        // libtorch makes the device's primary context, which `Gpu` shares.
        let _ = Tensor::f_zeros([1], (Kind::Float, device)).map_err(|e| e.to_string())?;
        let kind_option = if kind == Kind::BFloat16 { "-DTYPE=1" } else { "-DTYPE=0" };
        let source = Source {
            name: "kernels.cu",
            text: SOURCE.into(),
            options: vec![kind_option.to_owned()],
            arch_specific: false,
        };
        let load = || -> Result<_, GpuError> {
            let gpu = Gpu::open(index)?;
            let module = gpu.load(&source)?;
            let functions = KERNELS.iter().map(|name| Ok((*name, module.function(name, 0)?)));
            Ok((functions.collect::<Result<_, GpuError>>()?, Stream::default_of(&gpu)))
        };
        let (functions, stream) = load().map_err(|e| e.to_string())?;
        Ok(Self { device, kind, loaded: Loaded::Gpu { functions, stream } })
    }

    fn fault(what: impl Into<String>) -> TrainError {
        TrainError::Torch(what.into())
    }

    /// Starts a kernel on the default stream.
    fn start(&self, name: &str, grid: [i64; 2], args: &[Arg]) -> Result<(), TrainError> {
        let [x, y] = grid.map(|n| u32::try_from(n).ok().filter(|n| *n > 0));
        let (Some(x), Some(y)) = (x, y.filter(|y| *y <= 65_535)) else {
            return Err(Self::fault(format!("kernel {name}: a grid of {grid:?}")));
        };
        let mut pointers: Vec<*mut c_void> = args.iter().map(|a| a.0.as_ptr().cast_mut().cast()).collect();
        let absent = || Self::fault(format!("no kernel {name}"));
        match &self.loaded {
            Loaded::Gpu { functions, stream } => {
                let function = functions.get(name).ok_or_else(absent)?;
                // SAFETY: the function is one of this GPU's module; the arguments are as many and of the types that
                // `kernels.cu` declares (each caller below states them in its order), and the pointers among them were
                // checked by `activation` and `numbers` to be tensors of this device with the length that the kernel
                // touches. libtorch frees a tensor's memory in the order of the same stream.
                unsafe { stream.launch(function, [x, y, 1], [THREADS as u32, 1, 1], 0, &mut pointers) }
                    .map_err(|e| Self::fault(format!("kernel {name}: {e}")))
            }
            #[cfg(test)]
            Loaded::Host { functions, launch, .. } => {
                let function = *functions.get(name).ok_or_else(absent)? as *mut c_void;
                let (stream, extras) = (std::ptr::null_mut(), std::ptr::null_mut());
                // SAFETY: as above; the library stays loaded as long as `self`, and the call ends when the kernel has.
                let code = unsafe {
                    launch(function, x, y, 1, THREADS as u32, 1, 1, 0, stream, pointers.as_mut_ptr(), extras)
                };
                if code == 0 { Ok(()) } else { Err(Self::fault(format!("kernel {name}: {code}"))) }
            }
        }
    }

    /// The address of an activation of the shape of `at`, channels last.
    fn activation(&self, t: &Tensor, at: Planes) -> Result<Arg, TrainError> {
        let inner = t.f_permute([0, 2, 3, 4, 1])?;
        let same = Planes::of(t)?;
        let fits = (same.planes, same.area, same.channels) == (at.planes, at.area, at.channels);
        if t.kind() != self.kind || t.device() != self.device || !inner.is_contiguous() || !fits {
            return Err(Self::fault(format!(
                "an activation {:?} of {:?} where {at:?} is expected",
                t.size(),
                t.kind()
            )));
        }
        // Sixteen bytes are loaded at once.
        let address = t.data_ptr() as i64;
        if address % 16 == 0 { Ok(address.into()) } else { Err(Self::fault("an activation that is not aligned")) }
    }

    fn optional(&self, t: Option<&Tensor>, at: Planes) -> Result<Arg, TrainError> {
        t.map_or(Ok(Arg::from(0i64)), |t| self.activation(t, at))
    }

    /// The address of `len` f32 numbers.
    fn numbers(&self, t: &Tensor, len: i64) -> Result<Arg, TrainError> {
        if t.kind() != Kind::Float || t.device() != self.device || !t.is_contiguous() || t.numel() as i64 != len {
            return Err(Self::fault(format!("numbers {:?} of {:?} where {len} are expected", t.size(), t.kind())));
        }
        Ok((t.data_ptr() as i64).into())
    }

    fn some_numbers(&self, t: Option<&Tensor>, len: i64) -> Result<Arg, TrainError> {
        t.map_or(Ok(Arg::from(0i64)), |t| self.numbers(t, len))
    }

    fn like(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let (n, c, d, h, w) = x.size5()?;
        Ok(Tensor::f_empty([n, d, h, w, c], (self.kind, self.device))?.f_permute([0, 4, 1, 2, 3])?)
    }

    fn empty(&self, shape: &[i64]) -> Result<Tensor, TrainError> {
        Ok(Tensor::f_empty(shape, (Kind::Float, self.device))?)
    }

    fn size(at: Planes) -> Result<[Arg; 2], TrainError> {
        let int = |v: i64| i32::try_from(v).map_err(|_| Self::fault("a plane too large for the kernels"));
        Ok([int(at.area)?.into(), int(at.channels)?.into()])
    }
}

fn int(v: i64) -> Result<Arg, TrainError> {
    Ok(i32::try_from(v).map_err(|_| Cuda::fault("a number too large for the kernels"))?.into())
}

impl Kernels for Cuda {
    fn sums_forward(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let at = Planes::of(x)?;
        let out = self.empty(&[at.parts, 2, at.planes, at.channels])?;
        let [area, channels] = Self::size(at)?;
        let args =
            [self.activation(x, at)?, self.numbers(&out, 2 * at.parts * at.planes * at.channels)?, area, channels];
        self.start("sums_forward", [at.parts, at.planes], &args)?;
        Ok(out)
    }

    fn coefficients(
        &self,
        sums: &Tensor,
        at: Planes,
        bn: [&Tensor; 4],
        means: bool,
    ) -> Result<(Norm, Option<Tensor>), TrainError> {
        let (c, all) = (at.channels, at.planes * at.channels);
        let [area, channels] = Self::size(at)?;
        let norm = Norm {
            a: self.empty(&[c])?,
            b: self.empty(&[c])?,
            mean: self.empty(&[c])?,
            invstd: self.empty(&[c])?,
            plane_x: self.empty(&[at.planes, c])?,
        };
        let plane_mean = if means { Some(self.empty(&[at.planes, c])?) } else { None };
        let args = [
            self.numbers(sums, 2 * at.parts * all)?,
            int(at.parts)?,
            int(at.planes)?,
            area,
            channels,
            self.numbers(bn[0], c)?,
            self.numbers(bn[1], c)?,
            self.numbers(bn[2], c)?,
            self.numbers(bn[3], c)?,
            (BN_MOMENTUM as f32).into(),
            BN_EPSILON.into(),
            self.numbers(&norm.a, c)?,
            self.numbers(&norm.b, c)?,
            self.numbers(&norm.mean, c)?,
            self.numbers(&norm.invstd, c)?,
            self.numbers(&norm.plane_x, all)?,
            self.some_numbers(plane_mean.as_ref(), all)?,
        ];
        self.start("bn_coefficients", [(c + 31) / 32, 1], &args)?;
        Ok((norm, plane_mean))
    }

    fn affine_relu(&self, x: &Tensor, norm: &Norm) -> Result<Tensor, TrainError> {
        let at = Planes::of(x)?;
        let y = self.like(x)?;
        let [area, channels] = Self::size(at)?;
        let c = at.channels;
        let args = [
            self.activation(x, at)?,
            self.numbers(&norm.a, c)?,
            self.numbers(&norm.b, c)?,
            self.activation(&y, at)?,
            area,
            channels,
        ];
        self.start("affine_relu", [at.parts, at.planes], &args)?;
        Ok(y)
    }

    fn block_out(
        &self,
        x: &Tensor,
        norm: &Norm,
        scale: Option<&Tensor>,
        shortcut: &Tensor,
        strided: Option<&Norm>,
    ) -> Result<Tensor, TrainError> {
        let at = Planes::of(x)?;
        let y = self.like(x)?;
        let [area, channels] = Self::size(at)?;
        let c = at.channels;
        let args = [
            self.activation(x, at)?,
            self.numbers(&norm.a, c)?,
            self.numbers(&norm.b, c)?,
            self.some_numbers(scale, at.planes * c)?,
            self.activation(shortcut, at)?,
            self.some_numbers(strided.map(|n| &n.a), c)?,
            self.some_numbers(strided.map(|n| &n.b), c)?,
            self.activation(&y, at)?,
            area,
            channels,
        ];
        self.start("block_out", [at.parts, at.planes], &args)?;
        Ok(y)
    }

    fn sums_relu(&self, g: &Tensor, g2: Option<&Tensor>, x: &Tensor, norm: &Norm) -> Result<Tensor, TrainError> {
        let at = Planes::of(x)?;
        let out = self.empty(&[at.parts, 2, at.planes, at.channels])?;
        let [area, channels] = Self::size(at)?;
        let args = [
            self.activation(g, at)?,
            self.optional(g2, at)?,
            self.activation(x, at)?,
            self.numbers(&norm.a, at.channels)?,
            self.numbers(&norm.b, at.channels)?,
            self.numbers(&out, 2 * at.parts * at.planes * at.channels)?,
            area,
            channels,
        ];
        self.start("sums_relu", [at.parts, at.planes], &args)?;
        Ok(out)
    }

    fn sums_block(
        &self,
        g: &Tensor,
        g2: Option<&Tensor>,
        y: &Tensor,
        x: &Tensor,
        shortcut: Option<&Tensor>,
    ) -> Result<Tensor, TrainError> {
        let at = Planes::of(x)?;
        let out = self.empty(&[at.parts, 3, at.planes, at.channels])?;
        let [area, channels] = Self::size(at)?;
        let args = [
            self.activation(g, at)?,
            self.optional(g2, at)?,
            self.activation(y, at)?,
            self.activation(x, at)?,
            self.optional(shortcut, at)?,
            self.numbers(&out, 3 * at.parts * at.planes * at.channels)?,
            area,
            channels,
        ];
        self.start("sums_block", [at.parts, at.planes], &args)?;
        Ok(out)
    }

    fn gate_gradient(&self, sums: &Tensor, at: Planes, norm: &Norm) -> Result<Tensor, TrainError> {
        let all = at.planes * at.channels;
        let ds = self.empty(&[at.planes, at.channels])?;
        let args = [
            self.numbers(sums, 3 * at.parts * all)?,
            int(at.parts)?,
            int(at.planes)?,
            int(at.channels)?,
            self.numbers(&norm.a, at.channels)?,
            self.numbers(&norm.b, at.channels)?,
            self.numbers(&ds, all)?,
        ];
        self.start("gate_gradient", [(all + THREADS as i64 - 1) / THREADS as i64, 1], &args)?;
        Ok(ds)
    }

    fn gradients(
        &self,
        sums: &Tensor,
        which: i64,
        at: Planes,
        norm: &Norm,
        scale: Option<&Tensor>,
        through: Option<&Tensor>,
    ) -> Result<NormGradient, TrainError> {
        let (c, all) = (at.channels, at.planes * at.channels);
        let k = sums.size()[1];
        if !(1..k).contains(&which) {
            return Err(Self::fault(format!("sums number {which} of {k}")));
        }
        let [area, channels] = Self::size(at)?;
        let [gamma, beta, q, r] = [self.empty(&[c])?, self.empty(&[c])?, self.empty(&[c])?, self.empty(&[c])?];
        let args = [
            self.numbers(sums, k * at.parts * all)?,
            int(at.parts)?,
            int(k)?,
            int(which)?,
            int(at.planes)?,
            area,
            channels,
            self.numbers(&norm.a, c)?,
            self.numbers(&norm.mean, c)?,
            self.numbers(&norm.invstd, c)?,
            self.some_numbers(scale, all)?,
            self.some_numbers(through, all)?,
            self.numbers(&norm.plane_x, all)?,
            self.numbers(&gamma, c)?,
            self.numbers(&beta, c)?,
            self.numbers(&q, c)?,
            self.numbers(&r, c)?,
        ];
        self.start("bn_gradients", [(c + 31) / 32, 1], &args)?;
        Ok(NormGradient { gamma, beta, q, r })
    }

    fn grad_relu(
        &self,
        g: &Tensor,
        g2: Option<&Tensor>,
        x: &Tensor,
        norm: &Norm,
        of: &NormGradient,
    ) -> Result<Tensor, TrainError> {
        let at = Planes::of(x)?;
        let gx = self.like(x)?;
        let [area, channels] = Self::size(at)?;
        let c = at.channels;
        let args = [
            self.activation(g, at)?,
            self.optional(g2, at)?,
            self.activation(x, at)?,
            self.numbers(&norm.a, c)?,
            self.numbers(&norm.b, c)?,
            self.numbers(&of.q, c)?,
            self.numbers(&of.r, c)?,
            self.activation(&gx, at)?,
            area,
            channels,
        ];
        self.start("grad_relu", [at.parts, at.planes], &args)?;
        Ok(gx)
    }

    fn grad_block(
        &self,
        g: &Tensor,
        g2: Option<&Tensor>,
        y: &Tensor,
        x: &Tensor,
        norm: &Norm,
        scale: Option<&Tensor>,
        through: Option<&Tensor>,
        of: &NormGradient,
        shortcut: Option<(&Shortcut<'_>, &NormGradient)>,
    ) -> Result<(Tensor, Tensor), TrainError> {
        let at = Planes::of(x)?;
        let (gx, gs) = (self.like(x)?, self.like(x)?);
        let [area, channels] = Self::size(at)?;
        let (c, all) = (at.channels, at.planes * at.channels);
        let args = [
            self.activation(g, at)?,
            self.optional(g2, at)?,
            self.activation(y, at)?,
            self.activation(x, at)?,
            self.numbers(&norm.a, c)?,
            self.some_numbers(scale, all)?,
            self.some_numbers(through, all)?,
            self.numbers(&of.q, c)?,
            self.numbers(&of.r, c)?,
            self.optional(shortcut.map(|(s, _)| s.raw), at)?,
            self.some_numbers(shortcut.map(|(s, _)| &s.norm.a), c)?,
            self.some_numbers(shortcut.map(|(_, of)| &of.q), c)?,
            self.some_numbers(shortcut.map(|(_, of)| &of.r), c)?,
            self.activation(&gx, at)?,
            self.activation(&gs, at)?,
            area,
            channels,
        ];
        self.start("grad_block", [at.parts, at.planes], &args)?;
        Ok((gx, gs))
    }

    fn adam(
        &self,
        p: &Tensor,
        g: &Tensor,
        mean: &Tensor,
        square: &Tensor,
        step: f64,
        root: f64,
    ) -> Result<(), TrainError> {
        let n = p.numel() as i64;
        let args = [
            self.numbers(p, n)?,
            self.numbers(g, n)?,
            self.numbers(mean, n)?,
            self.numbers(square, n)?,
            n.into(),
            ((1.0 - BETA1) as f32).into(),
            (BETA2 as f32).into(),
            ((1.0 - BETA2) as f32).into(),
            (EPSILON as f32).into(),
            (step as f32).into(),
            (root as f32).into(),
        ];
        self.start("adam", [((n + THREADS as i64 - 1) / THREADS as i64).clamp(1, ADAM_BLOCKS), 1], &args)
    }
}

#[cfg(test)]
impl Cuda {
    /// The same kernels compiled for the processor, one thread a CUDA thread: slow, and the same arguments in the same
    /// order.
    pub(super) fn on_the_processor(dir: &std::path::Path, kind: Kind) -> Self {
        const TRAMPOLINE: &str = "extern \"C\" __global__ void ";
        let mut text = format!("{}\n{SOURCE}\n", include_str!("emulate.h"));
        for found in SOURCE.split(TRAMPOLINE).skip(1) {
            let (name, rest) = found.split_once('(').unwrap();
            let arguments = rest.split_once(')').unwrap().0;
            let unpacked: Vec<String> = arguments
                .split(',')
                .enumerate()
                .map(|(i, argument)| {
                    let end = argument.rfind(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap();
                    format!("*({}*)a[{i}]", argument[..=end].trim())
                })
                .collect();
            text += &format!("extern \"C\" void host_{name}(void** a) {{ {name}({}); }}\n", unpacked.join(", "));
        }
        let (source, library) = (dir.join("kernels.cpp"), dir.join("kernels.so"));
        std::fs::write(&source, text).unwrap();
        let kind_flag = if kind == Kind::BFloat16 { "-DTYPE=1" } else { "-DTYPE=0" };
        let made = std::process::Command::new("g++")
            .args(["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", kind_flag, "-o"])
            .args([&library, &source])
            .status()
            .expect("g++ is missing: apt-get install g++");
        assert!(made.success(), "g++ compiles the kernels");
        // SAFETY: the library was made above and has no initialisers of its own.
        let library = unsafe { libloading::Library::new(&library) }.unwrap();
        type Host = unsafe extern "C" fn(*mut *mut c_void);
        let functions = KERNELS
            .iter()
            .map(|name| {
                // SAFETY: the trampolines above have this signature.
                let f = unsafe { library.get::<Host>(format!("host_{name}").as_bytes()) }.map(|f| *f);
                (*name, f.unwrap() as usize)
            })
            .collect();
        // SAFETY: `emulate.h` declares it so.
        let launch = unsafe { library.get::<HostLaunch>(b"host_launch") }.map(|f| *f).unwrap();
        Self { device: Device::Cpu, kind, loaded: Loaded::Host { functions, launch, _library: library } }
    }
}
