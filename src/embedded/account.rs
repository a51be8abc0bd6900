//! The user that runs postgres: ourselves, except for root, whom PostgreSQL refuses.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::Path,
};

use rustix::process::{getegid, geteuid};

use super::EmbeddedError;

const PASSWD: &str = "/etc/passwd";

/// `postgres` comes with the distribution's server packages; `nobody` is everywhere.
const UNPRIVILEGED: [&str; 2] = ["postgres", "nobody"];

/// A user and its group; no supplementary groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Account {
    /// Who runs the cluster at `path`. Started by root, a cluster that exists is run by its owner.
    pub(super) fn for_cluster(path: &Path) -> Result<Self, EmbeddedError> {
        if !is_root() {
            return Ok(Self::ourselves());
        }
        match fs::metadata(path) {
            Ok(metadata) if metadata.uid() != 0 => Ok(Self::owner(&metadata)),
            _ => Self::unprivileged(),
        }
    }

    fn unprivileged() -> Result<Self, EmbeddedError> {
        let passwd = fs::read_to_string(PASSWD)
            .map_err(|error| EmbeddedError::unusable(Path::new(PASSWD), error))?;
        UNPRIVILEGED
            .iter()
            .find_map(|name| Self::in_passwd(&passwd, name))
            .ok_or_else(|| {
                let problem =
                    "postgres does not run as root, and here is no user `postgres` or `nobody`";
                EmbeddedError::unusable(Path::new(PASSWD), problem)
            })
    }

    fn in_passwd(passwd: &str, name: &str) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let found = fields.next()? == name;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            (found && uid != 0).then_some(Self { uid, gid })
        })
    }

    fn ourselves() -> Self {
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        }
    }

    fn owner(metadata: &Metadata) -> Self {
        Self {
            uid: metadata.uid(),
            gid: metadata.gid(),
        }
    }

    /// Whether this user gets to what lies in `directory`, an absolute path without links.
    pub(super) fn can_reach(self, directory: &Path) -> bool {
        directory
            .ancestors()
            .all(|step| fs::metadata(step).is_ok_and(|metadata| self.can_search(&metadata)))
    }

    fn can_search(self, directory: &Metadata) -> bool {
        let bit = if directory.uid() == self.uid {
            0o100
        } else if directory.gid() == self.gid {
            0o010
        } else {
            0o001
        };
        directory.mode() & bit != 0
    }
}

pub(super) fn is_root() -> bool {
    geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_read_from_passwd() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104:PostgreSQL,,,:/:/bin/sh\nbroken\n\
                      toor:x:0:0::/:/bin/sh\nnobody:x:65534:65533::/:/bin/false\n";
        let found = |name| Account::in_passwd(passwd, name).map(|a| (a.uid, a.gid));
        assert_eq!(found("postgres"), Some((101, 104)));
        assert_eq!(found("nobody"), Some((65534, 65533)));
        assert_eq!(found("toor"), None, "root by another name");
        assert_eq!(found("daemon"), None);
    }
}
