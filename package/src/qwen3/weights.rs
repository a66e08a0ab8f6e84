use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

use super::config::Qwen3Config;
use super::error::ModelError;

/// All weights, in one floating-point dtype on one device, the LM head aside.
pub(super) struct Weights {
    /// \[vocab, hidden\]
    pub embedding: Tensor,
    pub layers: Vec<LayerWeights>,
    /// \[hidden\]
    pub norm: Tensor,
    pub head: Head,
}

pub(super) struct LayerWeights {
    /// \[hidden\]
    pub input_norm: Tensor,
    /// \[hidden, (heads + 2 kv_heads) × head_dim\]: q, k and v in one product.
    pub qkv: Linear,
    /// \[head_dim\]
    pub q_norm: Tensor,
    /// \[head_dim\]
    pub k_norm: Tensor,
    /// \[heads × head_dim, hidden\]
    pub output: Linear,
    /// \[hidden\]
    pub mlp_norm: Tensor,
    /// \[hidden, 2 intermediate\]: gate and up in one product.
    pub gate_up: Linear,
    /// \[intermediate, hidden\]
    pub down: Linear,
}

/// `y = x · weight + bias`
pub(super) struct Linear {
    /// \[in, out\], contiguous: transposed once, so that no product has to repack it.
    pub weight: Tensor,
    /// \[out\]
    pub bias: Option<Tensor>,
}

pub(super) enum Head {
    /// The embedding.
    Tied,
    /// \[vocab, hidden\], in the dtype of the file.
    Untied(Tensor),
    /// An embedding model: no head.
    Absent,
}

/// Gives the tensor of a name without its `model.` prefix, in any floating-point dtype; it has the
/// shape asked for.
trait Source {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError>;
    fn has_head(&self) -> bool;
}

impl Weights {
    pub fn load(
        directory: &Path,
        config: &Qwen3Config,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut source = Checkpoint::open(directory)?;
        Self::build(config, &mut source, dtype, device)
    }

    pub fn random(
        config: &Qwen3Config,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut source = Random { state: seed };
        Self::build(config, &mut source, dtype, device)
    }

    fn build(
        config: &Qwen3Config,
        source: &mut impl Source,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let mut get = |name: &str, shape: &[usize]| -> Result<Tensor, ModelError> {
            let tensor = source.tensor(name, shape)?;
            Ok(tensor.to_dtype(dtype)?.to_device(device)?)
        };
        let embedding = get("embed_tokens.weight", &[vocab, hidden])?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| LayerWeights::build(config, &format!("layers.{layer}"), &mut get))
            .collect::<Result<_, _>>()?;
        let norm = get("norm.weight", &[hidden])?;
        let head = match config.tie_word_embeddings {
            true => Head::Tied,
            false if source.has_head() => {
                let head = source.tensor("lm_head.weight", &[vocab, hidden])?;
                Head::Untied(head.to_device(device)?)
            }
            false => Head::Absent,
        };
        Ok(Self {
            embedding,
            layers,
            norm,
            head,
        })
    }
}

impl LayerWeights {
    fn build(
        config: &Qwen3Config,
        prefix: &str,
        get: &mut impl FnMut(&str, &[usize]) -> Result<Tensor, ModelError>,
    ) -> Result<Self, ModelError> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let queries = config.attention_width();
        let keys = config.num_key_value_heads * config.head_dim;
        // Linear layers that read the same input, stacked.
        let mut stacked = |block: &str, projections: &[(&str, usize)], width, bias| {
            let mut weights = Vec::new();
            let mut biases = Vec::new();
            for &(projection, rows) in projections {
                let name = format!("{prefix}.{block}.{projection}");
                weights.push(get(&format!("{name}.weight"), &[rows, width])?);
                if bias {
                    biases.push(get(&format!("{name}.bias"), &[rows])?);
                }
            }
            Ok::<_, ModelError>(Linear {
                weight: Tensor::cat(&weights, 0)?.t()?.contiguous()?,
                bias: bias.then(|| Tensor::cat(&biases, 0)).transpose()?,
            })
        };
        let bias = config.attention_bias;
        let qkv = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)];
        let qkv = stacked("self_attn", &qkv, hidden, bias)?;
        let output = stacked("self_attn", &[("o_proj", hidden)], queries, bias)?;
        let gate_up = [("gate_proj", intermediate), ("up_proj", intermediate)];
        let gate_up = stacked("mlp", &gate_up, hidden, false)?;
        let down = stacked("mlp", &[("down_proj", hidden)], intermediate, false)?;
        let mut norm = |name, width| get(&format!("{prefix}.{name}.weight"), &[width]);
        Ok(Self {
            input_norm: norm("input_layernorm", hidden)?,
            qkv,
            q_norm: norm("self_attn.q_norm", config.head_dim)?,
            k_norm: norm("self_attn.k_norm", config.head_dim)?,
            output,
            mlp_norm: norm("post_attention_layernorm", hidden)?,
            gate_up,
            down,
        })
    }
}

/// The safetensors files of a directory, memory-mapped.
struct Checkpoint {
    files: MmapedSafetensors,
    names: BTreeSet<String>,
    /// `model.`, or nothing in a checkpoint of the bare model.
    prefix: &'static str,
}

/// `model.safetensors.index.json`
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: std::collections::BTreeMap<String, PathBuf>,
}

impl Checkpoint {
    fn open(directory: &Path) -> Result<Self, ModelError> {
        let paths = shards(directory)?;
        for path in &paths {
            std::fs::metadata(path).map_err(|source| ModelError::File {
                path: path.clone(),
                source,
            })?;
        }
        // SAFETY: the maps are read-only, and every tensor is copied out of them before `load`
        // returns; that nobody shortens a file meanwhile is what every memory map rests on.
        let files = unsafe { MmapedSafetensors::multi(&paths) };
        let files = files.map_err(|source| ModelError::Safetensors {
            path: directory.to_owned(),
            source,
        })?;
        let names: BTreeSet<_> = files.tensors().into_iter().map(|(name, _)| name).collect();
        let bare = names.contains("embed_tokens.weight");
        Ok(Self {
            files,
            names,
            prefix: if bare { "" } else { "model." },
        })
    }
}

/// The files that hold the weights.
fn shards(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = directory.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let path = directory.join("model.safetensors.index.json");
    if !path.exists() {
        return Err(ModelError::NoWeights {
            directory: directory.to_owned(),
        });
    }
    let text = std::fs::read_to_string(&path).map_err(|source| ModelError::File {
        path: path.clone(),
        source,
    })?;
    let index: ShardIndex =
        serde_json::from_str(&text).map_err(|source| ModelError::Json { path, source })?;
    let files: BTreeSet<_> = index.weight_map.into_values().collect();
    Ok(files.into_iter().map(|file| directory.join(file)).collect())
}

impl Source for Checkpoint {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let name = match name {
            "lm_head.weight" => name.to_owned(),
            _ => format!("{}{name}", self.prefix),
        };
        if !self.names.contains(&name) {
            return Err(ModelError::MissingTensor { name });
        }
        let view = self.files.get(&name)?;
        if view.shape() != shape {
            return Err(ModelError::TensorShape {
                name,
                found: view.shape().to_vec(),
                expected: shape.to_vec(),
            });
        }
        let tensor = view.load(&Device::Cpu)?;
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => Ok(tensor),
            dtype => Err(ModelError::Dtype { what: name, dtype }),
        }
    }

    fn has_head(&self) -> bool {
        self.names.contains("lm_head.weight")
    }
}

/// Weights from a seed, by SplitMix64 and exact conversions: the same bits on every machine.
struct Random {
    state: u64,
}

impl Random {
    /// The next `count` numbers, uniform in -1..1.
    fn take(&mut self, count: usize) -> impl IndexedParallelIterator<Item = f32> + use<> {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let before = self.state;
        self.state = before.wrapping_add(STEP.wrapping_mul(count as u64));
        (0..count).into_par_iter().map(move |at| {
            let mut z = before.wrapping_add(STEP.wrapping_mul(at as u64 + 1));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            // 24 bits, what an f32 holds exactly.
            (z >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
    }
}

impl Source for Random {
    /// Norms around 1; matrices of variance 1 / columns, which keeps the size of what they
    /// multiply; biases around 0.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let (mean, half_width) = match shape {
            [_] if name.ends_with("norm.weight") => (1.0, 0.25),
            [_, columns] => (0.0, (3.0 / *columns as f32).sqrt()),
            _ => (0.0, 0.25),
        };
        let uniform = self.take(shape.iter().product());
        let values: Vec<f32> = uniform.map(|x| mean + half_width * x).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn has_head(&self) -> bool {
        true
    }
}
