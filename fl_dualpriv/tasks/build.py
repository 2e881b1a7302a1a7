"""Build the task of a configuration: data, partition, frozen model and objective, once per process."""

from typing import TYPE_CHECKING

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.methods.base import METHODS
from fl_dualpriv.tasks.base import Task
from fl_dualpriv.tasks.disclosure import delta_problems, keeps_bad_records

if TYPE_CHECKING:
    from fl_dualpriv.tasks.images import ImageTask


def build_task(config: RunConfig) -> Task:
    """Load and check everything the run needs; cached for what it depends on, so that methods share features.

    Raises:
        ConfigError: Data, model, prompt or partition do not work as configured; see the message.
        PrivacyError: A configured δ says nothing about data or populations of this size.
    """
    on_bad = "keep" if keeps_bad_records(config) else "raise"
    if config.data.asks_questions:
        from fl_dualpriv.tasks.questions import build_question_task  # late: a run of images needs none of it

        task: Task = build_question_task(config, on_bad)
    else:
        from fl_dualpriv.tasks.images import build_image_task

        task = build_image_task(config, on_bad)
    if problems := delta_problems(config, max(len(indices) for indices in task.partitions)):
        raise PrivacyError("\n  ".join(problems))
    return task


def image_task(config: RunConfig) -> "ImageTask":
    """`build_task` for what knows prompts of image classification alone, such as the attacks.

    Raises:
        ConfigError: If the run answers questions or learns no prompt, or as `build_task`.
    """
    from fl_dualpriv.tasks.images import ImageTask

    if METHODS[config.method].learns != "prompt" or METHODS[config.method].contrast:
        raise ConfigError(
            f"method = {config.method!r} learns no prompt, or not from records alone, and this works on such prompts; "
            'set it to "promptfl" or "dpfpl", for example'
        )
    task = build_task(config)
    if not isinstance(task, ImageTask):
        raise ConfigError(
            f"data.ref = {config.data.ref!r}: this needs a run of image classification, on a folder of images or on "
            'the demo (data.ref = "demo")'
        )
    return task
