"""Engines that run what quantkit writes, each in a process of its own; see `process.ask`.

One module per engine, named as `request.Engine` says. It is imported by the worker alone, and has

    begin(request) -> str       import what the engine needs; its versions
    logits(request) -> array    load the model and run it: (tokens, vocabulary) fp32
    tokens(request) -> list     of llama.cpp alone: ids of each text
"""

from quantkit.evaluate.engines.process import ask, ask_tokens
from quantkit.evaluate.engines.request import Answer, Engine, Request, Stage, names

__all__ = ["Answer", "Engine", "Request", "Stage", "ask", "ask_tokens", "names"]
