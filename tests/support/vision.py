# SPDX-License-Identifier: Apache-2.0
"""A small random LLaVA without Transformer Engine: a language model, a vision tower, and a projector between them."""

from functools import partialmethod
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

LANGUAGE_LAYERS, VISION_LAYERS = 3, 2
IMAGE, PATCH = 56, 14
TOKENS = (IMAGE // PATCH) ** 2 + 1  # of an image, with that of the class


def llava() -> LLaVAModel:
    """Of hidden size 64, its vision tower a CLIP ViT for images of 56 x 56."""
    language, vision = small_config(LANGUAGE_LAYERS), small_config(VISION_LAYERS)
    language.language_model_type, vision.vision_model_type = "any", "clip"
    mlp = get_mlp_module_spec(use_te=False)
    torch.manual_seed(0)
    # The tower's norms are Transformer Engine's otherwise, whatever the spec says.
    init = partialmethod(CLIPViTModel.__init__, ln_pre_impl=WrappedTorchNorm, ln_post_impl=WrappedTorchNorm)
    with patch.object(CLIPViTModel, "__init__", init), patch.object(torch.Tensor, "cuda", lambda self: self):
        return LLaVAModel(
            language_transformer_config=language,
            language_transformer_layer_spec=get_gpt_layer_local_spec(),
            language_vocab_size=256,
            language_max_sequence_length=128,
            vision_transformer_config=vision,
            vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
            drop_vision_class_token=False,
            vision_projection_config=small_config(1, ffn_hidden_size=72),
            vision_projection_layer_spec=mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"],
            img_h=IMAGE,
            img_w=IMAGE,
            patch_dim=PATCH,
        ).eval()


def small_config(layers: int, **words) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **words,
    )
