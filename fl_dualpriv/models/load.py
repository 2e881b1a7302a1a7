"""Load a frozen model by its name. open_clip and transformers are imported only for a model that needs them."""

from fl_dualpriv.assets import VQA_DEMO_FOLDER
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.models.base import HUGGING_FACE, Backbone, Precision
from fl_dualpriv.models.pruning.tokens import TokenPruner

DEMO = "demo-vqa"


def load_backbone(
    name: str,
    pretrained: str,
    device: str,
    pruner: TokenPruner | None = None,
    precision: Precision = "fp32",
) -> Backbone:
    """Load and freeze a backbone; the weights are read once per process and never random.

    Args:
        name: ``demo`` (the embedded CLIP), ``local-dir:PATH`` or ``hf-hub:NAME`` (a folder or hub name with
            open_clip_config.json and open_clip_model.safetensors or open_clip_pytorch_model.bin), the name of an
            open_clip model, or ``hf:NAME``, a folder or hub name of a transformers model (a family of
            `models.families`) with its tokenizer and image processor.
        pretrained: For an open_clip model name, a tag or a .safetensors, .pt, .pth or .bin file, OpenAI's TorchScript
            archives included; else empty.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        pruner: Pruner of visual tokens inside the image tower; None prunes nothing.
        precision: Precision of the matrix products of the image tower and of the shared-prefix text tower.

    Raises:
        ConfigError: If the model cannot be used exactly as the arguments say.
    """
    if name.startswith(HUGGING_FACE):
        from fl_dualpriv.models.transformers import load_backbone as load
    else:
        from fl_dualpriv.models.open_clip import load_backbone as load
    return load(name, pretrained, device, pruner, precision)


def load_answering_model(
    name: str, device: str, pruner: TokenPruner | None, precision: Precision = "fp32"
) -> AnsweringModel:
    """Load and freeze an answering model; the weights are read once per process and never random.

    Args:
        name: ``demo-vqa`` (the embedded demo), or ``hf:NAME``, a folder or hub name of a transformers model of type
            llava with its processor.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        pruner: Pruner of the visual tokens of each image; None keeps all.
        precision: Precision of the weights and of the matrix products.

    Raises:
        ConfigError: If the model cannot be used exactly as the arguments say.
    """
    from fl_dualpriv.models.llava import load_llava

    if name == DEMO:
        return load_llava(name, str(VQA_DEMO_FOLDER), device, pruner, precision)
    if not name.startswith(HUGGING_FACE):
        raise ConfigError(
            f"backbone.name = {name!r} cannot answer questions; name {DEMO} or {HUGGING_FACE}NAME, a folder or hub "
            "name of a LLaVA model"
        )
    return load_llava(name, name.removeprefix(HUGGING_FACE), device, pruner, precision)
