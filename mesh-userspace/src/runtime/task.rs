//! Supervised tasks: one that ends unasked is fatal and loud.

use std::future::Future;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The process's long-lived tasks.
pub struct Tasks {
    set: JoinSet<(&'static str, anyhow::Result<()>)>,
    stop: CancellationToken,
}

/// A task that ended although nobody asked it to.
#[derive(Debug)]
pub struct Exit {
    pub task: &'static str,
    pub cause: anyhow::Error,
}

impl Tasks {
    #[must_use]
    pub fn new(stop: CancellationToken) -> Self {
        Self { set: JoinSet::new(), stop }
    }

    /// Runs a task until it ends by itself or the process stops.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let stop = self.stop.clone();
        self.set.spawn(async move {
            let outcome = tokio::select! {
                outcome = task => outcome,
                () = stop.cancelled() => Ok(()),
            };
            (name, outcome)
        });
    }

    /// Waits until a task ends unasked.
    pub async fn unasked_exit(&mut self) -> Exit {
        match self.set.join_next().await {
            Some(Ok((task, Ok(())))) => {
                Exit { task, cause: anyhow::anyhow!("it returned although nothing asked it to") }
            }
            Some(Ok((task, Err(cause)))) => Exit { task, cause },
            Some(Err(panic)) => Exit { task: "unknown", cause: panic.into() },
            None => std::future::pending().await,
        }
    }

    /// Stops all tasks and waits for them.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while self.set.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_fails_is_reported_by_name() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("steady", std::future::pending());
        tasks.spawn("broken", async { anyhow::bail!("no luck") });
        let exit = tasks.unasked_exit().await;
        assert_eq!((exit.task, exit.cause.to_string().as_str()), ("broken", "no luck"));
    }

    #[tokio::test]
    async fn stop_ends_every_task() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("steady", std::future::pending());
        tasks.stop().await;
    }
}
