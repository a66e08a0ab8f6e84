"""Qwen3 models of random weights, written a layer at a time: an 8B model needs no 16 GB of memory here."""

import json
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3Config

from real_batches import DATA


def shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, head_dim: int = 128) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["Qwen3Model"],
        dtype="bfloat16",
    )


# 0.6B to 8B as published, without the LM head of 8B, which embedding does not use.
SHAPES = {
    "tiny": shape(64, 2, 2, 1, 128, 32),
    "100m": shape(768, 12, 12, 4, 2304, 64),
    "0.6b": shape(1024, 28, 16, 8, 3072),
    "4b": shape(2560, 36, 32, 8, 9728),
    "8b": shape(4096, 36, 32, 8, 12_288),
}


def write_model(name: str, directory: Path, device: str = "cpu") -> Path:
    """A Hugging Face directory with the weights in bfloat16: matrices of transformers' own start, norms of 1.

    They are drawn on `device`: for 8B a CPU takes minutes.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name]
    config.save_pretrained(directory)
    file = str(DATA / "qwen3-tokenizer" / "tokenizer.json")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=file, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    ).save_pretrained(directory)
    with torch.device("meta"):
        sizes = {key: tuple(value.shape) for key, value in AutoModel.from_config(config).state_dict().items()}  # type: ignore[no-untyped-call]
    draw = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}
    # "layers.3.mlp.up_proj.weight" is in the shard of "layers.3".
    for number, (_, keys) in enumerate(groupby(sizes, lambda key: key.split(".")[:2])):
        tensors = {key: _start(sizes[key], config.initializer_range, draw) for key in keys}
        shard = f"model-{number:05}.safetensors"
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, shard)
    # Last: a directory with an index is whole.
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def _start(size: tuple[int, ...], deviation: float, draw: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, device=draw.device).normal_(0, deviation, generator=draw).to("cpu", torch.bfloat16)
