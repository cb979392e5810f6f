# SPDX-License-Identifier: Apache-2.0
from megatron.core.transformer.transformer_config import TransformerConfig


def core_transformer_config_from_args(args):
    return TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        use_cpu_initialization=True,
        init_method_std=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
