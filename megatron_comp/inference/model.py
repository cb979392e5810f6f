# SPDX-License-Identifier: Apache-2.0
"""Builds a Llama or Mixtral checkpoint as a tensor-parallel Megatron-Core GPTModel, and starts the ranks it runs on."""

import os
from collections.abc import Container
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..wire.together import join_job
from . import checkpoint, cpu, environment, hf, model_files, shards
from .attention import CausalAttention

RNG_SEED = 1  # Megatron wants its generators seeded, though inference draws no numbers


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor Megatron calls. Megatron's wrapper of it refuses sequence parallelism."""

    def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def init_parallel(
    tensor_parallel: int, timeout_seconds: float = 600, expert_parallel: int = 1, pipeline_parallel: int = 1
) -> None:
    """Joins this process to its tensor-parallel group: torch.distributed (`env://`), Megatron's groups, the device.

    With `expert_parallel` groups, each holds a share of the experts of a mixture and a copy of all else. With
    `pipeline_parallel` stages, each holds a share of the layers; consecutive ranks are of one stage.

    Uses a process group that stands already; does nothing if Megatron's groups of that size stand too.
    A single rank needs no launcher. A dead peer or link ends a collective in an error after `timeout_seconds`.

    Raises ValueError if the world is not of the product of these ranks or has more ranks on a machine than it has GPUs.
    """
    cpu.prepare()
    world_size = dist.get_world_size() if dist.is_initialized() else environment.world_size() or 1
    ranks = tensor_parallel * expert_parallel * pipeline_parallel
    if world_size != ranks:
        asked = f"tensor_parallel is {tensor_parallel}"
        asked += f" and expert_parallel {expert_parallel}" if expert_parallel > 1 else ""
        asked += f" and pipeline_parallel {pipeline_parallel}" if pipeline_parallel > 1 else ""
        raise ValueError(
            f"{asked}, but {world_size} rank(s) were started: start them with torchrun --nproc-per-node {ranks}"
        )
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"rank {local_rank} of this machine has no GPU: it has {gpus}")
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            join_job(timeout)
        else:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if parallel_state.model_parallel_is_initialized():
        for name, size, standing in (
            ("tensor", tensor_parallel, parallel_state.get_tensor_model_parallel_world_size()),
            ("pipeline", pipeline_parallel, parallel_state.get_pipeline_model_parallel_world_size()),
        ):
            if standing != size:
                raise ValueError(f"{name}_parallel is {size}, but Megatron's groups stand with {standing}")
    else:
        parallel_state.initialize_model_parallel(
            tensor_parallel,
            pipeline_parallel,
            expert_model_parallel_size=expert_parallel,
            expert_tensor_parallel_size=tensor_parallel,
            distributed_timeout_minutes=timeout_seconds / 60,
        )
        # The tracker for inference is the one that does not ask for a CUDA generator.
        model_parallel_cuda_manual_seed(RNG_SEED, inference_rng_tracker=True, force_reset_rng=True)


def destroy_parallel() -> None:
    """Undoes `init_parallel`, the process group included. Does nothing if nothing stands."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def build_model(
    model_dir,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    max_sequence_length: int | None = None,
    token_dispatcher: str = "allgather",
    extra_weights=None,
) -> GPTModel:
    """The checkpoint in `model_dir` as this rank's part of a GPTModel: weights loaded, in eval mode, without gradients.

    A pipeline stage's part has the stage's layers, the first one's the embedding, the last one's the output layer.

    Call `init_parallel` first. dtype: of weights and activations. max_sequence_length: the most tokens of prompt and
    answer together, by default what the checkpoint was made for. token_dispatcher: Megatron's word for how the tokens
    of a mixture reach their experts, allgather or alltoall. extra_weights: a safetensors file of weights that take the
    place of the checkpoint's, made for this number of ranks. `model.hf_config` is the checkpoint's own config.

    Raises ValueError if the checkpoint is not one that can be built, or not on so many ranks and stages;
    FileNotFoundError or ValueError if its weights are incomplete or damaged.
    """
    cpu.prepare()
    if token_dispatcher == "alltoall":
        cpu.prepare_streams()
    config = hf.read_config(model_dir)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    shards.check_tensor_parallel(config, tp)
    shards.check_pipeline_parallel(config, parallel_state.get_pipeline_model_parallel_world_size())
    longest = config.max_position_embeddings
    if not 1 <= (max_sequence_length or longest) <= longest:
        raise ValueError(f"max_sequence_length is {max_sequence_length}, this model allows 1 to {longest}")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.embd = None  # both stages with tied embeddings read them: Megatron need not send them, by way of CUDA
    megatron_config = _transformer_config(config, tp, dtype, sequence_parallel, token_dispatcher)
    model = GPTModel(
        config=megatron_config,
        transformer_layer_spec=_block_spec(config, get_num_layers_to_build(megatron_config)),
        vocab_size=shards.padded_vocab_size(config, tp),
        max_sequence_length=max_sequence_length or longest,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        pg_collection=groups,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_parameters["rope_theta"],
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model.to(device).eval().requires_grad_(False)
    if config.rope_parameters["rope_type"] != "default":
        # transformers' own frequencies, so that each of its scaling rules holds with any parameters; Megatron's
        # rope_scaling knows one rule and fixes all its parameters but one.
        inv_freq, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, device)
        model.rotary_pos_emb.inv_freq = inv_freq
    if megatron_checkpoint := model_files.find_distributed(model_dir):
        if extra_weights is not None:
            model_files.check_read_by_layer(model_dir)
        checkpoint.load(model, megatron_checkpoint, config.vocab_size)
    else:
        hf.load_weights(model, model_dir, config, _share(), extra_weights)
    model.hf_config = config
    return model


def reload_layers(model: GPTModel, model_dir, layers: Container[int], extra_weights=None) -> None:
    """Reads the weights of some layers of a built model again, with or without those that take their place."""
    hf.load_weights(model, model_dir, model.hf_config, _share(), extra_weights, layers)


def _share() -> shards.Share:
    """This rank's part of every weight."""
    return shards.Share(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def _transformer_config(
    config, tp: int, dtype: torch.dtype, sequence_parallel: bool, token_dispatcher: str
) -> TransformerConfig:
    made = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=shards.head_dim(config),
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        **_stage_options(config),
        sequence_parallel=sequence_parallel and tp > 1,  # with one rank there is nothing to split
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        perform_initialization=False,  # every parameter is read from the checkpoint
        **(_mixture_options(config, token_dispatcher) if shards.is_mixture(config) else {}),
        # Fusions that need CUDA, and gain nothing without biases and dropout.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **cpu.config_options(),
    )
    # Before it had been built Megatron would have refused one expert per token without this switch, with which it
    # weights the expert by its share of all. Mixtral gives it the weight 1.
    made.moe_router_pre_softmax = False
    return made


def _stage_options(config) -> dict[str, int]:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    of_stages = shards.layers_of_stages(config.num_hidden_layers, stages)
    options = {"pipeline_model_parallel_size": stages}
    if len(set(of_stages)) > 1:
        options["num_layers_in_first_pipeline_stage"] = of_stages[0]
        options["num_layers_in_last_pipeline_stage"] = of_stages[-1]
    return options


def _mixture_options(config, token_dispatcher: str) -> dict[str, object]:
    return {
        "num_moe_experts": config.num_local_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.intermediate_size,
        "moe_token_dispatcher_type": token_dispatcher,
        "moe_router_load_balancing_type": "none",
        # Weights are a softmax over the chosen logits, which equals Mixtral's softmax over all of them, renormalized:
        # not before, but see `_transformer_config` of one expert.
        "moe_router_pre_softmax": config.num_experts_per_tok == 1,
        # In 16 bits, near ties would be decided by rounding.
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }


def _block_spec(config, layers: int) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(getattr(config, "num_local_experts", None), normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    if shards.is_mixture(config):
        # Saved under its own name, as with Transformer Engine: only a dense MLP has this norm in its first linear.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
