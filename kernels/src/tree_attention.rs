use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};

use crate::KernelError;
use crate::rows::same_device;

/// Queries that a kernel computes together: rows times the query heads of one key head.
pub const TILE: usize = 128;
/// Rows in a key block.
pub const KEY_BLOCK: usize = 64;

/// Rows in a query block, where `group` query heads share a key head.
pub fn query_block(group: usize) -> usize {
    TILE / group.clamp(1, TILE)
}

/// Key blocks for each query block, for blocks of [`query_block`] by [`KEY_BLOCK`] rows: list `b` is
/// `blocks[offsets[b]..offsets[b + 1]]`. What `radix_mlp::BlockMask` has.
#[derive(Clone, Copy, Debug)]
pub struct Lists<'a> {
    /// \[query blocks + 1\].
    pub offsets: &'a [usize],
    /// The lists, one after another.
    pub blocks: &'a [u32],
}

/// Launches of a kernel that find a counter in their mask: more than a model has layers.
const COUNTERS: usize = 128;

/// What attention needs to know of a batch: row q sees row k if and only if `k <= q < subtree_end[k]` and, with a window,
/// `depth[q] - depth[k] < window`.
#[derive(Clone, Debug)]
pub struct TreeMask {
    pub(crate) rows: usize,
    pub(crate) group: usize,
    pub(crate) window: Option<u32>,
    /// \[rows\], u32.
    pub(crate) subtree_end: Tensor,
    /// \[rows\], u32; read with a window only.
    pub(crate) depth: Tensor,
    /// Offsets and blocks of the lists of blocks that are seen whole, then in part, u32.
    pub(crate) lists: [Tensor; 4],
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
    /// A mask on `device` for `group` query heads to a key head, from a fold in depth-first layout: its `subtree_end`
    /// \[rows\], the lists of blocks all of whose keys each of a query block's rows sees, the lists of those of which some
    /// row sees some key and, with a window, its size and the depths of the rows \[rows\].
    ///
    /// # Errors
    ///
    /// [`KernelError::Mask`] for what are not lists of the blocks of so many rows.
    pub fn new(
        subtree_end: &[u32],
        [full, partial]: [Lists<'_>; 2],
        group: usize,
        window: Option<(u32, &[u32])>,
        device: &Device,
    ) -> Result<Self, KernelError> {
        let rows = subtree_end.len();
        if group == 0 || group > TILE {
            return Err(KernelError::Mask(format!(
                "group must be in 1..={TILE}, got {group}"
            )));
        }
        let offsets = [
            checked("full", full, rows, group)?,
            checked("partial", partial, rows, group)?,
        ];
        if let Some((size, depth)) = window
            && (size == 0 || depth.len() != rows)
        {
            let depths = depth.len();
            let message =
                format!("a window needs a size and {rows} depths, got {size} and {depths}");
            return Err(KernelError::Mask(message));
        }
        let depth = window.map_or(&[][..], |(_, depth)| depth);
        let [full_offsets, partial_offsets] = &offsets;
        let zeros = &[0; COUNTERS];
        // One transfer: each takes longer to begin than all of them to do.
        let arrays = [
            subtree_end,
            depth,
            full_offsets,
            full.blocks,
            partial_offsets,
            partial.blocks,
            zeros,
        ];
        let together = Tensor::new(arrays.concat(), device)?;
        let mut start = 0;
        let mut next = |array: &[u32]| {
            start += array.len();
            together.narrow(0, start - array.len(), array.len())
        };
        Ok(Self {
            rows,
            group,
            window: window.map(|(size, _)| size),
            subtree_end: next(subtree_end)?,
            depth: next(depth)?,
            lists: [
                next(full_offsets)?,
                next(full.blocks)?,
                next(partial_offsets)?,
                next(partial.blocks)?,
            ],
            counters: Counters {
                zeros: next(zeros)?,
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

    /// All arrays, in the order of the kernels' arguments.
    #[cfg(feature = "cuda")]
    pub(crate) fn numbers(&self) -> [&Tensor; 6] {
        let [full_offsets, full, partial_offsets, partial] = &self.lists;
        let (subtree_end, depth) = (&self.subtree_end, &self.depth);
        [
            subtree_end,
            depth,
            full_offsets,
            full,
            partial_offsets,
            partial,
        ]
    }
}

/// The offsets, as the kernels read them.
fn checked(
    name: &str,
    lists: Lists<'_>,
    rows: usize,
    group: usize,
) -> Result<Vec<u32>, KernelError> {
    let Lists { offsets, blocks } = lists;
    let tiles = rows.div_ceil(query_block(group));
    let ends = (offsets.first().copied(), offsets.last().copied());
    if offsets.len() != tiles + 1 || ends != (Some(0), Some(blocks.len())) || !offsets.is_sorted() {
        let lists = offsets.len().saturating_sub(1);
        let count = blocks.len();
        let message = format!(
            "{name} must be {tiles} lists of {count} blocks, got {lists} with ends {ends:?}"
        );
        return Err(KernelError::Mask(message));
    }
    let key_blocks = rows.div_ceil(KEY_BLOCK);
    if let Some(at) = blocks
        .iter()
        .position(|&block| block as usize >= key_blocks)
    {
        let message = format!("{name}[{at}] is block {}, of {key_blocks}", blocks[at]);
        return Err(KernelError::Mask(message));
    }
    let narrow = offsets.iter().map(|&offset| u32::try_from(offset));
    narrow
        .collect::<Result<_, _>>()
        .map_err(|_| KernelError::Mask(format!("{name} has {} blocks, too many", blocks.len())))
}

/// Attention of a folded batch: `q` \[rows, heads, head_dim\] over `k` and `v` \[rows, key heads, head_dim\], as `q`.
///
/// Scores are products times `scale`, capped as `softcap * tanh(score / softcap)` where that is given (Gemma 2). Softmax
/// and sums are float32. On CUDA f16 and bf16, of head_dim 64 and 128; on the CPU any float. Not differentiable.
/// FlashAttention-2 (arXiv 2307.08691) over block lists.
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
    same_device("the mask", &mask.subtree_end, q)
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
        let (keys, bias) = seen.tile(tile, queries.clone(), mask.window);
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

/// A mask on the host.
struct Seen {
    subtree_end: Vec<u32>,
    depth: Vec<u32>,
    full_offsets: Vec<u32>,
    full: Vec<u32>,
    partial_offsets: Vec<u32>,
    partial: Vec<u32>,
}

impl Seen {
    fn new(mask: &TreeMask) -> Result<Self, KernelError> {
        let [full_offsets, full, partial_offsets, partial] = &mask.lists;
        Ok(Self {
            subtree_end: mask.subtree_end.to_vec1()?,
            depth: mask.depth.to_vec1()?,
            full_offsets: full_offsets.to_vec1()?,
            full: full.to_vec1()?,
            partial_offsets: partial_offsets.to_vec1()?,
            partial: partial.to_vec1()?,
        })
    }

    /// The keys of the listed blocks, and what is added to the scores \[queries, keys\]: zero or -infinity.
    fn tile(
        &self,
        tile: usize,
        queries: Range<usize>,
        window: Option<u32>,
    ) -> (Vec<u32>, Vec<f32>) {
        let rows = self.subtree_end.len();
        let list = |offsets: &[u32], blocks: &[u32], whole: bool| {
            let listed = &blocks[offsets[tile] as usize..offsets[tile + 1] as usize];
            let rows_of = |&block: &u32| {
                let first = block as usize * KEY_BLOCK;
                (first..rows.min(first + KEY_BLOCK)).map(move |key| (key, whole))
            };
            listed.iter().flat_map(rows_of).collect::<Vec<_>>()
        };
        let mut keys = list(&self.full_offsets, &self.full, true);
        keys.extend(list(&self.partial_offsets, &self.partial, false));
        let bias = |query: usize, &(key, whole): &(usize, bool)| {
            let ancestor = whole || key <= query && query < self.subtree_end[key] as usize;
            let near = || window.is_none_or(|size| self.depth[query] - self.depth[key] < size);
            if ancestor && near() {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        };
        let bias = queries
            .flat_map(|query| keys.iter().map(move |key| bias(query, key)))
            .collect();
        (keys.into_iter().map(|(key, _)| key as u32).collect(), bias)
    }
}
