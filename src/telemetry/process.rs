//! What the system says of this process, under the names that every exporter has for it. What it does not say is left out.

use std::{fmt, fs};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

use super::page::{Page, float};

/// Of `/proc/self/stat`, counted behind the command's name, which may hold spaces: user and system time, the start and the
/// resident pages.
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const START_TICKS: usize = 19;
const RESIDENT_PAGES: usize = 21;

pub(super) fn metrics(page: &mut Page<'_>) -> fmt::Result {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    let field = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<u64>().ok())
    };
    let ticks = float(clock_ticks_per_second());
    if let (Some(user), Some(system)) = (field(USER_TICKS), field(SYSTEM_TICKS)) {
        let seconds = float(user + system) / ticks;
        page.seconds_counter("process_cpu_seconds", "Processor time used", seconds)?;
    }
    if let Some(pages) = field(RESIDENT_PAGES) {
        let bytes = float(pages) * float(page_size() as u64);
        page.gauge("process_resident_memory_bytes", "Memory in use", bytes)?;
    }
    if let (Some(start), Some(boot)) = (field(START_TICKS), boot_time()) {
        let since_1970 = boot + float(start) / ticks;
        page.gauge(
            "process_start_time_seconds",
            "When the process began, since 1970",
            since_1970,
        )?;
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // The directory itself is open meanwhile.
        let count = open.count().saturating_sub(1);
        page.gauge(
            "process_open_fds",
            "File descriptors in use",
            float(count as u64),
        )?;
    }
    if let Some(max) = getrlimit(Resource::Nofile).current {
        page.gauge(
            "process_max_fds",
            "File descriptors that there may be",
            float(max),
        )?;
    }
    Ok(())
}

/// When the machine began, in seconds since 1970.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}
