# SPDX-License-Identifier: Apache-2.0
"""Text from Megatron-Core's own engines, with Megatron-Core alone: what `megatron_comp.run` compresses as it is.

    torchrun --nproc-per-node 3 -m megatron_comp.run --policy policy.yaml examples/stock_engine.py --model DIR

DIR is a Hugging Face Llama checkpoint with tied embeddings, such as `python examples/fetch.py model DIR` makes; the
ranks must divide its key-value heads. Prints the text of each prompt, chosen greedily.

`--engine dynamic` is the engine that Megatron develops. It needs GPUs and flash-attn 2.7.3 or newer.

`--serve PORT` answers requests like those of Megatron's text generation server, one at a time, until a signal ends it:

    curl -X PUT localhost:PORT/api -d '{"prompts": ["Water boils at"], "tokens_to_generate": 16}'
"""

import argparse
import json
import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The three branches of the government of the United States are", "Water boils at"]
LONGEST = 128
CACHE_GB = 1  # of keys and values, for the dynamic engine


class Event:
    """Of a CPU, where what was asked for is done: the engine measures its steps with these."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, _stream=None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.seconds - self.seconds)


def without_cuda() -> None:
    """Megatron's engine names CUDA in three places where any device would do."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.Event = Event
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self


def build_model(llama, tp: int) -> GPTModel:
    rope = llama.rope_parameters
    config = TransformerConfig(
        num_layers=llama.num_hidden_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.intermediate_size,
        num_attention_heads=llama.num_attention_heads,
        num_query_groups=llama.num_key_value_heads,
        normalization="RMSNorm",
        layernorm_epsilon=llama.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_backend=AttnBackend.local,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config,
        spec,
        llama.vocab_size,
        LONGEST,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
    )


def load_weights(model: GPTModel, source: dict[str, torch.Tensor], groups: int, rank: int, tp: int) -> None:
    """This rank's part of every weight, under Megatron's names."""

    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(tp)[rank]

    made = {
        "embedding.word_embeddings.weight": rows(source["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    for number in range(model.config.num_layers):
        theirs, ours = f"model.layers.{number}.", f"decoder.layers.{number}."
        heads = [source[f"{theirs}self_attn.{name}_proj.weight"].unflatten(0, (groups, -1)) for name in "qkv"]
        made |= {
            f"{ours}input_layernorm.weight": source[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv.weight": rows(torch.cat(heads, dim=1).flatten(0, 1)),
            f"{ours}self_attention.linear_proj.weight": source[f"{theirs}self_attn.o_proj.weight"].chunk(tp, 1)[rank],
            f"{ours}pre_mlp_layernorm.weight": source[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat(
                [rows(source[f"{theirs}mlp.{name}_proj.weight"]) for name in ("gate", "up")]
            ),
            f"{ours}mlp.linear_fc2.weight": source[f"{theirs}mlp.down_proj.weight"].chunk(tp, 1)[rank],
        }
    missing, unexpected = model.load_state_dict(made, strict=False)
    if wrong := [name for name in missing if not name.endswith("_extra_state")] + unexpected:
        raise ValueError(f"the checkpoint is not a Llama with tied embeddings: {wrong}")


class Tokenizer:
    """Hugging Face's, with the names that Megatron's controller calls."""

    def __init__(self, folder: str) -> None:
        self.inner = AutoTokenizer.from_pretrained(folder)
        self.bos, self.eod = None, self.inner.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        return self.inner(text)["input_ids"]

    def detokenize(self, tokens: list[int]) -> str:
        return self.inner.decode(tokens)


def wrapped(model: GPTModel, context, vocabulary: int, requests: int) -> GPTInferenceWrapper:
    try:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
    except ImportError:  # Megatron-Core 0.19 takes all of it from the model and the context
        return GPTInferenceWrapper(model, context)
    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=vocabulary,
        inference_max_requests=requests,
        inference_max_seq_length=LONGEST,
    )
    return GPTInferenceWrapper(model, config, context)


def dynamic_context(config: TransformerConfig) -> DynamicInferenceContext:
    shared = {
        "max_sequence_length": LONGEST,
        "buffer_size_gb": CACHE_GB,
        "max_requests": 64 * config.tensor_model_parallel_size,  # Megatron asks for a multiple of the ranks
    }
    try:
        from megatron.core.inference.config import InferenceConfig
    except ImportError:  # before Megatron-Core 0.17
        return DynamicInferenceContext(
            params_dtype=config.params_dtype,
            num_layers=config.num_layers,
            kv_channels=config.kv_channels,
            num_attention_heads=config.num_query_groups,
            **shared,
        )
    return DynamicInferenceContext(config, InferenceConfig(**shared))


def dynamic_engine(controller: TextGenerationController, context: DynamicInferenceContext) -> DynamicInferenceEngine:
    if hasattr(context, "config"):
        return DynamicInferenceEngine(controller, context)
    return DynamicInferenceEngine(controller, context, random_seed=1)  # before Megatron-Core 0.17


def build_engine(folder: str, requests: int, kind: str = "static") -> StaticInferenceEngine | DynamicInferenceEngine:
    """On every rank, once Megatron's groups stand; `requests` prompts at most at a time. kind: `static`, `dynamic`."""
    rank, tp = dist.get_rank(), dist.get_world_size()
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = build_model(llama.config, tp)
    load_weights(model, llama.state_dict(), llama.config.num_key_value_heads, rank, tp)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if kind == "dynamic" and torch.cuda.is_available():
        model.bfloat16()  # flash-attn has no kernels for fp32
    context = StaticInferenceContext(requests, LONGEST) if kind == "static" else dynamic_context(model.config)
    wrapper = wrapped(model, context, llama.config.vocab_size, requests)
    controller = TextGenerationController(wrapper, Tokenizer(folder))
    if kind == "dynamic":
        return dynamic_engine(controller, context)
    return StaticInferenceEngine(controller, legacy=True)


def texts(engine: StaticInferenceEngine | DynamicInferenceEngine, prompts: list[str], count: int) -> list[str]:
    """Prompts and what follows, `count` tokens, each the most likely one."""
    greedy = SamplingParams(top_k=1, num_tokens_to_generate=count)
    made = engine.generate(prompts, sampling_params=greedy)
    requests = [each.merge() if hasattr(each, "merge") else each for each in made]
    return [request.prompt + request.generated_text for request in requests]


def serve(engine: StaticInferenceEngine | DynamicInferenceEngine, port: int) -> None:
    """Rank 0 has the port and tells the others of each request; they wait for it in a broadcast. Does not return."""
    asked: list[tuple[list[str], int] | None] = [None]
    while dist.get_rank():
        dist.broadcast_object_list(asked)
        texts(engine, *asked[0])

    class Api(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked[0] = body["prompts"], body.get("tokens_to_generate", 64)
            dist.broadcast_object_list(asked)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"text": texts(engine, *asked[0])}).encode())

    server = HTTPServer(("127.0.0.1", port), Api)
    print(f"serving on port {server.server_port}", flush=True)
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--engine", choices=["static", "dynamic"], default="static")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="K")
    parser.add_argument("--serve", type=int, metavar="PORT", help="answer requests, one prompt or two in each")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        without_cuda()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(dist.get_world_size())
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    prompts = args.prompt or PROMPTS
    engine = build_engine(args.model, len(prompts), args.engine)
    if args.serve is not None:
        serve(engine, args.serve)
    for text in texts(engine, prompts, args.new_tokens):
        if dist.get_rank() == 0:
            print(repr(text))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
