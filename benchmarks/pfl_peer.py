"""The peer pfl-research: FederatedAveraging on its SimulatedBackend in one process, on the same task.

Run it as `PYTHON -m benchmarks.pfl_peer TASK OUT ROUNDS` with the interpreter of `pfl_environment`, because pfl needs
an older dp-accounting than this project.
"""

# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peer_task import PeerModel, load_task


def main(path: Path, out: Path, rounds: int) -> None:
    """Train, and write a line per round and the result."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(1)
    task = load_task(path)
    module = PeerModel(task)
    # Make tensors once, because pfl turns int64 arrays into floats and would convert every batch.
    users = [PyTorchTensorDataset((x, y)) for x, y in zip(task.features, task.labels, strict=True)]
    sampler = get_user_sampler("minimize_reuse", list(range(len(users))))  # each user once per round
    cohort = FederatedDataset(users.__getitem__, sampler)

    class Lines(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            with (out / "rounds.jsonl").open("a") as file:
                file.write(json.dumps({"round": central_iteration + 1}) + "\n")
            return False, Metrics()

    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=len(users),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=cohort, val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=task.local_steps,
            local_learning_rate=task.learning_rate,
            local_batch_size=None,  # all data of a user, so one step per epoch
        ),
        callbacks=[Lines()],
    )
    np.save(out / "prompt.npy", module.prompt.detach().numpy())
    (out / "summary.json").write_text(json.dumps({"failures": 0}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
