"""Meta's original Llama 4 checkpoints to Transformers directories: planned, streamed in bounded memory, and validated.

The functions here are the commands of the same names, and `load_reference`: `__init__.pyi` lists them with the module of each. A
function's module is imported when the function is first used, so that importing the package costs nothing. To read the code,
begin with `conversion/convert.py`. What each package may import is a contract in pyproject.toml.
"""

import lazy_loader

from llama4_convert import version

__version__ = version.VERSION
__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __dir__() -> list[str]:
    return list(__all__)
