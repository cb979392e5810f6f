# SPDX-License-Identifier: Apache-2.0
"""The model class of lm-evaluation-harness, beside the harness's own class for transformers."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from task_items import ITEMS, write_tasks

from megatron_comp.inference.text import read_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra 'tasks'")

LONGEST = 24  # of a text, so that one context is cut off and a rolled text takes several windows
PAIRS = [(question, f" {choice}") for question, choices, _ in ITEMS for choice in choices]
PAIRS += [("", "Water is wet."), ("It was a long day and nobody thought of the time. " * 4, "At last, the end came.")]
ROLLED = ["A text that is longer than the model's context has to be read in several windows, each token once. " * 2]
PROMPTS = [("Count: one, two, three,", {"until": ["\n"], "max_gen_toks": 6, "do_sample": False})]
PROMPTS += [("The capital of France is", {"until": ["."], "max_gen_toks": 8})]


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def answers(lm):
    """(log-probability, greedy?) of each pair, rolled log-probabilities, texts."""
    return (
        lm.loglikelihood(requests("loglikelihood", PAIRS)),
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in ROLLED])),
        lm.generate_until(requests("generate_until", PROMPTS)),
    )


def by_ranks(rank, world_size, folder, tasks):
    """What rank 0 answers as others follow, in batches and input by input; and what tasks without data come to."""
    from lm_eval.api.registry import get_model

    import megatron_comp.quality.lm_eval_model as under_test
    from megatron_comp.quality.tasks import Tasks

    together = get_model("megatron_comp").create_from_arg_string(f"model={folder}")
    together.model.max_sequence_length = LONGEST
    alone = under_test.MegatronCompLM(together.model, together.tokenizer, batch_tokens=1)
    if dist.get_rank() == 0:
        made = answers(together)
        together.release()
    else:
        together.follow()
        made = None
    in_step = alone.loglikelihood(requests("loglikelihood", PAIRS[:6]))  # where every rank runs the harness
    with pytest.raises(ValueError, match="--tasks lost: the data cannot be loaded: .* --include-path"):
        Tasks(["lost"], include_path=tasks)
    with pytest.raises(ValueError, match="continuation of 40 tokens"):
        together._scored([1], [2] * 40)
    return made, in_step


def test_choices_of_one_token_read_their_context_once_however_long_it_is():
    from megatron_comp.quality.lm_eval_model import Scored, batches

    long, other, short = (1,) * 20, (2,) * 20, (3,) * 4
    wanted = [Scored(tokens, (choice,)) for tokens in (short, other, long) for choice in (7, 8, 9)]
    made = list(batches(wanted, 8))
    assert [{each.tokens for each in batch} for batch in made] == [{long}, {other}, {short}]
    assert sorted(each for batch in made for each in batch) == sorted(wanted)
    assert len(list(batches(wanted, 60))) == 1


def test_log_likelihoods_equal_those_of_the_harness_for_transformers(smollm2, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    write_tasks(tmp_path)
    ((pairs, rolled, texts), alone), (_, others) = run_ranks(by_ranks, 3, smollm2, str(tmp_path))[:2]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    oracle = HFLM(model, tokenizer=read_tokenizer(smollm2), max_length=LONGEST, batch_size=8, device="cpu")
    expected_pairs, expected_rolled, expected_texts = answers(oracle)

    # Sums of fp32 in another order: 1.3e-4 of 15 nats was seen.
    assert [value for value, _ in pairs] == pytest.approx([value for value, _ in expected_pairs], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in pairs] == [greedy for _, greedy in expected_pairs]
    assert any(greedy for _, greedy in pairs) and not all(greedy for _, greedy in pairs)
    assert rolled == pytest.approx(expected_rolled, rel=1e-5)  # a sum over 45 tokens
    assert texts == expected_texts and all(texts)
    assert [value for value, _ in alone] == pytest.approx([value for value, _ in pairs[:6]], abs=1e-4)
    assert others == alone
