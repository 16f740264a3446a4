//! The arrows of the module tree, and other rules that a compiler does not know.
//!
//! Reads the sources as text: comments, strings and character literals are blanked first, then every path from the
//! crate root (`crate::…`, also in braces, and `super::` chains that reach the root) is compared with the table of
//! allowed arrows. Paths in unit tests count too: a unit test that needs a later stage belongs in `tests/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who may import whom. A module may always import itself; one that is not here fails the test.
const ARROWS: [(&str, &[&str]); 15] = [
    ("gpu", &[]),
    ("model", &[]),
    ("volume", &[]),
    ("telemetry", &[]),
    ("dicom", &["volume", "telemetry"]),
    ("resample", &["volume", "model", "gpu"]),
    ("engine", &["model", "gpu"]),
    ("explain", &["resample", "volume", "model", "engine"]),
    ("scan", &["dicom", "volume", "resample", "model"]),
    ("store", &["telemetry"]),
    ("report", &["store", "telemetry", "model", "volume::refusal"]),
    ("web", &["store", "report", "telemetry"]),
    ("phantom", &["dicom", "volume"]),
    (
        "train",
        &[
            "dicom",
            "gpu",
            "volume",
            "resample",
            "scan",
            "model",
            "engine",
            "explain",
            "report::calibration",
            "phantom",
            "telemetry",
        ],
    ),
    ("pipeline", ANYTHING),
];
/// Files and folders at the top that put everything together.
const TOP: [&str; 5] = ["main.rs", "lib.rs", "config.rs", "cli", "bin"];
const ANYTHING: &[&str] = &["*"];

/// Where `unsafe_code` may be allowed: the mapped stores, SIMD kernels, GPU and FFI.
const UNSAFE: [&str; 11] = [
    "volume/store.rs",
    "gpu/",
    "train/fused/cuda.rs",
    "train/map.rs",
    "train/torch.rs",
    "engine/cpu/",
    "engine/cuda/",
    "engine/tensorrt/",
    "resample/cuda.rs",
    "resample/texture.rs",
    "pipeline/device.rs",
];

const MAX_LINE: usize = 140;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folder` with one of the extensions, in order; hidden folders (environments, caches) are passed over.
fn files(folder: &str, extensions: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("entry").path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
                found.push(path);
            }
        }
    }
    found.sort();
    let read = |p: PathBuf| {
        let text = fs::read_to_string(&p).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
        (relative(&p), text)
    };
    found.into_iter().map(read).collect()
}

/// Documents at the top.
fn documents() -> Vec<(String, String)> {
    let entries = fs::read_dir(root()).expect("the package's folder");
    let mut paths: Vec<_> = entries.map(|e| e.expect("entry").path()).collect();
    paths.retain(|p| p.is_file() && p.extension().is_some_and(|e| e == "md" || e == "toml"));
    paths.sort();
    paths.into_iter().map(|p| (relative(&p), fs::read_to_string(&p).expect("text"))).collect()
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("within the package").to_string_lossy().into_owned()
}

/// The source with comments, strings and character literals replaced by spaces; line ends stay.
fn code_of(source: &str) -> String {
    let b: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut i = 0;
    let blank = |out: &mut String, part: &[char]| out.extend(part.iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
    while i < b.len() {
        let rest = &b[i..];
        let ident_before = i > 0 && (b[i - 1].is_alphanumeric() || b[i - 1] == '_');
        let len = match rest {
            ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => {
                let (mut depth, mut k) = (0usize, 0);
                loop {
                    match &rest[k..] {
                        ['/', '*', ..] => (depth, k) = (depth + 1, k + 2),
                        ['*', '/', ..] => (depth, k) = (depth - 1, k + 2),
                        [] => break k,
                        _ => k += 1,
                    }
                    if depth == 0 {
                        break k;
                    }
                }
            }
            ['r', '"' | '#', ..] if !ident_before || matches!(b[i - 1], 'b' | 'c') => {
                let hashes = rest[1..].iter().take_while(|&&c| c == '#').count();
                if rest.get(1 + hashes) == Some(&'"') {
                    let mut k = 2 + hashes;
                    while k < rest.len()
                        && !(rest[k] == '"' && rest[k + 1..].iter().take_while(|&&c| c == '#').count() >= hashes)
                    {
                        k += 1;
                    }
                    (k + 1 + hashes).min(rest.len())
                } else {
                    0
                }
            }
            ['"', ..] => {
                let mut k = 1;
                while k < rest.len() && rest[k] != '"' {
                    k += if rest[k] == '\\' { 2 } else { 1 };
                }
                (k + 1).min(rest.len())
            }
            ['\'', '\\', ..] => rest[3..].iter().position(|&c| c == '\'').map_or(0, |p| p + 4),
            ['\'', _, '\'', ..] => 3,
            _ => 0,
        };
        if len == 0 {
            out.push(b[i]);
            i += 1;
        } else {
            blank(&mut out, &b[i..i + len]);
            i += len;
        }
    }
    out
}

/// The first segments (at most two, joined by `::`) of each path that follows; braces are opened.
fn heads(after: &str) -> Vec<String> {
    let after = after.trim_start();
    if let Some(list) = after.strip_prefix('{') {
        let mut depth = 0;
        let mut item = String::new();
        let mut found = Vec::new();
        for c in list.chars() {
            match c {
                '}' if depth == 0 => break,
                ',' if depth == 0 => {
                    found.extend(heads(&item));
                    item.clear();
                    continue;
                }
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            item.push(c);
        }
        found.extend(heads(&item));
        return found;
    }
    let ident = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let first = ident(after);
    if first.is_empty() {
        return if after.starts_with('*') { vec!["*".to_owned()] } else { Vec::new() };
    }
    match after[first.len()..].trim_start().strip_prefix("::") {
        Some(rest) if rest.trim_start().starts_with('{') => {
            heads(rest).into_iter().map(|h| format!("{first}::{}", h.split("::").next().unwrap_or(""))).collect()
        }
        Some(rest) => vec![format!("{first}::{}", ident(rest.trim_start()))],
        None => vec![first],
    }
}

/// Paths from the crate root in a file, with their line. `depth` is the number of modules above the file's items.
fn root_paths(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // Inline modules that are open: the brace depth at which each ends.
    let mut inline: Vec<usize> = Vec::new();
    let mut braces = 0usize;
    let mut at = 0;
    let boundary = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$');
    while at < code.len() {
        let rest = &code[at..];
        let line = || code[..at].matches('\n').count() + 1;
        let step = rest.chars().next().map_or(1, char::len_utf8);
        if rest.starts_with('{') {
            braces += 1;
            let before = code[..at].trim_end();
            let name = before.rfind(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(0, |p| p + 1);
            if before[..name].trim_end().ends_with("mod") && name < before.len() {
                inline.push(braces);
            }
        } else if rest.starts_with('}') {
            if inline.last() == Some(&braces) {
                inline.pop();
            }
            braces = braces.saturating_sub(1);
        } else if rest.starts_with("crate::") && (boundary(at) || code[..at].ends_with('$')) {
            found.extend(heads(&rest["crate::".len()..]).into_iter().map(|h| (line(), h)));
        } else if rest.starts_with("super::") && boundary(at) && !code[..at].trim_end().ends_with("super::") {
            let mut after = rest;
            let mut ups = 0;
            while let Some(next) = after.trim_start().strip_prefix("super::") {
                (after, ups) = (next, ups + 1);
            }
            if ups >= depth + inline.len() {
                found.extend(heads(after).into_iter().map(|h| (line(), h)));
            }
        }
        at += step;
    }
    found
}

/// Forbidden arrows in one file of `src/`.
fn forbidden(file: &str, source: &str) -> Vec<String> {
    let inside = file.strip_prefix("src/").unwrap_or(file);
    let first = inside.split('/').next().unwrap_or(inside);
    if TOP.contains(&first) {
        return Vec::new();
    }
    let own = first.trim_end_matches(".rs");
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == own) else {
        return vec![format!("{file}: module `{own}` has no row in the table of arrows")];
    };
    if *allowed == ANYTHING {
        return Vec::new();
    }
    // src/a.rs and src/a/mod.rs are one module deep, src/a/b.rs two.
    let parts = inside.split('/').count();
    let depth = if inside.ends_with("/mod.rs") { parts - 1 } else { parts };
    root_paths(&code_of(source), depth)
        .into_iter()
        .filter(|(_, head)| {
            let module = head.split("::").next().unwrap_or("");
            module != own && !allowed.iter().any(|a| *a == module || *a == head)
        })
        .map(|(line, head)| format!("{file}:{line}: `{own}` must not import `{head}`"))
        .collect()
}

fn report(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn modules_import_only_what_the_arrows_allow() {
    let faults: Vec<String> = files("src", &["rs"]).iter().flat_map(|(file, source)| forbidden(file, source)).collect();
    report(&faults);
}

#[test]
fn every_allowed_arrow_points_down() {
    let mut above = BTreeSet::new();
    let mut left: Vec<_> = ARROWS.to_vec();
    while !left.is_empty() {
        let before = left.len();
        left.retain(|(name, allowed)| {
            let ready =
                *allowed == ANYTHING || allowed.iter().all(|a| above.contains(a.split("::").next().unwrap_or("")));
            if ready {
                above.insert(*name);
            }
            !ready
        });
        assert!(left.len() < before, "the arrows make a circle among {left:?}");
    }
}

#[test]
fn unsafe_code_is_allowed_only_where_it_must_be() {
    let mut faults = Vec::new();
    for (file, source) in files("src", &["rs"]) {
        let inside = file.strip_prefix("src/").unwrap_or(&file);
        if UNSAFE.iter().any(|u| inside.starts_with(u)) {
            continue;
        }
        let code: String = code_of(&source).split_whitespace().collect();
        if ["allow(unsafe_code", "expect(unsafe_code", "warn(unsafe_code"].iter().any(|a| code.contains(a)) {
            faults.push(format!("{file}: allows unsafe code"));
        }
    }
    report(&faults);
}

#[test]
fn every_module_opens_with_its_document() {
    let mut faults = Vec::new();
    for (file, source) in files("src", &["rs"]) {
        let opening = source.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with("#!["));
        let binary = file == "src/main.rs" || file.starts_with("src/bin/");
        if !binary && !opening.is_some_and(|l| l.starts_with("//!")) {
            faults.push(format!("{file}: has no `//!` at its start"));
        }
    }
    report(&faults);
}

#[test]
fn lines_are_short_and_hold_no_tabs() {
    let mut faults = Vec::new();
    for folder in ["src", "tests", "benches"] {
        for (file, source) in files(folder, &["rs"]) {
            for (n, line) in source.lines().enumerate() {
                if line.contains('\t') {
                    faults.push(format!("{file}:{}: tab", n + 1));
                }
                let len = line.chars().count();
                if len > MAX_LINE {
                    faults.push(format!("{file}:{}: {len} characters, at most {MAX_LINE}", n + 1));
                }
            }
        }
    }
    report(&faults);
}

#[test]
fn no_path_of_one_machine_is_written_down() {
    // In pieces, so that this file does not hold them.
    let paths = [["/wo", "rk/"], ["/tmp", "/wt"], ["/tmp", "/tgt"], ["/ho", "me/"], ["/Us", "ers/"], ["/ro", "ot/"]];
    let paths = paths.map(|p| p.concat());
    let extensions = ["rs", "md", "toml", "html", "service", "sh", "py", "js", "css"];
    let folders = ["src", "docs", "tests", "benches", "systemd", "calibration", "engines"];
    let mut faults = Vec::new();
    for (file, source) in folders.iter().flat_map(|f| files(f, &extensions)).chain(documents()) {
        for (n, line) in source.lines().enumerate() {
            if let Some(path) = paths.iter().find(|p| line.contains(p.as_str())) {
                faults.push(format!("{file}:{}: {path}", n + 1));
            }
        }
    }
    report(&faults);
}

#[test]
fn the_checks_find_what_they_look_for() {
    let found = |file: &str, source: &str| forbidden(file, source).len();
    assert_eq!(found("src/volume/store.rs", "use crate::pipeline::x;"), 1);
    assert_eq!(found("src/volume/store.rs", "use crate::volume::x; use crate::{volume::y, dicom::{a, b}, web};"), 3);
    assert_eq!(found("src/volume/store.rs", "fn f() { crate::model::Model::load() }"), 1);
    assert_eq!(found("src/volume/store.rs", "use super::super::web;"), 1);
    assert_eq!(found("src/volume/store.rs", "use super::journal;"), 0);
    assert_eq!(found("src/volume/store.rs", "mod tests { use super::*; use super::super::journal; }"), 0);
    assert_eq!(found("src/volume/store.rs", "mod tests { use super::super::super::web; }"), 1);
    assert_eq!(found("src/volume/mod.rs", "use super::web;"), 1);
    assert_eq!(found("src/volume/mod.rs", "mod tests { use super::*; }"), 0);
    assert_eq!(found("src/report/a.rs", "use crate::volume::refusal::Reason; use crate::volume::store::X;"), 1);
    assert_eq!(found("src/report/a.rs", "use crate::volume::{refusal::Reason, journal};"), 1);
    assert_eq!(found("src/engine/a.rs", "use crate::*;"), 1);
    assert_eq!(
        found("src/engine/a.rs", "// crate::web\n/* crate::web /* */ crate::web */ \"crate::web\" r#\"crate::web\"#"),
        0
    );
    assert_eq!(found("src/engine/a.rs", "let c = '\"'; crate::web::x(); let d = '\"';"), 1);
    assert_eq!(found("src/engine/a.rs", "fn f<'a>(x: &'a str) { crate::web::x(); let c = '\\''; }"), 1);
    assert_eq!(found("src/pipeline/a.rs", "use crate::web; use crate::engine;"), 0);
    assert_eq!(found("src/main.rs", "use crate::web;"), 0);
    assert_eq!(found("src/novel/a.rs", ""), 1);
    assert_eq!(found("src/web/a.rs", "use crate::config::Config;"), 1);
}
