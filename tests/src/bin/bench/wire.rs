//! A client that costs next to nothing: one keep-alive HTTP/1.1 connection that sends requests written beforehand.
//! The generator shares the machine's cores with what it measures.

use std::io;
use std::net::SocketAddr;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The bytes of a POST with a JSON body.
pub fn post(path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         {headers}\r\n{body}"
    )
    .into_bytes()
}

/// One connection.
pub struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
}

/// An answer.
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// Nothing listens there.
    pub async fn open(address: SocketAddr) -> io::Result<Connection> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, buffer: BytesMut::with_capacity(8 * 1024) })
    }

    /// Sends a request and reads its answer, which must say its length.
    ///
    /// # Errors
    /// The connection broke, or the answer is not understood.
    pub async fn exchange(&mut self, request: &[u8]) -> io::Result<Answer> {
        self.stream.write_all(request).await?;
        let (status, head, length) = loop {
            if let Some(head) = self.read_head()? {
                break head;
            }
            self.fill().await?;
        };
        while self.buffer.len() < head + length {
            self.fill().await?;
        }
        self.buffer.advance(head);
        let body = self.buffer.split_to(length);
        Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
    }

    /// The status, and the lengths of head and body, once the head is whole.
    fn read_head(&self) -> io::Result<Option<(u16, usize, usize)>> {
        let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
        let head = String::from_utf8_lossy(&self.buffer[..end]);
        let status = head.get(9..12).and_then(|status| status.parse().ok());
        let fields = head.lines().filter_map(|line| line.split_once(':'));
        let length = fields.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length = length.filter_map(|(_, value)| value.trim().parse().ok()).next();
        match (status, length) {
            (Some(status), Some(length)) => Ok(Some((status, end + 4, length))),
            _ => Err(io::Error::other(format!("no answer that says its length: {head}"))),
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}
