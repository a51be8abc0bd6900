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
                let value = masked(argument, &value);
                let is_number = value.parse::<u64>().is_ok();
                let value = if is_number { value } else { quoted(&value) };
                writeln!(text, "{name} = {value} # {source}")
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

/// The value without what opens a door: of a URL its password, else all of a secret.
pub(super) fn masked(argument: &Arg, value: &str) -> String {
    if !argument.is_hide_env_values_set() {
        return value.to_owned();
    }
    let Some((scheme, rest)) = value.split_once("://") else {
        return MASK.to_owned();
    };
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    let address = match address.rsplit_once('@') {
        Some((login, host)) => {
            let user = login
                .split_once(':')
                .map(|(user, _)| format!("{user}:{MASK}"));
            format!("{}@{host}", user.unwrap_or_else(|| login.to_owned()))
        }
        None => address.to_owned(),
    };
    let parameters = query
        .split('&')
        .filter(|parameter| !parameter.is_empty())
        .map(|parameter| match parameter.split_once('=') {
            Some((name, _)) if name.contains("password") => format!("{name}={MASK}"),
            _ => parameter.to_owned(),
        });
    let parameters: Vec<String> = parameters.collect();
    let question_mark = if parameters.is_empty() { "" } else { "?" };
    format!(
        "{scheme}://{address}{question_mark}{}",
        parameters.join("&")
    )
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
