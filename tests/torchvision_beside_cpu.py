"""torchvision's wheel of the package index beside a torch for CPUs, for which it has no operators of its own.

Its import only asks whether they are declared; processors of pictures and videos call none of them.
"""

import importlib.util

import torch


def declare_operators():
    """Declare the operators, where torchvision is installed and torch does not know them."""
    if importlib.util.find_spec("torchvision") is None or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float scale, SymInt h, SymInt w, int n, bool aligned) -> Tensor"
    )
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


_kept: list[torch.library.Library] = []
