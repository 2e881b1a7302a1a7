"""What is said and refused before a run starts: every problem of data, names and template at once, without a model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv.cli import job as run_job
from fl_dualpriv.cli import main as cli
from fl_dualpriv.cli import run as run_command
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.data.layout import Reading
from fl_dualpriv.data.load import load_data, load_questions
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.tasks.disclosure import keeps_bad_records
from fl_dualpriv.tasks.survey import survey

ROOT = Path(__file__).parents[3]
DEFAULTS = app_defaults(ROOT)
NO_DP: dict[str, Any] = {"privacy.record.mechanism": "none"}


def write_class(folder: Path, images: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "house"):
        write_class(tmp_path / "images" / name, 10)
    (tmp_path / "classes.json").write_text(json.dumps({"template": "a sketch of a {}"}))
    return tmp_path / "images"


def configure(path: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    load_data.cache_clear()
    load_questions.cache_clear()
    given = {"data.path": str(path), "population": 3, "data.classes": str(path.parent / "classes.json")}
    return RunConfig.from_run_config(DEFAULTS | given | {"prompt.init": "random"} | (changes or {}))


def spoil(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command; the engine must not start."""

    def never(_engine: run_job.Engine, _job: run_job.Job) -> None:
        raise AssertionError("the engine was started")

    def call(changes: dict[str, Any], *words: str) -> Result:
        file = tmp_path / "own.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in changes.items()))
        monkeypatch.setattr(run_command, "run_engine", never)
        place = ["--app", str(ROOT), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(cli.app, ["run", str(file), *place, *words])

    return call


def test_four_problems_are_one_message_without_torch(images: Path) -> None:
    """torch alone takes two seconds of CPU, and the whole command has three."""
    for name in ("tree", "zorblax"):
        write_class(images / name, 1 if name == "tree" else 5)
    (images / "moon").mkdir()
    file = images.parent / "own.toml"
    file.write_text(f'data.path = "{images}"\n')
    script = "import sys; from fl_dualpriv.cli.main import app\ntry: app()\nfinally: print('torch' in sys.modules)"
    words = ["run", str(file), "--app", str(ROOT), "--out", str(images.parent / "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    head, *problems = done.stderr.splitlines()
    assert head == f"error: the images in {images} cannot be used:"
    for words, line in zip(
        ("moon/ holds no image", "class tree has 1 images", "does not know: 'photo'", "'zorblax' (zorblax/)"),
        problems,
        strict=True,
    ):
        assert words in line
    assert not (images.parent / "out").exists()


@pytest.mark.parametrize("changes", [{}, {"privacy.client.mechanism": "gaussian", "method": "promptfl"}], ids=str)
def test_a_folder_without_a_readable_image_does_not_start(
    images: Path, run: Callable[..., Result], changes: dict[str, Any]
) -> None:
    spoil(images)
    (images / "cat" / "00.png").unlink()
    (images / "cat" / "00.png").symlink_to("nowhere")
    (images / "dog" / "01.png").unlink()
    Image.new("1", (300, 1)).save(images / "dog" / "01.png")
    classes = str(images.parent / "classes.json")
    load_data.cache_clear()
    given = {"data.path": str(images), "population": 3, "data.classes": classes, "prompt.init": "random"}
    given |= {"privacy.client.expected-cohort": 2.0, "data.val-fraction": 0.01, "data.test-fraction": 0.01}
    result = run(given | changes)
    assert result.exit_code == 2, result.output
    # One image of each class is cut for val and one for test.
    assert "none of the 24 training images can be used: " in result.output
    assert "cannot be read" in result.output
    assert f"image {images}/cat/" in result.output
    assert "... and 19 more" in result.output
    assert not (images.parent / "out").exists()


def test_a_bad_image_stays_a_record_under_dp_and_is_named_for_the_operator(images: Path) -> None:
    write_class(images / "test" / "cat", 1)  # a class that is called test has sub-folders: said, not raised raw
    with pytest.raises(ConfigError, match="train/ is missing beside test"):
        survey(configure(images))
    for file in (images / "test").rglob("*"):
        file.unlink() if file.is_file() else None
    (images / "test" / "cat").rmdir()
    (images / "test").rmdir()
    data = load_data("folder", str(images), "", 0.1, 0.2, 0, Reading(on_bad="keep")).train
    Path(data.paths[0]).write_bytes(b"")  # type: ignore[attr-defined]
    (images / "cat" / "a.raw").touch()
    (images / "b.png").touch()
    lines = survey(configure(images))
    assert lines[0] == "data: 21 training images of 3 classes: 20 usable of 21, 1 cannot be read"
    assert lines[1].startswith(f"  image {data.paths[0]} cannot be read")  # type: ignore[attr-defined]
    assert "clients: 3; records per client: minimum 7, median 7, maximum 7" in lines
    assert "skipped because of their ending: 1 .raw" in lines
    assert "skipped because they lie in no class folder: 1 images" in lines
    with pytest.raises(ConfigError, match=r"1 of 30 images cannot be used"):
        survey(configure(images, NO_DP))


def test_a_client_without_a_usable_record_is_a_warning(images: Path) -> None:
    spoil(images / "cat")
    assert any(line.startswith("warning: 1 of 3 clients have no usable record") for line in survey(configure(images)))


@pytest.mark.parametrize(
    ("changes", "split", "says"),
    [
        ({}, None, ("private", "nothing will be scored", "Give a separate test/ folder", 'held-out-data = "public"')),
        ({"evaluation.held-out-data": "public"}, None, ("6 test images, public",)),
        (NO_DP, None, ("their scores are shown",)),
        ({}, "test", ("2 test images, public; their scores may leave",)),
        ({"evaluation.held-out-data": "private"}, "test", ('scored: evaluation.held-out-data = "private"',)),
        ({"evaluation.split": "val"}, None, ("3 val images, private", "Give a separate val/ folder")),
    ],
    ids=str,
)
def test_whether_scores_leave_and_the_ways_out(
    images: Path, changes: dict[str, Any], split: str | None, says: tuple[str, ...]
) -> None:
    if split:
        for name in ("cat", "dog"):
            write_class(images.parent / "whole" / "train" / name, 5)
            write_class(images.parent / "whole" / split / name, 1)
        images = images.parent / "whole"
    text = "\n".join(survey(configure(images, changes | {"population": 2})))
    for words in says:
        assert words in text
    assert ("warning" in text) is (says[0] == "private" or "nothing" in text)


def test_problems_of_size_and_words_come_together(images: Path) -> None:
    (images / "cat").rename(images / "a_big_red_cat_in_a_house_on_a_hill_with_a_dog_and_a_cat")
    with pytest.raises(ConfigError) as caught:
        survey(configure(images, {"population": 99, "prompt.init": "template", "backbone.name": "ViT-B-16"}))
    assert "prompt.n-ctx = 4, but the template 'a sketch of a {}' has 4" not in str(caught.value)
    assert "population = 99: there are only 21" in str(caught.value)
    with pytest.raises(ConfigError, match=r"prompt.n-ctx = 5, but the template 'a sketch of a \{\}' has 4 tokens"):
        survey(configure(images, {"prompt.init": "template", "prompt.n-ctx": 5, "backbone.name": "ViT-B-16"}))
    with pytest.raises(ConfigError, match=r"too long: .*takes 16 tokens, .*prompt.n-ctx = 70 there is room for 5"):
        survey(configure(images, {"prompt.n-ctx": 70, "backbone.name": "ViT-B-16"}))
    with pytest.raises(PrivacyError, match=r"privacy.record.delta = 0.2 with 7 records"):
        survey(configure(images, {"privacy.record.delta": 0.2, "backbone.name": "ViT-B-16"}))


def write_questions(folder: Path, kind: str, answer: str, image: str = "{}.png") -> str:
    """Questions about twelve images, in one of the forms that a run reads; the path that is typed beside ``folder``."""
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    rows = [{"image": image.format(i), "question": f"what is {i} ?", "answer": answer} for i in range(12)]
    if kind == "jsonl":
        (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = ["image,question,answer", *(",".join(row.values()) for row in rows)]
        (folder / "all.csv").write_text("\n".join(lines))
    else:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["image"] = [str(folder / name) for name in columns["image"]]
        table = datasets.Dataset.from_dict(columns)
        if kind == "saved":
            table.cast_column("image", datasets.Image()).save_to_disk(str(folder / "saved"))
            return f"datasets:{folder.name}/saved"
        table.to_parquet(str(folder / "all.parquet"))
        return f"datasets:{folder.name}/all.parquet"
    return f"{folder.name}/all.{kind}"


KINDS = ("jsonl", "csv", "saved", "parquet")
ASKING = {"data.ref": "questions", "backbone.name": "demo-vqa", "population": 3, "data.partition": "iid"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_questions_is_found_from_where_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What the engine is given does not depend on the working directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    load_questions.cache_clear()
    typed = write_questions(tmp_path / "asked", kind, "red")
    file = tmp_path / "own.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in ASKING.items()))
    job = run_job.prepare(file, [f"data.path={typed}"], tmp_path / "out", ROOT, overwrite=False)
    monkeypatch.chdir("/")
    load_questions.cache_clear()
    assert survey(RunConfig.from_run_config(job.flat)) == list(job.data)
    assert job.data[0] == "data: 9 training questions about 9 images: 9 usable of 9"
    assert "warning: nothing will be scored" in job.data[-1]
    assert "Give a separate test set" in job.data[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["answer", "image"])
def test_questions_none_of_which_can_be_used_do_not_start(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, kind: str, bad: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    load_questions.cache_clear()
    typed = write_questions(tmp_path / "asked", kind, "red" if bad == "image" else " ")
    if bad == "image" and kind != "saved":
        spoil(tmp_path / "asked")
    elif bad == "image":
        shutil.rmtree(tmp_path / "asked" / "saved")
        spoil(tmp_path / "asked")
        contents = [{"bytes": b"no image %d" % i, "path": None} for i in range(12)]
        rows = [{"image": content, "question": "q", "answer": "a"} for content in contents]
        texts = {name: datasets.Value("string") for name in ("question", "answer")}
        features = datasets.Features({"image": datasets.Image(), **texts})
        datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "asked" / "saved"))
    result = run(ASKING, "--set", f"data.path={typed}")
    assert result.exit_code == 2, result.output
    kinds = {"answer": "9 without usable words", "image": "9 whose image cannot be read"}
    assert f"none of the 9 training questions can be used: {kinds[bad]}" in result.output
    assert "... and 4 more" in result.output


def test_a_record_is_kept_where_a_plan_protects_it() -> None:
    for method in METHODS:
        for record in ("none", "gaussian"):
            for client in ("none", "gaussian"):
                levels = {"privacy.record.mechanism": record, "privacy.client.mechanism": client, "rounds": 1}
                levels |= dict.fromkeys(
                    ("privacy.record.calibrate-to", "privacy.client.calibrate-to"), "noise-multiplier"
                )
                try:
                    config = RunConfig.from_run_config(DEFAULTS | levels | {"method": method})
                except ConfigError:
                    continue  # not every method goes with every level
                has_plan = record_level_plan(config) is not None or client_level_plan(config) is not None
                assert keeps_bad_records(config) is has_plan, (method, levels)
