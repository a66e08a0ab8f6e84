use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};

use crate::KernelError;
use crate::rows::same_device;

/// Queries that a kernel computes together: rows times the query heads of one key head.
pub const TILE: usize = 192;
/// Keys in a key block.
pub const KEY_BLOCK: usize = 64;

/// Rows in a query block, where `group` query heads share a key head.
pub fn query_block(group: usize) -> usize {
    TILE / group.clamp(1, TILE)
}

/// Key blocks for each query block of [`query_block`] rows: list `b` is `blocks[offsets[b]..offsets[b + 1]]`.
#[derive(Clone, Copy, Debug)]
pub struct Lists<'a> {
    /// \[query blocks + 1\].
    pub offsets: &'a [usize],
    /// The lists, one after another.
    pub blocks: &'a [u32],
}

/// Which keys rows see, in blocks of [`KEY_BLOCK`] keys that follow each other on a path: what `radix_mlp::PathMask` has.
///
/// What a row gets is summed over the blocks in the order in which they are listed, those of `partial` first.
#[derive(Clone, Copy, Debug)]
pub struct PathLists<'a> {
    /// How many rows are above each, \[rows\].
    pub depth: &'a [u32],
    /// Each block is `[first, end, depth, above]`. Its keys are `depth % KEY_BLOCK` rows above the row `first`, which are
    /// listed from `above[above]` on, and then `first` and the rows after it. Rows `first..end` see them up to themselves.
    pub blocks: &'a [[u32; 4]],
    /// Rows above those at which blocks begin.
    pub above: &'a [u32],
    /// The blocks of which some row of a query block does not see some key.
    pub partial: Lists<'a>,
    /// The blocks all of whose keys each of a query block's rows sees, but for the window.
    pub full: Lists<'a>,
}

impl PathLists<'_> {
    /// That whoever follows the lists finds all that they name.
    fn check(&self, group: usize, window: Option<u32>) -> Result<(), KernelError> {
        if group == 0 || group > TILE {
            return refuse(format!("group must be in 1..={TILE}, got {group}"));
        }
        if window == Some(0) {
            return refuse("a window must have rows, got 0".to_owned());
        }
        self.check_blocks()?;
        let tiles = self.depth.len().div_ceil(query_block(group));
        for (name, lists) in [("partial", self.partial), ("full", self.full)] {
            lists.check(name, tiles, self.blocks.len())?;
        }
        let (partial, full) = (self.partial.offsets, self.full.offsets);
        if let Some(tile) =
            (0..tiles).find(|&at| partial[at] == partial[at + 1] && full[at] == full[at + 1])
        {
            return refuse(format!("query block {tile} lists no key block"));
        }
        let listed = self.partial.blocks.len() + self.full.blocks.len();
        if u32::try_from(listed).is_err() {
            return refuse(format!("the lists have {listed} blocks, too many"));
        }
        Ok(())
    }

    fn check_blocks(&self) -> Result<(), KernelError> {
        let (rows, listed) = (self.depth.len(), self.above.len());
        if let Some(at) = self.above.iter().position(|&row| row as usize >= rows) {
            return refuse(format!("above[{at}] is row {}, of {rows}", self.above[at]));
        }
        for (at, block) in self.blocks.iter().enumerate() {
            let [first, end, depth, above] = block.map(|number| number as usize);
            if first >= end || end > rows {
                return refuse(format!("blocks[{at}] is of rows {first}..{end}, of {rows}"));
            }
            if depth >= rows {
                return refuse(format!("blocks[{at}] is below {depth} rows, of {rows}"));
            }
            let end = above + depth % KEY_BLOCK;
            if end > listed {
                return refuse(format!(
                    "blocks[{at}] has above[{above}..{end}], of {listed}"
                ));
            }
        }
        Ok(())
    }
}

impl Lists<'_> {
    /// That these are `tiles` lists of numbers below `blocks`.
    fn check(&self, name: &str, tiles: usize, blocks: usize) -> Result<(), KernelError> {
        let Self {
            offsets,
            blocks: listed,
        } = self;
        let ends = (offsets.first().copied(), offsets.last().copied());
        if offsets.len() != tiles + 1 || ends != (Some(0), Some(listed.len())) {
            let (lists, count) = (offsets.len().saturating_sub(1), listed.len());
            return refuse(format!(
                "{name} must be {tiles} lists of {count} blocks, got {lists} with ends {ends:?}"
            ));
        }
        if let Some(ends) = offsets.windows(2).find(|ends| ends[0] > ends[1]) {
            let (from, to) = (ends[0], ends[1]);
            return refuse(format!("{name}'s offsets go from {from} to {to}"));
        }
        match listed.iter().position(|&block| block as usize >= blocks) {
            Some(at) => refuse(format!("{name}[{at}] is block {}, of {blocks}", listed[at])),
            None => Ok(()),
        }
    }

    /// The offsets, as the kernels read them, once they have been checked.
    fn offsets(&self) -> Vec<u32> {
        self.offsets.iter().map(|&offset| offset as u32).collect()
    }
}

fn refuse(message: String) -> Result<(), KernelError> {
    Err(KernelError::Mask(message))
}

/// Launches of a kernel that find a counter in their mask: more than a model has layers.
const COUNTERS: usize = 128;

/// What attention needs to know of a batch: a row sees the rows above it and itself and, with a window, only the last so
/// many of these.
#[derive(Clone, Debug)]
pub struct TreeMask {
    pub(crate) rows: usize,
    pub(crate) group: usize,
    pub(crate) window: Option<u32>,
    /// \[rows\], u32.
    pub(crate) depth: Tensor,
    /// What the kernels call `Lists`, in that order, u32: the blocks' numbers, of which the first lies at a multiple of
    /// 16 bytes, the rows above, offsets and blocks of the partial lists and of the full ones.
    pub(crate) lists: [Tensor; 6],
    counters: Counters,
}

/// By which launches count, each by its own.
#[derive(Clone, Debug)]
struct Counters {
    /// u32 \[COUNTERS\].
    zeros: Tensor,
    taken: Arc<AtomicUsize>,
}

impl TreeMask {
    /// A mask on `device` for `group` query heads to a key head, from what `radix_mlp::Fold::path_mask` says of a fold in
    /// blocks of [`query_block`] rows and [`KEY_BLOCK`] keys for the same window, which counts a row itself.
    ///
    /// # Errors
    ///
    /// [`KernelError::Mask`] for a window of no rows, a query block without key blocks, and what names rows, blocks or
    /// places in lists that are not there.
    pub fn new(
        paths: PathLists<'_>,
        group: usize,
        window: Option<u32>,
        device: &Device,
    ) -> Result<Self, KernelError> {
        paths.check(group, window)?;
        let (partial_offsets, full_offsets) = (paths.partial.offsets(), paths.full.offsets());
        let arrays = [
            paths.blocks.as_flattened(),
            paths.above,
            &partial_offsets,
            paths.partial.blocks,
            &full_offsets,
            paths.full.blocks,
            paths.depth,
            &[0; COUNTERS],
        ];
        // One transfer: each takes longer to begin than all of them to do.
        let together = Tensor::new(arrays.concat(), device)?;
        let mut start = 0;
        let parts = arrays.map(|array| {
            start += array.len();
            together.narrow(0, start - array.len(), array.len())
        });
        let [
            blocks,
            above,
            partial_offsets,
            partial,
            full_offsets,
            full,
            depth,
            zeros,
        ] = parts;
        let rows = paths.depth.len();
        Ok(Self {
            rows,
            group,
            window,
            depth: depth?,
            lists: [
                blocks?,
                above?,
                partial_offsets?,
                partial?,
                full_offsets?,
                full?,
            ],
            counters: Counters {
                zeros: zeros?,
                taken: Arc::default(),
            },
        })
    }

    /// A zero on the mask's device, u32 \[1\], that nobody else has.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "only launches on CUDA count")
    )]
    pub(crate) fn counter(&self) -> candle_core::Result<Tensor> {
        match self.counters.taken.fetch_add(1, Ordering::Relaxed) {
            at @ ..COUNTERS => self.counters.zeros.narrow(0, at, 1),
            _ => Tensor::zeros(1, DType::U32, self.counters.zeros.device()),
        }
    }
}

/// Attention of a folded batch: `q` \[rows, heads, head_dim\] over `k` and `v` \[rows, key heads, head_dim\], as `q`.
///
/// Scores are products times `scale`, capped as `softcap * tanh(score / softcap)` where that is given (Gemma 2). Softmax
/// and sums are float32. On CUDA f16 and bf16, of head_dim 64 and 128; on the CPU any float. Not differentiable.
/// FlashAttention-2 (arXiv 2307.08691) over blocks of paths; on CUDA in PyTorch's order of sums, so that of head_dim 128
/// without a cap the bits are those of its FlashAttention over each row's path alone.
///
/// # Errors
///
/// [`KernelError::Shape`], [`KernelError::DType`] and [`KernelError::Device`] for tensors that do not go together,
/// [`KernelError::Number`] for a scale or a cap that is not positive.
pub fn tree_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &TreeMask,
    scale: f32,
    softcap: Option<f32>,
) -> Result<Tensor, KernelError> {
    Ok(attend([q, k, v], mask, scale, softcap, false)?.0)
}

/// [`tree_attention`], and the logarithm of each softmax's denominator, f32 \[heads, rows\].
///
/// # Errors
///
/// Those of [`tree_attention`].
pub fn tree_attention_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &TreeMask,
    scale: f32,
    softcap: Option<f32>,
) -> Result<(Tensor, Tensor), KernelError> {
    attend([q, k, v], mask, scale, softcap, true)
}

/// The output and, where `lse`, the denominators.
fn attend(
    [q, k, v]: [&Tensor; 3],
    mask: &TreeMask,
    scale: f32,
    softcap: Option<f32>,
    lse: bool,
) -> Result<(Tensor, Tensor), KernelError> {
    check_tensors(q, k, v, mask)?;
    for (name, number) in [("scale", Some(scale)), ("softcap", softcap)] {
        if let Some(found) = number.filter(|number| !(number.is_finite() && *number > 0.0)) {
            return Err(KernelError::Number { name, found });
        }
    }
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return crate::cuda::tree_attention([q, k, v], mask, scale, softcap, lse);
    }
    let wide = [q, k, v].map(|x| x.to_dtype(DType::F32)?.contiguous());
    let [wide_q, wide_k, wide_v] = wide;
    let (out, lse) = on_host([wide_q?, wide_k?, wide_v?], mask, scale, softcap, lse)?;
    Ok((out.to_dtype(q.dtype())?, lse))
}

fn check_tensors(q: &Tensor, k: &Tensor, v: &Tensor, mask: &TreeMask) -> Result<(), KernelError> {
    let shape = |name, expected: String, x: &Tensor| KernelError::Shape {
        name,
        expected,
        found: x.shape().clone(),
    };
    let (heads, head_dim) = match *q.dims() {
        [rows, heads, head_dim] if rows == mask.rows && heads % mask.group == 0 => {
            (heads, head_dim)
        }
        _ => {
            return Err(shape(
                "q",
                format!("[{}, a multiple of {}, head_dim]", mask.rows, mask.group),
                q,
            ));
        }
    };
    let expected = [mask.rows, heads / mask.group, head_dim];
    for (name, x) in [("k", k), ("v", v)] {
        if x.dims() != expected {
            return Err(shape(name, format!("{expected:?}"), x));
        }
        if x.dtype() != q.dtype() {
            return Err(KernelError::DType {
                name,
                expected: "of the dtype of q",
                found: x.dtype(),
            });
        }
        same_device(name, x, q)?;
    }
    if !q.dtype().is_float() {
        return Err(KernelError::DType {
            name: "q",
            expected: "a float",
            found: q.dtype(),
        });
    }
    same_device("the mask", &mask.depth, q)
}

/// One tile after the other, over all keys of its lists at once.
fn on_host(
    [q, k, v]: [Tensor; 3],
    mask: &TreeMask,
    scale: f32,
    softcap: Option<f32>,
    lse: bool,
) -> Result<(Tensor, Tensor), KernelError> {
    let (rows, heads, _) = q.dims3()?;
    if q.elem_count() == 0 {
        return Ok((
            q.clone(),
            Tensor::zeros((heads, rows), DType::F32, q.device())?,
        ));
    }
    let seen = Seen::new(mask)?;
    let tile_rows = query_block(mask.group);
    let (mut outs, mut denominators) = (Vec::new(), Vec::new());
    for (tile, first) in (0..rows).step_by(tile_rows).enumerate() {
        let queries = first..rows.min(first + tile_rows);
        let (keys, bias) = seen.tile(tile, queries.clone());
        let keys = Tensor::new(keys, q.device())?;
        let bias = Tensor::from_vec(bias, (1, queries.len(), 1, keys.elem_count()), q.device())?;
        // [key heads, queries × group, head_dim], [key heads, keys, head_dim]
        let own = q.narrow(0, first, queries.len())?;
        let own = own.reshape((queries.len(), heads / mask.group, mask.group, ()))?;
        let own = own.transpose(0, 1)?.contiguous()?;
        let by_head = |x: &Tensor| x.index_select(&keys, 0)?.transpose(0, 1)?.contiguous();
        let products = own
            .flatten(1, 2)?
            .matmul(&by_head(&k)?.transpose(1, 2)?.contiguous()?)?;
        let mut scores = (products * f64::from(scale))?;
        if let Some(cap) = softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let grouped = (
            heads / mask.group,
            queries.len(),
            mask.group,
            keys.elem_count(),
        );
        let scores = scores.reshape(grouped)?.broadcast_add(&bias)?;
        let peak = scores.max_keepdim(3)?;
        let weights = scores.broadcast_sub(&peak)?.exp()?;
        let total = weights.sum_keepdim(3)?;
        let mixed = weights
            .broadcast_div(&total)?
            .flatten(1, 2)?
            .matmul(&by_head(&v)?)?;
        outs.push(mixed.reshape(own.shape())?.transpose(0, 1)?.flatten(1, 2)?);
        if lse {
            // [key heads, queries, group] to [key heads × group, queries]
            let denominator = (total.log()? + peak)?.squeeze(3)?.transpose(1, 2)?;
            denominators.push(denominator.flatten(0, 1)?);
        }
    }
    let denominators = match lse {
        true => Tensor::cat(&denominators, 1)?,
        false => Tensor::zeros(0, DType::F32, q.device())?,
    };
    Ok((Tensor::cat(&outs, 0)?, denominators))
}

/// A mask on the host, as [`TreeMask`] has it.
struct Seen {
    window: Option<u32>,
    depth: Vec<u32>,
    lists: [Vec<u32>; 6],
}

/// A key of a block, its depth, and which rows see it.
struct Key {
    row: u32,
    depth: u32,
    seen_by: Range<u32>,
}

impl Seen {
    fn new(mask: &TreeMask) -> Result<Self, KernelError> {
        let mut lists = [const { Vec::new() }; 6];
        for (list, tensor) in lists.iter_mut().zip(&mask.lists) {
            *list = tensor.to_vec1()?;
        }
        Ok(Self {
            window: mask.window,
            depth: mask.depth.to_vec1()?,
            lists,
        })
    }

    /// The keys of the listed blocks, and what is added to the scores \[queries, keys\]: zero or -infinity.
    fn tile(&self, tile: usize, queries: Range<usize>) -> (Vec<u32>, Vec<f32>) {
        let [_, _, partial_offsets, partial, full_offsets, full] = &self.lists;
        let listed = |offsets: &[u32], blocks: &[u32]| {
            blocks[offsets[tile] as usize..offsets[tile + 1] as usize].to_vec()
        };
        let listed = [listed(partial_offsets, partial), listed(full_offsets, full)].concat();
        let keys: Vec<Key> = listed
            .into_iter()
            .flat_map(|block| self.keys(block))
            .collect();
        let bias = |query: usize, key: &Key| {
            let is_near = |size| self.depth[query] - key.depth < size;
            if key.seen_by.contains(&(query as u32)) && self.window.is_none_or(is_near) {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        };
        let bias = queries
            .flat_map(|query| keys.iter().map(move |key| bias(query, key)))
            .collect();
        (keys.iter().map(|key| key.row).collect(), bias)
    }

    /// Those of a block that are rows of the batch.
    fn keys(&self, block: u32) -> impl Iterator<Item = Key> {
        let [blocks, above, ..] = &self.lists;
        let [first, end, depth, start] = blocks.as_chunks().0[block as usize];
        let shared = depth % KEY_BLOCK as u32;
        let above = &above[start as usize..][..shared as usize];
        let above = above.iter().map(move |&row| (row, first));
        let rows = self.depth.len() as u32;
        let own = (first..rows.min(first + KEY_BLOCK as u32 - shared)).map(|row| (row, row));
        let keys = above.chain(own).zip(depth - shared..);
        keys.map(move |((row, first), depth)| Key {
            row,
            depth,
            seen_by: first..end,
        })
    }
}
