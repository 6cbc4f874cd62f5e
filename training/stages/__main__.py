"""`torchrun ... -m training.stages STAGE CONFIG -o RUN [name=value ...]`: a stage on every process of a group."""

from __future__ import annotations

from training.stages.command import main

if __name__ == "__main__":
    main()
