# SPDX-License-Identifier: Apache-2.0
"""A built model on its tensor-parallel ranks as a model class of lm-evaluation-harness (package lm_eval)."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor

from ..inference import environment
from ..inference.generate import generate, logits, vocab_start
from ..inference.model import build_model, init_parallel
from ..inference.text import encode, read_tokenizer
from ..launcher.progress import progress
from ..layers.apply import apply_compression
from ..policy import CompressionPolicy
from .journal import Journal, of_first_rank
from .metrics import Prediction

BATCH_TOKENS = 2048  # padding included: their logits take 4 bytes per token and entry of this rank's vocabulary
MAX_NEW_TOKENS = 256  # where a task does not say; the same as the harness's class for transformers


class Scored(NamedTuple):
    """A continuation to score: `tokens` is what the model reads, of which the last `len(continuation)` predict it."""

    tokens: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def predicting(self) -> slice:
        """The positions in `tokens` whose predictions are scored."""
        return slice(len(self.tokens) - len(self.continuation), len(self.tokens))

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:24]


@register_model("megatron_comp")
class MegatronCompLM(TemplateLM):
    """Log-likelihoods and greedy text of a model of `inference.model.build_model`, as it is compressed now.

    Every rank has one. The harness runs on rank 0, whose requests all ranks compute together: the others `follow` it
    until it calls `release`. Where every rank runs the harness, as under `torchrun -m lm_eval`, none needs to follow.

    journal: takes every log-likelihood, in the part that names the setting; what it knows is not computed again.
    batch_tokens: the most tokens of one forward, padding included. Padding stands behind the text, where no token of
    the text can see it, and a codec's blocks end with the token.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        journal: Journal | None = None,
        part: str = "loglikelihoods",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.part, self.batch_tokens = model, tokenizer, part, batch_tokens
        self.journal = Journal(None, {}) if journal is None else journal

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "MegatronCompLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "MegatronCompLM":
        """On ranks that torchrun started. arg_dict: `model`, a folder; `dtype`, torch's name of it (default float32);
        and `codec` or `policy`, a file. additional_config, of `--batch_size` and `--device`, is not read."""
        given = {"dtype": "float32", "codec": None, "policy": None} | arg_dict
        if unknown := set(given) - {"model", "dtype", "codec", "policy"}:
            raise ValueError(f"model arguments {sorted(unknown)} are unknown; allowed: model, dtype, codec, policy")
        init_parallel(environment.world_size() or 1)
        model = build_model(given["model"], dtype=getattr(torch, given["dtype"]))
        if given["policy"]:
            apply_compression(model, CompressionPolicy.from_file(given["policy"]))
        elif given["codec"]:
            apply_compression(model, CompressionPolicy(codec=given["codec"], min_bytes=0))
        return cls(model, read_tokenizer(given["model"]))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.max_sequence_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # its bar is of the tokenizer

    def _loglikelihood_tokens(self, requests: list, **_: object) -> list[tuple[float, bool]]:
        return self._on_all_ranks("score", [self._scored(context, text) for _, context, text in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(self._scored(*make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._on_all_ranks("score", windows), strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        return self._on_all_ranks("continue_texts", [request.args for request in requests])

    def follow(self) -> None:
        """On ranks other than 0: makes the calls that rank 0 makes, until it releases them."""
        while call := of_first_rank(None):
            self._make(*call)

    def release(self) -> None:
        """On rank 0, when the harness is done: the other ranks go on."""
        of_first_rank(None)

    def _on_all_ranks(self, name: str, requests: list) -> list:
        """The result of a method; all ranks take rank 0's requests."""
        return self._make(*of_first_rank((name, requests)))

    def _make(self, name: str, requests: list) -> list:
        return {"score": self.score, "continue_texts": self.continue_texts}[name](requests)

    def _scored(self, context: list[int], continuation: list[int]) -> Scored:
        """Context that does not fit is cut off at its start. Raises ValueError if the continuation alone does not."""
        if not 1 <= len(continuation) <= self.max_length or not context:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored: this model holds "
                f"{self.max_length} tokens"
            )
        return Scored(tuple([*context, *continuation][-self.max_length - 1 : -1]), tuple(continuation))

    def score(self, requests: list[Scored]) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, in nats, and whether greedy decoding gives it.

        All ranks call this together, with the same requests.
        """
        new = {scored.key: scored for scored in requests if scored.key not in self.journal[self.part]}
        with progress(total=len(new), desc="log-likelihoods", unit="request") as bar:
            for batch in batches(list(new.values()), self.batch_tokens):
                entries = {scored.key: value for scored, value in zip(batch, self._score(batch), strict=True)}
                self.journal.keep(self.part, entries)
                bar.update(len(batch))
        known = self.journal[self.part]
        return [tuple(known[scored.key]) for scored in requests]

    def _score(self, batch: list[Scored]) -> list[tuple[float, bool]]:
        places = {tokens: place for place, tokens in enumerate(dict.fromkeys(scored.tokens for scored in batch))}
        longest = max(map(len, places))
        out = logits(self.model, torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in places]))
        rows = [out[places[scored.tokens], scored.predicting] for scored in batch]
        start, group = vocab_start(self.model), self.model.tp_group
        said = Prediction.of(torch.cat(rows), start, group)
        targets = torch.tensor([token for each in batch for token in each.continuation], device=out.device)
        log_probs = _of_targets(said, targets, start, group)
        lengths = [len(each.continuation) for each in batch]
        parts = zip(log_probs.split(lengths), (said.best == targets).split(lengths), strict=True)
        return [(float(part.sum()), bool(greedy.all())) for part, greedy in parts]

    def continue_texts(self, requests: list[tuple[str, dict]]) -> list[str]:
        """The greedy continuation of each context, up to the first of its stop sequences.

        All ranks call this together, with the same requests. Raises ValueError for a task that wants samples.
        """
        bar = progress(requests, desc="generate", unit="request")
        return [self._continue(context, options) for context, options in bar]

    def _continue(self, context: str, options: dict) -> str:
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        if options.get("do_sample"):
            raise ValueError("the task wants sampled text (do_sample); this model class decodes greedily")
        stops = handle_stop_sequences(options["until"], self.tokenizer.decode([self.eot_token_id]))
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise ValueError(f"{options['max_gen_toks']} new tokens leave no room in a context of {self.max_length}")
        made: list[int] = []

        def ended(token: int) -> bool:
            made.append(token)
            text = self.tokenizer.decode(made)
            return any(stop in text for stop in stops if stop)

        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        generate(self.model, ids, options["max_gen_toks"], {self.eot_token_id}, ended)
        return postprocess_generated_text(self.tokenizer.decode(made, skip_special_tokens=True), stops, None)


def batches(requests: list[Scored], tokens: int) -> Iterator[list[Scored]]:
    """Of so many tokens, padding included, or of one input that is longer.

    Longest first: if memory does not last it is seen at once. Equal inputs, as of choices that are one token each,
    stand in one batch and are read once.
    """
    batch: list[Scored] = []
    inputs: set[tuple[int, ...]] = set()
    for scored in sorted(requests, key=lambda each: (-len(each.tokens), each.tokens)):
        inputs.add(scored.tokens)
        if len(inputs) > 1 and len(inputs) * len(batch[0].tokens) > tokens:
            yield batch
            batch, inputs = [], {scored.tokens}
        batch.append(scored)
    if batch:
        yield batch


def _of_targets(said: Prediction, targets: Tensor, vocab_start: int, group) -> Tensor:
    """fp64 `[tokens]`, on every rank: the log-probability of each target, which one rank has."""
    local = targets - vocab_start
    entries = said.log_probs.shape[1]
    mine = (local >= 0) & (local < entries)
    picked = said.log_probs.gather(1, local.clamp(0, entries - 1)[:, None])[:, 0].double() * mine
    dist.all_reduce(picked, group=group)
    return picked
