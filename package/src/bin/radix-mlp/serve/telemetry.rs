//! What /metrics shows, under the names of text-embeddings-inference where it has the same.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use radix_mlp::Batch;

/// Upper bounds of the durations' buckets, in seconds: 1 ms to 1 min, about three a decade.
const SECONDS: [f64; 15] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0,
];
const SIZES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0];
const TOKENS: [f64; 9] = [
    16.0, 64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0,
];

/// Starts to record; what the handle renders is the answer of /metrics.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let suffix = |text: &str| Matcher::Suffix(text.to_owned());
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(suffix("_duration"), &SECONDS)?
        .set_buckets_for_metric(suffix("_size"), &SIZES)?
        .set_buckets_for_metric(suffix("_tokens"), &TOKENS)?
        .install_recorder()?;
    describe_counter!("te_request_count", "Requests, by route");
    describe_counter!(
        "te_request_failure",
        "Requests answered with an error, by status"
    );
    describe_histogram!("te_request_duration", "Seconds from request to answer");
    describe_histogram!(
        "te_request_tokenization_duration",
        "Seconds to make tokens of a request"
    );
    describe_histogram!("te_request_queue_duration", "Seconds that a request waited");
    describe_histogram!(
        "te_request_inference_duration",
        "Seconds that a request's batch took"
    );
    describe_gauge!("te_queue_size", "Sequences that wait");
    describe_histogram!("te_batch_next_size", "Sequences in a batch");
    describe_histogram!("te_batch_next_tokens", "Tokens in a batch, shared or not");
    describe_histogram!(
        "radix_mlp_forward_tokens",
        "Tokens that go through the model at once, those that are shared once where it folds"
    );
    describe_counter!("radix_mlp_tokens", "Tokens asked for");
    describe_counter!(
        "radix_mlp_computed_tokens",
        "Tokens computed, those that are shared once"
    );
    Ok(handle)
}

pub fn queue_length(sequences: usize) {
    gauge!("te_queue_size").set(sequences as f64);
}

pub fn batch(batch: &Batch, folded: bool) {
    let sequences: usize = batch.sequences.iter().map(|s| s.tickets.len()).sum();
    let different = batch.sequences.iter().map(|s| s.tokens.len()).sum();
    let computed = if folded {
        batch.unique_tokens
    } else {
        different
    };
    histogram!("te_batch_next_size").record(sequences as f64);
    histogram!("te_batch_next_tokens").record(batch.tokens as f64);
    counter!("radix_mlp_tokens").increment(batch.tokens as u64);
    counter!("radix_mlp_computed_tokens").increment(computed as u64);
    tracing::debug!(sequences, tokens = batch.tokens, computed, "batch");
}

pub fn pass(tokens: usize) {
    histogram!("radix_mlp_forward_tokens").record(tokens as f64);
}

pub fn request(route: &'static str) {
    counter!("te_request_count", "method" => route).increment(1);
}

pub fn failure(status: u16) {
    counter!("te_request_failure", "err" => status.to_string()).increment(1);
}

pub fn answered(total: Duration, tokenization: Duration, queue: Duration, inference: Duration) {
    histogram!("te_request_duration").record(total);
    histogram!("te_request_tokenization_duration").record(tokenization);
    histogram!("te_request_queue_duration").record(queue);
    histogram!("te_request_inference_duration").record(inference);
}
