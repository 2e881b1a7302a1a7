"""One photo set from folders, lists, questions and data sets through the command: the same features, and whole runs."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.data.layout import Reading
from fl_dualpriv.data.load import load_data, load_questions
from fl_dualpriv.features.images import ImageFeatures
from fl_dualpriv.models.load import load_backbone

ROOT = Path(__file__).parents[2]
CLASSES, DOMAINS = ("bird", "cat", "dog"), ("day", "night")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of a phone that was held upright: every file lies on its side, and its tag says so."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = []
    for i in range(48):
        label, domain = CLASSES[i % 3], DOMAINS[i // 3 % 2]
        file = root / "flat" / label / f"{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(file, exif=exif, quality=95)
        rows.append({"image": f"flat/{label}/{file.name}", "label": label, "domain": domain, "client": f"c{i % 4}"})
    (root / "list.csv").write_text(
        "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]), encoding="utf-8"
    )
    asked = [row | {"question": "what is it?", "answer": row["label"]} for row in rows]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    columns["image"] = [(root / name).read_bytes() for name in columns["image"]]
    columns["image"] = [{"bytes": content, "path": None} for content in columns["image"]]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(str(root / "saved"))
    (root / "classes.json").write_text(json.dumps({"template": "a drawing of a {}"}))
    return root


def test_the_same_photo_has_the_same_features_from_everywhere(root: Path):
    backbone = load_backbone("demo", "", "cpu")
    sources = [str(root / "flat"), str(root / "list.csv"), f"datasets:{root / 'saved'}"]
    read = [load_data("folder", path, "", 0.1, 0.2, 0, Reading()).train for path in sources]
    read.append(load_questions("questions", str(root / "questions.jsonl"), 0.1, 0.2, 0, "keep").train.images)
    tables: list[dict[bytes, bytes]] = []
    for images in read:
        rows = ImageFeatures(backbone, images, None).rows(np.arange(len(images)))
        assert images.image(0).size == (24, 40), "upright"
        tables.append({images.image(i).tobytes(): rows[i].tobytes() for i in range(len(images))})
    common = set.intersection(*(set(table) for table in tables))
    assert len(common) >= 10, "each source has a cut of its own"
    for photo in common:
        assert len({table[photo] for table in tables}) == 1


def run(root: Path, out: Path, *settings: str) -> dict[str, Any]:
    words = [f"--set={setting}" for setting in settings]
    common = [
        "backbone.name=demo",
        "rounds=1",
        "train.local-steps=1",
        "prompt.init=random",
        f"data.classes={root / 'classes.json'}",
    ]
    command = ["run", str(ROOT / "simulations" / "configs" / "your-data.toml"), "--engine", "local", "--out", str(out)]
    result = CliRunner().invoke(cli.app, [*command, *words, *(f"--set={setting}" for setting in common)])
    assert result.exit_code == 0, result.output
    assert "0 failed" in result.output
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("source", ["list.csv", "saved"])
def test_a_run_by_domain(source: str, root: Path, tmp_path: Path):
    path = str(root / source) if source == "list.csv" else f"datasets:{root / source}"
    settings = [f"data.path={path}", "data.partition=by-domain", "population=4"]
    summary = run(root, tmp_path / "run", *settings, "evaluation.held-out-data=public")
    assert {release["guarantee"] for release in summary["privacy"]} == {"theorem"}
    assert summary["config"]["data.path"] == path


def test_a_run_by_client_and_by_a_partitioner(root: Path, tmp_path: Path):
    run(root, tmp_path / "a", f"data.path={root / 'list.csv'}", "data.partition=by-client", "population=4")
    partitioner = "data.partitioner=PathologicalPartitioner(num_classes_per_partition=2)"
    run(root, tmp_path / "b", f"data.path={root / 'flat'}", "data.partition=flwr-datasets", partitioner, "population=3")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.path=list.csv", "data.label-column=kind"], "data.label-column = 'kind': there is no such column"),
        (["data.path=list.csv", "data.partition=by-client", "population=9"], "the records name 4 clients; set popul"),
        (["data.path=flat", "data.partition=by-client"], "folders name no clients; give a .csv or .jsonl list"),
        (["data.path=flat", "data.partition=flwr-datasets"], 'is read with data.partition = "flwr-datasets"'),
        (
            ["data.path=flat", "data.partition=flwr-datasets", "data.partitioner=Pathological"],
            "flwr-datasets has no Pathological; it has",
        ),
        (["data.path=missing.csv"], "missing.csv does not exist"),
    ],
)
def test_a_mistake_is_told_before_the_start(settings: list[str], says: str, root: Path, tmp_path: Path):
    path, *rest = settings
    words = [f"--set=data.path={root / path.partition('=')[2]}", *(f"--set={setting}" for setting in rest)]
    command = ["run", str(ROOT / "simulations" / "configs" / "your-data.toml"), "--engine", "local"]
    classes = f"--set=data.classes={root / 'classes.json'}"
    result = CliRunner().invoke(
        cli.app, [*command, "--out", str(tmp_path / "run"), classes, "--set=prompt.init=random", *words]
    )
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
