"""Scales and codes of ggml's super-blocks whose points lie on a line."""
