"""Read a prompt and its facts from a run's folder, or from the state folder of a deployed node.

This module reads and compares the files. `publish.rules` decides what may be published.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_dualpriv.client.node import personalisation
from fl_dualpriv.client.node_run import NODE_RUN_FILE, SCORED_FILE, NodeRun
from fl_dualpriv.client.personalisation import NAMES, personal_prompt
from fl_dualpriv.client.state import PART_FILE, PersonalState
from fl_dualpriv.config.methods import find_method
from fl_dualpriv.config.releases import prior_note
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.methods.base import Method
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent
from fl_dualpriv.publish.card import ScoreFacts, SourceFacts, parse_use
from fl_dualpriv.run.file_kinds import read_totals
from fl_dualpriv.tasks.use_facts import UseFacts

GLOBAL_ROW, PERSONAL_ROW = "global prompt", "published personal prompt"
"""Names of releases in a run's privacy table."""

Row = Mapping[str, Any]
"""Entry of the privacy table, see `privacy.plan.Release`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Prompt that may be published, with everything that the folder says about it.

    Attributes:
        prompt: Effective prompt P, (rows, cols). If the run scored a prompt, it is the scored one.
        use: Facts that a reader needs to use the prompt.
        source: Origin of the prompt.
        rows: All rows of the run's privacy table.
        ledgers: Unit → ledgers in the folder. A unit whose ledgers are stored elsewhere is missing.
        run_token: Token of the run.
        claims: Units for which the run states an ε, for any release.
        deployed: True if the clients ran on separate nodes, where their ledgers stay.
        backbone: Name of the model, as configured.
        pretrained: Weights of the model, as configured.
        notes: Further facts that a user of the prompt must know.
    """

    prompt: Tensor
    use: UseFacts
    source: SourceFacts
    rows: Sequence[Row]
    ledgers: Mapping[str, Sequence[LedgerContent]]
    run_token: str
    claims: frozenset[str]
    deployed: bool
    backbone: str
    pretrained: str
    notes: tuple[str, ...]


def read_material(folder: Path, client: int | None) -> Material:
    """Read a run's folder or a node's state folder.

    Args:
        folder: Folder of a run, or state folder of a node.
        client: Client that owns the personal prompt. None means the global prompt.

    Raises:
        ConfigError: If the folder is neither or is damaged, the run did not finish, or there is no such prompt.
        PrivacyError: If a ledger that must be in the folder is missing.
    """
    try:
        if (folder / NODE_RUN_FILE).exists():
            return _of_node(folder, client)
        return _of_run(folder, client)
    except (ConfigError, PrivacyError):
        raise
    except Exception as error:  # JSON, safetensors and missing keys each raise their own kinds
        raise ConfigError(f"{folder}: its files are damaged or of another version: {_words(error)}") from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def _of_run(folder: Path, client: int | None) -> Material:
    # Only a finished run may be published, because only its privacy table is final.
    summary_file = folder / "summary.json"
    if (folder / "error.json").exists() or not summary_file.exists():
        started = any((folder / name).exists() for name in ("error.json", "rounds.jsonl", "ledger.jsonl", "clients"))
        why = "the run did not finish" if started else "it is neither a run's folder nor a node's state folder"
        raise ConfigError(f"{folder}: {why}; only a finished run can be published")
    summary: dict[str, Any] = json.loads(summary_file.read_text(encoding="utf-8"))
    _check_owner(summary["method"], _method(summary), client, int(summary["population"]))
    # A prompt without the facts of its use could be applied wrongly, so it is refused.
    prompt_file = folder / "prompts" / "global.safetensors"
    tensors, metadata = read_tensors(prompt_file)
    if "use" not in metadata or "run-token" not in metadata:
        raise ConfigError(f"{prompt_file} does not say how to use the prompt: an older version wrote it; run it again")
    prompt = tensors.get("context", tensors["global"])
    token, deployed = metadata["run-token"], summary["engine"] == "deployment"
    # A client's prompt is the shared one combined with its own part, which lies in its own folder.
    if client is not None:
        if deployed:
            raise ConfigError(
                f"{folder}: the personal prompt of client {client} is on its node; its owner exports it from the "
                "node's state folder"
            )
        file = folder / "clients" / f"client-{client:03d}" / "prompt.safetensors"
        personal, late = _personal_after(file, token, summary, tensors["global"])
        prompt = _method(summary).effective(tensors["global"], personal)
    else:
        late = ()
    rows = list(summary["privacy"])
    # Scores may be published only where a release or public data covers them.
    scores, note = _scores_of_run(summary, client)
    prior = str(summary["config"].get("train.class-prior", "none"))  # runs of older versions had no priors
    if scores is not None and prior != "none":
        note = (*note, prior_note(prior))
    return Material(
        prompt=prompt,
        use=_use(json.loads(metadata["use"]), summary["method"]),
        source=SourceFacts(
            client=client,
            method=summary["method"],
            rounds=int(summary["rounds"]),
            population=int(summary["population"]),
            randomness=summary["randomness"],
            version=str(summary["versions"]["fl-dualpriv"]),
            scores=scores,
        ),
        rows=rows,
        ledgers=_ledgers_of_run(folder, summary, deployed=deployed),
        run_token=token,
        claims=frozenset(row["unit"] for row in rows),
        deployed=deployed,
        backbone=str(summary["config"]["backbone.name"]),
        pretrained=str(summary["config"]["backbone.pretrained"]),
        notes=(*note, *late, *(text for text in summary["notes"] if text.startswith("ended early"))),
    )


def _method(summary: Mapping[str, Any]) -> Method:
    """Return the method of a run, whose own class may lie in a folder."""
    keys = summary["config"]
    return find_method(summary["method"], str(keys.get("method-path", "")), str(keys.get("method-options", "")))


def _check_owner(method: str, facts: Method, client: int | None, population: int) -> None:
    if not facts.trains:
        raise ConfigError(f"a run of {method} learns nothing: there is no prompt to publish")
    if client is None and not facts.shared:
        raise ConfigError(f"a run of {method} has no global prompt: name a client")
    if client is not None and not facts.personal:
        raise ConfigError(f"a run of {method} has no personal prompts: export the global one")
    if client is not None and not 0 <= client < population:
        raise ConfigError(f"client {client}: the run has the clients 0 to {population - 1}")


def _use(content: object, method: str) -> UseFacts:
    if content is None:
        raise ConfigError(f"a prompt of a run of {method} cannot be used without the run, so it is not published")
    return parse_use(content)


def _personal_after(
    file: Path, run_token: str, summary: Mapping[str, Any], global_prompt: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the personal prompt that belongs to the run's last global prompt, and a note if it is an earlier one.

    It is the prompt that the run scored.
    """
    personal, rule_name = _personal(file, run_token), summary["config"].get("prompt.personalisation", "published")
    if rule_name == "published":
        return personal, ()
    if rule_name == "collective":
        return _part_after(file, run_token, summary, personal)
    tensors, metadata = read_tensors(file)
    state = PersonalState(
        personal=personal,
        row_basis=tensors["carrier"],
        server_round=int(metadata["server-round"]),
        release_memory={name: tensors[name] for name in NAMES},
    )
    rule = personalisation(RunConfig.from_run_config(summary["config"]))
    return personal_prompt(state, rule, global_prompt, int(summary["rounds"])), ()


def _part_after(
    file: Path, run_token: str, summary: Mapping[str, Any], trained_with: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the part that the server made after the last round, which comes with the scores of that round."""
    with contextlib.suppress(FileNotFoundError):
        tensors, metadata = read_tensors(file.with_name(PART_FILE))
        if metadata["run-token"] == run_token and int(metadata["server-round"]) == int(summary["rounds"]):
            return tensors["personal"], ()
    note = "with the personal part that the last round trained with: nothing is scored, so the final one was not sent"
    return trained_with, (note,)


def _personal(file: Path, run_token: str) -> Tensor:
    if not file.exists():
        raise ConfigError(
            f"{file} does not exist: this client has kept no personal prompt, because it took part in no round; export "
            "the global prompt (--client global) or that of another client"
        )
    tensors, metadata = read_tensors(file)
    if metadata.get("run-token") != run_token:
        raise ConfigError(f"{file} belongs to another run than the global prompt")
    return tensors["personal"]


def _ledgers_of_run(folder: Path, summary: Mapping[str, Any], *, deployed: bool) -> dict[str, Sequence[LedgerContent]]:
    """Return all ledgers of a simulation. The ledgers of deployed clients stay on their nodes.

    Guarantee:
        A client that answered a round has a ledger, because its line is written before its release. A missing ledger
        counts as empty only where the client left no state and no upload either, and where the run explains it: the
        run samples its clients, so a client may never have been asked, or calls of clients failed.

    Returns:
        Unit → ledgers. ``record`` has no ledgers where no sampled client took part in any round.

    Raises:
        PrivacyError: If a ledger is missing in any other case. Then nothing bounds what that client released.
    """
    at_server = _by_unit([Ledger(folder / "ledger.jsonl").read()])
    client_folders = [folder / "clients" / f"client-{i:03d}" for i in range(int(summary["population"]))]
    theorems = {row["unit"] for row in summary["privacy"] if row["guarantee"] == "theorem"}
    if "record" not in theorems or deployed:
        return at_server
    missing = [client for client in client_folders if not (client / "ledger.jsonl").exists()]
    if unexplained := missing if not _may_be_idle(folder, theorems) else list(filter(_has_answered, missing)):
        raise PrivacyError(
            f"{unexplained[0] / 'ledger.jsonl'} does not exist: without the client's ledger it is unknown what was "
            "released"
        )
    if len(missing) == len(client_folders) and "client" in theorems:
        return {"record": [], **at_server}
    client_ledgers = _by_unit([Ledger(client / "ledger.jsonl").read() for client in client_folders])
    return {
        unit: [*at_server.get(unit, []), *client_ledgers.get(unit, [])]
        for unit in at_server.keys() | client_ledgers.keys()
    }


def _may_be_idle(folder: Path, theorems: Set[str]) -> bool:
    """Return True if a client may have released nothing, because cohorts are sampled or calls of clients failed."""
    return "client" in theorems or read_totals(folder)["failures"] > 0


def _has_answered(client: Path) -> bool:
    """Return True if a client's folder holds a file that every round leaves there, see `ClientFolder`."""
    return any((client / name).exists() for name in ("prompt.safetensors", "sent.safetensors"))


def _by_unit(contents: Sequence[LedgerContent]) -> dict[str, Sequence[LedgerContent]]:
    """Divide ledgers by unit. A damaged line counts for each unit of its ledger, and for both if no event is left."""
    ledgers: dict[str, list[LedgerContent]] = {}
    for content in contents:
        for unit in {event.unit for event in content.events} or ({"record", "client"} if content.damaged else set()):
            events = tuple(event for event in content.events if event.unit == unit)
            ledgers.setdefault(unit, []).append(LedgerContent(events=events, damaged=content.damaged))
    return dict(ledgers)


def _scores_of_run(summary: Mapping[str, Any], client: int | None) -> tuple[ScoreFacts | None, tuple[str, ...]]:
    """Return the accuracies if they belong to this kind of prompt, or a note if they do not."""
    sound = {row["unit"] for row in summary["privacy"] if row["guarantee"] == "theorem"}
    of_personal = _method(summary).personal and (not sound or "record" in sound)
    before, free, after = (summary["accuracy"][when] for when in ("zero_shot", "free", "final"))
    if after["local"] is None and after["neighbour"] is None:
        return None, ()
    if of_personal != (client is not None):
        kind = "personal prompts" if of_personal else "the global prompt"
        return None, (f"the accuracies that the run reports are of {kind}, not of this one",)
    whose = "of the personal prompts, mean over all clients" if of_personal else "of this prompt, mean over all clients"
    return ScoreFacts(
        of=whose,
        split=summary["evaluation_split"],
        rival=free["rival"],
        zero_shot_local=before["local"],
        zero_shot_neighbour=before["neighbour"],
        free_local=free["local"],
        free_neighbour=free["neighbour"],
        local=after["local"],
        neighbour=after["neighbour"],
    ), ()


def _of_node(folder: Path, client: int | None) -> Material:
    content = json.loads((folder / NODE_RUN_FILE).read_text(encoding="utf-8"))
    run = NodeRun(**{field.name: content[field.name] for field in fields(NodeRun) if field.name in content})
    if client is None:
        raise ConfigError(f"{folder} is a node's folder: the global prompt is exported from the server's results")
    if client != run.client:
        raise ConfigError(f"{folder}: this node was client {run.client} of its last run")
    _check_owner(run.method, run.local_method, client, run.population)
    prompt, scores, note = _prompt_of_node(folder, run)
    return Material(
        prompt=prompt,
        use=_use(run.use, run.method),
        source=SourceFacts(
            client=client,
            method=run.method,
            rounds=run.rounds,
            population=run.population,
            randomness=run.randomness,
            version=run.version,
            scores=scores,
        ),
        rows=run.releases,
        ledgers=_by_unit([Ledger(folder / "ledger.jsonl").read()]),
        run_token=run.run_token,
        claims=frozenset([*(row["unit"] for row in run.releases), *(["client"] if run.claims_client_level else [])]),
        deployed=True,
        backbone=run.backbone,
        pretrained=run.pretrained,
        notes=note,
    )


def _prompt_of_node(folder: Path, run: NodeRun) -> tuple[Tensor, ScoreFacts | None, tuple[str, ...]]:
    """Return the prompt that the last round scored. Without scores, use the global prompt of the last training."""
    file = folder / "prompt.safetensors"
    personal = _personal(file, run.run_token)
    scored = folder / SCORED_FILE
    if scored.exists():
        tensors, metadata = read_tensors(scored)
        if metadata["run-token"] == run.run_token and int(metadata["server-round"]) == run.rounds:
            shares = [json.loads(metadata[kind]) for kind in ("local", "neighbour")]
            facts = ScoreFacts(
                of="of this prompt on its node",
                split=run.split,
                rival="",
                zero_shot_local=None,
                zero_shot_neighbour=None,
                free_local=None,
                free_neighbour=None,
                local=shares[0],
                neighbour=shares[1],
            )
            prior = metadata.get("class-prior", "none")  # nodes of older versions had no priors
            return tensors["prompt"], facts, () if prior == "none" else (prior_note(prior),)
    tensors, metadata = read_tensors(file)
    if (last := int(metadata["server-round"])) != run.rounds:
        raise ConfigError(f"{folder}: the run did not finish here, the last round was {last} of {run.rounds}")
    note = "with the global prompt that the last round sent: the node did not receive the final one"
    return run.local_method.effective(tensors["global"], personal), None, (note,)
