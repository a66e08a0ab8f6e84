use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use radix_mlp::text::reranker;
use serde::Serialize;

use super::engine::{Engine, EngineArgs};
use super::input::{Content, InputArgs};
use super::output::Destination;
use super::progress::{Progress, Totals};
use super::window::for_each_window;

/// Score passages against their query with a Qwen3-Reranker
#[derive(clap::Args)]
#[command(after_help = "\
Input, one query a line:
  {\"query\": \"…\", \"passages\": [\"…\", \"…\"]}

Output, one line for each line of input, best passage first:
  [{\"index\": 1, \"score\": 0.98}, {\"index\": 0, \"score\": 0.02}]

The score is the probability of \"yes\" against \"no\" as the model's answer to whether the passage
meets the query. Pairs of one query share their prompt, the query included: it is computed once.

Example:
  radix-mlp rerank -m Qwen3-Reranker-0.6B -i pairs.jsonl -o scores.jsonl")]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    input: InputArgs,

    /// Where the scores go, as JSON lines
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    output: PathBuf,

    /// What makes a passage a good one
    #[arg(long, value_name = "TEXT", default_value = reranker::INSTRUCTION)]
    instruction: String,
}

#[derive(Serialize)]
struct Scored {
    index: usize,
    score: f32,
}

/// Best first; passages of equal score stay in the order of the input.
fn write_ranking(output: &mut Destination, scores: &[f32]) -> anyhow::Result<()> {
    let scored = scores.iter().copied().enumerate();
    let mut ranking: Vec<_> = scored
        .map(|(index, score)| Scored { index, score })
        .collect();
    ranking.sort_by(|a, b| b.score.total_cmp(&a.score));
    serde_json::to_writer(&mut *output, &ranking)?;
    Ok(output.write_all(b"\n")?)
}

fn pairs(content: Content, instruction: &str) -> anyhow::Result<Vec<String>> {
    let Content::Pairs { query, passages } = content else {
        bail!("expected {{\"query\": string, \"passages\": [string]}}, got a text");
    };
    let pair = |passage: &String| reranker::pair(instruction, &query, passage);
    Ok(passages.iter().map(pair).collect())
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut records = args.input.open()?;
    let mut output = Destination::create(&args.output)?;
    let engine = Engine::load(&args.engine)?;
    let prompt = engine.encoder.prompt(reranker::BEFORE, reranker::AFTER)?;
    let (yes, no) = (
        engine.encoder.token_id("yes")?,
        engine.encoder.token_id("no")?,
    );

    let progress = Progress::new(&records)?;
    let mut totals = Totals::default();
    let fill = |content| pairs(content, &args.instruction);
    for_each_window(
        &mut records,
        args.engine.batch_tokens,
        fill,
        |records, window| {
            let texts = &window.texts;
            let encoded = engine
                .encoder
                .encode_in_prompt(texts, &prompt, engine.max_length);
            let sequences = window.sequences(encoded)?;
            let mut scores = vec![0.0; sequences.len()];
            engine.run(&sequences, &mut totals, |members, states, totals| {
                let probabilities = engine.model.yes_probabilities(states, yes, no)?;
                for (&member, probability) in members.iter().zip(probabilities) {
                    scores[member] = probability;
                }
                progress.update(records, totals);
                Ok(())
            })?;
            let mut scores = &scores[..];
            for query in &window.entries {
                let (of_query, rest) = scores.split_at(query.texts);
                write_ranking(&mut output, of_query)?;
                scores = rest;
            }
            Ok(())
        },
    )?;
    output.finish()?;
    progress.finish("scored", totals);
    Ok(())
}
