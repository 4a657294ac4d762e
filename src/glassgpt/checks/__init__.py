# Written by tools/tangle.py from book/23_command_line.ipynb: change it there.
"""The checks of all chapters.

Each takes an implementation and raises AssertionError with a message that names the
mistake. They need nothing but PyTorch.
"""

from glassgpt.checks.attention import (
    check_attention,
    check_causal,
    check_causal_mask,
    check_permutation_equivariant,
    check_previous_word,
    check_streaming_attention,
)
from glassgpt.checks.block import (
    check_additions,
    check_block,
    check_layer_norm,
    check_layer_norm_gradient,
    check_post_norm,
)
from glassgpt.checks.cli import check_mistakes
from glassgpt.checks.data import (
    check_batches,
    check_epochs,
    check_nats_per_character,
    check_split,
)
from glassgpt.checks.device import (
    check_days,
    check_fit_memory,
    check_padded_logits,
    check_rounding,
    check_scale,
)
from glassgpt.checks.embeddings import (
    check_analogy,
    check_cosine_similarity,
    check_embedding,
    check_embedding_gradient,
    check_lookup,
    check_matrix_product,
)
from glassgpt.checks.generation import (
    check_beam_search,
    check_cache,
    check_generate,
    check_min_p,
    check_sample,
    check_stream_text,
)
from glassgpt.checks.gpt import (
    check_budget,
    check_config,
    check_early_logits,
    check_gpt,
    check_parameter_count,
)
from glassgpt.checks.grading import catch, grade
from glassgpt.checks.heads import (
    check_causal_attention,
    check_contributions,
    check_fused_attention,
    check_grouped_attention,
    check_multi_head,
    check_split_heads,
)
from glassgpt.checks.mlp import (
    check_each_alone,
    check_gelu,
    check_mlp,
    check_mlp_backward,
    check_one_not_both,
    check_shared_weight,
)
from glassgpt.checks.modern import (
    check_orthogonalize,
    check_pool,
    check_reorder,
    check_rms_norm,
    check_rotary,
    check_rotary_tables,
    check_squared_relu_slope,
)
from glassgpt.checks.positions import (
    check_add_positions,
    check_shift_matrix,
    check_sinusoidal_positions,
)
from glassgpt.checks.runs import (
    check_interval,
    check_names,
    check_resume,
    check_round_trip,
    check_state,
    check_stop,
    check_whole_file,
)
from glassgpt.checks.softmax import (
    check_cross_entropy,
    check_cross_entropy_gradient,
    check_log_softmax,
    check_masked_softmax,
    check_one_pass,
    check_softmax,
)
from glassgpt.checks.speed import (
    check_groups,
    check_light,
    check_limit,
    check_round_rows,
)
from glassgpt.checks.tokens import (
    check_learn_merges,
    check_merge_word,
    check_special_tokens,
    check_split_numbers,
    check_split_words,
    check_tokenizer_round_trip,
)
from glassgpt.checks.training import (
    check_accumulation,
    check_adamw,
    check_clipping,
    check_evaluate,
    check_schedule,
    check_state_dict,
)

__all__ = [
    "catch",
    "check_accumulation",
    "check_adamw",
    "check_add_positions",
    "check_additions",
    "check_analogy",
    "check_attention",
    "check_batches",
    "check_beam_search",
    "check_block",
    "check_budget",
    "check_cache",
    "check_causal",
    "check_causal_attention",
    "check_causal_mask",
    "check_clipping",
    "check_config",
    "check_contributions",
    "check_cosine_similarity",
    "check_cross_entropy",
    "check_cross_entropy_gradient",
    "check_days",
    "check_each_alone",
    "check_early_logits",
    "check_embedding",
    "check_embedding_gradient",
    "check_epochs",
    "check_evaluate",
    "check_fit_memory",
    "check_fused_attention",
    "check_gelu",
    "check_generate",
    "check_gpt",
    "check_grouped_attention",
    "check_groups",
    "check_interval",
    "check_layer_norm",
    "check_layer_norm_gradient",
    "check_learn_merges",
    "check_light",
    "check_limit",
    "check_log_softmax",
    "check_lookup",
    "check_masked_softmax",
    "check_matrix_product",
    "check_merge_word",
    "check_min_p",
    "check_mistakes",
    "check_mlp",
    "check_mlp_backward",
    "check_multi_head",
    "check_names",
    "check_nats_per_character",
    "check_one_not_both",
    "check_one_pass",
    "check_orthogonalize",
    "check_padded_logits",
    "check_parameter_count",
    "check_permutation_equivariant",
    "check_pool",
    "check_post_norm",
    "check_previous_word",
    "check_reorder",
    "check_resume",
    "check_rms_norm",
    "check_rotary",
    "check_rotary_tables",
    "check_round_rows",
    "check_round_trip",
    "check_rounding",
    "check_sample",
    "check_scale",
    "check_schedule",
    "check_shared_weight",
    "check_shift_matrix",
    "check_sinusoidal_positions",
    "check_softmax",
    "check_special_tokens",
    "check_split",
    "check_split_heads",
    "check_split_numbers",
    "check_split_words",
    "check_squared_relu_slope",
    "check_state",
    "check_state_dict",
    "check_stop",
    "check_stream_text",
    "check_streaming_attention",
    "check_tokenizer_round_trip",
    "check_whole_file",
    "grade",
]
