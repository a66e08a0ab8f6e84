use std::path::Path;

use serde::Deserialize;

use super::error::ModelError;

/// What the forward pass reads of a Qwen3 `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen3Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head, even; `hidden_size / num_attention_heads` where the file has none.
    pub head_dim: usize,
    /// The context in tokens: positions are smaller.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Base of the RoPE frequencies.
    pub rope_theta: f64,
    /// Linear RoPE scaling: positions are divided by it; 1 unless the file says otherwise.
    pub rope_factor: f64,
    /// Whether the four projections of the attention have a bias.
    pub attention_bias: bool,
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
}

/// `config.json` as it is written, by transformers 4 or 5.
#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    is_causal: Option<bool>,
    use_bidirectional_attention: Option<bool>,
}

#[derive(Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
}

impl Qwen3Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    ///
    /// [`ModelError`] where the file cannot be read, is no Qwen3, or asks for something that this
    /// forward pass does not do.
    pub fn from_file(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(|source| ModelError::File {
            path: path.to_owned(),
            source,
        })?;
        let file: ConfigFile = serde_json::from_str(&text).map_err(|source| ModelError::Json {
            path: path.to_owned(),
            source,
        })?;
        file.check_supported()?;
        let config = file.into_config()?;
        config.validate()?;
        Ok(config)
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] names the field that does not.
    pub fn validate(&self) -> Result<(), ModelError> {
        let invalid = |field, value: String, requirement| {
            Err(ModelError::Config {
                field,
                value,
                requirement,
            })
        };
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if size == 0 || u32::try_from(size).is_err() {
                return invalid(field, size.to_string(), "expected 1 to 2^32 - 1");
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let value = kv_heads.to_string();
            let requirement = "expected a divisor of num_attention_heads";
            return invalid("num_key_value_heads", value, requirement);
        }
        if !self.head_dim.is_multiple_of(2) {
            return invalid("head_dim", self.head_dim.to_string(), "expected even");
        }
        for (field, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("rope_factor", self.rope_factor),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return invalid(field, value.to_string(), "expected positive");
            }
        }
        if self.largest_tensor().is_none() {
            let value = self.hidden_size.to_string();
            return invalid("hidden_size", value, "the weights overflow the memory");
        }
        Ok(())
    }

    /// Elements of the largest fused weight; `None` where its bytes overflow.
    fn largest_tensor(&self) -> Option<usize> {
        let attention = self
            .num_key_value_heads
            .checked_mul(2)?
            .checked_add(self.num_attention_heads)?
            .checked_mul(self.head_dim)?;
        let mlp = self.intermediate_size.checked_mul(2)?;
        let rows = attention.max(mlp).max(self.vocab_size);
        let elements = rows.checked_mul(self.hidden_size)?;
        elements.checked_mul(size_of::<f32>()).map(|_| elements)
    }

    /// Columns of the fused projection: the query heads, then the key heads, then the value heads.
    pub(super) fn qkv_width(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }

    /// Columns of the attention's output.
    pub(super) fn attention_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }
}

impl ConfigFile {
    fn check_supported(&self) -> Result<(), ModelError> {
        let architecture = self.architectures.iter().flatten().next();
        let supported = match architecture {
            Some(name) => matches!(name.as_str(), "Qwen3ForCausalLM" | "Qwen3Model"),
            None => self.model_type.as_deref() == Some("qwen3"),
        };
        if !supported {
            let name = architecture.or(self.model_type.as_ref());
            return Err(ModelError::Architecture {
                architecture: name.cloned().unwrap_or_default(),
            });
        }
        if self.slides() {
            return Err(ModelError::SlidingWindow {
                sliding_window: self.sliding_window,
            });
        }
        if self.is_causal == Some(false) {
            let field = "is_causal";
            return Err(ModelError::Bidirectional { field });
        }
        if self.use_bidirectional_attention == Some(true) {
            let field = "use_bidirectional_attention";
            return Err(ModelError::Bidirectional { field });
        }
        match self.hidden_act.as_deref() {
            None | Some("silu") => Ok(()),
            Some(activation) => Err(ModelError::Activation {
                activation: activation.to_owned(),
            }),
        }
    }

    /// Whether any layer attends within a window. Without `layer_types`, transformers slides the
    /// layers from `max_window_layers` (28 by default) on.
    fn slides(&self) -> bool {
        match &self.layer_types {
            Some(types) => types.iter().any(|name| name != "full_attention"),
            None => {
                self.use_sliding_window
                    && self.sliding_window.is_some()
                    && self.max_window_layers.unwrap_or(28) < self.num_hidden_layers
            }
        }
    }

    fn into_config(self) -> Result<Qwen3Config, ModelError> {
        let head_dim = match (self.head_dim, self.num_attention_heads) {
            (Some(head_dim), _) => head_dim,
            (None, heads) => self.hidden_size.checked_div(heads).unwrap_or(0),
        };
        // transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`.
        let rope = self.rope_parameters.or(self.rope_scaling);
        let in_rope = rope.as_ref().and_then(|rope| rope.rope_theta);
        let rope_theta = in_rope.or(self.rope_theta).unwrap_or(10_000.0);
        Ok(Qwen3Config {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta,
            rope_factor: rope.map_or(Ok(1.0), |rope| rope.factor())?,
            attention_bias: self.attention_bias,
            tie_word_embeddings: self.tie_word_embeddings,
        })
    }
}

impl Rope {
    /// By what positions are divided.
    fn factor(&self) -> Result<f64, ModelError> {
        match (self.rope_type.as_deref(), self.factor) {
            (None | Some("default"), _) => Ok(1.0),
            (Some("linear"), Some(factor)) => Ok(factor),
            (Some("linear"), None) => Err(ModelError::Config {
                field: "rope_parameters.factor",
                value: "absent".to_owned(),
                requirement: "linear scaling needs it",
            }),
            (Some(rope_type), _) => Err(ModelError::RopeType {
                rope_type: rope_type.to_owned(),
            }),
        }
    }
}
