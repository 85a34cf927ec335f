//! A web server whose health can be told: SIGUSR1 makes it ill, SIGUSR2 well.

use crate::server::listen_on;
use clap::Args;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[arg(long)]
    port: u16,
    /// What it answers with, but for `/health`.
    #[arg(long)]
    name: String,
}

/// Serves until killed; prints one line a request that is not for its health.
pub(crate) fn serve(options: Options) -> ExitCode {
    let served = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(accept(options)));
    let Err::<std::convert::Infallible, io::Error>(error) = served;
    eprintln!("mesh-probe web: {error}");
    ExitCode::FAILURE
}

async fn accept(options: Options) -> io::Result<std::convert::Infallible> {
    let (mut ill, mut well) = (signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?);
    let listener = listen_on(None, options.port)?;
    let is_well = Arc::new(AtomicBool::new(true));
    let name: Arc<str> = options.name.into();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                let (is_well, name) = (is_well.clone(), name.clone());
                tokio::spawn(async move { answer(stream, &is_well, &name).await });
            }
            _ = ill.recv() => is_well.store(false, Relaxed),
            _ = well.recv() => is_well.store(true, Relaxed),
        }
    }
}

async fn answer(stream: TcpStream, is_well: &AtomicBool, name: &str) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut request, mut line) = (String::new(), String::new());
    stream.read_line(&mut request).await?;
    while !matches!(line.as_str(), "\r\n" | "\n") {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
    }
    let is_about_health = request.starts_with("GET /health ");
    let (status, body) = match is_about_health {
        true if is_well.load(Relaxed) => ("200 OK", "well"),
        true => ("500 Internal Server Error", "ill"),
        false => ("200 OK", name),
    };
    if !is_about_health {
        println!("{}", request.trim_end());
    }
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
