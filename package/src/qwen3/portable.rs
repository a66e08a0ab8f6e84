//! The forward pass in operations of candle and of `radix_mlp_kernels`, for every device and dtype: what CUDA runs, and
//! half precision on the CPU. Nothing comes back to the host between the layers.

use std::borrow::Cow;

use candle_core::{Device, Result, Tensor};
use radix_mlp_kernels::{
    Ids, KEY_BLOCK, Lists, PathLists, TreeMask, add_rms_norm, gather, index_select, norm_rope,
    query_block, rotary_angles, swiglu, tree_attention,
};

use super::config::Qwen3Config;
use super::error::ModelError;
use super::model::FoldLevel;
use super::rope::inverse_frequencies;
use super::weights::{LayerWeights, Linear, Weights};
use crate::path_mask::PathMask;
use crate::{Fold, FoldError, Layout};

/// Hidden states after the last norm, in the dtype of the weights: \[N', hidden\] in the order of the fold's rows, or
/// \[N, hidden\] at [`FoldLevel::None`].
pub(super) fn forward(
    config: &Qwen3Config,
    weights: &Weights,
    fold: &Fold,
    level: FoldLevel,
) -> std::result::Result<Tensor, ModelError> {
    let (device, dtype) = (weights.embedding.device(), weights.embedding.dtype());
    if fold.num_tokens() == 0 {
        // CUDA has no tensors of nothing.
        return Ok(Tensor::zeros((0, config.hidden_size), dtype, &Device::Cpu)?);
    }
    let mut batch = Batch::new(config, fold, level, device)?;
    let mut states = index_select(&weights.embedding, &batch.input_ids)?;
    // What the last block adds to the states, which the next norm does.
    let mut added = None;
    for layer in &weights.layers {
        let eps = config.rms_norm_eps as f32;
        let (sum, normed) = add_rms_norm(&states, added.as_ref(), &layer.input_norm, eps)?;
        let qkv = linear(&normed, &layer.qkv)?;
        let attended = attention(config, layer, &qkv, batch.paths(config, device)?)?;
        let (sum, normed) = add_rms_norm(&sum, Some(&attended), &layer.mlp_norm, eps)?;
        let activated = swiglu(&linear(&normed, &layer.gate_up)?)?;
        added = Some(linear(&activated, &layer.down)?);
        states = sum;
    }
    let eps = config.rms_norm_eps as f32;
    let (_, normed) = add_rms_norm(&states, added.as_ref(), &weights.norm, eps)?;
    match &batch.rows_of_fold {
        Some(rows) => Ok(index_select(&normed, rows)?),
        None => Ok(normed),
    }
}

/// The rows of a batch: the same for all layers.
struct Batch<'f> {
    fold: &'f Fold,
    level: FoldLevel,
    tree: Tree<'f>,
    input_ids: Ids,
    positions: Vec<u32>,
    paths: Option<Paths>,
    /// Where the fold's rows are, if rows stand in another order.
    rows_of_fold: Option<Ids>,
}

/// What attention needs to know of them, on the device.
struct Paths {
    /// Cosines and sines, f32 \[rows, head_dim / 2\].
    angles: [Tensor; 2],
    mask: TreeMask,
    /// From compact to original space and back, at [`FoldLevel::Mlp`].
    expansion: Option<[Ids; 2]>,
}

impl<'f> Batch<'f> {
    fn new(
        config: &Qwen3Config,
        fold: &'f Fold,
        level: FoldLevel,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        let nodes = fold.num_nodes();
        let tree = depth_first(fold, level)?;
        let order = tree.order.as_deref();
        let in_order = |values: &[u32]| match order {
            Some(order) => order.iter().map(|&row| values[row as usize]).collect(),
            None => values[..nodes].to_vec(),
        };
        let [ids, positions] = match level {
            FoldLevel::None => [
                fold.unfold(fold.input_ids(), 1)?,
                fold.unfold(fold.position_ids(), 1)?,
            ],
            FoldLevel::Mlp | FoldLevel::Full => {
                [fold.input_ids(), fold.position_ids()].map(in_order)
            }
        };
        let rows_of_fold = order.map(|order| Ids::new(&inverse(order), nodes, device));
        Ok(Self {
            fold,
            level,
            input_ids: Ids::new(&ids, config.vocab_size, device)?,
            positions,
            paths: None,
            rows_of_fold: rows_of_fold.transpose()?,
            tree,
        })
    }

    /// Made when the first layer asks for them: a GPU has its product of queries, keys and values to compute meanwhile.
    fn paths(
        &mut self,
        config: &Qwen3Config,
        device: &Device,
    ) -> std::result::Result<&Paths, ModelError> {
        let paths = match self.paths.take() {
            Some(paths) => paths,
            None => self.new_paths(config, device)?,
        };
        Ok(self.paths.insert(paths))
    }

    fn new_paths(
        &self,
        config: &Qwen3Config,
        device: &Device,
    ) -> std::result::Result<Paths, ModelError> {
        let (nodes, tokens) = (self.fold.num_nodes(), self.fold.num_tokens());
        let expansion = match self.level {
            FoldLevel::Mlp => Some([
                Ids::new(self.fold.scatter_indices(), nodes, device)?,
                Ids::new(&self.fold.fold_gather()[..nodes], tokens, device)?,
            ]),
            FoldLevel::None | FoldLevel::Full => None,
        };
        Ok(Paths {
            angles: rotary_angles(&self.positions, &inverse_frequencies(config), device)?,
            mask: mask(config, &self.tree.subtree_end, device)?,
            expansion,
        })
    }
}

/// The rows that attend to each other, as tree attention takes them.
struct Tree<'f> {
    subtree_end: Cow<'f, [u32]>,
    /// The fold's rows in this order, where it is another one.
    order: Option<Vec<u32>>,
}

/// Below [`FoldLevel::Full`] each sequence attends to itself, and is a tree without branches.
fn depth_first(fold: &Fold, level: FoldLevel) -> std::result::Result<Tree<'_>, FoldError> {
    if level != FoldLevel::Full {
        let ends = fold.cu_seq_lengths().windows(2);
        let subtree_end = ends
            .flat_map(|ends| std::iter::repeat_n(ends[1], (ends[1] - ends[0]) as usize))
            .collect();
        return Ok(Tree {
            subtree_end: Cow::Owned(subtree_end),
            order: None,
        });
    }
    if let Some(subtree_end) = fold.subtree_end() {
        return Ok(Tree {
            subtree_end: Cow::Borrowed(&subtree_end[..fold.num_nodes()]),
            order: None,
        });
    }
    // A row stands for the whole path to it: rows in place of tokens give the same trie, without positions and salts.
    let ordered = Fold::counted(fold.scatter_indices(), fold.cu_seq_lengths())
        .layout(Layout::DepthFirst)
        .build()?;
    Ok(Tree {
        subtree_end: Cow::Owned(ordered.subtree_end().unwrap_or_default().to_vec()),
        order: Some(ordered.input_ids().to_vec()),
    })
}

/// Where each row is in a permutation.
fn inverse(order: &[u32]) -> Vec<u32> {
    let mut places = vec![0; order.len()];
    for (place, &row) in (0..).zip(order) {
        places[row as usize] = place;
    }
    places
}

fn mask(
    config: &Qwen3Config,
    subtree_end: &[u32],
    device: &Device,
) -> std::result::Result<TreeMask, ModelError> {
    let group = config.num_attention_heads / config.num_key_value_heads;
    let mask = PathMask::new(subtree_end, query_block(group), KEY_BLOCK, None)?;
    let [partial, full] = [mask.partial(), mask.full()].map(|lists| Lists {
        offsets: &lists.offsets,
        blocks: &lists.indices,
    });
    let paths = PathLists {
        depth: mask.depth(),
        blocks: mask.blocks(),
        above: mask.above(),
        partial,
        full,
    };
    Ok(TreeMask::new(paths, group, None, device)?)
}

/// What attention adds to the states, \[rows, hidden\], of their queries, keys and values \[rows, all heads × head_dim\].
fn attention(
    config: &Qwen3Config,
    layer: &LayerWeights,
    qkv: &Tensor,
    paths: &Paths,
) -> Result<Tensor> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let qkv = qkv.reshape(((), heads + 2 * kv_heads, config.head_dim))?;
    let weights = [&layer.q_norm, &layer.k_norm];
    let angles = paths.angles.each_ref();
    let eps = config.rms_norm_eps as f32;
    let mut qk = norm_rope(&qkv, weights, angles, [heads, kv_heads], eps)?;
    let mut v = qkv.narrow(1, heads + kv_heads, kv_heads)?;
    if let Some([scatter, _]) = &paths.expansion {
        [qk, v] = gather([&qk, &v], scatter)?;
    }
    let (q, k) = (qk.narrow(1, 0, heads)?, qk.narrow(1, heads, kv_heads)?);
    let scale = (config.head_dim as f32).sqrt().recip();
    let mut attended = tree_attention(&q, &k, &v, &paths.mask, scale, None)?;
    if let Some([_, gather]) = &paths.expansion {
        attended = index_select(&attended, gather)?;
    }
    linear(&attended.flatten_from(1)?, &layer.output)
}

fn linear(x: &Tensor, layer: &Linear) -> Result<Tensor> {
    let product = x.matmul(&layer.weight)?;
    match &layer.bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}
