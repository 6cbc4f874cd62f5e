"""Perception by diffusion: tasks, schedules, the DDIM step, ensembles, and the pipeline that joins them.

No web framework and no torch here; `server` and `training` both stand on this package and never on each other.
"""

__version__ = "0.1.0"
