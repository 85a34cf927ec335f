//! The copy loop: bytes of an application through the relay, a lane with mutual TLS, and the relay of the far node to the
//! other application. Both nodes, both applications and their loopback sockets are on one thread, so that the order of
//! things is nearly the same in each run.

use super::Subject;
use super::catalog::{identity, node_name, workload};
use mesh_userspace::ca::{Authority, Validity, init};
use mesh_userspace::identity::Identities;
use mesh_userspace::model::{Protocol, SpiffeId, TransportChoice, TrustDomain, WorkloadUid};
use mesh_userspace::proxy::relay::{Carried, Progress, relay};
use mesh_userspace::proxy::{Live, Registry, Side};
use mesh_userspace::runtime::{Cores, Descriptors};
use mesh_userspace::telemetry::bounds::AcceptFailures;
use mesh_userspace::telemetry::tunnel::TunnelMetrics;
use mesh_userspace::tunnel::{Config, Peer, Server, Stream, StreamHeader, Tunnel};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Bulk: this much, in writes of this much.
const BULK: usize = 1024 * 1024;
const WRITE: usize = 64 * 1024;
/// Chatter: so many messages of this size, each answered with one.
const MESSAGES: usize = 50;
const MESSAGE: usize = 200;

pub(super) fn subjects() -> Vec<Subject> {
    let world = Rc::new(RefCell::new(World::new()));
    let chatting = Rc::clone(&world);
    vec![
        Subject::new("relay/1MiB_in_64KiB", move || world.borrow_mut().bulk()),
        Subject::new("relay/50_exchanges_of_200_bytes", move || chatting.borrow_mut().chatter()),
    ]
}

/// Two applications, connected through two nodes.
struct World {
    client: TcpStream,
    server: TcpStream,
    buffer: Vec<u8>,
    runtime: Runtime,
}

impl World {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (client, server) = runtime.block_on(connect());
        Self { client, server, buffer: vec![0x5a; WRITE], runtime }
    }

    fn bulk(&mut self) {
        let Self { client, server, buffer, runtime } = self;
        let mut sink = vec![0; WRITE];
        runtime.block_on(async {
            let send = async {
                for _ in 0..BULK / WRITE {
                    client.write_all(buffer).await.expect("the relay takes bytes");
                }
            };
            let receive = async {
                let mut left = BULK;
                while left > 0 {
                    let read = server.read(&mut sink).await.expect("the relay gives bytes");
                    assert_ne!(read, 0, "the connection goes on");
                    left -= read;
                }
            };
            tokio::join!(send, receive)
        });
    }

    fn chatter(&mut self) {
        let Self { client, server, buffer, runtime } = self;
        let mut message = [0; MESSAGE];
        runtime.block_on(async {
            for _ in 0..MESSAGES {
                client.write_all(&buffer[..MESSAGE]).await.expect("the relay takes bytes");
                server.read_exact(&mut message).await.expect("the relay gives bytes");
                server.write_all(&message).await.expect("the relay takes bytes");
                client.read_exact(&mut message).await.expect("the relay gives bytes");
            }
        });
    }
}

/// The daemon's counters, as the relay sees them.
#[derive(Default)]
struct Counted {
    up: AtomicU64,
    down: AtomicU64,
}

impl Carried for Counted {
    fn passed_to_tunnel(&self, bytes: u64) {
        self.up.fetch_add(bytes, Relaxed);
    }

    fn passed_from_tunnel(&self, bytes: u64) {
        self.down.fetch_add(bytes, Relaxed);
    }
}

/// The applications' ends of a connection that is relayed for as long as the runtime lives.
async fn connect() -> (TcpStream, TcpStream) {
    // No exclusive lane: when a stream moves there is a matter of time.
    let listen = vec!["127.0.0.1:0".parse().expect("an address")];
    let config = Config { listen, bulk_bytes: u64::MAX, ..Config::default() };
    let (cart, shop) = (identity("cart"), identity("shop"));
    let [callers, called] = identities([&cart, &shop]);
    let metrics = Arc::new(TunnelMetrics::register(&mut prometheus_client::registry::Registry::default()));
    let descriptors = || Descriptors::new(1_024);
    let (accepts, cores) = (AcceptFailures::default(), Cores::current());
    let mut server =
        Server::bind(config.clone(), called, Arc::clone(&metrics), descriptors(), accepts, cores).expect("it listens");
    let address = server.addresses()[0];
    let tunnel = Tunnel::new(config, callers, metrics, descriptors(), Cores::current());
    let workload_uid = WorkloadUid::new("shop-1");
    let peer = Peer { source: cart, destination: shop, workload: workload_uid, node: node_name("n2"), address };
    let header = StreamHeader {
        protocol: Protocol::Tcp,
        destination: "10.0.0.2:80".parse().expect("an address"),
        service: None,
        source: "10.0.0.1:40000".parse().expect("an address"),
        traceparent: None,
    };
    let mut offered = server.incoming().remove(0);
    let accept = async { offered.recv().await.expect("the tunnel's stream arrives").accept() };
    let (opened, accepted) = tokio::join!(tunnel.open(TransportChoice::Lanes, &peer, header), accept);
    let (client, near) = sockets().await;
    let (application, far) = sockets().await;
    tokio::spawn(carry(near, opened.expect("the tunnel opens"), Side::Source));
    tokio::spawn(async move {
        // The tunnel and the server live as long as what they carry.
        let _nodes = (tunnel, server, offered);
        carry(far, accepted, Side::Destination).await;
    });
    (client, application)
}

/// Certificates of one authority, for a node each.
fn identities(ids: [&SpiffeId; 2]) -> [Identities; 2] {
    let trust_domain = TrustDomain::parse("example.org").expect("a trust domain");
    let folder = TempDir::new().expect("a folder");
    init(folder.path(), &trust_domain).expect("an authority");
    let authority = Authority::open(folder.path()).expect("the authority");
    let now = OffsetDateTime::now_utc();
    let validity = || Validity { not_before: now - Duration::from_secs(60), not_after: now + Duration::from_hours(1) };
    ids.map(|id| {
        let folder = TempDir::new().expect("a folder");
        authority.add_to_bundle(folder.path()).expect("a bundle");
        authority.sign(id, validity()).expect("a certificate").store(folder.path()).expect("a file");
        Identities::load(folder.path(), &trust_domain).expect("identities")
    })
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (client, (server, _)) = (client.expect("it connects"), server.expect("it is accepted"));
    for socket in [&client, &server] {
        socket.set_nodelay(true).expect("a socket's option");
    }
    (client, server)
}

async fn carry(app: TcpStream, stream: Stream, side: Side) {
    let (caller, destination) = (Arc::new(workload(0, 0)), Arc::new(workload(1, 0)));
    let live = Live { side, source: caller.addresses[0], caller, destination, port: 8080 };
    let mut ticket = Registry::default().enter(live);
    let outcome = relay(&app, stream, &Counted::default(), &mut ticket, &mut Progress::default(), None).await;
    outcome.expect("the connection ends in order");
}
