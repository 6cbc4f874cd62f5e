"""Studies: many runs of the stages, one thing changed at a time, judged alike, with tables, power laws and plots.

`python -m training.study CONFIG.toml --out DIR`, or `saccade scaling`. What is done is not done again.
"""

from training.study.command import main

__all__ = ["main"]
