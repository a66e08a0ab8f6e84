"""One of several processes that train a folded model. Arguments: a kind, logits, rank, ranks, a file they share.

Kinds are "ddp", "fsdp", and "fsdp_head", which shards the head by itself. Logits are made "once", or "again" in the
backward pass, as those of a large head are.
"""

import faulthandler
import os
import sys
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from radix_mlp.torch import BalancedBatchSampler, logits
from radix_mlp.transformers import fold

# Groups of three completions, of different lengths, so that ranks have different numbers of tokens.
GROUPS = [[[1, 2, 3, group, *range(group)] + [tail] * 4 for tail in range(3)] for group in range(4, 12)]
SEQUENCES = [sequence for group in GROUPS for sequence in group]
LABELS = sum(len(sequence) - 1 for sequence in SEQUENCES)
SECONDS = 240


def make() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        tie_word_embeddings=False,
    )
    model: Qwen3ForCausalLM = Qwen3ForCausalLM(config).double()
    return model


def padded(indices: list[int]) -> dict[str, Tensor]:
    rows = [torch.tensor(SEQUENCES[index]) for index in indices]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    parts: Any = model
    for layer in parts.model.layers:
        fully_shard(layer, mesh=mesh)
    if kind == "fsdp_head":
        fully_shard(parts.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def main() -> None:
    kind, made, rank, ranks, shared = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    if made == "again":
        logits.LARGE_SUMS = 0
    distributed.init_process_group("gloo", init_method=f"file://{shared}", rank=rank, world_size=ranks)
    plain = make().train()
    everything = padded(list(range(len(SEQUENCES))))
    labels = everything.pop("labels")[:, 1:]
    # In float64, where transformers' own loss is float32.
    every = plain(**everything).logits[:, :-1]
    loss = nn.functional.cross_entropy(every.flatten(0, 1), labels.flatten())
    torch.autograd.backward(loss)

    model = fold(make().train())
    wrapped = wrap(model, kind)
    sampler = BalancedBatchSampler(SEQUENCES, unique_tokens=1000)
    (batch,) = sampler
    assert len(batch) < len(SEQUENCES)
    # Gradients are averaged over ranks: each loss is divided by its share of the labels of all.
    output = wrapped(**padded(batch), num_items_in_batch=LABELS / ranks)
    assert output.logits is None
    output.loss.backward()

    expected = {name: whole(parameter.grad) for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        difference = (whole(parameter.grad) - expected[name]).abs().max() / expected[name].abs().max()
        # transformers' norms are float32 in every model, and round to 6e-8.
        assert difference < 1e-6, f"{name} differs by {difference:.1e}"
    assert len(list(model.named_parameters())) == len(expected)
    distributed.barrier()


if __name__ == "__main__":
    # A process that hangs says where.
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main()
    # At the interpreter's end gloo's threads may still run, and abort the process.
    os._exit(0)
