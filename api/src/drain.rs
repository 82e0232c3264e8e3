//! Reads on what a handler left of a request's body. A connection that is closed on unread input is reset,
//! and an answer that was on its way, such as a 413 or a 401, is lost with it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Error;
use axum::body::{Body, BodyDataStream, HttpBody};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::header::EXPECT;
use tokio::sync::oneshot;

/// Bytes that are read on. Who sends more is cut off.
const MAX_BYTES: usize = 8 * 1024 * 1024;
/// How long reading on may take.
const MAX_TIME: Duration = Duration::from_secs(2);

/// Lends the body to the handler, and reads what is left of it before the answer goes out.
pub async fn rest_of_body(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    // Who asks first (`100-continue`) sends nothing that nobody reads.
    let asks_first = request.headers().contains_key(EXPECT);
    let (parts, body) = request.into_parts();
    let (give_back, mut given_back) = oneshot::channel();
    let lent = Lent { body: Some(body.into_data_stream()), is_read: !asks_first, give_back: Some(give_back) };
    let response = next.run(Request::from_parts(parts, Body::from_stream(lent))).await;
    if let Ok(mut body) = given_back.try_recv() {
        let read_on = async {
            let mut left = MAX_BYTES;
            while let Some(Ok(chunk)) = body.next().await {
                let Some(rest) = left.checked_sub(chunk.len()) else { break };
                left = rest;
            }
        };
        // What can't be read in time stays unread.
        let _ = tokio::time::timeout(MAX_TIME, read_on).await;
    }
    response
}

/// A body that is given back when it is dropped.
struct Lent {
    body: Option<BodyDataStream>,
    is_read: bool,
    give_back: Option<oneshot::Sender<BodyDataStream>>,
}

impl Stream for Lent {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.is_read = true;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_next(context),
            None => Poll::Ready(None),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(body), Some(give_back), true) = (self.body.take(), self.give_back.take(), self.is_read) {
            // Nobody waits for it where the handler was dropped with its request.
            let _ = give_back.send(body);
        }
    }
}
