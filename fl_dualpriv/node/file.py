"""Read the owner's file of a node: TOML that says what may happen with the data on the node. Nothing in it is sent.

    state-dir = "/var/lib/fl-dualpriv"   # the client's prompt and ledger; must survive restarts and new apps
    data-path = "/srv/images"            # the only images or questions that a run may read, for any data.path of the
                                         # run; all of them belong to this node's client
    classes = "/srv/classes.json"        # if folder names are not class names (as data.classes)
    columns = {image = "photo", label = "species"}   # if data-path is a list or a data set with other column names
    class-shares = "/srv/shares.toml"    # the client's share of each class (as data.class-shares), which is public
                                         # from then on; only train.class-prior = "declared" reads it
    device = "cuda"                      # auto | cpu | cuda | cuda:N; without such a GPU the node says so and uses
                                         # the CPU

    [model]                              # the only model that a run may use; the default is the run's model
    name = "local-dir:/srv/models/vit"   # as backbone.name, and pretrained as backbone.pretrained

    [server]
    address = "fl.example.org:8000"
    root-certificates = "/etc/fl-dualpriv/ca.crt"
    private-key = "/etc/fl-dualpriv/node.key"
    partition-id = 0                     # number of this node's client
    port = 9094                          # only on this machine; each node of the machine needs another port

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
    filter = "reserve"                   # reserve | renyi | worst-terms: the rule that holds epsilon for any terms
                                         # that a server chooses; fixed when the ledger begins (docs/privacy.md,
                                         # section 6)
    expected-runs = 10                   # reserve: delta is divided among this many runs, and no more are admitted
    max-run-epsilon = 1.0                # reserve: the most that one run may take, and the charge of a damaged line;
                                         # without it a damaged line closes the ledger
    # composition = "advanced"           # reserve: Whitehouse et al.'s bound in place of the sum; needs delta-prime
    # delta-prime = 1e-6                 # the part of delta that the advanced composition costs
    # expected-sampling-rate = 0.15      # renyi: the terms for which its fixed order is the best; without them the
    # expected-noise-multiplier = 1.1    # largest rate and the smallest multiplier above
    max-round-releases = 100             # local steps of one round; a damaged line is charged as this many

    [app]
    allowed = ["…"]                      # SHA-256 of each app bundle that may run here

Standard library only, except for this package's own budget class.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
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
"""Variable that names the owner's file where no node configuration can: in a simulation, Flower makes the nodes."""

_HEX = frozenset("0123456789abcdef")
_REQUIRED = ("epsilon", "delta", "max-sampling-rate", "min-noise-multiplier", "max-clip-norm")


@dataclass(frozen=True, kw_only=True)
class NodeFile:
    """Content of the owner's file.

    Attributes:
        state_dir: Absolute folder of the client's prompt and ledger. None means the run's folder (simulations).
        data_path: Absolute folder of the images, or of the questions (whose files may name images elsewhere), in place
            of the run's ``data.path``. None means that of the run.
        budget: Limits at the record level. None means that the run's own plan is the only limit.
        apps: SHA-256 digests, lower-case hex, of the app bundles that may run here.
        classes: Absolute path of the file of class names, in place of the run's ``data.classes``.
        columns: Columns of image and label, in place of the run's ``data.*-column``: a server that names the column of
            the label could make a private column the class list, which no noise protects.
        class_shares: Absolute path of the file of class shares, in place of the run's ``data.class-shares``.
        device: Device of the model, in place of the run's ``resources.device``.
        model: Model, in place of the run's ``backbone.name`` and ``backbone.pretrained``.
        server: Connection to the node's server. None means that the options of its start give it.
    """

    state_dir: Path | None
    data_path: Path | None
    budget: Budget | None
    apps: tuple[str, ...]
    classes: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    class_shares: Path | None = None
    device: str | None = None
    model: NodeModel | None = None
    server: NodeServer | None = None

    def overrides(self) -> dict[str, str]:
        """Return the configuration keys that the owner decides for every run on this node, for any value of the server.

        Guarantee:
            With a ``data_path`` no run can name a file of this node's disk, or a column, to be read as data. With a
            ``state_dir`` no run can name a place to which features of the data are written.
        """
        keys: dict[str, str] = {}
        if self.data_path is not None:
            keys |= {"data.path": str(self.data_path), "data.classes": str(self.classes or "")}
            keys["data.class-shares"] = str(self.class_shares or "")
            roles = ("image", "label", "domain", "client")
            keys |= {f"data.{role}-column": self.columns.get(role, "") for role in roles}
        if self.state_dir is not None:
            keys["resources.feature-cache"] = str(self.state_dir / "features")
        if self.device is not None:
            keys["resources.device"] = self.device
        if self.model is not None:
            keys |= {"backbone.name": self.model.name, "backbone.pretrained": self.model.pretrained}
        return keys


def find_node_file(named: str | None) -> NodeFile | None:
    """Find and read the owner's file: named in the node's configuration, else in the environment, else None.

    Raises:
        ConfigError: If the file cannot be used. Then nothing may run, because the owner meant to set limits. This
            includes a file that a node's own configuration names and that has a budget but no folders: a ledger in a
            run's folder disappears with the run, and a server that names the images could name others.
    """
    path = named or os.environ.get(ENVIRONMENT, "")
    node_file = read_node_file(Path(path)) if path else None
    if named and node_file is not None and (missing := missing_folders(node_file)):
        raise ConfigError(f"node file {path}: {missing}")
    return node_file


def missing_folders(node: NodeFile) -> str | None:
    """Say in words which folder a deployed node with a budget lacks; None if it lacks none."""
    if node.budget is None:
        return None
    if node.state_dir is None:
        return "a [budget] but no state-dir: every run would start with the whole budget; give an absolute folder"
    if node.data_path is None:
        return "a [budget] but no data-path: the server would choose the images; give an absolute folder"
    return None


def make_state_folder(folder: Path) -> None:
    """Make an owner's state folder, readable by this user only (0700). An existing folder keeps its mode.

    Raises:
        OSError: If the folder cannot be made.
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
    known = {
        "state-dir",
        "data-path",
        "classes",
        "columns",
        "class-shares",
        "device",
        "model",
        "server",
        "budget",
        "app",
    }
    unknown = sorted(set(content) - known)
    if not isinstance(app, dict):
        problems, app = ["app must be a table"], {}
    unknown += [f"app.{key}" for key in sorted(set(app) - {"allowed"})]
    problems += [f"unknown key {key}" for key in unknown]
    node_file = NodeFile(
        state_dir=node_tables.folder("state-dir", content.get("state-dir"), problems),
        data_path=node_tables.folder("data-path", content.get("data-path"), problems),
        budget=_budget(content["budget"], problems) if "budget" in content else None,
        apps=_apps(app.get("allowed", []), problems),
        classes=node_tables.folder("classes", content.get("classes"), problems),
        columns=node_tables.columns(content.get("columns"), problems),
        class_shares=node_tables.folder("class-shares", content.get("class-shares"), problems),
        device=node_tables.device(content.get("device"), problems),
        model=node_tables.model(content.get("model"), problems),
        server=node_tables.server(content.get("server"), problems),
    )
    if problems:
        raise ConfigError("\n  ".join([f"node file {path}:", *problems]))
    return node_file


def _apps(value: Any, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        problems.append(f"app.allowed = {value!r}; give a list of SHA-256 digests in quotes")
        return ()
    for digest in value:
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEX):
            problems.append(f"app.allowed names {digest!r}; a SHA-256 digest has 64 digits of 0-9 and a-f")
    return tuple(digest for digest in value if isinstance(digest, str))


def _budget(table: Any, problems: list[str]) -> Budget | None:
    """Read the limits. A missing number is a problem: no default decides for the owner. Permissions default to no."""
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
