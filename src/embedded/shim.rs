//! `hallpass __postgres`: the moment between the service and postgres, in a process of its own.
//!
//! Gives up root, ties its life to the service's and becomes the program it was told to run. A process and not a
//! `pre_exec` closure, because that is unsafe code; and not `Command::uid`, because a change of user clears the
//! parent-death signal. Must run before any thread starts: these system calls change one thread only.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::{CommandExt, parent_id},
    process::{Command, ExitCode},
};

use super::account::Account;

/// The hidden first argument that makes hallpass the shim.
pub const SHIM_COMMAND: &str = "__postgres";

/// As a shell says that a command was found and could not be run.
const EXIT_CANNOT_RUN: u8 = 126;

/// The words after [`SHIM_COMMAND`] for a program to run as `account`.
pub(super) fn arguments(account: Account) -> Vec<String> {
    vec![
        SHIM_COMMAND.to_owned(),
        "--uid".to_owned(),
        account.uid.to_string(),
        "--gid".to_owned(),
        account.gid.to_string(),
        "--parent".to_owned(),
        std::process::id().to_string(),
        "--".to_owned(),
    ]
}

/// Runs the shim with the arguments after [`SHIM_COMMAND`]; returns only when that failed. What it prints lands in
/// `postgres.log`.
#[must_use]
pub fn run_shim(arguments: &[OsString]) -> ExitCode {
    let problem = match parse(arguments) {
        Some((account, parent, command)) => become_command(account, parent, command),
        None => "usage: --uid UID --gid GID --parent PID -- PROGRAM [ARGUMENT...]".to_owned(),
    };
    eprintln!("hallpass {SHIM_COMMAND}: {problem}");
    ExitCode::from(EXIT_CANNOT_RUN)
}

fn parse(arguments: &[OsString]) -> Option<(Account, u32, &[OsString])> {
    let (options, command) = arguments.split_at_checked(7)?;
    let value = |index: usize, name: &str| -> Option<u32> {
        (options[index] == name).then(|| options[index + 1].to_str()?.parse().ok())?
    };
    let account = Account {
        uid: value(0, "--uid")?,
        gid: value(2, "--gid")?,
    };
    let parent = value(4, "--parent")?;
    (options[6] == OsStr::new("--") && !command.is_empty()).then_some((account, parent, command))
}

/// Returns only what went wrong.
fn become_command(account: Account, parent: u32, command: &[OsString]) -> String {
    let mut program = Command::new(&command[0]);
    program.args(&command[1..]);
    if let Err(error) = drop_to(account, &mut program) {
        return format!("cannot become user {}: {error}", account.uid);
    }
    if let Err(error) = die_with_parent() {
        return format!("cannot ask for the parent-death signal: {error}");
    }
    // The parent may have died before the signal was asked for.
    if parent_id() != parent {
        return format!("process {parent}, which wanted this, is gone");
    }
    let error = program.exec();
    format!("cannot run `{}`: {error}", command[0].display())
}

/// Gives up root for good: supplementary groups first, since only root may drop them, the user last.
#[cfg(target_os = "linux")]
fn drop_to(account: Account, _program: &mut Command) -> io::Result<()> {
    use rustix::process::{Gid, Uid, geteuid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    if geteuid() == uid {
        return Ok(());
    }
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Elsewhere std drops groups, group and user as it executes the program.
#[cfg(not(target_os = "linux"))]
fn drop_to(account: Account, program: &mut Command) -> io::Result<()> {
    if rustix::process::geteuid().as_raw() != account.uid {
        program.gid(account.gid).uid(account.uid);
    }
    Ok(())
}

/// SIGINT is PostgreSQL's fast shutdown: clients are disconnected and the next start needs no recovery. SIGTERM
/// would wait for clients without end, SIGQUIT skip the checkpoint, SIGKILL leave backends and shared memory.
#[cfg(target_os = "linux")]
fn die_with_parent() -> io::Result<()> {
    use rustix::process::{Signal, set_parent_process_death_signal};

    Ok(set_parent_process_death_signal(Some(Signal::INT))?)
}

/// No such signal here: after a kill -9 of the service its postgres lives on, and the next start attaches to it.
#[cfg(not(target_os = "linux"))]
fn die_with_parent() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<(u32, u32, u32, usize)> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        parse(&words)
            .map(|(account, parent, command)| (account.uid, account.gid, parent, command.len()))
    }

    #[test]
    fn arguments_are_positional_and_complete() {
        let whole = "--uid 1 --gid 2 --parent 3 -- postgres -D /x";
        assert_eq!(parsed(whole), Some((1, 2, 3, 3)));
        for broken in [
            "",
            "--uid 1 --gid 2 --parent 3 --",
            "--uid 1 --gid 2 --parent 3 postgres -D",
            "--gid 1 --uid 2 --parent 3 -- postgres",
            "--uid root --gid 2 --parent 3 -- postgres",
        ] {
            assert_eq!(parsed(broken), None, "{broken}");
        }
    }

    #[test]
    fn what_the_service_says_is_what_the_shim_reads() {
        let said = arguments(Account { uid: 7, gid: 8 }).join(" ");
        let said = said.strip_prefix(SHIM_COMMAND).unwrap();
        let read = parsed(&format!("{said} postgres"));
        assert_eq!(read, Some((7, 8, std::process::id(), 1)));
    }
}
