"""What llama.cpp calls the models that it can run, their hyperparameters and their tensors."""

from quantkit.gguf.architectures.model import Model
from quantkit.gguf.architectures.placement import Placed, Source

__all__ = ["Model", "Placed", "Source"]
