# SPDX-License-Identifier: Apache-2.0
"""lm_eval's own class `megatron_lm`, as a user's program: prints log-likelihoods.  stock_harness.py CHECKPOINT RANKS"""

import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

# The class calls its device cuda:N, and Megatron's local attention asks for the current one.
torch.cuda.current_device = lambda: 0
lm = get_model("megatron_lm")(load=sys.argv[1], devices=int(sys.argv[2]), tensor_model_parallel_size=int(sys.argv[2]))
torch.cuda.current_device = lambda: torch.device("cpu")
lm._device = torch.device("cpu")
requests = [Instance("loglikelihood", {}, pair, 0) for pair in [("abc", " def"), ("The sun", " is up"), ("", "x y")]]
print(*(f"{log_prob:.5f}" for log_prob, _ in lm.loglikelihood(requests)))
