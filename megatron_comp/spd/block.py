# SPDX-License-Identifier: Apache-2.0
"""Blocks of a Llama or Mixtral in one process, computed as any number of ranks would compute them, with gradients.

Modules and weights are transformers' own, whole; ranks are slices of heads and of the MLP's neurons, as Megatron shards
them. So the gradient of rank i's attention comes from rank i's MLP, which Megatron's own backward would mix over ranks.
"""

import copy
from collections.abc import Collection, Iterator

import torch
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from ..inference.hf import Checkpoint
from ..inference.shards import WHOLE, Piece, is_mixture, plan
from ..layers.predictor_file import Regression


class Block(torch.nn.Module):
    """One decoder layer in float32."""

    def __init__(self, config, layer: int, checkpoint: Checkpoint) -> None:
        super().__init__()
        config = copy.copy(config)
        config._attn_implementation = "sdpa"
        self.is_mixture = is_mixture(config)
        self.number, self.modules_of = layer, (MixtralDecoderLayer if self.is_mixture else LlamaDecoderLayer)(config, 0)
        with torch.no_grad():
            if self.is_mixture:
                read_experts(self.modules_of.mlp, config, layer, checkpoint)
            for name, parameter in self.modules_of.named_parameters():
                if not (self.is_mixture and name.startswith("mlp.")):
                    weight = read_whole(checkpoint, self._name(name), parameter.shape)
                    parameter.copy_(weight)
        self.stored_in = weight.dtype

    def forward(
        self, x: torch.Tensor, rope: tuple, ranks: int = 1, predictor: Regression | None = None
    ) -> torch.Tensor:
        """`[windows, context, hidden]` to the block's output; with more ranks than one, without attention's sum.

        One rank is the stock block: what it adds before its MLP is all there is to add.
        predictor: of attention's sum; each rank's MLP then sees the other ranks' predicted partial sums as well, and
        the response to what it does not see is added.
        """
        partial = split_columns(self.heads(x, rope), self.modules_of.self_attn.o_proj.weight, ranks)
        seen = x + partial
        if predictor:
            predicted = predictor.partial_sums(x)
            seen = seen + predicted.sum(0) - predicted
            if response := predictor.response:
                partial, x = predicted + response.added_to(partial - predicted), x + response.bias
        return x + (partial + self.mlp_sums(seen)).sum(0)

    def mlp_sums(self, h: torch.Tensor) -> torch.Tensor:
        """Each rank's partial sum of the MLP or the experts, of what each rank has before their norm
        `[ranks, windows, context, hidden]`; the same shape."""
        split = split_experts if self.is_mixture else split_mlp
        return split(self.modules_of.mlp, self.modules_of.post_attention_layernorm(h), len(h))

    def heads(self, x: torch.Tensor, rope: tuple) -> torch.Tensor:
        """What attention's output projection is given, `[windows, context, heads * head size]`."""
        seen = []
        hook = self.modules_of.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.modules_of.self_attn(self.modules_of.input_layernorm(x), rope, None)
        hook.remove()
        return seen[0]

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.modules_of.self_attn.config.num_key_value_heads

    @torch.no_grad()
    def attention_scores(self, x: torch.Tensor, rope: tuple) -> torch.Tensor:
        """Attention's weights, after the softmax, averaged over windows: `[heads, context, context]`."""
        attention, tokens = self.modules_of.self_attn, x.shape[1]
        hidden = torch.full((tokens, tokens), float("-inf"), device=x.device).triu(1)[None, None]
        total = 0.0
        attention.config._attn_implementation = "eager"  # the one that tells its weights
        for window in x:
            total = total + attention(self.modules_of.input_layernorm(window[None]), rope, hidden)[1][0]
        attention.config._attn_implementation = "sdpa"
        return total / len(x)

    def replaced(self, weights: dict[str, torch.Tensor]) -> "Block":
        """A copy with other weights, by the names of its parameters."""
        other = copy.deepcopy(self)
        other.modules_of.load_state_dict(weights, strict=False)
        return other

    def named(self, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Its own weights, or those given by parameters' names, under the checkpoint's names and in its dtype."""
        weights = dict(self.modules_of.named_parameters()) if weights is None else weights
        return {self._name(name): each.detach().to("cpu", self.stored_in, copy=True) for name, each in weights.items()}

    def _name(self, parameter: str) -> str:
        return f"model.layers.{self.number}.{parameter}"


def split_columns(x: torch.Tensor, weight: torch.Tensor, ranks: int) -> torch.Tensor:
    """Partial sums of `x @ weight.T`, the input split over ranks: `[ranks, windows, context, outputs]`."""
    parts = zip(x.chunk(ranks, dim=-1), weight.chunk(ranks, dim=1), strict=True)
    return torch.stack([mine @ columns.t() for mine, columns in parts])


def split_mlp(mlp: torch.nn.Module, normed: torch.Tensor, ranks: int) -> torch.Tensor:
    """Each rank's share of the MLP, of each rank's input `[ranks, windows, context, hidden]`; the same shape."""
    shares = zip(
        normed,
        mlp.gate_proj.weight.chunk(ranks),
        mlp.up_proj.weight.chunk(ranks),
        mlp.down_proj.weight.chunk(ranks, dim=1),
        strict=True,
    )
    return torch.stack([(mlp.act_fn(x @ gate.t()) * (x @ up.t())) @ down.t() for x, gate, up, down in shares])


def split_experts(mixture: torch.nn.Module, normed: torch.Tensor, ranks: int) -> torch.Tensor:
    """Each rank's share of every expert, of an input that all ranks hold `[ranks, windows, context, hidden]`."""
    tokens, experts = normed[0].flatten(0, -2), mixture.experts
    _, weights, chosen = mixture.gate(tokens)
    sums = tokens.new_zeros(ranks, *tokens.shape)
    for expert, down in enumerate(experts.down_proj):
        token, place = torch.where(chosen == expert)
        gate, up = linear(tokens[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inside = experts.act_fn(gate) * up * weights[token, place, None]
        sums.index_add_(1, token, split_columns(inside, down, ranks))
    return sums.view(normed.shape)


def read_experts(mixture: torch.nn.Module, config, layer: int, checkpoint: Checkpoint) -> None:
    """Fills the router and all experts of a layer."""
    pieces = plan(config, WHOLE, checkpoint.has_fused_experts)

    def read(name: str) -> torch.Tensor:
        return torch.cat([checkpoint.read(piece) for piece in pieces[f"decoder.layers.{layer}.mlp.{name}.weight"]])

    mixture.gate.weight.copy_(read("router"))
    for expert in range(config.num_local_experts):
        mixture.experts.gate_up_proj[expert].copy_(read(f"experts.local_experts.{expert}.linear_fc1"))
        mixture.experts.down_proj[expert].copy_(read(f"experts.local_experts.{expert}.linear_fc2"))


def read_whole(checkpoint: Checkpoint, name: str, shape: Collection[int]) -> torch.Tensor:
    columns = (0, shape[1]) if len(shape) > 1 else None
    return checkpoint.read(Piece(name, tuple(shape), (0, shape[0]), columns))


def check_split(config, ranks: int) -> None:
    """Raises ValueError for numbers of ranks that would not each have whole key-value heads, or equal shares."""
    groups, ffn = config.num_key_value_heads, config.intermediate_size
    if ranks < 2 or groups % ranks or ffn % ranks:
        raise ValueError(
            f"--tp {ranks}: needs 2 or more ranks that divide {groups} key-value heads and {ffn} neurons of the MLP"
        )


def check_can_drop(config) -> None:
    """Raises ValueError for a mixture of experts, whose blocks cannot do without attention's sum."""
    if is_mixture(config):
        raise ValueError("blocks of a mixture of experts cannot do without attention's sum")


@torch.no_grad()
def stream(
    checkpoint: Checkpoint, config, ids: torch.Tensor, layers: Collection[int]
) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor, tuple]]:
    """Each of `layers` in turn as the full model has it: block, input, output, and what its attention's rope needs.

    ids int64 `[windows, context]`; inputs and outputs `[windows, context, hidden]` in float32. One block is in memory
    at a time, so this takes no more than the activations of one layer and the weights of one block.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedding = read_whole(checkpoint, "model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    x = embedding[ids].float().to(device)
    rope = LlamaRotaryEmbedding(config).to(device)(x, torch.arange(ids.shape[1], device=device)[None])
    for number in range(max(layers, default=-1) + 1):
        block = Block(config, number, checkpoint).to(device)
        # Window by window: attention's scores and the MLP's inside are the largest tensors.
        out = torch.cat([block(window[None], rope) for window in x])
        if number in layers:
            yield block, x, out, rope
        x = out
