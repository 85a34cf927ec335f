//! A daemon that answers from a script, for tests.

use crate::admin::documents::ErrorDocument;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// Answers every request for `path` with `body`, others with 404, until dropped.
pub(super) struct FakeDaemon {
    directory: tempfile::TempDir,
    listening: Option<std::thread::JoinHandle<()>>,
}

impl FakeDaemon {
    pub(super) fn answering(path: &'static str, body: String) -> Self {
        Self::with(move |asked| {
            if asked == path {
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            } else {
                let body = serde_json::to_string(&ErrorDocument::new(format!("there is no {asked}"))).unwrap();
                format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            }
        })
    }

    pub(super) fn with(answer: impl Fn(&str) -> String + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("admin.sock")).unwrap();
        let listening = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                    head.push(byte[0]);
                }
                let head = String::from_utf8(head).unwrap();
                // The end of the test connects and says nothing.
                let Some(path) = head.split(' ').nth(1) else { return };
                // A client that has read enough may be gone.
                let _ = stream.write_all(answer(path).as_bytes());
            }
        });
        Self { directory, listening: Some(listening) }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        drop(std::os::unix::net::UnixStream::connect(self.socket()));
        let _ = self.listening.take().unwrap().join();
    }
}
