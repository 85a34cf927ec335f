//! The rtnetlink requests that are needed, one at a time and acknowledged.

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The kernel answers before sendto(2) returns; a bound all the same, for one that never does.
const ANSWER_BOUND: Duration = Duration::from_secs(5);

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// Length of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;

const RTA_OIF: u16 = 4;
const RTA_TABLE: u16 = 15;
pub(super) const RTN_LOCAL: u8 = 2;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_HOST: u8 = 254;
/// The loopback link has this index in every namespace.
const LOOPBACK: u32 = 1;

const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;

/// Whether a request adds or removes. Adding what exists is `EEXIST`; removing what does not is `ENOENT` or `ESRCH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Add,
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(super) fn number(self) -> u8 {
        let family = match self {
            Self::V4 => libc::AF_INET,
            Self::V6 => libc::AF_INET6,
        };
        u8::try_from(family).expect("address families are small")
    }
}

/// `ip rule ... fwmark MARK lookup TABLE`, tagged with who made it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) priority: u32,
    pub(super) mark: u32,
    pub(super) table: u32,
    pub(super) tag: u8,
}

/// `ip route ... local default dev lo table TABLE`, tagged with who made it.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalDefault {
    pub(super) table: u32,
    pub(super) tag: u8,
}

/// A connection to the routing of the namespace that the calling thread is in.
pub(super) struct Netlink(pub(super) OwnedFd);

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_BOUND))?;
        Ok(Self(socket))
    }

    pub(super) fn rule(&self, change: Change, family: Family, rule: Rule) -> io::Result<()> {
        let kind = if change == Change::Add { RTM_NEWRULE } else { RTM_DELRULE };
        self.request(&encode_rule(kind, change, family, rule))
    }

    pub(super) fn local_default(&self, change: Change, family: Family, route: LocalDefault) -> io::Result<()> {
        let kind = if change == Change::Add { RTM_NEWROUTE } else { RTM_DELROUTE };
        self.request(&encode_local_default(kind, change, family, route))
    }

    pub(super) fn request(&self, message: &[u8]) -> io::Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.0, message, SendFlags::empty(), &kernel)?;
        // An error's answer repeats the request.
        let mut answer = [0; 512];
        let (_, length) = recv(&self.0, &mut answer, RecvFlags::empty())?;
        parse_acknowledgement(&answer[..length.min(answer.len())])
    }
}

fn encode_rule(kind: u16, change: Change, family: Family, rule: Rule) -> Vec<u8> {
    // struct fib_rule_hdr: family, dst_len, src_len, tos, table, res1, res2, action, flags. Tables beyond 255 are
    // given as an attribute.
    let header = [family.number(), 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
    let attributes: [(u16, &[u8]); 5] = [
        (FRA_PRIORITY, &rule.priority.to_ne_bytes()),
        (FRA_FWMARK, &rule.mark.to_ne_bytes()),
        (FRA_FWMASK, &u32::MAX.to_ne_bytes()),
        (FRA_TABLE, &rule.table.to_ne_bytes()),
        (FRA_PROTOCOL, &[rule.tag]),
    ];
    encode(kind, change, &header, &attributes)
}

fn encode_local_default(kind: u16, change: Change, family: Family, route: LocalDefault) -> Vec<u8> {
    let scope = if family == Family::V4 { RT_SCOPE_HOST } else { RT_SCOPE_UNIVERSE };
    // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
    let header = [family.number(), 0, 0, 0, 0, route.tag, scope, RTN_LOCAL, 0, 0, 0, 0];
    let attributes: [(u16, &[u8]); 2] = [(RTA_OIF, &LOOPBACK.to_ne_bytes()), (RTA_TABLE, &route.table.to_ne_bytes())];
    encode(kind, change, &header, &attributes)
}

pub(super) fn encode(kind: u16, change: Change, header: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut flags = NLM_F_REQUEST | NLM_F_ACK;
    if change == Change::Add {
        flags |= NLM_F_CREATE | NLM_F_EXCL;
    }
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and sender: one request at a time needs neither.
    message.extend([0; 8]);
    message.extend(header);
    for (name, value) in attributes {
        let length = u16::try_from(4 + value.len()).expect("attributes are short");
        message.extend(length.to_ne_bytes());
        message.extend(name.to_ne_bytes());
        message.extend(*value);
        message.resize(message.len().next_multiple_of(4), 0);
    }
    let length = u32::try_from(message.len()).expect("requests are short");
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

/// `struct nlmsghdr`, then a negative errno or 0.
fn parse_acknowledgement(answer: &[u8]) -> io::Result<()> {
    let field = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    match (kind, field(HEADER)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is no acknowledgement")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_aligned_and_say_their_length() {
        let rule = Rule { priority: 100, mark: 0x539, table: 1337, tag: 139 };
        let message = encode_rule(RTM_NEWRULE, Change::Add, Family::V6, rule);
        assert_eq!(message.len(), HEADER + 12 + 5 * 8);
        assert_eq!(u32::from_ne_bytes(message[..4].try_into().unwrap()) as usize, message.len());
        assert_eq!(message[HEADER], 10);
        // The one-byte tag is the last attribute: length 5, padded to 8.
        assert_eq!(
            message[message.len() - 8..],
            [&5_u16.to_ne_bytes()[..], &21_u16.to_ne_bytes(), &[139, 0, 0, 0]].concat()
        );
    }

    #[test]
    fn answers_are_told_apart() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; HEADER];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert!(parse_acknowledgement(&answer(NLMSG_ERROR, 0)).is_ok());
        let refused = parse_acknowledgement(&answer(NLMSG_ERROR, -libc::EEXIST)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
        assert!(parse_acknowledgement(&answer(3, 0)).is_err());
        assert!(parse_acknowledgement(&answer(NLMSG_ERROR, 0)[..18]).is_err());
        assert!(parse_acknowledgement(&[]).is_err());
    }
}
