//! The cluster on disk: where it lies, who holds it, how it comes to be whole, and the commands that work on it.
//!
//! Invariant: a cluster that has a name is whole: `initdb` works beside it and the rename comes last. Everything
//! here but [`lock`] is done under that lock.

use std::{
    ffi::OsString,
    fmt::Display,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, Signal, geteuid, kill_process, test_kill_process},
};
use tracing::info;
use uuid::Uuid;

use super::{
    CONNECTIONS_MAX, EmbeddedError, NAME, Options, PORT, START_WAIT,
    account::{Account, is_root},
    ignore_missing,
    programs::Programs,
    shim, wait_until,
};

/// The cluster's name in the data directory: a directory, or a link to one.
pub(super) const LINK: &str = "postgres";

/// Where root keeps a cluster whose data directory lies where postgres' user cannot go. Persistent, unlike /tmp.
const RELOCATED: &str = "/var/lib/hallpass";

/// `sun_path` and its terminating zero are 108 bytes on Linux, 104 on macOS and the BSDs.
const SOCKET_PATH_BYTES_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Copying 40 MB and syncing it: about a second on an SSD.
const INITDB_WAIT: Duration = Duration::from_secs(120);

/// The one who holds the lock may be making the cluster and then starting it.
const LOCK_WAIT: Duration = Duration::from_secs(INITDB_WAIT.as_secs() + START_WAIT.as_secs());

/// What postgres says is for people to read: more than this nobody will.
const LOG_BYTES_MAX: u64 = 10 * 1024 * 1024;

/// How much of the log an error quotes.
const QUOTED_LINES_MAX: usize = 5;
const QUOTED_BYTES_MAX: u64 = 4096;

/// Makes the data directory when it is missing; returns its absolute path without links.
pub(super) fn prepare_data_dir(data_dir: &Path) -> Result<PathBuf, EmbeddedError> {
    let prepare = || {
        if !data_dir.is_dir() {
            // Root's must be searchable for postgres' user; the cluster in it has a mode of its own.
            let mode = if is_root() { 0o711 } else { 0o700 };
            DirBuilder::new().recursive(true).create(data_dir)?;
            fs::set_permissions(data_dir, Permissions::from_mode(mode))?;
        }
        fs::canonicalize(data_dir)
    };
    prepare().map_err(|error| EmbeddedError::unusable(data_dir, error))
}

/// Holds off every other start in this data directory until the file is dropped.
pub(super) fn lock(data_dir: &Path) -> Result<File, EmbeddedError> {
    let path = data_dir.join("postgres.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| EmbeddedError::unusable(&path, error))?;
    let locked = wait_until(LOCK_WAIT, || {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(())),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(EmbeddedError::unusable(&path, error)),
        }
    })?;
    locked.map(|()| file).ok_or(EmbeddedError::Timeout {
        event: "another hallpass that starts in the same data directory",
        waited: LOCK_WAIT,
    })
}

/// A cluster that exists, or the place for one.
#[derive(Debug)]
pub(super) struct Cluster(PathBuf);

impl Cluster {
    #[cfg(test)]
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// The cluster of `data_dir`: `postgres` in it, or what that links to. A link is made when `account` could not
    /// reach the directory itself.
    pub(super) fn locate(data_dir: &Path, account: Account) -> Result<Self, EmbeddedError> {
        let link = data_dir.join(LINK);
        if let Ok(target) = fs::read_link(&link) {
            return Ok(Self(data_dir.join(target)));
        }
        if account.can_reach(data_dir) {
            return Ok(Self(link));
        }
        if link.exists() {
            let problem = format!("user {} cannot reach it", account.uid);
            return Err(EmbeddedError::unusable(&link, problem));
        }
        let target = Path::new(RELOCATED).join(Uuid::new_v4().simple().to_string());
        symlink(&target, &link).map_err(|error| EmbeddedError::unusable(&link, error))?;
        info!(
            "user {} cannot reach {}: the private PostgreSQL is put in {}",
            account.uid,
            data_dir.display(),
            target.display()
        );
        Ok(Self(target))
    }

    /// The major version that made the cluster; `None` when there is none yet.
    pub(super) fn version(&self) -> Option<u32> {
        let version = fs::read_to_string(self.0.join("PG_VERSION")).ok()?;
        version.trim().parse().ok()
    }

    /// Makes the cluster unless it is there. What an interrupted attempt left behind is removed.
    pub(super) fn initialize(&self, launcher: &Launcher) -> Result<(), EmbeddedError> {
        if self.0.join("PG_VERSION").exists() {
            return Ok(());
        }
        let mut partial = self.0.clone().into_os_string();
        partial.push(".new");
        let partial = Self(partial.into());
        // An initdb whose service was killed may need a moment to end.
        wait_until(INITDB_WAIT, || Ok((!partial.is_running()).then_some(())))?;
        partial
            .make_empty(launcher.account)
            .map_err(|error| EmbeddedError::unusable(&partial.0, error))?;
        launcher.initdb(&partial.0)?;
        fs::rename(&partial.0, &self.0).map_err(|error| EmbeddedError::unusable(&self.0, error))
    }

    fn make_empty(&self, account: Account) -> io::Result<()> {
        ignore_missing(fs::remove_dir_all(&self.0))?;
        if let Some(parent) = self.0.parent().filter(|parent| !parent.exists()) {
            DirBuilder::new().recursive(true).create(parent)?;
            fs::set_permissions(parent, Permissions::from_mode(0o711))?;
        }
        DirBuilder::new().mode(0o700).create(&self.0)?;
        own(&self.0, account)
    }

    /// Whether a postgres works in this cluster: the postmaster, or a backend that outlives it for a moment. Or an
    /// initdb, which removes what it made when its service is killed.
    ///
    /// Told by the working directory, since the number in `postmaster.pid` may be anyone's by now.
    #[cfg(target_os = "linux")]
    pub(super) fn is_running(&self) -> bool {
        let Ok(path) = fs::canonicalize(&self.0) else {
            return false;
        };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes.into_iter().any(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == path)
                && fs::read_to_string(process.path().join("comm"))
                    .is_ok_and(|comm| ["postgres", "initdb"].contains(&comm.trim()))
        })
    }

    /// Whether the process in `postmaster.pid` is a postgres.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn is_running(&self) -> bool {
        let Some(pid) = pid_in(&self.0.join("postmaster.pid")) else {
            return false;
        };
        let pid = pid.as_raw_nonzero().to_string();
        Command::new("ps")
            .args(["-o", "comm=", "-p", &pid])
            .output()
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("postgres"))
    }

    /// Where the postgres that runs here says its socket is: the fifth line of its pid file.
    pub(super) fn running_socket_dir(&self) -> Option<String> {
        let file = fs::read_to_string(self.0.join("postmaster.pid")).ok()?;
        let line = file.lines().nth(4)?;
        (!line.is_empty()).then(|| line.to_owned())
    }

    /// The directory for the socket: the cluster's own, or a private one with a shorter path.
    pub(super) fn socket_dir(&self, account: Account) -> Result<String, EmbeddedError> {
        if let Some(socket_dir) = as_socket_dir(&self.0) {
            return Ok(socket_dir);
        }
        let hash = blake3::hash(self.0.as_os_str().as_bytes()).to_hex();
        let name = format!("hallpass-{}-{}", account.uid, &hash[..8]);
        let parents = [std::env::temp_dir(), PathBuf::from("/tmp")];
        let (path, socket_dir) = parents
            .iter()
            .filter_map(|parent| fs::canonicalize(parent).ok())
            .filter(|parent| account.can_reach(parent))
            .map(|parent| parent.join(&name))
            .find_map(|path| Some((path.clone(), as_socket_dir(&path)?)))
            .ok_or_else(|| {
                EmbeddedError::unusable(&self.0, "no path for a socket is short enough")
            })?;
        make_private(&path, account)?;
        Ok(socket_dir)
    }

    /// Removes lock files that a dead postgres left and that postgres would not see through: it takes any process
    /// that now has the number in them for its rival. Called when nothing runs here.
    pub(super) fn remove_stale_locks(&self, socket_dir: &str) -> Result<(), EmbeddedError> {
        let socket_lock = Path::new(socket_dir).join(format!(".s.PGSQL.{PORT}.lock"));
        for path in [self.0.join("postmaster.pid"), socket_lock] {
            // One that names a dead process is left to postgres: it also looks for the shared memory in use.
            let dead = pid_in(&path).is_some_and(|pid| test_kill_process(pid).is_err());
            if !dead {
                ignore_missing(fs::remove_file(&path))
                    .map_err(|error| EmbeddedError::unusable(&path, error))?;
            }
        }
        Ok(())
    }

    /// What postgres is started with.
    pub(super) fn arguments(&self, socket_dir: &str, options: &Options) -> Vec<OsString> {
        // The setting is a list, in which quotes keep one path whole.
        let socket_dirs = format!("\"{}\"", socket_dir.replace('"', "\"\""));
        let fixed = [
            ("listen_addresses", ""),
            ("port", PORT),
            ("unix_socket_directories", &socket_dirs),
            ("unix_socket_permissions", "0700"),
            ("max_connections", CONNECTIONS_MAX),
        ];
        let extra = options
            .settings
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()));
        let mut arguments = vec!["-D".into(), self.0.clone().into_os_string()];
        for (name, value) in fixed.into_iter().chain(extra) {
            arguments.extend(["-c".into(), format!("{name}={value}").into()]);
        }
        arguments
    }
}

/// `directory` as URLs and postgres can name it, if its socket's path is short enough. A comma would make two hosts
/// of it.
fn as_socket_dir(directory: &Path) -> Option<String> {
    let bytes = directory.as_os_str().len() + "/.s.PGSQL.".len() + PORT.len();
    let name = directory.to_str()?;
    (bytes <= SOCKET_PATH_BYTES_MAX && !name.contains([',', '\n'])).then(|| name.to_owned())
}

/// Makes a directory in a public place for `account` alone, or makes sure that it is so.
fn make_private(path: &Path, account: Account) -> Result<(), EmbeddedError> {
    let unusable = |error: io::Error| EmbeddedError::unusable(path, error);
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(unusable(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(unusable)?;
    // Our own, when we are root, is one that an earlier start had no time to hand over.
    let owned = metadata.uid() == account.uid || metadata.uid() == geteuid().as_raw();
    if !metadata.is_dir() || !owned || metadata.mode() & 0o077 != 0 {
        let problem = format!("it should be a directory of user {} alone", account.uid);
        return Err(EmbeddedError::unusable(path, problem));
    }
    own(path, account).map_err(unusable)
}

fn own(path: &Path, account: Account) -> io::Result<()> {
    if is_root() {
        chown(path, Some(account.uid), Some(account.gid))?;
    }
    Ok(())
}

/// The process that a lock file of postgres names in its first line.
fn pid_in(path: &Path) -> Option<Pid> {
    let file = fs::read_to_string(path).ok()?;
    Pid::from_raw(file.lines().next()?.trim().parse().ok()?)
}

/// Runs PostgreSQL's programs as the right user, their output in `postgres.log`.
pub(super) struct Launcher {
    shim: PathBuf,
    account: Account,
    programs: Programs,
    log_path: PathBuf,
    log: File,
    /// Where this start's part of the log begins.
    log_offset: u64,
}

impl Launcher {
    pub(super) fn new(
        options: &Options,
        data_dir: &Path,
        account: Account,
        programs: Programs,
    ) -> Result<Self, EmbeddedError> {
        let log_path = data_dir.join("postgres.log");
        let open = || -> io::Result<(File, u64)> {
            let mut how = OpenOptions::new();
            how.create(true).append(true).read(true).mode(0o600);
            let log = how.open(&log_path)?;
            if log.metadata()?.len() > LOG_BYTES_MAX {
                log.set_len(0)?;
            }
            let log_offset = log.metadata()?.len();
            Ok((log, log_offset))
        };
        let (log, log_offset) =
            open().map_err(|error| EmbeddedError::unusable(&log_path, error))?;
        // Absolute, because the shim starts in another directory.
        let shim = std::path::absolute(&options.shim)
            .map_err(|error| EmbeddedError::unusable(&options.shim, error))?;
        Ok(Self {
            shim,
            account,
            programs,
            log_path,
            log,
            log_offset,
        })
    }

    /// Starts `program` in `directory`, behind the shim. The calling thread must live as long as the child.
    pub(super) fn spawn(
        &self,
        program: &str,
        directory: &Path,
        arguments: &[OsString],
    ) -> Result<Child, EmbeddedError> {
        let spawn = || {
            let mut command = Command::new(&self.shim);
            command
                .args(shim::arguments(self.account))
                .arg(self.programs.directory.join(program))
                .args(arguments)
                // Ours may be out of the account's reach; and by this one `is_running` knows them.
                .current_dir(directory)
                // The terminal's Ctrl-C is for the service, which stops postgres in order.
                .process_group(0)
                .stdin(Stdio::null())
                .stdout(self.log.try_clone()?)
                .stderr(self.log.try_clone()?);
            for (name, _) in std::env::vars_os() {
                // PGPORT and the like are settings for postgres too; and it would tell systemd of itself as the service.
                if name.as_bytes().starts_with(b"PG") || name == "NOTIFY_SOCKET" {
                    command.env_remove(name);
                }
            }
            command.spawn()
        };
        spawn().map_err(|error| EmbeddedError::unusable(&self.shim, error))
    }

    fn initdb(&self, directory: &Path) -> Result<(), EmbeddedError> {
        info!(
            "making a private PostgreSQL {} with the programs of {}",
            self.programs.major,
            self.programs.directory.display()
        );
        let mut arguments: Vec<OsString> = vec!["-D".into(), directory.into()];
        let fixed = "--encoding=UTF8 --locale=C --auth=trust --no-instructions";
        arguments.extend(fixed.split(' ').map(OsString::from));
        arguments.push(format!("--username={NAME}").into());
        let mut child = self.spawn("initdb", directory, &arguments)?;
        let status = wait_until(INITDB_WAIT, || {
            child
                .try_wait()
                .map_err(|error| self.failure("initdb", &error))
        });
        match status {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => Err(self.failure("initdb", &status)),
            Ok(None) => {
                self.give_up(child);
                Err(EmbeddedError::Timeout {
                    event: "initdb",
                    waited: INITDB_WAIT,
                })
            }
            Err(error) => {
                self.give_up(child);
                Err(error)
            }
        }
    }

    /// Ends a program that did not do what it should; the error that is on its way says why.
    pub(super) fn give_up(&self, mut child: Child) {
        if matches!(child.try_wait(), Ok(None)) {
            // Not SIGKILL, which would leave children behind. It may be gone meanwhile, which is as good.
            kill_process(Pid::from_child(&child), Signal::QUIT).ok();
            drop(wait_until(super::IMMEDIATE_STOP_WAIT, || {
                Ok(child.try_wait().ok().flatten())
            }));
        }
    }

    pub(super) fn failed(&self, problem: &dyn Display) -> EmbeddedError {
        self.failure("postgres", problem)
    }

    /// `problem` and the last lines that this start has put into the log.
    fn failure(&self, program: &'static str, problem: &dyn Display) -> EmbeddedError {
        let quoted = self.last_lines().unwrap_or_else(|error| error.to_string());
        EmbeddedError::Failed {
            program,
            problem: format!("{problem}: {quoted}"),
            log: self.log_path.clone(),
        }
    }

    fn last_lines(&self) -> io::Result<String> {
        let mut log = self.log.try_clone()?;
        let end = log.metadata()?.len();
        let begin = self.log_offset.max(end.saturating_sub(QUOTED_BYTES_MAX));
        log.seek(SeekFrom::Start(begin))?;
        let mut bytes = Vec::new();
        log.take(QUOTED_BYTES_MAX).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        let first = lines.len().saturating_sub(QUOTED_LINES_MAX);
        Ok(lines[first..].join(" | "))
    }
}
