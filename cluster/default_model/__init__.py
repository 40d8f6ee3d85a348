"""The model that is served when none is named: SmolLM2-135M-Instruct, cut into experts.

Importing this is cheap; the heavy libraries are imported when the model has to be made.
"""

from cluster.default_model.cache import cache_dir
from cluster.default_model.convert import ensure_default_model
from cluster.default_model.errors import DefaultModelError

__all__ = ["DefaultModelError", "cache_dir", "ensure_default_model"]
