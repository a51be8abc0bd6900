//! The private PostgreSQL, from outside: it starts, keeps its data, outlives crashes and leaves nothing behind.
//!
//! Every test works as root and as an ordinary user; where the two differ, a comment says so.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{BufRead, BufReader, Read},
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use hallpass::embedded::{PrivatePostgres, SHIM_COMMAND};
use rustix::process::{Pid, Signal, geteuid, kill_process};

use crate::support::{self, HALLPASS, options, temporary_directory};

/// What nothing here should take; a test that gets there has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The user that stands for "an ordinary user" when the tests run as root.
const NOBODY: u32 = 65534;

fn psql(url: &str, sql: &str) -> String {
    let output = Command::new("psql")
        .args([
            "-X",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            url,
            "-c",
            sql,
        ])
        // The URL alone must be enough.
        .env("PGPORT", "1")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{sql}: {errors}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[expect(clippy::disallowed_methods, reason = "these tests have no tasks")]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The processes at work in `cluster`; zombies have no working directory.
fn processes_in(cluster: &Path) -> Vec<u32> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == cluster))
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

fn pid_file(cluster: &Path) -> u32 {
    let file = fs::read_to_string(cluster.join("postmaster.pid")).unwrap();
    file.lines().next().unwrap().parse().unwrap()
}

fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Kills every process of `cluster` and leaves its lock files lying about.
fn kill_cluster(cluster: &Path) {
    kill(pid_file(cluster), Signal::KILL);
    eventually("backends follow their postmaster", || {
        processes_in(cluster).is_empty()
    });
    assert!(cluster.join("postmaster.pid").exists());
}

/// A `hallpass postgres` of its own process, and what it printed.
struct Program {
    child: Child,
    url: String,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut url = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut url).unwrap();
        if url.is_empty() {
            let mut errors = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut errors)
                .unwrap();
            child.wait().unwrap();
            panic!("no URL: {errors}");
        }
        let url = url.trim_end().to_owned();
        Self { child, url }
    }

    fn end(mut self, signal: Signal) -> ExitStatus {
        kill(self.child.id(), signal);
        self.child.wait().unwrap()
    }
}

/// A process that must not outlive its test, whether that passes or not.
struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn hallpass_postgres(data_dir: &Path) -> Command {
    let mut command = Command::new(HALLPASS);
    command.args(["postgres", "--data-dir"]).arg(data_dir);
    command
}

#[test]
fn it_starts_answers_stops_and_keeps_its_data() {
    let directory = temporary_directory();
    let options = options(&directory.path().join("data"));
    let cluster = options.data_dir.join("postgres");

    let postgres = PrivatePostgres::start(&options).unwrap();
    assert!(postgres.is_owner());
    let shown = "SELECT current_database(), current_user, current_setting('listen_addresses'), \
                 current_setting('unix_socket_permissions'), current_setting('server_encoding'), \
                 current_setting('lc_collate'), current_setting('fsync'), \
                 current_setting('max_connections')";
    // lc_collate is a setting up to PostgreSQL 15.
    let shown = shown.replace(
        "current_setting('lc_collate')",
        "(SELECT datcollate FROM pg_database WHERE datname = current_database())",
    );
    assert_eq!(
        psql(&postgres.url(), &shown),
        "hallpass|hallpass||0700|UTF8|C|off|400"
    );
    psql(&postgres.url(), "CREATE TABLE kept AS SELECT 42 AS n");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&cluster), 0o700);
    assert_eq!(mode(&options.data_dir.join("postgres.log")), 0o600);
    postgres.stop().unwrap();
    assert!(processes_in(&cluster).is_empty());
    assert!(!cluster.join("postmaster.pid").exists());

    let postgres = PrivatePostgres::start(&options).unwrap();
    assert_eq!(psql(&postgres.url(), "SELECT n FROM kept"), "42");
    psql(&postgres.url_for("postgres"), "DROP DATABASE hallpass");
    drop(postgres);
    assert!(processes_in(&cluster).is_empty(), "a drop stops it too");

    let postgres = PrivatePostgres::start(&options).unwrap();
    assert_eq!(psql(&postgres.url(), "SELECT 1"), "1");
}

#[test]
fn a_second_start_attaches_and_leaves_it_running() {
    let directory = temporary_directory();
    let options = options(directory.path());
    let starts = [(); 4].map(|()| {
        let options = options.clone();
        thread::spawn(move || PrivatePostgres::start(&options).unwrap())
    });
    let started = starts.map(|start| start.join().unwrap());
    let (owners, attached): (Vec<_>, Vec<_>) =
        started.into_iter().partition(PrivatePostgres::is_owner);
    assert_eq!((owners.len(), attached.len()), (1, 3));
    for other in attached {
        assert_eq!(other.url(), owners[0].url());
        other.stop().unwrap();
    }
    assert_eq!(psql(&owners[0].url(), "SELECT 1"), "1");
}

#[tokio::test]
async fn the_service_learns_that_postgres_died_by_itself() {
    let directory = temporary_directory();
    // Called from a runtime on purpose: a caller that forgets `spawn_blocking` blocks, and no worse.
    let postgres = PrivatePostgres::start(&options(directory.path())).unwrap();
    let exited = postgres.exited();
    kill(pid_file(&directory.path().join("postgres")), Signal::QUIT);
    tokio::time::timeout(PATIENCE, exited).await.unwrap();
    postgres.stop().unwrap();
}

#[test]
fn lock_files_that_name_an_unrelated_process_do_not_hold_it_up() {
    let directory = temporary_directory();
    let options = options(directory.path());
    let cluster = directory.path().join("postgres");
    let postgres = PrivatePostgres::start(&options).unwrap();
    let durably = "SET synchronous_commit = on; CREATE TABLE kept (n int)";
    psql(&postgres.url(), durably);
    let dead = pid_file(&cluster);
    kill_cluster(&cluster);
    drop(postgres);

    // Of the same user as postgres, or postgres would see by itself that it cannot be its rival.
    let owner = fs::metadata(&cluster).unwrap();
    let mut unrelated = Command::new("sleep");
    unrelated
        .arg("1000")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if geteuid().is_root() {
        unrelated.uid(owner.uid()).gid(owner.gid());
    }
    let mut unrelated = KilledOnDrop(unrelated.spawn().unwrap());
    for name in ["postmaster.pid", ".s.PGSQL.5432.lock"] {
        let path = cluster.join(name);
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replacen(&dead.to_string(), &unrelated.0.id().to_string(), 1);
        fs::write(&path, text).unwrap();
    }
    let postgres = PrivatePostgres::start(&options).unwrap();
    assert!(postgres.is_owner());
    assert_eq!(psql(&postgres.url(), "SELECT count(*) FROM kept"), "0");
    assert!(
        unrelated.0.try_wait().unwrap().is_none(),
        "it is left alone"
    );
    drop(unrelated);

    // And one that a crash left empty, over which postgres stumbles too.
    kill_cluster(&cluster);
    drop(postgres);
    fs::write(cluster.join("postmaster.pid"), "").unwrap();
    PrivatePostgres::start(&options).unwrap().stop().unwrap();
}

#[test]
fn what_an_interrupted_initdb_left_is_replaced() {
    let directory = temporary_directory();
    let options = options(directory.path());
    let partial = directory.path().join("postgres.new");
    fs::create_dir_all(partial.join("base/1")).unwrap();
    fs::write(partial.join("PG_VERSION"), "15\n").unwrap();
    let postgres = PrivatePostgres::start(&options).unwrap();
    assert_eq!(psql(&postgres.url(), "SELECT 1"), "1");
    assert!(!partial.exists());
}

#[test]
fn a_kill_in_the_middle_of_initdb_does_not_wedge_the_next_start() {
    let directory = temporary_directory();
    let mut child = hallpass_postgres(directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = directory.path().join("postgres.new/PG_VERSION");
    eventually("initdb begins", || begun.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!directory.path().join("postgres").exists());
    let postgres = PrivatePostgres::start(&options(directory.path())).unwrap();
    assert!(postgres.is_owner());
    assert_eq!(psql(&postgres.url(), "SELECT 1"), "1");
}

#[test]
fn a_failed_start_quotes_postgres_and_leaves_nothing_running() {
    let directory = temporary_directory();
    let mut options = options(directory.path());
    options
        .settings
        .push(("no_such_setting".to_owned(), "1".to_owned()));
    let line = PrivatePostgres::start(&options).unwrap_err().to_string();
    assert!(
        line.contains("no_such_setting") && line.contains("postgres.log"),
        "{line}"
    );
    assert!(!line.contains('\n'), "{line}");
    assert!(processes_in(&directory.path().join("postgres")).is_empty());
}

#[test]
fn a_log_that_grew_too_large_is_begun_anew() {
    let directory = temporary_directory();
    let log = directory.path().join("postgres.log");
    fs::write(&log, vec![b'x'; 11 * 1024 * 1024]).unwrap();
    PrivatePostgres::start(&options(directory.path()))
        .unwrap()
        .stop()
        .unwrap();
    assert!(fs::metadata(&log).unwrap().len() < 1024 * 1024);
}

#[test]
fn a_path_too_long_or_too_odd_for_a_socket_gets_a_short_one() {
    let directory = temporary_directory();
    for name in ["x".repeat(120), "a,b".to_owned()] {
        let data_dir = directory.path().join(name);
        let postgres = PrivatePostgres::start(&options(&data_dir)).unwrap();
        assert_eq!(psql(&postgres.url(), "SELECT 1"), "1");
        let url = postgres.url();
        let socket_dir = url
            .split("host=")
            .nth(1)
            .unwrap()
            .split('&')
            .next()
            .unwrap();
        let socket_dir = PathBuf::from(socket_dir);
        let metadata = fs::symlink_metadata(&socket_dir).unwrap();
        let owner = fs::metadata(data_dir.join("postgres")).unwrap().uid();
        assert_eq!(metadata.uid(), owner);
        assert_eq!(metadata.mode() & 0o777, 0o700);
        let again = PrivatePostgres::start(&options(&data_dir)).unwrap();
        assert!(!again.is_owner());
        assert_eq!(again.url(), url);
        postgres.stop().unwrap();

        // Somebody else's directory in its place is refused. Root may use any; it refuses the open mode.
        fs::set_permissions(&socket_dir, Permissions::from_mode(0o777)).unwrap();
        let line = PrivatePostgres::start(&options(&data_dir))
            .unwrap_err()
            .to_string();
        assert!(line.contains("directory of user"), "{line}");
        fs::remove_dir(&socket_dir).unwrap();
        std::os::unix::fs::symlink("/tmp", &socket_dir).unwrap();
        let line = PrivatePostgres::start(&options(&data_dir))
            .unwrap_err()
            .to_string();
        assert!(line.contains("directory of user"), "{line}");
        fs::remove_file(&socket_dir).unwrap();
    }
}

#[test]
fn a_path_with_spaces_quotes_and_percents_works() {
    let directory = temporary_directory();
    let data_dir = directory.path().join("a b\"c%20'é&?");
    let postgres = PrivatePostgres::start(&options(&data_dir)).unwrap();
    assert_eq!(psql(&postgres.url(), "SELECT 1"), "1");
    let again = PrivatePostgres::start(&options(&data_dir)).unwrap();
    assert!(!again.is_owner(), "the URL leads tokio-postgres there too");
}

/// Root only: an ordinary user's cluster always lies where that user can go.
#[test]
fn a_data_directory_out_of_reach_for_postgres_links_to_one_within() {
    if !geteuid().is_root() {
        return;
    }
    let directory = temporary_directory();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).unwrap();
    let options = options(&directory.path().join("data"));
    let postgres = PrivatePostgres::start(&options).unwrap();
    psql(&postgres.url(), "CREATE TABLE kept AS SELECT 42 AS n");
    let target = fs::read_link(options.data_dir.join("postgres")).unwrap();
    assert!(target.starts_with("/var/lib/hallpass"), "{target:?}");
    postgres.stop().unwrap();
    let postgres = PrivatePostgres::start(&options).unwrap();
    assert_eq!(psql(&postgres.url(), "SELECT n FROM kept"), "42");
    postgres.stop().unwrap();
    // A container's own /var/lib may be gone when a data directory comes back.
    fs::remove_dir_all(&target).unwrap();
    let postgres = PrivatePostgres::start(&options).unwrap();
    postgres.stop().unwrap();
    fs::remove_dir_all(&target).unwrap();
}

#[test]
fn an_ordinary_user_runs_it_and_root_then_runs_it_as_that_user() {
    let directory = temporary_directory();
    // A copy, since the build directory may be out of the user's reach.
    let program = directory.path().join("hallpass");
    fs::copy(HALLPASS, &program).unwrap();
    let data_dir = directory.path().join("data");
    DirBuilder::new().mode(0o700).create(&data_dir).unwrap();
    let mut command = Command::new(&program);
    command.args(["postgres", "--data-dir"]).arg(&data_dir);
    if geteuid().is_root() {
        chown(&data_dir, Some(NOBODY), Some(NOBODY)).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    let user = fs::metadata(&data_dir).unwrap().uid();
    let program = Program::start(&mut command);
    psql(&program.url, "CREATE TABLE kept AS SELECT 42 AS n");
    let cluster = data_dir.join("postgres");
    let postmaster = PathBuf::from(format!("/proc/{}", pid_file(&cluster)));
    assert_eq!(fs::metadata(postmaster).unwrap().uid(), user);
    assert!(program.end(Signal::TERM).success());
    assert!(processes_in(&cluster).is_empty());

    let postgres = PrivatePostgres::start(&options(&data_dir)).unwrap();
    assert_eq!(psql(&postgres.url(), "SELECT n FROM kept"), "42");
    assert_eq!(fs::metadata(&cluster).unwrap().uid(), user);
}

/// As root: postgres keeps none of root's groups or capabilities.
#[test]
fn postgres_has_one_user_and_one_group() {
    let directory = temporary_directory();
    let _postgres = PrivatePostgres::start(&options(directory.path())).unwrap();
    let pid = pid_file(&directory.path().join("postgres"));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> Vec<String> {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    };
    for ids in [field("Uid:"), field("Gid:")] {
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    }
    assert_ne!(field("Uid:")[0], "0");
    assert_eq!(field("CapEff:"), ["0000000000000000"]);
    if geteuid().is_root() {
        assert!(field("Groups:").is_empty());
    }
}

#[test]
fn a_killed_hallpass_leaves_no_postgres() {
    let directory = temporary_directory();
    let cluster = directory.path().join("postgres");
    let program = Program::start(&mut hallpass_postgres(directory.path()));
    psql(&program.url, "CREATE TABLE kept AS SELECT 42 AS n");
    assert!(!processes_in(&cluster).is_empty());
    assert!(!program.end(Signal::KILL).success());
    // Without a pause: the next start waits for the one that is shutting down, or comes after it.
    let postgres = PrivatePostgres::start(&options(directory.path())).unwrap();
    assert!(postgres.is_owner());
    assert_eq!(psql(&postgres.url(), "SELECT n FROM kept"), "42");
    postgres.stop().unwrap();

    let program = Program::start(&mut hallpass_postgres(directory.path()));
    program.end(Signal::KILL);
    eventually("postgres ends with its service", || {
        processes_in(&cluster).is_empty()
    });
    let log = fs::read_to_string(directory.path().join("postgres.log")).unwrap();
    assert!(
        log.trim_end().ends_with("database system is shut down"),
        "in order"
    );
}

#[test]
fn the_command_prints_its_url_and_ends_with_zero_when_interrupted() {
    let directory = temporary_directory();
    let mut program = Program::start(&mut hallpass_postgres(directory.path()));
    let stderr = program.child.stderr.take().unwrap();
    assert!(
        program
            .url
            .starts_with("postgresql:///hallpass?host=/tmp/hallpass-")
    );
    let url = program.url.clone();
    assert!(program.end(Signal::INT).success());
    let errors = std::io::read_to_string(stderr).unwrap();
    assert!(errors.contains(&format!("psql '{url}'\n")), "{errors}");
    assert!(processes_in(&directory.path().join("postgres")).is_empty());
}

#[test]
fn an_error_is_one_line_and_exit_code_two() {
    let directory = temporary_directory();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let output = hallpass_postgres(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.starts_with("hallpass: cannot use `/tmp/"), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
}

#[test]
fn the_shim_runs_nothing_for_a_parent_that_is_gone() {
    let mut shim = Command::new(HALLPASS);
    shim.arg(SHIM_COMMAND)
        .args(["--uid", &geteuid().as_raw().to_string(), "--gid", "0"])
        .args(["--parent", "1", "--", "echo", "ran"]);
    let output = shim.output().unwrap();
    assert_eq!(output.status.code(), Some(126));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("process 1"));
}

#[test]
fn the_shared_cluster_is_one() {
    let urls = [(); 2].map(|()| thread::spawn(|| support::cluster().url()).join().unwrap());
    assert_eq!(urls[0], urls[1]);
    // The thread that started it has ended; its postgres has not.
    assert_eq!(psql(&urls[0], "SHOW max_connections"), "400");
}
