"""Data: generated scenes, datasets on disk, pre-encoded latents. What is drawn depends on numbers (seed, step or
sample, task, size) and on the files alone, so that there is nothing to resume."""

from training.data.batch import TASKS, Batch, Sample, Source
from training.data.crop import Crop
from training.data.faults import Faults, TooManyFaults
from training.data.folders import Folders
from training.data.images import ImageClasses
from training.data.latents import Latents, LatentWriter
from training.data.mix import Mixture
from training.data.order import Order
from training.data.raw import Raw, RawAmodal, RawClass, RawDepth, RawFlow, Reader
from training.data.readers.registry import READERS, open_reader
from training.data.scenes import OPEN_FILES, Scenes, put_in_front, read_real

__all__ = [
    "OPEN_FILES",
    "READERS",
    "TASKS",
    "Batch",
    "Crop",
    "Faults",
    "Folders",
    "ImageClasses",
    "LatentWriter",
    "Latents",
    "Mixture",
    "Order",
    "Raw",
    "RawAmodal",
    "RawClass",
    "RawDepth",
    "RawFlow",
    "Reader",
    "Sample",
    "Scenes",
    "Source",
    "TooManyFaults",
    "open_reader",
    "put_in_front",
    "read_real",
]
