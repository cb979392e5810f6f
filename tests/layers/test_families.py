# SPDX-License-Identifier: Apache-2.0
"""Models other than GPT with its plain attention: built by Megatron while the hook is installed, as scripts are."""

import copy

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec, get_t5_encoder_with_local_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from models import policy
from ranks import run_ranks
from torch_mamba import mamba_model

import megatron_comp as mc
from megatron_comp.inference.attention import CausalAttention
from megatron_comp.inference.model import init_parallel
from megatron_comp.layers.hook import Hook

RANKS, VOCABULARY, LENGTH = 2, 32, 10
IDS = torch.arange(2 * LENGTH).view(2, LENGTH)
UNMASKED = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)
CAUSAL = torch.ones_like(UNMASKED).triu(1)


def config(cls=TransformerConfig, **words):
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    without_cuda = {
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    return cls(tensor_model_parallel_size=RANKS, **(shape | without_cuda | words))


def latent_attention():
    """Multi-head latent attention, as DeepSeek has it."""
    multi_latent_attention.HAVE_TE = False  # Megatron 0.16 believes in Transformer Engine here once anything imports
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    ranks_of_heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8}
    words = {**ranks_of_heads, "v_head_dim": 24, "rope_type": "rope", "add_bias_linear": False}
    model = GPTModel(config(MLATransformerConfig, **words), spec, VOCABULARY, 32, position_embedding_type="none")
    return model, lambda: model(IDS, IDS, None)


def bert():
    model = BertModel(config(), 0, bert_layer_local_spec, VOCABULARY, 32)
    return model, lambda: model(IDS, torch.ones_like(IDS))[0]


def t5():
    specs = get_t5_encoder_with_local_block_spec(2), get_t5_decoder_with_local_block_spec(3)
    model = T5Model(config(num_layers=3), config(), *specs, VOCABULARY, 32)
    return model, lambda: model(IDS, IDS.flip(1), UNMASKED, CAUSAL, UNMASKED)


def mamba():
    model = mamba_model(VOCABULARY)
    return model, lambda: model(IDS, IDS, None)


FAMILIES = {
    "mla": (latent_attention, [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]),
    "bert": (bert, [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]),
    # Encoder, then decoder, whose layers have two attentions; both count their layers from 0.
    "t5": (
        t5,
        [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
        + [place for layer in range(3) for place in [(layer, "attention")] * 2 + [(layer, "mlp")]],
    ),
    "mamba": (mamba, [(0, "attention"), (1, "attention"), (2, "mlp"), (3, "attention")]),
}


def compressed_by_the_hook(rank, world_size, family):
    init_parallel(world_size)
    build, _ = FAMILIES[family]
    words = {"codec": "int8:32:fp16", "algorithm": "gather_sum"}
    hook = Hook(policy(**words))

    @torch.no_grad()
    def logits(forward):
        group = parallel_state.get_tensor_model_parallel_group()
        return gather_from_tensor_model_parallel_region(forward(), group=group)

    model, forward = build()
    model.eval()
    made = {"stock": logits(forward)}
    hook.install()
    ours, forward = build()
    ours.eval().load_state_dict(model.state_dict())
    made["compressed"], made["stats"] = logits(forward), copy.deepcopy(mc.stats(ours))
    mc.apply_compression(ours, policy(codec="none"))
    made["none"], made["none stats"] = logits(forward), copy.deepcopy(mc.stats(ours))
    mc.apply_compression(ours, policy(codec="int2:32:fp16"))
    made["coarse"] = logits(forward)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_compresses_every_sum(family):
    if family == "mamba":
        pytest.importorskip("einops", reason="Megatron's Mamba mixer needs it")
    places, ranks = FAMILIES[family][1], run_ranks(compressed_by_the_hook, RANKS, family)
    for made in ranks:
        assert torch.equal(made["none"], made["stock"])
        assert made["none stats"].kept_because == {"policy": len(places)}
        assert [(site.layer, site.site) for site in made["stats"].sites] == places
        assert [site.compressed.calls for site in made["stats"].sites] == [1] * len(places)
        assert made["stats"].kept.calls == 0
        spread = made["stock"].std()
        assert 0 < (made["compressed"] - made["stock"]).abs().max() < spread / 10
        # Errors follow the codec: 2 bits are far from 8.
        assert (made["coarse"] - made["stock"]).std() > 10 * (made["compressed"] - made["stock"]).std()
        assert torch.equal(made["compressed"], ranks[0]["compressed"])
