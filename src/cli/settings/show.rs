//! The settings as they are shown: with their values, and in the documentation.

use std::fmt::Write as _;

use clap::Arg;

use super::Parsed;

/// Stands for what is not shown.
const MASK: &str = "***";

/// Each setting with its value and where that comes from, as a file for `--config`; secrets are masked.
pub(in crate::cli) fn print(parsed: &Parsed) -> String {
    let mut text = String::new();
    for (name, argument, value, source) in parsed.values() {
        // Writing to a string cannot fail.
        let _ = match value {
            None => writeln!(text, "# {name} is not set"),
            Some(value) => {
                let shown = masked(argument, &value);
                // What is masked would be taken for what it stands for.
                let comment = if shown == value { "" } else { "# " };
                let number = value.parse::<u64>().ok().map(|number| number.to_string());
                let shown = if number.as_ref() == Some(&value) {
                    value
                } else {
                    quoted(&shown)
                };
                writeln!(text, "{comment}{name} = {shown} # {source}")
            }
        };
    }
    text
}

/// As TOML has a string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Parameters of a database's URL that open no door.
const SHOWN: [&str; 9] = [
    "application_name",
    "connect_timeout",
    "dbname",
    "host",
    "options",
    "port",
    "sslmode",
    "sslrootcert",
    "user",
];

/// The value without what opens a door: of a URL its password, and parameters that are not known to be harmless; else all
/// of a secret. A password may hold any character, so all up to the last `@` is the login; where that has a `?` it may as
/// well be parameters, a password among them, and nothing is shown but the scheme.
pub(super) fn masked(argument: &Arg, value: &str) -> String {
    if !argument.is_hide_env_values_set() {
        return value.to_owned();
    }
    let Some((scheme, rest)) = value.split_once("://") else {
        return MASK.to_owned();
    };
    let (login, rest) = match rest.rsplit_once('@') {
        Some((login, _)) if login.contains('?') => return format!("{scheme}://{MASK}"),
        Some((login, rest)) => match login.split_once(':') {
            Some((user, _)) => (format!("{user}:{MASK}@"), rest),
            None => (format!("{login}@"), rest),
        },
        None => (String::new(), rest),
    };
    let Some((address, query)) = rest.split_once('?') else {
        return format!("{scheme}://{login}{rest}");
    };
    let parameters = query
        .split('&')
        .map(|parameter| match parameter.split_once('=') {
            Some((name, _)) if SHOWN.contains(&name) => parameter.to_owned(),
            Some((name, _)) => format!("{name}={MASK}"),
            None => MASK.to_owned(),
        });
    let parameters: Vec<String> = parameters.collect();
    format!("{scheme}://{login}{address}?{}", parameters.join("&"))
}

/// The page of all settings of `serve`.
#[cfg(test)]
pub(super) fn documentation() -> String {
    use clap::CommandFactory;
    let mut root = crate::cli::Cli::command();
    root.build();
    let rows = root.find_subcommand("serve").map(rows).unwrap_or_default();
    format!("{}{rows}", include_str!("settings.md"))
}

#[cfg(test)]
fn rows(command: &clap::Command) -> String {
    use crate::config::RELOADABLE;
    let mut rows = String::new();
    for (name, argument) in super::settings(command) {
        let variable = argument.get_env().unwrap_or_default().to_string_lossy();
        let defaults = argument.get_default_values().iter();
        let defaults: Vec<String> = defaults
            .map(|value| format!("`{}`", value.to_string_lossy()))
            .collect();
        let reloads = if RELOADABLE.contains(&name) {
            "yes"
        } else {
            ""
        };
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let help = help.replace('|', "\\|").replace('\n', " ");
        let _ = writeln!(
            rows,
            "| `--{name}` | `{variable}` | {} | {reloads} | {help} |",
            defaults.join(", ")
        );
    }
    rows
}
