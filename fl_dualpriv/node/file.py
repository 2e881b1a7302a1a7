"""The file in which the owner of a node says what may happen with the data on it. TOML; nothing in it travels.

    state-dir = "/var/lib/fl-dualpriv"   # the client's prompt and ledger; must survive restarts and new apps
    data-path = "/srv/images"            # the only images or questions that a run may read, whatever its data.path
                                         # says; all of them are this node's client
    classes = "/srv/classes.json"        # if the names of its folders are not those of the classes (as data.classes)
    device = "cuda"                      # auto | cpu | cuda | cuda:N; without such a GPU it says so and takes the CPU

    [model]                              # the only model that a run may use; without it the one that the run names
    name = "local-dir:/srv/models/vit"   # as backbone.name, and pretrained as backbone.pretrained

    [server]
    address = "fl.example.org:8000"
    root-certificates = "/etc/fl-dualpriv/ca.crt"
    private-key = "/etc/fl-dualpriv/node.key"
    partition-id = 0                     # which client this node is
    port = 9094                          # on this machine alone; another one for each node of it

    [budget]                             # of one record of this node's data, over all runs and servers
    epsilon = 8.0
    delta = 1e-5
    max-sampling-rate = 0.2
    min-noise-multiplier = 0.5
    max-clip-norm = 1.0
    integer-arithmetic = false           # true: only privacy.arithmetic = "integer", whose low-order bits tell nothing
    trusts-server = false                # true: clean clipped sums may go to the server
    scores = false                       # true: test/ and val/ (of questions test.jsonl …) are public, so accuracies
                                         # on them may leave
    seeded-noise = false                 # true: tests only
    filter = "reserve"                   # reserve | renyi | worst-terms: the rule that holds epsilon, whatever terms a
                                         # server chooses; fixed when the ledger begins (docs/privacy.md, section 6)
    expected-runs = 10                   # reserve: delta is divided among so many runs, and no more are admitted
    max-run-epsilon = 1.0                # reserve: the most that one run may take, and the charge of a damaged line;
                                         # without it a damaged line closes the ledger
    # composition = "advanced"           # reserve: Whitehouse et al.'s bound in place of the sum; needs delta-prime
    # delta-prime = 1e-6                 # the part of delta that it costs
    # expected-sampling-rate = 0.15      # renyi: the terms for which its fixed order is the best; without them the
    # expected-noise-multiplier = 1.1    # largest rate and the smallest multiplier above
    max-round-releases = 100             # local steps of one round; a damaged line is charged as so many

    [app]
    allowed = ["…"]                      # SHA-256 of each app bundle that may run here

Standard library only, but for our own budget class.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.node import tables as node_tables
from fl_dualpriv.node.filter import FILTER_KEYS, filter_problems, read_filter
from fl_dualpriv.node.tables import NodeModel, NodeServer
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.limits import (
    LARGEST_BUDGET,
    LARGEST_CLIP_NORM,
    LARGEST_NOISE_MULTIPLIER,
    SMALLEST_BUDGET,
    SMALLEST_CLIP_NORM,
    SMALLEST_DELTA,
    SMALLEST_NOISE_MULTIPLIER,
    SMALLEST_SAMPLING_RATE,
    is_clip_norm,
)

ENVIRONMENT = "FL_DUALPRIV_NODE"
"""Names the file where no node configuration can: in a simulation, whose nodes are made by Flower."""

_HEX = frozenset("0123456789abcdef")
_REQUIRED = ("epsilon", "delta", "max-sampling-rate", "min-noise-multiplier", "max-clip-norm")


@dataclass(frozen=True, kw_only=True)
class NodeFile:
    """What the owner says.

    Attributes:
        state_dir: Absolute folder of the client's prompt and ledger; None: in the run's folder (simulations).
        data_path: Absolute folder of the images, or of the questions (whose files may name images elsewhere), in place
            of the run's ``data.path``; None: what the run names.
        budget: Limits at the record level; None: the run's own plan is the only limit.
        apps: SHA-256 digests, lower-case hex, of the app bundles that may run here.
        classes: Absolute path of the file of class names, in place of the run's ``data.classes``.
        device: Where the model runs, in place of the run's ``resources.device``.
        model: In place of the run's ``backbone.name`` and ``backbone.pretrained``.
        server: How the node reaches its server; None: the options of its start say it.
    """

    state_dir: Path | None
    data_path: Path | None
    budget: Budget | None
    apps: tuple[str, ...]
    classes: Path | None = None
    device: str | None = None
    model: NodeModel | None = None
    server: NodeServer | None = None

    def overrides(self) -> dict[str, str]:
        """Configuration keys of every run on this node that its owner decides, whatever the server names.

        Guarantee:
            With a ``data_path`` no run names a file of this node's disk to be read as data, and with a ``state_dir``
            none names a place to which features of the data are written.
        """
        keys: dict[str, str] = {}
        if self.data_path is not None:
            keys |= {"data.path": str(self.data_path), "data.classes": str(self.classes or "")}
        if self.state_dir is not None:
            keys["resources.feature-cache"] = str(self.state_dir / "features")
        if self.device is not None:
            keys["resources.device"] = self.device
        if self.model is not None:
            keys |= {"backbone.name": self.model.name, "backbone.pretrained": self.model.pretrained}
        return keys


def find_node_file(named: str | None) -> NodeFile | None:
    """The owner's file: named in the node's configuration, else in the environment, else none.

    Raises:
        ConfigError: If it cannot be used: then nothing may run, for the owner meant to set limits. So if a node's own
            configuration names a file with a budget and without folders: a ledger in a run's folder is gone with the
            run, and a server that names the images could name others.
    """
    path = named or os.environ.get(ENVIRONMENT, "")
    found = read_node_file(Path(path)) if path else None
    if named and found is not None and (missing := missing_folders(found)):
        raise ConfigError(f"node file {path}: {missing}")
    return found


def missing_folders(node: NodeFile) -> str | None:
    """What a deployed node with a budget lacks, in words; None if nothing."""
    if node.budget is None:
        return None
    if node.state_dir is None:
        return "a [budget] but no state-dir: every run would start with the whole budget; give an absolute folder"
    if node.data_path is None:
        return "a [budget] but no data-path: the server would say which images it is for; give an absolute folder"
    return None


def make_state_folder(folder: Path) -> None:
    """Make an owner's state folder, readable by this user only (0700); one that is there keeps its mode.

    Raises:
        OSError: If it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def read_node_file(path: Path) -> NodeFile:
    """Read and check the owner's file.

    Raises:
        ConfigError: With every problem found.
    """
    if not path.is_absolute():
        raise ConfigError(f"node file {path}: give an absolute path")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"node file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"node file {path} is not valid TOML: {error}") from error
    problems: list[str] = []
    app = content.get("app", {})
    known = {"state-dir", "data-path", "classes", "device", "model", "server", "budget", "app"}
    unknown = sorted(set(content) - known)
    if not isinstance(app, dict):
        problems, app = ["app must be a table"], {}
    unknown += [f"app.{key}" for key in sorted(set(app) - {"allowed"})]
    problems += [f"unknown key {key}" for key in unknown]
    found = NodeFile(
        state_dir=node_tables.folder("state-dir", content.get("state-dir"), problems),
        data_path=node_tables.folder("data-path", content.get("data-path"), problems),
        budget=_budget(content["budget"], problems) if "budget" in content else None,
        apps=_apps(app.get("allowed", []), problems),
        classes=node_tables.folder("classes", content.get("classes"), problems),
        device=node_tables.device(content.get("device"), problems),
        model=node_tables.model(content.get("model"), problems),
        server=node_tables.server(content.get("server"), problems),
    )
    if problems:
        raise ConfigError("\n  ".join([f"node file {path}:", *problems]))
    return found


def _apps(value: Any, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        problems.append(f"app.allowed = {value!r}; give a list of SHA-256 digests in quotes")
        return ()
    for digest in value:
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEX):
            problems.append(f"app.allowed names {digest!r}; a SHA-256 digest has 64 digits of 0-9 and a-f")
    return tuple(digest for digest in value if isinstance(digest, str))


def _budget(table: Any, problems: list[str]) -> Budget | None:
    """The limits. A missing number is a problem: no default is the owner's decision. Permissions default to no."""
    if not isinstance(table, Mapping):
        problems.append("budget must be a table")
        return None
    before = len(problems)
    keys = [field.name.replace("_", "-") for field in fields(Budget) if field.name != "filter"]
    problems += [f"unknown key budget.{key}" for key in sorted(set(table) - set(keys) - FILTER_KEYS)]
    values: dict[str, Any] = {}
    for key in keys:
        name, value = key.replace("-", "_"), table.get(key)
        if key in _REQUIRED:
            if value is None:
                problems.append(f"budget.{key} is missing")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not _allowed(key, float(value)):
                problems.append(f"budget.{key} = {value!r}; it must be {_RANGES[key]}")
            else:
                values[name] = float(value)
        elif not isinstance(value := table.get(key, False), bool):
            problems.append(f"budget.{key} = {value!r}; it must be true or false")
        else:
            values[name] = value
    choice = read_filter(table, problems)
    if len(problems) > before:
        return None
    budget = Budget(**values, filter=choice)
    problems += filter_problems(budget)
    return budget


_RANGES = {
    "epsilon": f"from {SMALLEST_BUDGET:g} to {LARGEST_BUDGET:g}",
    "delta": f"at least {SMALLEST_DELTA:g} and less than 1",
    "max-sampling-rate": f"from {SMALLEST_SAMPLING_RATE:g} to 1",
    "min-noise-multiplier": f"0 or from {SMALLEST_NOISE_MULTIPLIER:g} to {LARGEST_NOISE_MULTIPLIER:g}",
    "max-clip-norm": f"from {SMALLEST_CLIP_NORM:g} to {LARGEST_CLIP_NORM:g}",
}


def _allowed(key: str, value: float) -> bool:
    if not math.isfinite(value):
        return False
    return {
        "epsilon": SMALLEST_BUDGET <= value <= LARGEST_BUDGET,
        "delta": SMALLEST_DELTA <= value < 1,
        "max-sampling-rate": SMALLEST_SAMPLING_RATE <= value <= 1,
        "min-noise-multiplier": value == 0 or SMALLEST_NOISE_MULTIPLIER <= value <= LARGEST_NOISE_MULTIPLIER,
        "max-clip-norm": is_clip_norm(value),
    }[key]
