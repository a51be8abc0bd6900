//! What the layout of the source promises: who imports whom, and what a file may be.
//!
//! Each rule is a function from texts to complaints, tried here on a text that breaks it and then on the real files.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use hallpass::store::migrations::MIGRATIONS;

/// Each module of the crate and what it may import: nothing that stands above it.
const MAY_IMPORT: [(&str, &[&str]); 24] = [
    ("model", &[]),
    ("embedded", &[]),
    ("counters", &[]),
    ("trail", &[]),
    ("load", &[]),
    ("traces", &["trail"]),
    ("store", &["counters", "model", "trail"]),
    ("audit", &["feed", "model", "store"]),
    ("auth", &["model", "store"]),
    ("cache", &["model"]),
    ("limits", &["auth"]),
    ("config", &["limits", "store", "telemetry", "traces"]),
    ("history", &["cache", "model"]),
    ("feed", &["cache", "history", "model", "store"]),
    (
        "loader",
        &["cache", "counters", "feed", "model", "store", "trail"],
    ),
    (
        "check",
        &[
            "cache",
            "counters",
            "feed",
            "history",
            "loader",
            "model",
            "selfcheck",
            "store",
            "trail",
        ],
    ),
    ("selfcheck", &["cache", "feed", "model", "store"]),
    ("upkeep", &["cache", "feed", "loader", "model", "store"]),
    (
        "grpc",
        &[
            "audit", "auth", "cache", "check", "counters", "feed", "limits", "loader", "model",
            "store", "traces", "trail", "upkeep",
        ],
    ),
    (
        "telemetry",
        &[
            "audit", "auth", "check", "counters", "grpc", "limits", "model", "store", "traces",
        ],
    ),
    (
        "http",
        &[
            "auth",
            "counters",
            "grpc",
            "limits",
            "model",
            "telemetry",
            "traces",
        ],
    ),
    (
        "server",
        &[
            "audit",
            "auth",
            "cache",
            "check",
            "counters",
            "feed",
            "grpc",
            "http",
            "limits",
            "loader",
            "model",
            "selfcheck",
            "store",
            "telemetry",
            "traces",
            "upkeep",
        ],
    ),
    (
        "cli",
        &[
            "audit",
            "auth",
            "config",
            "embedded",
            "grpc",
            "http",
            "limits",
            "load",
            "model",
            "selfcheck",
            "server",
            "store",
        ],
    ),
    ("main", &["cli", "embedded"]),
];

/// Crates that only some modules may name. A prefix stands for the family: `tonic` for `tonic_health` too.
const CRATES: [(&str, &[&str]); 4] = [
    (
        "tonic",
        &["grpc", "http", "server", "cli", "telemetry", "traces"],
    ),
    ("opentelemetry", &["telemetry", "traces"]),
    ("tokio_postgres", &["store", "embedded"]),
    ("deadpool", &["store"]),
];

type Rule = fn(&Source) -> Vec<String>;

const FILE_LINES_MAX: usize = 450;
const MAIN_LINES_MAX: usize = 40;

/// One file of `src`.
struct Source {
    /// Relative to `src`.
    path: PathBuf,
    text: String,
}

impl Source {
    /// The top module that the file belongs to: `store` for `store.rs`, `store/mod.rs` and `store/log.rs`.
    fn module(&self) -> String {
        let first = self.path.iter().next().unwrap().to_str().unwrap();
        first.trim_end_matches(".rs").to_owned()
    }

    /// Whether `super` is the crate's root here.
    fn is_top(&self) -> bool {
        self.path.iter().count() == 1 || self.path.ends_with("mod.rs")
    }

    /// The text without what comments say.
    fn code(&self) -> String {
        let without_comment = |line: &str| {
            // `//` in a string is no comment; what stands behind it there matters no more.
            let end = line.find("//").unwrap_or(line.len());
            line[..end].to_owned()
        };
        let lines: Vec<String> = self.text.lines().map(without_comment).collect();
        lines.join("\n")
    }
}

/// The names that follow each `prefix` in `code`: `crate::a::b` names `a`, `crate::{a::{b, c}, d}` names `a` and `d`.
fn named_after(prefix: &str, code: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        let is_whole_word = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let rest = &code[at + prefix.len()..];
        if !is_whole_word {
            continue;
        }
        let Some(group) = rest.strip_prefix('{') else {
            names.insert(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut is_start = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => is_start = true,
                c if is_start && !c.is_whitespace() => {
                    names.insert(word(&group[at..]));
                    is_start = false;
                }
                _ => {}
            }
        }
    }
    names
}

fn complaints_of_imports(source: &Source) -> Vec<String> {
    let (module, path) = (source.module(), source.path.display());
    if module == "lib" {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else {
        return vec![format!(
            "{path}: the module `{module}` has no place in MAY_IMPORT"
        )];
    };
    let code = source.code();
    let mut complaints = Vec::new();
    let mut imports = named_after("crate::", &code);
    imports.extend(named_after("hallpass::", &code));
    for name in imports {
        if name != module && !allowed.contains(&name.as_str()) {
            complaints.push(format!("{path}: `{module}` must not import `{name}`"));
        }
    }
    // So that `crate::` finds every import.
    let leaves = |line: &str| source.is_top() && line.starts_with("use super::");
    if code.contains("super::super") || code.lines().any(leaves) {
        complaints.push(format!("{path}: `super` leaves the module; say `crate`"));
    }
    complaints
}

fn complaints_of_crates(source: &Source) -> Vec<String> {
    let (module, path) = (source.module(), source.path.display());
    let code = source.code();
    let is_named = |prefix: &str| {
        code.match_indices(prefix)
            .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
            .any(|(at, _)| {
                let rest = code[at..].trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
                rest.starts_with("::")
            })
    };
    CRATES
        .iter()
        .filter(|(name, users)| !users.contains(&module.as_str()) && is_named(name))
        .map(|(name, _)| format!("{path}: `{module}` must not name `{name}`"))
        .collect()
}

fn complaints_of_form(source: &Source) -> Vec<String> {
    let path = source.path.display();
    let mut complaints = Vec::new();
    if !source.text.starts_with("//! ") {
        complaints.push(format!("{path}: opens without saying what it is (`//!`)"));
    }
    let lines = source.text.lines().count();
    let most = if source.path == Path::new("main.rs") {
        MAIN_LINES_MAX
    } else {
        FILE_LINES_MAX
    };
    if lines > most {
        complaints.push(format!("{path}: {lines} lines, more than {most}"));
    }
    complaints
}

/// Files that are not listed are not applied, which nothing else would notice.
fn complaints_of_migrations(files: &BTreeSet<String>, listed: &BTreeSet<String>) -> Vec<String> {
    files
        .symmetric_difference(listed)
        .map(|name| format!("{name}: in migrations/ or in src/store/migrations.rs, not in both"))
        .collect()
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut directories = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push(Source {
                    text: fs::read_to_string(&path).unwrap(),
                    path: path.strip_prefix(&root).unwrap().to_owned(),
                });
            }
        }
    }
    sources
}

fn no_complaints(rule: Rule) {
    let complaints: Vec<String> = sources().iter().flat_map(rule).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn modules_import_only_what_stands_below_them() {
    no_complaints(complaints_of_imports);
}

#[test]
fn crates_are_named_only_where_they_belong() {
    no_complaints(complaints_of_crates);
}

#[test]
fn files_open_with_what_they_are_and_stay_short() {
    no_complaints(complaints_of_form);
}

#[test]
fn every_migration_is_listed() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let files = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let listed = MIGRATIONS
        .iter()
        .map(|migration| format!("{}.sql", migration.name))
        .collect();
    let complaints = complaints_of_migrations(&files, &listed);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Each line of `cases`: how many complaints, the path, the text.
fn expect_complaints(rule: Rule, cases: &str) {
    for case in cases.trim().lines() {
        let mut parts = case.trim().splitn(3, ' ');
        let expected: usize = parts.next().unwrap().parse().unwrap();
        let source = Source {
            path: parts.next().unwrap().into(),
            text: parts.next().unwrap_or_default().to_owned(),
        };
        let complaints = rule(&source);
        assert_eq!(complaints.len(), expected, "{case}: {complaints:?}");
    }
}

#[test]
fn an_import_of_what_stands_above_is_found() {
    expect_complaints(
        complaints_of_imports,
        "
        0 cache.rs use crate::model::{Change, Position};
        1 cache.rs use crate::store::Store;
        0 cache.rs // as crate::store does
        2 store/load.rs use crate::{check::Checker, model::{Reason, cache}, feed::{self, Lease}};
        1 store/load.rs let x: crate::feed::Lease = y;
        0 store/load.rs use super::{log, Store};
        1 store/load.rs use super::super::feed;
        1 store/mod.rs use super::{feed, loader};
        1 main.rs use hallpass::{cli, server};
        1 helpers.rs
        ",
    );
}

#[test]
fn a_crate_named_where_it_does_not_belong_is_found() {
    expect_complaints(
        complaints_of_crates,
        "
        1 check.rs use tonic::Status;
        1 loader.rs let e: tonic_types::ErrorDetails = x;
        0 grpc/status.rs use tonic::Status;
        1 feed.rs use tokio_postgres::Client;
        1 embedded/cluster.rs use deadpool_postgres::Pool;
        0 store/mod.rs use deadpool_postgres::Pool;
        ",
    );
}

#[test]
fn a_file_out_of_form_is_found() {
    expect_complaints(
        complaints_of_form,
        "
        0 cache.rs //! What it is.
        1 cache.rs use std::fmt;
        ",
    );
    let lines = |count: usize| format!("//! What it is.{}", "\n".repeat(count));
    let cases = [
        ("main.rs", MAIN_LINES_MAX, 0),
        ("main.rs", MAIN_LINES_MAX + 1, 1),
        ("cache.rs", FILE_LINES_MAX, 0),
        ("cache.rs", FILE_LINES_MAX + 1, 1),
    ];
    for (path, count, expected) in cases {
        let source = Source {
            path: path.into(),
            text: lines(count),
        };
        assert_eq!(complaints_of_form(&source).len(), expected, "{path}");
    }
}

#[test]
fn a_migration_that_is_not_listed_is_found() {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let (one, two) = (names(&["1.sql"]), names(&["1.sql", "2.sql"]));
    assert_eq!(complaints_of_migrations(&two, &two).len(), 0);
    assert_eq!(complaints_of_migrations(&two, &one).len(), 1);
    assert_eq!(complaints_of_migrations(&one, &two).len(), 1);
}
