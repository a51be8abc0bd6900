//! `hallpass bench`: that it measures what it says, of a service of its own and of one that runs. Not how fast that is.

use std::{fs, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{
    commands::{PATIENCE, command, hallpass},
    database::Database,
    names::id,
    server::{APPROVE, Server, config, fill, within},
    support::{HALLPASS, temporary_directory},
};

fn rows<'a>(report: &'a Value, list: &str) -> Vec<(&'a str, f64, u64)> {
    let row = |row: &'a Value| {
        let failed = row["refused"].as_u64().unwrap() + row["lost"].as_u64().unwrap();
        (
            row["what"].as_str().unwrap().trim(),
            row["calls_a_second"].as_f64().unwrap(),
            failed,
        )
    };
    report[list].as_array().unwrap().iter().map(row).collect()
}

#[tokio::test]
async fn a_service_of_its_own_is_measured_in_every_way() {
    let directory = temporary_directory();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (data, json, svg) = (path("data"), path("figures.json"), path("load.svg"));
    let small = [
        "--organizations",
        "2",
        "--members",
        "20",
        "--duration",
        "1s",
    ];
    let load = [
        "--connections",
        "2",
        "--in-flight",
        "4",
        "--rates",
        "100,200",
        "--writes",
        "20",
    ];
    let to = [
        "--baseline",
        "--data-dir",
        &data,
        "--json",
        &json,
        "--svg",
        &svg,
    ];
    let ran = hallpass(&[&["bench"], &small[..], &load[..], &to[..]].concat()).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let closed = rows(&report, "rows");
    let names: Vec<&str> = closed.iter().map(|(name, ..)| *name).collect();
    let expected = [
        "empty RPC",
        "check",
        "batches of 100",
        "list",
        "miss, 1,000 a second",
        "check, 20 writes a second",
        "audit, 10 streams, 20/s",
    ];
    assert_eq!(names, expected, "{}", ran.out);
    for (name, calls, _) in &closed {
        assert!(*calls > 0.0, "{name}: {}", ran.out);
    }
    // The load keeps its pace, whatever the machine does.
    let open = rows(&report, "open_loop");
    assert_eq!(open.len(), 2, "{}", ran.out);
    for ((_, calls, failed), offered) in open.iter().zip([100.0, 200.0]) {
        let due = calls + f64::from(u32::try_from(*failed).unwrap());
        assert!(
            (due - offered).abs() < offered / 2.0,
            "{due} of {offered}: {}",
            ran.out
        );
    }
    assert!(report["ratio_to_empty_rpc"].as_f64().unwrap() > 0.0);
    assert!(ran.out.contains("came from the cache"), "{}", ran.out);
    let (looked_into, cached) = ran
        .out
        .lines()
        .find_map(|line| {
            let (cached, rest) = line.trim().split_once(" of ")?;
            let looked_into =
                rest.strip_suffix(" answers that were looked into came from the cache")?;
            Some((looked_into.to_owned(), cached.to_owned()))
        })
        .unwrap();
    assert_eq!(looked_into, cached);
    assert!(fs::read_to_string(&svg).unwrap().contains("<svg"));
}

/// The processes that this one has started.
fn children_of(pid: i32) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|child| parent_of(*child) == Some(pid)).collect()
}

/// `None` where there is no such process.
fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // PID (NAME) STATE PARENT, and a name may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

#[tokio::test]
async fn what_it_has_started_ends_when_it_is_told_to_end() {
    let directory = temporary_directory();
    let mut bench = command(HALLPASS)
        .args(["bench", "--organizations", "1", "--members", "20"])
        .args(["--baseline", "--duration", "1h", "--data-dir"])
        .arg(directory.path().join("data"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(bench.stdout.take().unwrap()).lines();
    let measures = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("calls/s") {
                return true;
            }
        }
        false
    };
    assert!(within("it measures", PATIENCE, measures).await);
    let pid = i32::try_from(bench.id().unwrap()).unwrap();
    let children = children_of(pid);
    assert_eq!(
        children.len(),
        3,
        "PostgreSQL, the service and the empty RPC: {children:?}"
    );

    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    let status = within("it ends", PATIENCE, bench.wait()).await.unwrap();
    assert_eq!(status.code(), Some(2));
    for child in children {
        assert_eq!(parent_of(child), None, "{child} has not ended");
    }
}

#[tokio::test]
async fn a_running_service_is_asked_what_it_is_told() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let directory = temporary_directory();
    let questions = directory.path().join("questions");
    let line = format!("{},{},{APPROVE}\n", id("lincoln"), id("bob"));
    fs::write(&questions, &line).unwrap();
    let asked = questions.to_str().unwrap();
    let pid = std::process::id().to_string();
    let arguments = [
        "bench",
        "--endpoint",
        &server.endpoint,
        "--questions",
        asked,
        "--server-pid",
        &pid,
    ];
    let load = [
        "--duration",
        "500ms",
        "--connections",
        "2",
        "--in-flight",
        "4",
        "--rates",
        "50",
    ];
    let ran = hallpass(&[&arguments[..], &load[..]].concat()).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    for row in ["check", "  50 a second", "batches of 100", "list", "miss"] {
        assert!(
            ran.out.lines().any(|line| line.starts_with(row)),
            "{row}: {}",
            ran.out
        );
    }

    let cases = [
        ("", "has no questions"),
        ("a,b\n", "questions:1: not ORGANIZATION,USER,PERMISSION"),
        ("\nx,y,z\n", "questions:2: the organization is no UUID"),
    ];
    for (text, complaint) in cases {
        fs::write(&questions, text).unwrap();
        let ran = hallpass(&arguments).await;
        assert!(
            ran.code == 2 && ran.err.contains(complaint),
            "{text:?}: {ran:?}"
        );
    }
    fs::write(&questions, &line).unwrap();
    for rate in ["0", "-1", "nan"] {
        let rates = format!("--rates={rate}");
        let ran = hallpass(&[&arguments[..], &[&rates]].concat()).await;
        ran.assert_one_line("each of --rates must be more than 0");
    }
    let changes = hallpass(&[&arguments[..], &["--workloads", "mixed"]].concat()).await;
    assert!(
        changes.code == 2 && changes.err.contains("of its own alone"),
        "{changes:?}"
    );
    server.stop().await;
}
