//! Which aliases of frontends the kernel shows as what they stand for: an IPv4 alias is the same in all workloads of the
//! node, so it stays shown as long as one of them uses it.

use crate::datapath::Aliases;
use mesh_common::Endpoint;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Clone)]
pub(super) struct Shown(Arc<Table>);

struct Table {
    aliases: Aliases,
    users: Mutex<HashMap<Endpoint, usize>>,
}

impl Table {
    /// Every critical section leaves the table whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<Endpoint, usize>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One use of an alias.
pub(super) struct Showing {
    table: Arc<Table>,
    alias: Endpoint,
}

impl Shown {
    pub(super) fn new(aliases: Aliases) -> Self {
        Self(Arc::new(Table { aliases, users: Mutex::default() }))
    }

    /// Has the kernel show an alias as what it stands for, at least until the guard is dropped.
    ///
    /// # Errors
    /// The kernel's: its table is full, for one.
    pub(super) fn show(&self, alias: Endpoint, real: Endpoint) -> io::Result<Showing> {
        let mut users = self.0.lock();
        // Written each time: the frontend behind a number may be another one by now.
        self.0.aliases.show(alias, real)?;
        *users.entry(alias).or_default() += 1;
        Ok(Showing { table: Arc::clone(&self.0), alias })
    }
}

impl Drop for Showing {
    fn drop(&mut self) {
        let mut users = self.table.lock();
        let Some(count) = users.get_mut(&self.alias) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        users.remove(&self.alias);
        if let Err(error) = self.table.aliases.hide(self.alias) {
            tracing::warn!(%error, "cannot withdraw an alias; it stays until the next start");
        }
    }
}
