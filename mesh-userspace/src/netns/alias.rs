//! Aliases: addresses that are local to a workload's namespace and nowhere else, to which its datagrams are redirected
//! (`mesh_common::datagram`).

use super::dump::{LOCAL_TABLE, octets};
use super::netlink::{Change, Family, Netlink, RTN_LOCAL, encode};
use super::routing::{TAG, explain, lacks_ipv6};
use ipnet::IpNet;
use std::io;
use std::net::IpAddr;

const RTM_NEWROUTE: u16 = 24;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_HOST: u8 = 254;

/// A range of aliases, and the workload's own address that it speaks to them from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AliasRange {
    pub range: IpNet,
    pub own: IpAddr,
}

/// Makes exactly these ranges local to this thread's namespace. They hang on the link that has the own address, so that
/// sockets that are bound to that link reach them as well.
pub(super) fn set(ranges: &[AliasRange]) -> io::Result<()> {
    let netlink = Netlink::open().map_err(|error| explain(&error, "cannot open netlink"))?;
    remove_all(&netlink)?;
    for AliasRange { range, own } in ranges {
        let link = netlink.link_of(*own)?.ok_or_else(|| {
            io::Error::new(io::ErrorKind::AddrNotAvailable, format!("no link of the namespace has the address {own}"))
        })?;
        let family = Family::of(*own);
        let scope = if family == Family::V4 { RT_SCOPE_HOST } else { RT_SCOPE_UNIVERSE };
        // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
        let header = [family.number(), range.prefix_len(), 0, 0, LOCAL_TABLE, TAG, scope, RTN_LOCAL, 0, 0, 0, 0];
        let attributes: [(u16, &[u8]); 3] =
            [(RTA_DST, &octets(range.network())), (RTA_OIF, &link.to_ne_bytes()), (RTA_PREFSRC, &octets(*own))];
        netlink
            .request(&encode(RTM_NEWROUTE, Change::Add, &header, &attributes))
            .map_err(|error| explain(&error, &format!("cannot add the local route of {range}")))?;
    }
    Ok(())
}

/// Removes every range that [`set`] made, of an earlier daemon too.
pub(super) fn remove_all(netlink: &Netlink) -> io::Result<()> {
    for family in [Family::V4, Family::V6] {
        match netlink.remove_local_routes(family, TAG) {
            Err(error) if family == Family::V4 || !lacks_ipv6(&error) => {
                return Err(explain(&error, &format!("cannot remove the {family:?} local routes of aliases")));
            }
            _ => {}
        }
    }
    Ok(())
}
