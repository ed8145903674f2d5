//! Committed files that a test makes again and compares. `LOCKSTEP_BLESS=1` writes them.

mod compatibility;
mod vectors;

use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The committed file; `None` where there is none.
fn read(name: &str) -> Option<Vec<u8>> {
    std::fs::read(path(name)).ok()
}

/// Compares with the committed file, or writes it.
fn check(name: &str, now: &[u8]) {
    if std::env::var_os("LOCKSTEP_BLESS").is_some_and(|value| value == "1") {
        // Other tests may be reading it: they get the old file or the new one.
        let new = path(&format!("{name}.new"));
        std::fs::write(&new, now).unwrap();
        return std::fs::rename(new, path(name)).unwrap();
    }
    let committed = read(name).unwrap_or_default();
    let line = || {
        let (old, new) = (String::from_utf8_lossy(&committed), String::from_utf8_lossy(now));
        let (mut old, mut new) = (old.lines(), new.lines());
        (1..).find_map(|number| match (old.next(), new.next()) {
            (a, b) if a == b && a.is_some() => None,
            (a, b) => Some(format!("line {number}: committed {a:?}, now {b:?}")),
        })
    };
    assert!(
        committed == now,
        "{name} is not what the code makes of it; if that is intended, run `cargo xtask bless`\n{}",
        line().unwrap_or_default()
    );
}
