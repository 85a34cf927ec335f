//! The answer to a query, as far as the catalog has it. Pure: bytes in, bytes out.

use super::Via;
use super::wire::{self, FORMAT_ERROR, Head, NOT_IMPLEMENTED, Question, REFUSED};
use super::zone::{self, Found};
use crate::engine::{Snapshot, selects};
use crate::model::{Dns, ObjectName, Service, TargetPort, Workload};
use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, MessageType, Metadata, ResponseCode};
use hickory_proto::rr::rdata::{PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::net::IpAddr;
use std::sync::Arc;

/// Seconds that an answer may be kept: short, because a removed service's address may soon be another's.
const TTL: u32 = 5;
/// What we take by datagram (RFC 9715).
const PAYLOAD: u16 = 1_232;

/// What is to be done about a query.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Empty: nothing is said.
    Reply(Vec<u8>, Answered),
    /// The name is not the mesh's.
    Forward(Question),
}

/// How a query ended; the words of the label `result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answered {
    Records,
    NoData,
    NoName,
    Refused,
    Malformed,
    NotImplemented,
    /// Not even a query.
    Ignored,
}

impl Answered {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Records => "answered",
            Self::NoData => "nodata",
            Self::NoName => "nxdomain",
            Self::Refused => "refused",
            Self::Malformed => "formerr",
            Self::NotImplemented => "notimp",
            Self::Ignored => "ignored",
        }
    }
}

/// Answers a query of a workload of this namespace.
pub(super) fn answer(bytes: &[u8], via: Via, namespace: &str, snapshot: &Snapshot, dns: &Dns) -> Outcome {
    let Some(head) = Head::of(bytes).filter(|head| !head.is_response()) else {
        // To answer a response could go on forever.
        return Outcome::Reply(Vec::new(), Answered::Ignored);
    };
    if head.opcode() != 0 {
        return Outcome::Reply(head.refusal(NOT_IMPLEMENTED), Answered::NotImplemented);
    }
    let malformed = || Outcome::Reply(head.refusal(FORMAT_ERROR), Answered::Malformed);
    let Some(section) = wire::question(bytes).filter(|_| head.questions() == 1) else { return malformed() };
    let Ok(query) = Message::from_vec(bytes) else { return malformed() };
    let [asked] = &query.queries[..] else { return malformed() };
    let limit = wire::limit(via, query.edns.as_ref().map(Edns::max_payload));
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        let mut reply = Reply::to(&query, dns);
        reply.message.metadata.response_code = ResponseCode::BADVERS;
        return reply.end(limit, Answered::Malformed, head);
    }
    let name = &asked.name;
    let labels: Vec<String> = name.iter().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
    let is_internet = matches!(asked.query_class, DNSClass::IN | DNSClass::ANY);
    let found = if is_internet { zone::find(snapshot, dns, namespace, &labels) } else { Found::Elsewhere };
    if found == Found::Elsewhere {
        let question = Question::new(head, section, limit);
        return match is_internet && !dns.upstream.is_empty() {
            true => Outcome::Forward(question),
            false => Outcome::Reply(question.refusal(REFUSED), Answered::Refused),
        };
    }
    let mut reply = Reply::to(&query, dns);
    match reply.fill(name, asked.query_type, &found, snapshot, dns) {
        Ok(()) => {}
        // A name of the catalog that is too long for DNS: nobody can have asked for it by its full name.
        Err(_) => return Outcome::Reply(head.refusal(wire::SERVER_FAILURE), Answered::Malformed),
    }
    let answered = match (&found, reply.message.answers.is_empty()) {
        (Found::Missing, _) => Answered::NoName,
        (_, true) => Answered::NoData,
        (_, false) => Answered::Records,
    };
    reply.end(limit, answered, head)
}

struct Reply {
    message: Message,
}

impl Reply {
    fn to(query: &Message, dns: &Dns) -> Self {
        let mut message = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
        message.metadata = Metadata::response_from_request(&query.metadata);
        message.metadata.authoritative = true;
        message.metadata.recursion_available = !dns.upstream.is_empty();
        // As it was asked, to the case of its letters: callers may compare.
        message.queries.clone_from(&query.queries);
        if query.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(PAYLOAD).set_version(0);
            message.set_edns(edns);
        }
        Self { message }
    }

    fn fill(
        &mut self,
        name: &Name,
        kind: RecordType,
        found: &Found,
        snapshot: &Snapshot,
        dns: &Dns,
    ) -> Result<(), ProtoError> {
        let records = match found {
            Found::Service(service) => addresses(name, kind, &addresses_of(service, snapshot)),
            Found::Server => addresses(name, kind, &dns.addresses),
            Found::Port(service, port) if matches!(kind, RecordType::SRV | RecordType::ANY) => {
                let target = service_name(&service.name, dns)?;
                let number = match &port.target {
                    // Without a virtual address, callers reach the workloads themselves.
                    TargetPort::Number(number) if service.vips.is_empty() => *number,
                    _ => port.port,
                };
                self.message.add_additionals(addresses(&target, RecordType::ANY, &addresses_of(service, snapshot)));
                vec![record(name, RData::SRV(SRV::new(0, 100, number, target)))]
            }
            Found::Address(service) if matches!(kind, RecordType::PTR | RecordType::ANY) => {
                vec![record(name, RData::PTR(PTR(service_name(&service.name, dns)?)))]
            }
            _ => Vec::new(),
        };
        if *found == Found::Missing {
            self.message.metadata.response_code = ResponseCode::NXDomain;
        }
        if records.is_empty() {
            self.message.add_authority(authority(dns)?);
        }
        self.message.add_answers(records);
        Ok(())
    }

    fn end(self, limit: usize, answered: Answered, head: Head) -> Outcome {
        match self.message.to_vec() {
            Ok(bytes) if bytes.len() <= limit => Outcome::Reply(bytes, answered),
            Ok(_) => match self.message.truncate().to_vec() {
                Ok(bytes) => Outcome::Reply(bytes, answered),
                Err(_) => Outcome::Reply(head.refusal(wire::SERVER_FAILURE), Answered::Malformed),
            },
            Err(_) => Outcome::Reply(head.refusal(wire::SERVER_FAILURE), Answered::Malformed),
        }
    }
}

/// A service's virtual addresses, or of one without any the addresses of the workloads behind it.
fn addresses_of(service: &Service, snapshot: &Snapshot) -> Vec<IpAddr> {
    if !service.vips.is_empty() {
        return service.vips.iter().map(IpAddr::to_canonical).collect();
    }
    let takes = |workload: &&Arc<Workload>| {
        selects(service, workload) && workload.is_meshed() && workload.weight > 0 && !workload.is_terminating
    };
    let behind = snapshot.workloads().values().filter(takes);
    let mut found: Vec<_> = behind.flat_map(|workload| workload.addresses.iter().map(IpAddr::to_canonical)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn addresses(name: &Name, kind: RecordType, addresses: &[IpAddr]) -> Vec<Record> {
    let wanted = addresses.iter().filter(|address| match kind {
        RecordType::A => address.is_ipv4(),
        RecordType::AAAA => address.is_ipv6(),
        kind => kind == RecordType::ANY,
    });
    let data = |address: &IpAddr| match *address {
        IpAddr::V4(address) => RData::A(address.into()),
        IpAddr::V6(address) => RData::AAAA(address.into()),
    };
    wanted.map(|address| record(name, data(address))).collect()
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL, data)
}

/// `<service>.<namespace>.svc.<domain>`.
fn service_name(service: &ObjectName, dns: &Dns) -> Result<Name, ProtoError> {
    let inner = [service.name(), service.namespace(), "svc"];
    Name::from_labels(inner.into_iter().chain(dns.domain.split('.')).map(str::as_bytes))
}

/// What says for how long a name is known not to be there.
fn authority(dns: &Dns) -> Result<Record, ProtoError> {
    let domain = || dns.domain.split('.').map(str::as_bytes);
    let server = Name::from_labels([&b"dns"[..]].into_iter().chain(domain()))?;
    let contact = Name::from_labels([&b"hostmaster"[..]].into_iter().chain(domain()))?;
    let soa = SOA::new(server, contact, 1, 7_200, 1_800, 86_400, TTL);
    Ok(record(&Name::from_labels(domain())?, RData::SOA(soa)))
}
