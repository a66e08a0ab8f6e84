//! Many clients at once, some of which leave, and the end of the server amid them.

use std::io::Write;

use radix_mlp::qwen3::Pooling;
use serde_json::json;

use super::super::fixtures::{Fixture, assert_close, embed_alone, tokens};
use super::{Server, is_well, read_all, request, vectors};

#[test]
fn everyone_is_answered_while_others_leave() {
    let fixture = Fixture::new();
    let (server, model) = (
        Server::start(&fixture, &["--max-batch-tokens", "100"]),
        fixture.model(),
    );
    let whole = request();
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (server, model) = (&server, &model);
            scope.spawn(move || {
                for round in 0..20 {
                    let text = format!("{round} of client {client}");
                    let found = vectors(&server.ok("/embed", &json!({"inputs": [text, "a"]})));
                    let alone = embed_alone(model, &tokens(&text), Pooling::LastToken);
                    assert_close(&found[0], &alone);
                }
            });
        }
        for client in 0..8 {
            let (server, whole) = (&server, &whole);
            scope.spawn(move || {
                for round in 0..20 {
                    let mut stream = server.connect();
                    // Some leave before they have asked, the others before they are answered.
                    let sent = whole.len() - (client + round) % 3;
                    stream.write_all(&whole.as_bytes()[..sent]).unwrap();
                }
            });
        }
    });
    server.wait_for_metric("te_queue_size", 0.0);
    is_well(&server);
}

#[test]
fn a_signal_amid_many_requests_leaves_none_without_an_answer() {
    let fixture = Fixture::new();
    let options = ["--batch-window", "1000", "--request-timeout", "20"];
    let mut server = Server::start(&fixture, &options);
    let whole = request();
    let connect = |sent: usize| {
        let mut stream = server.connect();
        stream.write_all(&whole.as_bytes()[..sent]).unwrap();
        stream
    };
    let asked: Vec<_> = (0..30).map(|_| connect(whole.len())).collect();
    let mut ends: Vec<_> = (0..5).map(|_| connect(whole.len() - 1)).collect();
    let hangs: Vec<_> = (0..5).map(|_| connect(whole.len() - 1)).collect();
    server.wait_for_metric("te_queue_size", 30.0);
    server.wait_for_metric(r#"te_request_count{method="embed"}"#, 40.0);
    server.signal("TERM");
    // A body that is half there when the signal comes is read to its end.
    for stream in &mut ends {
        stream
            .write_all(&whole.as_bytes()[whole.len() - 1..])
            .unwrap();
    }
    for mut stream in asked.into_iter().chain(ends) {
        assert!(read_all(&mut stream).starts_with("HTTP/1.1 200"));
    }
    for mut stream in hangs {
        assert!(read_all(&mut stream).starts_with("HTTP/1.1 408"));
    }
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
#[cfg(target_os = "linux")]
fn a_long_query_is_looked_at_before_its_pairs_are_made() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    is_well(&server);
    let before = peak_memory(&server);
    let mut body = json!({"query": "q".repeat(1_900_000), "texts": vec!["a"; 4096]});
    let (status, error) = server.refused("/rerank", &body);
    assert_eq!((status, &error["error_type"]), (422, &json!("Validation")));
    body["truncate"] = json!(true);
    let (status, error) = server.refused("/rerank", &body);
    assert_eq!((status, &error["error_type"]), (413, &json!("Validation")));
    let after = peak_memory(&server);
    // The query is tokenized once, in some 300 MiB; its pairs as text would take 7.8 GB.
    assert!(after < before + 600, "{before} MiB grew to {after} MiB");
    is_well(&server);
}

/// Most memory that the process has had, in MiB.
fn peak_memory(server: &Server) -> usize {
    let path = format!("/proc/{}/status", server.process.id());
    let status = std::fs::read_to_string(path).unwrap();
    let mut lines = status.lines();
    let peak = lines.find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim()
        .trim_end_matches(" kB")
        .parse::<usize>()
        .unwrap()
        / 1024
}

#[test]
#[cfg(target_os = "linux")]
fn memory_stays_bounded_under_load() {
    let fixture = Fixture::new();
    let options = [
        "--max-concurrent-requests",
        "4",
        "--max-batch-tokens",
        "1024",
    ];
    let server = Server::start(&fixture, &options);
    is_well(&server);
    let before = peak_memory(&server);
    // 64 clients, half of them with bodies of 1.9 MB; four of them are let in at a time.
    let huge = json!({"inputs": "x".repeat(1_900_000)});
    let many = json!({"inputs": vec!["y"; 4096]});
    let answered = std::thread::scope(|scope| {
        let clients = (0..64).map(|client| {
            let body = if client % 2 == 0 { &huge } else { &many };
            let server = &server;
            scope.spawn(move || server.post("/embed", body).status().as_u16())
        });
        let clients: Vec<_> = clients.collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert_eq!(answered.len(), 64);
    assert!(
        answered
            .iter()
            .all(|status| [200, 422, 429].contains(status)),
        "{answered:?}"
    );
    let after = peak_memory(&server);
    // One body of 1.9 MB is tokenized at a time, in some 300 MiB; four would take 1.1 GiB. All may
    // be on their way in, twice while they grow: another 240 MiB.
    assert!(after < before + 800, "{before} MiB grew to {after} MiB");
    is_well(&server);
}
