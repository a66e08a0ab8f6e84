"""How often a folded model decides otherwise: than the unfolded one, and than one computed in float32."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_forward.batches import Batch
from gpu_forward.models import padded, twin
from radix_mlp.transformers import folded

# What float32 computes in seconds.
MAX_TOKENS = 16_384
SAMPLED = 4096
# Qwen3's tokens, between which Qwen3-Reranker decides.
YES, NO = 9693, 2152


def flips(model: PreTrainedModel, batch: Batch, *, pairs: bool) -> dict[str, Any]:
    """Shares of decisions that differ, of the first sequences of `batch`, at most MAX_TOKENS.

    A decision is the most likely token after the last token of a sequence ("last"), or after each of up to SAMPLED
    tokens ("sampled"), by a head of the input embedding's weights; with `pairs` also which of two sequences has the
    larger logit of yes minus no ("pairs").
    """
    kept = first(batch)
    chunk = -(-len(kept) // 2)
    precise: Any = copy.deepcopy(model)
    decisions = {
        "float32": decide(states(precise.float(), kept, 1), model, kept, pairs=pairs),
        "none": decide(folded_states(model, kept, "none", len(kept)), model, kept, pairs=pairs),
        "half a batch": decide(folded_states(model, kept, "none", chunk), model, kept, pairs=pairs),
        "one at a time": decide(folded_states(model, kept, "none", 1), model, kept, pairs=pairs),
        "full": decide(folded_states(model, kept, "full", len(kept)), model, kept, pairs=pairs),
    }

    def differ(one: str, other: str) -> dict[str, float]:
        return {
            kind: round(float((decisions[one][kind] != decisions[other][kind]).double().mean()), 5)
            for kind in decisions[one]
        }

    return {
        "sequences": len(kept),
        "tokens": sum(map(len, kept)),
        "full from none": differ("full", "none"),
        "half a batch from none": differ("half a batch", "none"),
        "one at a time from none": differ("one at a time", "none"),
        "none from float32": differ("none", "float32"),
        "full from float32": differ("full", "float32"),
    }


def first(batch: Batch) -> Batch:
    kept = []
    tokens = 0
    for sequence in batch:
        tokens += len(sequence)
        if tokens > MAX_TOKENS:
            break
        kept.append(sequence)
    return kept


def folded_states(model: PreTrainedModel, batch: Batch, level: Any, chunk: int) -> Tensor:
    with folded(twin(model), level=level) as changed:
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
