"""Rehearse a whole deployment on this machine: real SuperLink and SuperNodes over TLS, with refusals and a crash.

    python deploy/rehearsal.py OUT [--rounds 5]

The script makes certificates, a SuperLink that authenticates its nodes, and three nodes, each with its own image
folder, state folder and budget. The nodes run in network namespaces if this machine permits them. A key that is not
registered and another CA are refused. During the run one node is killed (SIGKILL, all its processes) and started again;
its prompt and ledger go on. Then each node's prompt is exported on that node, and must predict the node's held-out
images with the accuracy of the run. The exit status is 0 if all of it held. ``OUT/report.json`` has the observations,
and the logs are beside it.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sites import NODES, Sites, wait_until

from fl_dualpriv.flower import programs, supervisor

KILLED = 1
"""Number of the node that is killed during round `KILLED_IN`. It comes back when that round has ended without it."""
KILLED_IN = 2


class Failed(Exception):
    """A requirement of the rehearsal does not hold."""


def demand(holds: bool, what: str) -> None:
    """Raise `Failed` with the text ``what`` unless ``holds``."""
    if not holds:
        raise Failed(what)


@dataclass(kw_only=True)
class Rehearsal:
    """The steps of the script, in order.

    Attributes:
        sites: The simulated machines.
        rounds: Number of rounds of the run.
        report: Observations, by name.
    """

    sites: Sites
    rounds: int
    report: dict[str, Any] = field(default_factory=dict)

    def play(self) -> None:
        """Make all steps.

        Raises:
            Failed: At the first requirement that does not hold.
        """
        sites, start = self.sites, time.monotonic()
        self.report["nodes in network namespaces"] = bool(sites.network.spaces)
        sites.start_superlink()
        nodes = [sites.start_node(number, waits=False) for number in range(NODES)]
        self.refusals()
        for node in nodes:
            sites.wait_for(node)
        self.report["joined after seconds"] = round(time.monotonic() - start, 1)
        sites.submit(self.rounds)
        self.kill_and_restart(nodes[KILLED])
        wait_until(lambda: sites.ended() is not None, 600, "the end of the run")
        demand(sites.ended() == "summary.json", f"the run failed: {sites.read('error.json')}")
        self.check_run()
        self.check_exports()
        self.report["seconds"] = round(time.monotonic() - start, 1)

    def refusals(self) -> None:
        """Check that a node that is not registered and a node with another CA cannot join."""
        sites = self.sites
        refused = [
            (name, sites.start_node(number, name=name, certificates=certificates, waits=False, retries=0))
            for name, number, certificates in (
                ("stranger", NODES, sites.root / "certs"),
                ("other-ca", NODES, sites.other_ca()),
            )
        ]
        for name, node in refused:
            wait_until(lambda node=node: node.process.poll() is not None, 120, f"{name} to be refused")
            log_text = node.log.read_text(errors="replace")
            demand("SuperNode ID" not in log_text, f"{name} joined")
            demand(node.process.returncode != 0, f"{name} ended with status 0")
            reason = log_text.partition("Failed to initialize the connection to the SuperLink.\n")[2].partition("\n")[0]
            demand(name == "stranger" or "CERTIFICATE_VERIFY_FAILED" in reason, f"{name}: {log_text}")
            self.report[f"{name} refused"] = reason
        check = sites.check_node(0, sites.other_ca())
        demand(check.returncode == 1 and "not signed by this CA" in check.stdout, f"node check: {check.stdout}")
        check = sites.check_node(0)
        demand(check.returncode == 0, f"node check: {check.stdout}{check.stderr}")
        self.report["node check"] = check.stdout.splitlines()

    def kill_and_restart(self, node: Any) -> None:
        """Send SIGKILL to every process of a node while it works, and start the node again from the same file."""
        sites = self.sites
        wait_until(lambda: node.said(f"ROUND {KILLED_IN}]") or sites.ended() is not None, 600, f"round {KILLED_IN}")
        demand(sites.ended() is None, f"the run ended before the kill: {sites.read('error.json')}")
        before = sites.ledger(KILLED)
        supervisor.kill(supervisor.descendants(node.process.pid))
        node.process.wait(timeout=60)
        self.report["killed with rounds in the ledger"] = len(before)
        wait_until(
            lambda: len(sites.rounds()) > KILLED_IN or sites.ended() is not None, 600, "a round without the node"
        )
        again = sites.start_node(KILLED, name=f"node-{KILLED}-again")
        demand(sites.ledger(KILLED)[: len(before)] == before, "the ledger lost events")
        wait_until(lambda: again.said("health: joined") or sites.ended() is not None, 600, "a health line")
        self.report["health after the kill"] = again.lines("health: joined")[0]

    def check_run(self) -> None:
        """Check that all rounds were made, that only the killed node missed some, and that no node answered twice."""
        sites = self.sites
        summary, totals = json.loads(sites.read("summary.json")), json.loads(sites.read("operator/totals.json"))
        ledgers = [sites.ledger(n) for n in range(NODES)]
        demand(summary["rounds"] == self.rounds, f"{summary['rounds']} rounds")
        for number, events in enumerate(ledgers):
            rounds = [event["server_round"] for event in events]
            demand(len(set(rounds)) == len(rounds), f"node {number} answered a round twice: {rounds}")
            demand(len({event["run"] for event in events}) == 1, f"node {number} has more than one run")
            least = 2 if number == KILLED else self.rounds
            demand(least <= len(rounds) <= self.rounds, f"node {number} answered {rounds}")
        back = [event["server_round"] for event in ledgers[KILLED] if event["server_round"] > KILLED_IN]
        demand(self.rounds in back, f"the killed node did not come back for good: {back}")
        self.report |= {
            "rounds": [[event["server_round"] for event in events] for events in ledgers],
            "failures": totals["failures"],
            "accuracy": summary["accuracy"]["final"],
            "run seconds": round(totals["seconds"], 1),
            "rounds end after": [round(line["seconds"], 1) for line in sites.progress()],
        }

    def check_exports(self) -> None:
        """Export the prompt on each node, and check that it has the accuracy of the run on the held-out images."""
        sites, rates = self.sites, []
        for number in range(NODES):
            images = sorted((sites.home(number) / "images" / "test").glob("*/*.png"))
            predictions = sites.predict(number, sites.export(number), images)
            demand(len(predictions) == len(images), f"{len(predictions)} predictions for {len(images)} images")
            named = [sites.class_name(image.parent.name) for image in images]
            rates.append(sum(map(str.__eq__, predictions, named)) / len(images))
        run = self.report["accuracy"]["local"]
        demand(abs(sum(rates) / NODES - run) < 1e-6, f"exported prompts are right in {rates}, the run says {run}")
        self.report["exported prompts are right in"] = rates


@contextlib.contextmanager
def _told(rehearsal: Rehearsal) -> Iterator[None]:
    """Write the report in any case, also after an error."""
    failed = "nothing"
    try:
        yield
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
        raise
    finally:
        content = json.dumps(rehearsal.report | {"failed": failed}, indent=1, ensure_ascii=False)
        (rehearsal.sites.root / "report.json").write_text(content + "\n", encoding="utf-8")


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--app", type=Path, default=Path(__file__).parents[1], help="the app that runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-namespaces", action="store_true", help="all nodes on 127.0.0.1")
    options = parser.parse_args()
    if options.rounds < KILLED_IN + 2:
        parser.error(f"--rounds: at least {KILLED_IN + 2}, because a node is killed in round {KILLED_IN}")
    if options.out.exists():
        parser.error(f"{options.out} exists: give a new folder")
    if programs.find("flower-superlink") is None:
        parser.error(f"flower-superlink is in none of {programs.places()}")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that namespaces are removed
    with Sites.prepared(options.out.absolute(), options.app.absolute(), not options.no_namespaces) as sites:
        rehearsal = Rehearsal(sites=sites, rounds=options.rounds)
        try:
            with _told(rehearsal):
                rehearsal.play()
        except (Failed, TimeoutError, subprocess.SubprocessError) as error:
            print(f"failed: {error}\nlogs: {sites.root}", file=sys.stderr)
            return 1
    print((options.out / "report.json").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
