//! The shipped configuration file is complete, loads, and says the defaults.

mod common;

use std::path::Path;

use common::darnet;
use darnet::config::Config;

fn shipped() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/darnet.toml")).unwrap()
}

#[test]
fn the_shipped_file_says_every_default() {
    let config: Config = toml::from_str(&shipped()).unwrap();
    assert_eq!(config, Config::default());
}

#[test]
fn the_shipped_file_names_every_key() {
    let text = shipped();
    let keys = toml::Value::try_from(Config::default()).unwrap();
    fn walk(prefix: &str, value: &toml::Value, text: &str) {
        let toml::Value::Table(table) = value else { return };
        for (key, value) in table {
            let named = text.lines().any(|l| {
                let l = l.trim_start_matches(['#', ' ']);
                l.starts_with(&format!("{key} ="))
                    || l.starts_with(&format!("{key}."))
                    || l == format!("[{prefix}{key}]")
            });
            assert!(named, "{prefix}{key} is missing in systemd/darnet.toml");
            walk(&format!("{prefix}{key}."), value, text);
        }
    }
    walk("", &keys, &text);
    for optional in ["path", "isa", "library", "token_file", "secret_file", "secret_env", "ca_file"] {
        assert!(text.contains(&format!("# {optional} =")), "{optional} is missing in systemd/darnet.toml");
    }
}

#[test]
fn check_config_names_every_fault_at_once_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("darnet.toml");
    std::fs::write(
        &file,
        format!(
            "data_dir = {:?}\n[assembly]\nidle_ms = 1\njournal_threads = 0\n[results]\ntop_slices = 0\n\
             [model]\npath = \"no/such/model\"\n[web]\nbind = \"nonsense\"\n",
            dir.path().join("none").display().to_string()
        ),
    )
    .unwrap();
    let (code, _, err) = darnet(&["check-config", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    for fault in
        ["data_dir", "assembly.idle_ms", "assembly.journal_threads", "results.top_slices", "model.path", "web."]
    {
        assert!(err.contains(fault), "{fault} in {err}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_unknown_key_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("darnet.toml");
    std::fs::write(&file, "[assembly]\ngrace_seconds = 2\n").unwrap();
    let (code, _, err) = darnet(&["check-config", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.contains("grace_seconds"), "{err}");
}

#[test]
fn a_good_file_is_said_to_be_good() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("darnet.toml");
    let text = shipped()
        .replace("data_dir = \"/var/lib/darnet\"", &format!("data_dir = {:?}", dir.path().display().to_string()));
    std::fs::write(&file, text).unwrap();
    let (code, out, err) = darnet(&["check-config", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("no fault"));
}
