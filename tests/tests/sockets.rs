//! The sockets of a pod's network namespace, as the daemon lists and ends them.

use anyhow::{Context, Result, ensure};
use mesh_tests::wait;
use mesh_tests::world::{Pod, World};
use mesh_userspace::netns::{Namespaces, SocketTable, Tcp, TcpState};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

fn world() -> Result<World> {
    World::named("sockets").node("n1").pods(&["a", "b"]).build()
}

async fn table(pod: &Pod) -> Result<SocketTable> {
    let namespaces = Namespaces::spawn()?;
    let namespace = namespaces.open(pod.namespace().path()).await?;
    Ok(namespaces.sockets(&namespace).await?)
}

fn find(table: &SocketTable, local: SocketAddr, remote: SocketAddr) -> Result<Tcp> {
    let all = table.list()?;
    let found = all.iter().find(|tcp| (tcp.local, tcp.remote) == (local, remote)).cloned();
    found.with_context(|| format!("no {local} - {remote} in {all:#?}"))
}

/// A connection from `b` to `a`: the client's end, the server's end, and where the server listens.
fn connection(world: &World, address: IpAddr) -> Result<(TcpStream, TcpStream, SocketAddr)> {
    let (a, b) = (world.pod("a").namespace(), world.pod("b").namespace());
    // One listener for both families, as many servers have.
    let listener = a.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
    let destination = SocketAddr::new(address, listener.local_addr()?.port());
    let client = b.enter(|| TcpStream::connect(destination))??;
    let (server, _) = listener.accept()?;
    Ok((client, server, destination))
}

#[tokio::test]
async fn each_end_knows_who_dialled() -> Result<()> {
    let world = world()?;
    let (a, b) = (table(world.pod("a")).await?, table(world.pod("b")).await?);
    for address in world.pod("a").addresses() {
        let (mut client, mut server, there) = connection(&world, address)?;
        let here = client.local_addr()?;
        let check = |what: &str| -> Result<()> {
            for (table, local, remote, dialled) in [(&b, here, there, true), (&a, there, here, false)] {
                // While an acknowledgement is on its way the kernel's numbers do not add up yet.
                wait::until(&format!("{what}: {local} dialled: {dialled}"), wait::BOUND, || {
                    let found = find(table, local, remote).ok()?;
                    (found.state == TcpState::Open && found.dialled == Some(dialled)).then_some(())
                })?;
            }
            Ok(())
        };
        check("nothing was sent")?;
        for length in [1, 100_000] {
            client.write_all(&vec![1; length])?;
            server.read_exact(&mut vec![0; length])?;
            server.write_all(&vec![2; length / 2])?;
            client.read_exact(&mut vec![0; length / 2])?;
            check("both have sent")?;
        }
        // More than the client takes: it stays queued at the server, sent and not sent.
        server.set_nonblocking(true)?;
        while server.write(&[3; 65_536]).is_ok() {}
        check("the server has queued")?;
        client.shutdown(std::net::Shutdown::Write)?;
        let found = find(&a, there, here)?;
        ensure!(found.state == TcpState::Open, "half-closed is open: {found:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_listener_is_told_from_connections_and_from_other_namespaces() -> Result<()> {
    let world = world()?;
    let (a, b) = (table(world.pod("a")).await?, table(world.pod("b")).await?);
    let listener = world.pod("a").namespace().enter(|| TcpListener::bind((world.pod("a").v4(), 0)))??;
    let own = listener.local_addr()?;
    let listening = |table: &SocketTable| -> Result<bool> {
        Ok(table.list()?.iter().any(|tcp| tcp.state == TcpState::Listening && tcp.local == own))
    };
    ensure!(listening(&a)? && !listening(&b)?);
    drop(listener);
    wait::until("the listener goes", wait::BOUND, || (!listening(&a).ok()?).then_some(()))
}

#[tokio::test]
async fn a_destroyed_connection_ends_for_both_and_no_other_does() -> Result<()> {
    let world = world()?;
    let a = table(world.pod("a")).await?;
    for address in world.pod("a").addresses() {
        let (mut client, mut server, there) = connection(&world, address)?;
        let (mut other, mut others, _) = connection(&world, address)?;
        let found = find(&a, there, client.local_addr()?)?;
        ensure!(a.destroy(&found)?, "it was there");
        assert_eq!(server.read(&mut [0]).expect_err("the server's end").kind(), ErrorKind::ConnectionAborted);
        assert_eq!(client.read(&mut [0]).expect_err("the client's end").kind(), ErrorKind::ConnectionReset);
        ensure!(!a.destroy(&found)?, "it was gone");
        other.write_all(b"x")?;
        others.read_exact(&mut [0])?;
    }
    Ok(())
}

#[tokio::test]
async fn a_thousand_sockets_are_listed() -> Result<()> {
    let world = world()?;
    let a = table(world.pod("a")).await?;
    let address = world.pod("a").v4();
    let listener = world.pod("a").namespace().enter(|| TcpListener::bind((address, 0)))??;
    let own = listener.local_addr()?;
    let mut open = Vec::new();
    for _ in 0..1_000 {
        let client = world.pod("b").namespace().enter(|| TcpStream::connect(own))??;
        open.push((client, listener.accept()?.0));
    }
    let found = a.list()?.iter().filter(|tcp| tcp.state == TcpState::Open && tcp.local == own).count();
    assert_eq!(found, open.len());
    Ok(())
}
