//! Compiles the TensorRT shim, and tells the linker where feature `trainer` finds libtorch at run time.

const SHIM: &str = "src/engine/tensorrt/shim.cpp";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SHIM}");
    println!("cargo::rerun-if-changed=src/engine/tensorrt/layout.h");
    // No NVIDIA header and no NVIDIA library: see layout.h.
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flag("-fno-exceptions")
        .flag_if_supported("-Wextra")
        .file(SHIM)
        .compile("darnet_tensorrt");
    println!("cargo::rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    if std::env::var_os("CARGO_FEATURE_TRAINER").is_none() {
        return;
    }
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.to_string_lossy());
    }
}
