"""The file of a published prompt: same bytes, one card, and nothing of a hostile one gets through. No model here."""

import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import fl_dualpriv
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.publish.card import Guarantee, PublishedFacts, ScoreFacts, SourceFacts, parse_facts
from fl_dualpriv.publish.file import KEY, PublishedPrompt, card_path, parse_published, read_published, write_published
from fl_dualpriv.publish.model_card import model_card
from fl_dualpriv.tasks.use_facts import BackboneFacts, PrunerFacts, UseFacts

FACTS = PublishedFacts(
    use=UseFacts(
        kind="context",
        classes=("cat", "dog"),
        template="a photo of a {}",
        max_tokens=0,
        backbone=BackboneFacts(
            name="ViT-B-32",
            pretrained="openai",
            is_local=False,
            precision="fp32",
            fingerprint="0123456789abcdef",
            image_side="fedcba9876543210",
        ),
        pruner=PrunerFacts(
            layer=-2,
            keep_ratio=0.5,
            contextual=1,
            merge="attention",
            score="attention",
            fusion_noise_std=0.0,
            seed=0,
        ),
    ),
    source=SourceFacts(
        client=3,
        method="dpfpl",
        rounds=10,
        population=5,
        randomness="os",
        version="0.1.0",
        scores=ScoreFacts(
            of="mean",
            split="test",
            rival="un-tuned, own class list",
            zero_shot_local=0.25,
            zero_shot_neighbour=None,
            free_local=0.375,
            free_neighbour=None,
            local=0.5,
            neighbour=0.125,
        ),
    ),
    guarantees=(
        Guarantee(
            unit="record",
            relation="add-or-remove-one",
            sampling="Poisson, q = 0.15 per step",
            releases=40,
            epsilon=3.9941,
            delta=1e-4,
            trusts="nobody",
            note="jointly with every global prompt",
        ),
    ),
    not_private=False,
    notes=("a note",),
)
PROMPT = PublishedPrompt(prompt=torch.arange(8.0).reshape(2, 4), probe=torch.tensor([0.5, -0.5]), facts=FACTS)


def content(facts: str | None = None, **tensors: Tensor) -> bytes:
    described = {KEY: FACTS.to_json() if facts is None else facts}
    return save({"prompt": PROMPT.prompt, "probe": PROMPT.probe} | tensors, described)


def changed(*path: str, to: Any = None, drop: bool = False) -> str:
    """The facts with one field at a path replaced, or left out."""
    found: Any = json.loads(FACTS.to_json())
    place = found
    for name in path[:-1]:
        place = place[name]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(found)


def test_what_was_written_is_read_and_the_same_bytes_are_written_again(tmp_path: Path):
    files = [tmp_path / name / "p.safetensors" for name in ("one", "two")]
    for file in files:
        write_published(file, PROMPT)
    found = read_published(files[0])
    assert torch.equal(found.prompt, PROMPT.prompt)
    assert torch.equal(found.probe, PROMPT.probe)
    assert found.facts == FACTS
    for one, two in (files, map(card_path, files)):
        assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["p.md", "p.safetensors"]  # no temporary file
    assert read_published(files[0]).facts.lines == (
        # ε is rounded up: 3.9941 is not 3.994
        "record level: ε = 3.995 at δ = 0.0001 for one record of a client (add-or-remove-one; Poisson, q = 0.15 per "
        "step; 40 releases; trusts nobody; jointly with every global prompt)",
    )


def test_a_write_that_fails_leaves_the_old_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "p.safetensors"
    write_published(file, PROMPT)
    before = file.read_bytes()
    new = PublishedPrompt(prompt=PROMPT.prompt + 1, probe=PROMPT.probe, facts=FACTS)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_published(file, new)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.md", "p.safetensors"]


def test_no_prompt_is_written_that_could_not_be_read(tmp_path: Path):
    bad = PublishedPrompt(prompt=torch.tensor([[math.nan]]), probe=PROMPT.probe, facts=FACTS)
    with pytest.raises(ConfigError, match="not finite"):
        write_published(tmp_path / "p.safetensors", bad)
    silent = PublishedPrompt(prompt=PROMPT.prompt, probe=PROMPT.probe, facts=replace(FACTS, guarantees=()))
    with pytest.raises(PrivacyError, match="no guarantee line"):
        write_published(tmp_path / "p.safetensors", silent)
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        write_published(tmp_path / "p.bin", PROMPT)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_off_anywhere_is_refused():
    whole = content()
    assert parse_published(whole).facts == FACTS
    for end in range(0, len(whole), 7):
        with pytest.raises((ConfigError, PrivacyError)):
            parse_published(whole[:end])
    with pytest.raises(ConfigError, match="damaged"):
        parse_published(whole + b"\0")


def header(size: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", size) + text


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "header-of-exabytes": (header(2**63), "not a safetensors file"),
    "header-beyond-the-file": (header(100, b"{}"), "not a safetensors file"),
    "header-no-json": (header(2, b"{]"), "no guarantee line"),
    "header-deep": (header(200_000, b"[" * 200_000), "no guarantee line"),
    "header-list": (header(2, b"[]"), "no guarantee line"),
    "offsets-outside": (
        header(
            len(
                bad := json.dumps(
                    {
                        "__metadata__": {KEY: FACTS.to_json()},
                        "prompt": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 2**40]},
                        "probe": {"dtype": "F32", "shape": [2], "data_offsets": [2**40, 2**40 + 8]},
                    }
                ).encode()
            ),
            bad + bytes(40),
        ),
        "damaged",
    ),
    "no-metadata": (save({"prompt": PROMPT.prompt}), "no guarantee line"),
    "other-tensor": (content(more=PROMPT.prompt.clone()), "two tensors"),
    "float64": (content(prompt=PROMPT.prompt.double()), "float64 of shape"),
    "integers": (content(prompt=PROMPT.prompt.to(torch.int64)), "int64 of shape"),
    "one-dimension": (content(prompt=torch.ones(2)), "expected float32 with 2 dimensions"),
    "no-numbers": (content(prompt=torch.zeros(0, 4)), r"shape \(0, 4\)"),
    "nan": (content(prompt=torch.full((2, 4), math.nan)), "prompt holds numbers that are not finite"),
    "infinite-probe": (content(probe=torch.tensor([math.inf])), "probe holds numbers that are not finite"),
    "facts-no-json": (content("{"), "not JSON"),
    "facts-deep": (content("[" * 100_000), "not JSON"),
    "facts-nan": (content(FACTS.to_json().replace("3.9941", "NaN")), "guarantees.epsilon = nan"),
    "facts-endless": (content(FACTS.to_json().replace("3.9941", "9" * 400)), "guarantees.epsilon"),
    "other-format": (content(changed("format", to=1)), "format 2"),
    "no-guarantee": (content(changed("guarantees", drop=True)), "no guarantee line"),
    "empty-guarantee": (content(changed("guarantees", to=[])), "no guarantee line"),
    "guarantee-and-none": (content(changed("not_private", to=True)), "says that it has none"),
    "zero-epsilon": (content(FACTS.to_json().replace("3.9941", "0.0")), "which is not a guarantee"),
    "no-classes": (content(changed("use", "classes", to=[])), "without classes"),
    "classes-missing": (content(changed("use", "classes", drop=True)), "missing or unknown fields in use: classes"),
    "one-class": (content(changed("use", "classes", to=["cat"])), "fewer than two"),
    "same-classes": (content(changed("use", "classes", to=["cat", "cat"])), "not all different"),
    "class-no-text": (content(changed("use", "classes", to=["cat", 3])), "use.classes = 3"),
    "class-of-a-megabyte": (content(changed("use", "classes", to=["cat", "d" * 2**20])), "use.classes"),
    "template": (content(changed("use", "template", to="{0.__class__} {}")), "exactly one {}"),
    "unknown-field": (content(changed("use", "path", to="/etc")), "unknown fields in use: path"),
    "kind": (content(changed("use", "kind", to="exec")), "use.kind = 'exec'"),
    "true-is-no-number": (content(changed("source", "rounds", to=True)), "source.rounds = True"),
    "pruner": (content(changed("use", "pruner", "merge", to="evil")), "use.pruner.merge"),
    "absolute-path": (content(changed("use", "backbone", "name", to="local-dir:/etc")), "named by a path"),
    "path-up": (content(changed("use", "backbone", "name", to="hf:../../secrets")), "named by a path"),
    "long-path": (content(changed("use", "backbone", "name", to="hf:a/b/c")), "named by a path"),
    "hidden-folder": (content(changed("use", "backbone", "name", to="local-dir:models")), "does not say so"),
    "hidden-file": (content(changed("use", "backbone", "pretrained", to="x.pt")), "does not say so"),
    "weights-path": (content(changed("use", "backbone", "pretrained", to="/tmp/x.pt")), "named by a path"),
    "fingerprint": (content(changed("use", "backbone", "fingerprint", to="")), "16 hex digits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_one_sentence(name: str):
    bytes_, message = HOSTILE[name]
    with pytest.raises((ConfigError, PrivacyError), match=message) as caught:
        parse_published(bytes_)
    assert len(str(caught.value)) < 500


def test_a_file_that_no_prompt_is_as_large_as_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fl_dualpriv.publish.file._MOST_BYTES", 100)
    (tmp_path / "p.safetensors").write_bytes(content())
    with pytest.raises(ConfigError, match="larger than"):
        read_published(tmp_path / "p.safetensors")


EVIL = (
    "</code><script>alert(1)</script>",
    "`x` ![](http://a/b)",
    "# top",
    "a|b",
    "```\n# heading",
    "\x1b[2J",
    "ünï\u202e",
)


def test_names_in_a_card_stay_names():
    use = replace(FACTS.use, classes=EVIL, template="<b>`{}`|")
    card = model_card(replace(FACTS, use=use), "p.safetensors", (2, 4))
    assert "<" not in card
    assert not {"\x1b", "\u202e"} & set(card)  # the second one writes backwards
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert [h.partition(" ")[2].partition(",")[0] for h in headings] == [
        *("Personal prompt of client 3", "What it reveals", "How to use it", "Where it comes from", "Classes")
    ]
    fences = [i for i, line in enumerate(card.splitlines()) if "```" in line]
    assert len(fences) == 2  # one block, opened and closed by the card
    block = "\n".join(card.splitlines()[fences[0] + 1 : fences[1]])
    assert json.loads(block) == list(EVIL)  # and yet nothing is lost
    assert all(line.count("|") == 3 for line in card.splitlines() if line.startswith("| template"))


def test_the_card_says_what_the_file_says():
    card = model_card(FACTS, "p.safetensors", (2, 4))
    for part in (
        *("ViT-B-32", "openai", "0123456789abcdef", "a photo of a {}", "dpfpl", "2 x 4 numbers", "10 rounds"),
        *(
            FACTS.lines[0],
            "| final | 50.0 % | 12.5 % |",
            "| zero-shot | 25.0 % | - |",
            "end",
            '"cat"',
            "keep_ratio=0.5",
        ),
    ):
        assert part in card
    silent = replace(FACTS, guarantees=(), not_private=True)
    assert "- no differential privacy: the prompt may reveal the data" in model_card(silent, "p.safetensors", (2, 4))
    assert not re.search(r"ε = ", model_card(silent, "p.safetensors", (2, 4)))


def test_facts_survive_their_json_whatever_is_none():
    for facts in (
        FACTS,
        replace(FACTS, use=replace(FACTS.use, pruner=None), source=replace(FACTS.source, client=None, scores=None)),
        replace(FACTS, guarantees=(), not_private=True),
    ):
        assert parse_facts(facts.to_json()) == facts
        assert facts.to_json().isascii()


def test_the_package_stays_light():
    heavy = "[m for m in ('torch', 'numpy', 'typer') if m in sys.modules]"
    code = f"import sys, fl_dualpriv; print(len(fl_dualpriv.__all__), {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(fl_dualpriv.__all__)} []\n"
    assert set(fl_dualpriv.__all__) == {"__version__", *fl_dualpriv._HOMES}
    assert all(getattr(fl_dualpriv, name) is not None for name in fl_dualpriv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fl_dualpriv.nothing  # noqa: B018
