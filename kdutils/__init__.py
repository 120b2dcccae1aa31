"""kdutils: the small module on which the compendium's studies stand.

Each room is imported when it is first used (SPEC 1), so reading published records,
``--help`` and the book's build never import PyTorch.
"""

import lazy_loader as lazy

__version__ = "0.1.0"

_ROOMS = ["centres", "claims", "concierge", "data", "figures", "files", "losses", "metrics"]
_ROOMS += ["models", "notebooks", "pages", "parameters", "pictures", "records", "results", "runs"]
_ROOMS += ["train", "verdicts"]
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=_ROOMS,
    submod_attrs={"runs": ["Study", "grid"], "parameters": ["Parameters"]},
)
