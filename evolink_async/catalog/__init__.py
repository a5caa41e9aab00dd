"""What each EvoLink model is documented to accept, and the check of a request against it before it is sent.

Pure: the only I/O is reading its own data file, `models.json`, on first use. Importing this room reads
nothing. It knows 165 models; a model or parameter it doesn't know is never refused, only remarked upon.
"""

from .checking import check
from .findings import Finding, Severity
from .loading import all_models, get_model, kind_of, nearest
from .model import Kind, Model, ParamSpec, Pixels, Rule

__all__ = [
    "Finding",
    "Kind",
    "Model",
    "ParamSpec",
    "Pixels",
    "Rule",
    "Severity",
    "all_models",
    "check",
    "get_model",
    "kind_of",
    "nearest",
]
