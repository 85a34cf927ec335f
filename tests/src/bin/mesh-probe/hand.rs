//! Sockets in other hands than those that made them: passed to another process, or carried along to another control
//! group.

use crate::ConnectOptions;
use crate::exchange::read_greeting;
use crate::server::canonical;
use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use mesh_tests::report::Call;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Hand {
    /// Make a socket for a destination and give it to whoever takes at a path.
    Give {
        #[arg(long)]
        at: PathBuf,
        destination: SocketAddr,
    },
    /// Wait at a path for a socket, connect it, send a message, expect it back.
    Take {
        #[arg(long)]
        at: PathBuf,
        #[command(flatten)]
        options: ConnectOptions,
    },
    /// Make a socket, wait for the end of input, connect it, send a message, expect it back.
    Keep {
        #[command(flatten)]
        options: ConnectOptions,
    },
}

pub(crate) fn run(hand: &Hand, call: &mut Call) -> Result<()> {
    match hand {
        Hand::Give { at, destination } => give(&UnixStream::connect(at).context("nobody takes")?, *destination),
        Hand::Take { at, options } => {
            let listener = UnixListener::bind(at).with_context(|| format!("cannot wait at {}", at.display()))?;
            eprintln!("waiting");
            let (giver, _) = listener.accept()?;
            giver.set_read_timeout(Some(options.timeout()))?;
            exchange(take(&giver)?, options, call)
        }
        Hand::Keep { options } => {
            let socket = make(options.destination)?;
            eprintln!("made");
            io::stdin().read_to_end(&mut Vec::new()).context("standard input")?;
            exchange(socket, options, call)
        }
    }
}

fn make(destination: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(destination), Type::STREAM, Some(Protocol::TCP))
}

fn give(taker: &UnixStream, destination: SocketAddr) -> Result<()> {
    let socket = make(destination)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)), "no room for a descriptor");
    sendmsg(taker, &[IoSlice::new(b"s")], &mut ancillary, SendFlags::empty()).context("give")?;
    Ok(())
}

fn take(giver: &UnixStream) -> Result<Socket> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(giver, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::empty()).context("take")?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            let descriptor: OwnedFd = descriptors.next().context("no descriptor came")?;
            return Ok(descriptor.into());
        }
    }
    bail!("no descriptor came")
}

fn exchange(socket: Socket, options: &ConnectOptions, call: &mut Call) -> Result<()> {
    socket.connect_timeout(&options.destination.into(), options.timeout()).context("connect")?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(options.timeout()))?;
    call.getpeername = Some(canonical(stream.peer_addr().context("getpeername")?));
    if options.greet {
        call.greeting = Some(read_greeting(&mut stream).context("the greeting")?);
    }
    let message = options.message.as_bytes();
    stream.write_all(message).context("write")?;
    call.bytes_sent = message.len() as u64;
    stream.shutdown(Shutdown::Write).context("shutdown")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("read")?;
    call.bytes_received = answer.len() as u64;
    ensure!(answer == message, "the answer differs from the message");
    Ok(())
}
