//! Peers that are not who they should be: refused on both transports, counted by reason, and the application that
//! wanted to speak to them is reset.

mod stranger;

use anyhow::{Context, Result, ensure};
use mesh_tests::authority::Authority;
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::{Cluster, TRUST_DOMAIN};
use mesh_tests::daemon::TUNNEL_PORT;
use mesh_tests::program::{Program, Running};
use mesh_tests::scrape::Change;
use mesh_tests::world::World;
use mesh_userspace::ca;
use mesh_userspace::identity::Identities;
use mesh_userspace::model::{SpiffeId, TransportChoice, TrustDomain};
use mesh_userspace::tunnel::{OpenError, Refusal, Stream};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConnection, ServerConnection, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use stranger::Stranger;
use time::OffsetDateTime;

const TRANSPORTS: [&str; 2] = ["lanes", "quic"];
/// Bound of each read and write of the rogue peers in here.
const IO_BOUND: Duration = Duration::from_secs(20);

/// `client` on n1; `server` and `other` on n2, the former with an echo server.
fn start(name: &str, transport: &str) -> Result<(Cluster, Running)> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pods(&["server", "other"]);
    let cluster = Cluster::start(topology, |catalog| {
        catalog.mesh("transport", transport);
        catalog.service("server", 80, 8080);
    })?;
    let mut echo = Program::probe(["echo", "--port", "8080"]).start_in(cluster.world.pod("server"))?;
    echo.wait_for_listener(8080)?;
    cluster.wait_until_served("client", "server")?;
    Ok((cluster, echo))
}

/// What is wrong with the certificate of a workload.
#[derive(Clone, Copy, Debug)]
enum Flaw {
    Missing,
    OtherAuthority,
    Expired,
}

/// Gives a node new certificates, of which that of one account is flawed, and starts its daemon anew. The other
/// node's connections to it end with it.
fn flaw(cluster: &mut Cluster, node: &str, account: &str, flaw: Option<Flaw>) -> Result<()> {
    let identities = cluster.identities(node);
    cluster.daemon_mut(node).stop()?;
    fs::remove_dir_all(&identities)?;
    cluster.issue_identities()?;
    let folder = cluster.world.folder();
    match flaw {
        None => {}
        Some(Flaw::Missing) => fs::remove_dir_all(certificates(&identities, account))?,
        Some(Flaw::OtherAuthority) => {
            let other = folder.join("other-ca");
            let authority = Authority::create(&other, TRUST_DOMAIN)?;
            authority.issue(NAMESPACE, account, &identities)?;
            fs::remove_dir_all(other)?;
        }
        Some(Flaw::Expired) => {
            let id = SpiffeId::parse(&cluster.authority.spiffe_id(NAMESPACE, account))?;
            let hours = |number| OffsetDateTime::now_utc() - time::Duration::hours(number);
            let validity = ca::Validity { not_before: hours(2), not_after: hours(1) };
            ca::Authority::open(&folder.join("ca"))?.sign(&id, validity)?.store(&identities)?;
        }
    }
    cluster.daemon_mut(node).start()
}

fn certificates(identities: &Path, account: &str) -> PathBuf {
    identities.join("ns").join(NAMESPACE).join("sa").join(account)
}

/// A call is reset; the client's node counts why, and so does the node that refused (`side` of the handshake).
fn assert_refused(cluster: &Cluster, transport: &str, reason: &str, counted: (&str, &str)) -> Result<()> {
    let (node, side) = counted;
    let labels = [("transport", transport), ("side", side), ("reason", reason)];
    let (n1, refusing) = (cluster.daemon("n1"), cluster.daemon(node));
    let handshakes =
        |metrics: &mesh_tests::scrape::Metrics| metrics.count("nodemesh_tunnel_handshake_failures_total", &labels);
    let (before, refused) = (n1.metrics()?, handshakes(&refusing.metrics()?));
    let vip = cluster.catalog.vips("server")[0].to_string();
    let call = cluster.attempt("client", &["call", "blocking", &vip])?;
    let change = Change { before: before.clone(), after: n1.metrics()? };
    let outcomes = change.outcomes();
    let context = || format!("{reason} by the {side} over {transport}: {call:?}\n{outcomes:?}\n{}", n1.log_end());
    ensure!(call.errno.as_deref() == Some("ECONNRESET"), "{}", context());
    n1.wait_for_metrics(&format!("n1 counts {reason}"), |metrics| {
        let labels = [("reporter", "source"), ("reason", reason), ("response_flags", "TLS_FAILURE")];
        let failed =
            |metrics: &mesh_tests::scrape::Metrics| metrics.count("nodemesh_tcp_connections_failed_total", &labels);
        failed(metrics) == failed(&before) + 1
    })
    .with_context(context)?;
    refusing
        .wait_for_metrics(&format!("{node} counts {reason}"), |metrics| handshakes(metrics) > refused)
        .with_context(context)?;
    ensure!(n1.metrics()?.outcome("connect", "captured") == before.outcome("connect", "captured") + 1, "{}", context());
    Ok(())
}

#[test]
fn clients_with_a_flawed_certificate_are_refused() -> Result<()> {
    for transport in TRANSPORTS {
        let (mut cluster, _echo) = start(&format!("callers-{transport}"), transport)?;
        flaw(&mut cluster, "n1", "client", Some(Flaw::Missing))?;
        assert_refused(&cluster, transport, "no_certificate", ("n1", "client"))?;
        flaw(&mut cluster, "n1", "client", Some(Flaw::OtherAuthority))?;
        assert_refused(&cluster, transport, "unknown_ca", ("n2", "server"))?;
        flaw(&mut cluster, "n1", "client", Some(Flaw::Expired))?;
        assert_refused(&cluster, transport, "expired", ("n2", "server"))?;
        flaw(&mut cluster, "n1", "client", None)?;
        cluster.wait_until_served("client", "server")?;
    }
    Ok(())
}

#[test]
fn servers_with_a_flawed_certificate_are_refused() -> Result<()> {
    for transport in TRANSPORTS {
        let (mut cluster, _echo) = start(&format!("called-{transport}"), transport)?;
        // n2 has other identities, but none that answers to the name.
        flaw(&mut cluster, "n2", "server", Some(Flaw::Missing))?;
        assert_refused(&cluster, transport, "identity_mismatch", ("n2", "server"))?;
        flaw(&mut cluster, "n2", "server", Some(Flaw::OtherAuthority))?;
        assert_refused(&cluster, transport, "unknown_ca", ("n1", "client"))?;
        flaw(&mut cluster, "n2", "server", Some(Flaw::Expired))?;
        assert_refused(&cluster, transport, "expired", ("n1", "client"))?;
        flaw(&mut cluster, "n2", "server", None)?;
        cluster.wait_until_served("client", "server")?;
    }
    Ok(())
}

/// The right authority, the right name asked for, another workload's certificate in the answer.
#[test]
fn a_server_with_another_identity_is_refused() -> Result<()> {
    let (mut cluster, _echo) = start("impostor", "lanes")?;
    cluster.daemon_mut("n2").stop()?;
    let other = certificates(&cluster.identities("n2"), "other");
    let node = cluster.world.node("n2");
    let address = SocketAddr::from((node.v4(), TUNNEL_PORT));
    let listener = node.namespace().enter(|| TcpListener::bind(address))??;
    let impostor = std::thread::spawn(move || impostor(&listener, &other));
    assert_refused(&cluster, "lanes", "identity_mismatch", ("n1", "client"))?;
    let outcome = impostor.join().expect("the impostor does not panic")?;
    ensure!(outcome.contains("CertificateUnknown") || outcome.contains("alert"), "the impostor was told {outcome:?}");
    Ok(())
}

/// Answers one handshake with a certificate, whatever name is asked for; returns what became of it.
fn impostor(listener: &TcpListener, certificates: &Path) -> Result<String> {
    let (mut socket, _) = listener.accept()?;
    socket.set_read_timeout(Some(IO_BOUND))?;
    let chain = CertificateDer::pem_file_iter(certificates.join("cert.pem"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(certificates.join("key.pem"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![mesh_userspace::identity::ALPN.to_vec()];
    let mut connection = ServerConnection::new(Arc::new(config))?;
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    Ok(match stream.read(&mut [0]) {
        Ok(count) => format!("{count} bytes"),
        Err(error) => error.to_string(),
    })
}

#[test]
fn a_caller_without_a_certificate_is_refused() -> Result<()> {
    let (cluster, _echo) = start("nameless", "lanes")?;
    let (client, server) = (id(&cluster, "client")?, id(&cluster, "server")?);
    let identities = Identities::load(&cluster.identities("n1"), &TrustDomain::parse(TRUST_DOMAIN)?)?;
    let mut config = (*identities.client_config(&client, &server)?).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let labels = [("transport", "lanes"), ("side", "server"), ("reason", "no_certificate")];
    let n2 = cluster.daemon("n2");
    let before = n2.metrics()?.count("nodemesh_tunnel_handshake_failures_total", &labels);
    let address = SocketAddr::from((cluster.world.node("n2").v4(), TUNNEL_PORT));
    let mut socket = cluster.world.node("n1").namespace().enter(|| TcpStream::connect(address))??;
    socket.set_read_timeout(Some(IO_BOUND))?;
    let mut connection = ClientConnection::new(Arc::new(config), mesh_userspace::identity::server_name(&server))?;
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    stream.flush()?;
    let error = stream.read(&mut [0]).expect_err("the server hangs up");
    ensure!(error.kind() == ErrorKind::InvalidData && error.to_string().contains("CertificateRequired"), "{error}");
    n2.wait_for_metrics("n2 counts it", |metrics| {
        metrics.count("nodemesh_tunnel_handshake_failures_total", &labels) == before + 1
    })?;
    Ok(())
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A caller with a sound certificate is held to it: it speaks for its own addresses, and to whom it asked for.
#[test]
fn a_stream_that_claims_another_source_or_destination_is_refused() -> Result<()> {
    let (cluster, _echo) = start("claims", "lanes")?;
    let [client, server, other] = ["client", "server", "other"].map(|pod| cluster.world.pod(pod).addresses());
    let to = |ip, port| SocketAddr::new(ip, port);
    for (choice, transport) in [(TransportChoice::Lanes, "lanes"), (TransportChoice::Quic, "quic")] {
        for family in [0, 1] {
            // `other`, of n2, calls from n1 as whom?
            let cases = [
                ("another workload's address", client[family], to(server[family], 8080), Refusal::IdentityMismatch),
                (
                    "an address that nobody has",
                    "192.0.2.1".parse()?,
                    to(server[family], 8080),
                    Refusal::IdentityMismatch,
                ),
                ("the destination itself", server[family], to(server[family], 8080), Refusal::IdentityMismatch),
                ("someone who asked for another", other[family], to(other[family], 8080), Refusal::IdentityMismatch),
                ("someone who wants the unknown", other[family], to(client[family], 8080), Refusal::NotFound),
                ("itself, where nothing listens", other[family], to(server[family], 1), Refusal::Refused),
            ];
            for (what, source, destination, expected) in cases {
                let labels = [("transport", transport), ("direction", "inbound"), ("reason", expected.reason())];
                let (refused, change) = cluster.daemon("n2").change_during(|| {
                    open(&cluster, "other", choice, to(source, 40_000), destination, |opened| match opened {
                        Err(OpenError::Refused(refusal)) => Ok(refusal),
                        outcome => anyhow::bail!("{what} over {transport}: {outcome:?}"),
                    })
                })?;
                assert_eq!(refused, expected, "{what} over {transport}");
                assert_eq!(change.of(|metrics| metrics.count("nodemesh_tunnel_streams_refused_total", &labels)), 1);
                let admitted = u64::from(expected == Refusal::Refused);
                assert_eq!(change.of(|metrics| metrics.opened("destination")), admitted, "{what} over {transport}");
                assert_eq!(change.outcome("sk_lookup", "authenticated"), admitted, "{what} over {transport}");
            }
            // Under its own address it is served.
            open(&cluster, "other", choice, to(other[family], 40_000), to(server[family], 8080), |opened| {
                opened.map(drop).with_context(|| format!("over {transport}"))
            })?;
        }
    }
    let refused = cluster.daemon("n2").log().matches("refused a stream").count();
    ensure!(refused >= 20, "the log has {refused} refusals:\n{}", cluster.daemon("n2").log_end());
    Ok(())
}

/// Opens a stream from n1 to `server`'s node with a certificate of `account`, outside of any daemon.
fn open<T: Send>(
    cluster: &Cluster,
    account: &str,
    transport: TransportChoice,
    source: SocketAddr,
    destination: SocketAddr,
    judge: impl FnOnce(Result<Stream, OpenError>) -> Result<T> + Send,
) -> Result<T> {
    // n2 has this certificate: the caller is a stolen one.
    let thief = Stranger { certificates_of: "n2", account, from: "n1", to: ("server", "server", "n2"), transport };
    thief.open(cluster, source, destination, judge)
}

fn id(cluster: &Cluster, account: &str) -> Result<SpiffeId> {
    stranger::identity(cluster, account)
}
