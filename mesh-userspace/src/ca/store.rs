//! The authority's memory: one file, `ca.redb`, in a directory that only its owner may enter. Every change is one
//! transaction: it is on disk as a whole before anybody is told of it, or it has not happened.

use super::CaError;
use super::records::{IssuerRecord, NodeRecord, State, TokenRecord};
use crate::identity::files;
use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition,
    WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The store's file in the authority's directory.
pub(super) const STORE_FILE: &str = "ca.redb";
/// Of the records. Raise it with every change that older programs would misread.
pub(super) const FORMAT: u32 = 1;
/// The store's own buffer. It may hold pages with keys, which is one reason to keep it small.
const CACHE: usize = 4 << 20;

type Table = TableDefinition<'static, &'static str, &'static [u8]>;
const STATE: Table = TableDefinition::new("state");
const ISSUERS: Table = TableDefinition::new("issuers");
const KEYS: Table = TableDefinition::new("keys");
const TOKENS: Table = TableDefinition::new("tokens");
const NODES: Table = TableDefinition::new("nodes");

const RESTORE: &str = "restore the directory from a backup, or make a new CA with `nodemeshd ca init`";

/// The open store; the file is locked for as long as it lives.
pub(super) struct Store {
    path: PathBuf,
    database: Database,
}

impl Store {
    /// Makes an empty store; the directory is made if need be.
    pub(super) fn create(directory: &Path) -> Result<Self, CaError> {
        files::make_directory(directory)?;
        let path = directory.join(STORE_FILE);
        // Made here rather than by the database: with the right mode from the start, and never over another one.
        let made = OpenOptions::new().write(true).create_new(true).mode(files::PRIVATE).open(&path);
        made.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => CaError::store(&path, "a CA is there already", "choose another directory"),
            _ => CaError::store(&path, error, "choose a directory that can be written"),
        })?;
        let database = builder().create(&path).map_err(|error| unusable(&path, error))?;
        let store = Self { path, database };
        store.write(|change| {
            for table in [STATE, ISSUERS, KEYS, TOKENS, NODES] {
                change.transaction.open_table(table).map_err(|error| change.fail(error))?;
            }
            Ok(())
        })?;
        Ok(store)
    }

    /// Opens what [`Self::create`] made.
    pub(super) fn open(directory: &Path) -> Result<Self, CaError> {
        let path = directory.join(STORE_FILE);
        let metadata = std::fs::metadata(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                CaError::store(&path, "there is no CA", "make one with `nodemeshd ca init`, or name its directory")
            }
            _ => CaError::store(&path, error, "run this as the user that owns the CA"),
        })?;
        let permissions = metadata.mode() & 0o7777;
        if permissions & 0o077 != 0 {
            let problem = format!("its permissions {permissions:04o} let others than its owner use the CA's keys");
            return Err(CaError::store(&path, problem, format!("run `chmod 600 {}`", path.display())));
        }
        let database = builder().open(&path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => CaError::store(
                &path,
                "a CA is running with this directory",
                "ask it through its admin socket (`nodemesh ca`, `nodemesh node`), or stop it first",
            ),
            error => unusable(&path, error),
        })?;
        let store = Self { path, database };
        let format = store.read(|reading| Ok(reading.state()?.format))?;
        if format == FORMAT {
            Ok(store)
        } else {
            let problem = format!("its format is {format}, this program reads {FORMAT}");
            Err(CaError::store(&store.path, problem, "use the nodemeshd that wrote it"))
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at one state of the store; changes that happen meanwhile are not seen.
    pub(super) fn read<T>(
        &self,
        look: impl FnOnce(&View<'_, ReadTransaction>) -> Result<T, CaError>,
    ) -> Result<T, CaError> {
        let transaction = self.database.begin_read().map_err(|error| unusable(&self.path, error))?;
        look(&View { path: &self.path, transaction })
    }

    /// Changes the store as a whole, or, if `change` fails, not at all. One change at a time; the others wait.
    pub(super) fn write<T>(
        &self,
        change: impl FnOnce(&View<'_, WriteTransaction>) -> Result<T, CaError>,
    ) -> Result<T, CaError> {
        let transaction = self.database.begin_write().map_err(|error| unusable(&self.path, error))?;
        let view = View { path: &self.path, transaction };
        // Dropped without a commit, a transaction changes nothing.
        let outcome = change(&view)?;
        view.transaction.commit().map_err(|error| unusable(&self.path, error))?;
        Ok(outcome)
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE);
    builder
}

fn unusable(path: &Path, error: impl Display) -> CaError {
    CaError::store(path, error, RESTORE)
}

/// Looks into tables: the same for both kinds of transactions.
pub(super) trait Tables {
    fn value(&self, table: Table, key: &str) -> Result<Option<Zeroizing<Vec<u8>>>, redb::Error>;
    fn values(&self, table: Table) -> Result<Vec<Vec<u8>>, redb::Error>;
}

impl Tables for ReadTransaction {
    fn value(&self, table: Table, key: &str) -> Result<Option<Zeroizing<Vec<u8>>>, redb::Error> {
        value(&self.open_table(table)?, key)
    }

    fn values(&self, table: Table) -> Result<Vec<Vec<u8>>, redb::Error> {
        values(&self.open_table(table)?)
    }
}

impl Tables for WriteTransaction {
    fn value(&self, table: Table, key: &str) -> Result<Option<Zeroizing<Vec<u8>>>, redb::Error> {
        value(&self.open_table(table)?, key)
    }

    fn values(&self, table: Table) -> Result<Vec<Vec<u8>>, redb::Error> {
        values(&self.open_table(table)?)
    }
}

/// A transaction, and how to speak of what fails in it.
pub(super) struct View<'a, T> {
    path: &'a Path,
    transaction: T,
}

impl<T: Tables> View<'_, T> {
    pub(super) fn state(&self) -> Result<State, CaError> {
        self.one(STATE, "state")?.ok_or_else(|| unusable(self.path, "it has no state: its making was interrupted"))
    }

    /// Roots and intermediates, the oldest first.
    pub(super) fn issuers(&self) -> Result<Vec<IssuerRecord>, CaError> {
        self.all(ISSUERS)
    }

    /// The private key of a root or an intermediate.
    pub(super) fn key(&self, number: u64) -> Result<Option<Zeroizing<Vec<u8>>>, CaError> {
        self.transaction.value(KEYS, &padded(number)).map_err(|error| self.fail(error))
    }

    pub(super) fn token(&self, id: &str) -> Result<Option<TokenRecord>, CaError> {
        self.one(TOKENS, id)
    }

    pub(super) fn tokens(&self) -> Result<Vec<TokenRecord>, CaError> {
        self.all(TOKENS)
    }

    pub(super) fn node(&self, name: &str) -> Result<Option<NodeRecord>, CaError> {
        self.one(NODES, name)
    }

    pub(super) fn nodes(&self) -> Result<Vec<NodeRecord>, CaError> {
        self.all(NODES)
    }

    fn one<R: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<R>, CaError> {
        let bytes = self.transaction.value(table, key).map_err(|error| self.fail(error))?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(|error| self.fail(error))).transpose()
    }

    fn all<R: DeserializeOwned>(&self, table: Table) -> Result<Vec<R>, CaError> {
        let rows = self.transaction.values(table).map_err(|error| self.fail(error))?;
        rows.iter().map(|bytes| serde_json::from_slice(bytes).map_err(|error| self.fail(error))).collect()
    }

    fn fail(&self, error: impl Display) -> CaError {
        unusable(self.path, error)
    }
}

impl View<'_, WriteTransaction> {
    pub(super) fn put_state(&self, state: &State) -> Result<(), CaError> {
        self.put(STATE, "state", state)
    }

    pub(super) fn put_issuer(&self, issuer: &IssuerRecord) -> Result<(), CaError> {
        self.put(ISSUERS, &padded(issuer.number), issuer)
    }

    pub(super) fn put_key(&self, number: u64, der: &[u8]) -> Result<(), CaError> {
        self.insert(KEYS, &padded(number), der)
    }

    pub(super) fn remove_issuer(&self, number: u64) -> Result<(), CaError> {
        self.remove(ISSUERS, &padded(number))?;
        self.remove_key(number)
    }

    pub(super) fn remove_key(&self, number: u64) -> Result<(), CaError> {
        self.remove(KEYS, &padded(number))
    }

    pub(super) fn put_token(&self, token: &TokenRecord) -> Result<(), CaError> {
        self.put(TOKENS, &token.id, token)
    }

    pub(super) fn remove_token(&self, id: &str) -> Result<(), CaError> {
        self.remove(TOKENS, id)
    }

    pub(super) fn put_node(&self, node: &NodeRecord) -> Result<(), CaError> {
        self.put(NODES, &node.name, node)
    }

    fn put(&self, table: Table, key: &str, record: &impl Serialize) -> Result<(), CaError> {
        let bytes = serde_json::to_vec(record).map_err(|error| self.fail(error))?;
        self.insert(table, key, &bytes)
    }

    fn insert(&self, table: Table, key: &str, bytes: &[u8]) -> Result<(), CaError> {
        let mut table = self.transaction.open_table(table).map_err(|error| self.fail(error))?;
        table.insert(key, bytes).map(drop).map_err(|error| self.fail(error))
    }

    fn remove(&self, table: Table, key: &str) -> Result<(), CaError> {
        let mut table = self.transaction.open_table(table).map_err(|error| self.fail(error))?;
        table.remove(key).map(drop).map_err(|error| self.fail(error))
    }
}

fn value(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<Zeroizing<Vec<u8>>>, redb::Error> {
    Ok(table.get(key)?.map(|value| Zeroizing::new(value.value().to_vec())))
}

fn values(table: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Vec<Vec<u8>>, redb::Error> {
    let mut found = Vec::new();
    for row in table.iter()? {
        found.push(row?.1.value().to_vec());
    }
    Ok(found)
}

/// Numbers as keys, in the order of numbers.
fn padded(number: u64) -> String {
    format!("{number:020}")
}
