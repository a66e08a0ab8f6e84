"""How often a folded model decides otherwise: than the unfolded one, and than one computed in float32."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_forward.batches import Batch
from gpu_forward.models import padded, twin
from gpu_forward.targets import OTHER_SIZES
from radix_mlp.transformers import folded

# What float32 computes in seconds.
MAX_TOKENS = 16_384
SAMPLED = 4096
# With a sequence more in front, of so many tokens: no multiple of a kernel's blocks, so that those of all others begin
# elsewhere. It is counted, and sets no limit.
ONE_MORE, MORE = "one more", 37
FROM_FLOAT32 = ("full", "padded", "query_folded")
# Qwen3's tokens, between which Qwen3-Reranker decides.
YES, NO = 9693, 2152


def flips(model: PreTrainedModel, batch: Batch, *, pairs: bool) -> dict[str, Any]:
    """How many decisions differ, of the first sequences of `batch`, at most MAX_TOKENS.

    A decision is the most likely token after the last token of a sequence ("last"), or after each of up to SAMPLED
    tokens ("sampled"), by a head of the input embedding's weights; with `pairs` also which of two sequences has the
    larger logit of yes minus no ("pairs").
    """
    kept = first(batch)
    made = computed(model, kept)
    decisions = {name: decide(of_way, model, kept, pairs=pairs) for name, of_way in made.items()}
    ways = [name for name in (*FROM_FLOAT32, *OTHER_SIZES, ONE_MORE) if name in made]
    by_tree = [name for name in made if name.startswith("tree ") and name != "tree none"]

    def differ(one: str, other: str) -> dict[str, int]:
        return {kind: int((decisions[one][kind] != decisions[other][kind]).sum()) for kind in decisions[one]}

    return {
        "sequences": len(kept),
        "tokens": sum(map(len, kept)),
        "decisions": {kind: len(found) for kind, found in decisions["none"].items()},
        **{f"{name} from none": differ(name, "none") for name in ways},
        **{f"{name} from tree none": differ(name, "tree none") for name in by_tree},
        **{f"{name} from float32": differ(name, "float32") for name in ("none", *FROM_FLOAT32) if name in made},
    }


def computed(model: PreTrainedModel, kept: Batch) -> dict[str, Tensor]:
    """The states of each way to compute `kept`."""
    whole, on_gpu = len(kept), model.device.type == "cuda"
    precise: Any = copy.deepcopy(model)
    made = {"float32": states(precise.float(), kept, 1)}
    del precise
    # FlashAttention is that of the column `none`.
    made |= unfolded(model, kept, "query_folded" if on_gpu else None)
    made["full"] = folded_states(model, kept, "full", whole)
    # What another kernel decides of every copy, and what the same one decides of the folded batch.
    made["padded"] = states(model, kept, whole)
    if on_gpu:
        made["query_folded"] = folded_states(model, kept, "full", whole, backend="query_folded")
        # The kernel that `full` picks, of every copy too: what differs then is the fold, or the size, alone.
        made |= {f"tree {name}": of_size for name, of_size in unfolded(model, kept, "tree").items()}
        made["tree full"] = folded_states(model, kept, "full", whole, backend="tree")
    return made


def unfolded(model: PreTrainedModel, kept: Batch, backend: Any) -> dict[str, Tensor]:
    """Of the whole batch ("none"), OTHER_SIZES and ONE_MORE, by one kernel: others would flip their own decisions."""
    whole = len(kept)
    sizes = {"none": whole, "half a batch": -(-whole // 2), "a quarter": -(-whole // 4)}
    sizes |= {"two at a time": 2, "one at a time": 1}
    made = {name: folded_states(model, kept, "none", size, backend) for name, size in sizes.items()}
    more = kept[0][:MORE]
    made[ONE_MORE] = folded_states(model, [more, *kept], "none", whole + 1, backend)[len(more) :]
    return made


def first(batch: Batch) -> Batch:
    kept = []
    tokens = 0
    for sequence in batch:
        tokens += len(sequence)
        if tokens > MAX_TOKENS:
            break
        kept.append(sequence)
    return kept


def folded_states(model: PreTrainedModel, batch: Batch, level: Any, chunk: int, backend: Any = None) -> Tensor:
    with folded(twin(model), level=level, backend=backend) as changed:
        return states(changed, batch, chunk)


@torch.inference_mode()
def states(model: PreTrainedModel, batch: Batch, chunk: int) -> Tensor:
    """The last hidden states of all tokens [N, hidden], of `chunk` sequences at a time."""
    parts = []
    for start in range(0, len(batch), chunk):
        ids, mask = (x.to(model.device) for x in padded(batch[start : start + chunk]))
        output = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        parts.append(output[mask.bool()])
    return torch.cat(parts)


@torch.inference_mode()
def decide(states: Tensor, model: PreTrainedModel, batch: Batch, *, pairs: bool) -> dict[str, Tensor]:
    """The decisions of `flips`; the head computes in float32, so that only the states differ."""
    head = embedding(model).float()
    ends = torch.tensor([len(ids) for ids in batch]).cumsum(0) - 1
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randperm(len(states), generator=generator)[:SAMPLED]
    result = {
        name: torch.cat(
            [(states[rows].float() @ head.T).argmax(-1) for rows in torch.split(index.to(states.device), 512)]
        )
        for name, index in (("last", ends), ("sampled", sampled))
    }
    if pairs:
        margin = states[ends.to(states.device)].float() @ (head[YES] - head[NO])
        one, other = torch.triu_indices(len(margin), len(margin), 1, device=margin.device)
        result["pairs"] = margin[one] > margin[other]
    return result


def embedding(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
