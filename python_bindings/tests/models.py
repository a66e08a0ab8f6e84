"""The families of transformers models that folding is proven on or refuses, as tiny random models.

README.md's table of models is drawn from here: `python python_bindings/tests/models.py --write`.
"""

import argparse
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- models:start -->", "<!-- models:end -->"
LEVELS = ("none", "mlp", "full")

Options = dict[str, Any]

# Two queries a key head. Token 0 pads and is a word too: nothing may tell padding by its id.
TINY: Options = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Another width than the heads' together.
NARROW: Options = {"hidden_size": 48}
# Narrower than the sequences, and than what three layers of it reach back.
WINDOW: Options = {"sliding_window": 4}
MIXED: Options = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NO_WINDOW: Options = {"sliding_window": 64}
# Two of four experts, beside a shared one where the family has it, from the second layer on at the latest.
EXPERTS: Options = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ONE_EXPERT: Options = {"num_experts_per_tok": 1}
# Queries and keys of 8 dimensions with a rotary part of 8 behind them, values of 12.
LATENT: Options = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def rotary(rope_type: str, **parameters: Any) -> Options:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


ROTARY = rotary("default")
LLAMA3_ROTARY = rotary(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


def partial_rotary(factor: float) -> Options:
    return rotary("default", partial_rotary_factor=factor)


def llama4_scaling(beta: float) -> Options:
    return rotary("yarn", factor=4.0, original_max_position_embeddings=4, llama_4_scaling_beta=beta)


# The last two layers read the keys and values of the first two.
SHARED_KEYS: Options = {
    **WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
}
DBRX: Options = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10_000.0},
    "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
}
FALCON: Options = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "alibi": True,
}
# Of the families that have some by default.
NO_DROPOUT: Options = dict.fromkeys(
    ("attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "resid_pdrop", "residual_dropout"), 0.0
)
LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention"]
# What a refusal may call a layer that mixes tokens in another way than by attention.
STATE = "recurrent|linear attention|state|convolution"


def random_model(auto: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A model in f32 with weights under which every score, norm and bias matters: configs whose shapes agree agree
    in them. What starts at zeros or ones gets noise, matrices get ten times their usual size.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(False)
    return model


@dataclass(frozen=True)
class Family:
    """A causal decoder of transformers, as a tiny random config.

    `special` names what it has beside causal attention and a gated MLP, each with the changes to its
    config that take it away: none where nothing does without changing the weights.
    """

    name: str
    model_type: str
    special: dict[str, Options] = field(default_factory=dict)
    options: Options = field(default_factory=dict)

    def model(self, **changes: Any) -> PreTrainedModel:
        options = deepcopy({**TINY, **self.options, **changes})
        return random_model(AutoModelForCausalLM, AutoConfig.for_model(self.model_type, **options))


@dataclass(frozen=True)
class Refused:
    """A model that folding would compute wrongly; `reason` is a pattern of what the refusal says."""

    name: str
    model_type: str
    reason: str
    options: Options = field(default_factory=TINY.copy)
    auto: Any = AutoModelForCausalLM

    def model(self) -> PreTrainedModel:
        return random_model(self.auto, AutoConfig.for_model(self.model_type, **deepcopy(self.options)))


FAMILIES = [
    Family("Qwen3", "qwen3", {"query and key norms": {}}, NARROW),
    Family(
        "Qwen2",
        "qwen2",
        {"mixed windows": {"use_sliding_window": False}, "biased projections": {}},
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    Family("Llama", "llama"),
    Family(
        "Llama 3",
        "llama",
        {"scaled rotary frequencies": ROTARY},
        LLAMA3_ROTARY,
    ),
    Family(
        "Llama (YaRN)",
        "llama",
        {"scaled rotary frequencies": ROTARY},
        rotary("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    Family("Mistral", "mistral", {"sliding window": NO_WINDOW}, WINDOW),
    Family("Ministral", "ministral", {"mixed windows": NO_WINDOW}, MIXED),
    Family("Gemma", "gemma", {"one key head": {}}, {**NARROW, "num_key_value_heads": 1}),
    Family(
        "Gemma 2",
        "gemma2",
        {"soft-capped scores": {"attn_logit_softcapping": None}, "mixed windows": NO_WINDOW},
        {**NARROW, **MIXED, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        {"mixed windows": NO_WINDOW, "query and key norms": {}},
        {**NARROW, **MIXED, "query_pre_attn_scalar": 8},
    ),
    Family(
        "VaultGemma",
        "vaultgemma",
        {"soft-capped scores": {"attn_logit_softcapping": None}, "mixed windows": NO_WINDOW},
        {**MIXED, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    ),
    Family("Phi-3", "phi3", {"sliding window": NO_WINDOW, "one fused projection": {}}, WINDOW),
    Family("Phi-4 mini", "phi3", {"partial rotary": partial_rotary(1.0)}, partial_rotary(0.5)),
    Family(
        "Phi-3 (LongRoPE)",
        "phi3",
        {"rotary frequencies of the batch's length": ROTARY},
        {
            **rotary("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8),
            "original_max_position_embeddings": 8,
        },
    ),
    Family("Phi", "phi", {"partial rotary": partial_rotary(1.0), "parallel MLP": {}}, partial_rotary(0.5)),
    Family("OLMo", "olmo", {"norms without weights": {}}),
    Family("OLMo 2", "olmo2", {"norms behind the blocks": {}}),
    Family("OLMo 3", "olmo3", {"mixed windows": NO_WINDOW, "norms behind the blocks": {}}, MIXED),
    Family(
        "GPT-NeoX",
        "gpt_neox",
        {"partial rotary": partial_rotary(1.0), "parallel MLP": {"use_parallel_residual": False}},
        partial_rotary(0.25),
    ),
    Family("GPT-2", "gpt2", {"learned positions": {}}, NO_DROPOUT),
    Family("GPT-BigCode", "gpt_bigcode", {"learned positions": {}, "one key head": {}}, NO_DROPOUT),
    Family("OPT", "opt", {"learned positions": {}}, {**NO_DROPOUT, "ffn_dim": 96, "word_embed_proj_dim": 48}),
    Family("StarCoder2", "starcoder2", {"sliding window": NO_WINDOW, "biased projections": {}}, WINDOW),
    Family(
        "Granite",
        "granite",
        {"scale of its own": {"attention_multiplier": 0.25}},
        {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    ),
    Family("Cohere", "cohere", {"interleaved rotary": {}, "parallel MLP": {}}, {"use_qk_norm": True}),
    Family("Cohere 2", "cohere2", {"mixed windows": NO_WINDOW, "no rotary in full layers": {}}, MIXED),
    Family("GLM", "glm", {"partial rotary": partial_rotary(1.0)}, partial_rotary(0.5)),
    Family("GLM-4", "glm4", {"partial rotary": partial_rotary(1.0), "norms on both sides": {}}, partial_rotary(0.5)),
    Family(
        "SmolLM3",
        "smollm3",
        {"layers without rotary": {"no_rope_layers": [1, 1, 1]}},
        {"no_rope_layers": [1, 0, 1]},
    ),
    Family("EXAONE 4", "exaone4", {"mixed windows": NO_WINDOW, "no rotary in full layers": {}}, MIXED),
    Family("ERNIE 4.5", "ernie4_5", {"interleaved rotary": {}}),
    Family("Seed-OSS", "seed_oss", {"biased projections": {}}, {**NARROW, **NO_DROPOUT}),
    Family("Helium", "helium", {"interleaved rotary": {}}),
    Family("Arcee", "arcee", {"squared ReLU": {"hidden_act": "silu"}}),
    Family("Apertus", "apertus", {"learned activation": {}, "scaled rotary frequencies": ROTARY}, LLAMA3_ROTARY),
    Family("HunYuan", "hunyuan_v1_dense", {"query and key norms": {}}),
    Family("Persimmon", "persimmon", {"partial rotary": partial_rotary(1.0)}, partial_rotary(0.5)),
    Family("BitNet", "bitnet", {"norms within the blocks": {}}),
    Family("NanoChat", "nanochat", {"norms without weights": {}}),
    Family(
        "DiffLlama",
        "diffllama",
        {"difference of two attentions": {}},
    ),
    Family("ModernBERT decoder", "modernbert-decoder", {"mixed windows": NO_WINDOW}, MIXED),
    Family(
        "CWM",
        "cwm",
        {"mixed windows": NO_WINDOW, "scaled rotary frequencies": ROTARY},
        {**MIXED, **LLAMA3_ROTARY},
    ),
    Family(
        "Ministral 3",
        "ministral3",
        {"queries scaled by position": llama4_scaling(0.0)},
        llama4_scaling(0.5),
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        {"mixed windows": NO_WINDOW, "layers that share keys and values": {}, "parallel residual streams": {}},
        {**SHARED_KEYS, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "laurel_rank": 8},
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        {"mixed windows": NO_WINDOW, "layers that share keys and values": {}, "wider heads in full layers": {}},
        {**SHARED_KEYS, "global_head_dim": 32},
    ),
    Family(
        "DeepSeek-V2", "deepseek_v2", {"latent attention": {}, "mixture of experts": ONE_EXPERT}, {**LATENT, **EXPERTS}
    ),
    Family(
        "DeepSeek-V3", "deepseek_v3", {"latent attention": {}, "mixture of experts": ONE_EXPERT}, {**LATENT, **EXPERTS}
    ),
    Family("MiniCPM3", "minicpm3", {"latent attention": {}}, LATENT),
    *(
        Family(name, model_type, {"mixture of experts": ONE_EXPERT}, EXPERTS)
        for name, model_type in {
            "Qwen3-MoE": "qwen3_moe",
            "Qwen2-MoE": "qwen2_moe",
            "OLMoE": "olmoe",
            "FlexOlmo": "flex_olmo",
            "Granite-MoE": "granitemoe",
            "GLM-4-MoE": "glm4_moe",
            "MiniMax-M2": "minimax_m2",
            "dots.llm1": "dots1",
            "HunYuan-MoE": "hunyuan_v1_moe",
        }.items()
    ),
    Family(
        "Mixtral", "mixtral", {"mixture of experts": ONE_EXPERT, "sliding window": NO_WINDOW}, {**EXPERTS, **WINDOW}
    ),
    Family("Phi-3.5-MoE", "phimoe", {"mixture of experts": {}}, EXPERTS),
    Family("AFMoE", "afmoe", {"mixture of experts": ONE_EXPERT, "mixed windows": NO_WINDOW}, {**EXPERTS, **MIXED}),
    Family(
        "ERNIE 4.5-MoE",
        "ernie4_5_moe",
        {"mixture of experts": {"moe_k": 1}},
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    ),
    Family("JetMoE", "jetmoe", {"mixture of experts and of attention heads": ONE_EXPERT}, EXPERTS),
    Family("DBRX", "dbrx", {"mixture of experts": {}, "clipped projections": {}}, DBRX),
]

REFUSED = [
    Refused("BLOOM", "bloom", "ALiBi"),
    Refused("MPT", "mpt", "ALiBi", {"vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2}),
    Refused("Falcon with ALiBi", "falcon", "ALiBi", FALCON),
    Refused("BERT", "bert", "bidirectional|encoder", auto=AutoModel),
    Refused("XLM-RoBERTa", "xlm-roberta", "bidirectional|encoder", auto=AutoModel),
    Refused("T5", "t5", "encoder", {**TINY, "d_kv": 16, "d_ff": 96}, auto=AutoModel),
    Refused("EmbeddingGemma", "gemma3_text", "bidirectional", {**TINY, **MIXED, "use_bidirectional_attention": True}),
    Refused("Llama made bidirectional", "llama", "bidirectional", {**TINY, "is_causal": False}),
    Refused("Llama 4", "llama4_text", "chunk", {**TINY, **EXPERTS, "attention_chunk_size": 4}),
    Refused("gpt-oss", "gpt_oss", "sink", {**TINY, **EXPERTS, **MIXED}),
    Refused("Doge", "doge", "mask|test batch"),
    Refused("DeepSeek-V3.2", "deepseek_v32", "sparse|index", {**TINY, **LATENT, **EXPERTS}),
    Refused("Mamba", "mamba", STATE),
    Refused("Jamba", "jamba", STATE, {**TINY, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Refused("Qwen3-Next", "qwen3_next", STATE, {**TINY, **EXPERTS, "layer_types": LINEAR_AND_FULL}),
    Refused("RecurrentGemma", "recurrent_gemma", STATE),
    Refused("MiniMax", "minimax", STATE, {**TINY, **EXPERTS}),
    Refused("LFM2", "lfm2", STATE, {**TINY, "layer_types": ["conv", "full_attention", "conv"]}),
    # It does not tell its attention of the window.
    Refused("Phi-3.5-MoE with a window", "phimoe", "window", {**TINY, **EXPERTS, **WINDOW}),
    # Rotary and causal, but its attention is its own code and not transformers' replaceable function.
    Refused("Nemotron", "nemotron", "attention"),
]


def table() -> str:
    """README.md's table of `FAMILIES`, in Markdown."""
    levels = ", ".join(f"`{level}`" for level in LEVELS)
    rows = ["| model | `model_type` | what is special | levels proven |", "|---|---|---|---|"]
    rows += [
        f"| {family.name} | `{family.model_type}` | {', '.join(family.special)} | {levels} |" for family in FAMILIES
    ]
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """The text of README.md with today's table between its markers."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print README.md's table of models.")
    parser.add_argument("--write", action="store_true", help="rewrite the table in README.md instead")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
