//! What the alerts, the recording rules and the dashboard lean on exists: every metric in docs/metrics.md, every runbook
//! in docs/operations.md, and every alert is proven by a case of its own.

use std::{collections::BTreeSet, fs};

const RULES: &str = "deploy/prometheus/hallpass.rules.yml";
const CASES: [&str; 2] = [
    "deploy/prometheus/hallpass.rules.test.yml",
    "deploy/prometheus/hallpass.budget.test.yml",
];
const SCRAPES: [&str; 3] = [
    "deploy/prometheus/prometheus.yml",
    "deploy/compose/prometheus.yml",
    KUBERNETES,
];
const KUBERNETES: &str = "deploy/prometheus/kubernetes.yml";
const DEPLOYMENT: &str = "deploy/kubernetes/base/deployment.yaml";
const OVERLAY: &str = "deploy/kubernetes/overlays/production/kustomization.yaml";
const DASHBOARD: &str = "deploy/grafana/dashboards/hallpass.json";
const METRICS: &str = "docs/metrics.md";
const RUNBOOKS: &str = "docs/operations.md";

/// What a histogram's name is followed by where one of its series is meant.
const OF_A_HISTOGRAM: [&str; 3] = ["_bucket", "_sum", "_count"];

/// What a metric's name begins with; `up` is Prometheus's own.
const PREFIXES: [&str; 4] = ["hallpass_", "grpc_server_", "http_server_", "process_"];

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Names in the first column of the table, without labels.
fn documented(text: &str) -> BTreeSet<String> {
    let first_cell = |line: &str| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned());
    text.lines().filter_map(first_cell).collect()
}

/// The words of the text that look like a metric's name. A recorded series has a colon in it, and is none.
fn metrics_named(text: &str) -> BTreeSet<String> {
    let is_of_a_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = text.split(|c: char| !is_of_a_name(c));
    let is_metric =
        |word: &&str| !word.contains(':') && PREFIXES.iter().any(|prefix| word.starts_with(prefix));
    words.filter(is_metric).map(str::to_owned).collect()
}

fn unknown_metrics(text: &str, documented: &BTreeSet<String>) -> Vec<String> {
    let is_known = |name: &String| {
        let histogram = OF_A_HISTOGRAM
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix));
        documented.contains(name) || histogram.is_some_and(|name| documented.contains(name))
    };
    let named = metrics_named(text);
    named.into_iter().filter(|name| !is_known(name)).collect()
}

/// What the values of all `key: value` lines of a YAML text are.
fn values<'a>(key: &str, text: &'a str) -> Vec<&'a str> {
    let value = |line: &'a str| {
        let line = line.trim_start().trim_start_matches("- ");
        Some(line.strip_prefix(key)?.strip_prefix(": ")?.trim())
    };
    text.lines().filter_map(value).collect()
}

/// Where the headings of a page can be linked to, as GitHub has it.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| -> String {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        text.chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | ' '))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect()
    };
    headings.map(anchor).collect()
}

/// The queries of a dashboard, its variables' too.
fn queries(dashboard: &serde_json::Value) -> Vec<String> {
    match dashboard {
        serde_json::Value::Object(fields) => {
            let own = fields
                .iter()
                .filter(|(key, _)| matches!(key.as_str(), "expr" | "query" | "definition"))
                .filter_map(|(_, value)| value.as_str().map(str::to_owned));
            own.chain(fields.values().flat_map(queries)).collect()
        }
        serde_json::Value::Array(items) => items.iter().flat_map(queries).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn a_metric_that_nobody_documents_is_found() {
    let documented = documented("| `hallpass_ready` | | 1 |\n| `grpc_server_handling_seconds` | |");
    let text = "sum(rate(grpc_server_handling_seconds_bucket[5m])) / hallpass_redy + hallpass:errors:rate5m";
    assert_eq!(unknown_metrics(text, &documented), ["hallpass_redy"]);
}

#[test]
fn rules_and_dashboard_name_metrics_that_exist() {
    let documented = documented(&read(METRICS));
    assert!(documented.len() > 30, "{documented:?}");
    assert_eq!(unknown_metrics(&read(RULES), &documented), [""; 0]);
    for cases in CASES {
        assert_eq!(unknown_metrics(&read(cases), &documented), [""; 0]);
    }
    let dashboard = serde_json::from_str(&read(DASHBOARD)).unwrap();
    let queries = queries(&dashboard);
    assert!(queries.len() > 30, "{queries:?}");
    assert_eq!(unknown_metrics(&queries.join("\n"), &documented), [""; 0]);
}

/// The rules look for the job by its name, and Prometheus for pods by the names of the manifest.
#[test]
fn every_scrape_configuration_finds_hallpass_and_calls_it_that() {
    for path in SCRAPES {
        let text = read(path);
        assert_eq!(values("job_name", &text), ["hallpass"], "{path}");
        assert!(text.contains("credentials_file: "), "{path}");
    }
    let (scrape, manifest) = (read(KUBERNETES), read(DEPLOYMENT));
    let label = values("label", &scrape)[0].replace('=', ": ");
    assert!(manifest.contains(&label), "{label}");
    let port = values("regex", &scrape)[0];
    assert!(values("name", &manifest).contains(&port), "{port}");
    assert!(values("namespace", &read(OVERLAY)).contains(&"hallpass"));
    assert!(scrape.contains("names: [hallpass]"));
}

#[test]
fn every_alert_has_a_runbook_and_cases_that_fire_and_do_not() {
    let rules = read(RULES);
    let alerts: BTreeSet<&str> = values("alert", &rules).into_iter().collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    let anchors = anchors(&read(RUNBOOKS));
    let runbooks = values("runbook_url", &rules);
    assert_eq!(runbooks.len(), values("alert", &rules).len());
    for runbook in runbooks {
        let (page, anchor) = runbook.split_once('#').unwrap();
        assert!(page.ends_with(RUNBOOKS), "{runbook}");
        assert!(anchors.contains(anchor), "{runbook}");
    }
    let cases = CASES.map(read).join("\n");
    for alert in alerts {
        let of_it = format!("alertname=\"{alert}\"}}'\n");
        let expected: Vec<&str> = cases
            .split(&of_it)
            .skip(1)
            .filter_map(|rest| rest.split("- expr").next())
            .collect();
        let ends = |text: &&str| text.contains("exp_samples: []");
        assert!(!expected.iter().all(ends), "{alert} is never raised");
        assert!(expected.iter().any(ends), "{alert} never ends");
    }
}
