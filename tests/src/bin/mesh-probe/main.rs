//! The testbed's own client, server, load generator and wiretap: everything about a connection that curl does not
//! show. Prints one JSON document.

mod attack;
mod churn;
mod connect;
mod exchange;
mod grpc;
mod hand;
mod hold;
mod http3;
mod load;
mod many;
mod packet;
mod pattern;
mod resolve;
mod server;
mod sniff;
mod stall;
mod udp;
mod uring;
mod web;

use clap::{Args, Parser, ValueEnum};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Debug, Parser)]
#[command(about)]
enum Probe {
    /// Serve until killed; print one line a connection: how the server sees it.
    Echo(server::Options),
    /// Connect once in a given way, send a message, expect it back.
    Call {
        way: connect::Way,
        #[command(flatten)]
        options: ConnectOptions,
    },
    /// Move bytes in writes of random sizes and hash both directions.
    Transfer {
        #[command(flatten)]
        options: ConnectOptions,
        #[arg(long)]
        bytes: u64,
        /// What the server does: `echo` them, `sink` them and tell their hash, or be the `source`.
        #[arg(long, default_value = "echo")]
        server: exchange::Direction,
        /// Read nothing before the end of input; say so on stderr.
        #[arg(long)]
        asleep: bool,
    },
    /// Finish one direction first, then move bytes in the other.
    HalfClose {
        #[command(flatten)]
        options: ConnectOptions,
        #[arg(long)]
        first: exchange::Side,
        #[arg(long, default_value_t = 1 << 20)]
        bytes: u64,
    },
    /// Reset the connection, or expect the server to.
    Reset {
        #[command(flatten)]
        options: ConnectOptions,
        #[arg(long)]
        by: exchange::Side,
    },
    /// Write until nobody takes any more for a while; tell how much was taken.
    Stall(stall::Options),
    /// Make many short connections, each with its own message.
    Many(many::ManyOptions),
    /// Make new connections all the time, at a rate or one after the other.
    Churn(churn::Options),
    /// Serve HTTP, `/health` included, until killed.
    Web(web::Options),
    /// Make a socket here and connect it elsewhere.
    #[command(subcommand)]
    Hand(hand::Hand),
    /// Keep connections open, idle or chattering, until the end of input.
    Hold(hold::Options),
    /// Requests and responses on a few connections; latency percentiles.
    Load(load::Options),
    /// Do what no honest client does.
    #[command(subcommand)]
    Attack(attack::Attack),
    /// Ask a DNS server for a name's addresses.
    Resolve(resolve::Options),
    /// Datagrams.
    #[command(subcommand)]
    Udp(udp::Udp),
    /// HTTP/3.
    #[command(subcommand)]
    Http3(http3::Http3),
    /// gRPC with the standard health service.
    #[command(subcommand)]
    Grpc(grpc::Grpc),
    /// Watch a link and search it for plaintext, until SIGTERM or the end of input.
    Sniff(sniff::Options),
}

/// How to reach the server.
#[derive(Clone, Debug, Args)]
struct ConnectOptions {
    destination: SocketAddr,
    /// Address (and port) to bind before connecting, for the ways that bind.
    #[arg(long)]
    source: Option<SocketAddr>,
    /// Link to bind to, for `bind-device`.
    #[arg(long, default_value = "eth0")]
    device: String,
    /// Expect the server to speak first.
    #[arg(long)]
    greet: bool,
    /// A text to send, to be looked for on the wire.
    #[arg(long, default_value = "nodemesh probe")]
    message: String,
    /// Bound of every read and write.
    #[arg(long, default_value_t = 10_000)]
    timeout_millis: u64,
}

impl ConnectOptions {
    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_millis)
    }

    /// The address to bind: what was asked for, else any of the destination's family.
    fn source_or_any(&self) -> SocketAddr {
        let any: IpAddr = match self.destination {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        self.source.unwrap_or_else(|| SocketAddr::new(any, 0))
    }
}

fn main() -> ExitCode {
    let (ok, report) = match Probe::parse() {
        Probe::Echo(options) => return server::serve(options),
        Probe::Udp(udp) => return udp::run(udp),
        Probe::Web(options) => return web::serve(options),
        Probe::Http3(http3) => return http3::run(http3),
        Probe::Grpc(grpc) => return grpc::run(grpc),
        Probe::Call { way, options } => exchange::report(|call| exchange::call(way, &options, call)),
        Probe::Transfer { options, bytes, server, asleep } => {
            exchange::report(|call| exchange::transfer(&options, bytes, server, asleep, call))
        }
        Probe::HalfClose { options, first, bytes } => {
            exchange::report(|call| exchange::half_close(&options, first, bytes, call))
        }
        Probe::Reset { options, by } => exchange::report(|call| exchange::reset(&options, by, call)),
        Probe::Stall(options) => exchange::report(|call| stall::stall(&options, call)),
        Probe::Hand(hand) => exchange::report(|call| hand::run(&hand, call)),
        Probe::Hold(options) => exchange::report(|call| hold::hold(&options, call)),
        Probe::Many(options) => exchange::report(|call| many::many(&options, call)),
        Probe::Attack(attack) => exchange::report(|call| attack::run(&attack, call)),
        Probe::Load(options) => load::run(&options),
        Probe::Churn(options) => churn::run(&options),
        Probe::Resolve(options) => resolve::run(&options),
        Probe::Sniff(options) => sniff::run(&options),
    };
    println!("{report}");
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Values of an option as clap spells them.
fn spelled(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
