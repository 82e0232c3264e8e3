//! The scripted model server by itself: answers every request, over either API, with a fixed echo, so that anything
//! that speaks to OpenAI can be pointed at it. `GET /served` shows what it counted.

use std::net::SocketAddr;

use clap::Parser;
use cloister_tests::model_server::{ModelServer, RecordedRequest, Reply};

/// A model server that speaks the OpenAI API and echoes the user.
#[derive(Parser)]
struct Arguments {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let model = ModelServer::listen(arguments.listen).await?;
    // It may run for days; the counters are what matters then.
    model.keep_last(100);
    model.always(echo);
    println!("OpenAI base URL: {}", model.url());
    tokio::signal::ctrl_c().await
}

fn echo(request: &RecordedRequest) -> Reply {
    Reply::text(format!("You said: {}", request.last_user_text())).honour_max_tokens()
}
