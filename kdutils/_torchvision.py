"""Import torchvision beside a CPU build of PyTorch.

The wheel of torchvision on the package index is built for CUDA. Next to a CPU-only PyTorch its
compiled part does not load, and the import stops because two operators have no schema. Declaring
the schemas is enough for models, transforms and datasets, which use neither operator. Where
torchvision's own import succeeds, nothing is declared.
"""

import importlib
import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    schemas = torch.library.Library("torchvision", "DEF")  # dropped schemas would vanish again
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision = importlib.import_module("torchvision")

# torchvision does not import this one by itself
importlib.import_module("torchvision.models.feature_extraction")

__all__ = ["torchvision"]
