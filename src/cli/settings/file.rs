//! The file of `--config`: TOML, a setting a key, by the name of its flag.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::Read,
    ops::Range,
    path::Path,
};

use clap::{Arg, ArgAction, Command};
use toml::de::{DeTable, DeValue};

use super::{check_value, nearest, settings};

/// All settings with a comment to each have a tenth of this.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// A key that shares half of its letters with a setting is taken for a mistake.
const NEAR_KEY: usize = 4;

/// What a file sets.
pub(super) struct Setting {
    /// As the command line has it; `None` for a flag that is off.
    pub(super) argument: Option<OsString>,
    pub(super) line: usize,
}

#[derive(Default)]
pub(super) struct Found {
    pub(super) settings: BTreeMap<String, Setting>,
    pub(super) complaints: Vec<String>,
}

pub(super) fn read(path: &Path, command: &Command) -> Found {
    match text(path) {
        Ok(text) => parse(path, &text, command),
        Err(complaint) => Found {
            complaints: vec![format!(
                "--config `{}`: {complaint}",
                path.display().to_string().escape_debug()
            )],
            ..Found::default()
        },
    }
}

fn text(path: &Path) -> Result<String, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("more than {FILE_BYTES_MAX} bytes"));
    }
    Ok(text)
}

fn parse(path: &Path, text: &str, command: &Command) -> Found {
    let line = |span: Range<usize>| {
        1 + text
            .bytes()
            .take(span.start)
            .filter(|byte| *byte == b'\n')
            .count()
    };
    let mut complaints: Vec<(usize, String)> = Vec::new();
    let mut found = Found::default();
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        complaints.push((
            line(error.span().unwrap_or_default()),
            error.message().escape_debug().to_string(),
        ));
    }
    for (key, value) in document.get_ref() {
        let (name, line) = (&**key.get_ref(), line(key.span()));
        match setting(command, name, value.get_ref()) {
            Ok(argument) => {
                found
                    .settings
                    .insert(name.to_owned(), Setting { argument, line });
            }
            Err(complaint) => {
                complaints.push((line, format!("`{}`: {complaint}", name.escape_debug())))
            }
        }
    }
    complaints.sort();
    let path = path.display().to_string();
    let path = path.escape_debug();
    found.complaints = (complaints.into_iter())
        .map(|(line, complaint)| format!("{path}:{line}: {complaint}"))
        .collect();
    found
}

/// The argument that says the same.
fn setting(command: &Command, name: &str, value: &DeValue<'_>) -> Result<Option<OsString>, String> {
    let Some((_, argument)) = settings(command).find(|(setting, _)| *setting == name) else {
        let names = settings(command).map(|(setting, _)| setting);
        return Err(match nearest(name, names, NEAR_KEY) {
            Some(near) => format!("no such setting; did you mean `{near}`?"),
            None => "no such setting".to_owned(),
        });
    };
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return match value {
            DeValue::Boolean(true) => Ok(Some(format!("--{name}").into())),
            DeValue::Boolean(false) => Ok(None),
            _ => Err("must be true or false".to_owned()),
        };
    }
    let value = written(argument, value)?;
    check_value(argument, OsStr::new(&value))?;
    Ok(Some(format!("--{name}={value}").into()))
}

/// The value as a flag has it.
fn written(argument: &Arg, value: &DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => Ok(number.as_str().replace('_', "")),
        DeValue::Float(number) => Ok(number.as_str().replace('_', "")),
        DeValue::Array(values) => {
            let Some(delimiter) = argument.get_value_delimiter() else {
                return Err("must be one value, not a list".to_owned());
            };
            let values = values.iter().map(|value| match value.get_ref() {
                DeValue::String(text) if !text.contains(delimiter) => Ok(text.to_string()),
                _ => Err("must be a list of strings".to_owned()),
            });
            let values: Vec<String> = values.collect::<Result<_, _>>()?;
            Ok(values.join(&delimiter.to_string()))
        }
        _ => Err("must be a string or a number".to_owned()),
    }
}
