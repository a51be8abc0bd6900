//! The file that a cursor is kept in.
//!
//! Invariant: whoever reads it finds a whole cursor, the one before or the one after.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;

/// A file with one line, a cursor.
#[derive(Debug)]
pub(super) struct ResumeFile {
    path: PathBuf,
    last: String,
}

impl ResumeFile {
    /// Reads the cursor, if the file is there.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open(path: &Path) -> anyhow::Result<(Self, Option<String>)> {
        let cursor = match fs::read_to_string(path) {
            Ok(text) => Some(text.trim().to_owned()).filter(|cursor| !cursor.is_empty()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let file = Self {
            path: path.to_owned(),
            last: cursor.clone().unwrap_or_default(),
        };
        Ok((file, cursor))
    }

    /// Puts a cursor in the place of the one before.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn keep(&mut self, cursor: &str) -> anyhow::Result<()> {
        if cursor == self.last {
            return Ok(());
        }
        self.write(cursor)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        cursor.clone_into(&mut self.last);
        Ok(())
    }

    fn write(&self, cursor: &str) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let mut file = File::create(&name)?;
        writeln!(file, "{cursor}")?;
        // Before it gets its name: or a crash of the machine leaves the name with nothing behind it.
        file.sync_data()?;
        fs::rename(&name, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cursor");
        let (mut file, cursor) = ResumeFile::open(&path).unwrap();
        assert_eq!(cursor, None);
        for cursor in ["1-0000000a.1", "2-0000000b"] {
            file.keep(cursor).unwrap();
            assert_eq!(ResumeFile::open(&path).unwrap().1.as_deref(), Some(cursor));
        }
        assert!(ResumeFile::open(directory.path()).is_err());
    }
}
