//! A gRPC server with the standard health service, and a client of it. SIGUSR1 makes it NOT_SERVING, SIGUSR2 SERVING.

use anyhow::{Context, Result};
use clap::Subcommand;
use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Endpoint, Server};
use tonic_health::ServingStatus;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Subcommand)]
pub(crate) enum Grpc {
    /// Serve until killed; prints one line a request: from where it came.
    Serve {
        #[arg(long)]
        port: u16,
        /// The service whose health is told; empty is the server's.
        #[arg(long, default_value = "")]
        service: String,
    },
    /// Ask for a service's health over a new connection.
    Check {
        destination: SocketAddr,
        #[arg(long, default_value = "")]
        service: String,
    },
}

pub(crate) fn run(grpc: Grpc) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let outcome = match grpc {
        Grpc::Serve { port, service } => runtime.block_on(serve(port, service)),
        Grpc::Check { destination, service } => runtime.block_on(async {
            let status = timeout(PATIENCE, check(destination, service)).await.context("no answer")??;
            println!("{status}");
            Ok(())
        }),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-probe grpc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(port: u16, service: String) -> Result<()> {
    let (mut ill, mut well) = (signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status(&service, ServingStatus::Serving).await;
    tokio::spawn(async move {
        loop {
            let status = tokio::select! {
                _ = ill.recv() => ServingStatus::NotServing,
                _ = well.recv() => ServingStatus::Serving,
            };
            reporter.set_service_status(&service, status).await;
        }
    });
    let told = InterceptedService::new(health, |request: tonic::Request<()>| {
        let peer = request.remote_addr().map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()));
        println!("asked by {}", peer.map_or_else(String::new, |peer| peer.ip().to_string()));
        Ok(request)
    });
    Ok(Server::builder().serve((Ipv6Addr::UNSPECIFIED, port).into(), told).await?)
}

/// The status as the protocol names it: `SERVING`, `NOT_SERVING`, ...
async fn check(destination: SocketAddr, service: String) -> Result<&'static str> {
    let channel = Endpoint::from_shared(format!("http://{destination}"))?.connect().await.context("connect")?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest { service }).await?;
    Ok(answer.into_inner().status().as_str_name())
}
