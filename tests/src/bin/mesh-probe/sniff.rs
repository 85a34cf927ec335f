//! A wiretap: counts what passes a link and looks for texts that must not be readable there.

use anyhow::{Context, Result};
use clap::Args;
use memchr::memmem::Finder;
use mesh_tests::report::Capture;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Kernel queue in bytes: a burst must not be lost while this program is not scheduled.
const QUEUE: usize = 128 << 20;
/// Larger than any segment before it is cut into packets (GSO).
const LARGEST: usize = 512 << 10;
const PAUSE: Duration = Duration::from_millis(100);
const ETHERNET_HEADER: usize = 14;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// The link to watch.
    #[arg(long)]
    device: String,
    /// A text to look for in every packet; may be repeated.
    #[arg(long)]
    marker: Vec<String>,
}

/// Watches until SIGTERM or the end of input, then until the queue is empty.
pub(crate) fn run(options: &Options) -> (bool, String) {
    match watch(options) {
        Ok(capture) => (true, serde_json::to_string(&capture).expect("a report is plain data")),
        Err(error) => (false, format!("{error:#}")),
    }
}

fn watch(options: &Options) -> Result<Capture> {
    let socket = open(&options.device).with_context(|| format!("cannot watch {}", options.device))?;
    let finders: Vec<_> = options.marker.iter().map(|marker| (marker, Finder::new(marker))).collect();
    let mut capture = Capture::default();
    for marker in &options.marker {
        capture.markers.insert(marker.clone(), 0);
    }
    let stop = AtomicBool::new(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| receive(&socket, &stop, &finders, &mut capture));
        let stopped = runtime.block_on(wait_for_end());
        stop.store(true, Ordering::Relaxed);
        watching.join().expect("the wiretap does not panic")?;
        stopped
    })?;
    capture.lost = lost(&socket)?;
    Ok(capture)
}

fn open(device: &str) -> Result<Socket> {
    let every_protocol = i32::from(u16::try_from(libc::ETH_P_ALL)?.to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(every_protocol)))?;
    set_socket_recv_buffer_size_force(&socket, QUEUE)?;
    socket.set_read_timeout(Some(PAUSE))?;
    let probe = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let index = rustix::net::netdevice::name_to_index(&probe, device)?;
    // SAFETY: `sockaddr_ll` is plain data that fits the storage; the length is its size.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = &mut *storage.cast::<libc::sockaddr_ll>();
            link.sll_family = libc::AF_PACKET.cast_unsigned() as libc::sa_family_t;
            link.sll_protocol = (libc::ETH_P_ALL.cast_unsigned() as u16).to_be();
            link.sll_ifindex = index.cast_signed();
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    socket.bind(&address)?;
    Ok(socket)
}

async fn wait_for_end() -> Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    // From here on everything is seen and SIGTERM is understood.
    eprintln!("watching");
    let (sender, input) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let ended = io::stdin().read_to_end(&mut Vec::new());
        // After SIGTERM nobody waits for the input any more.
        let _ = sender.send(ended);
    });
    tokio::select! {
        _ = terminate.recv() => {}
        _ = input => {}
    }
    Ok(())
}

fn receive(
    mut socket: &Socket,
    stop: &AtomicBool,
    finders: &[(&String, Finder<'_>)],
    capture: &mut Capture,
) -> io::Result<()> {
    let mut buffer = vec![0; LARGEST];
    loop {
        let count = match socket.read(&mut buffer) {
            Ok(count) => count,
            // The queue is empty.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let packet = &buffer[..count];
        capture.packets += 1;
        capture.bytes += count as u64;
        if let Some(port) = port(packet) {
            let traffic = capture.by_port.entry(port).or_default();
            traffic.packets += 1;
            traffic.bytes += count as u64;
        }
        for (marker, finder) in finders {
            let found = finder.find_iter(packet).count() as u64;
            if found > 0 {
                *capture.markers.entry((*marker).clone()).or_default() += found;
            }
        }
    }
}

/// `tcp/<port>` or `udp/<port>`, with the lower port: the server's, as a rule. `None` for everything else.
fn port(packet: &[u8]) -> Option<String> {
    let network = packet.get(ETHERNET_HEADER..)?;
    let (protocol, transport) = match packet.get(12..ETHERNET_HEADER)? {
        [0x08, 0x00] => (*network.get(9)?, network.get(usize::from(network.first()? & 0x0f) * 4..)?),
        [0x86, 0xdd] => (*network.get(6)?, network.get(40..)?),
        _ => return None,
    };
    let name = match protocol {
        6 => "tcp",
        17 => "udp",
        _ => return None,
    };
    let ports = [[*transport.first()?, *transport.get(1)?], [*transport.get(2)?, *transport.get(3)?]];
    let lower = ports.map(u16::from_be_bytes).into_iter().min()?;
    Some(format!("{name}/{lower}"))
}

/// How many packets did not fit the queue.
fn lost(socket: &Socket) -> Result<u64> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut size = libc::socklen_t::try_from(size_of_val(&statistics))?;
    // SAFETY: the descriptor is open, and the kernel writes `size` bytes into `statistics`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            std::ptr::from_mut(&mut statistics).cast(),
            &raw mut size,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error()).context("the kernel does not tell how many packets were lost");
    }
    Ok(statistics.tp_drops.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(kind: [u8; 2], network: &[u8]) -> Vec<u8> {
        [&[0; 12][..], &kind, network].concat()
    }

    #[test]
    fn the_lower_port_names_the_traffic_of_both_families() {
        let ports = [0x1f, 0x90, 0x00, 0x50];
        let v4 = [&[0x45, 0, 0, 0, 0, 0, 0, 0, 0, 6][..], &[0; 10], &ports].concat();
        let v6 = [&[0x60, 0, 0, 0, 0, 0, 17][..], &[0; 33], &ports].concat();
        assert_eq!(port(&ethernet([8, 0], &v4)).as_deref(), Some("tcp/80"));
        assert_eq!(port(&ethernet([0x86, 0xdd], &v6)).as_deref(), Some("udp/80"));
    }

    #[test]
    fn what_is_cut_short_or_of_another_protocol_has_no_port() {
        assert_eq!(port(&[]), None);
        assert_eq!(port(&ethernet([8, 6], &[0; 28])), None);
        assert_eq!(port(&ethernet([8, 0], &[0x45, 0, 0, 0, 0, 0, 0, 0, 0, 6])), None);
    }
}
