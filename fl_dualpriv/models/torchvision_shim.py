"""Make ``import torchvision`` work with a CPU build of torch.

The torchvision wheel that fits a CPU torch can be one whose compiled operators link against CUDA. They then stay
unloaded, torchvision describes its operator ``nms`` to torch all the same, and the import ends in "operator
torchvision::nms does not exist". With it fail open_clip, timm and transformers' image models, although none of them
uses such an operator here. Declaring the operators, without an implementation, is enough: calling one still raises
torchvision's own "Couldn't load custom C++ ops".

Every process needs it before it first imports open_clip or a transformers image model; the modules that do so call
`install`.
"""

import importlib
import importlib.util

import torch

_DECLARED_WITHOUT_CHECK = ("nms", "qnms")  # the operators that torchvision describes even if they are not loaded
_libraries: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def install() -> None:
    """Import torchvision, declaring its missing operators if that is what stops it.

    Does nothing where torchvision is absent (transformers works without it) or already imports; may be called any
    number of times. An import error of any other kind is raised as it is.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _libraries:
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _DECLARED_WITHOUT_CHECK:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")
