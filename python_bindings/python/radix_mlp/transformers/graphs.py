"""Replays of a folded decoder as CUDA graphs: a batch that is small for its GPU waits for no launch."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from radix_mlp.fold import Fold
from radix_mlp.torch.dispatch import unsupported
from radix_mlp.torch.eager import eager, eager_itself
from radix_mlp.torch.fold import pack, packed_size, sections
from radix_mlp.torch.forward_mask import ForwardMask, mask_kind
from radix_mlp.torch.tree import tree_attention
from radix_mlp.transformers.attention import KEYWORD, FoldedAttention
from radix_mlp.transformers.support import UnsupportedModelError

# Rows are padded to a multiple of this: one graph serves all batches that pad to its number.
STEP = 128
# Beyond, the GPU is busy for longer than its launches take.
MAX_ROWS = 16_384
MAX_GRAPHS = 32


class GraphAttention:
    """Tree attention whose masks stand in fixed memory: `load` puts another batch of as many rows there."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold
        self.masks: dict[int | None, FixedMask] = {}
        self.windows: Counter[int | None] = Counter()

    @eager
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None, window: int | None
    ) -> Tensor:
        self.windows[window] += 1
        if window not in self.masks:
            if problem := unsupported("tree", q, k, v, self.fold, softcap):
                raise UnsupportedModelError(f"CUDA graphs attend by the tree kernel, which {problem}")
            self.masks[window] = FixedMask(self.fold, q, k, window)
        mask = self.masks[window].mask
        return tree_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, softcap)

    def load(self, fold: Fold) -> None:
        for mask in self.masks.values():
            mask.load(fold)


class FixedMask:
    """A mask in memory that holds that of any fold of as many rows."""

    mask: ForwardMask

    def __init__(self, fold: Fold, q: Tensor, k: Tensor, window: int | None) -> None:
        self.kind, tiles = mask_kind(q)
        self.cut = tiles, q.shape[1] // k.shape[1], window
        sizes = {name: len(array) for name, array in self.kind.arrays(fold, *self.cut).items()}
        sizes |= self.kind.most(len(q), *self.cut[:2])
        self.memory = torch.zeros(packed_size(sizes.values()), dtype=torch.int32, device=q.device)
        self.mask = self.kind(tiles, window, **sections(self.memory, sizes))
        # What follows the last array need not be copied.
        sizes.popitem()
        self.sizes = sizes
        self.load(fold)

    def load(self, fold: Fold) -> None:
        """In one copy: each costs the host more time than what is copied costs the GPU."""
        arrays = self.kind.arrays(fold, *self.cut)
        sizes = {name: len(array) for name, array in arrays.items()} | self.sizes
        packed = pack(arrays, pinned=self.memory.is_cuda, sizes=sizes)
        self.memory[: len(packed)].copy_(packed, non_blocking=True)


class Graph:
    """One capture of the decoder, for batches of as many rows as that of `call`."""

    @eager_itself
    def __init__(
        self, forward: Callable[..., ModelOutput], decoder: nn.Module, call: dict[str, Any], pool: Any
    ) -> None:
        held = [module._parameters for module in decoder.modules()]
        weights = [(own, name, weight) for own in held for name, weight in own.items() if weight is not None]
        self.owners, self.names, self.weights = zip(*weights, strict=True)
        self.addresses = [weight.data_ptr() for weight in self.weights]
        fold, device = call[KEYWORD].fold, call["attention_mask"].device
        self.inputs = {name: ids.unsqueeze(0).to(device) for name, ids in _host_inputs(fold).items()}
        self.attend = GraphAttention(fold)
        arguments = {**call, **self.inputs, KEYWORD: self.attend}
        # A first run allocates and compiles, which no capture may; it runs on a stream of its own.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.attend.windows.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = forward(**arguments)

    @eager
    def is_current(self) -> bool:
        """Whether the weights still are those that were captured, where they were."""
        held = map(getitem, self.owners, self.names)
        return all(map(is_, held, self.weights)) and list(map(Tensor.data_ptr, self.weights)) == self.addresses

    @eager
    def replay(self, attend: FoldedAttention) -> ModelOutput:
        """The outputs for the rows of `attend`, in memory that the next replay overwrites."""
        for name, ids in _host_inputs(attend.fold).items():
            self.inputs[name].copy_(ids, non_blocking=True)
        self.attend.load(attend.fold)
        self.graph.replay()
        attend.windows.update(self.attend.windows)
        return self.output


@eager
def _host_inputs(fold: Fold) -> dict[str, Tensor]:
    """The decoder's `input_ids` and `position_ids` [rows], int64 in pinned memory."""
    arrays = {"input_ids": fold.input_ids, "position_ids": fold.position_ids}
    return sections(pack(arrays, torch.int64, pinned=True), dict.fromkeys(arrays, fold.num_rows))


class Graphs:
    """The graphs of one decoder, the last used of them."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        """A copy has none: graphs run on the weights that they were captured with."""
        return Graphs, ()

    @eager
    def takes(self, call: dict[str, Any]) -> bool:
        """Whether the decoder's call, on compact rows, can be replayed."""
        attend: FoldedAttention = call[KEYWORD]
        return bool(
            call["attention_mask"].is_cuda
            and attend.fold.num_rows <= MAX_ROWS
            and attend.copies is None
            and attend.backend in (None, "tree")
            and not call["use_cache"]
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
        )

    @eager_itself
    def run(self, forward: Callable[..., ModelOutput], decoder: nn.Module, call: dict[str, Any]) -> ModelOutput:
        """Replay the graph of this call's shape, captured first where there is none.

        The rows are those of the call's attention, whether the call has their ids or not.

        Raises UnsupportedModelError where the decoder cannot be captured.
        """
        options = tuple(sorted((name, value) for name, value in call.items() if isinstance(value, (bool, int, str))))
        key = (call[KEYWORD].fold.num_rows, options)
        if key in self.graphs and not self.graphs[key].is_current():
            del self.graphs[key]
        # Memory made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if key not in self.graphs:
                try:
                    self.graphs[key] = Graph(forward, decoder, call, self.pool)
                except RuntimeError as error:
                    name = type(decoder).__name__
                    raise UnsupportedModelError(f"{name} cannot be captured as a CUDA graph: {error}") from error
                if len(self.graphs) > MAX_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            return self.graphs[key].replay(call[KEYWORD])
