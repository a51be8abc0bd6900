//! One PostgreSQL for the whole test process, made at its first use and gone when the process ends.
//!
//! Nobody drops a static: the parent-death signal takes postgres down, and the next run removes the directory.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process,
    sync::OnceLock,
};

use hallpass::embedded::{Options, PrivatePostgres};
use rustix::{
    io::Errno,
    process::{Pid, test_kill_process},
};

/// The directories of test runs are named by their process ids.
const PREFIX: &str = "hallpass-test-";

/// The hallpass program that cargo built for these tests.
pub(crate) const HALLPASS: &str = env!("CARGO_BIN_EXE_hallpass");

/// The cluster that tests share; each makes a database of its own in it.
pub(crate) fn cluster() -> &'static PrivatePostgres {
    static CLUSTER: OnceLock<PrivatePostgres> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        remove_directories_of_dead_runs();
        let data_dir = directory_of(process::id());
        drop(fs::remove_dir_all(&data_dir));
        PrivatePostgres::start(&options(&data_dir)).unwrap()
    })
}

/// Quick and careless, which a test may be: nothing survives a power cut.
pub(crate) fn options(data_dir: &Path) -> Options {
    let settings = [
        ("fsync", "off"),
        ("synchronous_commit", "off"),
        ("full_page_writes", "off"),
        ("max_connections", "400"),
    ];
    Options {
        data_dir: data_dir.to_owned(),
        shim: HALLPASS.into(),
        settings: settings
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
    }
}

/// A temporary directory that postgres' user can reach when the tests run as root.
pub(crate) fn temporary_directory() -> tempfile::TempDir {
    directory_in("/tmp")
}

/// As [`temporary_directory`], in memory where the machine has such a place. Files outlive a process that is killed
/// wherever they are; a disk would only make a test wait.
pub(crate) fn directory_in_memory() -> tempfile::TempDir {
    const MEMORY: &str = "/dev/shm";
    directory_in(if Path::new(MEMORY).is_dir() {
        MEMORY
    } else {
        "/tmp"
    })
}

fn directory_in(parent: &str) -> tempfile::TempDir {
    let directory = tempfile::Builder::new()
        .prefix("hallpass-")
        .tempdir_in(parent)
        .unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    directory
}

fn directory_of(pid: u32) -> PathBuf {
    Path::new("/tmp").join(format!("{PREFIX}{pid}"))
}

/// Leaves alone what it cannot remove: another user's, or one whose postgres is just ending.
fn remove_directories_of_dead_runs() {
    let names = fs::read_dir("/tmp").into_iter().flatten().flatten();
    let dead = names
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix(PREFIX)?
                .parse()
                .ok()
        })
        .filter_map(Pid::from_raw)
        .filter(|pid| test_kill_process(*pid) == Err(Errno::SRCH));
    for pid in dead {
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        drop(fs::remove_dir_all(directory_of(pid)));
    }
}
