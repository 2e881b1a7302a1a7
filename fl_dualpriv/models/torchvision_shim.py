"""Make ``import torchvision`` work with a CPU build of torch.

The torchvision wheel that fits a CPU torch can have compiled operators that link against CUDA. They are then not
loaded. torchvision still describes its operator ``nms`` to torch, and the import ends in "operator torchvision::nms
does not exist". The imports of open_clip, timm and transformers' image models then fail too, although none of them uses
such an operator here. It is enough to declare the operators without an implementation: calling one still raises
torchvision's own "Couldn't load custom C++ ops".

Every process needs the shim before it first imports open_clip or a transformers image model. The modules that import
them call `install`.
"""

import importlib
import importlib.util

import torch

_DECLARED_WITHOUT_CHECK = ("nms", "qnms")  # torchvision describes these operators even if they are not loaded
_libraries: list[torch.library.Library] = []  # keeps the Library objects: a declaration ends with its object


def install() -> None:
    """Import torchvision, and declare its missing operators if the import fails because of them.

    Without torchvision this does nothing, because transformers works without it. If torchvision imports without help,
    this declares nothing. It may be called any number of times. Every other import error is raised unchanged.
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
