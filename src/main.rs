//! The hallpass program: the shim in front of postgres, or a command.

use std::{
    env,
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

use hallpass::{cli, embedded};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `check` and `list` say deny with 1, so that nothing else may.
const EXIT_ERROR: u8 = 2;

fn main() -> ExitCode {
    // First of all, because the shim must be a process of one thread.
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    if let Some((first, rest)) = arguments.split_first()
        && first == embedded::SHIM_COMMAND
    {
        return embedded::run_shim(rest);
    }
    cli::run().unwrap_or_else(|error| {
        // Where standard error is closed there is nobody to tell.
        drop(writeln!(io::stderr(), "hallpass: {error:#}"));
        ExitCode::from(EXIT_ERROR)
    })
}
