//! Where the machine keeps PostgreSQL's server programs, which distributions leave out of PATH.

use std::{
    env, fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::Command,
};

use super::{EmbeddedError, cluster::Cluster};

const SUPPORTED: RangeInclusive<u32> = 14..=18;

/// Directories of version directories, and what stands before the version in their names.
const VERSIONED: [(&str, &str); 3] = [
    ("/usr/lib/postgresql", ""),
    ("/opt/homebrew/opt", "postgresql@"),
    ("/usr/local/opt", "postgresql@"),
];

/// A directory with `initdb` and `postgres` in it, and their major version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Programs {
    pub(super) directory: PathBuf,
    pub(super) major: u32,
}

/// Every pair of server programs on this machine, the best first.
pub(super) fn installed() -> Vec<Programs> {
    directories()
        .into_iter()
        .filter_map(|directory| {
            let major = version(&directory)?;
            Some(Programs { directory, major })
        })
        .collect()
}

/// The first of `installed` that is supported; for a cluster that exists, the first in the version that made it.
pub(super) fn choose(installed: &[Programs], cluster: &Cluster) -> Result<Programs, EmbeddedError> {
    let made_by = cluster.version();
    let chosen = installed.iter().find(|programs| match made_by {
        Some(major) => programs.major == major,
        None => SUPPORTED.contains(&programs.major),
    });
    match (chosen, made_by) {
        (Some(programs), _) => Ok(programs.clone()),
        (None, Some(major)) if !installed.is_empty() => Err(EmbeddedError::OtherVersion {
            cluster: cluster.path().to_owned(),
            major,
        }),
        (None, _) => Err(EmbeddedError::NotInstalled),
    }
}

/// Where to look, best first: PATH, `pg_config`, Debian's and Homebrew's directories.
fn directories() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .collect();
    directories.extend(pg_config());
    for (parent, prefix) in VERSIONED {
        directories.extend(newest_first(Path::new(parent), prefix));
    }
    directories
}

fn pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    let directory = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    directory.is_absolute().then_some(directory)
}

fn newest_first(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut versions: Vec<u32> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_prefix(prefix)?.parse().ok())
        .collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions
        .iter()
        .map(|version| parent.join(format!("{prefix}{version}")).join("bin"))
        .collect()
}

/// The major version of the server programs in `directory`, if it has them.
fn version(directory: &Path) -> Option<u32> {
    if !directory.join("initdb").is_file() {
        return None;
    }
    let postgres = directory.join("postgres");
    let output = Command::new(postgres).arg("--version").output().ok()?;
    major(&String::from_utf8_lossy(&output.stdout))
}

/// Reads `postgres (PostgreSQL) 15.14 (Debian 15.14-0)` and `postgres (PostgreSQL) 18beta1`.
fn major(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL) ")?.1;
    let end = number
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(number.len());
    number[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs(major: u32) -> Programs {
        Programs {
            directory: PathBuf::from(format!("/pg/{major}")),
            major,
        }
    }

    fn cluster_of(root: &Path, version: &str) -> Cluster {
        let path = root.join(version);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("PG_VERSION"), format!("{version}\n")).unwrap();
        Cluster::at(path)
    }

    #[test]
    fn no_server_programs_is_one_line_that_says_what_to_install() {
        let none_yet = Cluster::at(PathBuf::from("/missing"));
        for installed in [&[][..], &[programs(13)][..]] {
            let error = choose(installed, &none_yet).unwrap_err();
            assert!(matches!(error, EmbeddedError::NotInstalled));
            let line = error.to_string();
            assert!(line.contains("apt-get install postgresql") && line.contains("brew install"));
            assert!(!line.contains('\n'));
        }
    }

    #[test]
    fn the_first_supported_server_is_taken_or_the_one_that_made_the_cluster() {
        let root = tempfile::tempdir().unwrap();
        let installed = [programs(19), programs(17), programs(15)];
        let none_yet = Cluster::at(PathBuf::from("/missing"));
        assert_eq!(choose(&installed, &none_yet).unwrap(), programs(17));
        let of_15 = cluster_of(root.path(), "15");
        assert_eq!(choose(&installed, &of_15).unwrap(), programs(15));
        let error = choose(&installed, &cluster_of(root.path(), "16")).unwrap_err();
        assert!(error.to_string().contains("needs PostgreSQL 16"));
    }

    #[test]
    fn versions_are_ordered_as_numbers() {
        let root = tempfile::tempdir().unwrap();
        for name in ["pg@9", "pg@14", "pg@18", "pg@17", "pg", "other@3"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let expected = ["pg@18", "pg@17", "pg@14", "pg@9"];
        let expected: Vec<PathBuf> = expected
            .iter()
            .map(|name| root.path().join(name).join("bin"))
            .collect();
        assert_eq!(newest_first(root.path(), "pg@"), expected);
        assert!(newest_first(&root.path().join("missing"), "").is_empty());
    }

    #[test]
    fn a_directory_without_initdb_has_no_server_programs() {
        assert_eq!(version(Path::new("/bin")), None);
    }

    #[test]
    fn major_versions_are_read() {
        assert_eq!(
            major("postgres (PostgreSQL) 15.14 (Debian 15.14-0)\n"),
            Some(15)
        );
        assert_eq!(major("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major("postgres (PostgreSQL) 17"), Some(17));
        assert_eq!(major("something else"), None);
    }
}
