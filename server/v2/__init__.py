"""The Open Inference Protocol v2 over HTTP, as Triton speaks it: the raw graphs of the model that this process runs.

`router` has the paths, `ProtocolErrors` gives every refusal the protocol's shape, `paths` and `refusal` describe both
to OpenAPI.
"""

from server.v2.errors import ProtocolErrors
from server.v2.openapi import paths, refusal
from server.v2.routes import router

__all__ = ["ProtocolErrors", "paths", "refusal", "router"]
