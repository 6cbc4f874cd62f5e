"""The gateway: FastAPI routes over `saccade.pipeline`; admission, limits, negotiation, problem documents, metrics.
It imports `saccade` and never `training`."""
