"""Build the task of a configuration: data, partition, frozen model and objective, once per process."""

from typing import TYPE_CHECKING

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.tasks.base import Task
from fl_dualpriv.tasks.disclosure import delta_problems, keeps_bad_records

if TYPE_CHECKING:
    from fl_dualpriv.tasks.images import ImageTask


def build_task(config: RunConfig) -> Task:
    """Load and check everything the run needs.

    The task is cached by the values that it depends on, so that methods share features.

    Raises:
        ConfigError: If data, model, prompt or partition do not work as configured; see the message.
        PrivacyError: If a configured δ is too large to be meaningful for data or populations of this size.
    """
    on_bad = "keep" if keeps_bad_records(config) else "raise"
    if config.data.asks_questions:
        from fl_dualpriv.tasks.questions import build_question_task  # late import: a run on images does not need it

        task: Task = build_question_task(config, on_bad)
    else:
        from fl_dualpriv.tasks.images import build_image_task

        task = build_image_task(config, on_bad)
    if problems := delta_problems(config, max(len(indices) for indices in task.partitions)):
        raise PrivacyError("\n  ".join(problems))
    return task


def image_task(config: RunConfig) -> "ImageTask":
    """Build the task for code that supports only prompts of image classification, such as the attacks.

    Raises:
        ConfigError: If the run answers questions or does not learn a prompt, or for the reasons of `build_task`.
    """
    from fl_dualpriv.tasks.images import ImageTask

    if config.local_method.learns != "prompt" or config.local_method.contrast:
        raise ConfigError(
            f"method = {config.method!r} does not learn a prompt, or its loss has a term beside that of the records; "
            'choose a method that learns a prompt only from records, for example "promptfl" or "dpfpl"'
        )
    task = build_task(config)
    if not isinstance(task, ImageTask):
        raise ConfigError(
            f"data.ref = {config.data.ref!r}: this needs a run of image classification, on a folder of images or on "
            'the demo (data.ref = "demo")'
        )
    return task
