//! The suite of backports of the distribution that the host runs, at the mirror that the host's apt has already.
//!
//! The emulation of a processor with virtualization has become much sounder since what a stable distribution ships,
//! and guests shall meet a newer kernel too. Whatever names the distribution's own suite in the host's sources is
//! copied for its backports, with the same mirror, keys and options, into sources that only the lab's apt reads.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::packages::file_name;

/// Packages that are the backports', if there are any. A `*` stands for anything.
pub(crate) const PINNED: &[&str] = &["qemu-*", "seabios", "ipxe-qemu"];

/// More than the 500 of what a distribution's own suites have.
const PRIORITY: u32 = 600;

/// Where apt has the host's sources.
const SOURCES: &str = "/etc/apt/sources.list";
const PARTS: &str = "/etc/apt/sources.list.d";

/// What apt has to be told to read what [`add`] has written in this folder.
pub(crate) fn options(folder: &Path) -> [String; 2] {
    [
        format!("Dir::Etc::sourceparts={}", parts(folder).display()),
        format!("Dir::Etc::preferences={}", preferences(folder).display()),
    ]
}

/// Writes sources with the backports beside the host's into `folder`; returns the suite's name.
pub(crate) fn add(folder: &Path) -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = codename(&release).context("the host's distribution has no code name")?;
    let suite = format!("{codename}-backports");
    let parts = parts(folder);
    fs::create_dir_all(&parts)?;

    let (mut lines, mut stanzas) = (String::new(), String::new());
    for path in sources()? {
        let text = fs::read_to_string(&path).unwrap_or_default();
        if path.extension().is_some_and(|kind| kind == "sources") {
            stanzas.push_str(&derived_stanzas(&text, codename, &suite));
        } else {
            lines.push_str(&derived_lines(&text, codename, &suite));
        }
        if path.starts_with(PARTS) {
            symlink(&path, parts.join(file_name(&path)))?;
        }
    }
    if lines.is_empty() && stanzas.is_empty() {
        bail!("the host's apt has no source for the suite {codename}");
    }
    fs::write(parts.join("partita-lab.list"), lines)?;
    fs::write(parts.join("partita-lab.sources"), stanzas)?;
    let pins = format!(
        "Package: {}\nPin: release n={suite}\nPin-Priority: {PRIORITY}\n",
        PINNED.join(" ")
    );
    fs::write(preferences(folder), pins)?;
    Ok(suite)
}

fn parts(folder: &Path) -> PathBuf {
    folder.join("sources.list.d")
}

fn preferences(folder: &Path) -> PathBuf {
    folder.join("preferences")
}

/// The files with the host's sources.
fn sources() -> Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from(SOURCES)];
    if let Ok(entries) = fs::read_dir(PARTS) {
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "sources" || kind == "list") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The value of VERSION_CODENAME in an os-release.
fn codename(release: &str) -> Option<&str> {
    let value = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim().trim_matches('"')).filter(|name| !name.is_empty())
}

/// Of sources in the one-line format, `deb [options] URI suite component…`, those of this suite, with another in
/// its place.
fn derived_lines(text: &str, suite: &str, instead: &str) -> String {
    let mut derived = String::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if words.first() != Some(&"deb") {
            continue;
        }
        // The options end with the word that ends with a bracket.
        let uri = match words.get(1) {
            Some(word) if word.starts_with('[') => {
                words.iter().position(|word| word.ends_with(']')).map(|end| end + 1)
            }
            _ => Some(1),
        };
        if let Some(named) = uri.and_then(|uri| words.get_mut(uri + 1))
            && *named == suite
        {
            *named = instead;
            let _ = writeln!(derived, "{}", words.join(" "));
        }
    }
    derived
}

/// Of sources in the deb822 format those that have this suite, with another in its place, and with their mirrors,
/// keys and options.
fn derived_stanzas(text: &str, suite: &str, instead: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let mut derived = String::new();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            stanza.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let has = |name, word| {
            field(name).is_some_and(|value| value.split_whitespace().any(|each| each == word))
        };
        let disabled = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if disabled || !has("Types", "deb") || !has("Suites", suite) {
            continue;
        }
        for line in stanza {
            let key = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
            let _ = match key.as_str() {
                "types" => writeln!(derived, "Types: deb"),
                "suites" => writeln!(derived, "Suites: {instead}"),
                _ => writeln!(derived, "{line}"),
            };
        }
        derived.push('\n');
    }
    derived
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backports_are_where_the_distribution_is_in_the_one_line_format() {
        let sources = "# deb http://a.test/debian old main\n\
            deb http://a.test/debian old main contrib # ours\n\
            deb [arch=amd64 signed-by=/k.gpg]  https://b.test/debian   old  main\n\
            deb [ signed-by=/k.gpg ] https://c.test/debian old main\n\
            deb-src http://a.test/debian old main\n\
            deb http://a.test/debian old-updates main\n\
            deb http://a.test/tool old/ \n\
            deb [broken\ndeb\n";
        let expected = "deb http://a.test/debian old-backports main contrib\n\
            deb [arch=amd64 signed-by=/k.gpg] https://b.test/debian old-backports main\n\
            deb [ signed-by=/k.gpg ] https://c.test/debian old-backports main\n";
        assert_eq!(derived_lines(sources, "old", "old-backports"), expected);
    }

    #[test]
    fn the_backports_are_where_the_distribution_is_in_stanzas() {
        let sources = "Types: deb deb-src\n# a comment\nURIs: http://a.test/debian\n\
            suites: old old-updates\nComponents: main\nSigned-By:\n -----BEGIN KEY-----\n .\n abc\n\n\
            Types: deb\nURIs: http://a.test/security\nSuites: old-security\nComponents: main\n\n\n\
            Types: deb\nEnabled: no\nURIs: http://b.test/debian\nSuites: old\nComponents: main\n\n\
            Types: deb-src\nURIs: http://c.test/debian\nSuites: old\nComponents: main\n";
        let expected = "Types: deb\nURIs: http://a.test/debian\nSuites: old-backports\n\
            Components: main\nSigned-By:\n -----BEGIN KEY-----\n .\n abc\n\n";
        assert_eq!(derived_stanzas(sources, "old", "old-backports"), expected);
    }

    #[test]
    fn a_distribution_is_known_by_its_code_name() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=\"old\"\n"), Some("old"));
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=\n"), None);
        assert_eq!(codename("ID=other\n"), None);
    }
}
