# SPDX-License-Identifier: Apache-2.0
import pytest

from megatron_comp.inference.text import read_text, read_tokenizer
from research import own_text


def test_pieces_stand_in_turn_until_one_text_ends():
    one, other = (
        "\n\n".join(f"{name} {number} " + "x" * 1000 for number in range(n)) for name, n in (("a", 9), ("b", 99))
    )
    made = own_text.in_turn(one, other)
    order = [paragraph[0] for paragraph in made.split("\n\n") if paragraph]
    assert order == list("aaaabbbbaaaabbbbabbbb")


def test_a_model_writes_as_many_tokens_as_asked(smollm2, tmp_path):
    given = [str(smollm2), "--pieces", "3", "--length", "8", "--batch", "2"]
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        own_text.main([*given, "--seed", seed, "--out", str(tmp_path / name)])
    one, again, other = (read_text(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again != other
    assert 3 * 7 <= len(read_tokenizer(smollm2).encode(one)) <= 3 * 10


def test_a_piece_has_a_token(capsys, tmp_path):
    with pytest.raises(SystemExit):
        own_text.main(["model", "--pieces", "0", "--out", str(tmp_path / "text")])
    assert "--pieces 0: at least 1 is needed" in capsys.readouterr().err
