//! Settings from three places: a flag beats an environment variable, and that beats the file of `--config`.
//!
//! Invariant: what is set anywhere is a setting, with a value that it takes; else nothing is started, and everything that is
//! wrong is said at once. A secret is never shown.

mod file;
mod show;

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fmt,
    path::PathBuf,
};

use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};

pub(super) use self::show::print;
use super::Cli;

/// What names the file, and is none of its keys.
const CONFIG: &str = "config";
const CONFIG_VARIABLE: &str = "HALLPASS_CONFIG";

/// Arguments that are no settings.
const NO_SETTINGS: [&str; 4] = [CONFIG, "print-config", "help", "version"];

/// A name that is this much another's is taken for a mistake: two letters.
const MISTYPED_MAX: usize = 2;

/// What a command was told, and by whom.
pub(super) struct Parsed {
    /// Of the subcommand.
    matches: ArgMatches,
    command: Command,
    file: Option<PathBuf>,
    /// The line of each setting that the file has the last word on.
    lines: BTreeMap<String, usize>,
}

/// Everything that is wrong with the settings.
#[derive(Debug)]
pub(super) struct Complaints(Vec<String>);

impl std::error::Error for Complaints {}

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = &self.0[..] {
            return f.write_str(only);
        }
        write!(f, "{} settings cannot be used", self.0.len())?;
        self.0
            .iter()
            .try_for_each(|complaint| write!(f, "\n  {complaint}"))
    }
}

/// Why there is nothing to run.
#[derive(Debug)]
pub(super) enum Unusable {
    /// A help page among them.
    Line(clap::Error),
    Settings(Complaints),
}

/// Reads the settings of a process that was given these arguments, its own name first.
pub(super) fn parse(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<(Cli, Parsed), Unusable> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let mut root = Cli::command();
    root.build();
    let is_subcommand = |argument: &OsString| root.find_subcommand(argument).is_some();
    let place = arguments.iter().skip(1).position(is_subcommand);
    let command = place.and_then(|place| root.find_subcommand(&arguments[place + 1]));
    let mut complaints = Vec::new();
    let (mut file, mut lines) = (None, BTreeMap::new());
    if let (Some(place), Some(command)) = (place, command)
        && command
            .get_arguments()
            .any(|argument| argument.get_long() == Some(CONFIG))
    {
        let given = &arguments[1..];
        complaints.extend(mistaken_variables(&root, command, given));
        if let Some(path) = config_path(given) {
            let found = file::read(&path, command);
            complaints.extend(found.complaints);
            let mut added = Vec::new();
            for (name, setting) in found.settings {
                if is_given(command, &name, given) {
                    continue;
                }
                added.extend(setting.argument);
                lines.insert(name, setting.line);
            }
            arguments.splice(place + 2..place + 2, added);
            file = Some(path);
        }
    }
    if !complaints.is_empty() {
        return Err(Unusable::Settings(Complaints(complaints)));
    }
    let mut matches = root
        .try_get_matches_from_mut(arguments)
        .map_err(Unusable::Line)?;
    let cli = Cli::from_arg_matches(&matches).map_err(Unusable::Line)?;
    let (name, matches) = matches
        .remove_subcommand()
        .ok_or_else(|| Unusable::Settings(Complaints(vec!["no command".to_owned()])))?;
    let command = root.find_subcommand(&name).cloned().unwrap_or_default();
    let parsed = Parsed {
        matches,
        command,
        file,
        lines,
    };
    Ok((cli, parsed))
}

/// The arguments that are settings.
fn settings(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let named = command
        .get_arguments()
        .filter_map(|argument| Some((argument.get_long()?, argument)));
    named.filter(|(name, _)| !NO_SETTINGS.contains(name))
}

fn config_path(given: &[OsString]) -> Option<PathBuf> {
    let flag = format!("--{CONFIG}");
    let mut given = given.iter();
    while let Some(argument) = given.next() {
        if argument == flag.as_str() {
            return given.next().map(PathBuf::from);
        }
        let text = argument.to_string_lossy();
        if let Some(path) = text.strip_prefix(&format!("{flag}=")) {
            return Some(path.into());
        }
    }
    env::var_os(CONFIG_VARIABLE)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
}

/// Whether a flag or the environment sets it.
fn is_given(command: &Command, name: &str, given: &[OsString]) -> bool {
    let argument = settings(command).find(|(setting, _)| *setting == name);
    let variable = argument.and_then(|(_, argument)| argument.get_env());
    is_flagged(name, given) || variable.is_some_and(|variable| env::var_os(variable).is_some())
}

fn is_flagged(name: &str, given: &[OsString]) -> bool {
    let (flag, with_value) = (format!("--{name}"), format!("--{name}="));
    given.iter().any(|argument| {
        argument == flag.as_str() || argument.to_string_lossy().starts_with(&with_value)
    })
}

/// Environment variables with values that their settings do not take, and names that are nearly a setting's.
fn mistaken_variables(root: &Command, command: &Command, given: &[OsString]) -> Vec<String> {
    let mut known: Vec<String> = vec![CONFIG_VARIABLE.to_owned()];
    known_variables(root, &mut known);
    let mut complaints = Vec::new();
    for (variable, value) in env::vars_os() {
        let Some(variable) = variable
            .to_str()
            .filter(|name| name.starts_with("HALLPASS_"))
        else {
            continue;
        };
        let setting = settings(command)
            .find(|(_, argument)| argument.get_env() == Some(OsStr::new(variable)));
        match setting {
            Some((name, _)) if is_flagged(name, given) => {}
            Some((_, argument)) => {
                let checked = check_value(argument, &value);
                complaints.extend(checked.err().map(|error| format!("{variable}: {error}")));
            }
            // Others may mean something by a name that is nothing like a setting's: Kubernetes does.
            None if known.iter().any(|name| name == variable) => {}
            None => complaints.extend(
                nearest(variable, known.iter().map(String::as_str), MISTYPED_MAX)
                    .map(|near| format!("{variable}: no such setting; did you mean {near}?")),
            ),
        }
    }
    complaints
}

fn known_variables(command: &Command, known: &mut Vec<String>) {
    let variables = command.get_arguments().filter_map(Arg::get_env);
    known.extend(variables.map(|variable| variable.to_string_lossy().into_owned()));
    command
        .get_subcommands()
        .for_each(|command| known_variables(command, known));
}

fn nearest<'a>(name: &str, among: impl Iterator<Item = &'a str>, most: usize) -> Option<&'a str> {
    among
        .map(|known| (strsim::damerau_levenshtein(name, known), known))
        .filter(|(distance, _)| *distance <= most)
        .min()
        .map(|(_, known)| known)
}

/// What a setting's own parser says of a value. Secrets are parsed where they are used.
fn check_value(argument: &Arg, value: &OsStr) -> Result<(), String> {
    let mut probe = Command::new("probe").no_binary_name(true);
    // Alone: what must be set with it is looked at when all are known.
    let mut alone = Arg::new("value")
        .long("value")
        .action(ArgAction::Append)
        .value_parser(argument.get_value_parser().clone());
    if let Some(delimiter) = argument.get_value_delimiter() {
        alone = alone.value_delimiter(delimiter);
    }
    probe = probe.arg(alone);
    let mut flag = OsString::from("--value=");
    flag.push(value);
    match probe.try_get_matches_from([flag]) {
        Ok(_) => Ok(()),
        Err(error) => Err(in_words(&error, value)),
    }
}

fn in_words(error: &clap::Error, value: &OsStr) -> String {
    use std::error::Error;
    let value = value.to_string_lossy();
    let value = value.escape_debug();
    if let Some(cause) = error.source() {
        return format!("`{value}` is {}", as_complaint(&cause.to_string()));
    }
    let text = error.render().to_string();
    let possible = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("[possible values: "));
    match possible {
        Some(possible) => format!("`{value}` is none of {}", possible.trim_end_matches(']')),
        None => format!(
            "`{value}`: {}",
            text.lines()
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ")
        ),
    }
}

/// Most parsers say `not a duration: …`; numbers' say what is wrong in a sentence of their own.
fn as_complaint(cause: &str) -> String {
    if cause.starts_with("not ") {
        cause.to_owned()
    } else {
        format!("no value for it: {cause}")
    }
}

impl Parsed {
    /// Each setting's value as it was written, `None` where it has none; and where it comes from.
    fn values(&self) -> impl Iterator<Item = (&str, &Arg, Option<String>, String)> {
        settings(&self.command).map(|(name, argument)| {
            let id = argument.get_id().as_str();
            let raw = self.matches.try_get_raw(id).ok().flatten();
            let value = raw.map(|values| {
                let values = values.map(|value| value.to_string_lossy().into_owned());
                values.collect::<Vec<_>>().join(",")
            });
            let source = match (self.lines.get(name), self.matches.value_source(id)) {
                (Some(line), _) => {
                    let file = self.file.as_deref().map(|file| file.display().to_string());
                    format!("{}:{line}", file.unwrap_or_default())
                }
                (None, Some(clap::parser::ValueSource::CommandLine)) => "flag".to_owned(),
                (None, Some(clap::parser::ValueSource::EnvVariable)) => {
                    let variable = argument.get_env().unwrap_or_default();
                    variable.to_string_lossy().into_owned()
                }
                (None, _) => "default".to_owned(),
            };
            (name, argument, value, source)
        })
    }

    /// The names of settings whose values are not those of `other`, each with both values, secrets masked.
    pub(super) fn differences(&self, other: &Self) -> Vec<(String, String, String)> {
        let theirs: BTreeMap<&str, Option<String>> = other
            .values()
            .map(|(name, _, value, _)| (name, value))
            .collect();
        let shown = |argument: &Arg, value: Option<&String>| {
            value.map_or_else(
                || "not set".to_owned(),
                |value| show::masked(argument, value),
            )
        };
        self.values()
            .filter_map(|(name, argument, mine, _)| {
                let theirs = theirs.get(name).cloned().flatten();
                (mine != theirs).then(|| {
                    (
                        name.to_owned(),
                        shown(argument, mine.as_ref()),
                        shown(argument, theirs.as_ref()),
                    )
                })
            })
            .collect()
    }

    /// A warning where the file holds a secret and others may read it.
    pub(super) fn open_secret(&self) -> Option<String> {
        use std::os::unix::fs::PermissionsExt;
        const READABLE_BY_OTHERS: u32 = 0o044;
        let file = self.file.as_ref()?;
        let mode = file.metadata().ok()?.permissions().mode();
        let holds = self.values().any(|(name, argument, ..)| {
            self.lines.contains_key(name) && argument.is_hide_env_values_set()
        });
        (holds && mode & READABLE_BY_OTHERS != 0).then(|| {
            format!(
                "{} holds a secret, and others may read it: chmod 600",
                file.display()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{show::documentation, *};

    #[test]
    fn the_documentation_has_every_setting() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/settings.md");
        let expected = documentation();
        let found = fs::read_to_string(path).unwrap_or_default();
        if env::var_os("UPDATE_SETTINGS").is_some() {
            fs::write(path, &expected).unwrap();
        }
        assert!(
            found == expected,
            "docs/settings.md differs: UPDATE_SETTINGS=1 cargo test --lib settings"
        );
    }

    #[test]
    fn what_can_be_reloaded_is_a_setting() {
        let mut root = Cli::command();
        root.build();
        let serve = root.find_subcommand("serve").unwrap();
        for name in crate::config::RELOADABLE {
            assert!(
                settings(serve).any(|(setting, _)| setting == name),
                "{name}"
            );
        }
    }

    #[test]
    fn a_secret_is_shown_without_its_password() {
        let secret = Arg::new("a").hide_env_values(true);
        for (value, shown) in [
            ("postgresql://u:p@h/d", "postgresql://u:***@h/d"),
            (
                "postgresql://u:p@q@h/d?sslmode=require",
                "postgresql://u:***@h/d?sslmode=require",
            ),
            (
                "postgresql:///d?host=/s&user=u&password=p",
                "postgresql:///d?host=/s&user=u&password=***",
            ),
            ("postgresql://u:p?w@h/d", "postgresql://***"),
            ("postgresql://h/d?user=u&password=p@q", "postgresql://***"),
            (
                "postgresql:///d?host=/s&user=u&password=p@q",
                "postgresql://***",
            ),
            (
                "postgresql://u@h/d?pass%77ord=p",
                "postgresql://u@h/d?pass%77ord=***",
            ),
            ("postgresql://u@h/d", "postgresql://u@h/d"),
            ("host=h password=p", "***"),
            ("hp_0_1", "***"),
        ] {
            assert_eq!(show::masked(&secret, value), shown);
        }
        assert_eq!(show::masked(&Arg::new("a"), "x"), "x");
    }
}
