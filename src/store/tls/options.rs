//! The four parameters of TLS, taken out of a URL or of libpq's form `keyword = value`.
//!
//! Invariant: what is left is what was there, and it is read where tokio-postgres would read it: a password is no place for
//! parameters.

use percent_encoding::percent_decode_str;

/// What a URL says about TLS. tokio-postgres knows none of it but the three weakest modes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::store) struct Options {
    pub(super) mode: Option<String>,
    pub(super) root: Option<String>,
    pub(super) certificate: Option<String>,
    pub(super) key: Option<String>,
}

impl Options {
    /// Takes them out of a URL, or of libpq's form `keyword = value`; returns the rest, for tokio-postgres.
    pub(in crate::store) fn take_from(url: &str) -> (String, Self) {
        let mut options = Self::default();
        let is_url = url.starts_with("postgres://") || url.starts_with("postgresql://");
        let rest = if is_url {
            options.take_parameters(url)
        } else {
            options.take_settings(url)
        };
        (rest, options)
    }

    fn take_parameters(&mut self, url: &str) -> String {
        // As tokio-postgres reads it, all before the first `@` is a name and a password.
        let after_credentials = url.find('@').map_or(0, |at| at + 1);
        let Some(question) = url[after_credentials..].find('?') else {
            return url.to_owned();
        };
        let (before, parameters) = url.split_at(after_credentials + question + 1);
        let is_left = |parameter: &&str| {
            let Some((key, value)) = parameter.split_once('=') else {
                return true;
            };
            let decoded = |text| percent_decode_str(text).decode_utf8_lossy();
            match self.named(&decoded(key)) {
                Some(option) => {
                    *option = Some(decoded(value).into_owned());
                    false
                }
                None => true,
            }
        };
        let left: Vec<&str> = parameters.split('&').filter(is_left).collect();
        format!("{before}{}", left.join("&"))
    }

    fn take_settings(&mut self, mut text: &str) -> String {
        let mut left = String::new();
        while let Some((key, value, end)) = first_setting(text) {
            let (setting, rest) = text.split_at(end);
            match self.named(key) {
                Some(option) => *option = Some(value),
                None => left.push_str(setting),
            }
            text = rest;
        }
        // What is no setting is for tokio-postgres to complain about.
        left + text
    }

    /// As in libpq, what is said twice is as it was said last.
    fn named(&mut self, key: &str) -> Option<&mut Option<String>> {
        match key {
            "sslmode" => Some(&mut self.mode),
            "sslrootcert" => Some(&mut self.root),
            "sslcert" => Some(&mut self.certificate),
            "sslkey" => Some(&mut self.key),
            _ => None,
        }
    }
}

/// The first setting of a text of the form `keyword = value`, and where it ends; `None` where there is none.
fn first_setting(text: &str) -> Option<(&str, String, usize)> {
    let from_key = text.trim_start();
    let key_end = from_key.find(|c: char| c.is_whitespace() || c == '=')?;
    let (key, rest) = from_key.split_at(key_end);
    let from_value = rest.trim_start().strip_prefix('=')?.trim_start();
    let (value, length) = unquoted(from_value)?;
    Some((key, value, text.len() - from_value.len() + length))
}

/// The value that a text begins with, in quotes or up to the next space, and how long it is there.
fn unquoted(text: &str) -> Option<(String, usize)> {
    let in_quotes = text.starts_with('\'');
    let mut characters = text.char_indices().skip(usize::from(in_quotes));
    let mut value = String::new();
    while let Some((at, c)) = characters.next() {
        match c {
            '\'' if in_quotes => return Some((value, at + 1)),
            c if c.is_whitespace() && !in_quotes => return Some((value, at)),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (!in_quotes).then_some((value, text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_url_is_as_it_was() {
        let cases = [
            ("postgres://u:p%40@h:1/d?a=b", "postgres://u:p%40@h:1/d?a=b"),
            (
                "postgres://h/d?a=b&sslmode=require&c=d",
                "postgres://h/d?a=b&c=d",
            ),
            ("postgres://h/d?sslkey=k&sslcert=c", "postgres://h/d?"),
            ("host=h sslmode=require user='a b'", "host=h user='a b'"),
            ("host=h sslmode = 'x", "host=h sslmode = 'x"),
        ];
        for (url, left) in cases {
            assert_eq!(Options::take_from(url).0, left, "{url}");
        }
    }
}
