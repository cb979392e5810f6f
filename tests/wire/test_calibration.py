# SPDX-License-Identifier: Apache-2.0
"""Calibrations of a link and its codecs: their file, what finds it, and what every mistake in it is told."""

import math
from dataclasses import replace

import pytest
import yaml

from megatron_comp.wire import calibration as module
from megatron_comp.wire.calibration import (
    ASSUMED,
    LEVEL_LINKS,
    LINKS,
    VARIABLE,
    Calibration,
    CodecCost,
    Link,
    default_path,
    find_calibration,
)
from megatron_comp.wire.codec import Codec

MXFP4, INT8 = Codec.parse("mxfp4"), Codec.parse("int8:32:fp16")
MEASURED = {"ranks": 3, "hosts": 1, "backend": "gloo", "device": "cpu"}
LEVELS = {"inside": 1e9, "across": 1e7}
EXAMPLE = Calibration(
    {name: Link(1e9 + place, place * 1e-5, ((10.0, 1e-5), (20.0, 2e-5))[:place]) for place, name in enumerate(LINKS)},
    {str(MXFP4): CodecCost(1e-5, 2e-9, 3e-5, 1e-9), str(INT8): CodecCost(2e-5, 1e-9, 1e-5, 5e-9)},
    0.25,
    MEASURED,
    hidden=0.5,
)


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "made" / "calibration.yaml"
    EXAMPLE.write(path)
    read = Calibration.from_file(path)
    assert (read.links, read.codecs, read.margin, read.measured, read.hidden) == (
        EXAMPLE.links,
        EXAMPLE.codecs,
        EXAMPLE.margin,
        EXAMPLE.measured,
        0.5,
    )
    assert read.source == str(path) and read.ranks == 3
    assert [file.name for file in path.parent.iterdir()] == ["calibration.yaml"]


def test_times_beyond_the_points_are_a_line():
    assert Link(1e6, 0.5).seconds(3_000_000) == 3.5
    assert Link(1e6, 0.5, ((10, 0.1), (1000, 0.2))).seconds(3_000_000) == 3.5


def test_times_between_points_lie_between_theirs():
    link = Link(1e6, 0.5, ((100, 0.1), (1000, 1.0), (2000, 3.0)))
    assert [link.seconds(n) for n in (0, 50, 100, 500, 1000, 1500)] == pytest.approx([0, 0.05, 0.1, 0.5, 1, 2])
    assert Link(1e6, 0.5, ((100, 0.1),)).seconds(50) == 0.1
    assert Link(1e6, 0.5, ((100, 0.3), (200, 0.2))).seconds(50) == 0.3
    assert Link(1e6, 0.5, ((100, 0.1), (200, 0.9))).seconds(50) == 0.05


def test_a_codec_that_was_not_measured_is_as_slow_as_the_slowest():
    assert EXAMPLE.knows(MXFP4) and not EXAMPLE.knows(Codec.parse("nvfp4"))
    assert EXAMPLE.cost(MXFP4) == CodecCost(1e-5, 2e-9, 3e-5, 1e-9)
    assert EXAMPLE.cost(Codec.parse("nvfp4")) == CodecCost(2e-5, 2e-9, 3e-5, 5e-9)
    assert ASSUMED.knows(MXFP4) and ASSUMED.cost(MXFP4) == CodecCost(0, 0, 0, 0)


def content(**changed):
    made = {
        "schema": 1,
        "measured": MEASURED,
        "links": {name: {"bytes_per_s": 1e9, "latency_s": 1e-5} for name in LINKS},
        "codecs": {"mxfp4": dict.fromkeys(("encode_fixed_s", "encode_s_per_value"), 1e-5)},
        "margin": 0.1,
    }
    made["codecs"]["mxfp4"] |= dict.fromkeys(("decode_fixed_s", "decode_s_per_value"), 1e-5)
    return made | changed


def links(**changed):
    return content()["links"] | changed


def level():
    return {name: {"bytes_per_s": 1e9, "latency_s": 1e-5} for name in LEVEL_LINKS}


@pytest.mark.parametrize(
    "given, told",
    [
        (content(schema=2), r"schema 2 is not 1"),
        ({key: value for key, value in content().items() if key != "links"}, r"links is missing"),
        (content(speed=3), r"'speed' is unknown; allowed are schema, measured, links, inside, across, codecs, "),
        (content(measured=MEASURED | {"ranks": 1}), r"measured: ranks: 1 is not a number of ranks above 1"),
        (content(measured=MEASURED | {"device": "tpu"}), r"measured: device: 'tpu' is not one of cpu, cuda"),
        (content(measured=MEASURED | {"dtype": "nn"}), r"measured: dtype: 'nn' is not a type of torch's"),
        (content(links=links(ring={})), r"links: 'ring' is unknown; allowed are all_reduce, "),
        (content(links=links(all_gather={"bytes_per_s": 1e9})), r"links: all_gather: latency_s is missing"),
        (
            content(links=links(all_gather={"bytes_per_s": 0, "latency_s": 0})),
            r"links: all_gather: bytes_per_s: a link of 0 bytes",
        ),
        (
            content(links=links(all_gather={"bytes_per_s": 1, "latency_s": 0, "points": [[8]]})),
            r"links: all_gather: points: \[\[8\]\] is not a list of \[bytes, seconds\]",
        ),
        (
            content(links=links(all_gather={"bytes_per_s": 1, "latency_s": 0, "points": [[8, 1], [8, 2]]})),
            r"links: all_gather: points: \[8.0, 8.0\] bytes do not ascend",
        ),
        (content(inside=level()), r"inside, across: one of them is missing"),
        (content(inside=level(), across=level()["all_gather"]), r"across: 'bytes_per_s' is unknown; allowed are all_g"),
        (content(inside={"all_gather": level()["all_gather"]}, across=level()), r"inside: all_to_all is missing"),
        (content(codecs={}), r"codecs: none was measured"),
        (content(codecs={"mxfp5": content()["codecs"]["mxfp4"]}), r"codec 'mxfp5' is neither"),
        (content(codecs={"mxfp4": {"encode_fixed_s": 1}}), r"codecs: mxfp4: encode_s_per_value is missing"),
        (content(margin=-0.1), r"margin: -0.1 is not a number >= 0"),
        (content(margin=math.nan), r"margin: nan is not a number >= 0"),
        (content(hidden=1.5), r"hidden: 1.5 is a share above 1"),
        (content(hidden="all"), r"hidden: 'all' is not a number"),
        (content(margin="much"), r"margin: 'much' is not a number"),
        ([1, 2], r"expected names with values, got \[1, 2\]"),
        (None, r"expected names with values, got None"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path, given, told):
    path = tmp_path / "calibration.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match=rf"calibration file {path}.*{told}"):
        Calibration.from_file(path)


def test_what_is_no_yaml(tmp_path):
    path = tmp_path / "calibration.yaml"
    path.write_text("links: [")
    with pytest.raises(ValueError, match="calibration.yaml is not YAML"):
        Calibration.from_file(path)


def test_numbers_as_yaml_takes_them_for_text(tmp_path):
    path = tmp_path / "calibration.yaml"
    path.write_text(yaml.safe_dump(content()).replace("margin: 0.1", "margin: 1e-1"))
    assert Calibration.from_file(path).margin == 0.1


def test_links_of_two_levels(tmp_path):
    path = tmp_path / "calibration.yaml"
    two = replace(EXAMPLE, **{key: {n: Link(rate, 1e-3) for n in LEVEL_LINKS} for key, rate in LEVELS.items()})
    two.write(path)
    read = Calibration.from_file(path)
    assert (read.inside, read.across, read.links) == (two.inside, two.across, two.links)
    assert {key: getattr(read, key)["all_gather"].bytes_per_s for key in LEVELS} == LEVELS


def test_files_without_levels_know_of_none(tmp_path):
    path = tmp_path / "calibration.yaml"
    EXAMPLE.write(path)
    assert not {"inside", "across"} & set(yaml.safe_load(path.read_text()))
    assert Calibration.from_file(path).inside == Calibration.from_file(path).across == {}


def test_files_that_say_nothing_of_chunks_take_them_to_hide_all(tmp_path):
    path = tmp_path / "calibration.yaml"
    path.write_text(yaml.safe_dump(content()))
    assert Calibration.from_file(path).hidden == ASSUMED.hidden == 1.0


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty cache and no variable."""
    monkeypatch.setenv("MEGATRON_COMP_CACHE", str(tmp_path))
    for name in (VARIABLE, "MEGATRON_COMP_LINK", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_what_is_found_and_in_which_order(here, tmp_path):
    group = (3, 1, "gloo", "cpu")
    assert find_calibration(*group) is ASSUMED
    EXAMPLE.write(default_path(*group))
    assert find_calibration(*group).source == str(default_path(*group))
    assert find_calibration(2, 1, "gloo", "cpu") is ASSUMED
    other = tmp_path / "other.yaml"
    EXAMPLE.write(other)
    here.setenv(VARIABLE, str(other))
    assert find_calibration(*group).source == str(other)
    here.setenv(VARIABLE, "assumed")
    assert find_calibration(*group) is ASSUMED
    here.setenv(VARIABLE, str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        find_calibration(*group)


def test_models_with_graphs_go_by_replays_where_they_were_measured(here):
    group = (3, 1, "gloo", "cpu")
    EXAMPLE.write(default_path(*group))
    assert find_calibration(*group, graphs=True).source == str(default_path(*group))
    EXAMPLE.write(default_path(*group, graphs=True))
    assert find_calibration(*group, graphs=True).source == str(default_path(*group, graphs=True))
    assert find_calibration(*group).source == str(default_path(*group)) != str(default_path(*group, graphs=True))


@pytest.mark.parametrize(
    "group, told",
    [
        ((4, 1, "gloo", "cpu"), r"three.yaml was measured with 3 ranks, this group has 4: calibrate again"),
        ((3, 1, "nccl", "cuda"), r"three.yaml was measured on cpu, this group is on cuda: calibrate again"),
    ],
)
def test_a_calibration_of_another_group_is_refused(here, tmp_path, group, told):
    EXAMPLE.write(tmp_path / "three.yaml")
    here.setenv(VARIABLE, str(tmp_path / "three.yaml"))
    with pytest.raises(ValueError, match=told):
        find_calibration(*group)


def as_a_folder(path):
    path.mkdir()


def as_a_policy(path):
    path.write_text("codec: mxfp4\nmin_bytes: 0\n")


def as_an_image(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda path: None, f"calibration file .*given.yaml of {VARIABLE}: No such file or directory"),
        (as_a_folder, f"calibration file .*given.yaml of {VARIABLE}: Is a directory"),
        (as_a_policy, "calibration file .*given.yaml: 'codec' is unknown; allowed are schema, .*`megatron-comp calibr"),
        (as_an_image, "calibration file .*given.yaml is not YAML: 'utf-8' codec can't decode byte 0x89"),
        (lambda path: path.touch(), "calibration file .*given.yaml: expected names with values, got None"),
    ],
    ids=["missing", "a folder", "a policy", "an image", "empty"],
)
def test_a_named_file_that_is_no_calibration(here, tmp_path, make, told):
    make(tmp_path / "given.yaml")
    here.setenv(VARIABLE, str(tmp_path / "given.yaml"))
    with pytest.raises(ValueError, match=told):
        find_calibration(2, 1, "gloo", "cpu")


def test_groups_that_differ_have_files_that_differ(here):
    groups = [(2, 1, "gloo", "cpu"), (3, 1, "gloo", "cpu"), (3, 2, "gloo", "cpu"), (3, 1, "nccl", "cuda")]
    paths = [default_path(*group) for group in groups]
    here.setenv("GLOO_SOCKET_IFNAME", "eth/0")
    paths.append(default_path(*groups[2]))
    here.setenv("MEGATRON_COMP_LINK", "100mbit")
    paths.append(default_path(*groups[0]))
    assert len(set(paths)) == len(paths) and len({path.parent for path in paths}) == 1
    assert module.SCHEMA == 1


def test_one_machine_has_one_file_whichever_interface_is_named(here):
    """`calibrate` names loopback for ranks that it starts, torchrun names nothing."""
    group = (2, 1, "gloo", "cpu")
    path = default_path(*group)
    here.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert default_path(*group) == path
