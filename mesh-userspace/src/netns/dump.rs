//! rtnetlink's listings: which link has an address, and which routes are ours.

use super::netlink::{Change, Family, HEADER, Netlink, RTN_LOCAL, encode};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SendFlags, recv, sendto};
use std::io;
use std::net::IpAddr;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;

const RTM_GETADDR: u16 = 22;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
/// The table of local addresses; its number fits the route's header.
pub(super) const LOCAL_TABLE: u8 = 255;
/// Length of `struct rtmsg`.
const ROUTE: usize = 12;
/// The kernel fills up to 32 KiB at once.
const ANSWER: usize = 64 * 1024;

impl Netlink {
    /// The index of the link that has an address; `None` if none has.
    pub(super) fn link_of(&self, address: IpAddr) -> io::Result<Option<u32>> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        const MESSAGE: usize = 8;
        let octets = octets(address);
        let mut found = None;
        self.list(RTM_GETADDR, &[Family::of(address).number(), 0, 0, 0, 0, 0, 0, 0], |message| {
            let is_it = attributes(message.get(MESSAGE..).unwrap_or_default())
                .any(|(name, value)| matches!(name, IFA_ADDRESS | IFA_LOCAL) && value == octets);
            if is_it && let Some(index) = message.get(4..8).and_then(|bytes| bytes.try_into().ok()) {
                found = Some(u32::from_ne_bytes(index));
            }
        })?;
        Ok(found)
    }

    /// Removes the routes to local addresses that carry this tag.
    pub(super) fn remove_local_routes(&self, family: Family, tag: u8) -> io::Result<()> {
        let mut requests = Vec::new();
        self.list(RTM_GETROUTE, &[family.number(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], |message| {
            // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
            let Some((route, rest)) = message.split_at_checked(ROUTE) else { return };
            if route[4] == LOCAL_TABLE && route[5] == tag && route[7] == RTN_LOCAL {
                let named: Vec<_> = attributes(rest).filter(|(name, _)| matches!(*name, RTA_DST | RTA_OIF)).collect();
                requests.push(encode(RTM_DELROUTE, Change::Remove, route, &named));
            }
        })?;
        requests.iter().try_for_each(|request| self.request(request))
    }

    fn list(&self, kind: u16, header: &[u8], mut visit: impl FnMut(&[u8])) -> io::Result<()> {
        let mut request = encode(kind, Change::Remove, header, &[]);
        request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        sendto(&self.0, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = vec![0; ANSWER];
        loop {
            let (_, length) = recv(&self.0, answer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = &answer[..length.min(ANSWER)];
            while let Some((kind, message, next)) = split_message(rest) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return Err(error(message)),
                    _ => visit(message),
                }
                rest = next;
            }
        }
    }
}

/// The first message's kind and contents, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let message = bytes.get(HEADER..length)?;
    Some((kind, message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let name = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((name, value))
    })
}

fn error(message: &[u8]) -> io::Error {
    let code = message.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    io::Error::from_raw_os_error(code.saturating_neg())
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_taken_apart_and_nonsense_ends_them() {
        let message = encode(RTM_GETROUTE, Change::Remove, &[7; ROUTE], &[(RTA_DST, &[10, 0, 0, 1]), (99, &[1])]);
        let twice = [message.clone(), message.clone()].concat();
        let (kind, first, rest) = split_message(&twice).unwrap();
        assert_eq!((kind, rest), (RTM_GETROUTE, message.as_slice()));
        let found: Vec<_> = attributes(&first[ROUTE..]).collect();
        assert_eq!(found, [(RTA_DST, &[10, 0, 0, 1][..]), (99, &[1][..])]);
        assert_eq!(split_message(&twice[..10]), None);
        assert_eq!(attributes(&[3, 0, 0, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 0, 0, 1]).count(), 0);
    }
}
