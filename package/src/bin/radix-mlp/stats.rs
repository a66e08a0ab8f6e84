use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::HumanCount;
use radix_mlp::text::{MaxLength, TextEncoder};
use radix_mlp::{Budget, PlannedBatch, plan_batches};

use super::engine::{fold, positive};
use super::input::{Content, InputArgs};
use super::progress::{Progress, Totals};
use super::window::for_each_window;

/// Tell what folding would save on your data, before you adopt it
#[derive(clap::Args)]
#[command(after_help = "\
Reads what `radix-mlp embed` reads, and puts it into the same batches, with the tokenizer alone.
Compression is tokens over unique tokens: the speed-up that folding can reach at most.

Example:
  radix-mlp stats --tokenizer Qwen3-Embedding-0.6B/tokenizer.json --input texts.jsonl")]
pub struct Args {
    /// tokenizer.json of the model
    #[arg(long, short, value_name = "FILE")]
    tokenizer: PathBuf,

    #[command(flatten)]
    input: InputArgs,

    /// Most unique tokens in a batch
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = positive)]
    batch_tokens: usize,
}

/// What is known of all batches so far.
#[derive(Default)]
struct Summary {
    totals: Totals,
    /// Compression of each batch.
    compressions: Vec<f64>,
    folding: Duration,
}

impl Summary {
    fn add(&mut self, batch: &PlannedBatch, sequences: &[Vec<u32>]) -> anyhow::Result<()> {
        let start = Instant::now();
        let fold = fold(batch.sequences.iter().map(|&index| &sequences[index][..]))?;
        self.folding += start.elapsed();
        self.totals.texts += batch.sequences.len() as u64;
        self.totals.tokens += fold.num_tokens() as u64;
        self.totals.computed += fold.num_nodes() as u64;
        self.compressions.push(fold.compression());
        Ok(())
    }

    fn print(mut self) {
        let Totals {
            texts,
            tokens,
            computed,
        } = self.totals;
        self.compressions.sort_by(f64::total_cmp);
        let last = self.compressions.len().saturating_sub(1);
        let quantile = |q: usize| self.compressions.get(last * q / 4).copied().unwrap_or(1.0);
        println!("texts           {}", HumanCount(texts));
        println!("tokens          {}", HumanCount(tokens));
        println!("unique tokens   {}", HumanCount(computed));
        println!(
            "compression     {:.2}×",
            tokens as f64 / computed.max(1) as f64
        );
        println!(
            "batches         {}, compression {:.2}× to {:.2}×, median {:.2}×",
            HumanCount(self.compressions.len() as u64),
            quantile(0),
            quantile(4),
            quantile(2)
        );
        println!("time to fold    {:.1} ms", self.folding.as_secs_f64() * 1e3);
    }
}

/// A text, or the texts of pairs as `embed` writes them.
fn texts(content: Content) -> Vec<String> {
    match content {
        Content::Text(text) => vec![text],
        Content::Pairs { query, passages } => {
            let pair = |passage: &String| format!("{query}\n{passage}");
            passages.iter().map(pair).collect()
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let encoder = TextEncoder::from_file(&args.tokenizer)?;
    let mut records = args.input.open()?;
    let progress = Progress::new(&records)?;
    let any_length = MaxLength {
        tokens: usize::MAX,
        truncate: false,
    };
    let mut summary = Summary::default();
    let fill = |content| Ok(texts(content));
    for_each_window(&mut records, args.batch_tokens, fill, |records, window| {
        let sequences = window.sequences(encoder.encode(&window.texts, any_length))?;
        for batch in plan_batches(&sequences, Budget::UniqueTokens(args.batch_tokens)) {
            summary.add(&batch, &sequences)?;
        }
        progress.update(records, summary.totals);
        Ok(())
    })?;
    progress.finish("counted", summary.totals);
    summary.print();
    Ok(())
}
