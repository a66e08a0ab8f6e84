//! Clients that are slow, broken, gone or too many, and the end of the server.

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::fixtures::Fixture;
use super::{Server, is_well, json, read_all, request};

/// A window that no test sees the end of: what waits for it is in the queue for certain.
const FOREVER: &str = "3600000";

#[test]
fn what_is_no_http_closes_its_connection_only() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    let long = format!("GET / HTTP/1.1\r\n{}", "x: y\r\n".repeat(100_000));
    for garbage in [
        "\x16\x03\x01 hello",
        "GET\r\n\r\n",
        "POST /embed HTTP/9\r\n\r\n",
        &long,
    ] {
        let mut stream = server.connect();
        // The server may close before all is written.
        let _ = stream.write_all(garbage.as_bytes());
        let answer = read_all(&mut stream);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
    }
    let chunked = "POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n\
                   transfer-encoding: chunked\r\n\r\nzz\r\n";
    let mut stream = server.connect();
    stream.write_all(chunked.as_bytes()).unwrap();
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 4"));
    is_well(&server);
}

#[test]
fn a_head_that_does_not_end_is_given_up() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &["--max-concurrent-requests", "8"]);
    let mut slow: Vec<_> = (0..8).map(|_| server.connect()).collect();
    for stream in &mut slow {
        stream
            .write_all(b"POST /embed HTTP/1.1\r\nhost: a\r\n")
            .unwrap();
    }
    // Others are served meanwhile.
    is_well(&server);
    let answer = read_all(&mut slow[0]);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
        "{answer}"
    );
}

#[test]
fn clients_that_take_every_connection_and_send_nothing_are_given_up() {
    let fixture = Fixture::new();
    // Two connections for each request.
    let server = Server::start(&fixture, &["--max-concurrent-requests", "3"]);
    let whole = request();
    let slow: Vec<_> = (0..6)
        .map(|client| {
            let mut stream = server.connect();
            // Nothing, half a head, or most of a body.
            let sent = [0, 20, whole.len() - 1][client % 3];
            stream.write_all(&whole.as_bytes()[..sent]).unwrap();
            stream
        })
        .collect();
    is_well(&server);
    for mut stream in slow {
        let answer = read_all(&mut stream);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
            "{answer}"
        );
    }
    is_well(&server);
}

#[test]
fn a_body_that_does_not_end_is_given_up() {
    let fixture = Fixture::new();
    let options = ["--request-timeout", "5", "--max-concurrent-requests", "1"];
    let server = Server::start(&fixture, &options);
    let mut stream = server.connect();
    let whole = request();
    stream
        .write_all(&whole.as_bytes()[..whole.len() - 1])
        .unwrap();
    // It takes no part yet, and others are served.
    is_well(&server);
    let answer = read_all(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("did not come within 5 s"), "{answer}");
    is_well(&server);
}

#[test]
fn an_answer_that_is_not_read_is_given_up() {
    let fixture = Fixture::new();
    let options = [
        "--max-client-batch-size",
        "60000",
        "--max-concurrent-requests",
        "1",
    ];
    let server = Server::start(&fixture, &options);
    // Some 20 MB of answer, more than the system buffers, of a single sequence.
    let body = json!({"inputs": vec!["a"; 60_000]}).to_string();
    let mut stream = server.connect();
    let head = format!(
        "POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    server.wait_for_metric("te_request_duration_count", 1.0);
    // As long as a well-meaning client may be thinking.
    std::thread::sleep(Duration::from_secs(1));
    let (status, _) = server.refused("/embed", &json!({"inputs": "a"}));
    assert_eq!(status, 429);
    let start = Instant::now();
    while server.post("/embed", &json!({"inputs": "a"})).status() != 200 {
        assert!(
            start.elapsed() < super::DEADLINE,
            "the answer keeps its room"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(stream);
}

#[test]
fn clients_that_leave_take_their_texts_out_of_the_queue() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &["--batch-window", FOREVER]);
    let mut aborted = server.connect();
    aborted.write_all(request().as_bytes()).unwrap();
    let mut half_closed = server.connect();
    half_closed
        .write_all(request().replace("\"a\"", "\"b\"").as_bytes())
        .unwrap();
    server.wait_for_metric("te_queue_size", 2.0);
    drop(aborted);
    server.wait_for_metric("te_queue_size", 1.0);
    half_closed.shutdown(Shutdown::Write).unwrap();
    server.wait_for_metric("te_queue_size", 0.0);
    assert_eq!(server.metric("te_batch_next_size_count"), 0.0);
}

#[test]
fn too_many_requests_are_told_so_at_once() {
    let fixture = Fixture::new();
    let options = ["--batch-window", FOREVER, "--max-concurrent-requests", "2"];
    let server = Server::start(&fixture, &options);
    let mut waiting: Vec<_> = (0..2).map(|_| server.connect()).collect();
    for stream in &mut waiting {
        stream.write_all(request().as_bytes()).unwrap();
    }
    server.wait_for_metric("te_queue_size", 2.0);
    let mut refused = server.post("/embed", &json!({"inputs": "a"}));
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(json(&mut refused)["error_type"], "Overloaded");
    waiting.clear();
    server.wait_for_metric("te_queue_size", 0.0);
    let (status, _) = server.refused("/embed", &json!({"inputs": []}));
    assert_eq!(status, 400);
}

#[test]
fn a_text_that_waits_too_long_is_answered_and_forgotten() {
    let fixture = Fixture::new();
    let options = ["--batch-window", FOREVER, "--request-timeout", "1"];
    let mut by_environment = fixture.command(&["serve", "-m", "model", "--port", "0"]);
    by_environment.env("RADIX_MLP_BATCH_WINDOW", FOREVER);
    by_environment.env("RADIX_MLP_REQUEST_TIMEOUT", "1");
    for server in [
        Server::start(&fixture, &options),
        Server::spawn(by_environment),
    ] {
        let mut response = server.post("/embed", &json!({"inputs": "a"}));
        assert_eq!(response.status(), 504);
        assert_eq!(json(&mut response)["error_type"], "Overloaded");
        assert_eq!(server.metric("te_queue_size"), 0.0);
    }
}

#[test]
fn a_signal_ends_the_server_when_all_is_answered() {
    let fixture = Fixture::new();
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(&fixture, &["--batch-window", "1000"]);
        let mut waiting = server.connect();
        waiting.write_all(request().as_bytes()).unwrap();
        server.wait_for_metric("te_queue_size", 1.0);
        server.signal(signal);
        assert!(read_all(&mut waiting).starts_with("HTTP/1.1 200"));
        assert_eq!(server.wait().code(), Some(0));
    }
}

#[test]
fn a_second_signal_ends_the_server_at_once() {
    let fixture = Fixture::new();
    let mut server = Server::start(&fixture, &["--batch-window", FOREVER]);
    let mut waiting = server.connect();
    waiting.write_all(request().as_bytes()).unwrap();
    server.wait_for_metric("te_queue_size", 1.0);
    server.signal("TERM");
    // Until the first is taken, the system counts two as one.
    let start = Instant::now();
    while std::net::TcpStream::connect(server.address()).is_ok() {
        assert!(start.elapsed() < super::DEADLINE);
        std::thread::sleep(Duration::from_millis(5));
    }
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(130));
}

/// Release builds cannot be told to panic.
#[test]
#[cfg(debug_assertions)]
fn a_batch_that_panics_is_answered_and_the_server_goes_on() {
    let fixture = Fixture::new();
    let mut command = fixture.command(&["serve", "-m", "model", "--port", "0"]);
    command.env("RADIX_MLP_TEST_PANIC_TOKEN", "7");
    let server = Server::spawn(command);
    for _ in 0..3 {
        let (status, error) = server.refused("/embed", &json!({"inputs": [5, 7]}));
        let panicked = json!({"error": "the model panicked", "error_type": "Backend"});
        assert_eq!((status, error), (424, panicked));
        is_well(&server);
    }
    server.get("/health");
}
