//! The program links the system's C, maths, gcc and C++ run-time libraries and nothing else.

use std::process::Command;

const ALLOWED: [&str; 4] = ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"];

/// Library names in the output of `readelf -d`.
fn needed(dynamic: &str) -> Vec<&str> {
    dynamic
        .lines()
        .filter(|l| l.contains("(NEEDED)"))
        .filter_map(|l| l.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(name, _)| name))
        .collect()
}

#[test]
fn the_binary_links_only_the_systems_run_time_libraries() {
    let output = Command::new("readelf")
        .args(["-d", env!("CARGO_BIN_EXE_darnet")])
        .env("LC_ALL", "C")
        .output()
        .expect("readelf must be there: apt-get install binutils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let libraries = needed(&text);
    assert!(libraries.contains(&"libc.so.6"), "a dynamic section was expected: {text}");
    let others: Vec<_> = libraries.into_iter().filter(|l| !ALLOWED.contains(l) && !l.starts_with("ld-linux")).collect();
    assert!(others.is_empty(), "linked besides the system's run-time libraries: {others:?}");
}

#[test]
fn library_names_are_found_in_readelfs_output() {
    let text = " 0x0000000000000001 (NEEDED)             Shared library: [libgomp.so.1]\n 0x0c (INIT) 0x1000\n";
    assert_eq!(needed(text), ["libgomp.so.1"]);
}
