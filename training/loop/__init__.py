"""The one training loop: any objective, on one process or many, that goes on after a kill as if nothing had happened.

Needs torch, NumPy and safetensors; TensorBoard and rich are used where they are installed.
"""

from training.loop.config import LoopConfig
from training.loop.diverged import Diverged
from training.loop.loop import Loop, Progress
from training.loop.objective import Objective

__all__ = ["Diverged", "Loop", "LoopConfig", "Objective", "Progress"]
