//! What the mesh's DNS answers, over bytes; and what it does with the bytes that nobody meant.

use super::answer::{Answered, Outcome, answer};
use super::forward::{Failure, Forwarder};
use super::wire::{self, Head, Question};
use super::*;
use crate::engine::Engine;
use crate::model::{
    Affinity, Catalog, DefaultAction, DeniedError, Mesh, Mode, NodeName, ObjectName, Prefer, Protocol, SameNode,
    Service, ServicePort, SpiffeId, TargetPort, TransportChoice, TrustDomain, Update, WorkloadUid,
};
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::net::IpAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

fn workload(name: &str, number: u8) -> Workload {
    Workload {
        uid: WorkloadUid::new(name),
        name: ObjectName::parse("shop", name).unwrap(),
        owner: name.into(),
        labels: BTreeMap::from([("app".to_owned(), "many".to_owned())]),
        identity: SpiffeId::parse("spiffe://example.org/ns/shop/sa/default").unwrap(),
        node: NodeName::parse("n1").unwrap(),
        addresses: vec![IpAddr::from([10, 0, 1, number])],
        netns: None,
        cgroup: None,
        mode: Mode::Permissive,
        port_modes: BTreeMap::new(),
        ports: BTreeMap::new(),
        weight: 100,
        is_terminating: name == "leaving",
        default_action: DefaultAction::Allow,
    }
}

fn dns(upstream: &[SocketAddr]) -> Dns {
    Dns { domain: "cluster.local".into(), addresses: vec![[10, 96, 0, 10].into()], upstream: upstream.to_vec() }
}

/// Services `cart` (both families, two named ports), `web` (IPv4), and `many` (none, 60 workloads) in namespace shop.
fn snapshot(upstream: &[SocketAddr]) -> Arc<Snapshot> {
    let mesh = Mesh {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        mode: Mode::Permissive,
        transport: TransportChoice::Auto,
        exclude: Vec::new(),
        default_action: DefaultAction::Allow,
        denied_error: DeniedError::AccessDenied,
        same_node: SameNode::Kernel,
        dns: Some(Arc::new(dns(upstream))),
    };
    let port = |name: &str, port, protocol| ServicePort {
        name: name.into(),
        port,
        protocol,
        target: TargetPort::Number(8_080),
    };
    let mut catalog = Catalog { mesh: Some(Arc::new(mesh)), ..Catalog::default() };
    let cart = vec![port("http", 80, Protocol::Tcp), port("events", 9_000, Protocol::Udp)];
    for (name, vips, ports, app) in [
        ("cart", vec!["10.96.0.1", "fd00::1"], cart, "cart"),
        ("web", vec!["10.96.0.2"], vec![port("", 80, Protocol::Tcp)], "web"),
        ("many", vec![], vec![port("http", 80, Protocol::Tcp)], "many"),
    ] {
        let service = Service {
            name: ObjectName::parse("shop", name).unwrap(),
            vips: vips.into_iter().map(|vip| vip.parse().unwrap()).collect(),
            ports,
            selector: BTreeMap::from([("app".to_owned(), app.to_owned())]),
            prefer: Prefer::default(),
            affinity: Affinity::default(),
        };
        catalog.services.insert(service.name.clone(), Arc::new(service));
    }
    let names = (1..=60).map(|number| (format!("many-{number}"), number)).chain([("leaving".to_owned(), 61)]);
    for (name, number) in names {
        let workload = workload(&name, number);
        catalog.workloads.insert(workload.name.clone(), Arc::new(workload));
    }
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    engine.handle_update(Update::Snapshot(catalog), Instant::now());
    Arc::clone(&engine.desired().snapshot)
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn outcome(bytes: &[u8], via: Via, upstream: &[SocketAddr]) -> Outcome {
    answer(bytes, via, "shop", &snapshot(upstream), &dns(upstream))
}

/// The answer, decoded, and how it is counted.
fn told(message: &Message, via: Via) -> (Message, Answered) {
    match outcome(&message.to_vec().unwrap(), via, &[]) {
        Outcome::Reply(bytes, answered) => (Message::from_vec(&bytes).unwrap(), answered),
        Outcome::Forward(_) => panic!("{:?} is forwarded", message.queries),
    }
}

/// The data of the answers, as text.
fn data(name: &str, kind: RecordType) -> Vec<String> {
    told(&query(name, kind), Via::Udp).0.answers.iter().map(|record| record.data.to_string()).collect()
}

#[test]
fn services_have_names_of_every_length() {
    for name in
        ["cart.shop.svc.cluster.local.", "cart.shop.svc.", "cart.shop.", "cart.", "CaRt.Shop.SVC.Cluster.local."]
    {
        assert_eq!(data(name, RecordType::A), ["10.96.0.1"], "{name}");
        assert_eq!(data(name, RecordType::AAAA), ["fd00::1"], "{name}");
    }
    assert_eq!(data("cart.", RecordType::ANY).len(), 2);
    assert_eq!(data("dns.cluster.local.", RecordType::A), ["10.96.0.10"]);
}

#[test]
fn an_answer_repeats_the_question_to_the_letter() {
    let asked = query("CaRt.sHop.svc.CLUSTER.local.", RecordType::A);
    let (reply, answered) = told(&asked, Via::Udp);
    let metadata = reply.metadata;
    assert_eq!((metadata.id, metadata.authoritative, metadata.recursion_desired), (0x1234, true, true));
    assert!(!metadata.recursion_available && !metadata.truncation);
    assert!(reply.queries[0].name.eq_case(&asked.queries[0].name));
    assert!(reply.answers[0].name.eq_case(&asked.queries[0].name));
    assert_eq!((reply.answers[0].ttl, answered, reply.edns), (5, Answered::Records, None));
}

#[test]
fn what_has_no_such_record_is_told_from_what_is_not_there() {
    use Answered::{NoData, NoName};
    let cases = [
        ("web.shop.svc.cluster.local.", RecordType::AAAA, NoData),
        ("cart.shop.svc.cluster.local.", RecordType::MX, NoData),
        ("shop.svc.cluster.local.", RecordType::A, NoData),
        ("svc.cluster.local.", RecordType::A, NoData),
        ("cluster.local.", RecordType::A, NoData),
        ("_tcp.cart.shop.svc.cluster.local.", RecordType::A, NoData),
        ("_http._tcp.cart.shop.svc.cluster.local.", RecordType::A, NoData),
        ("_tcp.web.shop.svc.cluster.local.", RecordType::A, NoName),
        ("_http._udp.cart.shop.svc.cluster.local.", RecordType::SRV, NoName),
        ("http._tcp.cart.shop.svc.cluster.local.", RecordType::SRV, NoName),
        ("gone.shop.svc.cluster.local.", RecordType::A, NoName),
        ("cart.other.svc.cluster.local.", RecordType::A, NoName),
        ("other.svc.cluster.local.", RecordType::A, NoName),
        ("x.cart.shop.svc.cluster.local.", RecordType::A, NoName),
        ("cart.shop.pod.cluster.local.", RecordType::A, NoName),
        ("gone.shop.svc.", RecordType::A, NoName),
    ];
    for (name, kind, expected) in cases {
        let (reply, answered) = told(&query(name, kind), Via::Udp);
        let code = if expected == NoName { ResponseCode::NXDomain } else { ResponseCode::NoError };
        assert_eq!((answered, reply.metadata.response_code, reply.answers.len()), (expected, code, 0), "{name}");
        let RData::SOA(soa) = &reply.authorities[0].data else { panic!("{name}: {reply:?}") };
        assert_eq!((soa.minimum, reply.authorities[0].ttl), (5, 5));
    }
}

#[test]
fn ports_and_addresses_lead_back_to_services() {
    let (reply, _) = told(&query("_http._tcp.cart.shop.svc.cluster.local.", RecordType::SRV), Via::Udp);
    assert_eq!(reply.answers[0].data.to_string(), "0 100 80 cart.shop.svc.cluster.local.");
    assert_eq!(reply.additionals.len(), 2);
    assert_eq!(data("_events._udp.cart.shop.svc.cluster.local.", RecordType::SRV).len(), 1);
    // Whoever has no virtual address is reached on the workloads' port.
    let (headless, _) = told(&query("_http._tcp.many.shop.svc.cluster.local.", RecordType::SRV), Via::Tcp);
    assert!(headless.answers[0].data.to_string().starts_with("0 100 8080 "), "{headless:?}");
    assert_eq!(data("1.0.96.10.in-addr.arpa.", RecordType::PTR), ["cart.shop.svc.cluster.local."]);
    let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.D.f.ip6.arpa.";
    assert_eq!(data(v6, RecordType::PTR), ["cart.shop.svc.cluster.local."]);
}

#[test]
fn other_names_are_forwarded_or_refused() {
    let upstream = [SocketAddr::from(([192, 0, 2, 53], 53))];
    let others = [
        ("example.com.", RecordType::A),
        ("printer.", RecordType::A),
        ("cart.other.", RecordType::A),
        ("cluster.local.example.com.", RecordType::A),
        ("9.0.96.10.in-addr.arpa.", RecordType::PTR),
        ("01.0.96.10.in-addr.arpa.", RecordType::PTR),
        (".", RecordType::NS),
    ];
    for (name, kind) in others {
        let bytes = query(name, kind).to_vec().unwrap();
        assert!(matches!(outcome(&bytes, Via::Udp, &upstream), Outcome::Forward(_)), "{name}");
        let (reply, answered) = told(&query(name, kind), Via::Udp);
        assert_eq!((reply.metadata.response_code, answered), (ResponseCode::Refused, Answered::Refused), "{name}");
        assert_eq!(reply.queries.len(), 1);
    }
    let mut chaos = query("version.bind.", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(told(&chaos, Via::Udp).1, Answered::Refused);
}

#[test]
fn an_answer_is_no_longer_than_the_caller_can_take() {
    let plain = query("many.shop.svc.cluster.local.", RecordType::A);
    let (reply, _) = told(&plain, Via::Udp);
    assert!(reply.metadata.truncation && reply.answers.is_empty() && reply.queries.len() == 1);
    let (reply, _) = told(&plain, Via::Tcp);
    assert_eq!((reply.metadata.truncation, reply.answers.len()), (false, 60), "without those that are leaving");
    let mut roomy = plain.clone();
    let mut edns = Edns::new();
    edns.set_max_payload(4_096).set_version(0);
    roomy.set_edns(edns.clone());
    let (reply, _) = told(&roomy, Via::Udp);
    assert_eq!((reply.metadata.truncation, reply.answers.len()), (false, 60));
    assert_eq!(reply.edns.as_ref().map(Edns::max_payload), Some(1_232));
    // Less than what everyone must take is taken for that.
    edns.set_max_payload(100);
    roomy.set_edns(edns.clone());
    roomy.queries[0].set_name(Name::from_ascii("cart.").unwrap());
    assert_eq!(told(&roomy, Via::Udp).0.answers.len(), 1);
    edns.set_version(1);
    roomy.set_edns(edns);
    let (reply, answered) = told(&roomy, Via::Udp);
    assert_eq!((reply.metadata.response_code, answered), (ResponseCode::BADVERS, Answered::Malformed));
}

#[test]
fn what_is_no_sound_query_is_refused_in_kind() {
    let sound = query("cart.", RecordType::A).to_vec().unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = sound.clone();
        bytes[at] = byte;
        bytes
    };
    let code = |bytes: &[u8]| match outcome(bytes, Via::Udp, &[]) {
        Outcome::Reply(reply, answered) => (Head::of(&reply).map(Head::response_code), answered),
        Outcome::Forward(_) => panic!("forwarded"),
    };
    assert_eq!(code(&[]), (None, Answered::Ignored));
    assert_eq!(code(&sound[..11]), (None, Answered::Ignored));
    assert_eq!(code(&with(2, 0x81)), (None, Answered::Ignored), "a response");
    assert_eq!(code(&with(2, 0x29)), (Some(4), Answered::NotImplemented), "an update");
    assert_eq!(code(&with(5, 0)), (Some(1), Answered::Malformed), "no question");
    assert_eq!(code(&with(5, 2)), (Some(1), Answered::Malformed), "two questions");
    assert_eq!(code(&with(12, 0xc0)), (Some(1), Answered::Malformed), "a pointer");
    assert_eq!(code(&sound[..sound.len() - 1]), (Some(1), Answered::Malformed), "cut off");
    assert_eq!(code(&with(7, 1)), (Some(1), Answered::Malformed), "an answer that is not there");
    assert_eq!(code(&sound), (Some(0), Answered::Records));
}

#[test]
fn no_bytes_make_it_panic_or_answer_at_length() {
    let (snapshot, dns) = (snapshot(&[]), dns(&[]));
    let mut roomy = query("_http._tcp.cart.shop.svc.cluster.local.", RecordType::SRV);
    roomy.set_edns(Edns::new());
    let seeds = [
        query("cart.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap(),
        query("1.0.96.10.in-addr.arpa.", RecordType::PTR).to_vec().unwrap(),
        query("many.", RecordType::ANY).to_vec().unwrap(),
        roomy.to_vec().unwrap(),
    ];
    // xorshift64*: the same failure tomorrow.
    let mut state = 0x646e_735f_6d65_7368_u64;
    let mut random = |bound: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        usize::try_from(state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % bound.max(1)
    };
    let (mut sound, mut unsound) = (0, 0);
    for _ in 0..20_000 {
        let mut bytes = seeds[random(seeds.len())].clone();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes.truncate(at),
                1 => bytes.extend_from_within(at..),
                _ if bytes.is_empty() => {}
                _ => bytes[at] = u8::try_from(random(256)).unwrap(),
            }
        }
        let Outcome::Reply(reply, answered) = answer(&bytes, Via::Udp, "shop", &snapshot, &dns) else { panic!() };
        if answered == Answered::Ignored {
            assert!(reply.is_empty());
            continue;
        }
        let head = Head::of(&reply).unwrap();
        assert!(head.is_response() && reply.len() <= 4_096 && reply[..2] == bytes[..2], "{bytes:?}");
        *(if answered == Answered::Malformed { &mut unsound } else { &mut sound }) += 1;
    }
    assert!(sound > 1_000 && unsound > 1_000, "the mutations are one-sided: {sound} {unsound}");
}

fn metrics() -> (DnsMetrics, Registry) {
    let mut registry = Registry::with_prefix("nodemesh");
    (DnsMetrics::register(&mut registry), registry)
}

fn scrape(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    text
}

fn server(upstream: &[SocketAddr]) -> (Server, Registry) {
    let (metrics, registry) = metrics();
    (Server::new(Arc::new(ArcSwap::new(snapshot(upstream))), metrics), registry)
}

/// An answer to a query, with one address.
fn reply_to(query: &[u8]) -> Message {
    let asked = Message::from_vec(query).unwrap();
    let mut reply = Message::response(asked.metadata.id, OpCode::Query);
    reply.queries.clone_from(&asked.queries);
    let data = RData::A([192, 0, 2, 80].into());
    reply.add_answer(hickory_proto::rr::Record::from_rdata(asked.queries[0].name.clone(), 60, data));
    reply
}

#[tokio::test]
async fn an_upstream_answer_comes_back_under_the_callers_id_and_forged_ones_do_not() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (server, registry) = server(&[upstream.local_addr().unwrap()]);
    let asked = query("example.com.", RecordType::A).to_vec().unwrap();
    let answering = async {
        let mut buffer = [0; 512];
        let (length, from) = upstream.recv_from(&mut buffer).await.unwrap();
        let right = reply_to(&buffer[..length]);
        let mut other_id = right.clone();
        other_id.metadata.id = !right.metadata.id;
        let mut other_question = right.clone();
        other_question.queries[0].set_name(Name::from_ascii("example.org.").unwrap());
        for message in [other_id, other_question, right] {
            upstream.send_to(&message.to_vec().unwrap(), from).await.unwrap();
        }
    };
    let (reply, ()) = tokio::join!(server.answer(&workload("w", 1), &asked), answering);
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!((reply.metadata.id, reply.answers[0].data.to_string().as_str()), (0x1234, "192.0.2.80"));
    assert_eq!(reply.queries[0].name.to_ascii(), "example.com.");
    let text = scrape(&registry);
    assert!(text.contains("nodemesh_dns_queries_total{answered_by=\"upstream\",result=\"forwarded\"} 1"), "{text}");
}

#[tokio::test]
async fn what_is_cut_off_is_asked_for_by_tcp_and_cut_again_for_who_cannot_take_it() {
    let streams = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = streams.local_addr().unwrap();
    let upstream = UdpSocket::bind(at).await.unwrap();
    let (server, _registry) = server(&[at]);
    let asked = query("example.com.", RecordType::A).to_vec().unwrap();
    let answering = async {
        for _ in 0..2 {
            let mut buffer = [0; 512];
            let (length, from) = upstream.recv_from(&mut buffer).await.unwrap();
            let mut cut = reply_to(&buffer[..length]);
            cut.metadata.truncation = true;
            upstream.send_to(&cut.to_vec().unwrap(), from).await.unwrap();
            let (mut stream, _) = streams.accept().await.unwrap();
            let mut asked = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut asked).await.unwrap();
            let mut whole = reply_to(&asked);
            whole.answers = vec![whole.answers[0].clone(); 50];
            let whole = whole.to_vec().unwrap();
            stream.write_u16(u16::try_from(whole.len()).unwrap()).await.unwrap();
            stream.write_all(&whole).await.unwrap();
        }
    };
    let caller = workload("w", 1);
    let asking = async {
        let by_datagram = server.answer(&caller, &asked).await;
        (by_datagram, server.answer_via(Via::Tcp, &caller, &asked).await)
    };
    let ((short, long), ()) = tokio::join!(asking, answering);
    let (short, long) = (Message::from_vec(&short).unwrap(), Message::from_vec(&long).unwrap());
    assert!(short.metadata.truncation && short.answers.is_empty() && short.metadata.id == 0x1234);
    assert_eq!((long.metadata.truncation, long.answers.len()), (false, 50));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_passed_over_and_none_is_a_failure() {
    let gone = {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.local_addr().unwrap()
    };
    let (alone, registry) = server(&[gone]);
    let asked = query("example.com.", RecordType::A).to_vec().unwrap();
    let reply = Message::from_vec(&alone.answer(&workload("w", 1), &asked).await).unwrap();
    assert_eq!((reply.metadata.response_code, reply.metadata.id), (ResponseCode::ServFail, 0x1234));
    assert!(scrape(&registry).contains("nodemesh_dns_upstream_failures_total{reason=\"unreachable\"} 1"));
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (both, _registry) = server(&[gone, upstream.local_addr().unwrap()]);
    let answering = async {
        let mut buffer = [0; 512];
        let (length, from) = upstream.recv_from(&mut buffer).await.unwrap();
        upstream.send_to(&reply_to(&buffer[..length]).to_vec().unwrap(), from).await.unwrap();
    };
    let (reply, ()) = tokio::join!(both.answer(&workload("w", 1), &asked), answering);
    assert_eq!(Message::from_vec(&reply).unwrap().answers.len(), 1);
}

#[tokio::test]
async fn queries_that_wait_are_bounded() {
    let (metrics, registry) = metrics();
    let forwarder = Forwarder::new(metrics);
    let all = forwarder.hold_all();
    let asked = query("example.com.", RecordType::A).to_vec().unwrap();
    let question = Question::new(Head::of(&asked).unwrap(), wire::question(&asked).unwrap(), 512);
    let failed = forwarder.ask(&asked, &question, &[]).await;
    assert_eq!(failed, Err(Failure::Busy));
    assert!(scrape(&registry).contains("nodemesh_dns_upstream_failures_total{reason=\"busy\"} 1"));
    drop(all);
    assert_eq!(forwarder.ask(&asked, &question, &[]).await, Err(Failure::Unreachable));
}

#[tokio::test]
async fn a_stream_of_queries_is_answered_in_its_order() {
    let (server, registry) = server(&[]);
    assert!(server.is_at(([10, 96, 0, 10], 53).into()) && !server.is_at(([10, 96, 0, 10], 80).into()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let asking = async {
        for name in ["cart.", "web.", "many."] {
            let bytes = query(name, RecordType::A).to_vec().unwrap();
            client.write_u16(u16::try_from(bytes.len()).unwrap()).await.unwrap();
            client.write_all(&bytes).await.unwrap();
        }
        let mut counts = Vec::new();
        for _ in 0..3 {
            let mut reply = vec![0; client.read_u16().await.unwrap().into()];
            client.read_exact(&mut reply).await.unwrap();
            counts.push(Message::from_vec(&reply).unwrap().answers.len());
        }
        drop(client);
        counts
    };
    let caller = workload("w", 1);
    let (served, counts) = tokio::join!(server.serve(&caller, &accepted), asking);
    served.unwrap();
    assert_eq!(counts, [1, 1, 60]);
    let text = scrape(&registry);
    assert!(text.contains("nodemesh_dns_queries_total{answered_by=\"mesh\",result=\"answered\"} 3"), "{text}");
}
