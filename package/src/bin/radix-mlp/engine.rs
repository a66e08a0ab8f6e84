//! What embedding and reranking share: a model, a tokenizer, and batches in which prefixes meet.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use candle_core::{DType, Device};
use radix_mlp::qwen3::{FoldLevel, HiddenStates, Qwen3Model};
use radix_mlp::text::{MaxLength, TextEncoder};
use radix_mlp::{Budget, Fold, Layout, plan_batches};

use super::progress::Totals;

/// What loads a model. Flags are environment variables too, for servers.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Hugging Face directory: config.json, safetensors, tokenizer.json
    #[arg(long, short, value_name = "DIR", env = "RADIX_MLP_MODEL")]
    pub model: PathBuf,

    /// Number type of weights and activations [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_enum, env = "RADIX_MLP_DTYPE")]
    dtype: Option<Dtype>,

    /// Where the model runs: cpu, cuda, or cuda:N for the GPU of that number
    #[arg(long, default_value = "cpu", env = "RADIX_MLP_DEVICE")]
    pub device: DeviceChoice,

    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = positive, env = "RADIX_MLP_THREADS")]
    threads: Option<usize>,
}

#[derive(clap::Args)]
pub struct EngineArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// What is computed once for every shared prefix
    #[arg(long, value_enum, default_value_t = FoldChoice::Auto)]
    fold: FoldChoice,

    /// Most tokens computed in one batch; more share more and take more memory
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = positive)]
    pub batch_tokens: usize,

    /// Cut texts that are longer than the model's context instead of refusing them
    #[arg(long)]
    truncate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FoldChoice {
    /// `full`, or `none` for batches that are measured to gain nothing
    Auto,
    /// Nothing: every token is computed
    None,
    /// Everything but attention, as the RadixMLP paper does
    Mlp,
    /// Everything
    Full,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("must be cpu, cuda or cuda:N, got {text:?}");
        match (text, text.strip_prefix("cuda:")) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(number)) => number.parse().map(Self::Cuda).map_err(|_| refused()),
            _ => Err(refused()),
        }
    }
}

impl DeviceChoice {
    /// As text-embeddings-inference calls what computes.
    #[cfg(feature = "server")]
    pub fn compute_type(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "gpu",
        }
    }

    fn open(self) -> anyhow::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => anyhow::bail!(
                "this radix-mlp was built without CUDA; build it with `--features cuda` to use --device cuda"
            ),
            #[cfg(feature = "cuda")]
            Self::Cuda(number) => radix_mlp_kernels::cuda_device(number)
                .with_context(|| format!("cannot open GPU {number}")),
        }
    }
}

pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

pub struct Engine {
    pub model: Qwen3Model,
    pub encoder: TextEncoder,
    fold: FoldChoice,
    batch_tokens: usize,
    pub max_length: MaxLength,
}

impl Dtype {
    /// As Hugging Face spells it.
    #[cfg(feature = "server")]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }
}

impl ModelArgs {
    pub fn dtype(&self) -> Dtype {
        let usual = match self.device {
            DeviceChoice::Cpu => Dtype::F32,
            DeviceChoice::Cuda(_) => Dtype::Bf16,
        };
        self.dtype.unwrap_or(usual)
    }

    pub fn load(&self) -> anyhow::Result<(Qwen3Model, TextEncoder)> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build_global()?;
        }
        let dtype = match self.dtype() {
            Dtype::F32 if self.device != DeviceChoice::Cpu => {
                anyhow::bail!("--dtype f32 runs on the CPU only; CUDA takes bf16 and f16")
            }
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        };
        let device = self.device.open()?;
        let encoder = TextEncoder::from_file(&self.model.join("tokenizer.json"))?;
        let model = Qwen3Model::load(&self.model, Some(dtype), &device)?;
        Ok((model, encoder))
    }
}

impl FoldChoice {
    /// What bounds a batch of at most `tokens`.
    pub fn budget(self, tokens: usize) -> Budget {
        match self {
            // Where `auto` decides for `none`, next to nothing is shared.
            Self::Auto | Self::Full => Budget::UniqueTokens(tokens),
            Self::None | Self::Mlp => Budget::Tokens(tokens),
        }
    }

    pub fn level(self, model: &Qwen3Model, fold: &Fold) -> FoldLevel {
        match self {
            Self::Auto => model.choose_level(fold),
            Self::None => FoldLevel::None,
            Self::Mlp => FoldLevel::Mlp,
            Self::Full => FoldLevel::Full,
        }
    }
}

impl Engine {
    pub fn load(args: &EngineArgs) -> anyhow::Result<Self> {
        let (model, encoder) = args.model.load()?;
        let max_length = MaxLength {
            tokens: model.config().max_position_embeddings,
            truncate: args.truncate,
        };
        Ok(Self {
            model,
            encoder,
            fold: args.fold,
            batch_tokens: args.batch_tokens,
            max_length,
        })
    }

    /// Computes `sequences` in batches, each handed to `read` with the indices of its sequences.
    pub fn run(
        &self,
        sequences: &[Vec<u32>],
        totals: &mut Totals,
        mut read: impl FnMut(&[usize], &HiddenStates<'_>, Totals) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for batch in plan_batches(sequences, self.fold.budget(self.batch_tokens)) {
            let members = batch.sequences.iter().map(|&index| &sequences[index][..]);
            let fold = fold(members)?;
            let level = self.fold.level(&self.model, &fold);
            let states = self.model.forward(&fold, level)?;
            totals.texts += batch.sequences.len() as u64;
            totals.tokens += batch.tokens as u64;
            totals.computed += match level {
                FoldLevel::None => batch.tokens as u64,
                FoldLevel::Mlp | FoldLevel::Full => batch.unique_tokens as u64,
            };
            read(&batch.sequences, &states, *totals)?;
        }
        Ok(())
    }
}

/// Folds sequences whose positions count from 0, in the order that attention on a GPU needs.
pub fn fold<'a>(sequences: impl Iterator<Item = &'a [u32]>) -> anyhow::Result<Fold> {
    let (mut input_ids, mut cu_seq_lengths) = (Vec::new(), vec![0]);
    for sequence in sequences {
        input_ids.extend_from_slice(sequence);
        let end = u32::try_from(input_ids.len()).context("a batch holds less than 2^32 tokens")?;
        cu_seq_lengths.push(end);
    }
    let builder = Fold::counted(&input_ids, &cu_seq_lengths);
    Ok(builder.layout(Layout::DepthFirst).build()?)
}
