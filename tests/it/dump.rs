//! A database as text, by PostgreSQL's own pg_dump, and scripts run by psql.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::{io::AsyncWriteExt, process::Command};
use tokio_postgres::Client;

use crate::sql::pid;

/// Schema and data, but for what `options` leave out. As the role of the URL sees it.
pub(crate) async fn dump(client: &Client, url: &str, options: &[&str]) -> Vec<String> {
    let output = Command::new(server_program(client, "pg_dump").await)
        .args(options)
        .args(["--dbname", url])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8(output.stdout).unwrap();
    // Random each time: newer versions put a word around the script that psql must find again.
    let is_kept = |line: &&str| {
        !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict") && !line.is_empty()
    };
    text.lines().filter(is_kept).map(str::to_owned).collect()
}

/// Runs a script as an operator would who pipes it in; returns the exit code and standard error.
pub(crate) async fn psql(url: &str, script: &str) -> (i32, String) {
    let mut child = Command::new("psql")
        .args(["--no-psqlrc", "--quiet", "--dbname", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let script = script.to_owned();
    // One that stops at an error does not read on.
    let written = tokio::spawn(async move { drop(input.write_all(script.as_bytes()).await) });
    let output = child.wait_with_output().await.unwrap();
    written.await.unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), error)
}

/// Beside the server's own program: another version's might refuse this server.
async fn server_program(client: &Client, name: &str) -> PathBuf {
    let postgres = format!("/proc/{}/exe", pid(client).await);
    let postgres = fs::read_link(Path::new(&postgres)).unwrap();
    postgres.with_file_name(name)
}

/// Asserts that two lists have the same lines in the same order, and shows those that one alone has.
pub(crate) fn assert_same(before: &[String], after: &[String], what: &str) {
    let gone: Vec<_> = before.iter().filter(|l| !after.contains(l)).collect();
    let come: Vec<_> = after.iter().filter(|l| !before.contains(l)).collect();
    assert!(before == after, "{what}: gone {gone:#?}, come {come:#?}");
}
