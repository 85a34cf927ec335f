//! HTTP/3 as applications speak it: h3 over quinn, with a certificate that the client knows beforehand.

use crate::pattern::{Hash, Pattern};
use crate::server::SEED;
use anyhow::{Context, Result, ensure};
use bytes::{Buf, Bytes};
use clap::{Args, Subcommand};
use h3::server::RequestResolver;
use http::{Request, Response, StatusCode};
use mesh_tests::report::Fetched;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, Incoming};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Whom the certificate names.
const NAME: &str = "http3.test";
/// How the server tells a client the address that it sees.
const SEEN_AS: &str = "x-seen-as";
const SERVER: &str = "server";
const PIECE: usize = 64 << 10;

#[derive(Debug, Subcommand)]
pub(crate) enum Http3 {
    /// Serve until killed: `/bytes/N` is answered with N bytes that the client can compute.
    Serve {
        #[arg(long)]
        port: u16,
        #[arg(long)]
        name: String,
        /// Where to write the certificate that is made at the start.
        #[arg(long)]
        certificate: PathBuf,
    },
    /// GET some bytes and hash them.
    Get(Options),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    destination: SocketAddr,
    /// The only certificate that is trusted.
    #[arg(long)]
    certificate: PathBuf,
    #[arg(long, default_value_t = 0)]
    bytes: u64,
    /// Requests, one after the other on one connection.
    #[arg(long, default_value_t = 1)]
    count: u32,
    #[arg(long, default_value_t = 30_000)]
    timeout_millis: u64,
}

pub(crate) fn run(http3: Http3) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let report = match http3 {
        Http3::Serve { port, name, certificate } => {
            let Err(error) = runtime.block_on(serve(port, name.into(), &certificate)) else { return ExitCode::SUCCESS };
            eprintln!("mesh-probe http3: {error:#}");
            return ExitCode::FAILURE;
        }
        Http3::Get(options) => runtime.block_on(async {
            timeout(Duration::from_millis(options.timeout_millis), get(&options)).await.context("no answer in time")?
        }),
    };
    let report = report.unwrap_or_else(|error| Fetched { error: Some(format!("{error:#}")), ..Fetched::default() });
    println!("{}", serde_json::to_string(&report).expect("a report is JSON"));
    if report.error.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn serve(port: u16, name: Arc<str>, certificate: &PathBuf) -> Result<()> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from(made.cert.der().to_vec())], key)?;
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let endpoint = Endpoint::server(config, (Ipv6Addr::UNSPECIFIED, port).into())?;
    // Last: who finds it finds a server.
    std::fs::write(certificate, made.cert.der())?;
    println!("listening");
    while let Some(incoming) = endpoint.accept().await {
        let name = name.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(incoming, &name).await {
                eprintln!("{error:#}");
            }
        });
    }
    Ok(())
}

async fn converse(incoming: Incoming, name: &Arc<str>) -> Result<()> {
    let connection = incoming.await?;
    let peer = connection.remote_address();
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    println!("connected {peer}");
    let mut requests = h3::server::Connection::<_, Bytes>::new(h3_quinn::Connection::new(connection)).await?;
    // A client that is done closes the connection: no failure.
    while let Ok(Some(resolver)) = requests.accept().await {
        let name = name.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(resolver, peer, &name).await {
                eprintln!("{peer}: {error:#}");
            }
        });
    }
    Ok(())
}

async fn answer(resolver: RequestResolver<h3_quinn::Connection, Bytes>, peer: SocketAddr, name: &str) -> Result<()> {
    let (request, mut stream) = resolver.resolve_request().await?;
    let length = request.uri().path().strip_prefix("/bytes/").and_then(|length| length.parse::<u64>().ok());
    let status = if length.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
    let head = Response::builder().status(status).header(SEEN_AS, peer.to_string()).header(SERVER, name).body(())?;
    stream.send_response(head).await?;
    let (mut pattern, mut rest) = (Pattern::new(SEED), length.unwrap_or(0));
    while rest > 0 {
        let mut piece = vec![0; PIECE.min(usize::try_from(rest).unwrap_or(PIECE))];
        pattern.fill(&mut piece);
        rest -= piece.len() as u64;
        stream.send_data(piece.into()).await?;
    }
    Ok(stream.finish().await?)
}

async fn get(options: &Options) -> Result<Fetched> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(std::fs::read(&options.certificate)?))?;
    let mut tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let any: SocketAddr = match options.destination {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let mut endpoint = Endpoint::client(any)?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)));
    let connection = endpoint.connect(options.destination, NAME)?.await.context("the handshake failed")?;
    let local_port = endpoint.local_addr()?.port();
    let (mut driver, mut sender) = h3::client::new(h3_quinn::Connection::new(connection.clone())).await?;
    let driving = tokio::spawn(async move { driver.wait_idle().await });
    let mut report = Fetched { local_port, ..Fetched::default() };
    for _ in 0..options.count {
        request(&mut sender, options, &mut report).await?;
    }
    // After everything has come: an address that had changed on the way would show.
    report.from = connection.remote_address().to_string();
    drop(sender);
    driving.await?;
    endpoint.wait_idle().await;
    Ok(report)
}

type Sender = h3::client::SendRequest<h3_quinn::OpenStreams, Bytes>;

async fn request(sender: &mut Sender, options: &Options, report: &mut Fetched) -> Result<()> {
    let uri = format!("https://{NAME}/bytes/{}", options.bytes);
    let mut stream = sender.send_request(Request::get(uri).body(())?).await?;
    stream.finish().await?;
    let head = stream.recv_response().await?;
    let text = |name| head.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    (report.status, report.seen_as, report.server) = (head.status().as_u16(), text(SEEN_AS), text(SERVER));
    let (mut hash, mut expected, mut pattern) = (Hash::new(), Hash::new(), Pattern::new(SEED));
    let mut received = 0;
    while let Some(mut piece) = stream.recv_data().await? {
        let piece = piece.copy_to_bytes(piece.remaining());
        let mut wanted = vec![0; piece.len()];
        pattern.fill(&mut wanted);
        hash.update(&piece);
        expected.update(&wanted);
        received += piece.len() as u64;
    }
    ensure!(received == options.bytes, "{received} bytes came");
    ensure!(hash.hex() == expected.hex(), "other bytes came");
    report.bytes += received;
    Ok(())
}
