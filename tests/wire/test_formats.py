# SPDX-License-Identifier: Apache-2.0
"""Elements and scales stand for the stated values, and codec names are parsed strictly."""

import math
import pickle
import re

import ml_dtypes
import numpy as np
import oracles
import pytest

from megatron_comp.wire.codec import Codec, CodecPair, parse_codec
from megatron_comp.wire.formats import BF16_MAX, ELEMENTS, PRESETS, SCALES, Format

ML_DTYPES = {
    "int2": ml_dtypes.int2,
    "int4": ml_dtypes.int4,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
POSITIVE = {
    "fp3_e1m1": [0, 1, 2, 3],
    "fp4_e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp5_e2m2": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7],
    "fp5_e3m1": [0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24],
}


def test_names():
    assert list(ELEMENTS) == oracles.ELEMENTS
    assert list(SCALES) == oracles.SCALES
    assert {name: text for name, (text, _) in oracles.PRESETS.items()} == PRESETS
    assert BF16_MAX == oracles.BF16_MAX


@pytest.mark.parametrize("name", oracles.ELEMENTS)
def test_every_element_code_has_the_stated_value(name):
    element = ELEMENTS[name]
    assert element.bits == oracles.element_bits(name)
    assert len(element.table) == 2**element.bits
    np.testing.assert_array_equal(np.array(element.table), oracles.element_table(name))
    assert (
        element.max_value
        == oracles.largest(name)
        == np.nanmax(element.table, where=np.isfinite(element.table), initial=0)
    )
    assert 2.0**element.max_exponent <= element.max_value < 2.0 ** (element.max_exponent + 1)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_element_values_are_those_of_ml_dtypes(name):
    theirs = np.arange(2 ** ELEMENTS[name].bits, dtype=np.uint8).view(ML_DTYPES[name]).astype(np.float64)
    np.testing.assert_array_equal(np.array(ELEMENTS[name].table), theirs)
    signs = np.signbit(ELEMENTS[name].table)[~np.isnan(theirs)]
    np.testing.assert_array_equal(signs, np.signbit(theirs)[~np.isnan(theirs)])


@pytest.mark.parametrize("name", POSITIVE)
def test_small_elements_literally(name):
    assert list(ELEMENTS[name].table) == POSITIVE[name] + [-value for value in POSITIVE[name]]


@pytest.mark.parametrize("name", ["e8m0", "e5m0", "e5m3", "e4m3"])
def test_every_scale_code_has_the_stated_value(name):
    np.testing.assert_array_equal(np.array(SCALES[name].table), oracles.scale_table(name))
    assert math.isnan(SCALES[name].table[SCALES[name].nan_code])


def test_scales_literally():
    """Ends of the tables, from the contracts and the formats' own documents."""
    e8m0, e5m0, e5m3, e4m3 = (SCALES[name].table for name in ("e8m0", "e5m0", "e5m3", "e4m3"))
    assert (e8m0[0], e8m0[127], e8m0[254], len(e8m0)) == (2.0**-127, 1.0, 2.0**127, 256)
    assert (e5m0[0], e5m0[20], e5m0[30], len(e5m0)) == (2.0**-20, 1.0, 1024.0, 32)
    assert (e5m3[0], e5m3[1], e5m3[8], e5m3[0b01111_000], e5m3[254]) == (0, 2.0**-17, 2.0**-14, 1.0, 114688.0)
    assert (e4m3[1], e4m3[126]) == (2.0**-9, 448.0)
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(np.array(e8m0), theirs)


def test_every_codec_is_parsed_back_from_its_name():
    names = oracles.all_codecs()
    codecs = [Codec.parse(name) for name in names]
    assert [str(codec) for codec in codecs] == names
    assert [Codec.parse(str(codec)) for codec in codecs] == codecs
    assert len(set(codecs)) == len(names) == 9984


@pytest.mark.parametrize("name", oracles.PRESETS)
def test_presets(name):
    text, bits = oracles.PRESETS[name]
    codec = Codec.parse(name)
    assert codec == Codec.parse(text)
    assert str(codec) == text
    assert codec.bits_per_value == bits


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("int4:32:e8m0:floor", "int4:32:e8m0"),
        ("int4:32:e8m0:spike:ceil:asym", "int4:32:e8m0:ceil:asym:spike"),
        ("int4:32:fp16:search:hadamard", "int4:32:fp16:hadamard:search"),
        ("int4:32:fp16 > mxfp8", "int4:32:fp16>fp8_e4m3:32:e8m0"),
    ],
)
def test_other_spellings(text, canonical):
    assert str(parse_codec(text)) == canonical
    assert parse_codec(text) == parse_codec(canonical)


@pytest.mark.parametrize("text", ["mxfp4", "fp8_e5m2:8:e5m3:hadamard:search", "int4:32:fp16:asym>nvfp4"])
def test_equality_and_hash_survive_pickling(text):
    codec = parse_codec(text)
    parts = [codec.first, codec.second] if isinstance(codec, CodecPair) else [codec]
    for part in parts:
        assert part.format.element.table  # fills caches, which must not count
    copy = pickle.loads(pickle.dumps(codec))
    assert copy == codec == parse_codec(text)
    assert hash(copy) == hash(codec) == hash(parse_codec(text))
    assert {codec: 1}[copy] == 1


@pytest.mark.parametrize("scale", [scale for scale in oracles.SCALES if scale not in oracles.POWERS_OF_TWO])
@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
def test_rounding_rules_clash_with_other_scales(scale, rule):
    with pytest.raises(ValueError, match=f"'{rule}' clashes with scale '{scale}': it goes with e8m0 and e5m0"):
        Codec.parse(f"int4:32:{scale}:{rule}")
    with pytest.raises(ValueError, match="clashes"):
        Format(ELEMENTS["int4"], 32, SCALES[scale], rule)


@pytest.mark.parametrize("element", oracles.LEVELS)
@pytest.mark.parametrize("scale", oracles.POWERS_OF_TWO)
def test_levels_clash_with_scales_that_have_no_zero(element, scale):
    allowed = "it goes with e5m3, e4m3, fp16, bf16, fp32"
    with pytest.raises(ValueError, match=f"element '{element}' clashes with scale '{scale}'.*{allowed}"):
        Codec.parse(f"{element}:32:{scale}")


@pytest.mark.parametrize("element", oracles.LEVELS)
def test_levels_are_bytes_of_a_unit(element):
    """Kernels look them up as bytes. The largest is an integer: by those, divisions are three instructions."""
    levels = ELEMENTS[element]
    assert list(levels.magnitudes) == sorted(set(levels.magnitudes)) and levels.magnitudes[0] > 0
    assert levels.magnitudes[-1] < 128 and levels.max_value % 1 == 0
    assert all(np.float32(threshold) == threshold for threshold in levels.thresholds)


@pytest.mark.parametrize("element", [*oracles.MINIFLOATS, *oracles.LEVELS])
@pytest.mark.parametrize("option", ["asym", "spike"])
def test_integer_options_clash_with_others(element, option):
    with pytest.raises(ValueError, match=f"'{option}' clashes with element '{element}': it goes with int2..int8"):
        Codec.parse(f"{element}:32:fp16:{option}")


@pytest.mark.parametrize(
    "text, part, allowed",
    [
        ("", "''", "mxfp4"),
        ("MXFP4", "'MXFP4'", "mxfp4"),
        ("mxfp5", "'mxfp5'", "element:block:scale"),
        ("mxfp4:hadamard", "'mxfp4:hadamard'", "element:block:scale"),
        ("int4:32", "'int4:32'", "element:block:scale"),
        ("fp4_e3m0:32:e8m0", "element 'fp4_e3m0'", ", ".join(oracles.ELEMENTS)),
        ("int9:32:fp16", "element 'int9'", "int8"),
        ("INT4:32:fp16", "element 'INT4'", "int4"),
        ("::", "element ''", "int4"),
        ("int4:33:fp16", "block size '33'", "8, 16, 32, 64, 128, 256"),
        ("int4:032:fp16", "block size '032'", "8, 16, 32, 64, 128, 256"),
        ("int4:-8:fp16", "block size '-8'", "8, 16, 32, 64, 128, 256"),
        ("int4:32:e3m4", "scale 'e3m4'", ", ".join(oracles.SCALES)),
        ("int4:32:fp16:hadamrad", "option 'hadamrad'", "floor, even, ceil, asym, hadamard, search, spike"),
        ("int4:32:fp16:", "option ''", "asym"),
        ("int4:32:fp16:asym:asym", "'asym'", "more than once"),
        ("int4:32:e8m0:even:ceil", "'even' and 'ceil' clash", "one of them"),
        ("int4:32:fp16>", "''", "mxfp4"),
        ("mxfp4>int4:32:fp17", "scale 'fp17'", "fp16"),
        ("mxfp4>mxfp4>mxfp4", "'mxfp4>mxfp4'", "mxfp4"),
    ],
)
def test_misspellings_name_the_part_and_what_is_allowed(text, part, allowed):
    with pytest.raises(ValueError, match=f"(?s){re.escape(part)}.*{re.escape(allowed)}"):
        parse_codec(text)


@pytest.mark.parametrize("thing", [None, 4, ["mxfp4"], Codec.parse("mxfp4")])
def test_only_strings_are_parsed(thing):
    with pytest.raises(ValueError, match="named by a string"):
        parse_codec(thing)
