mod workloads;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use radix_mlp::Fold;
use radix_mlp::qwen3::{FoldLevel, Qwen3Config, Qwen3Model};

use super::engine::fold;
use workloads::{SMALL, Workload, workloads};

/// Run sample workloads through a small Qwen3, folded and unfolded; needs no files
#[derive(clap::Args)]
pub struct Args {
    /// Timed runs of each workload at each fold level
    #[arg(long, default_value_t = 3, value_parser = super::engine::positive)]
    runs: usize,
}

const LEVELS: [(FoldLevel, &str); 3] = [
    (FoldLevel::None, "none"),
    (FoldLevel::Mlp, "mlp"),
    (FoldLevel::Full, "full"),
];

/// Bytes are tokens, and the weights are random: what a batch costs depends on neither.
fn model() -> anyhow::Result<Qwen3Model> {
    let config = Qwen3Config {
        vocab_size: 256,
        hidden_size: 256,
        intermediate_size: 768,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_factor: 1.0,
        attention_bias: false,
        tie_word_embeddings: true,
    };
    Ok(Qwen3Model::random(&config, 0, DType::F32, &Device::Cpu)?)
}

fn fold_bytes(texts: &[String]) -> anyhow::Result<Fold> {
    let tokens: Vec<Vec<u32>> = texts
        .iter()
        .map(|text| text.bytes().map(u32::from).collect())
        .collect();
    fold(tokens.iter().map(Vec::as_slice))
}

/// What one workload takes at one fold level.
struct Measured {
    times: Vec<Duration>,
    /// Hidden states of all tokens, \[N, hidden\].
    states: Option<Tensor>,
}

/// Runs the levels in turn, so that a slow moment of the machine meets all of them.
fn measure(
    model: &Qwen3Model,
    fold: &Fold,
    runs: usize,
    progress: &ProgressBar,
) -> anyhow::Result<Vec<Measured>> {
    let mut measured: Vec<Measured> = LEVELS
        .iter()
        .map(|_| Measured {
            times: Vec::new(),
            states: None,
        })
        .collect();
    // The first run warms up and keeps its states.
    for run in 0..=runs {
        for ((level, _), measured) in LEVELS.iter().zip(&mut measured) {
            let start = Instant::now();
            let states = model.forward(fold, *level)?;
            let time = start.elapsed();
            match run {
                0 => measured.states = Some(states.unfold()?),
                _ => measured.times.push(time),
            }
            progress.inc(1);
        }
    }
    Ok(measured)
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

/// Largest difference of any hidden state, relative to the largest of them; NaN where there is one.
fn difference(a: &Tensor, b: &Tensor) -> anyhow::Result<f32> {
    Ok(largest(&(a - b)?)? / largest(a)?)
}

/// NaN is the largest here, where candle's `max` forgets it.
fn largest(x: &Tensor) -> candle_core::Result<f32> {
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    Ok(values
        .into_iter()
        .map(f32::abs)
        .max_by(f32::total_cmp)
        .unwrap_or(0.0))
}

const HEADER: &str = "workload     tokens N  unique N'  compression   level       ms   tokens/s  speed-up  difference";

fn print_rows(name: &str, fold: &Fold, mut measured: Vec<Measured>) -> anyhow::Result<()> {
    let bold = |text: String, best: bool| match best && std::io::stdout().is_terminal() {
        true => format!("\x1b[1;32m{text}\x1b[0m"),
        false => text,
    };
    let seconds: Vec<f64> = measured.iter_mut().map(|m| median(&mut m.times)).collect();
    for (index, (_, level)) in LEVELS.iter().enumerate() {
        let states = [&measured[0].states, &measured[index].states];
        let difference = match states {
            [Some(none), Some(this)] => difference(none, this)?,
            _ => f32::NAN,
        };
        let shared = match index {
            0 => format!(
                "{name:<12} {:>8}  {:>9}  {:>10.2}×",
                HumanCount(fold.num_tokens() as u64).to_string(),
                HumanCount(fold.num_nodes() as u64).to_string(),
                fold.compression()
            ),
            _ => " ".repeat(45),
        };
        let rate = HumanCount((fold.num_tokens() as f64 / seconds[index]) as u64).to_string();
        let speed_up = format!("{:>7.2}×", seconds[0] / seconds[index]);
        println!(
            "{shared}   {level:<5} {:>8.1} {rate:>10}  {}  {difference:>10.1e}",
            seconds[index] * 1e3,
            bold(speed_up, index == 2),
        );
    }
    Ok(())
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    println!("Texts that start alike share the nodes of a prefix trie:\n");
    let texts: Vec<String> = SMALL.iter().map(|&text| text.to_owned()).collect();
    let small = fold_bytes(&texts)?;
    print!("{}", small.draw(|ids| format!("{:?}", as_text(ids))));
    println!(
        "\nHere {} of {} tokens are unique (a token is a byte), so {} rows go through the model.\n",
        small.num_nodes(),
        small.num_tokens(),
        small.num_nodes()
    );

    let model = model()?;
    println!(
        "Three workloads through a Qwen3 of {} layers, hidden size {}, random weights, f32, {} \
         threads;\nmedian of {} alternating runs.\n",
        model.config().num_hidden_layers,
        model.config().hidden_size,
        rayon::current_num_threads(),
        args.runs
    );
    println!("{HEADER}");
    let workloads = workloads();
    let steps = workloads.len() * (args.runs + 1) * LEVELS.len();
    let progress = ProgressBar::new(steps as u64);
    progress.set_style(ProgressStyle::with_template("{bar:30} {msg}")?);
    for Workload { name, texts } in workloads {
        progress.set_message(name);
        let fold = fold_bytes(&texts)?;
        let measured = measure(&model, &fold, args.runs, &progress)?;
        progress.suspend(|| print_rows(name, &fold, measured))?;
    }
    progress.finish_and_clear();
    println!(
        "\nnone computes every token; mlp folds all but attention, as the RadixMLP paper does; full \
         folds\nattention too, so that its speed-up follows the compression. difference: largest \
         |state - state\nof none|, relative to the largest state: the order of sums, nothing else.\n\
         \nNext: radix-mlp stats --help, to see what your own data share."
    );
    Ok(())
}

fn as_text(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
