"""MLflow: the server that MLFLOW_TRACKING_URI names, or files in the run's folder."""

import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # it would try for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files are what a run without a server can have

from mlflow.entities import Param
from mlflow.tracking import MlflowClient

from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.tracking.base import Tracker

_LONGEST, _BATCH = 500, 100  # letters of a parameter, and parameters of one call


class MLflow(Tracker):
    """One run of the experiment ``fl-dualpriv``: the configuration as parameters, the numbers as metrics."""

    def __init__(self, folder: Path, config: Mapping[str, ConfigValue]) -> None:
        super().__init__(folder, config)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri())
        experiment = self._client.get_experiment_by_name("fl-dualpriv")
        number = experiment.experiment_id if experiment else self._client.create_experiment("fl-dualpriv")
        self._run = self._client.create_run(number, run_name=folder.parent.name).info.run_id
        parameters = [Param(key, str(value)[:_LONGEST]) for key, value in config.items()]
        for start in range(0, len(parameters), _BATCH):
            self._client.log_batch(self._run, params=parameters[start : start + _BATCH])

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=server_round)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)
