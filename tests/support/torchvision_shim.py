"""Lets torchvision be imported where its compiled operators do not fit the installed torch.

Meta's chat format imports torchvision for its image transforms, which are plain Python. Importing torchvision also
registers shapes for compiled operators (`torchvision/_meta_registrations.py`), and fails if the library that declares
them could not be loaded (a build for another torch). Declared here without an implementation they satisfy that.
"""

from __future__ import annotations

import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # the declarations live as long as these objects

OPERATORS = (
    *("nms", "qnms", "roi_align", "qroi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)


def install() -> None:
    """Make `import torchvision` succeed; does nothing where it already does."""
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor unused) -> Tensor")
        _LIBRARIES.append(library)
        import torchvision  # noqa: F401
