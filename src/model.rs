//! The words of the domain as types: ids, decisions, reasons, positions, the catalog and what is known of one user.
//!
//! Invariant: no IO and no async here, and no decision either: PostgreSQL decides in `effective_user_permissions`,
//! these types remember.

use std::{collections::HashMap, fmt, str::FromStr, sync::Arc, time::Duration};

use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;
use uuid::Uuid;

/// An organization's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrganizationId(pub Uuid);

/// A user's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(pub Uuid);

/// What the cache is keyed by: one user in one organization, member or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject {
    pub organization: OrganizationId,
    pub user: UserId,
}

/// Why a decision is what it is. The first rule that matches wins, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    UnknownPermission,
    NotAMember,
    PermissionDisabled,
    GrantedByRole,
    GrantedToUser,
    RoleTooLow,
}

impl Reason {
    pub const ALL: [Self; 6] = [
        Self::UnknownPermission,
        Self::NotAMember,
        Self::PermissionDisabled,
        Self::GrantedByRole,
        Self::GrantedToUser,
        Self::RoleTooLow,
    ];

    /// As the view, the API and the metrics spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::UnknownPermission => "UNKNOWN_PERMISSION",
            Self::NotAMember => "NOT_A_MEMBER",
            Self::PermissionDisabled => "PERMISSION_DISABLED",
            Self::GrantedByRole => "GRANTED_BY_ROLE",
            Self::GrantedToUser => "GRANTED_TO_USER",
            Self::RoleTooLow => "ROLE_TOO_LOW",
        }
    }

    /// Whether this reason allows.
    #[must_use]
    pub fn allows(self) -> bool {
        matches!(self, Self::GrantedByRole | Self::GrantedToUser)
    }

    /// Reads the spelling of `effective_user_permissions.reason`; `None` for any other.
    #[must_use]
    pub fn from_sql(name: &str) -> Option<Self> {
        Some(match name {
            "PERMISSION_DISABLED" => Self::PermissionDisabled,
            "GRANTED_BY_ROLE" => Self::GrantedByRole,
            "GRANTED_TO_USER" => Self::GrantedToUser,
            "ROLE_TOO_LOW" => Self::RoleTooLow,
            _ => return None,
        })
    }
}

/// How far a reader is in the log: an entry's number and its random uid. Printed `812-5f0c9ae1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    pub seq: i64,
    pub uid: u32,
}

impl Position {
    /// The position before the first change.
    pub const ZERO: Self = Self { seq: 0, uid: 0 };
}

impl FromStr for Position {
    type Err = PositionError;

    /// Reads what [`Position`] prints, and nothing else but space around it and capitals in the uid.
    fn from_str(text: &str) -> Result<Self, PositionError> {
        let (seq, uid) = text.trim().split_once('-').ok_or(PositionError::Form)?;
        if (seq, uid) == ("0", "0") {
            return Ok(Self::ZERO);
        }
        // The parsers would take a sign too.
        let is_number = seq.bytes().all(|c| c.is_ascii_digit()) && !seq.starts_with('0');
        let seq = seq.parse().ok().filter(|_| is_number);
        let is_hex = uid.len() == 8 && uid.bytes().all(|c| c.is_ascii_hexdigit());
        let uid = u32::from_str_radix(uid, 16).ok().filter(|_| is_hex);
        Ok(Self {
            seq: seq.ok_or(PositionError::Seq)?,
            uid: uid.ok_or(PositionError::Uid)?,
        })
    }
}

/// Why a text is no position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PositionError {
    #[error("has no `-` between seq and uid")]
    Form,
    #[error("must begin with the number of an entry")]
    Seq,
    #[error("must end with the entry's uid, 8 hexadecimal digits")]
    Uid,
    #[error("must have the number of a row behind its `.`")]
    Row,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.write(&mut [0; Self::BYTES_MAX]))
    }
}

impl Position {
    /// What a position's text takes at most.
    pub const BYTES_MAX: usize = "-9223372036854775808-ffffffff".len();

    /// Its text, in `room`.
    #[must_use]
    pub fn write<'a>(&self, room: &'a mut [u8; Self::BYTES_MAX]) -> &'a str {
        if *self == Self::ZERO {
            return "0-0";
        }
        let mut at = room.len();
        let mut put = |byte| {
            at -= 1;
            room[at] = byte;
        };
        for digit in 0..8 {
            put(b"0123456789abcdef"[(self.uid >> (4 * digit) & 0xf) as usize]);
        }
        put(b'-');
        let mut seq = self.seq.unsigned_abs();
        loop {
            put(b"0123456789"[(seq % 10) as usize]);
            seq /= 10;
            if seq == 0 {
                break;
            }
        }
        if self.seq < 0 {
            put(b'-');
        }
        // ASCII.
        std::str::from_utf8(&room[at..]).unwrap_or_default()
    }
}

/// A place within the log: an entry, and its rows up to this one. Printed `812-5f0c9ae1.20`; without a row, as a position
/// is, it stands behind the whole entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cursor {
    pub entry: Position,
    pub row: i32,
}

impl Cursor {
    /// The row of a cursor that stands behind its entry.
    pub const WHOLE: i32 = i32::MAX;

    /// Behind the whole of an entry.
    #[must_use]
    pub fn after(entry: Position) -> Self {
        Self {
            entry,
            row: Self::WHOLE,
        }
    }

    /// Whether it stands before `other`, of the same history.
    #[must_use]
    pub fn is_before(self, other: Self) -> bool {
        (self.entry.seq, self.row) < (other.entry.seq, other.row)
    }
}

impl FromStr for Cursor {
    type Err = PositionError;

    /// Reads what [`Cursor`] prints, a position among it.
    fn from_str(text: &str) -> Result<Self, PositionError> {
        let text = text.trim();
        let Some((entry, row)) = text.split_once('.') else {
            return text.parse().map(Self::after);
        };
        let entry: Position = entry.parse()?;
        // The parser would take a sign too, and one cursor must not have two spellings.
        let is_number = row.bytes().all(|c| c.is_ascii_digit()) && !row.starts_with('0');
        let row = row.parse().ok().filter(|_| is_number);
        match row {
            Some(row) if entry != Position::ZERO => Ok(Self { entry, row }),
            _ => Err(PositionError::Row),
        }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.row == Self::WHOLE {
            return self.entry.fmt(f);
        }
        write!(f, "{}.{}", self.entry, self.row)
    }
}

/// What an entry of the log changes, as far as cached decisions go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// One user's membership of one organization.
    Membership(Subject),
    /// One user's mention in an override of one organization.
    NamedUser(Subject),
    /// The overrides of one organization.
    Organization(OrganizationId),
    /// The catalog, the ladder, or more than can be named.
    Everything,
}

/// An instant on the boot-time clock, which goes on while the machine sleeps and never jumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    #[must_use]
    pub fn now() -> Self {
        // CLOCK_BOOTTIME exists on Linux alone; elsewhere the monotonic clock is the nearest.
        #[cfg(target_os = "linux")]
        let clock = ClockId::Boottime;
        #[cfg(not(target_os = "linux"))]
        let clock = ClockId::Monotonic;
        let now = clock_gettime(clock);
        Self(Duration::new(
            now.tv_sec.unsigned_abs(),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        ))
    }

    /// Whole seconds since the boot.
    #[must_use]
    pub fn as_secs(self) -> u64 {
        self.0.as_secs()
    }

    /// The instant this long before; the boot, when that is later.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }

    /// The instant this long after.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// The time from `earlier` to `self`; zero when `earlier` is the later one.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The permissions that exist, ordered by key, as one database snapshot has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    permissions: Vec<PermissionTemplate>,
    by_key: HashMap<Box<str>, usize>,
}

/// One permission of the catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PermissionTemplate {
    pub key: Box<str>,
    pub name: Box<str>,
    pub module: Box<str>,
}

impl Catalog {
    #[must_use]
    pub fn new(permissions: Vec<PermissionTemplate>) -> Self {
        let by_key = permissions
            .iter()
            .enumerate()
            .map(|(index, permission)| (permission.key.clone(), index))
            .collect();
        Self {
            permissions,
            by_key,
        }
    }

    #[must_use]
    pub fn permissions(&self) -> &[PermissionTemplate] {
        &self.permissions
    }

    #[must_use]
    pub fn index_of(&self, permission: &str) -> Option<usize> {
        self.by_key.get(permission).copied()
    }
}

/// What one snapshot says of one subject: every decision of the catalog, as PostgreSQL made it.
///
/// Holds the catalog it was decoded with, so that an index never meets another catalog.
#[derive(Clone, Debug)]
pub struct SubjectPermissions {
    pub catalog: Arc<Catalog>,
    /// `None` for a user who is no member.
    pub membership: Option<Arc<Membership>>,
}

/// A member's role and one decided permission for each of the catalog's, in its order: the same for most who have this role
/// in an organization.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Membership {
    pub role: Box<str>,
    pub decided: Box<[DecidedPermission]>,
    /// The distinct minimum roles that `decided` points into.
    pub min_roles: Box<[Box<str>]>,
}

/// One permission as it stands for one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecidedPermission {
    pub reason: Reason,
    pub enabled: bool,
    /// Index into [`Membership::min_roles`].
    pub min_role: u16,
}

impl SubjectPermissions {
    /// The decision for one permission: the catalog's rule and the membership's rule come before the decided ones.
    #[must_use]
    pub fn decide(&self, permission: &str) -> Reason {
        match (self.catalog.index_of(permission), &self.membership) {
            (None, _) => Reason::UnknownPermission,
            (_, None) => Reason::NotAMember,
            (Some(index), Some(membership)) => membership.decided[index].reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_print_as_seq_and_uid() {
        let position = Position {
            seq: 812,
            uid: 0x5f0c_9ae1,
        };
        assert_eq!(position.to_string(), "812-5f0c9ae1");
        assert_eq!(Position { seq: 1, uid: 0xab }.to_string(), "1-000000ab");
        let least = Position {
            seq: i64::MIN,
            uid: u32::MAX,
        };
        assert_eq!(least.to_string(), "-9223372036854775808-ffffffff");
        assert_eq!(Position::ZERO.to_string(), "0-0");
    }

    #[test]
    fn positions_survive_copy_and_paste_and_nothing_else_passes() {
        let position = Ok(Position {
            seq: 812,
            uid: 0x5f0c_9ae1,
        });
        let zero = Ok(Position::ZERO);
        let (form, seq, uid) = (
            Err(PositionError::Form),
            Err(PositionError::Seq),
            Err(PositionError::Uid),
        );
        let cases = [
            ("812-5f0c9ae1", position),
            (" \t812-5F0C9AE1\r\n", position),
            ("0-0", zero),
            (" 0-0 ", zero),
            ("", form),
            ("812", form),
            ("812 5f0c9ae1", form),
            ("-5f0c9ae1", seq),
            ("+812-5f0c9ae1", seq),
            ("-812-5f0c9ae1", seq),
            ("0812-5f0c9ae1", seq),
            ("0-5f0c9ae1", seq),
            ("0-00000000", seq),
            ("81 2-5f0c9ae1", seq),
            ("8.1-5f0c9ae1", seq),
            ("9223372036854775808-5f0c9ae1", seq),
            ("812-", uid),
            ("812-5f0c9ae", uid),
            ("812-5f0c9ae10", uid),
            ("812-+f0c9ae1", uid),
            ("812-5f0c9aeg", uid),
            ("812- 5f0c9ae", uid),
            ("812-5f0c9ae1.20", uid),
            ("812-0", uid),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Position>(), expected, "{text:?}");
        }
        for position in [position, zero].map(Result::unwrap) {
            assert_eq!(position.to_string().parse(), Ok(position));
        }
    }
}
