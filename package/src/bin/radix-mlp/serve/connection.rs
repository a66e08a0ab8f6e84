//! Connections that are slow, silent or too many, and the end of them all.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;

/// How long a client may take for a request's head, between two of its reads of an answer, and to
/// send what is refused.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What the server does to be left alone.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// How long to wait for answers in progress when the server ends.
    pub drain: Duration,
}

/// Serves connections until `stop` is ready, then answers what was asked, and returns.
///
/// A client that closes its side of a connection is taken to be gone, whether it still reads or not:
/// what it asked for leaves the queue.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: impl Future) {
    let room = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let (permit, stream) = tokio::select! {
            accepted = accept(&listener, &room) => accepted,
            _ = &mut stop => break,
        };
        let connection = graceful.watch(connection(stream, router.clone()));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("connection: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    tracing::info!("answering what was asked, then ending");
    let drained = tokio::time::timeout(limits.drain, graceful.shutdown()).await;
    if drained.is_err() {
        tracing::warn!("gave up on connections after {:?}", limits.drain);
    }
}

/// The next connection there is room for; without room, clients wait in the system's backlog.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> (Option<OwnedSemaphorePermit>, TcpStream) {
    // Fails only where a semaphore is closed, which this one never is.
    let permit = room.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (permit, stream),
            Err(error) => {
                // Out of file descriptors, say: connections that end make room.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn connection(
    stream: TcpStream,
    router: Router,
) -> http1::Connection<Io, TowerToHyperService<Router>> {
    // Answers are written whole, so that there is nothing to collect before sending.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("connection without TCP_NODELAY: {error}");
    }
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(PATIENCE));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(
            TokioIo::new(Box::pin(stream)),
            TowerToHyperService::new(router),
        )
}

type Io = TokioIo<Pin<Box<TimeoutStream<TcpStream>>>>;
