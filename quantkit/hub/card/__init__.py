"""The model card of a published repository: written from manifests, beside a person's own text."""

from quantkit.hub.card.page import Page, Variant
from quantkit.hub.card.render import render

__all__ = ["Page", "Variant", "render"]
