# SPDX-License-Identifier: Apache-2.0
"""Policies: what YAML becomes, which word counts where, and what every mistake is told."""

import subprocess
import sys
from types import MappingProxyType

import pytest

from megatron_comp.policy import DEFAULT_MIN_BYTES, PHASES, SITES, CompressionPolicy
from megatron_comp.wire.codec import parse_codec

HOUSE = """
codec: int4:32:fp16:hadamard      # default for every site
algorithm: auto
min_bytes: auto                    # smaller messages stay uncompressed
phases: {decode: none}
sites: {mlp: int5:32:fp16:hadamard}        # attention | mlp | experts | shared_experts
layers:
  0-2: int8:32:fp16
  29: {attention: none}
"""

# One codec a kind of word, so that a decision tells which word it came from.
DEFAULT, SITE, LAYER, LAYER_SITE, PHASE = "mxfp4", "mxfp6", "mxfp8", "nvfp4", "int8:32:fp16"


def from_text(tmp_path, text):
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return CompressionPolicy.from_file(file)


def decide(policy, layer=0, site="mlp", phase="prefill", shape=(512, 1, 4096), itemsize=2, world_size=4):
    return policy.decide(layer=layer, site=site, phase=phase, shape=shape, itemsize=itemsize, world_size=world_size)


def test_no_words_keep_everything_stock():
    for site in SITES:
        for phase in PHASES:
            decision = decide(CompressionPolicy(), 0, site, phase)
            assert decision.codec is None and decision.reason == "policy"


@pytest.mark.parametrize(
    "layer, site, phase, expected",
    [
        (3, "attention", "prefill", "int4:32:fp16:hadamard"),
        (3, "mlp", "prefill", "int5:32:fp16:hadamard"),
        (3, "experts", "prefill", "int4:32:fp16:hadamard"),
        (0, "attention", "prefill", "int8:32:fp16"),
        (2, "mlp", "prefill", "int8:32:fp16"),
        (29, "attention", "prefill", "none"),
        (29, "mlp", "prefill", "int5:32:fp16:hadamard"),
        (0, "mlp", "decode", "none"),
        (3, "attention", "decode", "none"),
    ],
)
def test_the_example_policy(tmp_path, layer, site, phase, expected):
    policy = from_text(tmp_path, HOUSE)
    assert policy.codec_name(layer, site, phase) == expected
    decision = decide(policy, layer, site, phase)
    assert (str(decision.codec), decision.algorithm) == (expected, "auto") if expected != "none" else not decision.codec
    policy.check_layers(30)
    with pytest.raises(ValueError, match=r"layers: 29 is out of range; the model has layers 0 to 28"):
        policy.check_layers(29)


@pytest.mark.parametrize(
    "words, expected",
    [
        ({}, DEFAULT),
        ({"sites": {"mlp": SITE}}, SITE),
        ({"sites": {"attention": SITE}}, DEFAULT),
        ({"layers": {5: LAYER}}, LAYER),
        ({"layers": {4: LAYER, "6-9": LAYER}}, DEFAULT),
        ({"layers": {5: {"mlp": LAYER_SITE}}}, LAYER_SITE),
        ({"layers": {5: {"attention": LAYER_SITE}}}, DEFAULT),
        ({"sites": {"mlp": SITE}, "layers": {5: LAYER}}, LAYER),
        ({"sites": {"mlp": SITE}, "layers": {5: {"mlp": LAYER_SITE}}}, LAYER_SITE),
        ({"sites": {"mlp": SITE}, "layers": {5: {"attention": LAYER_SITE}}}, SITE),
        ({"sites": {"mlp": SITE}, "layers": {5: "none"}}, "none"),
        ({"sites": {"mlp": "none"}, "layers": {5: LAYER}}, LAYER),
        ({"codec": "none", "sites": {"mlp": SITE}}, SITE),
        ({"codec": "none", "layers": {5: {"mlp": LAYER_SITE}}}, LAYER_SITE),
        ({"phases": {"prefill": PHASE}}, PHASE),
        ({"phases": {"decode": PHASE}}, DEFAULT),
        ({"phases": {"prefill": PHASE}, "layers": {5: {"mlp": LAYER_SITE}}}, PHASE),
        ({"phases": {"prefill": "none"}, "layers": {5: {"mlp": LAYER_SITE}}}, "none"),
        ({"codec": "none", "phases": {"prefill": PHASE}}, "none"),
        ({"sites": {"mlp": "none"}, "phases": {"prefill": PHASE}}, "none"),
        ({"layers": {5: "none"}, "phases": {"prefill": PHASE}}, "none"),
        ({"layers": {5: {"mlp": "none"}}, "phases": {"prefill": PHASE}}, "none"),
    ],
    ids=str,
)
def test_the_most_specific_word_counts_then_the_phase(words, expected):
    policy = CompressionPolicy(**{"codec": DEFAULT} | words)
    assert policy.codec_name(5, "mlp", "prefill") == expected
    decision = decide(policy, 5)
    assert decision.codec == (None if expected == "none" else parse_codec(expected))
    assert decision.reason == ("policy" if expected == "none" else "")


@pytest.mark.parametrize(
    "key, layers",
    [(3, [3]), ("3", [3]), ("03", [3]), ("3-3", [3]), ("0-2", [0, 1, 2]), ("9-11", [9, 10, 11]), (0, [0])],
)
def test_layers_by_number_and_by_range(key, layers):
    policy = CompressionPolicy(layers={key: LAYER})
    assert [layer for layer in range(14) if policy.codec_name(layer, "mlp", "prefill") == LAYER] == layers
    policy.check_layers(layers[-1] + 1)
    with pytest.raises(
        ValueError, match=f"layers: {key!r} is out of range; the model has layers 0 to {layers[-1] - 1}"
    ):
        policy.check_layers(layers[-1])


@pytest.mark.parametrize("min_bytes", ["auto", 0, 1, 8192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_min_bytes_is_of_the_uncompressed_message(min_bytes, itemsize):
    policy = CompressionPolicy(codec=DEFAULT, min_bytes=min_bytes)
    least = DEFAULT_MIN_BYTES if min_bytes == "auto" else min_bytes
    values = -(-least // itemsize)
    assert decide(policy, shape=(values, 1, 1), itemsize=itemsize).codec == parse_codec(DEFAULT)
    if values:
        kept = decide(policy, shape=(1, values - 1), itemsize=itemsize)
        assert kept.codec is None and kept.reason == "min_bytes"


def test_auto_stands_for_what_the_docstring_says():
    assert DEFAULT_MIN_BYTES == 262144


@pytest.mark.parametrize(
    "policy, reason",
    [
        (CompressionPolicy(codec=DEFAULT), "one rank"),
        (CompressionPolicy(codec=DEFAULT, min_bytes=2**40), "one rank"),
        (CompressionPolicy(), "policy"),
    ],
    ids=str,
)
def test_one_rank_keeps(policy, reason):
    decision = decide(policy, world_size=1)
    assert decision.codec is None and decision.reason == reason


@pytest.mark.parametrize("algorithm", ["auto", "two_step"])
def test_a_pair_has_a_codec_for_each_phase_of_the_sum(algorithm):
    decision = decide(CompressionPolicy(codec="int4:32:fp16 > int8:32:fp16", algorithm=algorithm))
    assert (str(decision.codec.first), str(decision.codec.second)) == ("int4:32:fp16", "int8:32:fp16")
    assert decision.algorithm == algorithm


MISTAKES = {
    "key": (
        "codecs: mxfp4",
        ["'codecs' is unknown", "codec, algorithm, min_bytes, phases, sites, layers, islands, logits"],
    ),
    "key_number": ("3: mxfp4", ["3 is unknown", "codec, algorithm"]),
    "codec": ("codec: mxfp5", ["codec: codec 'mxfp5'", "mxfp4", "element:block:scale", "'none'"]),
    "codec_element": ("codec: int9:32:fp16", ["codec: ", "'int9'", "int8"]),
    "codec_null": ("codec:", ["codec: ", "None", "'none'"]),
    "codec_number": ("codec: 4", ["codec: ", "a string such as 'mxfp4'", "'none'"]),
    "codec_list": ("codec: [mxfp4]", ["codec: ", "a string such as 'mxfp4'", "'none'"]),
    "codec_mapping": ("codec: {mlp: mxfp4}", ["codec: ", "a string such as 'mxfp4'", "'none'"]),
    "codec_no": ("codec: no", ["codec: ", "False", "'none'"]),
    "pair_half": ("codec: mxfp4>", ["codec: ", "''"]),
    "pair_none": ("codec: mxfp4>none", ["codec: ", "'none' is neither a preset"]),
    "algorithm": ("algorithm: ring", ["algorithm: 'ring' is unknown", "auto, gather_sum, two_step"]),
    "algorithm_list": ("algorithm: [auto]", ["algorithm: ['auto'] is unknown", "auto, gather_sum, two_step"]),
    "min_bytes_text": ("min_bytes: 64q", ["min_bytes: '64q'", "'auto'", "a number of bytes"]),
    "min_bytes_decimal_unit": ("min_bytes: 64kB", ["min_bytes: '64kB'", "(65536, 64k)"]),
    "octal": ("min_bytes: 0777", ["0777 stands for 511 in YAML", "line 1"]),
    "hexadecimal": ("min_bytes: 0x10", ["0x10 stands for 16"]),
    "binary": ("min_bytes: 0b11", ["0b11 stands for 3"]),
    "base_60": ("min_bytes: 1:00:00", ["1:00:00 stands for 3600"]),
    "base_60_float": ("min_bytes: 1:30.5", ["1:30.5 stands for 90.5"]),
    "underscores": ("min_bytes: 1_000", ["1_000 stands for 1000"]),
    "plus": ("min_bytes: +5", ["+5 stands for 5"]),
    "layer_octal": ("layers: {010: mxfp4}", ["010 stands for 8"]),
    "layer_hexadecimal": ("layers: {0x10: mxfp4}", ["0x10 stands for 16"]),
    "layer_base_60": ("layers:\n  1:30: mxfp4", ["1:30 stands for 90", "line 2"]),
    "layer_underscores": ("layers: {1_0: mxfp4}", ["1_0 stands for 10"]),
    "layer_of_another_script": ("layers: {'\u0663': mxfp4}", ["layers: '\u0663'", "as in 3"]),
    "min_bytes_negative": ("min_bytes: -1", ["min_bytes: -1", ">= 0"]),
    "min_bytes_bool": ("min_bytes: true", ["min_bytes: True", "'auto'"]),
    "min_bytes_float": ("min_bytes: 0.5", ["min_bytes: 0.5", "'auto'"]),
    "logits_zero": ("logits: 0", ["logits: 0 is not a number >= 1 of candidates"]),
    "logits_bool": ("logits: true", ["logits: True", ">= 1"]),
    "logits_word": ("logits: all", ["logits: 'all'", ">= 1"]),
    "logits_float": ("logits: 4.0", ["logits: 4.0", ">= 1"]),
    "predictor_empty": ("predictor: ' '", ["predictor: ' ' is not a file's name"]),
    "predictor_nul": ('predictor: "a\\0b"', ["predictor: 'a\\x00b' is not a file's name"]),
    "phase": ("phases: {train: none}", ["phases: 'train' is unknown", "prefill, decode"]),
    "phase_codec": ("phases: {decode: mxfp5}", ["phases: decode: ", "'mxfp5'", "'none'"]),
    "phases_text": ("phases: none", ["phases: expected codecs by prefill, decode", "'none'"]),
    "phases_empty": ("phases:", ["phases: expected codecs by prefill, decode", "None"]),
    "site": ("sites: {ffn: mxfp4}", ["sites: 'ffn' is unknown", "attention, mlp, experts, shared_experts"]),
    "site_codec": ("sites: {mlp: mxfp5}", ["sites: mlp: ", "'mxfp5'"]),
    "site_mapping": ("sites: {mlp: {decode: none}}", ["sites: mlp: ", "a string such as 'mxfp4'", "'none'"]),
    "sites_list": ("sites: [mlp]", ["sites: expected codecs by attention, mlp", "['mlp']"]),
    "layers_list": ("layers: [0, 1]", ["layers: expected layer numbers or ranges", "[0, 1]"]),
    "layers_text": ("layers: none", ["layers: expected layer numbers or ranges", "'none'"]),
    "layer_text": ("layers: {first: mxfp4}", ["layers: 'first'", "as in 3", "as in 0-2"]),
    "layer_negative": ("layers: {-1: mxfp4}", ["layers: -1", "as in 3"]),
    "layer_float": ("layers: {1.5: mxfp4}", ["layers: 1.5", "as in 3"]),
    "layer_bool": ("layers: {yes: mxfp4}", ["layers: True", "as in 3"]),
    "layer_null": ("layers: {~: mxfp4}", ["layers: None", "as in 3"]),
    "layer_digit": ("layers: {²: mxfp4}", ["layers: '²'", "as in 3"]),
    "layer_open_range": ("layers: {3-: mxfp4}", ["layers: '3-'", "as in 0-2"]),
    "layer_three": ("layers: {0-2-4: mxfp4}", ["layers: '0-2-4'", "as in 0-2"]),
    "layer_backwards": ("layers: {4-2: mxfp4}", ["layers: '4-2' is an empty range"]),
    "layer_codec": ("layers: {0-2: mxfp5}", ["layers: 0-2: ", "'mxfp5'", "'none'"]),
    "layer_codec_null": ("layers: {3: }", ["layers: 3: ", "None", "'none'"]),
    "layer_codec_list": ("layers: {3: [mxfp4]}", ["layers: 3: ", "a string such as 'mxfp4'"]),
    "layer_site": ("layers: {3: {ffn: mxfp4}}", ["layers: 3: 'ffn' is unknown", "attention, mlp"]),
    "layer_site_codec": ("layers: {3: {mlp: mxfp5}}", ["layers: 3: mlp: ", "'mxfp5'"]),
    "layer_site_empty": ("layers: {3: {'': mxfp4}}", ["layers: 3: '' is unknown", "attention, mlp"]),
    "overlap": ("layers: {0-2: mxfp4, 2-4: mxfp8}", ["layers: '2-4' names layer 2", "another key"]),
    "overlap_number": ("layers: {0-2: mxfp4, 1: mxfp8}", ["layers: 1 names layer 1", "another key"]),
    "overlap_text": ("layers: {3: mxfp4, '3': mxfp8}", ["layers: '3' names layer 3", "another key"]),
    "overlap_sites": ("layers: {0-2: {mlp: mxfp4}, 2: {attention: mxfp4}}", ["layers: 2 names layer 2"]),
    "gather_sum": ("{algorithm: gather_sum, codec: mxfp4>mxfp8}", ["codec: gather_sum", "takes one codec"]),
    "gather_sum_site": ("{algorithm: gather_sum, sites: {mlp: mxfp4>mxfp8}}", ["sites: mlp: gather_sum"]),
    "gather_sum_layer": ("{algorithm: gather_sum, layers: {1: mxfp4>mxfp8}}", ["layers: 1: gather_sum"]),
    "gather_sum_phase": ("{algorithm: gather_sum, phases: {decode: mxfp4>mxfp8}}", ["phases: decode: gather_sum"]),
    "a_list": ("- codec: mxfp4", ["expected keys (codec, algorithm,", "[{'codec': 'mxfp4'}]"]),
    "a_word": ("mxfp4", ["expected keys (codec, algorithm,", "'mxfp4'"]),
    "nothing": ("", ["expected keys (codec, algorithm,", "None"]),
    "only_comments": ("# codec: mxfp4\n", ["expected keys (codec, algorithm,", "None"]),
    "syntax": ("codec: [mxfp4", ["is not YAML", "line 1"]),
    "syntax_tab": ("layers:\n\t0: mxfp4", ["is not YAML", "line 2"]),
    "syntax_tag": ("codec: !!python/name:os.system", ["is not YAML", "python/name"]),
    "impossible_date": ("codec: 2024-13-45", ["is not YAML"]),
    "twice": ("codec: mxfp4\nlayers: {1: mxfp8}\ncodec: mxfp6", ["'codec' is given more than once", "line 1"]),
    "twice_layer": ("layers: {3: mxfp4, 3: mxfp8}", ["3 is given more than once"]),
}


@pytest.mark.parametrize("text, told", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_file_the_key_and_what_is_allowed(tmp_path, text, told):
    with pytest.raises(ValueError) as error:
        from_text(tmp_path, text)
    for part in [str(tmp_path / "policy.yaml"), *told]:
        assert part in str(error.value)


@pytest.mark.parametrize("codec", ["x" * 99999, "int4:32:" + "y" * 99999, f"int4:32:fp16:{'z' * 99999}"])
def test_a_message_does_not_repeat_a_long_name(codec):
    with pytest.raises(ValueError, match=r"\.\.\.") as error:
        CompressionPolicy(codec=codec)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text, number", [("64k", 65536), ("64K", 65536), ("64 KiB", 65536), ("1M", 1 << 20), ("0", 0)])
def test_bytes_in_steps_of_1024(tmp_path, text, number):
    assert from_text(tmp_path, f"min_bytes: {text}") == CompressionPolicy(min_bytes=number)


@pytest.mark.parametrize(
    "spaced, plain",
    [
        ("codec: 'none '", "codec: none"),
        ("codec: ' mxfp4'\nalgorithm: 'two_step '\nmin_bytes: ' auto '", "codec: mxfp4\nalgorithm: two_step"),
        ("sites: {mlp: 'none '}", "sites: {mlp: none}"),
        ("phases: {decode: ' none'}", "phases: {decode: none}"),
        ("layers: {3: 'mxfp8 ', 4: {attention: 'drop '}}", "layers: {3: mxfp8, 4: {attention: drop}}"),
    ],
)
def test_spaces_around_words_mean_nothing(tmp_path, spaced, plain):
    spaced, plain = from_text(tmp_path, spaced), from_text(tmp_path, plain)
    assert spaced == plain and spaced.digest() == plain.digest()


def test_merged_mappings(tmp_path):
    """YAML's merge key, with anchors, at each level that a policy has."""
    policy = from_text(
        tmp_path,
        "codec: mxfp4\nsites: &sites {mlp: mxfp8}\nlayers:\n  0: &first {<<: *sites, attention: none}\n"
        "  1: {<<: *first, mlp: mxfp6}\n  2: {<<: [*first, *sites]}\n",
    )
    names = [[policy.codec_name(layer, site, "prefill") for site in ("attention", "mlp")] for layer in range(4)]
    assert names == [["none", "mxfp8"], ["none", "mxfp6"], ["none", "mxfp8"], ["mxfp4", "mxfp8"]]


def test_a_file_that_is_not_text_or_not_there(tmp_path):
    (tmp_path / "policy.yaml").write_bytes(b"codec: \xff\xfe")
    with pytest.raises(ValueError, match="policy.yaml is not YAML"):
        CompressionPolicy.from_file(tmp_path / "policy.yaml")
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        CompressionPolicy.from_file(str(tmp_path / "missing.yaml"))


def test_an_empty_mapping_is_a_policy(tmp_path):
    assert from_text(tmp_path, "{}") == CompressionPolicy()


@pytest.mark.parametrize(
    "mine, yours",
    [
        ("codec: mxfp4", "{codec: mxfp4, algorithm: auto, min_bytes: auto, layers: {}}"),
        (
            "{codec: mxfp4, min_bytes: 0, algorithm: two_step}",
            "{algorithm: two_step, codec: mxfp4, min_bytes: 0}",
        ),
        ("sites: {mlp: mxfp4, attention: mxfp8}", "sites: {attention: mxfp8, mlp: mxfp4}"),
        ("phases: {prefill: mxfp4, decode: none}", "phases: {decode: none, prefill: mxfp4}"),
        ("layers: {29: mxfp4, 0-2: mxfp8}", "layers: {0-2: mxfp8, 29: mxfp4}"),
        ("layers: {29: {mlp: mxfp4, attention: none}}", "layers: {29: {attention: none, mlp: mxfp4}}"),
        ("layers: {10: mxfp4, 9: mxfp8}", "layers: {'9': mxfp8, '10': mxfp4}"),
        (HOUSE, HOUSE),
    ],
)
def test_digest_is_equal_for_equal_policies(tmp_path, mine, yours):
    mine, yours = from_text(tmp_path, mine), from_text(tmp_path, yours)
    assert mine.digest() == yours.digest() and str(mine) == str(yours)


def test_digest_differs_for_different_policies(tmp_path):
    texts = [
        "{}",
        "codec: mxfp4",
        "codec: mxfp8",
        "{codec: mxfp4, algorithm: two_step}",
        "{codec: mxfp4, min_bytes: 0}",
        "{codec: mxfp4, min_bytes: 1}",
        "{codec: mxfp4, logits: 1}",
        "{codec: mxfp4, phases: {decode: none}}",
        "{codec: mxfp4, phases: {prefill: none}}",
        "{codec: mxfp4, sites: {mlp: none}}",
        "{codec: mxfp4, sites: {attention: none}}",
        "{codec: mxfp4, layers: {1: none}}",
        "{codec: mxfp4, layers: {2: none}}",
        "{codec: mxfp4, layers: {1-2: none}}",
        "{codec: mxfp4, layers: {1: {mlp: none}}}",
        "{codec: mxfp4, layers: {1: {attention: none}}}",
        HOUSE,
    ]
    policies = [from_text(tmp_path, text) for text in texts]
    assert len({policy.digest() for policy in policies}) == len(texts)
    assert len({str(policy) for policy in policies}) == len(texts)


def test_digest_takes_any_mapping():
    proxy = MappingProxyType({0: MappingProxyType({"mlp": "mxfp8"}), "1-2": "mxfp4"})
    plain = {0: {"mlp": "mxfp8"}, "1-2": "mxfp4"}
    assert CompressionPolicy(layers=proxy).digest() == CompressionPolicy(layers=plain).digest()


def test_text_says_what_differs_from_the_defaults():
    assert str(CompressionPolicy()) == '{"codec": "none"}'
    policy = CompressionPolicy(codec="mxfp4", min_bytes=0, layers={29: "none", "0-2": "mxfp8"})
    assert str(policy) == '{"codec": "mxfp4", "layers": {"0-2": "mxfp8", "29": "none"}, "min_bytes": 0}'


def test_policies_need_no_megatron_and_no_processes():
    script = (
        "import sys, torch; before = set(sys.modules); import megatron_comp.policy as p\n"
        "p.CompressionPolicy(codec='mxfp4').decide("
        "layer=0, site='mlp', phase='prefill', shape=(512, 4096), itemsize=2, world_size=4)\n"
        "heavy = ('megatron', 'torch.distributed', 'transformers', 'megatron_comp.layers', 'megatron_comp.inference')\n"
        "print([m for m in sorted(set(sys.modules) - before) if any(m == h or m.startswith(h + '.') for h in heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_stands_for_a_policy(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("codec: mxfp4\nmin_bytes: 0\n")
    policy = CompressionPolicy(codec="mxfp4", min_bytes=0)
    assert CompressionPolicy.of(policy) is policy
    assert CompressionPolicy.of(str(file)) == CompressionPolicy.of(file) == policy
    assert CompressionPolicy.of("int8:32:fp16") == CompressionPolicy(codec="int8:32:fp16")
    with pytest.raises(ValueError, match="codec: codec 'policy' is neither"):
        CompressionPolicy.of("policy")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        CompressionPolicy.of("absent.yaml")
    with pytest.raises(TypeError, match="not dict"):
        CompressionPolicy.of({"codec": "mxfp4"})


# Islands.


def test_islands_are_machines_or_what_the_policy_names():
    hosts = ["one", "two", "one", "two"]
    assert CompressionPolicy("mxfp4").islands_of(hosts).members == ((0, 2), (1, 3))
    assert CompressionPolicy("mxfp4", islands=2).islands_of(hosts).members == ((0, 1), (2, 3))
    assert CompressionPolicy("mxfp4", islands=[[3, 0, 1], [2]]).islands_of(hosts).members == ((0, 1, 3), (2,))


@pytest.mark.parametrize(
    "islands, told",
    [
        (3, "policy: islands: islands of 3 ranks do not divide 4 ranks"),
        ([[0, 1], [2]], r"policy: islands: \[\[0, 1\], \[2\]\] are of 3 ranks, the group is of 4"),
    ],
)
def test_islands_that_do_not_fit_a_group(islands, told):
    with pytest.raises(ValueError, match=told):
        CompressionPolicy("mxfp4", islands=islands).islands_of(["a"] * 4)


@pytest.mark.parametrize(
    "islands, told",
    [
        (0, "0 is neither a number of ranks > 0 nor a list of lists of ranks"),
        (True, "True is neither"),
        (2.0, "2.0 is neither"),
        ("machines", "'machines' is neither"),
        ([0, 1], r"\[0, 1\] is neither"),
        ([["0"], ["1"]], ".* is neither"),
        ([[0, 1], [1]], r"islands \[\[0, 1\], \[1\]\] do not hold each of ranks 0 to 1 once"),
        ([[0], []], ".* do not hold each of ranks 0 to 0 once"),
        ([], ".* do not hold each"),
    ],
)
def test_what_are_no_islands(islands, told):
    with pytest.raises(ValueError, match=f"policy: islands: {told}"):
        CompressionPolicy("mxfp4", islands=islands)


def test_islands_from_a_file(tmp_path):
    policy = from_text(tmp_path, "codec: mxfp4\nalgorithm: hierarchical\nislands: [[0, 1], [2, 3]]\n")
    assert policy.islands_of(["a"] * 4).members == ((0, 1), (2, 3))
    assert policy.digest() != CompressionPolicy("mxfp4", algorithm="hierarchical").digest()


def test_levels_only_where_a_sum_may_have_them():
    assert CompressionPolicy("mxfp4").has_levels and CompressionPolicy("mxfp4", algorithm="hierarchical").has_levels
    assert not CompressionPolicy("mxfp4", algorithm="two_step").has_levels and not CompressionPolicy().has_levels
