//! A TCP proxy that spoils what passes it: slow, throttled, standing still, cut, refused.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// The largest piece that is passed on at once, in bytes.
const PIECE: usize = 16 * 1024;

/// What a proxy does to what passes it.
#[derive(Clone, Copy, Debug, Default)]
struct Conduct {
    delay: Duration,
    bytes_per_second: Option<u32>,
    stalls: bool,
    refuses: bool,
    /// Raised to break what is open.
    cuts: u64,
}

/// A proxy in front of one server. It stops, and breaks its connections, when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    conduct: watch::Sender<Conduct>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// Starts a proxy on a free port of the loopback interface that passes everything on to `target`.
    pub async fn start(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let conduct = watch::Sender::new(Conduct::default());
        let told = conduct.subscribe();
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(listener, target, told)));
        Proxy { address, conduct, _accepting: accepting }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A URL with its host and port replaced by the proxy's.
    pub fn in_place_of(&self, url: &str) -> String {
        let mut url: reqwest::Url = url.parse().expect("a URL");
        url.set_ip_host(self.address.ip()).expect("a URL with a host");
        url.set_port(Some(self.address.port())).expect("a URL with a port");
        url.to_string().trim_end_matches('/').to_owned()
    }

    /// Holds each piece back for so long, in either direction.
    pub fn delay(&self, delay: Duration) {
        self.conduct.send_modify(|conduct| conduct.delay = delay);
    }

    /// Lets no more than so many bytes a second through each connection, in either direction.
    pub fn throttle(&self, bytes_per_second: u32) {
        self.conduct.send_modify(|conduct| conduct.bytes_per_second = Some(bytes_per_second));
    }

    /// Lets nothing through. Connections stay open and new ones are taken, as by a network that swallows packets.
    pub fn stall(&self) {
        self.conduct.send_modify(|conduct| conduct.stalls = true);
    }

    /// Resets the connections that are open. New ones are taken.
    pub fn cut(&self) {
        self.conduct.send_modify(|conduct| conduct.cuts += 1);
    }

    /// Resets the connections that are open, and each new one.
    pub fn refuse(&self) {
        self.conduct.send_modify(|conduct| {
            conduct.refuses = true;
            conduct.cuts += 1;
        });
    }

    /// Spoils nothing any more.
    pub fn restore(&self) {
        self.conduct.send_modify(|conduct| *conduct = Conduct { cuts: conduct.cuts, ..Conduct::default() });
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, conduct: watch::Receiver<Conduct>) {
    // The connections go with the proxy.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                if conduct.borrow().refuses {
                    let _ = client.set_zero_linger();
                } else {
                    connections.spawn(pass(client, target, conduct.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Passes on what either side says, until both are done or the connection is cut.
async fn pass(mut client: TcpStream, target: SocketAddr, conduct: watch::Receiver<Conduct>) {
    let Ok(mut server) = TcpStream::connect(target).await else {
        let _ = client.set_zero_linger();
        return;
    };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let cuts = conduct.borrow().cuts;
    let mut cut = conduct.clone();
    let is_over = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let both = async {
            tokio::try_join!(
                carry(from_client, to_server, conduct.clone()),
                carry(from_server, to_client, conduct.clone())
            )
        };
        tokio::select! {
            result = both => result.is_ok(),
            _ = cut.wait_for(|conduct| conduct.cuts != cuts) => false,
        }
    };
    if !is_over {
        for stream in [&client, &server] {
            let _ = stream.set_zero_linger();
        }
    }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut conduct: watch::Receiver<Conduct>,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        // Short pieces, where they are throttled: a second's worth would come all at once.
        let rate = conduct.borrow().bytes_per_second;
        let size = rate.map_or(PIECE, |rate| (rate as usize / 20).clamp(1, PIECE));
        let read = from.read(&mut buffer[..size]).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        let delay = conduct.borrow().delay;
        tokio::time::sleep(delay).await;
        let _ = conduct.wait_for(|conduct| !conduct.stalls).await;
        to.write_all(&buffer[..read]).await?;
        let rate = conduct.borrow().bytes_per_second;
        if let Some(rate) = rate {
            tokio::time::sleep(Duration::from_secs_f64(read as f64 / f64::from(rate))).await;
        }
    }
}
