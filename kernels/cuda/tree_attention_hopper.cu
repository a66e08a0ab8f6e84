#include <tree_attention_hopper.cuh>

TREE_ATTENTION_HOPPER(tree_attention_hopper_f16_64, __half, 64)
TREE_ATTENTION_HOPPER(tree_attention_hopper_f16_128, __half, 128)
TREE_ATTENTION_HOPPER(tree_attention_hopper_bf16_64, __nv_bfloat16, 64)
TREE_ATTENTION_HOPPER(tree_attention_hopper_bf16_128, __nv_bfloat16, 128)
