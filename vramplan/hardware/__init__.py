"""GPUs: a catalogue of cards, and the ones in this machine."""

from __future__ import annotations

from vramplan.hardware.catalogue import all_gpus, parse_gpu, warnings_for
from vramplan.hardware.gpu import Gpu, GpuProcess, Gpus

__all__ = ["Gpu", "GpuProcess", "Gpus", "all_gpus", "parse_gpu", "warnings_for"]
